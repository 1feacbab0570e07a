// Kernels that belong to no family; fastcifar._host offers them to the tests and the benchmarks.
#pragma once
#include "types.h"

namespace fastcifar {

using ArrayKernel = void (*)(const void* x, void* out, int64_t n);

struct CommonKernels {
  ArrayKernel exp[kDTypes], log[kDTypes];
  ArrayKernel widen[kDTypes], narrow[kDTypes];
  void (*stream_copy)(void* to, const void* from, int64_t bytes);
  int64_t (*multiply_add)(int64_t iterations);
};

}  // namespace fastcifar
