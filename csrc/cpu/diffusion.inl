// One step of a linear solver: three sums over the same tensors, each of which may use those before it. A block of
// elements is taken through all three while it is in the first cache, a sum of up to kMost terms in one loop without a
// branch, so that memory sees each tensor once: the least is a read of each tensor that has a coefficient and a write
// of each result. A multiplication and an addition a term, three loads and a store for every two: with two to five
// terms a step stays below what memory beyond the caches takes.
//
// A coefficient of 0 costs nothing: the terms of a program are listed once a sample, and only those are read. Sums go
// from the first column to the last, as in the reference, whose results these are to the bit (but for the sign of 0).
#pragma once
#include "diffusion.h"
#include "normal.inl"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

constexpr int kMost = 5;

template <class A>
struct StepTerms {
  int count[kRows] = {}, from[kRows][kTerms];
  A factor[kRows][kTerms];
  bool used[kTerms] = {};
  bool reads(int row, int t) const {
    for (int k = 0; k < count[row]; ++k)
      if (from[row][k] == t) return true;
    return false;
  }
};

// What a program uses; a row that nobody asks for, by a result or by a later row, is left out.
template <class A>
static void list_terms(const StepProblem& p, const double* coefficients, StepTerms<A>& terms) {
  for (bool& used : terms.used) used = p.all_rows;
  for (int row = kRows - 1; row >= 0; --row) {
    terms.count[row] = 0;
    if (!p.all_rows && p.out[row].data == nullptr && (row == kPredict || !terms.used[kConverted + row])) continue;
    for (int t = 0; t < kTerms; ++t) {
      const A factor = A(coefficients[row * kTerms + t]);
      if (factor == 0) continue;
      terms.used[t] = true;
      terms.from[row][terms.count[row]] = t;
      terms.factor[row][terms.count[row]++] = factor;
    }
  }
}

template <class A>
FC_INLINE V<A> clamped(V<A> x, A limit) {  // NaN stays NaN
  x = select<A>(x > limit, splat<A>(limit), x);
  return select<A>(x < -limit, splat<A>(-limit), x);
}

// to = [more +] from[0] factor[0] + ..., kTerm of them.
template <int kTerm, bool kMore, class A>
static void sum_terms(A* to, const A* more, const A* const* from, const A* factor, int64_t n, bool stream) {
  for_each_vector<A>(n, [&](int64_t i, auto width) {
    V<A> sum = load(from[0] + i, width) * factor[0];
    if constexpr (kMore) sum = load(more + i, width) + sum;
#pragma GCC unroll 8
    for (int k = 1; k < kTerm; ++k) sum = sum + load(from[k] + i, width) * factor[k];
    store(to + i, sum, width, stream);
  });
}

template <bool kMore, class A>
constexpr void (*kSums[kMost])(A*, const A*, const A* const*, const A*, int64_t, bool) = {
    sum_terms<1, kMore, A>, sum_terms<2, kMore, A>, sum_terms<3, kMore, A>, sum_terms<4, kMore, A>,
    sum_terms<5, kMore, A>};

// A row of a program for a block. `part` holds what there is so far of a sum of many terms: the block may be written to
// where a later term lies.
template <class A>
static void sum_row(const StepTerms<A>& terms, int row, const A* const* at, int64_t n, A* to, A* part, bool stream) {
  const int count = terms.count[row];
  if (count == 0) memset(to, 0, n * sizeof(A));
  const A* from[kTerms];
  for (int k = 0; k < count; ++k) from[k] = at[terms.from[row][k]];
  for (int k = 0; k < count; k += kMost) {
    const int some = count - k < kMost ? count - k : kMost;
    const bool last = k + some == count;
    const auto sum = k ? kSums<true, A>[some - 1] : kSums<false, A>[some - 1];
    sum(last ? to : part, part, from + k, terms.factor[row] + k, n, last && stream);
  }
}

// A block of elements of one sample, in the type that is computed in.
template <class S, class A = compute_t<S>>
struct StepBlock {
  static constexpr bool kInPlace = sizeof(S) == sizeof(A);
  const S *in[kInputs], *uncond, *noise;
  S* out[kRows];
  int64_t count;
  const A* at[kTerms];  // null where there is none
  alignas(64) A own[kTerms + 1][kStepBlock];

  A* part() { return own[kTerms]; }

