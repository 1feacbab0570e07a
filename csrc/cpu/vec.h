// One SIMD register of lanes, written once for every instruction set on top of the compiler's vector types, whose
// operators (+ - * / and comparisons) are the machine's own IEEE operations lane by lane. Included only by the
// isa/*.cpp files, which define FASTCIFAR_ISA (a namespace) and FASTCIFAR_VECTOR_BYTES (16, 32 or 64): everything here
// lives in that namespace, so that the linker can never put one instruction set's copy in place of another's.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "types.h"

#define FC_INLINE static inline __attribute__((always_inline))
#define FC_INLINE_MEMBER inline __attribute__((always_inline))

namespace fastcifar::FASTCIFAR_ISA {

constexpr int kVectorBytes = FASTCIFAR_VECTOR_BYTES;

// V<float> is a register of floats, I<float> the integers of the same lanes (what a comparison gives: -1 or 0).
template <class A>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integer __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integer __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using V = typename Simd<A>::Vector;
template <class A>
using I = typename Simd<A>::Integer;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class A>
FC_INLINE V<A> splat(A value) {
  return value - V<A>{};  // not {} + value: that would turn -0 into +0
}
template <class A>
FC_INLINE V<A> select(I<A> mask, V<A> yes, V<A> no) {
  return mask ? yes : no;
}
template <class A>
FC_INLINE V<A> abs(V<A> x) {
  return (V<A>)((I<A>)x & ~(I<A>)splat<A>(A(-0.0)));
}

// a where it is larger (smaller) and b elsewhere, with a NaN among them too: what the machine's own instructions do.
FC_INLINE V<float> larger(V<float> a, V<float> b) {
#if FASTCIFAR_VECTOR_BYTES == 64
  return (V<float>)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a,
                                       (__m512)b);  // the plain one makes gcc warn of its header
#elif FASTCIFAR_VECTOR_BYTES == 32
  return (V<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select<float>(a > b, a, b);
#endif
}
FC_INLINE V<double> larger(V<double> a, V<double> b) { return select<double>(a > b, a, b); }
template <class A>
FC_INLINE V<A> smaller(V<A> a, V<A> b) {
  return select<A>(a < b, a, b);
}

// ---- storage <-> register: float and double as they are, bfloat16 and float16 widened to float ----------------------

// How many lanes a load or store touches: all of them, or the first `count` at the end of a row.
struct Full {};
struct Tail {
  int count;
};

template <class Raw, class S>
FC_INLINE Raw load_raw(const S* p, Full) {
  Raw r;
  memcpy(&r, p, sizeof r);
  return r;
}
template <class Raw, class S>
FC_INLINE Raw load_raw(const S* p, Tail tail) {
  Raw r = {};
  memcpy(&r, p, sizeof(S) * tail.count);
  return r;
}

// The first lanes of a register of float or double, without the call that a copy of unknown length is.
#if FASTCIFAR_VECTOR_BYTES == 64
FC_INLINE V<float> load_tail(const float* p, int count) {
  return (V<float>)_mm512_maskz_loadu_ps((1u << count) - 1, p);
}
FC_INLINE V<double> load_tail(const double* p, int n) { return (V<double>)_mm512_maskz_loadu_pd((1u << n) - 1, p); }
FC_INLINE void store_tail(float* p, V<float> x, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)x); }
FC_INLINE void store_tail(double* p, V<double> x, int n) { _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)x); }
#elif FASTCIFAR_VECTOR_BYTES == 32
FC_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FC_INLINE __m256i first_pairs(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FC_INLINE V<float> load_tail(const float* p, int n) { return (V<float>)_mm256_maskload_ps(p, first_lanes(n)); }
FC_INLINE V<double> load_tail(const double* p, int n) { return (V<double>)_mm256_maskload_pd(p, first_pairs(n)); }
FC_INLINE void store_tail(float* p, V<float> x, int n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)x); }
FC_INLINE void store_tail(double* p, V<double> x, int n) { _mm256_maskstore_pd(p, first_pairs(n), (__m256d)x); }
#else
template <class A>
FC_INLINE V<A> load_tail(const A* p, int n) {
  return load_raw<V<A>>(p, Tail{n});
}
template <class A>
FC_INLINE void store_tail(A* p, V<A> x, int n) {
  memcpy(p, &x, sizeof(A) * n);
}
#endif

