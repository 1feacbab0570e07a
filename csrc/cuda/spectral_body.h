// The spectral gate on one tile of a small square grid, N x N tokens of one channel a thread: what
// csrc/cuda/spectral.cu runs on a GPU and what a host compiler can run too. The includer names the namespace and the
// function attributes.
//
// Rows are transformed in pairs, as the real and the imaginary part of one complex row, and of their half spectra the
// real columns 0 and N / 2 travel as one complex column. So a tile is kSlots complex columns of N numbers, N * N
// numbers in all (N * (N + 1) for odd N), and a transform of it is about N complex ones of N points, as many additions
// and multiplications as a complex transform of half the tile. Pairs leave out their halves: they are in the scale.
// Everything of one channel stays in one thread's lane: a NaN reaches no other channel.
#pragma once

#include <stdint.h>

#include "../butterflies.h"

#ifdef __CUDACC__
#define FC_UNROLL _Pragma("unroll")
#else
#define FC_UNROLL
#endif

namespace FC_BUTTERFLIES {

template <class T>
FC_BUTTERFLY Complex<T> conj(Complex<T> a) {
  return {a.re, -a.im};
}
template <class T>
FC_BUTTERFLY Complex<T> scaled(Complex<T> a, T s) {
  return {a.re * s, a.im * s};
}
template <class T>
FC_BUTTERFLY Complex<T> turned(Complex<T> a) {  // i a
  return {-a.im, a.re};
}

// As dft_odd<7>, whose table of roots device code may not index.
template <class T>
FC_BUTTERFLY void dft7(Complex<T>* z) {
  const T c1 = T(0.62348980185873353053), c2 = T(-0.22252093395631440429), c3 = T(-0.90096886790241912624);
  const T s1 = T(0.78183148246802980871), s2 = T(0.97492791218182360702), s3 = T(0.43388373911755812048);
  const Complex<T> z0 = z[0], p = z[1] + z[6], q = z[2] + z[5], r = z[3] + z[4];
  const Complex<T> u = minus_i(z[1] - z[6]), v = minus_i(z[2] - z[5]), w = minus_i(z[3] - z[4]);
  const Complex<T> e1 = z0 + scaled(p, c1) + scaled(q, c2) + scaled(r, c3);
  const Complex<T> e2 = z0 + scaled(p, c2) + scaled(q, c3) + scaled(r, c1);
  const Complex<T> e3 = z0 + scaled(p, c3) + scaled(q, c1) + scaled(r, c2);
  const Complex<T> o1 = scaled(u, s1) + scaled(v, s2) + scaled(w, s3);
  const Complex<T> o2 = scaled(u, s2) - scaled(v, s3) - scaled(w, s1);
  const Complex<T> o3 = scaled(u, s3) - scaled(v, s1) + scaled(w, s2);
  z[0] = z0 + p + q + r;
  z[1] = e1 + o1, z[6] = e1 - o1;
  z[2] = e2 + o2, z[5] = e2 - o2;
  z[3] = e3 + o3, z[4] = e3 - o3;
}

// N points, 4, 7, 8, 14 or 16, in natural order.
template <int N, class T>
FC_BUTTERFLY void transform(Complex<T>* z) {
  if constexpr (N == 7) {
    dft7(z);
  } else if constexpr (N == 14) {  // 2 x 7, which are coprime: no twiddles (Good and Thomas)
    Complex<T> a[7], b[7];
    FC_UNROLL for (int n = 0; n < 7; ++n) {
      a[n] = z[2 * n];
      b[n] = z[(7 + 2 * n) % 14];
    }
    dft7(a);
    dft7(b);
    FC_UNROLL for (int k = 0; k < 7; ++k) {
      z[8 * k % 14] = a[k] + b[k];
      z[(7 + 8 * k) % 14] = a[k] - b[k];
    }
  } else if constexpr (N == 16) {  // 4 x 4
    const T c = T(0.92387953251128675613), s = T(0.38268343236508977173), h = T(0.70710678118654752440);
    FC_UNROLL for (int n = 0; n < 4; ++n) dft4(z[n], z[n + 4], z[n + 8], z[n + 12]);
    z[5] = z[5] * Complex<T>{c, -s};
    z[6] = z[6] * Complex<T>{h, -h};
    z[7] = z[7] * Complex<T>{s, -c};
    z[9] = z[9] * Complex<T>{h, -h};
    z[10] = minus_i(z[10]);
    z[11] = z[11] * Complex<T>{-h, -h};
    z[13] = z[13] * Complex<T>{s, -c};
    z[14] = z[14] * Complex<T>{-h, -h};
    z[15] = z[15] * Complex<T>{-c, s};
    Complex<T> out[16];
    FC_UNROLL for (int k = 0; k < 4; ++k) {
      dft4(z[4 * k], z[4 * k + 1], z[4 * k + 2], z[4 * k + 3]);
      FC_UNROLL for (int m = 0; m < 4; ++m) out[k + 4 * m] = z[4 * k + m];
    }
    FC_UNROLL for (int k = 0; k < 16; ++k) z[k] = out[k];
  } else {
    dft<N, T>(z);
  }
}

// The inverse, unscaled: a transform with real and imaginary parts exchanged.
template <int N, class T>
FC_BUTTERFLY void transform_back(Complex<T>* z) {
  FC_UNROLL for (int n = 0; n < N; ++n) z[n] = {z[n].im, z[n].re};
  transform<N>(z);
  FC_UNROLL for (int n = 0; n < N; ++n) z[n] = {z[n].im, z[n].re};
}

// LANES: from one number of a thread's tile to the next, 1 in registers and 32 in shared memory, where it is free of
// bank conflicts. Jobs are pairs of rows, or columns; a tile's threads share them, and wait for each other in between.
template <class T, int N, int LANES>
struct Tile {
  static constexpr int K = N / 2 + 1, kSlots = (N + 1) / 2, kJobs = (N + 1) / 2, kSize = N * kSlots * 2;
  static constexpr bool kEven = N % 2 == 0;