  void point(const StepProblem& p, int64_t sample, int64_t first, int64_t n) {
    const auto place = [&](const Samples& t) { return t.data ? (S*)t.data + sample * t.stride + first : nullptr; };
    for (int t = 0; t < kInputs; ++t) in[t] = place(p.in[t]);
    for (int r = 0; r < kRows; ++r) out[r] = place(p.out[r]);
    uncond = place(p.uncond);
    noise = place(p.noise);
    count = n;
  }

  const A* read(int t, const S* from) {
    if constexpr (kInPlace) return (const A*)from;
    if (from == nullptr) return nullptr;
    for_each_vector<A>(count, [&](int64_t i, auto width) { store(own[t] + i, load_as<A>(from + i, width), width); });
    return own[t];
  }

  void read_inputs(const StepProblem& p, const StepTerms<A>& terms, const float* drawn) {
    for (int t = 0; t < kInputs; ++t) at[t] = terms.used[t] ? read(t, in[t]) : nullptr;
    if (uncond && at[kOutput]) {
      const A guidance = A(p.guidance);
      for_each_vector<A>(count, [&](int64_t i, auto width) {
        const V<A> base = load_as<A>(uncond + i, width);
        store(own[kOutput] + i, base + (load(at[kOutput] + i, width) - base) * guidance, width);
      });
      at[kOutput] = own[kOutput];
    }
    at[kNoise] = nullptr;
    if (!terms.used[kNoise]) return;
    at[kNoise] = read(kNoise, noise);
    if constexpr (sizeof(A) == 4) {
      if (drawn) at[kNoise] = drawn;
    } else if (drawn) {
      for_each_vector<A>(count,
                         [&](int64_t i, auto width) { store(own[kNoise] + i, load_as<A>(drawn + i, width), width); });
      at[kNoise] = own[kNoise];
    }
  }

  // Where a row may be summed: in its place, unless a later row reads what lies there.
  A* target(const StepTerms<A>& terms, int row) {
    if constexpr (kInPlace) {
      bool free = out[row] != nullptr;
      for (int later = row + 1; later < kRows && free; ++later)
        for (int k = 0; k < terms.count[later]; ++k) free = free && at[terms.from[later][k]] != (const A*)out[row];
      if (free) return (A*)out[row];
    }
    return own[kConverted + row];
  }
  void write(int row, const A* from, bool stream) {
    if (out[row] == nullptr || (const void*)from == (const void*)out[row]) return;
    for_each_vector<A>(count,
                       [&](int64_t i, auto width) { store_as(out[row] + i, load(from + i, width), width, stream); });
  }
};

template <class A>
static void clamp_block(const A* from, A* to, int64_t n, A limit) {
  for_each_vector<A>(n, [&](int64_t i, auto width) { store(to + i, clamped<A>(load(from + i, width), limit), width); });
}

// f(block of elements, its terms, the sample, the block's number) for each block.
template <class S, class F>
FC_INLINE void over_step_blocks(const StepProblem& p, int64_t begin, int64_t end, float* noise, F f) {
  using A = compute_t<S>;
  StepTerms<A> terms;
  StepBlock<S> b;
  const int64_t each = p.blocks_of_sample();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t sample = block / each, first = block % each * kStepBlock;
    const int64_t count = p.length - first < kStepBlock ? p.length - first : kStepBlock;
    if (block == begin || (p.per_sample && first == 0))
      list_terms<A>(p, p.coefficients + (p.per_sample ? sample * kCoefficients : 0), terms);
    b.point(p, sample, first, count);
    const float* drawn = nullptr;
    if (p.draws && terms.used[kNoise]) {
      const int64_t number = sample * p.length + first, aligned = number / kNormalBlock * kNormalBlock;
      const int64_t numbers = (number + count - aligned + kNormalBlock - 1) / kNormalBlock * kNormalBlock;
      normal(p.seed, p.step, aligned, numbers, noise);
      drawn = noise + (number - aligned);
    }
    b.read_inputs(p, terms, drawn);
    f(b, terms, sample, block);
  }
}