typedef uint16_t Half16 __attribute__((vector_size(kVectorBytes / 2)));  // as many 16-bit values as floats fit

FC_INLINE V<float> widen(Half16 raw, bfloat16*) { return (V<float>)(__builtin_convertvector(raw, I<float>) << 16); }
FC_INLINE Half16 narrow(V<float> x, bfloat16*) {  // round to nearest, ties to even; every NaN becomes the quiet one
  const I<float> bits = (I<float>)x;
  const I<float> rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  return __builtin_convertvector(x == x ? rounded : I<float>{} + 0x7fc0, Half16);
}

#if FASTCIFAR_VECTOR_BYTES == 64
FC_INLINE V<float> widen(Half16 raw, float16*) { return (V<float>)_mm512_cvtph_ps((__m256i)raw); }
FC_INLINE Half16 narrow(V<float> x, float16*) { return (Half16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif FASTCIFAR_VECTOR_BYTES == 32
FC_INLINE V<float> widen(Half16 raw, float16*) { return (V<float>)_mm256_cvtph_ps((__m128i)raw); }
FC_INLINE Half16 narrow(V<float> x, float16*) { return (Half16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
FC_INLINE V<float> widen(Half16 raw, float16*) {
  // Shift the fields into place and let a multiplication by 2^112 re-bias the exponent, subnormals included.
  const I<float> h = __builtin_convertvector(raw, I<float>);
  const I<float> sign = (h & 0x8000) << 16;
  const V<float> scaled = (V<float>)((h & 0x7fff) << 13) * 0x1p112f;
  const I<float> special = ((h & 0x7fff) << 13) + (0x1c0 << 22);  // infinity and NaN: exponent of all ones
  return (V<float>)(((h & 0x7c00) == 0x7c00 ? special | 0x7f800000 : (I<float>)scaled) | sign);
}
FC_INLINE Half16 narrow(V<float> x, float16*) {
  const I<float> bits = (I<float>)x, sign = bits & (int32_t)0x80000000, magnitude = bits ^ sign;
  // Below 2^-14 the addition of 0.5 aligns the mantissa so that the machine rounds the subnormal for us.
  const I<float> subnormal = (I<float>)((V<float>)magnitude + 0.5f) - 0x3f000000;
  const I<float> normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
  I<float> h = magnitude < (113 << 23) ? subnormal : normal;
  h = magnitude >= (143 << 23) ? I<float>{} + 0x7c00 : h;  // 65536 and above, and infinity
  h = magnitude > 0x7f800000 ? I<float>{} + 0x7e00 : h;    // NaN
  return __builtin_convertvector((h | ((sign >> 16) & 0x8000)) & 0xffff, Half16);
}
#endif

FC_INLINE V<float> load(const float* p, Full) { return load_raw<V<float>>(p, Full{}); }
FC_INLINE V<float> load(const float* p, Tail tail) { return load_tail(p, tail.count); }
FC_INLINE V<double> load(const double* p, Full) { return load_raw<V<double>>(p, Full{}); }
FC_INLINE V<double> load(const double* p, Tail tail) { return load_tail(p, tail.count); }
template <class Width>
FC_INLINE V<float> load(const bfloat16* p, Width w) {
  return widen(load_raw<Half16>(p, w), (bfloat16*)nullptr);
}
template <class Width>
FC_INLINE V<float> load(const float16* p, Width w) {
  return widen(load_raw<Half16>(p, w), (float16*)nullptr);
}

// A non-temporal store writes past the caches: a result far larger than they are would only evict what is still
// needed, and an ordinary store would first read the line that it is about to overwrite.
template <class Raw>
FC_INLINE void stream_raw(void* p, Raw r) {
#if defined(__x86_64__)
  if constexpr (sizeof(Raw) == 64) {
#if FASTCIFAR_VECTOR_BYTES == 64
    _mm512_stream_si512((__m512i*)p, (__m512i)r);
#endif
  } else if constexpr (sizeof(Raw) == 32) {
#if FASTCIFAR_VECTOR_BYTES >= 32
    _mm256_stream_si256((__m256i*)p, (__m256i)r);
#endif
  } else if constexpr (sizeof(Raw) == 16) {
    _mm_stream_si128((__m128i*)p, (__m128i)r);
  } else {
    _mm_stream_si64((long long*)p, (long long)r);
  }
#else
  memcpy(p, &r, sizeof r);
#endif
}
FC_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class S, class Raw>
FC_INLINE void store_raw(S* p, Raw r, Full, bool stream) {
  if (stream)
    stream_raw(p, r);
  else
    memcpy(p, &r, sizeof r);
}
template <class S, class Raw>
FC_INLINE void store_raw(S* p, Raw r, Tail tail, bool) {
  memcpy(p, &r, sizeof(S) * tail.count);
}
FC_INLINE void store(float* p, V<float> x, Full, bool stream = false) { store_raw(p, x, Full{}, stream); }
FC_INLINE void store(float* p, V<float> x, Tail tail, bool = false) { store_tail(p, x, tail.count); }
FC_INLINE void store(double* p, V<double> x, Full, bool stream = false) { store_raw(p, x, Full{}, stream); }
FC_INLINE void store(double* p, V<double> x, Tail tail, bool = false) { store_tail(p, x, tail.count); }
template <class Width>
FC_INLINE void store(bfloat16* p, V<float> x, Width w, bool stream = false) {
  store_raw(p, narrow(x, p), w, stream);
}
template <class Width>
FC_INLINE void store(float16* p, V<float> x, Width w, bool stream = false) {
  store_raw(p, narrow(x, p), w, stream);
}

// Stores 1 where the mask is set and 0 elsewhere: the bits of 1 under the mask, which spares half precision the
// rounding.
template <class Width>
FC_INLINE void store_mask(bfloat16* p, I<float> mask, Width w, bool stream) {
  store_raw(p, __builtin_convertvector(mask & 0x3f80, Half16), w, stream);
}
template <class Width>
FC_INLINE void store_mask(float16* p, I<float> mask, Width w, bool stream) {
  store_raw(p, __builtin_convertvector(mask & 0x3c00, Half16), w, stream);
}

// Between memory of S and a register of A: as load and store, and also float in memory and double in registers.
typedef float HalfFloat __attribute__((vector_size(kVectorBytes / 2)));  // as many floats as doubles fit
FC_INLINE V<double> to_double(HalfFloat x) {  // the compiler's own conversion to wide registers goes by quarters
#if FASTCIFAR_VECTOR_BYTES == 64
  return (V<double>)_mm512_cvtps_pd((__m256)x);
#elif FASTCIFAR_VECTOR_BYTES == 32
  return (V<double>)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, V<double>);
#endif
}
// Adds the lanes of `x`, as doubles, to two registers.
FC_INLINE void add_halves(V<double>& low, V<double>& high, V<float> x) {
  struct {
    HalfFloat low, high;
  } halves;
  memcpy(&halves, &x, sizeof x);
  low += to_double(halves.low);
  high += to_double(halves.high);
}
template <class A, class S, class Width>
FC_INLINE V<A> load_as(const S* p, Width w) {
  if constexpr (sizeof(A) == 8 && sizeof(S) == 4)
    return to_double(load_raw<HalfFloat>(p, w));
  else
    return load(p, w);
}
template <class S, class Register, class Width>
FC_INLINE void store_as(S* p, Register x, Width w, bool stream) {
  if constexpr (sizeof(x[0]) == 8 && sizeof(S) == 4)
    store_raw(p, __builtin_convertvector(x, HalfFloat), w, stream);
  else
    store(p, x, w, stream);
}

// Whole numbers of 0 to 255, a byte each.
template <class A>
FC_INLINE auto to_bytes(V<A> x) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<A>)));
  return __builtin_convertvector(__builtin_convertvector(x, I<A>), Bytes);
}
template <class A>
FC_INLINE void store_bytes(uint8_t* p, V<A> x, Full, bool stream) {
  const auto bytes = to_bytes<A>(x);
  if constexpr (sizeof bytes >= 8) {
    if (stream) return stream_raw(p, bytes);
  }
  memcpy(p, &bytes, sizeof bytes);
}
template <class A>
FC_INLINE void store_bytes(uint8_t* p, V<A> x, Tail tail, bool) {
  const auto bytes = to_bytes<A>(x);
  memcpy(p, &bytes, tail.count);
}

