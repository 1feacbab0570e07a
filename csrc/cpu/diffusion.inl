// One step of a linear solver: three sums over the same tensors, each of which may use those before it. All of it is
// done for four registers of elements at a time, so every tensor passes once through the machine: the least is a read
// of each tensor that has a coefficient and a write of each result, and with two to five terms a step stays below what
// the memory takes (a multiplication and an addition a term).
//
// A coefficient of 0 costs nothing: the terms of a program are listed once a sample, and only those are read. Sums go
// from the first column to the last, as in the reference, whose results these are to the bit.
#pragma once
#include "diffusion.h"
#include "normal.inl"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

template <class A>
struct StepTerms {
  int count[kRows] = {}, from[kRows][kTerms];
  A factor[kRows][kTerms];
  bool reads_output = false;
};

// What a program uses; a row that nobody asks for, by a result or by a later row, is left out.
template <class A>
static void list_terms(const StepProblem& p, const double* coefficients, StepTerms<A>& terms) {
  bool used[kTerms] = {};
  terms.reads_output = false;
  for (int row = kRows - 1; row >= 0; --row) {
    terms.count[row] = 0;
    if (!p.all_rows && p.out[row].data == nullptr && (row == kPredict || !used[kConverted + row])) continue;
    for (int t = 0; t < kTerms; ++t) {
      const A factor = A(coefficients[row * kTerms + t]);
      if (factor == 0) continue;
      used[t] = true;
      terms.reads_output = terms.reads_output || t == kOutput;
      terms.from[row][terms.count[row]] = t;
      terms.factor[row][terms.count[row]++] = factor;
    }
  }
}

// Where the elements of one sample are.
template <class S>
struct StepRows {
  const S *in[kInputs], *uncond, *noise;
  S* out[kRows];
  StepRows(const StepProblem& p, int64_t sample) {
    const auto at = [&](const Samples& t) { return t.data ? (S*)t.data + sample * t.stride : nullptr; };
    for (int t = 0; t < kInputs; ++t) in[t] = at(p.in[t]);
    for (int r = 0; r < kRows; ++r) out[r] = at(p.out[r]);
    uncond = at(p.uncond);
    noise = at(p.noise);
  }
};

template <class A>
FC_INLINE V<A> clamped(V<A> x, A limit) {  // NaN stays NaN
  x = select<A>(x > limit, splat<A>(limit), x);
  return select<A>(x < -limit, splat<A>(-limit), x);
}

// kRegisters registers of a row's sum from element i on; made[] are the rows before it, output the guided one.
template <int kRegisters, class A, class S, class Width>
FC_INLINE void sum_terms(const StepTerms<A>& terms, int row, const StepRows<S>& at, const float* drawn, int64_t i,
                         const V<A> (&output)[kRegisters], const V<A> (&made)[kRows][kRegisters], Width width,
                         V<A> (&sum)[kRegisters]) {
  constexpr int L = kLanes<A>;
#pragma GCC unroll 4
  for (int u = 0; u < kRegisters; ++u) sum[u] = V<A>{};
  for (int k = 0; k < terms.count[row]; ++k) {
    const int t = terms.from[row][k];
    const A c = terms.factor[row][k];
    if (t == kOutput) {
#pragma GCC unroll 4
      for (int u = 0; u < kRegisters; ++u) sum[u] = sum[u] + output[u] * c;
    } else if (t == kConverted || t == kCorrected) {
#pragma GCC unroll 4
      for (int u = 0; u < kRegisters; ++u) sum[u] = sum[u] + made[t - kConverted][u] * c;
    } else if (t == kNoise && drawn) {
#pragma GCC unroll 4
      for (int u = 0; u < kRegisters; ++u) sum[u] = sum[u] + load_as<A>(drawn + i + u * L, width) * c;
    } else {
      const S* from = (t == kNoise ? at.noise : at.in[t]) + i;
#pragma GCC unroll 4
      for (int u = 0; u < kRegisters; ++u) sum[u] = sum[u] + load_as<A>(from + u * L, width) * c;
    }
  }
}

