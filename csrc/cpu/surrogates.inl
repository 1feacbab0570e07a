// The surrogate gradients g(u); formulas and numbers: fastcifar/spiking/surrogate.py.
//
// A row of g is computed apart from the rest of a backward step: it costs a store to and a load from the first-level
// cache, and spares an instance of every neuron's backward for every surrogate.
#pragma once
#include "spiking.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

// f of the lanes one by one, for functions of the C library.
template <class A, class F>
FC_INLINE V<A> each_lane(V<A> x, F f) {
  for (int lane = 0; lane < kLanes<A>; ++lane) x[lane] = f(x[lane]);
  return x;
}

template <class A>
FC_INLINE V<A> bell(V<A> scaled, A alpha) {
  const V<A> e = exp_nonpositive<A>(-abs<A>(scaled)), one_e = A(1) + e;
  return alpha * e / (one_e * one_e);
}

// p, q, r are the surrogate's numbers; frequency is q before it is rounded.
template <class A, int kSurrogate>
FC_INLINE V<A> surrogate_grad(V<A> u, A p, A q, A r, double frequency) {
  if constexpr (kSurrogate == kATan) {
    const V<A> slope = q * u;
    return p / (A(1) + slope * slope);
  } else if constexpr (kSurrogate == kSigmoid) {
    return bell<A>(q * u, p);
  } else if constexpr (kSurrogate == kTriangle) {
    const V<A> distance = abs<A>(u);
    return select<A>(distance > r, V<A>{}, p - q * distance);
  } else if constexpr (kSurrogate == kTwoLevel) {
    return select<A>(abs<A>(u) < r, splat<A>(p), splat<A>(q));
  } else if constexpr (kSurrogate == kExponential) {
    return p * exp_nonpositive<A>(-(q * abs<A>(u - r)));
  } else if constexpr (kSurrogate == kInverseSquare) {
    const V<A> distance = q + r * abs<A>(u);
    return p / (distance * distance);
  } else if constexpr (kSurrogate == kGaussian) {
    const V<A> scaled = q * u;
    return p * exp_nonpositive<A>(-(scaled * scaled));
  } else if constexpr (kSurrogate == kInverse) {
    return p / (q + abs<A>(u));
  } else if constexpr (kSurrogate == kOneSided) {
    return select<A>(u >= r, splat<A>(p), splat<A>(q));
  } else if constexpr (kSurrogate == kS2NN) {
    return select<A>(u < A(0), bell<A>(p * u, p), q / (u + A(1)));
  } else if constexpr (kSurrogate == kQPseudoSpike) {
    const V<A> base = A(1) + p * abs<A>(u);
    if (q == A(-2)) return A(1) / (base * base);
    return each_lane<A>(base, [q](A b) { return sizeof(A) == 4 ? A(__builtin_powf(b, q)) : A(__builtin_pow(b, q)); });
  } else if constexpr (kSurrogate == kFourier) {
    V<A> sum = {};
    for (int i = 1; i < int(r); ++i)
      sum = sum + each_lane<A>(A((2 * i - 1) * frequency) * u,
                               [](A x) { return sizeof(A) == 4 ? A(__builtin_cosf(x)) : A(__builtin_cos(x)); });
    return p * sum;
  } else if constexpr (kSurrogate == kLogTailed) {
    return select<A>(u > A(1), A(1) / u, select<A>(u <= A(0), splat<A>(p), splat<A>(1)));
  } else if constexpr (kSurrogate == kFakeNumerical) {
    const V<A> inverse = A(1) / abs<A>(u);
    return select<A>(inverse > p, splat<A>(p), inverse);
  } else {
    const V<A> distance = A(1) + p * abs<A>(u);
    return select<A>(u > q, A(1) / (distance * distance), V<A>{});
  }
}

template <class A>
using SurrogateRow = void (*)(const A* h, const A* threshold, A* out, int64_t n, const double* widths);

// out = g(h - threshold) over a row, rounded up to whole registers.
template <class A, int kSurrogate>
void surrogate_row(const A* h, const A* threshold, A* out, int64_t n, const double* widths) {
  const A p = A(widths[0]), q = A(widths[1]), r = A(widths[2]);
  for (int64_t i = 0; i < n; i += kLanes<A>)
    store(out + i, surrogate_grad<A, kSurrogate>(load(h + i, Full{}) - load(threshold + i, Full{}), p, q, r, widths[1]),
          Full{});
}

template <class A>
SurrogateRow<A> surrogate_for(int surrogate) {
  static constexpr SurrogateRow<A> kRows[kSurrogates] = {
      surrogate_row<A, kATan>,      surrogate_row<A, kSigmoid>,       surrogate_row<A, kTriangle>,
      surrogate_row<A, kTwoLevel>,  surrogate_row<A, kExponential>,   surrogate_row<A, kInverseSquare>,
      surrogate_row<A, kGaussian>,  surrogate_row<A, kInverse>,       surrogate_row<A, kOneSided>,
      surrogate_row<A, kS2NN>,      surrogate_row<A, kQPseudoSpike>,  surrogate_row<A, kFourier>,
      surrogate_row<A, kLogTailed>, surrogate_row<A, kFakeNumerical>, surrogate_row<A, kSparse>};
  return kRows[surrogate];
}

}  // namespace fastcifar::FASTCIFAR_ISA