// Which of eight numbers are not 0.
FC_INLINE uint8_t eight_bits(const double* p) {
  uint8_t bits = 0;
  for (int k = 0; k < 8; ++k) bits |= uint8_t((p[k] != 0.0) << k);
  return bits;
}
FC_INLINE uint8_t eight_bits(const float* p) {
#if FASTCIFAR_VECTOR_BYTES >= 32
  const __m256 eight = _mm256_loadu_ps(p);
  return uint8_t(_mm256_movemask_ps(_mm256_cmp_ps(eight, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
#elif defined(__x86_64__)
  const __m128 zero = _mm_setzero_ps();
  const int low = _mm_movemask_ps(_mm_cmpneq_ps(_mm_loadu_ps(p), zero));
  return uint8_t(low | _mm_movemask_ps(_mm_cmpneq_ps(_mm_loadu_ps(p + 4), zero)) << 4);
#else
  uint8_t bits = 0;
  for (int k = 0; k < 8; ++k) bits |= uint8_t((p[k] != 0.0f) << k);
  return bits;
#endif
}

// Asks for what will be read one page further on. A kernel that takes a block of neurons through time reads a row of
// the block from each step in turn, and the hardware prefetcher, which stops at the end of a page, never gets up to
// speed on rows of a few kilobytes: without this a backward pass runs at half the bandwidth.
FC_INLINE void prefetch_next_page(const void* p) { __builtin_prefetch((const char*)((uintptr_t)p + 4096), 0, 2); }

// Calls f(offset, Full or Tail) over a row of n elements, a register of A at a time.
template <class A, class F>
FC_INLINE void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, Full{});
  if (i < n) f(i, Tail{int(n - i)});
}

// ---- functions ------------------------------------------------------------------------------------------------------

template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float log2e = 0x1.715476p0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  static constexpr float lowest = -104.0f;   // exp of less is 0
  static constexpr float highest = 89.0f;    // exp of more is infinite
  static constexpr float normal = -87.0f;    // exp of no less is a normal number
  static constexpr int mantissa = 23, bias = 127, terms = 7;
};
template <>
struct ExpConstants<double> {
  static constexpr double log2e = 0x1.71547652b82fep0, ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
  static constexpr double round = 0x1.8p52;
  static constexpr double lowest = -746.0, highest = 710.0, normal = -708.0;
  static constexpr int mantissa = 52, bias = 1023, terms = 13;
};

