// SPDX-License-Identifier: BSD-3-Clause
// ap_fixed<W, I, Q, O, N> and ap_ufixed<W, I, Q, O, N>: the subset of AMD's (Xilinx's) published fixed-point types that
// fastcifar's generated code uses, with the same results to the bit, so that a design can be compiled and checked where
// the FPGA tool's headers are not at hand. Written anew from the published semantics; C++14 with g++.
//
// W bits of which I are integer bits (with the sign): the number is raw * 2^(I - W). Q and O say what assignment does
// with bits that have no place: recast.h. + - * / and unary - give a type that holds the exact result, except that a
// quotient is cut toward zero to the dividend's fractional bits; so only assignment rounds or overflows.
// << and >> move the bits within the type and let those fall that leave it.
//
// Here, not there: a new number is 0; no type, intermediate results included, may exceed 128 bits; no mixed arithmetic
// with float or double. A signed minimum over minus one unit in the last place gives the positive quotient, which the
// result's type can hold; the published simulator gives the negative one, and so does this header where
// AP_FIXED_SIMULATOR_DIVISION is defined.
#pragma once

#include <type_traits>
#include <utility>

#include "recast.h"

template <int W, int I, bool S, ap_q_mode Q = AP_TRN, ap_o_mode O = AP_WRAP, int N = 0>
struct ap_fixed_base;

namespace fixedpoint {

// The fixed-point type of an operand: an ap_fixed_base for itself and for what is made of it, and for an integer type
// the ap_fixed_base of as many bits.
template <int W, int I, bool S, ap_q_mode Q, ap_o_mode O, int N>
ap_fixed_base<W, I, S, Q, O, N> fixed_type(const ap_fixed_base<W, I, S, Q, O, N>&);
template <class T, class = std::enable_if_t<std::is_integral<T>::value>>
ap_fixed_base<std::is_same<T, bool>::value ? 1 : 8 * sizeof(T), std::is_same<T, bool>::value ? 1 : 8 * sizeof(T),
              std::is_signed<T>::value>
fixed_type(const T&);
template <class T>
using fixed_of = decltype(fixed_type(std::declval<const T&>()));

constexpr int larger(int a, int b) { return a > b ? a : b; }

// The types of results, for A and B fixed-point types.
template <class A, class B>
struct Sum {
  enum {
    frac = larger(A::frac, B::frac),
    iwidth = larger(A::iwidth + (B::sign && !A::sign), B::iwidth + (A::sign && !B::sign)) + 1,
  };
  typedef ap_fixed_base<iwidth + frac, iwidth, A::sign || B::sign> type;
  typedef ap_fixed_base<iwidth + frac, iwidth, true> difference;
};
template <class A, class B>
using Product = ap_fixed_base<A::width + B::width, A::iwidth + B::iwidth, A::sign || B::sign>;
template <class A, class B>
struct Quotient {
  enum {
    shift = larger(B::frac, 0),
    // the width in which the published simulator divides, and which the one quotient that is too large for it leaves
    simulated_width = larger(A::width + shift + (B::sign && !A::sign), B::width + (A::sign && !B::sign)),
  };
  typedef ap_fixed_base<B::sign + A::width + shift, B::sign + A::iwidth + B::frac, A::sign || B::sign> type;
};

constexpr wide aligned(wide raw, int by) { return wide(shift_left(uwide(raw), by)); }

// Bits of a number, from `low` to `high`, both included, to read and to write as an unsigned integer.
template <class Fixed>
class BitRange {
 public:
  BitRange(Fixed& number, int high, int low) : number_(number), high_(high), low_(low) {}

  BitRange& operator=(uint64_t value) {
    const uwide mask = fill_bits(0, low_, high_, true);
    number_.set_raw(
        read_bits((uwide(number_.raw()) & ~mask) | (shift_left(value, low_) & mask), Fixed::width, Fixed::sign));
    return *this;
  }
  uint64_t to_uint64() const { return uint64_t(read_bits(uwide(number_.raw()) >> low_, high_ - low_ + 1, false)); }
  int64_t to_int64() const { return int64_t(to_uint64()); }

