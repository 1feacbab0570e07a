// Standard normal numbers by counter: number n of a stream is a function of n, the stream's seed and step, and of
// nothing else, so that any thread may make any of them. Philox 4x32 with ten rounds (Salmon et al., SC 2011) makes
// four words of a counter, and Box and Muller's transform two numbers of two words. Sixteen counters are taken
// together, and number 16 j + c of their 64 is made of the words j of counter c: registers are then filled without a
// shuffle.
//
// About 60 operations for each register of numbers, of which Philox is a third. A word gives 23 bits of a uniform
// number, so the largest magnitude is sqrt(48 ln 2) = 5.77.
#pragma once
#include "diffusion.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

constexpr int kPhiloxRounds = 7;

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Pairs __attribute__((vector_size(kVectorBytes)));

// The product of the lower halves of each lane. What is in the upper halves of Philox's words is never looked at, which
// spares it all shuffles: the machine multiplies every other word.
FC_INLINE Pairs multiply(Pairs a, uint32_t b) {
  const Pairs factor = Pairs{} + b;
#if FASTCIFAR_VECTOR_BYTES == 64
  return (Pairs)_mm512_maskz_mul_epu32((__mmask8)-1, (__m512i)a, (__m512i)factor);
#elif FASTCIFAR_VECTOR_BYTES == 32
  return (Pairs)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__x86_64__)
  return (Pairs)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
  return (a & 0xffffffffu) * factor;
#endif
}

// The four words of some counters, one a lane.
struct PhiloxWords {
  Pairs w[4];
};
FC_INLINE PhiloxWords philox(Pairs low, uint32_t high, uint64_t step, uint64_t seed) {
  Pairs w0 = low, w1 = Pairs{} + high, w2 = Pairs{} + uint32_t(step), w3 = Pairs{} + uint32_t(step >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Pairs p0 = multiply(w0, 0xD2511F53u), p1 = multiply(w2, 0xCD9E8D57u);
    w0 = (p1 >> 32) ^ w1 ^ (Pairs{} + k0);
    w1 = p1;
    w2 = (p0 >> 32) ^ w3 ^ (Pairs{} + k1);
    w3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{w0, w1, w2, w3}};
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
  Pairs lane{};
  for (int l = 0; l < L / 2; ++l) lane[l] = uint64_t(2 * l);
  const Pairs lower = Pairs{} + 0xffffffffull;
  for (int64_t i = 0; i < count; i += kNormalBlock) {
    const uint64_t counter = uint64_t(first + i) / 4;  // sixteen of them have one upper half
    for (int c = 0; c < 16; c += L) {
      const Pairs even_counters = lane + uint64_t(uint32_t(counter) + uint32_t(c));
      const PhiloxWords even = philox(even_counters, uint32_t(counter >> 32), step, seed);
      const PhiloxWords odd = philox(even_counters + 1, uint32_t(counter >> 32), step, seed);
      Words w[4];
      for (int k = 0; k < 4; ++k) w[k] = (Words)((even.w[k] & lower) | odd.w[k] << 32);
      V<float> z[4];
      box_muller(w[0], w[1], z[0], z[1]);
      box_muller(w[2], w[3], z[2], z[3]);
      for (int j = 0; j < 4; ++j) store(out + i + 16 * j + c, z[j], Full{});
    }
  }
}

}  // namespace fastcifar::FASTCIFAR_ISA
