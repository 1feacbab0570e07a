// Standard normal numbers by counter: number n of a stream is a function of n, the stream's seed and step, and of
// nothing else, so that any thread may make any of them. Philox 4x32 with ten rounds (Salmon et al., SC 2011) makes
// four words of a counter, and Box and Muller's transform two numbers of two words. Sixteen counters are taken
// together, and number 16 j + c of their 64 is made of the words j of counter c: registers are then filled without a
// shuffle.
//
// About 90 operations for each register of numbers, of which Philox is half. A word gives 23 bits of a uniform
// number, so the largest magnitude is sqrt(48 ln 2) = 5.77.
#pragma once
#include "diffusion.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

// Both halves of the products of 32-bit numbers.
FC_INLINE void multiply(Words a, uint32_t b, Words& high, Words& low) {
#if defined(__x86_64__)
  // The machine multiplies every other lane.
  typedef uint64_t Pairs __attribute__((vector_size(kVectorBytes)));
  const Words factor = Words{} + b;
  const Pairs odd_a = (Pairs)a >> 32;
#if FASTCIFAR_VECTOR_BYTES == 64
  const Pairs even = (Pairs)_mm512_maskz_mul_epu32((__mmask8)-1, (__m512i)a, (__m512i)factor);
  const Pairs odd = (Pairs)_mm512_maskz_mul_epu32((__mmask8)-1, (__m512i)odd_a, (__m512i)factor);
#elif FASTCIFAR_VECTOR_BYTES == 32
  const Pairs even = (Pairs)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
  const Pairs odd = (Pairs)_mm256_mul_epu32((__m256i)odd_a, (__m256i)factor);
#else
  const Pairs even = (Pairs)_mm_mul_epu32((__m128i)a, (__m128i)factor);
  const Pairs odd = (Pairs)_mm_mul_epu32((__m128i)odd_a, (__m128i)factor);
#endif
  const Pairs lower = Pairs{} + 0xffffffffull;
  low = (Words)((even & lower) | odd << 32);
  high = (Words)(even >> 32 | (odd & ~lower));
#else
  for (int l = 0; l < kVectorBytes / 4; ++l) {
    const uint64_t product = uint64_t(a[l]) * b;
    high[l] = uint32_t(product >> 32);
    low[l] = uint32_t(product);
  }
#endif
}

FC_INLINE V<float> square_root(V<float> x) {
#if FASTCIFAR_VECTOR_BYTES == 64
  return (V<float>)_mm512_maskz_sqrt_ps((__mmask16)-1, (__m512)x);
#elif FASTCIFAR_VECTOR_BYTES == 32
  return (V<float>)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (V<float>)_mm_sqrt_ps((__m128)x);
#else
  for (int l = 0; l < kLanes<float>; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}

// Two independent normal numbers of two words.
FC_INLINE void box_muller(Words first, Words second, V<float>& one, V<float>& other) {
  const V<float> u = __builtin_convertvector((I<float>)(first >> 9), V<float>) * 0x1p-23f + 0x1p-24f;
  const V<float> radius = square_root(log<float>(u) * -2.0f);
  // A quarter of the circle, and an angle within it of no more than an eighth to either side.
  const I<float> turn = (I<float>)(second >> 8), quarter = turn >> 22;
  const V<float> part = __builtin_convertvector((turn & 0x3fffff) - 0x200000, V<float>);
  const V<float> a = part * (1.57079632679489661923f * 0x1p-22f), square = a * a;
  V<float> s = square * 2.7557319224e-6f - 1.9841269841e-4f;
  s = (s * square + 8.3333333333e-3f) * square - 1.6666666667e-1f;
  s = s * square * a + a;
  V<float> c = square * -2.7557319224e-7f + 2.4801587302e-5f;
  c = (c * square - 1.3888888889e-3f) * square + 4.1666666667e-2f;
  c = (c * square - 0.5f) * square + 1.0f;
  const I<float> swap = (quarter & 1) != 0;
  const I<float> sign_one = ((quarter + 1) & 2) << 30, sign_other = (quarter & 2) << 30;
  one = radius * (V<float>)((I<float>)select<float>(swap, s, c) ^ sign_one);
  other = radius * (V<float>)((I<float>)select<float>(swap, c, s) ^ sign_other);
}

static void normal(uint64_t seed, uint64_t step, int64_t first, int64_t count, float* out) {
  constexpr int L = kLanes<float>;
  Words lane{};
  for (int l = 0; l < L; ++l) lane[l] = uint32_t(l);
  for (int64_t i = 0; i < count; i += kNormalBlock) {
    const uint64_t counter = uint64_t(first + i) / 4;  // sixteen of them have one upper half
    for (int c = 0; c < 16; c += L) {
      Words w0 = lane + uint32_t(counter + uint64_t(c)), w1 = Words{} + uint32_t(counter >> 32);
      Words w2 = Words{} + uint32_t(step), w3 = Words{} + uint32_t(step >> 32);
      uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round) {
        Words high0, low0, high1, low1;
        multiply(w0, 0xD2511F53u, high0, low0);
        multiply(w2, 0xCD9E8D57u, high1, low1);
        w0 = high1 ^ w1 ^ k0;
        w1 = low1;
        w2 = high0 ^ w3 ^ k1;
        w3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      V<float> z[4];
      box_muller(w0, w1, z[0], z[1]);
      box_muller(w2, w3, z[2], z[3]);
      for (int j = 0; j < 4; ++j) store(out + i + 16 * j + c, z[j], Full{});
    }
  }
}

}  // namespace fastcifar::FASTCIFAR_ISA
