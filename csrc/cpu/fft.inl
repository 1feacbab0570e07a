// Fourier transforms of up to 64 points, one channel a lane, in two rounds of butterflies (FftPlan in spectral.h).
//
// `fft` goes from any strided signal to any other. The columns of a grid, whose transform is followed by a product and
// the transform back, have rounds of their own: the product happens on the registers between the two transforms, and
// rows that were packed in pairs are told apart while the first butterflies load them. Such a column stays in the order
// in which the second butterflies leave it, and the way back is the transposed sequence of steps, so that the order
// never matters. An inverse transform is the forward one with real and imaginary parts exchanged, before and after.
#pragma once
#include "spectral.h"
#include "vec.h"

#define FC_BUTTERFLIES fastcifar::FASTCIFAR_ISA
#define FC_BUTTERFLY FC_INLINE
#include "../butterflies.h"

namespace fastcifar::FASTCIFAR_ISA {

template <class A>
using Z = Complex<V<A>>;

template <class A>
constexpr int kPair = 2 * kLanes<A>;  // elements of one complex number: the real parts of all lanes, then the imaginary

template <class A>
FC_INLINE Z<A> load_complex(const A* p) {
  return {load(p, Full{}), load(p + kLanes<A>, Full{})};
}
template <class A>
FC_INLINE void store_complex(A* p, Z<A> z) {
  store(p, z.re, Full{});
  store(p + kLanes<A>, z.im, Full{});
}
template <class A>
FC_INLINE Z<A> swapped(Z<A> z) {
  return {z.im, z.re};
}

template <class A>
const A* twiddles(const FftPlan& plan) {
  if constexpr (sizeof(A) == 4)
    return plan.twiddle_float;
  else
    return plan.twiddle;
}
template <class A>
const A* roots(const FftPlan& plan) {
  if constexpr (sizeof(A) == 4)
    return plan.root_float;
  else
    return plan.root;
}

// A complex signal of vectors in memory.
template <class A>
struct Signal {
  A *re, *im;
  int64_t re_stride, im_stride;
};
template <class A>
Signal<A> packed_signal(A* p) {
  return {p, p + kLanes<A>, kPair<A>, kPair<A>};
}
template <class A>
Signal<A> swapped(Signal<A> s) {
  return {s.im, s.re, s.im_stride, s.re_stride};
}

template <int R, class A>
FC_INLINE void twiddle(Z<A>* z, const A* w) {
#pragma GCC unroll 8
  for (int c = 1; c < R; ++c) {
    const A re = w[2 * c], im = w[2 * c + 1];
    z[c] = {z[c].re * re - z[c].im * im, z[c].re * im + z[c].im * re};
  }
}

// A function whose arguments stay as they are written: g++ otherwise passes the two signals on the stack, and reads
// them there in larger pieces than it wrote, which waits until every earlier store has left the core.
#define FC_OUTLINE __attribute__((noipa))

// ---- from any signal to any other -----------------------------------------------------------------------------------

template <int R, class A>
FC_OUTLINE void first_round(const FftPlan& plan, const Signal<A>& signal, A* t) {
  const Signal<A> x = signal;
  const int second = plan.second;
  for (int b = 0; b < second; ++b) {
    Z<A> z[R];
#pragma GCC unroll 8
    for (int a = 0; a < R; ++a) {
      const int n = plan.in[b * R + a];
      z[a] = {load(x.re + n * x.re_stride, Full{}), load(x.im + n * x.im_stride, Full{})};
    }
    dft<R, A>(z);
    if (b && plan.twiddled) twiddle<R, A>(z, twiddles<A>(plan) + 2 * b * R);
#pragma GCC unroll 8
    for (int c = 0; c < R; ++c) store_complex(t + (c * second + b) * kPair<A>, z[c]);
  }
}

// Butterflies of any odd size, by their definition: (first - 1)^2 multiplications and additions each.
template <class A>
FC_OUTLINE void first_round_any(const FftPlan& plan, const Signal<A>& signal, A* t) {
  const Signal<A> x = signal;
  const int n = plan.first, half = (n - 1) / 2, second = plan.second;
  const A* root = roots<A>(plan);
  for (int b = 0; b < second; ++b) {
    Z<A> sum[kLargestSide / 2], difference[kLargestSide / 2], start, total;
    for (int a = 0; a <= half; ++a) {
      const int i = plan.in[b * n + a], j = plan.in[b * n + (a ? n - a : 0)];
      const Z<A> z = {load(x.re + i * x.re_stride, Full{}), load(x.im + i * x.im_stride, Full{})};
      const Z<A> mirror = {load(x.re + j * x.re_stride, Full{}), load(x.im + j * x.im_stride, Full{})};
      if (a == 0) {
        start = total = z;
      } else {
        sum[a - 1] = z + mirror;
        difference[a - 1] = z - mirror;
        total = total + sum[a - 1];
      }
    }
    store_complex(t + b * kPair<A>, total);
    for (int k = 1; k <= half; ++k) {
      Z<A> even = start, odd{};
      for (int a = 1, m = k; a <= half; ++a, m = m + k < n ? m + k : m + k - n) {
        const A c = root[2 * m], s = root[2 * m + 1];
        even = {even.re + sum[a - 1].re * c, even.im + sum[a - 1].im * c};
        odd = {odd.re + difference[a - 1].re * s, odd.im + difference[a - 1].im * s};
      }
      const A* w = twiddles<A>(plan) + 2 * b * n;
      const auto put = [&](int c, Z<A> z) {
        if (b && plan.twiddled) {
          const A re = w[2 * c], im = w[2 * c + 1];
          z = {z.re * re - z.im * im, z.re * im + z.im * re};
        }
        store_complex(t + (c * second + b) * kPair<A>, z);
      };
      put(k, {even.re + odd.im, even.im - odd.re});
      put(n - k, {even.re - odd.im, even.im + odd.re});
    }
  }
}

template <int R, class A>
FC_OUTLINE void second_round(const FftPlan& plan, const A* t, const Signal<A>& signal) {
  const Signal<A> y = signal;
  for (int c = 0; c < plan.first; ++c) {
    Z<A> z[R];
#pragma GCC unroll 8
    for (int d = 0; d < R; ++d) z[d] = load_complex(t + (c * R + d) * kPair<A>);
    dft<R, A>(z);
#pragma GCC unroll 8
    for (int d = 0; d < R; ++d) {
      const int k = plan.out[c * R + d];
      store(y.re + k * y.re_stride, z[d].re, Full{});
      store(y.im + k * y.im_stride, z[d].im, Full{});
    }
  }
}

template <int R, class A>
FC_OUTLINE void one_round(const Signal<A>& from, const Signal<A>& to) {
  const Signal<A> x = from, y = to;
  Z<A> z[R];
#pragma GCC unroll 8
  for (int n = 0; n < R; ++n) z[n] = {load(x.re + n * x.re_stride, Full{}), load(x.im + n * x.im_stride, Full{})};
  dft<R, A>(z);
#pragma GCC unroll 8
  for (int k = 0; k < R; ++k) {
    store(y.re + k * y.re_stride, z[k].re, Full{});
    store(y.im + k * y.im_stride, z[k].im, Full{});
  }
}

// Calls f.template operator()<R>() for the R in 1 .. 8 that is `radix`.
template <class F>
FC_INLINE void with_radix(int radix, F f) {
  switch (radix) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    case 7:
      return f.template operator()<7>();
    default:
      return f.template operator()<8>();
  }
}

