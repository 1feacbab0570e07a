// Discrete Fourier transforms of a few points in registers, sum_n z[n] exp(-2 pi i n k / R), in place. T is whatever
// has
// + - and * with a number of its element type A: a SIMD register of channels on a CPU, the float of one thread on a
// GPU. The includer names the namespace (an instruction set's, so that the linker keeps them apart) and the function
// attributes.
//
// Real additions and multiplications of a complex transform of R points: 2: 4 + 0, 3: 12 + 4, 4: 16 + 0, 5: 32 + 16,
// 6: 36 + 8, 7: 60 + 36, 8: 52 + 4.
#pragma once

namespace FC_BUTTERFLIES {

template <class T>
struct Complex {
  T re, im;
};

template <class T>
FC_BUTTERFLY Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
FC_BUTTERFLY Complex<T> operator-(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
FC_BUTTERFLY Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T>
FC_BUTTERFLY Complex<T> conj_times(Complex<T> a, Complex<T> b) {  // conj(a) b
  return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re};
}
template <class T>
FC_BUTTERFLY Complex<T> minus_i(Complex<T> a) {  // -i a
  return {a.im, -a.re};
}

template <class T>
FC_BUTTERFLY void dft2(Complex<T>& a, Complex<T>& b) {
  const Complex<T> t = a - b;
  a = a + b;
  b = t;
}

template <class T>
FC_BUTTERFLY void dft4(Complex<T>& a, Complex<T>& b, Complex<T>& c, Complex<T>& d) {
  const Complex<T> t0 = a + c, t1 = a - c, t2 = b + d, t3 = b - d;
  a = t0 + t2;
  b = {t1.re + t3.im, t1.im - t3.re};
  c = t0 - t2;
  d = {t1.re - t3.im, t1.im + t3.re};
}

// Cosines and sines of 2 pi k / R, k = 1 .. (R - 1) / 2.
template <int R>
struct Roots;
template <>
struct Roots<3> {
  static constexpr double cos[] = {-0.5}, sin[] = {0.86602540378443864676};
};
template <>
struct Roots<5> {
  static constexpr double cos[] = {0.30901699437494742410, -0.80901699437494742410};
  static constexpr double sin[] = {0.95105651629515357212, 0.58778525229247312917};
};
template <>
struct Roots<7> {
  static constexpr double cos[] = {0.62348980185873353053, -0.22252093395631440429, -0.90096886790241912624};
  static constexpr double sin[] = {0.78183148246802980871, 0.97492791218182360702, 0.43388373911755812048};
};

// Odd R: z[n] and z[R - n] meet in their sum (with the cosines) and their difference (with the sines).
template <int R, class A, class T>
FC_BUTTERFLY void dft_odd(Complex<T>* z) {
  constexpr int kHalf = (R - 1) / 2;
  Complex<T> sum[kHalf], difference[kHalf], total = z[0];
#pragma GCC unroll 8
  for (int n = 1; n <= kHalf; ++n) {
    sum[n - 1] = z[n] + z[R - n];
    difference[n - 1] = z[n] - z[R - n];
    total = total + sum[n - 1];
  }
#pragma GCC unroll 8
  for (int k = 1; k <= kHalf; ++k) {
    Complex<T> even = z[0], odd;
#pragma GCC unroll 8
    for (int n = 1; n <= kHalf; ++n) {
      const int m = n * k % R;
      const A c = A(Roots<R>::cos[(m <= kHalf ? m : R - m) - 1]);
      const A s = A(m <= kHalf ? Roots<R>::sin[m - 1] : -Roots<R>::sin[R - m - 1]);
      even = {even.re + sum[n - 1].re * c, even.im + sum[n - 1].im * c};
      const Complex<T> turned = {difference[n - 1].re * s, difference[n - 1].im * s};
      odd = n == 1 ? turned : odd + turned;
    }
    z[k] = {even.re + odd.im, even.im - odd.re};
    z[R - k] = {even.re - odd.im, even.im + odd.re};
  }
  z[0] = total;
}

template <int R, class A, class T>
FC_BUTTERFLY void dft(Complex<T>* z) {
  if constexpr (R == 2) {
    dft2(z[0], z[1]);
  } else if constexpr (R == 4) {
    dft4(z[0], z[1], z[2], z[3]);
  } else if constexpr (R == 3 || R == 5 || R == 7) {
    dft_odd<R, A>(z);
  } else if constexpr (R == 6) {  // 2 x 3, which are coprime: no twiddles (Good and Thomas)
    Complex<T> a[3] = {z[0], z[2], z[4]}, b[3] = {z[3], z[5], z[1]};
    dft_odd<3, A>(a);
    dft_odd<3, A>(b);
    z[0] = a[0] + b[0], z[3] = a[0] - b[0];
    z[4] = a[1] + b[1], z[1] = a[1] - b[1];
    z[2] = a[2] + b[2], z[5] = a[2] - b[2];
  } else if constexpr (R == 8) {
    constexpr A kRootHalf = A(0.70710678118654752440);
    dft4(z[0], z[2], z[4], z[6]);
    dft4(z[1], z[3], z[5], z[7]);
    const Complex<T> t1 = {(z[3].re + z[3].im) * kRootHalf, (z[3].im - z[3].re) * kRootHalf};
    const Complex<T> t3 = {(z[7].im - z[7].re) * kRootHalf, (z[7].re + z[7].im) * kRootHalf};  // negated imaginary part
    const Complex<T> e0 = z[0], e1 = z[2], e2 = z[4], e3 = z[6], o0 = z[1], o2 = z[5];
    z[0] = e0 + o0, z[4] = e0 - o0;
    z[1] = e1 + t1, z[5] = e1 - t1;
    z[2] = {e2.re + o2.im, e2.im - o2.re}, z[6] = {e2.re - o2.im, e2.im + o2.re};
    z[3] = {e3.re + t3.re, e3.im - t3.im}, z[7] = {e3.re - t3.re, e3.im + t3.im};
  } else {
    static_assert(R == 1);
  }
}

}  // namespace FC_BUTTERFLIES
