// The spectral gate of square grids of 4, 7, 8, 14 and 16, in float32, without torch: `make cuda` builds it into
// fastcifar/_cuda.so, which kernels/spectral_cuda.py calls through ctypes. Gates come from a cache; memory moves tokens
// once in and once out, 8 bytes a token and channel forward and 12 backward, which is the floor.
//
// A block is 32 channels (lanes) by the threads that share an image's tile. Forward up to 8 x 8 that is one thread,
// with the tile in its registers; else one thread a pair of rows and a column, with the tile in shared memory.
#include <cuda_runtime.h>
#include <stdint.h>

#define FC_BUTTERFLIES fastcifar_cuda
#define FC_BUTTERFLY __host__ __device__ __forceinline__
#include "spectral_body.h"

#define FC_STRING(x) #x
#define FC_EXPAND(x) FC_STRING(x)
extern "C" __attribute__((used, visibility("default"))) const char fastcifar_cuda_stamp[] =
    "fastcifar-build-stamp:" FC_EXPAND(FASTCIFAR_VERSION) ";";

namespace {

using fastcifar_cuda::Complex;
using fastcifar_cuda::Tile;
constexpr int kLanes = 32;

struct Tokens {
  const float* at;
  int64_t image, row, column;  // strides; channels are adjacent
};

// Tile in registers. Lanes of a block: 64 channels of one image.
template <int N>
__global__ void __launch_bounds__(64)
    small_kernel(Tokens x, const float* __restrict__ w, float* __restrict__ y, int64_t C, float sign) {
  using Small = Tile<float, N, 1>;
  const int64_t blocks = (C + 63) / 64, b = blockIdx.x / blocks, c = blockIdx.x % blocks * 64 + threadIdx.x;
  if (c >= C) return;
  float tile[Small::kSize];
  Complex<float> z[N];
#pragma unroll
  for (int job = 0; job < Small::kJobs; ++job) Small::rows(tile, job, x.at + b * x.image + c, x.row, x.column);
#pragma unroll
  for (int slot = 0; slot < Small::kSlots; ++slot) {
    Small::column(tile, slot, z);
    Small::gated(tile, slot, z, w + 2 * c, C, sign);
  }
#pragma unroll
  for (int job = 0; job < Small::kJobs; ++job) Small::rows_back(tile, job, y + b * N * N * C + c, N * C, C);
}

// Tile in shared memory, one image a block. Lanes without a channel stay, for the barriers.
template <int N>
__global__ void __launch_bounds__(kLanes* Tile<float, N, kLanes>::kJobs)
    shared_kernel(Tokens x, const float* __restrict__ w, float* __restrict__ y, int64_t C, float sign) {
  using Shared = Tile<float, N, kLanes>;
  extern __shared__ float memory[];
  float* tile = memory + threadIdx.x;
  const int job = threadIdx.y;
  const int64_t blocks = (C + kLanes - 1) / kLanes;
  const int64_t b = blockIdx.x / blocks, c = blockIdx.x % blocks * kLanes + threadIdx.x;
  if (c < C) Shared::rows(tile, job, x.at + b * x.image + c, x.row, x.column);
  __syncthreads();
  if (c < C) {
    Complex<float> z[N];
    Shared::column(tile, job, z);
    Shared::gated(tile, job, z, w + 2 * c, C, sign);
  }
  __syncthreads();
  if (c < C) Shared::rows_back(tile, job, y + b * N * N * C + c, N * C, C);
}

// Two tiles in shared memory, a run of `per` images a block, whose sums stay in registers. A thread's column of x is
// transformed while that of g waits in shared memory. At least 448 threads a multiprocessor: left alone, ptxas takes
// 255 registers for sm_100, and half as many fit.
template <int N>
__global__ void __launch_bounds__(kLanes* Tile<float, N, kLanes>::kJobs,
                                  N <= 8 ? 16 / Tile<float, N, kLanes>::kJobs : 0)
    backward_kernel(Tokens g, Tokens x, const float* __restrict__ w, float* __restrict__ grad_x,
                    float* __restrict__ sums_out, int64_t B, int64_t C, int64_t per) {
  using Shared = Tile<float, N, kLanes>;
  extern __shared__ float memory[];
  float *tile_g = memory + threadIdx.x, *tile_x = tile_g + Shared::kSize * kLanes;
  const int job = threadIdx.y;
  const int64_t blocks = (C + kLanes - 1) / kLanes;
  const int64_t chunk = blockIdx.x / blocks, c = blockIdx.x % blocks * kLanes + threadIdx.x;
  const int64_t end = chunk * per + per < B ? chunk * per + per : B;
  Complex<float> sums[N];
#pragma unroll
  for (int h = 0; h < N; ++h) sums[h] = {0.0f, 0.0f};
  for (int64_t b = chunk * per; b < end; ++b) {
    // A thread reads and writes the rows that it wrote last time, and the others are behind the second barrier.
    if (c < C) {
      Shared::rows(tile_g, job, g.at + b * g.image + c, g.row, g.column);
      Shared::rows(tile_x, job, x.at + b * x.image + c, x.row, x.column);
    }
    __syncthreads();
    if (c < C) {
      Complex<float> column_g[N], column_x[N];
      Shared::column(tile_g, job, column_g);
      Shared::column(tile_x, job, column_x);
      Shared::accumulate(sums, job, column_x, column_g);
      if (grad_x) Shared::gated(tile_g, job, column_g, w + 2 * c, C, -1.0f);
    }
    __syncthreads();
    if (c < C && grad_x) Shared::rows_back(tile_g, job, grad_x + b * N * N * C + c, N * C, C);
  }
  if (c < C) Shared::finish(sums, job, sums_out + chunk * N * Shared::K * C * 2 + 2 * c, C);
}

template <class Kernel>
cudaError_t room(Kernel kernel, size_t bytes) {  // more than 48 kB of shared memory have to be asked for
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

template <int N>
cudaError_t gate(Tokens x, const float* w, float* y, int64_t B, int64_t C, float sign, cudaStream_t stream) {
  if constexpr (N <= 8) {
    const int64_t blocks = (C + 63) / 64 * B;
    small_kernel<N><<<unsigned(blocks), 64, 0, stream>>>(x, w, y, C, sign);
  } else {
    using Shared = Tile<float, N, kLanes>;
    const int64_t blocks = (C + kLanes - 1) / kLanes * B;
    const size_t bytes = Shared::kSize * kLanes * sizeof(float);
    shared_kernel<N><<<unsigned(blocks), dim3(kLanes, Shared::kJobs), bytes, stream>>>(x, w, y, C, sign);
  }
  return cudaGetLastError();
}

template <int N>
cudaError_t gate_backward(Tokens g, Tokens x, const float* w, float* grad_x, float* sums, int64_t B, int64_t C,
                          int64_t per, cudaStream_t stream) {
  using Shared = Tile<float, N, kLanes>;
  const int64_t blocks = (C + kLanes - 1) / kLanes * ((B + per - 1) / per);
  const size_t bytes = 2 * Shared::kSize * kLanes * sizeof(float);
  if (const cudaError_t error = room(backward_kernel<N>, bytes)) return error;
  backward_kernel<N>
      <<<unsigned(blocks), dim3(kLanes, Shared::kJobs), bytes, stream>>>(g, x, w, grad_x, sums, B, C, per);
  return cudaGetLastError();
}

#define FC_BY_SIDE(side, call)      \
  switch (side) {                   \
    case 4:                         \
      return call(4);               \
    case 7:                         \
      return call(7);               \
    case 8:                         \
      return call(8);               \
    case 14:                        \
      return call(14);              \
    case 16:                        \
      return call(16);              \
    default:                        \
      return cudaErrorInvalidValue; \
  }

}  // namespace

// y = the gate of x, or, where conj is not 0, the gradient to x of a gradient x. A cudaError_t, 0 for none.
extern "C" __attribute__((visibility("default"))) int fastcifar_spectral_gate(int side, const float* x, const float* w,
                                                                              float* y, int64_t x_b, int64_t x_h,
                                                                              int64_t x_w, int64_t B, int64_t C,
                                                                              int64_t conj, void* stream) {
  const Tokens tokens = {x, x_b, x_h, x_w};
  const float sign = conj ? -1.0f : 1.0f;
#define FC_CALL(N) gate<N>(tokens, w, y, B, C, sign, static_cast<cudaStream_t>(stream))
  FC_BY_SIDE(side, FC_CALL)
#undef FC_CALL
}

// The gradient to x, where grad_x is not null, and those to the gates of each run of `per` images.
extern "C" __attribute__((visibility("default"))) int fastcifar_spectral_gate_backward(
    int side, const float* g, const float* x, const float* w, float* grad_x, float* sums, int64_t g_b, int64_t g_h,
    int64_t g_w, int64_t x_b, int64_t x_h, int64_t x_w, int64_t B, int64_t C, int64_t per, void* stream) {
  const Tokens of_g = {g, g_b, g_h, g_w}, of_x = {x, x_b, x_h, x_w};
#define FC_CALL(N) gate_backward<N>(of_g, of_x, w, grad_x, sums, B, C, per, static_cast<cudaStream_t>(stream))
  FC_BY_SIDE(side, FC_CALL)
#undef FC_CALL
}