// y = the transform of x; x and y may be the same where plan.first > 1. t: n complex numbers of scratch.
template <class A>
FC_OUTLINE void fft(const FftPlan& plan, const Signal<A>& x, const Signal<A>& y, A* t) {
  if (plan.first == 1) return with_radix(plan.second, [&]<int R>() { one_round<R, A>(x, y); });
  if (plan.first > 8)
    first_round_any<A>(plan, x, t);
  else
    with_radix(plan.first, [&]<int R>() { first_round<R, A>(plan, x, t); });
  with_radix(plan.second, [&]<int R>() { second_round<R, A>(plan, t, y); });
}

// ---- columns of a grid whose rows were transformed in pairs ---------------------------------------------------------
// Rows h and h' of one channel go through one complex transform Z = X_h + i X_h'. Their spectra in column k are made of
// Z in columns k and W - k, twice the value: 2 X_h = Z[k] + conj Z[W - k], 2 X_h' = (Z[k] - conj Z[W - k]) / i.

template <class A>
FC_INLINE void unpack(const A* zk, const A* zm, Z<A>& first, Z<A>& second) {
  const Z<A> a = load_complex(zk), b = load_complex(zm);
  first = {a.re + b.re, a.im - b.im};
  second = {a.im + b.im, b.re - a.re};
}
// Of rows whose real and imaginary parts are exchanged, as an inverse transform leaves them.
template <class A>
FC_INLINE void pack(A* zk, A* zm, Z<A> first, Z<A> second) {
  store_complex(zk, Z<A>{first.im - second.re, first.re + second.im});
  store_complex(zm, Z<A>{first.im + second.re, second.im - first.re});
}

// What happens to a column between its transform and the one back.
enum Between : int { kNothing, kGate, kGradient };
template <class A>
struct Column {
  A *zk, *zm;                   // the first pair of rows in columns k and W - k
  int64_t pitch;                // from one pair to the next
  const A* gate = nullptr;      // [H] complex
  const A* spectrum = nullptr;  // kGradient: of x, when this is the gradient's column
  A* sum = nullptr;             // kGradient: sum of conj(spectrum) * this
};

