// Host side of the layers that read spikes as bits.
#include "packed.h"

#include "../ops.h"

namespace fastcifar {

Tensor packed_conv(Tensor bits, Tensor weight, OptionalTensor bias, int64_t height, int64_t width,
                   std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation) {
  const char* const op = "packed_conv";
  FC_CHECK(window_pair(kernel, 1) && window_pair(stride, 1) && window_pair(padding, 0) && window_pair(dilation, 1) &&
               window_pair({height, width}, 1),
           op, ": expected pairs of positive sizes, below 2^24");
  FC_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.is_contiguous() &&
               weight.scalar_type() == ScalarType::Float && weight.size(1) % 16 == 0 &&
               weight.size(0) % (8 * kernel[0] * kernel[1]) == 0,
           op, ": expected weight [kernel * channels, outputs], float32, contiguous, in multiples of 8 and 16");
  const int64_t channels = weight.size(0) / (kernel[0] * kernel[1]), outputs = weight.size(1);
  FC_CHECK(bits.is_cpu() && bits.dim() == 2 && bits.is_contiguous() && bits.scalar_type() == ScalarType::Byte &&
               __int128(bits.size(1)) * 8 == __int128(height * width) * channels,
           op, ": expected bits [images, height * width * channels / 8], uint8, contiguous");
  FC_CHECK(!bias || (bias->is_cpu() && bias->is_contiguous() && bias->scalar_type() == ScalarType::Float &&
                     bias->numel() == outputs),
           op, ": expected bias [outputs], float32");
  PackedConv p;
  p.bits = (const uint8_t*)bits.data_ptr();
  p.weight = (const float*)weight.data_ptr();
  p.bias = bias ? (const float*)bias->data_ptr() : nullptr;
  p.height = height;
  p.width = width;
  p.channels = channels;
  p.outputs = outputs;
  int64_t out[2];
  for (int d = 0; d < 2; ++d) {
    p.kernel[d] = kernel[d];
    p.stride[d] = stride[d];
    p.padding[d] = padding[d];
    p.dilation[d] = dilation[d];
    const int64_t reach = (d ? width : height) + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
    FC_CHECK(reach >= 0, op, ": expected a kernel no larger than the padded image");
    out[d] = reach / stride[d] + 1;
  }
  p.out_height = out[0];
  p.out_width = out[1];
  const Dims sizes{bits.size(0), out[0], out[1], outputs};
  Tensor result = empty_strided(sizes, contiguous_strides(sizes), ScalarType::Float);
  p.out = (float*)result.data_ptr();
  const auto conv = packed_kernels(checked_isa()).conv;
  parallel_for(bits.size(0) * out[0], 1, [&](int64_t begin, int64_t end) { conv(p, begin, end); });
  return result;
}

}  // namespace fastcifar
