// SPDX-License-Identifier: BSD-3-Clause
// The layers of a network over ap_fixed types, for one example at a time. to_hls() puts this file beside the model that
// it writes; the arithmetic is exact up to the one assignment to y, which rounds and overflows by y's own type.
//
// Arrays are flat, [C][H][W] and [O][C / groups][KH][KW]. S is a layer's shape, a struct of constants; Sum is a type
// that holds every sum of products of the layer, so no addition below rounds or overflows.
#pragma once

#include "ap_fixed.h"

namespace layers {

template <class T>
T of_bits(long long raw) {
  T number = 0;
  number.range(T::width - 1, 0) = raw;
  return number;
}

// Parameters kept as plain integers: a large array of ap_fixed is initialized by code, which compilers take minutes
// for.
template <class T, class Raw>
struct Stored {
  const Raw* raw;
  T operator[](int i) const { return of_bits<T>(raw[i]); }
};

template <class T, class Raw>
Stored<T, Raw> stored(const Raw* raw) {
  return Stored<T, Raw>{raw};
}

struct NoBias {
  int operator[](int) const { return 0; }
};

template <class S, class Sum, class X, class W, class B, class Y>
void conv2d(const X* x, const W& weight, const B& bias, Y* y) {
  enum { inputs = S::channels / S::groups, outputs = S::out_channels / S::groups };
  for (int o = 0; o < S::out_channels; ++o) {
    const int first = o / outputs * inputs;
    for (int i = 0; i < S::out_height; ++i) {
      for (int j = 0; j < S::out_width; ++j) {
        Sum sum = bias[o];
        for (int c = 0; c < inputs; ++c) {
          for (int u = 0; u < S::kernel_height; ++u) {
            const int row = i * S::stride_height - S::padding_height + u * S::dilation_height;
            if (row < 0 || row >= S::height) continue;
            for (int v = 0; v < S::kernel_width; ++v) {
              const int column = j * S::stride_width - S::padding_width + v * S::dilation_width;
              if (column < 0 || column >= S::width) continue;
              sum += x[((first + c) * S::height + row) * S::width + column] *
                     weight[((o * inputs + c) * S::kernel_height + u) * S::kernel_width + v];
            }
          }
        }
        y[(o * S::out_height + i) * S::out_width + j] = sum;
      }
    }
  }
}

template <class S, class Sum, class X, class W, class B, class Y>
void linear(const X* x, const W& weight, const B& bias, Y* y) {
  for (int o = 0; o < S::outputs; ++o) {
    Sum sum = bias[o];
    for (int k = 0; k < S::inputs; ++k) sum += x[k] * weight[o * S::inputs + k];
    y[o] = sum;
  }
}

// Batch normalization of a trained network: a factor and a shift for each channel.
template <class S, class X, class A, class B, class Y>
void batch_norm(const X* x, const A& scale, const B& shift, Y* y) {
  for (int c = 0; c < S::channels; ++c)
    for (int i = 0; i < S::size; ++i) y[c * S::size + i] = x[c * S::size + i] * scale[c] + shift[c];
}

template <class S, class X, class Y>
void relu(const X* x, Y* y) {
  for (int i = 0; i < S::size; ++i) y[i] = x[i] > 0 ? x[i] : X(0);
}

template <class S, class A, class B, class Y>
void add(const A* a, const B* b, Y* y) {
  for (int i = 0; i < S::size; ++i) y[i] = a[i] + b[i];
}

// The mean over windows that do not overlap: an exact sum times the reciprocal of the window's size.
template <class S, class Sum, class X, class R, class Y>
void avg_pool2d(const X* x, const R& reciprocal, Y* y) {
  for (int c = 0; c < S::channels; ++c) {
    for (int i = 0; i < S::out_height; ++i) {
      for (int j = 0; j < S::out_width; ++j) {
        Sum sum = 0;
        for (int u = 0; u < S::kernel_height; ++u)
          for (int v = 0; v < S::kernel_width; ++v)
            sum += x[(c * S::height + i * S::kernel_height + u) * S::width + j * S::kernel_width + v];
        y[(c * S::out_height + i) * S::out_width + j] = sum * reciprocal[0];
      }
    }
  }
}

template <class S, class X, class Y>
void max_pool2d(const X* x, Y* y) {
  for (int c = 0; c < S::channels; ++c) {
    for (int i = 0; i < S::out_height; ++i) {
      for (int j = 0; j < S::out_width; ++j) {
        bool first = true;
        X largest = 0;
        for (int u = 0; u < S::kernel_height; ++u) {
          const int row = i * S::stride_height - S::padding_height + u * S::dilation_height;
          if (row < 0 || row >= S::height) continue;
          for (int v = 0; v < S::kernel_width; ++v) {
            const int column = j * S::stride_width - S::padding_width + v * S::dilation_width;
            if (column < 0 || column >= S::width) continue;
            const X here = x[(c * S::height + row) * S::width + column];
            if (first || here > largest) largest = here;
            first = false;
          }
        }
        y[(c * S::out_height + i) * S::out_width + j] = largest;
      }
    }
  }
}

}  // namespace layers
