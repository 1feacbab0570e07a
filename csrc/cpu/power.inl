// Powers of two for softmax statistics, of which a call takes one a logit.
#pragma once
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

// Coefficients of 2^r, |r| <= 1/2, least in their largest relative error (Remez): 1.2e-7 of five (the first is one ulp
// above 1, the nearest float to what is best), 3e-16 of ten.
template <class A>
struct PowerConstants;
template <>
struct PowerConstants<float> {
  static constexpr float round =
      0x1.8p23f + 127;                   // adding it leaves an integer and the exponent's bias in the low bits
  static constexpr float lowest = -126;  // 2^t of no less is a normal number
  static constexpr int mantissa = 23;
  static constexpr float terms[] = {0x1.000002p0f,  0x1.62e432p-1f, 0x1.ebf8p-3f,
                                    0x1.c6a9aep-5f, 0x1.3d604cp-7f, 0x1.627602p-10f};
};
template <>
struct PowerConstants<double> {
  static constexpr double round = 0x1.8p52 + 1023, lowest = -1022;
  static constexpr int mantissa = 52;
  static constexpr double terms[] = {1.0,
                                     0x1.62e42fefa3a28p-1,
                                     0x1.ebfbdff82c61fp-3,
                                     0x1.c6b08d703955ap-5,
                                     0x1.3b2ab6fb82090p-7,
                                     0x1.5d87fea4a74fep-10,
                                     0x1.43091387c6945p-13,
                                     0x1.ffcb3f1b2a40fp-17,
                                     0x1.62be686585a13p-20,
                                     0x1.b689b4a57ca9ap-24,
                                     0x1.e8b75edc05919p-28};
};

// 2^t of n registers of t <= 0, which are brought up to `lowest`: less would be a subnormal number, which a processor
// may take a hundred times as long to make, and no sum with a 1 in it knows the difference. NaN stays NaN. Cheaper than
// exp: one part of log2(e), folded into the temperature, and no second factor for small results.
template <class A, int n>
FC_INLINE void powers_of_two(V<A> (&t)[n], V<A> (&p)[n]) {
  using C = PowerConstants<A>;
  V<A> shifted[n], r[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) t[i] = larger(splat<A>(C::lowest), t[i]);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) shifted[i] = t[i] + C::round;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) r[i] = t[i] - (shifted[i] - C::round);
  constexpr int kTerms = sizeof C::terms / sizeof(A);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) p[i] = C::terms[kTerms - 1] * r[i] + C::terms[kTerms - 2];
#pragma GCC unroll 16
  for (int k = kTerms - 3; k >= 0; --k)
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) p[i] = p[i] * r[i] + C::terms[k];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) p[i] = p[i] * (V<A>)((I<A>)shifted[i] << C::mantissa);
}

}  // namespace fastcifar::FASTCIFAR_ISA