template <class S>
static void solver_step(const StepProblem& p, int64_t begin, int64_t end, float* noise) {
  using A = compute_t<S>;
  over_step_blocks<S>(p, begin, end, noise, [&](StepBlock<S>& b, const StepTerms<A>& terms, int64_t, int64_t) {
    for (int row = 0; row < kRows; ++row) {
      // A later row may use one without terms, which is 0.
      const bool read = row != kPredict && terms.used[kConverted + row];
      if (terms.count[row] == 0 && b.out[row] == nullptr && !read) continue;
      A* const to = row == kPredict && StepBlock<S>::kInPlace ? (A*)b.out[row] : b.target(terms, row);
      const bool direct = (void*)to == (void*)b.out[row];
      sum_row<A>(terms, row, b.at, b.count, to, b.part(), p.stream && direct && row != kConvert);
      if (row == kConvert && p.limit < __builtin_inf()) clamp_block<A>(to, to, b.count, A(p.limit));
      if (row != kPredict) b.at[kConverted + row] = to;
    }
    if (b.out[kConvert]) b.write(kConvert, b.at[kConverted], p.stream);
    if (b.out[kCorrect]) b.write(kCorrect, b.at[kCorrected], p.stream);
    if (!StepBlock<S>::kInPlace && b.out[kPredict]) b.write(kPredict, b.own[kConverted + kPredict], p.stream);
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
  alignas(64) A unclamped[kStepBlock];
  over_step_blocks<S>(
      p, begin, end, noise, [&](StepBlock<S>& b, const StepTerms<A>& terms, int64_t sample, int64_t block) {
        const double* c = p.coefficients + (p.per_sample ? sample * kCoefficients : 0);
        const auto factor = [&](int row, int t) { return A(c[row * kTerms + t]); };
        const int64_t first = block % p.blocks_of_sample() * kStepBlock;
        const auto row_of = [&](const Samples& t) { return t.data ? (S*)t.data + sample * t.stride + first : nullptr; };
        double* sums = g.sums ? g.sums + block * kCoefficients : nullptr;
        sum_row<A>(terms, kConvert, b.at, b.count, unclamped, b.part(), false);
        clamp_block<A>(unclamped, b.own[kConverted], b.count, A(p.limit));
        b.at[kConverted] = b.own[kConverted];
        sum_row<A>(terms, kCorrect, b.at, b.count, b.own[kCorrected], b.part(), false);
        b.at[kCorrected] = b.own[kCorrected];
        for (int64_t i = 0; i < b.count; i += L) {
          const Tail tail{int(b.count - i < L ? b.count - i : L)};
          V<A> to[kRows];  // the gradients to what the rows made
          for (int r = 0; r < kRows; ++r) {
            const S* from = row_of(g.grad[r]);
            to[r] = from ? load_as<A>(from + i, tail) : V<A>{};
          }
          to[kCorrect] = to[kCorrect] + to[kPredict] * factor(kPredict, kCorrected);
          to[kConvert] = to[kConvert] + to[kPredict] * factor(kPredict, kConverted);
          to[kConvert] = to[kConvert] + to[kCorrect] * factor(kCorrect, kConverted);
          if (p.limit < __builtin_inf())
            to[kConvert] = select<A>(abs<A>(load(unclamped + i, tail)) <= A(p.limit), to[kConvert], V<A>{});
          for (int t = 0; t < kInputs; ++t) {
            S* into = row_of(g.to_in[t]);
            S* base = t == kOutput ? row_of(g.to_uncond) : nullptr;
            if (!into && !base) continue;
            V<A> sum = to[kConvert] * factor(kConvert, t) + to[kCorrect] * factor(kCorrect, t);
            sum = sum + to[kPredict] * factor(kPredict, t);
            if (into) store_as(into + i, t == kOutput && b.uncond ? sum * A(p.guidance) : sum, tail, false);
            if (base) store_as(base + i, sum * A(1 - p.guidance), tail, false);
          }
          if (S* into = row_of(g.to_noise)) store_as(into + i, to[kPredict] * factor(kPredict, kNoise), tail, false);
          if (!sums) continue;
          for (int t = 0; t < kTerms; ++t) {
            if (b.at[t] == nullptr) continue;
            const V<A> value = load(b.at[t] + i, tail);
            const V<A> finite = select<A>(abs<A>(value) < A(__builtin_inf()), value, V<A>{});
            for (int r = 0; r < kRows; ++r)
              if (t < kConverted + r || (r == kPredict && t == kNoise))
                add_lanes<A>(sums[r * kTerms + t], to[r] * (factor(r, t) == 0 ? finite : value), tail.count);
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
