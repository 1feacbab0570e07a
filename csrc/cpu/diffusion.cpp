// Host side of diffusion samplers: checks, how samples lie in memory, allocation, the split over torch's threads.
#include "diffusion.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../ops.h"

namespace fastcifar {
namespace {

// A block is worth a thread for so many multiplications and additions; a step has about six an element.
constexpr int64_t kBlocksOfThread = kGrain / kStepBlock;

uint64_t seed_of(const char* op, const Tensor& seed) {
  FC_CHECK(seed.is_cpu() && seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, op,
           ": expected a seed, one int64 on the CPU");
  return *(const uint64_t*)seed.data_ptr();
}

// Dimensions from 1 on have no gaps and no overlap when taken in the order of their strides.
bool dense_samples(const Dims& sizes, const Dims& strides) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 1; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// How the samples of all tensors of a step lie: each in the order of x's, with any distance from one to the next.
struct Layout {
  const char* op;
  ScalarType dtype;
  Dims sizes, strides;  // of a result without gaps
  int64_t samples = 1, length = 1;

  Layout(const char* name, const Tensor& x) : op(name), dtype(x.scalar_type()), sizes(sizes_of(x)) {
    FC_CHECK(x.is_cpu(), op, ": expected a CPU tensor");
    dtype_index(x, op);
    const Dims given = strides_of(x);
    samples = sizes.empty() ? 1 : sizes[0];
    length = samples ? x.numel() / samples : 0;
    if (sizes.empty() || x.is_contiguous() || !dense_samples(sizes, given) || given[0] < length) {
      strides = contiguous_strides(sizes);
    } else {
      strides = given;
      strides[0] = length;
    }
  }

  bool has_samples(const Tensor& t) const {
    if (!t.is_cpu() || t.scalar_type() != dtype || sizes_of(t) != sizes) return false;
    const Dims given = strides_of(t);
    for (size_t d = 1; d < sizes.size(); ++d)
      if (sizes[d] != 1 && given[d] != strides[d]) return false;
    return sizes.empty() || samples <= 1 || given[0] >= length;
  }

  // The tensor itself where its samples lie as they should, else a copy.
  Tensor laid_out(const Tensor& t, const char* name) const {
    FC_CHECK(t.is_cpu() && t.scalar_type() == dtype && sizes_of(t) == sizes, op, ": expected ", name,
             " of x's shape and dtype on the CPU");
    return has_samples(t) ? t : copy_as(t, strides);
  }

  Samples of(const Tensor& t) const { return {t.data_ptr(), samples > 1 ? t.stride(0) : length}; }
};

// A problem and the tensors it points into.
struct Step {
  Layout layout;
  StepProblem p;
  std::vector<Tensor> kept{};
  std::vector<double> coefficients{};

  Step(const char* op, const Tensor& x, const OptionalTensor& output, const OptionalTensor& uncond,
       const std::vector<Tensor>& history, const OptionalTensor& noise, const OptionalTensor& seed,
       const OptionalTensor& given, const std::vector<double>& numbers, double guidance, double limit, int64_t stream)
      : layout(op, x) {
    FC_CHECK(history.size() <= size_t(kConverted - kHistory), op, ": expected up to ", kConverted - kHistory,
             " kept tensors, got ", int64_t(history.size()));
    FC_CHECK(!(limit != limit) && limit > 0, op, ": expected a positive limit");
    FC_CHECK(!uncond || output, op, ": expected an output beside uncond");
    FC_CHECK(!noise || !seed, op, ": expected noise or a seed, not both");
    take_coefficients(given, numbers);
    p.samples = layout.samples;
    p.length = layout.length;
    p.guidance = guidance;
    p.limit = limit;
    p.in[kX] = keep(x, "x");
    if (output) p.in[kOutput] = keep(*output, "output");
    if (uncond) p.uncond = keep(*uncond, "uncond");
    for (size_t i = 0; i < history.size(); ++i) p.in[kHistory + i] = keep(history[i], "history");
    if (noise) p.noise = keep(*noise, "noise");
    p.draws = seed.has_value();
    if (seed) p.seed = seed_of(op, *seed);
    p.step = uint64_t(stream);
    bool given_all = true;
    for (size_t i = 0; i < coefficients.size(); ++i) {
      const int t = int(i % kTerms), row = int(i % kCoefficients) / kTerms;
      if (coefficients[i] == 0) continue;
      given_all = given_all && (t >= kInputs || p.in[t].data || p.length * p.samples == 0);
      given_all = given_all && (t != kNoise || p.noise.data || p.draws || p.length * p.samples == 0);
      const bool exists = t < kConverted + row || (t == kNoise && row == kPredict);
      FC_CHECK(exists, op, ": expected each row to use inputs and the rows before it, and noise in the last one only");
    }
    FC_CHECK(given_all, op, ": expected the tensors that have a coefficient, got None for one of them");
  }

