// Host side of the products of integers.
#include "integer_matmul.h"

#include <atomic>

#include "../ops.h"

namespace fastcifar {

namespace {

int64_t largest(const Tensor& t) {
  const auto kernel = integer_kernels(checked_isa()).largest;
  const int16_t* x = (const int16_t*)t.data_ptr();
  std::atomic<int64_t> most{0};
  parallel_for(t.numel(), kGrain * 8, [&](int64_t begin, int64_t end) {
    const int64_t found = kernel(x + begin, end - begin);
    for (int64_t seen = most; found > seen && !most.compare_exchange_weak(seen, found);) {
    }
  });
  return most;
}

Tensor in_one_piece(const Tensor& t) { return t.is_contiguous() ? t : copy_as(t, contiguous_strides(sizes_of(t))); }

// Memory of a thread's own, kept from call to call: fresh pages cost more than the packing that fills them. One for
// each Use, since the thread that calls holds the packed weight while it gathers rows.
enum class Use { kPacked, kGathered };
template <Use use>
void* thread_memory(int64_t bytes) {
  thread_local int64_t held = 0;
  thread_local std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
  if (held < bytes) {
    memory = aligned_scratch(bytes);
    held = bytes;
  }
  return memory.get();
}

// [outputs, 1, kernel...] as [kernel..., outputs]: the channels are then neighbours.
Tensor with_outputs_last(const Tensor& weight) {
  const int64_t outputs = weight.size(0), taps = weight.numel() / outputs;
  Tensor out = empty_strided({taps, outputs}, {outputs, 1}, ScalarType::Short);
  const int16_t* from = (const int16_t*)weight.data_ptr();
  int16_t* to = (int16_t*)out.data_ptr();
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t t = 0; t < taps; ++t) to[t * outputs + o] = from[o * taps + t];
  return out;
}

}  // namespace

Tensor integer_conv(Tensor x, Tensor weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups, bool wide) {
  const char* const op = "integer_conv";
  FC_CHECK(window_pair(stride, 1) && window_pair(padding, 0) && window_pair(dilation, 1), op,
           ": expected pairs of positive sizes, below 2^24");
  FC_CHECK(x.is_cpu() && x.dim() == 4 && x.scalar_type() == ScalarType::Short && weight.is_cpu() && weight.dim() == 4 &&
               weight.scalar_type() == ScalarType::Short,
           op, ": expected x [images, H, W, C] and weight [outputs, kH, kW, C / groups], int16, on the CPU");
  FC_CHECK(groups >= 1 && x.size(3) % groups == 0 && weight.size(0) % groups == 0 &&
               weight.size(3) * groups == x.size(3) && weight.numel() > 0 && window_pair({x.size(1), x.size(2)}, 1) &&
               window_pair({weight.size(1), weight.size(2)}, 1),
           op, ": expected groups that divide channels and outputs, and a weight for every channel");
  const Tensor in = in_one_piece(x), w = in_one_piece(weight);
  IntegerConv p;
  p.x = (const int16_t*)in.data_ptr();
  p.weight = (const int16_t*)w.data_ptr();
  p.images = x.size(0);
  p.height = x.size(1);
  p.width = x.size(2);
  p.channels = x.size(3);
  p.outputs = w.size(0);
  p.groups = groups;
  int64_t out[2];
  for (int d = 0; d < 2; ++d) {
    p.kernel[d] = w.size(1 + d);
    p.stride[d] = stride[d];
    p.padding[d] = padding[d];
    p.dilation[d] = dilation[d];
    const int64_t reach = x.size(1 + d) + 2 * padding[d] - dilation[d] * (p.kernel[d] - 1) - 1;
    FC_CHECK(reach >= 0, op, ": expected a kernel no larger than the padded image");
    out[d] = reach / stride[d] + 1;
  }
  p.out_height = out[0];
  p.out_width = out[1];
  const Dims sizes{p.images, out[0], out[1], p.outputs};
  Tensor result = empty_strided(sizes, contiguous_strides(sizes), wide ? ScalarType::Long : ScalarType::Int);
  if (result.numel() == 0) return result;
  p.out = result.data_ptr();
  // The greatest magnitudes there are, not those that a type allows: longer blocks, and nothing to take on trust.
  const int64_t product = std::max<int64_t>(largest(in) * largest(w), 1), most = INT32_MAX / product;
  FC_CHECK(wide || p.depth() <= most, op, ": expected sums that fit int32; ask for wide ones");
  p.block = std::max<int64_t>(most, 2) / 2 * 2;
  const IntegerKernels& kernels = integer_kernels(checked_isa());
  if (p.is_depthwise()) {
    const Tensor last = with_outputs_last(w);
    p.weight = (const int16_t*)last.data_ptr();
    parallel_for(p.rows(), kGrain / (p.depth() * p.channels) + 1,
                 [&](int64_t begin, int64_t end) { kernels.depthwise[wide](p, begin, end); });
    return result;
  }
  p.packed = (int32_t*)thread_memory<Use::kPacked>(kernels.packed_pairs(p) * 4);
  const int64_t blocks = kernels.blocks(p), cost = kernels.packed_pairs(p) / blocks;
  parallel_for(blocks, kGrain / cost + 1, [&](int64_t begin, int64_t end) { kernels.pack(p, begin, end); });
  const int64_t tiles = (p.rows() + kernels.tile_rows - 1) / kernels.tile_rows;
  const int64_t work = kernels.tile_rows * p.depth() * (p.outputs / groups) / 32 + 1;
  parallel_for(tiles * groups, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    kernels.product[wide](p, begin, end, thread_memory<Use::kGathered>(kernels.scratch_bytes(p)));
  });
  return result;
}

}  // namespace fastcifar