  static FC_BUTTERFLY Complex<T> get(const T* tile, int row, int slot) {
    const T* at = tile + (row * kSlots + slot) * 2 * LANES;
    return {at[0], at[LANES]};
  }
  static FC_BUTTERFLY void put(T* tile, int row, int slot, Complex<T> z) {
    T* at = tile + (row * kSlots + slot) * 2 * LANES;
    at[0] = z.re, at[LANES] = z.im;
  }

  // Rows 2 * job and 2 * job + 1 of the tokens at x into the tile.
  static FC_BUTTERFLY void rows(T* tile, int job, const T* x, int64_t to_row, int64_t to_column) {
    const bool two = kEven || 2 * job + 1 < N;
    const T* a = x + 2 * job * to_row;
    Complex<T> z[N];
    FC_UNROLL for (int n = 0; n < N; ++n) z[n] = {a[n * to_column], two ? a[to_row + n * to_column] : T(0)};
    transform<N>(z);
    put(tile, 2 * job, 0, {z[0].re, kEven ? z[N / 2].re : T(0)});
    FC_UNROLL for (int k = 1; k < kSlots; ++k) put(tile, 2 * job, k, z[k] + conj(z[N - k]));
    if (two) {
      put(tile, 2 * job + 1, 0, {z[0].im, kEven ? z[N / 2].im : T(0)});
      FC_UNROLL for (int k = 1; k < kSlots; ++k) put(tile, 2 * job + 1, k, minus_i(z[k] - conj(z[N - k])));
    }
  }

  // The tile's rows back into tokens. Of column 0 the imaginary part is not looked at: it is the anti-Hermitian part.
  static FC_BUTTERFLY void rows_back(const T* tile, int job, T* y, int64_t to_row, int64_t to_column) {
    const bool two = kEven || 2 * job + 1 < N;
    Complex<T> z[N];
    const Complex<T> a0 = get(tile, 2 * job, 0), b0 = two ? get(tile, 2 * job + 1, 0) : Complex<T>{0, 0};
    z[0] = {a0.re, b0.re};
    if constexpr (kEven) z[N / 2] = {a0.im, b0.im};
    FC_UNROLL for (int k = 1; k < kSlots; ++k) {
      const Complex<T> a = get(tile, 2 * job, k), b = two ? get(tile, 2 * job + 1, k) : Complex<T>{0, 0};
      z[k] = a + turned(b);
      z[N - k] = conj(a) + turned(conj(b));
    }
    transform_back<N>(z);
    T* out = y + 2 * job * to_row;
    FC_UNROLL for (int n = 0; n < N; ++n) {
      out[n * to_column] = z[n].re;
      if (two) out[to_row + n * to_column] = z[n].im;
    }
  }

  static FC_BUTTERFLY void column(const T* tile, int slot, Complex<T>* z) {
    FC_UNROLL for (int h = 0; h < N; ++h) z[h] = get(tile, h, slot);
    transform<N>(z);
  }

