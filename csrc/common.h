// What every family's host side shares: checks, the dtype switch, allocation, the walk over a layout, and the split of
// the work over torch's threads. Built on torch's stable ABI only, so that one binary serves torch 2.10 and later.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"

namespace fastcifar {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Python validates first and raises the right exception type; these keep a direct call of an op from touching memory
// that it should not. They surface as RuntimeError.
#define FC_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

inline int dtype_index(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      break;
  }
  FC_CHECK(false, op, ": expected float32, float64, bfloat16 or float16");
  return -1;
}

// The dtype in which kernels compute and keep state.
inline ScalarType compute_dtype(int dtype) { return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float; }
inline int64_t compute_bytes(int dtype) { return dtype == kFloat64 ? 8 : 4; }

inline Isa checked_isa() {
  const Isa isa = active_isa();
  FC_CHECK(isa != kIsaUnavailable,
           "FASTCIFAR_CPU_ISA names an instruction set that this machine does not execute; "
           "expected one of baseline, avx2, avx512, up to what the machine has");
  return isa;
}

using Dims = std::vector<int64_t>;

inline Dims sizes_of(const Tensor& t) { return Dims(t.sizes().begin(), t.sizes().end()); }
inline Dims strides_of(const Tensor& t) { return Dims(t.strides().begin(), t.strides().end()); }

// A fresh CPU tensor, straight through the C shim: the boxed dispatcher would cost a microsecond more.
inline Tensor empty_strided(const Dims& sizes, const Dims& strides, ScalarType dtype) {
  AtenTensorHandle handle;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), code,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Dims contiguous_strides(const Dims& sizes) {
  Dims strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  return strides;
}

// Strides of a dense tensor of these sizes whose dimensions lie in memory in the order of `like` (what
// torch.empty_like gives for a tensor with strides `like`).
inline Dims dense_strides(const Dims& sizes, const Dims& like) {
  Dims order(sizes.size()), strides(sizes.size());
  for (size_t d = 0; d < order.size(); ++d) order[d] = d;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return like[a] > like[b]; });
  int64_t stride = 1;
  for (size_t k = order.size(); k-- > 0; stride *= std::max<int64_t>(sizes[order[k]], 1)) strides[order[k]] = stride;
  return strides;
}

// A copy of t laid out by `strides`.
inline Tensor copy_as(const Tensor& t, const Dims& strides) {
  Tensor out = empty_strided(sizes_of(t), strides, t.scalar_type());
  torch::stable::copy_(out, t);
  return out;
}

// Dimensions 1.. of a sequence [T, N...] seen as [panels, neurons].
struct Panels {
  int64_t panels = 1, neurons = 1;
};
// One tensor's elements from one neuron to the next, and from one panel to the next.
struct PanelStrides {
  int64_t neuron = 1, panel = 0;
};

// Folds the inner dimensions, taken in the memory order of strides[0], so far as every one of the tensors allows.
// Returns false where more than one panel dimension would remain; else `folded` has an entry for each of `strides`.
inline bool fold(const Dims& sizes, const std::vector<Dims>& strides, Panels& out, std::vector<PanelStrides>& folded) {
  Dims order;
  for (size_t d = 1; d < sizes.size(); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[0][a] < strides[0][b]; });
  out = {};
  folded.assign(strides.size(), {});
  const auto all = [&](auto follows) {
    for (size_t i = 0; i < strides.size(); ++i)
      if (!follows(i)) return false;
    return true;
  };
  if (!order.empty())
    for (size_t i = 0; i < strides.size(); ++i) folded[i].neuron = strides[i][order[0]];
  size_t k = 0;
  for (; k < order.size() && all([&](size_t i) { return strides[i][order[k]] == folded[i].neuron * out.neurons; }); ++k)
    out.neurons *= sizes[order[k]];
  for (size_t first = k; k < order.size(); ++k) {
    if (k == first)
      for (size_t i = 0; i < strides.size(); ++i) folded[i].panel = strides[i][order[k]];
    else if (!all([&](size_t i) { return strides[i][order[k]] == folded[i].panel * out.panels; }))
      return false;
    out.panels *= sizes[order[k]];
  }
  return true;
}

// Sizes and distances of a convolution's window are below this, so that no product of two of them, times channels that
// fit in memory, leaves int64.
constexpr int64_t kMostWindow = int64_t(1) << 24;

inline bool window_pair(const std::vector<int64_t>& v, int64_t lowest) {
  return v.size() == 2 && std::min(v[0], v[1]) >= lowest && std::max(v[0], v[1]) < kMostWindow;
}

// 64-byte aligned scratch of one thread.
inline std::unique_ptr<void, decltype(&std::free)> aligned_scratch(int64_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return {p, &std::free};
}

// Results from this size on are written past the caches: they would not stay in them until they are read again.
constexpr int64_t kStreamBytes = 16 << 20;
// A thread is worth waking for this many element-steps (some ten microseconds of work).
constexpr int64_t kGrain = 32 << 10;

// f(begin, end) over [0, n) on torch's threads, at least `grain` items each. libgomp, below torch, is not instrumented,
// so that the thread sanitizer does not see its fork and join; they are declared to it here, and nothing else is.
#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
inline char fork_point, join_point;
#define FC_HAPPENS_BEFORE(point) __tsan_release(&point)
#define FC_HAPPENS_AFTER(point) __tsan_acquire(&point)
#else
#define FC_HAPPENS_BEFORE(point)
#define FC_HAPPENS_AFTER(point)
#endif
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  const auto body = [&f](int64_t begin, int64_t end) {
    FC_HAPPENS_AFTER(fork_point);
    f(begin, end);
    FC_HAPPENS_BEFORE(join_point);
  };
  FC_HAPPENS_BEFORE(fork_point);
  torch::stable::parallel_for(0, n, grain, body);
  FC_HAPPENS_AFTER(join_point);
}

}  // namespace fastcifar
