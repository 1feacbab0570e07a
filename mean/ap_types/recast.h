// SPDX-License-Identifier: BSD-3-Clause
// From one fixed-point grid to another: what ap_fixed does when a number is assigned, on plain integers.
//
// A number is raw * 2^-frac, raw an integer. recast() gives the raw of the same number in another format in two steps:
// rounding to the format's grid by its quantization mode, as if it had no bounds, then its overflow mode on the result
// (so a carry of the first can overflow in the second).
#pragma once

#include <cmath>
#include <cstdint>

enum ap_q_mode {
  AP_RND,          // nearest; a tie goes up
  AP_RND_ZERO,     // nearest; a tie goes toward zero
  AP_RND_MIN_INF,  // nearest; a tie goes down
  AP_RND_INF,      // nearest; a tie goes away from zero
  AP_RND_CONV,     // nearest; a tie goes to the even neighbour
  AP_TRN,          // down
  AP_TRN_ZERO,     // toward zero
};

enum ap_o_mode {
  AP_SAT,       // to the nearest bound
  AP_SAT_ZERO,  // to zero
  AP_SAT_SYM,   // to the nearest bound, where the lower is minus the upper; also of the lowest number itself
  AP_WRAP,      // modulo 2^width, with N bits saturated
  AP_WRAP_SM,   // sign-magnitude wrap
};

namespace fixedpoint {

__extension__ typedef __int128 wide;
__extension__ typedef unsigned __int128 uwide;

struct Format {
  int width, int_bits;  // int_bits counts the sign; it may be negative or above width
  bool is_signed;
  ap_q_mode quantization;
  ap_o_mode overflow;
  int saturated_bits;  // N of AP_WRAP and AP_WRAP_SM