  // Whether a row has a coefficient.
  bool has(int row) const {
    for (size_t i = 0; i < coefficients.size(); ++i)
      if (coefficients[i] != 0 && int(i % kCoefficients) / kTerms == row) return true;
    return false;
  }

  Samples keep(const Tensor& t, const char* name) {
    kept.push_back(layout.laid_out(t, name));
    return layout.of(kept.back());
  }

  void take_coefficients(const OptionalTensor& given, const std::vector<double>& numbers) {
    if (!given) {
      FC_CHECK(numbers.size() == size_t(kCoefficients), layout.op, ": expected ", kCoefficients, " numbers");
      coefficients = numbers;
    } else {
      const int64_t dims = given->dim();
      FC_CHECK(given->is_cpu() && (dims == 2 || (dims == 3 && given->size(0) == layout.samples)) &&
                   given->size(dims - 2) == kRows && given->size(dims - 1) == kTerms &&
                   (given->scalar_type() == ScalarType::Double || given->scalar_type() == ScalarType::Float),
               layout.op, ": expected coefficients [3, 11] or [B, 3, 11] in float64 or float32 on the CPU");
      const Tensor dense = given->is_contiguous() ? *given : copy_as(*given, contiguous_strides(sizes_of(*given)));
      coefficients.resize(dense.numel());
      if (dense.scalar_type() == ScalarType::Double)
        std::copy_n((const double*)dense.data_ptr(), dense.numel(), coefficients.begin());
      else
        std::copy_n((const float*)dense.data_ptr(), dense.numel(), coefficients.begin());
      p.per_sample = dims == 3;
    }
    p.coefficients = coefficients.data();
  }

  // Samples without gaps that share their coefficients are one.
  void merge(const StepGradients& g = {}) {
    const auto joins = [&](const Samples& t) { return t.data == nullptr || t.stride == p.length; };
    bool all = !p.per_sample && joins(p.uncond) && joins(p.noise);
    for (const Samples& t : p.in) all = all && joins(t);
    for (const Samples& t : p.out) all = all && joins(t);
    for (const Samples& t : g.grad) all = all && joins(t);
    if (!all) return;
    p.length *= p.samples;
    p.samples = 1;
  }

  void run() {
    merge();
    const int64_t bytes = layout.dtype == ScalarType::Double ? 8 : layout.dtype == ScalarType::Float ? 4 : 2;
    int64_t written = 0;
    bool aligned = true;
    for (const Samples& t : p.out) {
      if (!t.data) continue;
      written += p.samples * p.length * bytes;
      aligned = aligned && uintptr_t(t.data) % 64 == 0 && (p.samples == 1 || t.stride * bytes % 64 == 0);
    }
    p.stream = aligned && written >= kStreamBytes;
    const auto kernel = diffusion_kernels(checked_isa()).step[dtype_index(kept[0], layout.op)];
    parallel_for(p.blocks(), kBlocksOfThread, [&](int64_t begin, int64_t end) {
      const auto noise = aligned_scratch(p.draws ? (kStepBlock + 2 * kNormalBlock) * sizeof(float) : 64);
      kernel(p, begin, end, (float*)noise.get());
    });
  }

