// Host side of spectral mixing: plans, checks, allocation, the split of the work over torch's threads.
#include "spectral.h"

#include <unistd.h>

#include <mutex>

#include "../ops.h"

namespace fastcifar {

static const FftPlan* fft_plan(int64_t n) {
  static FftPlan plans[kLargestSide + 1];
  static std::once_flag made[kLargestSide + 1];
  std::call_once(made[n], [n] { plans[n] = make_fft_plan(int(n)); });
  return &plans[n];
}

namespace {

Tokens tokens(const Tensor& t, int dtype) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), dtype}; }

// Whether the spectra of x [B, H, W, C] are computed in double precision.
bool checked_grid(const char* op, const Tensor& x) {
  const int dtype = dtype_index(x, op);
  FC_CHECK(x.is_cpu() && x.dim() == 4 && x.size(1) >= 1 && x.size(2) >= 1 && x.size(1) <= kLargestSide &&
               x.size(2) <= kLargestSide,
           op, ": expected [B, H, W, C] on the CPU, H and W of 1 to 64");
  return dtype == kFloat64;
}

// t with channels that are neighbours in memory, as the kernels read them.
Tensor with_channels_last(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : copy_as(t, contiguous_strides(sizes_of(t)));
}

constexpr int64_t kLineBytes = 64;

// Whether a result is written past the caches: it is large, and every register is a line of it.
bool streams(const Tensor& out, int64_t lanes) {
  const int64_t bytes = lanes * out.element_size();
  return bytes == kLineBytes && out.numel() * int64_t(out.element_size()) >= kStreamBytes &&
         int64_t(out.data_ptr()) % bytes == 0 && out.size(3) % lanes == 0;
}

Tensor fresh(const Dims& sizes, ScalarType dtype) { return empty_strided(sizes, contiguous_strides(sizes), dtype); }

SpectralProblem problem(int64_t batch, int64_t height, int64_t width, int64_t channels) {
  SpectralProblem p;
  p.batch = batch;
  p.channels = channels;
  p.rows = fft_plan(width);
  p.columns = fft_plan(height);
  return p;
}

// The weight, checked against the grid; in one piece.
Tensor checked_weight(const char* op, const Tensor& weight, const Tensor& x) {
  FC_CHECK(weight.is_cpu() && weight.scalar_type() == compute_dtype(dtype_index(x, op)) && weight.dim() == 4 &&
               weight.size(0) == x.size(1) && weight.size(1) == x.size(2) / 2 + 1 && weight.size(2) == x.size(3) &&
               weight.size(3) == 2,
           op, ": expected weight [H, W // 2 + 1, C, 2] in the compute type");
  return weight.is_contiguous() ? weight : copy_as(weight, contiguous_strides(sizes_of(weight)));
}

// A thread's scratch, kept from call to call: a third of a megabyte that the system would have to clear each time.
void* thread_scratch(int64_t bytes) {
  thread_local int64_t held = 0;
  thread_local std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
  if (held < bytes) {
    memory = aligned_scratch(bytes);
    held = bytes;
  }
  return memory.get();
}

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Of the second level of the cache, a core's own.
int64_t l2_bytes() {
  static const int64_t bytes = [] {
    const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return found > 0 ? int64_t(found) : int64_t(512) << 10;
  }();
  return bytes;
}

void run(SpectralKernel kernel, const SpectralKernels& kernels, const SpectralProblem& p, bool is_double, int64_t items,
         int64_t cost) {
  const int64_t bytes = kernels.scratch_bytes(p, is_double);
  parallel_for(items, kGrain / cost + 1,
               [&](int64_t begin, int64_t end) { kernel(p, begin, end, thread_scratch(bytes)); });
}

// The weight's gradient is summed over chunks of images: at most so many, of at least so many images.
constexpr int64_t kMostChunks = 8, kFewestImages = 4;
constexpr int64_t kFewChannels = 4;  // and fewer: see fold_of
constexpr int64_t kFewestItems = 32;

