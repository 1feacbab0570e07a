// What is tested and measured below the families: vec.h's functions on arrays, and the machine's two ceilings.
#pragma once
#include "common_kernels.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

template <class A>
void exp_array(const void* x, void* out, int64_t n) {
  for_each_vector<A>(n,
                     [&](int64_t i, auto width) { store((A*)out + i, exp<A>(load((const A*)x + i, width)), width); });
}
template <class A>
void log_array(const void* x, void* out, int64_t n) {
  for_each_vector<A>(n,
                     [&](int64_t i, auto width) { store((A*)out + i, log<A>(load((const A*)x + i, width)), width); });
}
template <class S>
void widen_array(const void* x, void* out, int64_t n) {
  for_each_vector<float>(n,
                         [&](int64_t i, auto width) { store((float*)out + i, load((const S*)x + i, width), width); });
}
template <class S>
void narrow_array(const void* x, void* out, int64_t n) {
  for_each_vector<float>(n,
                         [&](int64_t i, auto width) { store((S*)out + i, load((const float*)x + i, width), width); });
}

static void stream_copy(void* to, const void* from, int64_t bytes) {
  float* target = (float*)to;
  const float* source = (const float*)from;
  const bool aligned = (uintptr_t)to % kVectorBytes == 0;
  for_each_vector<float>(bytes / 4,
                         [&](int64_t i, auto width) { store(target + i, load(source + i, width), width, aligned); });
  stream_fence();
  memcpy((char*)to + bytes / 4 * 4, (const char*)from + bytes / 4 * 4, bytes % 4);
}

// Twelve chains, enough to hide the latency of both units; x * 0.5 + 0.5 stays at 1. -ffp-contract=off keeps the two
// operations apart, as in every kernel here, so this is the ceiling of unfused arithmetic.
static int64_t multiply_add(int64_t iterations) {
  constexpr int kChains = 12;
  V<float> chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = splat<float>(float(c) / kChains);
  for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      chain[c] = chain[c] * 0.5f + 0.5f;
      asm volatile("" : "+v"(chain[c]));  // or the compiler would compute the fixed point itself
    }
  return iterations * kChains * kLanes<float> * 2;
}

extern const CommonKernels common_kernels;
const CommonKernels common_kernels = {
    {exp_array<float>, exp_array<double>, nullptr, nullptr},
    {log_array<float>, log_array<double>, nullptr, nullptr},
    {nullptr, nullptr, widen_array<bfloat16>, widen_array<float16>},
    {nullptr, nullptr, narrow_array<bfloat16>, narrow_array<float16>},
    stream_copy,
    multiply_add,
};

}  // namespace fastcifar::FASTCIFAR_ISA