  // A gate [h, k] of one channel; w points at that of [0, 0], and all channels are C. sign: -1 for its conjugate.
  static FC_BUTTERFLY Complex<T> gate(const T* w, int h, int k, int64_t C, T sign) {
    const T* at = w + (h * K + k) * C * 2;
    return {at[0], at[1] * sign};
  }

  // z, a column's spectrum, times its gates, and back into the tile.
  static FC_BUTTERFLY void gated(T* tile, int slot, Complex<T>* z, const T* w, int64_t C, T sign) {
    constexpr T kPair = T(0.5) / (N * N), kOne = T(1) / (N * N);
    if (kEven && slot == 0) {
      // z = d + i n with d and n the Hermitian spectra of columns 0 and N / 2. Their gates' Hermitian parts count.
      FC_UNROLL for (int h = 0; h <= N / 2; ++h) {
        const int g = (N - h) % N;
        const Complex<T> d = z[h] + conj(z[g]), n = minus_i(z[h] - conj(z[g]));
        const Complex<T> wd = gate(w, h, 0, C, sign) + conj(gate(w, g, 0, C, sign));
        const Complex<T> wn = gate(w, h, N / 2, C, sign) + conj(gate(w, g, N / 2, C, sign));
        const Complex<T> e = scaled(d * wd, kPair / 2), f = scaled(n * wn, kPair / 2);
        z[h] = e + turned(f);
        if (g != h) z[g] = conj(e) + turned(conj(f));
      }
    } else {
      const T scale = slot == 0 ? kOne : kPair;
      FC_UNROLL for (int h = 0; h < N; ++h) z[h] = scaled(z[h] * gate(w, h, slot, C, sign), scale);
    }
    transform_back<N>(z);
    FC_UNROLL for (int h = 0; h < N; ++h) put(tile, h, slot, z[h]);
  }

  // Adds conj(x) g of a column's spectra. Slot 0 of even N keeps half of two Hermitian columns: for h < N - h that of
  // column 0 in sums[h] and that of column N / 2 in sums[N - h], real ones side by side.
  static FC_BUTTERFLY void accumulate(Complex<T>* sums, int slot, const Complex<T>* x, const Complex<T>* g) {
    if (kEven && slot == 0) {
      FC_UNROLL for (int h = 0; h <= N / 2; ++h) {
        const int m = (N - h) % N;
        if (m == h) {
          sums[h] = {sums[h].re + x[h].re * g[h].re, sums[h].im + x[h].im * g[h].im};
        } else {
          sums[h] = sums[h] + conj_times(x[h] + conj(x[m]), g[h] + conj(g[m]));
          sums[m] = sums[m] + conj_times(x[h] - conj(x[m]), g[h] - conj(g[m]));
        }
      }
    } else {
      FC_UNROLL for (int h = 0; h < N; ++h) sums[h] = sums[h] + conj_times(x[h], g[h]);
    }
  }

  static FC_BUTTERFLY void put_sum(T* out, int h, int k, int64_t C, Complex<T> sum, T scale) {
    T* at = out + (h * K + k) * C * 2;
    at[0] = sum.re * scale, at[1] = sum.im * scale;
  }

  // The gradient to the gates of a column from its sums; out is laid out as the gates.
  static FC_BUTTERFLY void finish(const Complex<T>* sums, int slot, T* out, int64_t C) {
    constexpr T kOne = T(1) / (N * N), kQuarter = T(0.25) / (N * N), kPair = T(0.5) / (N * N);
    if (kEven && slot == 0) {
      FC_UNROLL for (int h = 0; h <= N / 2; ++h) {
        const int m = (N - h) % N;
        if (m == h) {
          put_sum(out, h, 0, C, {sums[h].re, T(0)}, kOne);
          put_sum(out, h, N / 2, C, {sums[h].im, T(0)}, kOne);
        } else {
          put_sum(out, h, 0, C, sums[h], kQuarter);
          put_sum(out, m, 0, C, conj(sums[h]), kQuarter);
          put_sum(out, h, N / 2, C, sums[m], kQuarter);
          put_sum(out, m, N / 2, C, conj(sums[m]), kQuarter);
        }
      }
    } else {
      const T scale = slot == 0 ? kOne : kPair;
      FC_UNROLL for (int h = 0; h < N; ++h) put_sum(out, h, slot, C, sums[h], scale);
    }
  }
};

}  // namespace FC_BUTTERFLIES
