// x with at most k binary digits, one after the other: the sign and the exponent of what is left are the next digit, or
// (signed) its double where that is nearer. Every sum is exact. About eight operations a digit, so that with two digits
// a read and a write of memory are what it costs.
#pragma once
#include "fixedpoint.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

template <class S>
static void limit_digits(const void* x, void* out, int64_t n, int64_t k, bool is_signed, bool stream) {
  using A = compute_t<S>;
  // In float32 a subnormal number has digits too, and the double of the largest one's is finite: both as in float64,
  // by a power of two that is taken back at the end.
  constexpr bool kScaled = sizeof(A) == 4;
  constexpr int kMantissa = sizeof(A) == 4 ? 23 : 52;
  const A tiny = sizeof(A) == 4 ? A(0x1p-126) : A(0x1p-1022), infinity = A(__builtin_inf());
  const I<A> power = I<A>{} - (decltype(I<A>{}[0] + 0)(1) << kMantissa);  // the bits of sign and exponent
  const S* const from = (const S*)x;
  S* const to = (S*)out;
  for_each_vector<A>(n, [&](int64_t i, auto width) {
    prefetch_next_page(from + i);
    const V<A> given = load_as<A>(from + i, width);
    V<A> rest = given, back = splat<A>(1);
    if constexpr (kScaled) {
      const I<A> small = abs<A>(given) < A(0x1p-64), large = abs<A>(given) >= A(0x1p64);
      const V<A> by = select<A>(small, splat<A>(A(0x1p64)), select<A>(large, splat<A>(A(0x1p-2)), splat<A>(1)));
      back = select<A>(small, splat<A>(A(0x1p-64)), select<A>(large, splat<A>(A(0x1p2)), splat<A>(1)));
      rest = rest * by;
    }
    V<A> digits{};
    for (int64_t done = 0; done < k; ++done) {
      V<A> digit = (V<A>)((I<A>)rest & power);
      digit = select<A>(abs<A>(rest) < tiny, V<A>{}, digit);
      if (is_signed) digit = select<A>(abs<A>(rest) >= A(1.5) * abs<A>(digit), A(2) * digit, digit);
      digits = digits + digit;
      rest = rest - digit;
    }
    const V<A> result = select<A>(abs<A>(given) < infinity, digits * back, given);  // NaN and infinity stay
    store_as(to + i, result, width, stream);
  });
  if (stream) stream_fence();
}

}  // namespace fastcifar::FASTCIFAR_ISA
