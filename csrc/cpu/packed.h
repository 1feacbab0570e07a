// Raw kernel of the layers that read spikes as bits: a convolution over channels-last images of one bit a value, which
// with 1 x 1 images is a linear layer.
#pragma once
#include <stdint.h>

namespace fastcifar {

struct PackedConv {
  const uint8_t* bits = nullptr;  // [images, height, width, channels / 8], the first channel in the lowest bit
  const float* weight = nullptr;  // [kernel_height, kernel_width, channels, outputs]
  const float* bias = nullptr;    // [outputs], may be null
  float* out = nullptr;           // [images, out_height, out_width, outputs]
  int64_t height = 1, width = 1, channels = 8, outputs = 1;
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int64_t out_height = 1, out_width = 1;
};

struct PackedKernels {
  // Rows [begin, end) of the output, counted over all images.
  void (*conv)(const PackedConv&, int64_t begin, int64_t end);
};

}  // namespace fastcifar