// Groups of a panel: neighbours in memory, which are read and written soon after one another, as far as all that they
// need (gates, sums of their gradients, tokens of this image and the next) fits in the second level of the cache. There
// are some panels and images (or chunks of them) for every thread.
int64_t panel_size(const SpectralProblem& p, int64_t lanes, bool is_double, bool backward, int64_t images) {
  const int64_t register_bytes = lanes * (is_double ? 8 : 4), groups = divided(p.channels, lanes);
  const int64_t tile = p.columns->n * p.rows->n * register_bytes;
  const int64_t gate = p.columns->n * (p.rows->n / 2 + 3) * 2 * register_bytes;
  const int64_t group = backward ? 6 * tile + 2 * gate : 4 * tile + gate;
  const int64_t most = std::clamp<int64_t>(std::min(l2_bytes() / group, groups * images / kFewestItems), 1, groups);
  return divided(groups, divided(groups, most));  // panels of a size
}

void run_gate(SpectralProblem& p, const Tensor& out, bool is_double) {
  const SpectralKernels& kernels = spectral_kernels(checked_isa());
  const int64_t lanes = kernels.lanes[is_double];
  p.stream = streams(out, lanes);
  p.panel = panel_size(p, lanes, is_double, false, p.batch);
  const int64_t panels = divided(divided(p.channels, lanes), p.panel);
  run(kernels.gate[is_double], kernels, p, is_double, p.batch * panels, p.rows->n * p.columns->n * lanes * p.panel);
}

// ---- few channels ----
// A register of which a single lane works costs as much as a full one. With few channels, `fold` images lie side by
// side as channels: [B, H, W, C] becomes [B / fold, H, W, C * fold], each image's numbers a column of a transposed
// matrix. fold depends on sizes alone, so that results do not depend on the instruction set.

int64_t fold_of(int64_t batch, int64_t channels) {
  int64_t fold = 1;
  if (channels <= kFewChannels)
    while (fold < 16 && fold < batch) fold *= 2;
  return fold;
}

template <class T>
void transpose(const T* from, int64_t rows, int64_t from_row, T* to, int64_t columns, int64_t to_row) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * to_row + r] = from[r * from_row + c];
}

template <class F>
void with_bytes(int64_t bytes, F f) {
  bytes == 8 ? f(uint64_t{}) : bytes == 4 ? f(uint32_t{}) : f(uint16_t{});
}

Tensor folded(const Tensor& t, int64_t fold) {
  const Dims sizes = sizes_of(t);
  const Tensor in = t.is_contiguous() ? t : copy_as(t, contiguous_strides(sizes));
  const int64_t groups = divided(sizes[0], fold), image = sizes[1] * sizes[2] * sizes[3];
  Tensor out = fresh({groups, sizes[1], sizes[2], sizes[3] * fold}, t.scalar_type());
  if (sizes[0] % fold) torch::stable::zero_(out);
  with_bytes(t.element_size(), [&](auto type) {
    using T = decltype(type);
    const T* from = (const T*)in.data_ptr();
    T* to = (T*)out.data_ptr();
    parallel_for(groups, kGrain / (image * fold) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g)
        transpose(from + g * fold * image, std::min(fold, sizes[0] - g * fold), image, to + g * fold * image, image,
                  fold);
    });
  });
  return out;
}

void unfold(const Tensor& t, int64_t fold, Tensor& out) {
  const int64_t batch = out.size(0), groups = t.size(0), image = out.size(1) * out.size(2) * out.size(3);
  with_bytes(t.element_size(), [&](auto type) {
    using T = decltype(type);
    const T* from = (const T*)t.data_ptr();
    T* to = (T*)out.data_ptr();
    parallel_for(groups, kGrain / (image * fold) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g)
        for (int64_t b = g * fold; b < std::min(batch, (g + 1) * fold); ++b)
          for (int64_t i = 0; i < image; ++i) to[b * image + i] = from[(g * image + i) * fold + b % fold];
    });
  });
}

// [H, K, C, 2] with every channel `fold` times.
template <class T>
void repeat_pairs(const Tensor& weight, int64_t fold, Tensor& out) {
  const T* from = (const T*)weight.data_ptr();
  T* to = (T*)out.data_ptr();
  for (int64_t i = 0; i < weight.numel() / 2; ++i)
    for (int64_t r = 0; r < fold; ++r, to += 2) to[0] = from[2 * i], to[1] = from[2 * i + 1];
}
template <class T>
void sum_pairs(const Tensor& repeated, int64_t fold, Tensor& out) {
  const T* from = (const T*)repeated.data_ptr();
  T* to = (T*)out.data_ptr();
  for (int64_t i = 0; i < out.numel() / 2; ++i, to += 2) {
    to[0] = to[1] = 0;
    for (int64_t r = 0; r < fold; ++r, from += 2) to[0] += from[0], to[1] += from[1];
  }
}