// exp(x) for x <= 0, within 1.5 ulp (subnormal results included; tests/test_host.py asserts it). exp(-inf) = 0 and NaN
// stays NaN. x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite's two-part ln 2), then the Taylor series of exp(r),
// whose first dropped term is below half an ulp, then 2^n in two factors so that a subnormal result is rounded once.
// Also right, to the same bound, up to `highest`.
template <class A>
FC_INLINE V<A> exp_in_range(V<A> x) {  // of no less than `lowest`
  using C = ExpConstants<A>;
  const V<A> shifted = x * C::log2e + C::round;
  const V<A> n = shifted - C::round;
  const V<A> r = (x - n * C::ln2_high) - n * C::ln2_low;
  constexpr double kReciprocalFactorial[] = {
      1.,        1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800.};
  // Terms in pairs over r^2: half as long a chain of dependent operations as one by one, and two operations fewer.
  const V<A> square = r * r;
  V<A> p = A(kReciprocalFactorial[C::terms]) * r + A(kReciprocalFactorial[C::terms - 1]);
#pragma GCC unroll 16
  for (int k = C::terms - 2; k >= 3; k -= 2)
    p = p * square + (A(kReciprocalFactorial[k]) * r + A(kReciprocalFactorial[k - 1]));
  p = (p * square + r) + A(1);
#if FASTCIFAR_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4)
    return (V<A>)_mm512_scalef_ps((__m512)p, (__m512)n);
  else
    return (V<A>)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#else
  // The low bits of `shifted` are n modulo 2^(mantissa - 1), as a two's complement number.
  using Int = decltype(I<A>{}[0] + 0);
  const I<A> exponent = ((I<A>)shifted << (8 * sizeof(A) - C::mantissa)) >> (8 * sizeof(A) - C::mantissa);
  const I<A> half = exponent >> 1;
  const V<A> first = (V<A>)((half + Int(C::bias)) << C::mantissa);
  const V<A> second = (V<A>)((exponent - half + Int(C::bias)) << C::mantissa);
  return p * first * second;
#endif
}