template <int kRegisters, class A, class S, class Width>
FC_INLINE void guided_output(const StepProblem& p, const StepRows<S>& at, int64_t i, Width width,
                             V<A> (&output)[kRegisters]) {
  constexpr int L = kLanes<A>;
#pragma GCC unroll 4
  for (int u = 0; u < kRegisters; ++u) {
    output[u] = load_as<A>(at.in[kOutput] + i + u * L, width);
    if (at.uncond) {
      const V<A> base = load_as<A>(at.uncond + i + u * L, width);
      output[u] = base + (output[u] - base) * A(p.guidance);
    }
  }
}

// The three rows for a few registers; made[] holds them after it.
template <int kRegisters, class A, class S, class Width>
FC_INLINE void take_step(const StepProblem& p, const StepTerms<A>& terms, const StepRows<S>& at, const float* drawn,
                         int64_t i, Width width, V<A> (&output)[kRegisters], V<A> (&made)[kRows][kRegisters],
                         V<A> (&before_clamp)[kRegisters]) {
  if (terms.reads_output) guided_output<kRegisters, A, S>(p, at, i, width, output);
  if (terms.count[kConvert]) {
    sum_terms<kRegisters, A, S>(terms, kConvert, at, drawn, i, output, made, width, made[kConvert]);
#pragma GCC unroll 4
    for (int u = 0; u < kRegisters; ++u) {
      before_clamp[u] = made[kConvert][u];
      if (p.limit < __builtin_inf()) made[kConvert][u] = clamped<A>(made[kConvert][u], A(p.limit));
    }
  }
  if (terms.count[kCorrect])
    sum_terms<kRegisters, A, S>(terms, kCorrect, at, drawn, i, output, made, width, made[kCorrect]);
  if (terms.count[kPredict])
    sum_terms<kRegisters, A, S>(terms, kPredict, at, drawn, i, output, made, width, made[kPredict]);
}

// f(sample, its rows, its terms, first element, one past the last, noise drawn for element 0 or null, block) for each
// block of elements.
template <class S, class F>
FC_INLINE void over_step_blocks(const StepProblem& p, int64_t begin, int64_t end, float* noise, F f) {
  using A = compute_t<S>;
  StepTerms<A> terms;
  const int64_t each = p.blocks_of_sample();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t sample = block / each, first = block % each * kStepBlock;
    const int64_t last = p.length - first < kStepBlock ? p.length : first + kStepBlock;
    if (block == begin || (p.per_sample && first == 0))
      list_terms<A>(p, p.coefficients + (p.per_sample ? sample * kCoefficients : 0), terms);
    const float* drawn = nullptr;
    if (p.draws) {
      const int64_t number = sample * p.length + first, aligned = number / kNormalBlock * kNormalBlock;
      const int64_t count = (number + (last - first) - aligned + kNormalBlock - 1) / kNormalBlock * kNormalBlock;
      normal(p.seed, p.step, aligned, count, noise);
      drawn = noise + (number - aligned) - first;
    }
    f(sample, StepRows<S>(p, sample), terms, first, last, drawn, block);
  }
}

template <class S>
static void solver_step(const StepProblem& p, int64_t begin, int64_t end, float* noise) {
  using A = compute_t<S>;
  constexpr int L = kLanes<A>, kGroup = 4;
  over_step_blocks<S>(p, begin, end, noise,
                      [&](int64_t, const StepRows<S>& at, const StepTerms<A>& terms, int64_t first, int64_t last,
                          const float* drawn, int64_t) {
                        int64_t i = first;
                        V<A> output[kGroup]{}, made[kRows][kGroup]{}, unclamped[kGroup];
                        for (; i + kGroup * L <= last; i += kGroup * L) {
                          take_step<kGroup, A, S>(p, terms, at, drawn, i, Full{}, output, made, unclamped);
#pragma GCC unroll 3
                          for (int r = 0; r < kRows; ++r)
                            if (at.out[r])
#pragma GCC unroll 4
                              for (int u = 0; u < kGroup; ++u)
                                store_as(at.out[r] + i + u * L, made[r][u], Full{}, p.stream);
                        }
                        V<A> output1[1]{}, made1[kRows][1]{}, unclamped1[1];
                        for (; i < last; i += L) {
                          const Tail tail{int(last - i < L ? last - i : L)};
                          take_step<1, A, S>(p, terms, at, drawn, i, tail, output1, made1, unclamped1);
                          for (int r = 0; r < kRows; ++r)
                            if (at.out[r]) store_as(at.out[r] + i, made1[r][0], tail, false);
                        }
                      });
  if (p.stream) stream_fence();
}

