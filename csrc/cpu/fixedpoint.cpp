// Host side of the fixed-point cast: checks, allocation, how the elements that share a binary point lie in memory, the
// split over torch's threads.
#include "fixedpoint.h"

#include <cmath>
#include <limits>

#include "../ops.h"

namespace fastcifar {
namespace {

constexpr int kLeastIntBits = -4, kMostIntBits = 40;
constexpr int64_t kPattern = 1024;   // columns with a binary point each, at least, where the tensor has as many
constexpr int64_t kMostChunks = 16;  // of rows of such columns, which are summed one after the other

Format format(const char* op, int64_t width, bool is_signed, int64_t rounding, int64_t overflow, int64_t saturated_bits,
              const OptionalTensor& seed) {
  FC_CHECK(width >= 1 && width <= 32, op, ": expected a width of 1 to 32");
  FC_CHECK(rounding >= 0 && rounding < kRoundings && overflow >= 0 && overflow < kOverflows, op, ": unknown mode");
  FC_CHECK(saturated_bits >= 0 && saturated_bits <= width, op, ": expected saturated_bits of 0 to width");
  FC_CHECK(is_signed || overflow != kWrapSm, op, ": expected a signed type under wrap_sm");
  FC_CHECK(rounding != kStochastic ||
               (seed && seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long),
           op, ": expected a seed, one int64 on the CPU, for stochastic rounding");
  Format f;
  f.width = int(width);
  f.is_signed = is_signed;
  f.rounding = int(rounding);
  f.overflow = int(overflow);
  const bool wraps = overflow == kWrap || overflow == kWrapSm;
  f.saturated_bits = wraps ? int(saturated_bits) : 0;
  return f;
}

// The strides of what an op returns: x's own where x is dense in any order of dimensions; row by row where random
// numbers are counted.
Dims result_strides(const Tensor& x, const Format& f) {
  if (x.is_contiguous() || f.rounding == kStochastic) return contiguous_strides(sizes_of(x));
  return strides_of(torch::stable::empty_like(x));
}

Tensor laid_out(const Tensor& t, const Dims& strides) {
  for (size_t d = 0; d < strides.size(); ++d)
    if (t.size(d) > 1 && t.stride(d) != strides[d]) return copy_as(t, strides);
  return t;
}

// A problem and what it points to.
struct Job {
  const char* op;
  Format f;
  CastProblem p;
  bool is_double = false;
  std::vector<double> frac_bits{};  // by channel
  int64_t inner = 1;                // neighbours that share a channel
  std::vector<Cast<float>> casts_float{};
  std::vector<Cast<double>> casts_double{};
  std::vector<float> columns_float{};
  std::vector<double> columns_double{};

  Job(const char* name, const Format& format, const Tensor& x) : op(name), f(format) {
    FC_CHECK(x.is_cpu(), op, ": expected a CPU tensor");
    p.dtype = dtype_index(x, op);
    p.total = x.numel();
    p.rounder = f.rounder();
    p.bounder = f.bounder();
  }

  // One binary point, or one for each index of a dimension of x, whose memory order `strides` is.
  void set_frac_bits(const OptionalTensor& t, int64_t int_bits, const Tensor& x, const Dims& strides) {
    if (!t) {
      FC_CHECK(int_bits >= kLeastIntBits && int_bits <= kMostIntBits, op, ": expected int_bits of -4 to 40");
      frac_bits = {double(f.width - int_bits)};
      return;
    }
    FC_CHECK(t->is_cpu() && (t->scalar_type() == ScalarType::Float || t->scalar_type() == ScalarType::Double) &&
                 t->dim() <= x.dim(),
             op, ": expected frac_bits in float32 or float64 on the CPU, of no more dimensions than x");
    const int64_t offset = x.dim() - t->dim();
    bool fits = true;
    for (int64_t d = 0; d < t->dim(); ++d) {
      if (t->size(d) == 1) continue;
      fits = fits && t->numel() == t->size(d) && x.size(offset + d) == t->size(d);
      inner = strides[offset + d];
    }
    FC_CHECK(fits, op, ": expected frac_bits to broadcast against x, with one dimension above 1 at most");
    const Tensor values = t->is_contiguous() ? *t : copy_as(*t, contiguous_strides(sizes_of(*t)));
    for (int64_t i = 0; i < t->numel(); ++i) {
      const double value = t->scalar_type() == ScalarType::Float ? ((const float*)values.data_ptr())[i]
                                                                 : ((const double*)values.data_ptr())[i];
      const double whole = std::nearbyint(value);  // ties to even
      frac_bits.push_back(whole != whole ? whole
                                         : std::clamp<double>(whole, f.width - kMostIntBits, f.width - kLeastIntBits));
    }
  }