template <int R, Between kBetween, class A>
FC_INLINE void multiply(Z<A>* z, const Column<A>& column, int at) {
#pragma GCC unroll 8
  for (int d = 0; d < R; ++d) {
    const int64_t i = (at + d) * kPair<A>;
    if constexpr (kBetween == kGradient)
      store_complex(column.sum + i, load_complex(column.sum + i) + conj_times(load_complex(column.spectrum + i), z[d]));
    z[d] = swapped<A>(z[d] * load_complex(column.gate + i));
  }
}

// H = R, everything in registers. kNothing leaves the spectrum in t.
template <int R, Between kBetween, class A>
void column_one_round(const Column<A>& column, A* t) {
  Z<A> z[R + 1];
#pragma GCC unroll 8
  for (int p = 0; p < (R + 1) / 2; ++p)
    unpack(column.zk + p * column.pitch, column.zm + p * column.pitch, z[2 * p], z[2 * p + 1]);
  dft<R, A>(z);
  if constexpr (kBetween == kNothing) {
#pragma GCC unroll 8
    for (int d = 0; d < R; ++d) store_complex(t + d * kPair<A>, z[d]);
  } else {
    multiply<R, kBetween, A>(z, column, 0);
    dft<R, A>(z);
    if constexpr (R % 2) z[R] = Z<A>{};
#pragma GCC unroll 8
    for (int p = 0; p < (R + 1) / 2; ++p)
      pack(column.zk + p * column.pitch, column.zm + p * column.pitch, z[2 * p], z[2 * p + 1]);
  }
}

// H = R * plan.second with an even R, so that each pair of rows meets in one butterfly.
template <int R, class A>
void column_first_round(const FftPlan& plan, const Column<A>& column, A* t) {
  const int second = plan.second;
  for (int b = 0; b < second; ++b) {
    Z<A> z[R];
#pragma GCC unroll 8
    for (int a = 0; a < R; a += 2) {
      const int64_t p = (b * R + a) / 2 * column.pitch;
      unpack(column.zk + p, column.zm + p, z[a], z[a + 1]);
    }
    dft<R, A>(z);
    if (b && plan.twiddled) twiddle<R, A>(z, twiddles<A>(plan) + 2 * b * R);
#pragma GCC unroll 8
    for (int c = 0; c < R; ++c) store_complex(t + (c * second + b) * kPair<A>, z[c]);
  }
}
template <int R, Between kBetween, class A>
void column_middle(const FftPlan& plan, const Column<A>& column, A* t) {
  for (int c = 0; c < plan.first; ++c) {
    Z<A> z[R];
#pragma GCC unroll 8
    for (int d = 0; d < R; ++d) z[d] = load_complex(t + (c * R + d) * kPair<A>);
    dft<R, A>(z);
    if constexpr (kBetween != kNothing) {
      multiply<R, kBetween, A>(z, column, c * R);
      dft<R, A>(z);
    }
#pragma GCC unroll 8
    for (int d = 0; d < R; ++d) store_complex(t + (c * R + d) * kPair<A>, z[d]);
  }
}
template <int R, class A>
void column_last_round(const FftPlan& plan, const Column<A>& column, const A* t) {
  const int second = plan.second;
  for (int b = 0; b < second; ++b) {
    Z<A> z[R];
#pragma GCC unroll 8
    for (int c = 0; c < R; ++c) z[c] = load_complex(t + (c * second + b) * kPair<A>);
    if (b && plan.twiddled) twiddle<R, A>(z, twiddles<A>(plan) + 2 * b * R);
    dft<R, A>(z);
#pragma GCC unroll 8
    for (int a = 0; a < R; a += 2) {
      const int64_t p = (b * R + a) / 2 * column.pitch;
      pack(column.zk + p, column.zm + p, z[a], z[a + 1]);
    }
  }
}

template <class F>
FC_INLINE void with_even_radix(int radix, F f) {
  switch (radix) {
    case 2:
      return f.template operator()<2>();
    case 4:
      return f.template operator()<4>();
    case 6:
      return f.template operator()<6>();
    default:
      return f.template operator()<8>();
  }
}

// Whether the columns of this length have rounds of their own. Double precision does without: it is there for
// exactness.
template <class A>
FC_INLINE bool fused_columns(const FftPlan& plan) {
  return sizeof(A) == 4 && (plan.first == 1 || (plan.first % 2 == 0 && plan.first <= 8));
}

template <Between kBetween, class A>
void fused_column(const FftPlan& plan, const Column<A>& column, A* t) {
  if constexpr (sizeof(A) == 4) {
    if (plan.first == 1) return with_radix(plan.second, [&]<int R>() { column_one_round<R, kBetween, A>(column, t); });
    with_even_radix(plan.first, [&]<int R>() { column_first_round<R, A>(plan, column, t); });
    with_radix(plan.second, [&]<int R>() { column_middle<R, kBetween, A>(plan, column, t); });
    if constexpr (kBetween != kNothing)
      with_even_radix(plan.first, [&]<int R>() { column_last_round<R, A>(plan, column, t); });
  }
}

}  // namespace fastcifar::FASTCIFAR_ISA