 private:
  Fixed& number_;
  int high_, low_;
};

}  // namespace fixedpoint

template <int W, int I, bool S, ap_q_mode Q, ap_o_mode O, int N>
struct ap_fixed_base {
  static_assert(W >= 1, "ap_fixed: expected a width of 1 or more");
  static_assert(W + !S <= 128, "ap_fixed: a number, or the exact result of an operation, exceeds 128 bits");
  static_assert(N >= 0 && N <= W, "ap_fixed: expected from 0 to W saturated bits");
  static_assert(S || O != AP_WRAP_SM, "ap_ufixed: AP_WRAP_SM is defined for signed numbers only");

  enum { width = W, iwidth = I, frac = W - I, sign = S };
  // 64 bits where they do, so that arrays of narrow numbers stay small
  typedef std::conditional_t<(W + !S <= 64), int64_t, fixedpoint::wide> Raw;

  static constexpr fixedpoint::Format format() { return {W, I, S, Q, O, N}; }

  constexpr ap_fixed_base() : raw_(0) {}
  ap_fixed_base(double x) : raw_(Raw(fixedpoint::recast(x, format()))) {}
  ap_fixed_base(float x) : ap_fixed_base(double(x)) {}
  template <class T, class B = fixedpoint::fixed_of<T>>
  constexpr ap_fixed_base(const T& other) : raw_(Raw(fixedpoint::recast(B::raw_of(other), B::frac, format()))) {}

  constexpr Raw raw() const { return raw_; }
  void set_raw(fixedpoint::wide raw) { raw_ = Raw(raw); }
  static constexpr ap_fixed_base of_raw(fixedpoint::wide raw) { return ap_fixed_base(raw, Exact()); }
  static constexpr fixedpoint::wide raw_of(const ap_fixed_base& x) { return x.raw_; }
  template <class T, class = std::enable_if_t<std::is_integral<T>::value>>
  static constexpr fixedpoint::wide raw_of(T x) {
    return x;
  }

  // The number itself (of more than 53 bits: the double nearest to it, a tie to even), and its integer part.
  double to_double() const { return std::ldexp(double(raw_), -frac); }
  constexpr int64_t to_int64() const {
    const auto number = fixedpoint::split(raw_, frac);
    return int64_t(frac < 0 ? fixedpoint::shift_left(raw_, -frac) : number.floor + (raw_ < 0 && number.rest != 0));
  }
  constexpr int to_int() const { return int(to_int64()); }

  fixedpoint::BitRange<ap_fixed_base> range(int high, int low) { return {*this, high, low}; }
  fixedpoint::BitRange<const ap_fixed_base> range(int high, int low) const { return {*this, high, low}; }
  fixedpoint::BitRange<ap_fixed_base> range() { return range(W - 1, 0); }
  fixedpoint::BitRange<const ap_fixed_base> range() const { return range(W - 1, 0); }

  constexpr ap_fixed_base<W + 1, I + 1, true> operator-() const {
    return ap_fixed_base<W + 1, I + 1, true>::of_raw(-fixedpoint::wide(raw_));
  }

  constexpr ap_fixed_base operator<<(int by) const {
    if (by < 0) return *this >> -by;
    return of_raw(fixedpoint::read_bits(fixedpoint::shift_left(raw_, by), W, S));
  }
  constexpr ap_fixed_base operator>>(int by) const {
    return by < 0 ? *this << -by : of_raw(fixedpoint::shift_right(raw_, by));
  }

  template <class T>
  ap_fixed_base& operator+=(const T& other) {
    return *this = ap_fixed_base(*this + other);
  }
  template <class T>
  ap_fixed_base& operator-=(const T& other) {
    return *this = ap_fixed_base(*this - other);
  }
  template <class T>
  ap_fixed_base& operator*=(const T& other) {
    return *this = ap_fixed_base(*this * other);
  }
  template <class T>
  ap_fixed_base& operator/=(const T& other) {
    return *this = ap_fixed_base(*this / other);
  }
  ap_fixed_base& operator<<=(int by) { return *this = *this << by; }
  ap_fixed_base& operator>>=(int by) { return *this = *this >> by; }