Tensor repeated(const Tensor& weight, int64_t fold) {
  Tensor out = fresh({weight.size(0), weight.size(1), weight.size(2) * fold, 2}, weight.scalar_type());
  weight.element_size() == 8 ? repeat_pairs<double>(weight, fold, out) : repeat_pairs<float>(weight, fold, out);
  return out;
}

}  // namespace

Tensor spectral_gate_forward(Tensor x, Tensor weight, bool wide) {
  const char* const op = "spectral_gate_forward";
  const bool is_double = checked_grid(op, x);
  const Tensor w = checked_weight(op, weight, x), in = with_channels_last(x);
  Tensor out = fresh(sizes_of(x), wide ? compute_dtype(dtype_index(x, op)) : x.scalar_type());
  if (x.numel() == 0) return out;
  if (const int64_t fold = fold_of(x.size(0), x.size(3)); fold > 1) {
    unfold(spectral_gate_forward(folded(x, fold), repeated(w, fold), wide), fold, out);
    return out;
  }
  SpectralProblem p = problem(x.size(0), x.size(1), x.size(2), x.size(3));
  p.x = tokens(in, dtype_index(in, op));
  p.out = tokens(out, dtype_index(out, op));
  p.weight = w.data_ptr();
  run_gate(p, out, is_double);
  return out;
}

std::tuple<Tensor, Tensor> spectral_gate_backward(Tensor grad, Tensor x, Tensor weight, bool wants_x,
                                                  bool wants_weight) {
  const char* const op = "spectral_gate_backward";
  const bool is_double = checked_grid(op, x);
  const Tensor w = checked_weight(op, weight, x), in = with_channels_last(x), g = with_channels_last(grad);
  FC_CHECK(checked_grid(op, grad) == is_double && sizes_of(grad) == sizes_of(x), op, ": expected grad like x");
  Tensor grad_x = fresh(wants_x ? sizes_of(x) : Dims{0}, x.scalar_type());
  Tensor grad_weight = fresh(wants_weight ? sizes_of(w) : Dims{0}, w.scalar_type());
  if (x.numel() == 0) {
    if (wants_weight) torch::stable::zero_(grad_weight);
    return {grad_x, grad_weight};
  }
  if (const int64_t fold = fold_of(x.size(0), x.size(3)); fold > 1) {
    const auto [folded_x, folded_weight] =
        spectral_gate_backward(folded(grad, fold), folded(x, fold), repeated(w, fold), wants_x, wants_weight);
    if (wants_x) unfold(folded_x, fold, grad_x);
    if (wants_weight)
      is_double ? sum_pairs<double>(folded_weight, fold, grad_weight)
                : sum_pairs<float>(folded_weight, fold, grad_weight);
    return {grad_x, grad_weight};
  }
  SpectralProblem p = problem(x.size(0), x.size(1), x.size(2), x.size(3));
  p.x = tokens(in, dtype_index(in, op));
  p.grad = tokens(g, dtype_index(g, op));
  if (wants_x) p.out = tokens(grad_x, dtype_index(grad_x, op));
  p.weight = w.data_ptr();
  p.conjugate = true;
  const SpectralKernels& kernels = spectral_kernels(checked_isa());
  const int64_t lanes = kernels.lanes[is_double], groups = divided(p.channels, lanes);
  const int64_t cost = x.size(1) * x.size(2) * lanes;
  if (!wants_weight) {
    p.x = p.grad;
    if (wants_x) run_gate(p, grad_x, is_double);
    return {grad_x, grad_weight};
  }
  // Chunks by the size of the batch alone, so that the sum has one order for any number of threads and lanes.
  p.chunk = std::max<int64_t>(divided(p.batch, kMostChunks), kFewestImages);
  const int64_t chunks = divided(p.batch, p.chunk), places = w.size(0) * w.size(1) * 2 * lanes;
  Tensor partial = fresh({chunks * groups * places}, w.scalar_type());
  p.partial = partial.data_ptr();
  p.grad_weight = grad_weight.data_ptr();
  p.stream = wants_x && streams(grad_x, lanes);
  p.panel = panel_size(p, lanes, is_double, true, chunks);
  run(kernels.backward[is_double], kernels, p, is_double, chunks * divided(groups, p.panel),
      2 * cost * p.chunk * p.panel);
  run(kernels.reduce[is_double], kernels, p, is_double, groups, places * chunks);
  return {grad_x, grad_weight};
}

