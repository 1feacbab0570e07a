// A convolution that reads bits adds, for each spike, the weights that leave from it: work and weight traffic shrink
// with the share of neurons that fire, and nothing is unpacked. Per spike and output 1 addition and 4 bytes of weights
// from the second-level cache, where a matrix product takes 2 operations for every neuron, spike or not.
//
// The sum runs over the taps and channels in their order, so results do not depend on threads or instruction set.
#pragma once
#include "packed.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

// Outputs [first, first + kRegisters * lanes) of one pixel.
template <int kRegisters>
FC_INLINE void packed_pixel(const PackedConv& p, int64_t image, int64_t y, int64_t x, int64_t first) {
  constexpr int kStep = kLanes<float>;
  V<float> sums[kRegisters];
  for (int r = 0; r < kRegisters; ++r) sums[r] = p.bias ? load(p.bias + first + r * kStep, Full{}) : V<float>{};
  const int64_t bytes = p.channels / 8;
  for (int64_t ky = 0; ky < p.kernel[0]; ++ky) {
    const int64_t row = y * p.stride[0] - p.padding[0] + ky * p.dilation[0];
    if (row < 0 || row >= p.height) continue;
    for (int64_t kx = 0; kx < p.kernel[1]; ++kx) {
      const int64_t column = x * p.stride[1] - p.padding[1] + kx * p.dilation[1];
      if (column < 0 || column >= p.width) continue;
      const uint8_t* bits = p.bits + ((image * p.height + row) * p.width + column) * bytes;
      const float* weight = p.weight + (ky * p.kernel[1] + kx) * p.channels * p.outputs + first;
      for (int64_t byte = 0; byte < bytes; byte += 8) {
        uint64_t word = 0;
        memcpy(&word, bits + byte, bytes - byte < 8 ? bytes - byte : 8);
        for (; word; word &= word - 1) {
          const float* w = weight + (byte * 8 + __builtin_ctzll(word)) * p.outputs;
          for (int r = 0; r < kRegisters; ++r) sums[r] = sums[r] + load(w + r * kStep, Full{});
        }
      }
    }
  }
  float* out = p.out + ((image * p.out_height + y) * p.out_width + x) * p.outputs + first;
  for (int r = 0; r < kRegisters; ++r) store(out + r * kStep, sums[r], Full{});
}

// Those outputs of every pixel.
template <int kRegisters>
void packed_panel(const PackedConv& p, int64_t begin, int64_t end, int64_t first) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t x = 0; x < p.out_width; ++x)
      packed_pixel<kRegisters>(p, row / p.out_height, row % p.out_height, x, first);
}

// Outputs in panels of a few registers, one after the other, so that a panel's weights stay in the cache for all
// pixels. `outputs` is a multiple of 16 (the caller pads the weights).
static void packed_conv(const PackedConv& p, int64_t begin, int64_t end) {
  constexpr int kStep = kLanes<float>;
  int64_t first = 0;
  for (; first + 4 * kStep <= p.outputs; first += 4 * kStep) packed_panel<4>(p, begin, end, first);
  for (; first < p.outputs; first += kStep) packed_panel<1>(p, begin, end, first);
}

extern const PackedKernels packed_kernels;
const PackedKernels packed_kernels = {packed_conv};

}  // namespace fastcifar::FASTCIFAR_ISA
