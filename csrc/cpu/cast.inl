// One register of the fixed-point cast. Rounding is done on magnitudes, whose fraction is exact (that of -0.49999997
// above its floor is not), overflow on the rounded number in the same lanes: floats hold 24 bits, and reduction modulo
// a power of two by floor and a product is exact for every float, however large.
#pragma once
#include "fixedpoint.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

#if FASTCIFAR_VECTOR_BYTES == 64
FC_INLINE V<float> floor(V<float> x) { return (V<float>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | 8); }
FC_INLINE V<double> floor(V<double> x) {
  return (V<double>)_mm512_roundscale_pd((__m512d)x, _MM_FROUND_TO_NEG_INF | 8);
}
FC_INLINE V<float> to_even(V<float> x) { return (V<float>)_mm512_roundscale_ps((__m512)x, 8); }
FC_INLINE V<double> to_even(V<double> x) { return (V<double>)_mm512_roundscale_pd((__m512d)x, 8); }
#elif FASTCIFAR_VECTOR_BYTES == 32
FC_INLINE V<float> floor(V<float> x) { return (V<float>)_mm256_floor_ps((__m256)x); }
FC_INLINE V<double> floor(V<double> x) { return (V<double>)_mm256_floor_pd((__m256d)x); }
FC_INLINE V<float> to_even(V<float> x) { return (V<float>)_mm256_round_ps((__m256)x, 8); }
FC_INLINE V<double> to_even(V<double> x) { return (V<double>)_mm256_round_pd((__m256d)x, 8); }
#else
// The addition leaves no room for a fraction; a number too large for it has none.
template <class Register>
FC_INLINE Register to_even(Register x) {
  using A = decltype(x[0] + 0);
  constexpr A kNoFraction = sizeof(A) == 4 ? A(0x1p23) : A(0x1p52);
  const Register a = abs<A>(x);
  const I<A> sign = (I<A>)x ^ (I<A>)a;
  const Register nearest = select<A>(a < kNoFraction, (a + kNoFraction) - kNoFraction, a);
  return (Register)((I<A>)nearest | sign);
}
template <class Register>
FC_INLINE Register floor(Register x) {
  using A = decltype(x[0] + 0);
  const Register nearest = to_even(x);
  return nearest - select<A>(nearest > x, splat<A>(1), Register{});
}
#endif

// ---- random numbers: a function of the seed's keys and of the element's index ---------------------------------------