template <class A>
FC_INLINE V<A> exp_nonpositive(V<A> x) {
  return exp_in_range<A>(select<A>(x < ExpConstants<A>::lowest, splat<A>(ExpConstants<A>::lowest), x));
}

// exp(x) within 1.5 ulp; infinite where it overflows, NaN of NaN.
template <class A>
FC_INLINE V<A> exp(V<A> x) {
  return exp_nonpositive<A>(select<A>(x > ExpConstants<A>::highest, splat<A>(ExpConstants<A>::highest), x));
}

template <class A>
struct LogConstants;
template <>
struct LogConstants<float> {
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr int32_t root_half = 0x3f3504f3;  // the bits of 1 / sqrt(2)
  static constexpr int terms = 5;
};
template <>
struct LogConstants<double> {
  static constexpr double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
  static constexpr int64_t root_half = 0x3fe6a09e667f3bcd;
  static constexpr int terms = 11;
};

// log(x) of a positive normal number, within 2 ulp (tests/test_host.py asserts it); NaN stays NaN. x = 2^n m with m
// from 1 / sqrt(2) to sqrt(2), and log m = 2 artanh(s), s = (m - 1) / (m + 1), a series in s^2 <= 0.0295.
template <class A>
FC_INLINE V<A> log(V<A> x) {
  using C = LogConstants<A>;
  using E = ExpConstants<A>;
  const I<A> n = ((I<A>)x - C::root_half) >> E::mantissa;
  const V<A> m = (V<A>)((I<A>)x - (n << E::mantissa));
  const V<A> f = m - A(1), s = f / (m + A(1)), square = s * s;
  V<A> p = splat<A>(A(2.0 / (2 * C::terms - 1)));
#pragma GCC unroll 16
  for (int k = C::terms - 1; k >= 2; --k) p = p * square + A(2.0 / (2 * k - 1));
  const V<A> exponent = __builtin_convertvector(n, V<A>);
  // 2 s = f - s f: where n is 0, f is exact and the rest small beside it.
  const V<A> rest = s * (p * square - f);
  const V<A> result = exponent * C::ln2_high + (f + (rest + exponent * C::ln2_low));
  return select<A>(x == x, result, x);
}

}  // namespace fastcifar::FASTCIFAR_ISA