 private:
  struct Exact {};
  constexpr ap_fixed_base(fixedpoint::wide raw, Exact) : raw_(Raw(raw)) {}

  Raw raw_;
};

template <int W, int I, ap_q_mode Q = AP_TRN, ap_o_mode O = AP_WRAP, int N = 0>
struct ap_fixed : ap_fixed_base<W, I, true, Q, O, N> {
  using Base = ap_fixed_base<W, I, true, Q, O, N>;
  using Base::Base;
  constexpr ap_fixed() = default;
  constexpr ap_fixed(const Base& other) : Base(other) {}
};

template <int W, int I, ap_q_mode Q = AP_TRN, ap_o_mode O = AP_WRAP, int N = 0>
struct ap_ufixed : ap_fixed_base<W, I, false, Q, O, N> {
  using Base = ap_fixed_base<W, I, false, Q, O, N>;
  using Base::Base;
  constexpr ap_ufixed() = default;
  constexpr ap_ufixed(const Base& other) : Base(other) {}
};

// Operators of two numbers, of which one may be an integer. F and G: the fixed-point types of a and b.
template <class A, class B, class F = fixedpoint::fixed_of<A>, class G = fixedpoint::fixed_of<B>,
          class Sum = fixedpoint::Sum<F, G>>
constexpr typename Sum::type operator+(const A& a, const B& b) {
  return Sum::type::of_raw(fixedpoint::aligned(F::raw_of(a), Sum::frac - F::frac) +
                           fixedpoint::aligned(G::raw_of(b), Sum::frac - G::frac));
}
template <class A, class B, class F = fixedpoint::fixed_of<A>, class G = fixedpoint::fixed_of<B>,
          class Sum = fixedpoint::Sum<F, G>>
constexpr typename Sum::difference operator-(const A& a, const B& b) {
  return Sum::difference::of_raw(fixedpoint::aligned(F::raw_of(a), Sum::frac - F::frac) -
                                 fixedpoint::aligned(G::raw_of(b), Sum::frac - G::frac));
}
template <class A, class B, class F = fixedpoint::fixed_of<A>, class G = fixedpoint::fixed_of<B>>
constexpr fixedpoint::Product<F, G> operator*(const A& a, const B& b) {
  return fixedpoint::Product<F, G>::of_raw(F::raw_of(a) * G::raw_of(b));
}
template <class A, class B, class F = fixedpoint::fixed_of<A>, class G = fixedpoint::fixed_of<B>,
          class Quotient = fixedpoint::Quotient<F, G>>
constexpr typename Quotient::type operator/(const A& a, const B& b) {
  fixedpoint::wide quotient = fixedpoint::aligned(F::raw_of(a), Quotient::shift) / G::raw_of(b);
#ifdef AP_FIXED_SIMULATOR_DIVISION
  quotient = fixedpoint::read_bits(quotient, Quotient::simulated_width, F::sign || G::sign);
#endif
  return Quotient::type::of_raw(quotient);
}

#define FIXEDPOINT_COMPARISON(OP)                                                                   \
  template <class A, class B, class F = fixedpoint::fixed_of<A>, class G = fixedpoint::fixed_of<B>> \
  constexpr bool operator OP(const A& a, const B& b) {                                              \
    return fixedpoint::compare(F::raw_of(a), F::frac, G::raw_of(b), G::frac) OP 0;                  \
  }
FIXEDPOINT_COMPARISON(==)
FIXEDPOINT_COMPARISON(!=)
FIXEDPOINT_COMPARISON(<)
FIXEDPOINT_COMPARISON(<=)
FIXEDPOINT_COMPARISON(>)
FIXEDPOINT_COMPARISON(>=)
#undef FIXEDPOINT_COMPARISON