// Adds the lanes of a register to a sum in double, always in the same order.
template <class A>
FC_INLINE void add_lanes(double& sum, V<A> x, int count) {
  for (int l = 0; l < count; ++l) sum += double(x[l]);
}

template <class S>
static void solver_step_backward(const StepProblem& p, const StepGradients& g, int64_t begin, int64_t end,
                                 float* noise) {
  using A = compute_t<S>;
  constexpr int L = kLanes<A>;
  over_step_blocks<S>(p, begin, end, noise,
                      [&](int64_t sample, const StepRows<S>& at, const StepTerms<A>& terms, int64_t first, int64_t last,
                          const float* drawn, int64_t block) {
                        const double* c = p.coefficients + (p.per_sample ? sample * kCoefficients : 0);
                        const auto factor = [&](int row, int t) { return A(c[row * kTerms + t]); };
                        const auto row_of = [&](const Samples& t) {
                          return t.data ? (S*)t.data + sample * t.stride : nullptr;
                        };
                        double* sums = g.sums ? g.sums + block * kCoefficients : nullptr;
                        V<A> output[1]{}, made[kRows][1]{}, unclamped[1]{};
                        for (int64_t i = first; i < last; i += L) {
                          const int count = int(last - i < L ? last - i : L);
                          const Tail tail{count};
                          take_step<1, A, S>(p, terms, at, drawn, i, tail, output, made, unclamped);
                          V<A> to[kRows];  // the gradients to what the rows made
                          for (int r = 0; r < kRows; ++r) {
                            const S* from = row_of(g.grad[r]);
                            to[r] = from ? load_as<A>(from + i, tail) : V<A>{};
                          }
                          to[kCorrect] = to[kCorrect] + to[kPredict] * factor(kPredict, kCorrected);
                          to[kConvert] = to[kConvert] + to[kPredict] * factor(kPredict, kConverted);
                          to[kConvert] = to[kConvert] + to[kCorrect] * factor(kCorrect, kConverted);
                          if (p.limit < __builtin_inf())
                            to[kConvert] = select<A>(abs<A>(unclamped[0]) <= A(p.limit), to[kConvert], V<A>{});
                          for (int t = 0; t < kInputs; ++t) {
                            S* into = row_of(g.to_in[t]);
                            S* base = t == kOutput ? row_of(g.to_uncond) : nullptr;
                            if (!into && !base) continue;
                            V<A> sum = to[kConvert] * factor(kConvert, t) + to[kCorrect] * factor(kCorrect, t);
                            sum = sum + to[kPredict] * factor(kPredict, t);
                            if (into)
                              store_as(into + i, t == kOutput && at.uncond ? sum * A(p.guidance) : sum, tail, false);
                            if (base) store_as(base + i, sum * A(1 - p.guidance), tail, false);
                          }
                          if (S* into = row_of(g.to_noise))
                            store_as(into + i, to[kPredict] * factor(kPredict, kNoise), tail, false);
                          if (!sums) continue;
                          for (int t = 0; t < kTerms; ++t) {
                            V<A> value{};
                            if (t == kOutput) {
                              if (at.in[kOutput]) guided_output<1, A, S>(p, at, i, tail, output);
                              value = output[0];
                            } else if (t < kInputs) {
                              if (at.in[t]) value = load_as<A>(at.in[t] + i, tail);
                            } else if (t == kNoise) {
                              if (drawn)
                                value = load_as<A>(drawn + i, tail);
                              else if (at.noise)
                                value = load_as<A>(at.noise + i, tail);
                            } else {
                              value = made[t - kConverted][0];
                            }
                            const V<A> finite = select<A>(abs<A>(value) < A(__builtin_inf()), value, V<A>{});
                            for (int r = 0; r < kRows; ++r)
                              if (t < kConverted + r || (r == kPredict && t == kNoise))
                                add_lanes<A>(sums[r * kTerms + t], to[r] * (factor(r, t) == 0 ? finite : value), count);
                          }
                        }
                      });
}

extern const DiffusionKernels diffusion_kernels;
const DiffusionKernels diffusion_kernels = {
    {solver_step<float>, solver_step<double>, solver_step<bfloat16>, solver_step<float16>},
    {solver_step_backward<float>, solver_step_backward<double>, solver_step_backward<bfloat16>,
     solver_step_backward<float16>},
    normal};

}  // namespace fastcifar::FASTCIFAR_ISA