  Tensor new_result() const { return empty_strided(layout.sizes, layout.strides, layout.dtype); }
};

constexpr int kRowOfResult[kRows] = {kPredict, kConvert, kCorrect};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> solver_step(Tensor x, OptionalTensor output, OptionalTensor uncond,
                                               std::vector<Tensor> history, OptionalTensor noise, OptionalTensor seed,
                                               OptionalTensor coefficients, std::vector<double> numbers,
                                               double guidance, double limit, int64_t stream, int64_t wanted) {
  const char* const op = "solver_step";
  Step step(op, x, output, uncond, history, noise, seed, coefficients, numbers, guidance, limit, stream);
  FC_CHECK(wanted >= -1 && wanted < 1 << kRows, op, ": expected wanted of 0 to 7, or -1");
  std::vector<Tensor> results;
  for (int r = 0; r < kRows; ++r) {
    const int row = kRowOfResult[r];
    const bool want = wanted < 0 ? step.has(row) : wanted >> r & 1;
    results.push_back(want ? step.new_result() : empty_strided({0}, {1}, step.layout.dtype));
    if (want) step.p.out[row] = step.layout.of(results[r]);
  }
  step.run();
  return {results[0], results[1], results[2]};
}

void solver_step_into(Tensor x, OptionalTensor output, OptionalTensor uncond, std::vector<Tensor> history,
                      OptionalTensor noise, OptionalTensor seed, OptionalTensor coefficients,
                      std::vector<double> numbers, double guidance, double limit, int64_t stream, OptionalTensor x_next,
                      OptionalTensor converted, OptionalTensor corrected) {
  const char* const op = "solver_step_into";
  const OptionalTensor* const results[kRows] = {&x_next, &converted, &corrected};
  Step step(op, x, output, uncond, history, noise, seed, coefficients, numbers, guidance, limit, stream);
  for (int r = 0; r < kRows; ++r) {
    if (!*results[r]) continue;
    FC_CHECK(step.layout.has_samples(**results[r]), op, ": expected results whose samples lie in memory as x's do");
    step.p.out[kRowOfResult[r]] = step.layout.of(**results[r]);
  }
  step.run();
}

void solver_table_step(Tensor ring, OptionalTensor output, Tensor table, int64_t step, OptionalTensor uncond,
                       OptionalTensor noise, OptionalTensor seed, double guidance) {
  const char* const op = "solver_table_step";
  constexpr int64_t kColumns = kCoefficients + 3;
  FC_CHECK(ring.is_cpu() && ring.is_contiguous() && ring.dim() >= 1 && ring.size(0) >= 1 &&
               ring.size(0) <= 1 + kConverted - kHistory,
           op, ": expected a contiguous ring [1 + slots, ...] on the CPU, with up to 6 slots");
  FC_CHECK(table.is_cpu() && table.dim() == 2 && table.size(1) == kColumns && table.is_contiguous() &&
               table.scalar_type() == ScalarType::Double,
           op, ": expected a contiguous table [S, 36] in float64 on the CPU");
  FC_CHECK(step >= 0 && step < table.size(0), op, ": expected a step of 0 to ", table.size(0) - 1, ", got ", step);
  const double* const row = (const double*)table.data_ptr() + step * kColumns;
  const int dtype = dtype_index(ring, op);
  const int64_t slots = ring.size(0) - 1, bytes = ring.element_size();
  StepProblem p;
  p.samples = 1;
  p.length = ring.numel() / (slots + 1);
  p.coefficients = row;
  p.guidance = guidance;
  p.limit = row[kCoefficients + 2];
  FC_CHECK(p.limit > 0, op, ": expected a positive limit");
  char* const base = (char*)ring.data_ptr();
  const auto slot = [&](int64_t i) { return Samples{base + i * p.length * bytes, p.length}; };
  std::vector<Tensor> kept;
  const auto keep = [&](const OptionalTensor& t, const char* name) {
    FC_CHECK(t->is_cpu() && t->scalar_type() == ring.scalar_type() && t->numel() == p.length, op, ": expected ", name,
             " of x's shape and dtype on the CPU");
    kept.push_back(t->is_contiguous() ? *t : copy_as(*t, contiguous_strides(sizes_of(*t))));
    return Samples{kept.back().data_ptr(), p.length};
  };
  for (int64_t i = 0; i <= slots; ++i) p.in[i == 0 ? kX : kHistory + i - 1] = slot(i);
  FC_CHECK(!uncond || output, op, ": expected an output beside uncond");
  FC_CHECK(!noise || !seed, op, ": expected noise or a seed, not both");
  if (output) p.in[kOutput] = keep(output, "output");
  if (uncond) p.uncond = keep(uncond, "uncond");
  if (noise) p.noise = keep(noise, "noise");
  p.draws = seed.has_value();
  if (seed) p.seed = seed_of(op, *seed);
  p.step = uint64_t(step);
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTerms; ++t) {
      if (row[r * kTerms + t] == 0) continue;
      FC_CHECK(t < kConverted + r || (t == kNoise && r == kPredict), op,
               ": expected each row to use inputs and the rows before it, and noise in the last one only");
      FC_CHECK(p.length == 0 || (t < kInputs ? p.in[t].data != nullptr : t != kNoise || p.noise.data || p.draws), op,
               ": expected the tensors that have a coefficient in step ", step, ", got None for column ", t);
    }
  const double to[2] = {row[kCoefficients], row[kCoefficients + 1]};
  for (int r = 0; r < 2; ++r) {
    FC_CHECK(to[r] >= 0 && to[r] <= double(slots) && to[r] == std::floor(to[r]), op,
             ": expected slots of the ring to store to, got ", to[r]);
    if (to[r] > 0) p.out[r] = slot(int64_t(to[r]));
  }
  p.out[kPredict] = slot(0);
  const auto kernel = diffusion_kernels(checked_isa()).step[dtype];
  if (p.length <= kStepBlock && !p.draws) return kernel(p, 0, p.blocks(), nullptr);  // spares the call of a thread pool
  parallel_for(p.blocks(), kBlocksOfThread, [&](int64_t begin, int64_t end) {
    const auto drawn = aligned_scratch(p.draws ? (kStepBlock + 2 * kNormalBlock) * sizeof(float) : 64);
    kernel(p, begin, end, (float*)drawn.get());
  });
}

std::tuple<Tensor, Tensor> solver_step_backward(OptionalTensor grad_x_next, OptionalTensor grad_converted,
                                                OptionalTensor grad_corrected, Tensor x, OptionalTensor output,
                                                OptionalTensor uncond, std::vector<Tensor> history,
                                                OptionalTensor noise, OptionalTensor seed, OptionalTensor coefficients,
                                                std::vector<double> numbers, double guidance, double limit,
                                                int64_t stream, int64_t wants) {
  const char* const op = "solver_step_backward";
  constexpr int kUncond = kInputs, kOfNoise = kInputs + 1, kOfCoefficients = kInputs + 2;
  FC_CHECK(wants >= 0 && wants < 1 << (kOfCoefficients + 1), op, ": expected wants of 0 to 2047");
  Step step(op, x, output, uncond, history, noise, seed, coefficients, numbers, guidance, limit, stream);
  StepProblem& p = step.p;
  p.all_rows = true;
  const Layout& layout = step.layout;
  const OptionalTensor* const given[kRows] = {&grad_converted, &grad_corrected, &grad_x_next};
  StepGradients g;
  for (int r = 0; r < kRows; ++r)
    if (*given[r]) {
      step.kept.push_back(layout.laid_out(**given[r], "gradients"));
      g.grad[r] = layout.of(step.kept.back());
    }
  bool exist = !(wants >> kUncond & 1 && !uncond) && !(wants >> kOfNoise & 1 && !noise);
  int64_t count = 0;
  for (int t = 0; t < kOfCoefficients; ++t) {
    if (!(wants >> t & 1)) continue;
    if (t < kInputs) exist = exist && (p.in[t].data || p.length * p.samples == 0);
    ++count;
  }
  FC_CHECK(exist, op, ": expected gradients to be wanted of given tensors");
  Dims sizes = layout.sizes, strides = layout.strides;
  sizes.insert(sizes.begin(), count);
  strides.insert(strides.begin(), x.numel());
  Tensor grads = empty_strided(sizes, strides, layout.dtype);
  char* into = (char*)grads.data_ptr();
  for (int t = 0; t < kOfCoefficients; ++t) {
    if (!(wants >> t & 1)) continue;
    const Samples to{into, layout.length};
    (t < kInputs ? g.to_in[t] : t == kUncond ? g.to_uncond : g.to_noise) = to;
    into += x.numel() * x.element_size();
  }
  step.merge(g);
  const bool sums = wants >> kOfCoefficients & 1;
  std::vector<double> partial(sums ? p.blocks() * kCoefficients : 0);
  if (sums) g.sums = partial.data();
  const auto kernel = diffusion_kernels(checked_isa()).backward[dtype_index(x, op)];
  parallel_for(p.blocks(), kBlocksOfThread, [&](int64_t begin, int64_t end) {
    const auto drawn = aligned_scratch(p.draws ? (kStepBlock + 2 * kNormalBlock) * sizeof(float) : 64);
    kernel(p, g, begin, end, (float*)drawn.get());
  });
  const int64_t programs = p.per_sample ? p.samples : 1;
  Tensor of_coefficients =
      sums ? empty_strided({programs, kRows, kTerms}, {kCoefficients, kTerms, 1}, ScalarType::Double)
           : empty_strided({0}, {1}, ScalarType::Double);
  if (sums) {
    double* const to = (double*)of_coefficients.data_ptr();
    std::fill_n(to, programs * kCoefficients, 0.0);
    for (int64_t block = 0; block < p.blocks(); ++block) {
      double* const program = to + (p.per_sample ? block / p.blocks_of_sample() * kCoefficients : 0);
      for (int i = 0; i < kCoefficients; ++i) program[i] += partial[block * kCoefficients + i];
    }
  }
  return {grads, of_coefficients};
}

Tensor normal_numbers(Tensor seed, int64_t stream, int64_t n) {
  const char* const op = "normal_numbers";
  const uint64_t key = seed_of(op, seed);
  FC_CHECK(n >= 0 && n < int64_t(1) << 40, op, ": expected n of 0 to 2^40, got ", n);
  const int64_t blocks = (n + kNormalBlock - 1) / kNormalBlock;
  Tensor out = empty_strided({n}, {1}, ScalarType::Float);
  float* const to = (float*)out.data_ptr();
  const auto normal = diffusion_kernels(checked_isa()).normal;
  parallel_for(blocks, 64, [&](int64_t begin, int64_t end) {
    const int64_t whole = std::min(end, n / kNormalBlock);
    if (whole > begin)
      normal(key, uint64_t(stream), begin * kNormalBlock, (whole - begin) * kNormalBlock, to + begin * kNormalBlock);
    if (end > whole && end == blocks && n % kNormalBlock) {
      alignas(64) float last[kNormalBlock];
      normal(key, uint64_t(stream), (blocks - 1) * kNormalBlock, kNormalBlock, last);
      std::copy_n(last, n % kNormalBlock, to + (blocks - 1) * kNormalBlock);
    }
  });
  return out;
}

namespace {

// The magnitudes of a row by their order: that of their bits. A count by the upper eleven bits finds where the two
// numbers around the rank are, and only what shares those bits is put in order.
template <class A, class Bits>
A row_quantile(const A* row, int64_t n, double q) {
  constexpr int kShift = sizeof(A) * 8 - 1 - 11;
  constexpr Bits kMagnitude = ~(Bits(1) << (sizeof(A) * 8 - 1));
  // As torch.quantile: the rank is a number of x's dtype. That does not take more elements than float32 counts.
  const double rank = n <= 1 << 24 ? double(A(q) * A(n - 1)) : q * double(n - 1), below = std::floor(rank);
  const A weight = A(rank - below);
  const int64_t low = int64_t(below), high = std::min(int64_t(std::ceil(rank)), n - 1);
  int64_t counts[2048] = {};
  Bits largest = 0;
  const auto bits_of = [&](int64_t i) {
    Bits b;
    std::memcpy(&b, row + i, sizeof b);
    return Bits(b & kMagnitude);
  };
  for (int64_t i = 0; i < n; ++i) {
    const Bits b = bits_of(i);
    largest = std::max(largest, b);
    ++counts[b >> kShift];
  }
  A value;
  std::memcpy(&value, &largest, sizeof value);
  if (value != value) return value;
  int64_t before = 0, first = 0;
  while (before + counts[first] <= low) before += counts[first++];
  int64_t last = first, until = before + counts[first];
  while (until <= high) until += counts[++last];
  std::vector<Bits> some;
  some.reserve(until - before);
  for (int64_t i = 0; i < n; ++i) {
    const Bits b = bits_of(i);
    if (int64_t(b >> kShift) >= first && int64_t(b >> kShift) <= last) some.push_back(b);
  }
  std::nth_element(some.begin(), some.begin() + (low - before), some.end());
  const Bits a = some[low - before];
  const Bits b = high == low ? a : *std::min_element(some.begin() + (low - before) + 1, some.end());
  A from, to;
  std::memcpy(&from, &a, sizeof a);
  std::memcpy(&to, &b, sizeof b);
  return weight < A(0.5) ? from + weight * (to - from) : to - (to - from) * (A(1) - weight);  // torch.lerp
}

}  // namespace

Tensor magnitude_quantile(Tensor x, double q) {
  const char* const op = "magnitude_quantile";
  const bool wide = x.scalar_type() == ScalarType::Double;
  FC_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) >= 1 && (wide || x.scalar_type() == ScalarType::Float), op,
           ": expected x [B, n] in float32 or float64 on the CPU, n at least 1");
  FC_CHECK(q >= 0 && q <= 1, op, ": expected a quantile of 0 to 1");
  const int64_t rows = x.size(0), n = x.size(1);
  if (!x.is_contiguous()) x = copy_as(x, contiguous_strides(sizes_of(x)));
  Tensor out = empty_strided({rows}, {1}, x.scalar_type());
  parallel_for(rows, std::max<int64_t>(1, kGrain / n / 4), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (wide)
        ((double*)out.data_ptr())[r] = row_quantile<double, uint64_t>((const double*)x.data_ptr() + r * n, n, q);
      else
        ((float*)out.data_ptr())[r] = row_quantile<float, uint32_t>((const float*)x.data_ptr() + r * n, n, q);
    }
  });
  return out;
}

}  // namespace fastcifar
