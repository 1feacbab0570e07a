// Transforms of the lengths that grids of images have, each written out in full: every index, twiddle and offset is a
// constant of the code, and what does not fit in registers is spilled where the compiler sees fit. The rounds of
// fft.inl look these up in a plan instead, at every butterfly. tests/data/instructions.json has what both come to.
#pragma once
#include "fft.inl"

namespace fastcifar::FASTCIFAR_ISA {

#define FC_LAMBDA __attribute__((always_inline))

// f.template operator()<i>() for i = 0 .. N - 1. A loop would be unrolled after arrays have been given memory.
template <int N, int kFrom = 0, class F>
FC_INLINE void unroll(F f) {
  if constexpr (kFrom < N) {
    f.template operator()<kFrom>();
    unroll<N, kFrom + 1>(f);
  }
}

// Calls f.template operator()<N>() for a length that is written out, and says whether it was one.
template <class A, class F>
FC_INLINE bool with_length(int n, F f) {
  if constexpr (sizeof(A) == 4) switch (n) {
      case 4:
        return f.template operator()<4>(), true;
      case 7:
        return f.template operator()<7>(), true;
      case 8:
        return f.template operator()<8>(), true;
      case 14:
        return f.template operator()<14>(), true;
      case 16:
        return f.template operator()<16>(), true;
      case 28:
        return f.template operator()<28>(), true;
      case 32:
        return f.template operator()<32>(), true;
    }
  return false;
}

// N = first * second, both sizes of butterflies; the coprime ones need no twiddles (Good and Thomas).
template <int N>
struct Split {
  static constexpr int first = N == 14 ? 2 : N > 8 ? 4 : 1, second = N / first;
  static constexpr bool twiddled = N == 16 || N == 32;
  static constexpr int in(int a, int b) { return twiddled ? second * a + b : (second * a + first * b) % N; }
  static constexpr int out(int c, int d) {
    int k = c + first * d;
    if (!twiddled)
      for (k = 0; k % first != c || k % second != d; ++k) {
      }
    return k;
  }
};

// z exp(-2 pi i k / N).
template <int N, int k, class A>
FC_INLINE Z<A> turned(Z<A> z) {
  constexpr double kAngle = -2 * 3.14159265358979323846 * k / N;
  constexpr A re = A(__builtin_cos(kAngle)), im = A(__builtin_sin(kAngle));
  if constexpr (k == 0)
    return z;
  else if constexpr (4 * k == N)
    return minus_i(z);
  else
    return {z.re * re - z.im * im, z.re * im + z.im * re};
}

template <int N, class A>
FC_INLINE void transform(Z<A>* z) {
  if constexpr (N <= 8) {
    dft<N, A>(z);
  } else {
    using P = Split<N>;
    constexpr int kFirst = P::first, kSecond = P::second;
    Z<A> t[N];
    unroll<kSecond>([&]<int b>() FC_LAMBDA {
      Z<A> s[kFirst];
      unroll<kFirst>([&]<int a>() FC_LAMBDA { s[a] = z[P::in(a, b)]; });
      dft<kFirst, A>(s);
      unroll<kFirst>([&]<int c>() FC_LAMBDA { t[c * kSecond + b] = turned<N, P::twiddled ? b * c : 0, A>(s[c]); });
    });
    unroll<kFirst>([&]<int c>() FC_LAMBDA {
      dft<kSecond, A>(t + c * kSecond);
      unroll<kSecond>([&]<int d>() FC_LAMBDA { z[P::out(c, d)] = t[c * kSecond + d]; });
    });
  }
}

// Two rows of a channel into the spectrum of one pair.
template <int N, class A>
FC_OUTLINE void row_forward(const A* first, const A* second, int64_t stride, int64_t second_stride, A* to) {
  Z<A> z[N];
  unroll<N>([&]<int n>()
                FC_LAMBDA { z[n] = {load(first + n * stride, Full{}), load(second + n * second_stride, Full{})}; });
  transform<N, A>(z);
  unroll<N>([&]<int n>() FC_LAMBDA { store_complex(to + n * kPair<A>, z[n]); });
}
// And back; imaginary parts are the first row.
template <int N, bool kStream, class A>
FC_OUTLINE void row_inverse(const A* from, A* first, A* second, int64_t stride, int64_t second_stride) {
  Z<A> z[N];
  unroll<N>([&]<int n>() FC_LAMBDA { z[n] = swapped<A>(load_complex(from + n * kPair<A>)); });
  transform<N, A>(z);
  unroll<N>([&]<int n>() FC_LAMBDA {
    store(first + n * stride, z[n].im, Full{}, kStream);
    store(second + n * second_stride, z[n].re, Full{}, kStream);
  });
}

// A column of pairs: its transform, and unless kNothing (which leaves the spectrum in `spectrum`) what lies between and
// the way back.
template <int N, Between kBetween, class A>
FC_OUTLINE void column_through(const Column<A>& given, A* spectrum) {
  const Column<A> column = given;
  Z<A> z[N + 1];
  unroll<(N + 1) / 2>([&]<int p>() FC_LAMBDA {
    unpack(column.zk + p * column.pitch, column.zm + p * column.pitch, z[2 * p], z[2 * p + 1]);
  });
  transform<N, A>(z);
  if constexpr (kBetween == kNothing) {
    unroll<N>([&]<int n>() FC_LAMBDA { store_complex(spectrum + n * kPair<A>, z[n]); });
  } else {
    unroll<N>([&]<int n>() FC_LAMBDA {
      constexpr int at = n * kPair<A>;
      if constexpr (kBetween == kGradient)
        store_complex(column.sum + at,
                      load_complex(column.sum + at) + conj_times(load_complex(column.spectrum + at), z[n]));
      z[n] = swapped<A>(z[n] * load_complex(column.gate + at));
    });
    transform<N, A>(z);
    if constexpr (N % 2) z[N] = Z<A>{};
    unroll<(N + 1) / 2>([&]<int p>() FC_LAMBDA {
      pack(column.zk + p * column.pitch, column.zm + p * column.pitch, z[2 * p], z[2 * p + 1]);
    });
  }
}

// Columns 0 and W / 2, spectra of real signals both, as the real and imaginary part of one. Without a column W / 2,
// `last` is one place of zeros for all rows, and one of waste.
template <int N, class A>
FC_OUTLINE void edge_through(const A* first, const A* last, int64_t pitch, int64_t last_pitch, A* spectrum) {
  Z<A> z[N + 1];
  unroll<(N + 1) / 2>([&]<int p>() FC_LAMBDA {
    const Z<A> a = load_complex(first + p * pitch), b = load_complex(last + p * last_pitch);
    z[2 * p] = {a.re, b.re};
    z[2 * p + 1] = {a.im, b.im};
  });
  transform<N, A>(z);
  unroll<N>([&]<int n>() FC_LAMBDA { store_complex(spectrum + n * kPair<A>, z[n]); });
}
// From the spectrum, through the gates (see prepare_gate), back.
template <int N, class A>
FC_OUTLINE void edge_back(const A* spectrum, const A* gate, A* first, A* last, int64_t pitch, int64_t last_pitch) {
  Z<A> z[N + 1];
  unroll<N>([&]<int n>() FC_LAMBDA {
    const Z<A> own = load_complex(spectrum + n * kPair<A>), m = load_complex(spectrum + (N - n) % N * kPair<A>);
    const Z<A> mirrored = {m.re, -m.im};
    z[n] = swapped<A>(own * load_complex(gate + 2 * n * kPair<A>) +
                      mirrored * load_complex(gate + (2 * n + 1) * kPair<A>));
  });
  transform<N, A>(z);
  if constexpr (N % 2) z[N] = Z<A>{};
  unroll<(N + 1) / 2>([&]<int p>() FC_LAMBDA {
    store_complex(first + p * pitch, Z<A>{z[2 * p].im, z[2 * p + 1].im});
    store_complex(last + p * last_pitch, Z<A>{z[2 * p].re, z[2 * p + 1].re});
  });
}

}  // namespace fastcifar::FASTCIFAR_ISA