Tensor spectrum_forward(Tensor x, int64_t blocks, double inner) {
  const char* const op = "spectrum_forward";
  const bool is_double = checked_grid(op, x);
  FC_CHECK(blocks >= 1 && x.size(3) % blocks == 0, op, ": expected blocks that divide the channels");
  const Tensor in = with_channels_last(x);
  const Dims sizes{blocks, x.size(0), x.size(1), x.size(2) / 2 + 1, 2, x.size(3) / blocks};
  Tensor out = fresh(sizes, compute_dtype(dtype_index(x, op)));
  if (x.numel() == 0) return out;
  SpectralProblem p = problem(x.size(0), x.size(1), x.size(2), x.size(3));
  p.x = tokens(in, dtype_index(in, op));
  p.spectrum = out.data_ptr();
  p.blocks = blocks;
  p.inner = inner;
  const SpectralKernels& kernels = spectral_kernels(checked_isa());
  const int64_t lanes = kernels.lanes[is_double], items = p.batch * blocks * divided(sizes[5], lanes);
  run(kernels.forward[is_double], kernels, p, is_double, items, x.size(1) * x.size(2) * lanes);
  return out;
}

Tensor spectrum_inverse(Tensor spectrum, int64_t width, double inner) {
  const char* const op = "spectrum_inverse";
  FC_CHECK(spectrum.is_cpu() && spectrum.dim() == 6 && spectrum.size(4) == 2 && width >= 1 && width <= kLargestSide &&
               spectrum.size(2) >= 1 && spectrum.size(2) <= kLargestSide && spectrum.size(3) == width / 2 + 1 &&
               (spectrum.scalar_type() == ScalarType::Float || spectrum.scalar_type() == ScalarType::Double),
           op, ": expected [blocks, B, H, width // 2 + 1, 2, C / blocks], float32 or float64, sides of 1 to 64");
  const bool is_double = spectrum.scalar_type() == ScalarType::Double;
  const Tensor in = spectrum.is_contiguous() ? spectrum : copy_as(spectrum, contiguous_strides(sizes_of(spectrum)));
  const int64_t blocks = in.size(0), batch = in.size(1), height = in.size(2), size = in.size(5);
  Tensor out = fresh({batch, height, width, blocks * size}, in.scalar_type());
  if (out.numel() == 0) return out;
  SpectralProblem p = problem(batch, height, width, blocks * size);
  p.out = tokens(out, dtype_index(out, op));
  p.spectrum = in.data_ptr();
  p.blocks = blocks;
  p.inner = inner;
  const SpectralKernels& kernels = spectral_kernels(checked_isa());
  const int64_t lanes = kernels.lanes[is_double];
  run(kernels.inverse[is_double], kernels, p, is_double, batch * blocks * divided(size, lanes), height * width * lanes);
  return out;
}

Tensor spectrum_real_parts(Tensor half, int64_t channels) {
  const char* const op = "spectrum_real_parts";
  FC_CHECK(half.is_cpu() && half.dim() == 4 && half.size(3) == 2 && channels >= 1 && half.size(2) == channels / 2 + 1 &&
               (half.scalar_type() == ScalarType::Float || half.scalar_type() == ScalarType::Double),
           op, ": expected [B, N, channels // 2 + 1, 2], float32 or float64");
  const Tensor in = half.is_contiguous() ? half : copy_as(half, contiguous_strides(sizes_of(half)));
  const int64_t tokens = in.size(1);
  Tensor out = fresh({in.size(0), tokens, channels}, in.scalar_type());
  const auto kernel = spectral_kernels(checked_isa()).real_parts[in.scalar_type() == ScalarType::Double];
  parallel_for(in.size(0) * tokens, kGrain / channels + 1, [&](int64_t begin, int64_t end) {
    kernel(in.data_ptr(), out.data_ptr(), begin, end, tokens, channels);
  });
  return out;
}

}  // namespace fastcifar