  // Floats hold 24 bits; and below F = 0 a product may underflow in them.
  void lay_out(const OptionalTensor& seed) {
    is_double = p.dtype == kFloat64 || f.width > 24;
    for (double frac : frac_bits) is_double = is_double || frac < 0;
    const uint64_t key = f.rounding == kStochastic ? *(const uint64_t*)seed->data_ptr() : 0;
    is_double ? lay_out(casts_double, columns_double, key) : lay_out(casts_float, columns_float, key);
  }

  template <class A>
  void lay_out(std::vector<Cast<A>>& casts, std::vector<A>& columns, uint64_t key) {
    const int64_t channels = frac_bits.size();
    if (channels == 1 || inner >= kShortestShared) {
      for (double frac : frac_bits) casts.emplace_back(f, frac, key);
      p.channels = channels;
      p.length = channels == 1 ? p.total : inner;
      p.rows = channels == 1 ? 1 : p.total / inner;
    } else {
      casts.emplace_back(f, 0.0, key);
      if (sizeof(A) == 8) casts[0].least = A(0x1p-1000);
      const int64_t period = channels * inner;
      p.length = std::min((kPattern + period - 1) / period * period, p.total);
      p.rows = (p.total + p.length - 1) / p.length;
      p.chunk = (p.rows + kMostChunks - 1) / kMostChunks;
      const int64_t padded = p.length + 16;  // whole registers
      columns.assign(2 * padded, A(1));
      for (int64_t i = 0; i < p.length; ++i) {
        const Cast<A> c(f, frac_bits[i % period / inner], key);
        columns[i] = c.scale;
        columns[padded + i] = c.inverse;
      }
      p.scale = columns.data();
      p.inverse = columns.data() + padded;
    }
    p.casts = casts.data();
  }

  void run(CastKernel const (&kernel)[2], bool streams, const Tensor* out) {
    if (out) p.out = out->data_ptr();
    const int64_t line = 64 / int64_t(compute_bytes(p.dtype));
    p.stream = streams && out && p.total * int64_t(out->element_size()) >= kStreamBytes && uintptr_t(p.out) % 64 == 0 &&
               (p.rows == 1 || p.length % (2 * line) == 0);
    const int64_t item = std::min(kCastBlock, p.length) * p.chunk;
    const bool converts = p.scale || p.raw_bytes || (is_double ? p.dtype != kFloat64 : p.dtype != kFloat32) || !p.out;
    const int64_t bytes = kCastScratch * kCastBlock * (is_double ? 8 : 4);
    parallel_for(p.items(), kGrain / std::max<int64_t>(item, 1) + 1, [&](int64_t begin, int64_t end) {
      const auto scratch = aligned_scratch(converts ? bytes : 64);
      kernel[is_double](p, begin, end, scratch.get());
    });
  }

  // The gradient to the binary points, from the sums of the items.
  void sum(double* to) const {
    constexpr double kLn2 = 0.693147180559945309417232121458;
    const int64_t channels = frac_bits.size(), blocks = p.blocks();
    std::fill(to, to + channels, 0.0);
    if (p.scale == nullptr) {
      for (int64_t item = 0; item < p.items(); ++item) to[item / blocks % channels] += p.partial[item];
    } else {
      const int64_t chunks = (p.rows + p.chunk - 1) / p.chunk;
      for (int64_t i = 0; i < p.length; ++i) {
        double column = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) column += p.partial[chunk * p.length + i];
        const int64_t channel = i / inner % channels;
        to[channel] += column * (is_double ? ((const double*)p.inverse)[i] : ((const float*)p.inverse)[i]);
      }
    }
    for (int64_t i = 0; i < channels; ++i) to[i] *= kLn2;
  }
};

}  // namespace

Tensor fixed_quantize(Tensor x, OptionalTensor frac_bits, OptionalTensor seed, int64_t width, int64_t int_bits,
                      bool is_signed, int64_t rounding, int64_t overflow, int64_t saturated_bits) {
  const char* const op = "fixed_quantize";
  Job job(op, format(op, width, is_signed, rounding, overflow, saturated_bits, seed), x);
  const Dims strides = result_strides(x, job.f);
  job.set_frac_bits(frac_bits, int_bits, x, strides);
  const Tensor out = empty_strided(sizes_of(x), strides, x.scalar_type());
  if (x.numel() == 0) return out;
  const Tensor in = laid_out(x, strides);
  job.p.x = in.data_ptr();
  job.lay_out(seed);
  job.run(fixedpoint_kernels(checked_isa()).forward, true, &out);
  return out;
}

