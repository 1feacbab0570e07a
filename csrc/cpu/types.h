// The element types that the raw kernels know, and their order in every kernel table.
#pragma once
#include <stdint.h>

namespace fastcifar {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kDTypes = 4 };

// The type in which a kernel computes: double for double, float for the rest.
template <class S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class S>
using compute_t = typename ComputeType<S>::type;

}  // namespace fastcifar
