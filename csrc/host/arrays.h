// What the bindings share: names of instruction sets and dtypes, numpy arrays as memory, and scratch.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "../cpu/dispatch.h"

namespace py = pybind11;

namespace fastcifar {

inline const char* const kIsaNames[kIsas] = {"baseline", "avx2", "avx512"};
inline const char* const kDTypeNames[kDTypes] = {"float32", "float64", "bfloat16", "float16"};
constexpr int64_t kItemSize[kDTypes] = {4, 8, 2, 2};

template <int n>
inline int index_of(const char* const (&names)[n], const std::string& name, const char* what) {
  for (int i = 0; i < n; ++i)
    if (name == names[i]) return i;
  throw py::value_error(std::string("unknown ") + what + " '" + name + "'");
}

inline Isa isa_of(const std::string& name) {
  const int isa = index_of(kIsaNames, name, "instruction set");
  if (isa > best_isa()) throw py::value_error("this machine does not execute " + name);
  return Isa(isa);
}

using Array = std::optional<py::array>;

inline void* data_of(const Array& a, int64_t elements, int64_t item, const char* name) {
  if (!a) return nullptr;
  if (!(a->flags() & py::array::c_style) || a->itemsize() != item || a->size() != elements)
    throw py::value_error(std::string("expected ") + name + " to be C-contiguous with " + std::to_string(elements) +
                          " elements of " + std::to_string(item) + " bytes");
  return const_cast<void*>(a->data());
}

inline std::unique_ptr<void, decltype(&std::free)> scratch_of(int64_t bytes) {
  return {std::aligned_alloc(64, (bytes + 63) / 64 * 64), &std::free};
}

void bind_diffusion(py::module_& m);

}  // namespace fastcifar