template <class A>
struct Unsigned;
template <>
struct Unsigned<float> {
  typedef uint32_t Vector __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Unsigned<double> {
  typedef uint64_t Vector __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using U = typename Unsigned<A>::Vector;

// A step of a Weyl sequence, scrambled: 32 bits a lane, reference.py's uniform. The sequence's own steps are additions.
template <class A>
FC_INLINE V<A> random(uint64_t first, const Cast<A>& c) {
  constexpr uint32_t kLow = 0xffffffff;
  U<A> lane;
  for (int k = 0; k < kLanes<A>; ++k) lane[k] = k;
  const uint32_t low = uint32_t(first), above = uint32_t(first >> 32) * 0x9e3779b9u;
  U<A> z = lane * c.gamma + (low * c.gamma + c.key + above);
  if (low > kLow - (kLanes<A> - 1)) z += (U<A>)((lane + low) & kLow) < low ? U<A>{} + 0x9e3779b9u : U<A>{};
  z &= kLow;
  z = ((z ^ (z >> 16)) * 0x21f0aaad) & kLow;
  z = ((z ^ (z >> 15)) * 0x735a2d97) & kLow;
  z ^= z >> 15;
  return __builtin_convertvector((I<A>)((z >> 9) * 2 + 1), V<A>) * A(0x1p-24);
}

// ---- one register ---------------------------------------------------------------------------------------------------

template <class A>
struct Stored {
  V<A> q;       // the stored integer
  I<A> inside;  // where the gradient passes
};

template <class A>
FC_INLINE V<A> scaled(V<A> x, V<A> scale, V<A> least) {  // |x| 2^F
  V<A> a = abs<A>(x) * scale;
  if constexpr (sizeof(A) == 8) a = select<A>((a < least) & (x != A(0)), least, a);
  return a;
}

// The integer that a magnitude `a` with the sign of x is rounded to.
template <int kRounder, class A>
FC_INLINE V<A> round_magnitude(V<A> a, V<A> x, const Cast<A>& c, uint64_t index) {
  V<A> m;
  if constexpr (kRounder == kToEven) {
    m = to_even(a);
  } else {
    const V<A> whole = floor(a);
    V<A> threshold;
    if constexpr (kRounder == kAtRandom)
      threshold = random<A>(index, c);
    else
      threshold = select<A>((I<A>)x < 0, splat<A>(c.threshold[1]), splat<A>(c.threshold[0]));
    m = whole + select<A>(a - whole > threshold, splat<A>(1), V<A>{});
  }
  return (V<A>)((I<A>)m ^ ((I<A>)x & (I<A>)splat<A>(A(-0.0))));
}

// Whole numbers below 2^33 (2^25 of float) as integers, and back.
template <class A>
FC_INLINE I<A> to_integer(V<A> x) {
  if constexpr (sizeof(A) == 4) {
    return __builtin_convertvector(x, I<A>);
  } else {
    const V<A> shift = splat<A>(0x1.8p52);
    return (I<A>)(x + shift) - (I<A>)shift;
  }
}
template <class A>
FC_INLINE V<A> from_integer(I<A> x) {
  if constexpr (sizeof(A) == 4) {
    return __builtin_convertvector(x, V<A>);
  } else {
    const V<A> shift = splat<A>(0x1.8p52);
    return (V<A>)(x + (I<A>)shift) - shift;
  }
}

// wrap_sm without saturated bits: the sign is bit `width` of the number before it was rounded, `below`; where that is
// not the top bit of the rounded one, the low bits turn around.
template <class A>
FC_INLINE V<A> sign_magnitude(I<A> v, I<A> below, int width) {
  using Lane = decltype(I<A>{}[0] + 0);
  const I<A> ones = I<A>{} + ((Lane(1) << (width - 1)) - 1);
  const I<A> sign = I<A>{} - (I<A>)(((U<A>)below >> width) & 1), top = I<A>{} - (I<A>)(((U<A>)v >> (width - 1)) & 1);
  return from_integer<A>(((v ^ sign ^ top) & ones) | (sign & ~ones));
}

template <int kBounder, class A>
FC_INLINE Stored<A> bounded(V<A> v, V<A> a, V<A> x, const Cast<A>& c) {
  const V<A> clamped = larger(splat<A>(c.low), smaller<A>(splat<A>(c.high), v));  // NaN where v is
  Stored<A> s;
  s.inside = v == clamped;
  if constexpr (kBounder == kClamp) {
    s.q = clamped;
  } else if constexpr (kBounder == kZeroOutside) {
    s.q = (V<A>)((I<A>)v & (s.inside | (v != v)));
  } else {
    const I<A> within = s.inside;
    s.inside |= I<A>{} - (c.passes ? 1 : 0);
    if constexpr (kBounder == kTopBitsOfFloor) {
      const V<A> sign_bits = (V<A>)((I<A>)x & (I<A>)splat<A>(A(-0.0)));
      const V<A> below = floor((V<A>)((I<A>)a ^ (I<A>)sign_bits));
      const V<A> start = floor(below * c.frequency) * c.period;
      s.q = select<A>(within, v, sign_magnitude<A>(to_integer<A>(v - start), to_integer<A>(below - start), c.width));
    } else {
      const V<A> m = v - floor((v + c.offset) * c.frequency) * c.period;  // where v + offset rounds, its floor does not
      if constexpr (kBounder == kModulo) {
        s.q = m;
      } else {
        const I<A> top = m >= c.half, sign = v < A(0);
        const V<A> rest = m - select<A>(top, splat<A>(c.half), V<A>{});
        const I<A> flip = (sign ^ top ^ (I<A>{} - (c.same ? 1 : 0))) & (I<A>{} - (c.flips ? 1 : 0));
        const V<A> above = select<A>(sign, splat<A>(c.above_negative), splat<A>(c.above_positive));
        s.q = select<A>(within, v, select<A>(flip, c.ones - rest, rest) + above);
      }
    }
    s.q = s.q + (v - v);  // NaN where v is; and no -0
    return s;
  }
  s.q = s.q + A(0);  // no -0
  return s;
}

template <int kRounder, int kBounder, class A>
FC_INLINE Stored<A> cast(V<A> x, const Cast<A>& c, uint64_t index) {
  if constexpr (kRounder == kToEven && kBounder < kModulo) {  // the same for both signs: no way round by magnitudes
    const V<A> v = to_even(x * c.scale);
    return bounded<kBounder, A>(v, v, x, c);
  }
  V<A> a = scaled<A>(x, splat<A>(c.scale), splat<A>(c.least));
  if constexpr (kBounder >= kModulo) {  // infinity: any large number
    a = smaller<A>(splat<A>(sizeof(A) == 4 ? A(0x1p100) : A(0x1p1000)), a);
  }
  return bounded<kBounder, A>(round_magnitude<kRounder, A>(a, x, c, index), a, x, c);
}

}  // namespace fastcifar::FASTCIFAR_ISA