Tensor fixed_to_raw(Tensor x, OptionalTensor seed, int64_t width, int64_t int_bits, bool is_signed, int64_t rounding,
                    int64_t overflow, int64_t saturated_bits) {
  const char* const op = "fixed_to_raw";
  Job job(op, format(op, width, is_signed, rounding, overflow, saturated_bits, seed), x);
  const Dims strides = result_strides(x, job.f);
  job.set_frac_bits({}, int_bits, x, strides);
  const bool wide = width == 32 && !is_signed;
  const Tensor out = empty_strided(sizes_of(x), strides, wide ? ScalarType::Long : ScalarType::Int);
  if (x.numel() == 0) return out;
  const Tensor in = laid_out(x, strides);
  job.p.x = in.data_ptr();
  job.p.raw_bytes = wide ? 8 : 4;
  job.lay_out(seed);
  for (auto& cast : job.casts_float) cast.inverse = 1;
  for (auto& cast : job.casts_double) cast.inverse = 1;
  job.run(fixedpoint_kernels(checked_isa()).forward, false, &out);
  return out;
}

std::tuple<Tensor, Tensor> fixed_quantize_backward(Tensor grad, Tensor x, OptionalTensor frac_bits, OptionalTensor seed,
                                                   int64_t width, int64_t int_bits, bool is_signed, int64_t rounding,
                                                   int64_t overflow, int64_t saturated_bits, bool wrap_gradient,
                                                   bool wants_x, bool wants_frac_bits) {
  const char* const op = "fixed_quantize_backward";
  Job job(op, format(op, width, is_signed, rounding, overflow, saturated_bits, seed), x);
  job.f.wrap_gradient = wrap_gradient;
  FC_CHECK(grad.is_cpu() && sizes_of(grad) == sizes_of(x) && grad.scalar_type() == x.scalar_type(), op,
           ": expected grad like x");
  FC_CHECK(frac_bits || !wants_frac_bits, op, ": expected frac_bits, whose gradient is asked for");
  const Dims strides = result_strides(x, job.f);
  job.set_frac_bits(frac_bits, int_bits, x, strides);
  const Tensor grad_x =
      wants_x ? empty_strided(sizes_of(x), strides, x.scalar_type()) : empty_strided({0}, {1}, x.scalar_type());
  const int64_t points = wants_frac_bits ? frac_bits->numel() : 0;
  const Tensor grad_frac_bits = empty_strided({points}, {1}, ScalarType::Double);
  double* const to = (double*)grad_frac_bits.data_ptr();
  std::fill(to, to + points, 0.0);
  if (x.numel() == 0) return {grad_x, grad_frac_bits};
  const Tensor in = laid_out(x, strides), g = laid_out(grad, strides);
  job.p.x = in.data_ptr();
  job.p.grad = g.data_ptr();
  job.lay_out(seed);
  const int64_t chunks = (job.p.rows + job.p.chunk - 1) / job.p.chunk;
  const std::unique_ptr<double[]> partial(new double[job.p.scale ? chunks * job.p.length : job.p.items()]);
  job.p.partial = partial.get();
  job.run(fixedpoint_kernels(checked_isa()).backward, true, wants_x ? &grad_x : nullptr);
  if (wants_frac_bits) job.sum(to);
  return {grad_x, grad_frac_bits};
}

Tensor limit_digits(Tensor x, int64_t k, bool is_signed) {
  const char* const op = "limit_digits";
  const int dtype = dtype_index(x, op);
  FC_CHECK(x.is_cpu() && k >= 1, op, ": expected a tensor on the CPU, and k above 0");
  const Dims strides = x.is_contiguous() ? contiguous_strides(sizes_of(x)) : strides_of(torch::stable::empty_like(x));
  const Tensor out = empty_strided(sizes_of(x), strides, x.scalar_type());
  const int64_t n = x.numel(), size = x.element_size(), blocks = (n + kCastBlock - 1) / kCastBlock;
  if (n == 0) return out;
  const Tensor in = laid_out(x, strides);
  const char* const from = (const char*)in.data_ptr();
  char* const to = (char*)out.data_ptr();
  const bool stream = n * size >= kStreamBytes && uintptr_t(to) % 64 == 0;
  const auto limit = fixedpoint_kernels(checked_isa()).limit_digits[dtype];
  k = std::min<int64_t>(k, 64);  // no float has as many
  parallel_for(blocks, kGrain / kCastBlock, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kCastBlock, last = std::min(end * kCastBlock, n);
    limit(from + first * size, to + first * size, last - first, k, is_signed, stream);
  });
  return out;
}

}  // namespace fastcifar
