// Host side of spectral mixing: plans, checks, allocation, the split of the work over torch's threads.
#include "spectral.h"

#include <cmath>
#include <mutex>
#include <numeric>

#include "../ops.h"

namespace fastcifar {

// n = first * second, both a butterfly's size where that can be; an even n has an even `first`, so that two rows that
// were packed as a pair meet in one butterfly.
static FftPlan make_plan(int n) {
  FftPlan plan;
  plan.n = n;
  const auto cost = [n](int second) {  // how far from what the kernels like best
    const int first = n / second;
    if (first == 1) return 0;
    if (first % 2 == 0 && first <= 8) return 1 + std::abs(first - second);
    if (first % 2 == 1 && first <= 8) return 100 + std::abs(first - second);
    return first % 2 == 1 ? 1000 + first : 1 << 20;
  };
  plan.second = 0;
  for (int second = 1; second <= 8; ++second)
    if (n % second == 0 && (plan.second == 0 || cost(second) < cost(plan.second))) plan.second = second;
  const int first = plan.first = n / plan.second, second = plan.second;
  plan.twiddled = std::gcd(first, second) != 1;
  for (int b = 0; b < second; ++b)
    for (int a = 0; a < first; ++a) {
      plan.in[b * first + a] = plan.twiddled ? second * a + b : (second * a + first * b) % n;
      const double angle = -2 * M_PI * (a * b % n) / n;
      plan.twiddle_float[2 * (b * first + a)] = plan.twiddle[2 * (b * first + a)] = std::cos(angle);
      plan.twiddle_float[2 * (b * first + a) + 1] = plan.twiddle[2 * (b * first + a) + 1] = std::sin(angle);
    }
  for (int c = 0; c < first; ++c)
    for (int d = 0; d < second; ++d) {
      int k = c + first * d;
      if (!plan.twiddled)
        for (k = 0; k % first != c || k % second != d; ++k) {
        }
      plan.out[c * second + d] = k;
    }
  for (int k = 0; k < first; ++k) {
    plan.root_float[2 * k] = plan.root[2 * k] = std::cos(2 * M_PI * k / first);
    plan.root_float[2 * k + 1] = plan.root[2 * k + 1] = std::sin(2 * M_PI * k / first);
  }
  return plan;
}

static const FftPlan* fft_plan(int64_t n) {
  static FftPlan plans[kLargestSide + 1];
  static std::once_flag made[kLargestSide + 1];
  std::call_once(made[n], [n] { plans[n] = make_plan(int(n)); });
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

// Whether a result is written past the caches: it is large, and every register goes to an address that allows it.
bool streams(const Tensor& out, int64_t lanes) {
  const int64_t bytes = lanes * out.element_size();
  return out.numel() * int64_t(out.element_size()) >= kStreamBytes && int64_t(out.data_ptr()) % bytes == 0 &&
         out.size(3) % lanes == 0;
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

void run(SpectralKernel kernel, const SpectralKernels& kernels, const SpectralProblem& p, bool is_double, int64_t items,
         int64_t cost) {
  const int64_t bytes = kernels.scratch_bytes(p, is_double);
  parallel_for(items, kGrain / cost + 1,
               [&](int64_t begin, int64_t end) { kernel(p, begin, end, thread_scratch(bytes)); });
}

// The weight's gradient is summed over chunks of images: at most so many, of at least so many images.
constexpr int64_t kMostChunks = 8, kFewestImages = 4;
constexpr int64_t kGateBytes = 128 << 10, kFewestItems = 32;

// Groups of a panel: neighbours in memory are read soon after one another, as far as their gates (and the sums of their
// gradients) fit in the second level of the cache; and there are some panels and images for every thread.
int64_t panel_size(const SpectralProblem& p, int64_t lanes, bool is_double, bool sums, int64_t images) {
  const int64_t places = p.columns->n * (p.rows->n / 2 + 1), groups = divided(p.channels, lanes);
  const int64_t bytes = places * 2 * lanes * (is_double ? 8 : 4) * (sums ? 2 : 1);
  return std::clamp<int64_t>(std::min(kGateBytes / bytes, groups * images / kFewestItems), 1, groups);
}

void run_gate(SpectralProblem& p, bool is_double) {
  const SpectralKernels& kernels = spectral_kernels(checked_isa());
  const int64_t lanes = kernels.lanes[is_double];
  p.panel = panel_size(p, lanes, is_double, false, p.batch);
  const int64_t panels = divided(divided(p.channels, lanes), p.panel);
  run(kernels.gate[is_double], kernels, p, is_double, p.batch * panels, p.rows->n * p.columns->n * lanes * p.panel);
}

}  // namespace

Tensor spectral_gate_forward(Tensor x, Tensor weight, bool wide) {
  const char* const op = "spectral_gate_forward";
  const bool is_double = checked_grid(op, x);
  const Tensor w = checked_weight(op, weight, x), in = with_channels_last(x);
  Tensor out = fresh(sizes_of(x), wide ? compute_dtype(dtype_index(x, op)) : x.scalar_type());
  if (x.numel() == 0) return out;
  SpectralProblem p = problem(x.size(0), x.size(1), x.size(2), x.size(3));
  p.x = tokens(in, dtype_index(in, op));
  p.out = tokens(out, dtype_index(out, op));
  p.weight = w.data_ptr();
  p.chunk = p.batch;
  const SpectralKernels& kernels = spectral_kernels(checked_isa());
  const int64_t lanes = kernels.lanes[is_double];
  run(kernels.gate[is_double], kernels, p, is_double, p.batch * divided(p.channels, lanes),
      x.size(1) * x.size(2) * lanes);
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
    if (wants_x) run_gate(p, is_double);
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

}  // namespace fastcifar
