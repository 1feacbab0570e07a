// Raw kernels of spectral mixing: token grids [B, H, W, C] through a real 2-D Fourier transform, with channels as the
// SIMD lanes. No torch type in here; host side: spectral.cpp, kernels: spectral.inl, transforms: fft.inl.
#pragma once
#include <stdint.h>

namespace fastcifar {

constexpr int kLargestSide = 64;

// A transform of n = first * second points: `second` butterflies of `first` inputs each, twiddles unless the two are
// coprime (then Good and Thomas' map needs none), then `first` butterflies of `second`. `second` is 1 to 8; `first` is
// a butterfly's size too, or any odd number. n <= 8: first = 1.
struct FftPlan {
  int n = 1, first = 1, second = 1;
  bool twiddled = false;
  int in[kLargestSide] = {};              // [second][first]: the sample that each input of the first butterflies is
  int out[kLargestSide] = {};             // [first][second]: the frequency that each output of the second ones is
  double twiddle[2 * kLargestSide] = {};  // [second][first] of (re, im)
  float twiddle_float[2 * kLargestSide] = {};  // the same
  double root[2 * kLargestSide] = {};  // exp(-2 pi i k / first) as (cos, sin) of the positive angle, for odd `first`
  float root_float[2 * kLargestSide] = {};
};

FftPlan make_fft_plan(int n);  // n of 1 to 64

// Where tokens lie: element (b, h, w, c) at data + b * image + h * row + w * pixel + c.
struct Tokens {
  void* data = nullptr;
  int64_t image = 0, row = 0, pixel = 0;
  int dtype = 0;
};

struct SpectralProblem {
  int64_t batch = 0, channels = 0;
  const FftPlan *rows = nullptr, *columns = nullptr;  // of lengths W and H
  Tokens x, grad, out;                                // out is what a kernel writes: mixed tokens or the gradient to x
  const void* weight = nullptr;                       // [H, K, C, 2] in the compute type
  bool conjugate = false;                             // gate with conj(weight)
  bool stream = false;                                // write past the caches
  int64_t panel = 1;                                  // groups of channels
  int64_t chunk = 1;            // images whose part of the weight's gradient is summed before it meets the others
  void* partial = nullptr;      // [chunks, groups, K, H, 2, lanes]
  void* grad_weight = nullptr;  // [H, K, C, 2]
  void* spectrum = nullptr;     // [blocks, B, H, K, 2, C / blocks]
  int64_t blocks = 1;
  double inner = 1;  // factor of the columns that stand for two
};

// Each works on items [begin, end); `scratch` holds scratch_bytes of a thread's own. Channels come in groups of
// `lanes`, groups in panels of `panel`, which is how many keep their gates at hand.
using SpectralKernel = void (*)(const SpectralProblem&, int64_t begin, int64_t end, void* scratch);

struct SpectralKernels {
  int64_t lanes[2];  // float, double
  int64_t (*scratch_bytes)(const SpectralProblem&, int is_double);
  SpectralKernel gate[2];      // x, weight -> out; an item is an image and a panel, panel after panel
  SpectralKernel backward[2];  // x, grad, weight -> out (where it has data), partial; an item is a chunk and a panel
  SpectralKernel reduce[2];    // partial -> grad_weight; an item is a group
  SpectralKernel forward[2];   // x -> spectrum; an item is an image and a group
  SpectralKernel inverse[2];   // spectrum -> out; the same
  // Rows [begin, end) of real parts [B * tokens, channels] from half spectra [B * tokens, channels / 2 + 1] of (re, im)
  // pairs: the other half of row n is row -n, backwards.
  void (*real_parts[2])(const void* half, void* out, int64_t begin, int64_t end, int64_t tokens, int64_t channels);
};

}  // namespace fastcifar
