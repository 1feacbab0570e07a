// Raw kernels of products of integers: convolutions and, as convolutions over images of one pixel, matrix products of
// int16 with int16, summed exactly. No torch type in here; host side: integer_matmul.cpp, kernels: integer_matmul.inl.
#pragma once
#include <stdint.h>

namespace fastcifar {

struct IntegerConv {
  const int16_t* x = nullptr;       // [images, height, width, channels]
  const int16_t* weight = nullptr;  // [outputs, kernel_height, kernel_width, channels / groups]
  int32_t* packed = nullptr;        // the weight as the product reads it, packed_pairs integers a group
  void* out = nullptr;              // [images, out_height, out_width, outputs], int32 or int64
  int64_t images = 1, height = 1, width = 1, channels = 1, outputs = 1, groups = 1;
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int64_t out_height = 1, out_width = 1;
  int64_t block = 2;  // products whose sum is sure to fit an int32; at least 2, see integer_matmul.inl

  int64_t depth() const { return kernel[0] * kernel[1] * (channels / groups); }  // products of one output
  int64_t pairs() const { return (depth() + 1) / 2; }
  int64_t rows() const { return images * out_height * out_width; }
  bool is_depthwise() const { return channels == groups && outputs == groups; }
  // Rows of the matrix that the product would gather are then rows of x itself.
  bool is_matrix() const {
    return kernel[0] * kernel[1] == 1 && stride[0] * stride[1] == 1 && padding[0] + padding[1] == 0 && groups == 1 &&
           channels % 2 == 0;
  }
};

struct IntegerKernels {
  // The greatest magnitude in x[0, n).
  int64_t (*largest)(const int16_t* x, int64_t n);
  int64_t tile_rows;                             // rows of an item of `product`
  int64_t (*blocks)(const IntegerConv&);         // items of `pack`: blocks of columns of all groups
  int64_t (*packed_pairs)(const IntegerConv&);   // int32 values of `packed` in all
  int64_t (*scratch_bytes)(const IntegerConv&);  // of `product`, a thread
  void (*pack)(const IntegerConv&, int64_t begin, int64_t end);
  // weight -> out by int32 [0] or int64 [1]; an item is a group and `tile_rows` rows of the output, group after group.
  void (*product[2])(const IntegerConv&, int64_t begin, int64_t end, void* scratch);
  // Where each channel has an output of its own, weight [kernel_height, kernel_width, channels]; an item is a row.
  void (*depthwise[2])(const IntegerConv&, int64_t begin, int64_t end);
};

}  // namespace fastcifar