  constexpr int frac_bits() const { return width - int_bits; }
  constexpr wide highest() const { return wide((uwide(1) << (width - is_signed)) - 1); }
  constexpr wide lowest() const { return is_signed ? -highest() - 1 : 0; }
};

// Shifts by any amount, without undefined behaviour.
constexpr uwide shift_left(uwide bits, int by) { return by > 127 ? 0 : bits << by; }
constexpr wide shift_right(wide raw, int by) { return by > 127 ? (raw < 0 ? -1 : 0) : raw >> by; }

// raw * 2^-drop as its floor and what is left, the latter beside one half in the same unit.
struct Split {
  wide floor;
  uwide rest, half;
};

constexpr Split split(wide raw, int drop) {
  // Beyond 128 dropped bits all of raw is below one half, or within one half of the integer above.
  if (drop > 128) return {shift_right(raw, drop), raw < 0 ? uwide(3) : uwide(raw != 0), 2};
  if (drop <= 0) return {raw, 0, 1};
  return {shift_right(raw, drop), uwide(raw) & (shift_left(1, drop) - 1), uwide(1) << (drop - 1)};
}

constexpr bool rounds_up(Split number, ap_q_mode mode) {
  const bool negative = number.floor<0, tie = number.rest == number.half, above = number.rest> number.half;
  switch (mode) {
    case AP_RND:
      return above || tie;
    case AP_RND_ZERO:
      return above || (tie && negative);
    case AP_RND_MIN_INF:
      return above;
    case AP_RND_INF:
      return above || (tie && !negative);
    case AP_RND_CONV:
      return above || (tie && (number.floor & 1));
    case AP_TRN_ZERO:
      return negative && number.rest != 0;
    case AP_TRN:
      break;
  }
  return false;
}

// The low `width` bits as a number.
constexpr wide read_bits(uwide bits, int width, bool is_signed) {
  const int spare = 128 - width;
  return is_signed ? wide(bits << spare) >> spare : wide(bits << spare >> spare);
}

// `bits` with those from `low` to `high` set to ones or zeros (none where low > high).
constexpr uwide fill_bits(uwide bits, int low, int high, bool ones) {
  if (low > high) return bits;
  const uwide mask = shift_left(shift_left(1, high - low + 1) - 1, low);
  return ones ? bits | mask : bits & ~mask;
}

// AP_WRAP of a number out of range, whose low bits are given.
constexpr wide wrap(uwide bits, bool negative, const Format& to) {
  const int top = to.width - 1, n = to.saturated_bits;
  if (n > 0 && to.is_signed) bits = fill_bits(fill_bits(bits, top, top, negative), to.width - n, top - 1, !negative);
  if (n > 0 && !to.is_signed) bits = fill_bits(bits, to.width - n, top, true);
  return read_bits(bits, to.width, to.is_signed);
}

// AP_WRAP_SM of a number out of range, whose low bits are given. `deleted` is the bit above the highest that is kept,
// of the number before rounding: with a carry into it, N = 0 is the published simulator's rule rather than arithmetic.
constexpr wide wrap_sign_magnitude(uwide bits, bool negative, bool deleted, const Format& to) {
  const int top = to.width - 1, n = to.saturated_bits;
  const bool sign = bits >> top & 1;
  if (n == 0) return read_bits(fill_bits(deleted != sign ? ~bits : bits, top, top, deleted), to.width, true);
  const bool flip = n == 1 ? negative != sign : negative == bool(bits >> (to.width - n) & 1);
  if (flip) bits = ~bits;
  return read_bits(fill_bits(fill_bits(bits, to.width - n, top - 1, !negative), top, top, negative), to.width, true);
}

// The raw of raw * 2^-frac in format `to`, of at most 128 bits with a sign.
constexpr wide recast(wide raw, int frac, const Format& to) {
  const int drop = frac - to.frac_bits();
  const Split number = split(raw, drop);
  const wide rounded = number.floor + (drop > 0 && rounds_up(number, to.quantization));
  const uwide bits = drop < 0 ? shift_left(uwide(raw), -drop) : uwide(rounded);
  // Whether those bits are the whole number: a shift to the left may have pushed some out.
  const bool whole = drop >= 0 || raw == 0 || (drop > -128 && wide(bits) >> -drop == raw);
  const bool in_range = whole && wide(bits) >= to.lowest() && wide(bits) <= to.highest();
  const bool negative = rounded < 0;

  switch (to.overflow) {
    case AP_SAT_SYM:
      if (to.is_signed && negative && (!in_range || wide(bits) == to.lowest())) return to.lowest() | 1;
      if (!in_range) return negative ? to.lowest() : to.highest();
      break;
    case AP_SAT:
      if (!in_range) return negative ? to.lowest() : to.highest();
      break;
    case AP_SAT_ZERO:
      if (!in_range) return 0;
      break;
    case AP_WRAP:
      if (!in_range) return wrap(bits, negative, to);
      break;
    case AP_WRAP_SM:
      if (!in_range) {
        const uwide unrounded = drop < 0 ? bits : uwide(number.floor);
        return wrap_sign_magnitude(bits, negative, to.width < 128 && (unrounded >> to.width & 1), to);
      }
      break;
  }
  return wide(bits);
}

// The raw of x in format `to`, exactly: no intermediate rounding. NaN is 0; an infinity is a number of its sign beyond
// every format's range whose low bits are zeros.
inline wide recast(double x, const Format& to) {
  if (std::isnan(x)) return 0;
  if (std::isinf(x)) return recast(wide(x < 0 ? -1 : 1), -1000000, to);
  int exponent = 0;
  const double mantissa = std::frexp(x, &exponent);
  return recast(wide(std::ldexp(mantissa, 53)), 53 - exponent, to);
}

// -1, 0 or 1 as a * 2^-a_frac is below, equal to or above b * 2^-b_frac.
constexpr int compare(wide a, int a_frac, wide b, int b_frac) {
  if (a_frac < b_frac) return -compare(b, b_frac, a, a_frac);
  const Split number = split(a, a_frac - b_frac);
  if (number.floor != b) return number.floor < b ? -1 : 1;
  return number.rest != 0;
}

}  // namespace fixedpoint
