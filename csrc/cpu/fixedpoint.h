// Raw kernels of the fixed-point cast: no torch type in here. Host side: fixedpoint.cpp, kernels: fixedpoint.inl.
#pragma once
#include <stdint.h>

#include "types.h"

namespace fastcifar {

// In the order of the C++ enumerations AP_RND ... and AP_SAT ..., and of fastcifar/fixedpoint/reference.py.
enum Rounding : int { kRnd, kRndZero, kRndMinInf, kRndInf, kRndConv, kTrn, kTrnZero, kStochastic, kRoundings };
enum Overflow : int { kSat, kSatZero, kSatSym, kWrap, kWrapSm, kOverflows };

// What of a mode is code of its own; the rest is numbers in a Cast.
enum Rounder : int { kByThreshold, kToEven, kAtRandom, kRounders };
enum Bounder : int { kClamp, kZeroOutside, kModulo, kTopBits, kTopBitsOfFloor, kBounders };

struct Format {
  int width = 1, rounding = kTrn, overflow = kWrap, saturated_bits = 0;
  bool is_signed = true, wrap_gradient = true;

  int rounder() const { return rounding == kStochastic ? kAtRandom : rounding == kRndConv ? kToEven : kByThreshold; }
  int bounder() const {
    if (overflow == kSat || overflow == kSatSym) return kClamp;
    if (overflow == kSatZero) return kZeroOutside;
    if (saturated_bits == 0) return overflow == kWrap ? kModulo : kTopBitsOfFloor;
    return kTopBits;
  }
};

constexpr double two_to(int n) {
  double value = 1;
  for (; n > 0; --n) value *= 2;
  for (; n < 0; ++n) value /= 2;
  return value;
}

// The numbers of one cast, all exact in A: float for at most 24 bits and F >= 0, else double.
template <class A>
struct Cast {
  A scale = 1, inverse = 1;  // 2^F and back
  A least = 0;          // of |x| 2^F where x is not 0: it may underflow, and truncation needs its sign (double only)
  A threshold[2] = {};  // a magnitude goes up where its fraction is above this: of x >= 0, of x < 0
  A low = 0, high = 0;  // the integers that are in range
  // Of what wraps: a number modulo `period` lies in [-offset, period - offset), its upper half is from `half` on.
  A period = 1, frequency = 1, offset = 0, half = 0;
  // Of kTopBits: the low bits that stay, and what stands above them in a number that overflowed.
  A ones = 0, above_positive = 0, above_negative = 0;
  int width = 1;                     // of kTopBitsOfFloor
  bool flips = false, same = false;  // whether the low bits may all change, and when: sign == top, or !=
  bool passes = false;               // the gradient passes out of range as well
  uint32_t key = 0, gamma = 1;       // of stochastic rounding: where its sequence starts, and its step, odd

  Cast() = default;
  // F fractional bits, a whole number or NaN.
  Cast(const Format& f, double frac_bits, uint64_t seed) {
    constexpr A kJustBelowHalf = sizeof(A) == 4 ? A(0x1.fffffep-2) : A(0x1.fffffffffffffp-2), kNever = 2;
    const int w = f.width, n = f.saturated_bits;
    if (frac_bits == frac_bits) {
      scale = A(two_to(int(frac_bits)));
      inverse = A(two_to(-int(frac_bits)));
      if (sizeof(A) == 8 && frac_bits < 0) least = A(0x1p-1000);
    } else {
      scale = inverse = A(frac_bits);
    }
    const bool up[2] = {f.rounding == kRnd || f.rounding == kRndInf,
                        f.rounding == kRndMinInf || f.rounding == kRndInf};  // a tie, in magnitude
    for (int s = 0; s < 2; ++s) threshold[s] = up[s] ? kJustBelowHalf : A(0.5);
    if (f.rounding == kTrn || f.rounding == kTrnZero) threshold[0] = threshold[1] = kNever;
    if (f.rounding == kTrn) threshold[1] = 0;
    high = A(two_to(f.is_signed ? w - 1 : w) - 1);
    low = f.is_signed ? A(-two_to(w - 1)) : 0;
    if (f.overflow == kSatSym && f.is_signed && w > 1) low = -high;
    const bool wraps = f.overflow == kWrap || f.overflow == kWrapSm;
    passes = wraps && f.wrap_gradient;
    // The low bits that stay; of kTopBitsOfFloor one more than the type's.
    const int kept = f.bounder() == kTopBits ? w - n : f.bounder() == kModulo ? w - 1 : w;
    period = A(two_to(kept + 1));
    frequency = A(two_to(-kept - 1));
    half = A(two_to(kept));
    offset = f.bounder() == kModulo && f.is_signed ? half : 0;
    ones = half - 1;
    above_negative = f.is_signed ? A(-two_to(w - 1)) : A(two_to(w) - two_to(kept));
    above_positive = !f.is_signed ? above_negative : n > 1 ? A(two_to(w - 1) - two_to(kept)) : 0;
    width = w;
    flips = f.overflow == kWrapSm;
    same = n > 1;
    // The finaliser of SplitMix64 makes two keys of the seed.
    uint64_t z = seed + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    key = uint32_t(z);
    gamma = uint32_t(z >> 32) | 1;
  }
};

constexpr int64_t kCastBlock = 4096;     // elements that are cast together, and summed together
constexpr int64_t kCastScratch = 4;      // blocks of the compute type that a kernel needs, where it converts
constexpr int64_t kShortestShared = 64;  // neighbours that share a binary point: fewer, and each brings its own

// `rows` rows of `length` neighbours in memory (the last may end early, at `total`). Row r has the binary point of
// casts[r % channels]; or, where `scale` is given, column c has scale[c], and all rows casts[0].
struct CastProblem {
  const void *x = nullptr, *grad = nullptr;
  void* out = nullptr;  // values, stored integers, or the gradient to x; null where that is not wanted
  int dtype = 0;
  int raw_bytes = 0;  // of a stored integer; 0: values
  int rounder = 0, bounder = 0;
  int64_t rows = 1, length = 0, total = 0, channels = 1;
  const void* casts = nullptr;                      // Cast<A>[channels]
  const void *scale = nullptr, *inverse = nullptr;  // A[length]
  int64_t chunk = 1;                                // with `scale`: rows that an item takes
  double* partial = nullptr;  // sums of the gradient to the binary point: [items], or [chunks, length]
  bool stream = false;

  int64_t blocks() const { return (length + kCastBlock - 1) / kCastBlock; }
  int64_t items() const { return (scale ? (rows + chunk - 1) / chunk : rows) * blocks(); }
};

using CastKernel = void (*)(const CastProblem&, int64_t begin, int64_t end, void* scratch);

struct FixedPointKernels {
  CastKernel forward[2], backward[2];  // float, double
  // Numbers in memory, by dtype.
  void (*limit_digits[kDTypes])(const void* x, void* out, int64_t n, int64_t k, bool is_signed, bool stream);
};

}  // namespace fastcifar
