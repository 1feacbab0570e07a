// Host side of exit decisions: checks, allocation, the split over torch's threads, and the joining of what each found.
#include "earlyexit.h"

#include <cstring>

#include "../ops.h"

namespace fastcifar {

namespace {

// A row takes as long as some twenty exponentials, whatever its classes.
constexpr int64_t kRowElements = 20;
// So many exponentials are worth a thread: ten microseconds with AVX-512, twenty with AVX2.
constexpr int64_t kChunk = kGrain;

Tensor vector_of(int64_t n, ScalarType dtype) { return empty_strided({n}, {1}, dtype); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> exit_decide(Tensor logits, OptionalTensor thresholds,
                                                               double threshold, int64_t criterion, double temperature,
                                                               bool strict) {
  const char* const op = "exit_decide";
  const int dtype = dtype_index(logits, op);
  FC_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) < (int64_t(1) << 31), op,
           ": expected logits [B, K] on the CPU, K at least 1");
  FC_CHECK(criterion >= 0 && criterion < kCriteria && temperature > 0, op, ": expected a criterion and a temperature");
  ExitProblem p;
  p.rows = logits.size(0);
  p.classes = logits.size(1);
  FC_CHECK(!thresholds ||
               (thresholds->is_cpu() && thresholds->dim() == 1 && thresholds->scalar_type() == ScalarType::Float &&
                (thresholds->size(0) == 1 || thresholds->size(0) == p.rows)),
           op, ": expected thresholds [1] or [B], float32");
  if (p.classes > 1 && logits.stride(1) != 1) logits = copy_as(logits, contiguous_strides(sizes_of(logits)));
  p.row_stride = logits.stride(0);
  p.logits = logits.data_ptr();
  p.threshold = float(threshold);
  if (thresholds && thresholds->size(0) == 1) {
    p.threshold = *(const float*)thresholds->data_ptr();
  } else if (thresholds) {
    if (thresholds->stride(0) != 1) thresholds = copy_as(*thresholds, {1});
    p.thresholds = (const float*)thresholds->data_ptr();
  }
  p.temperature = temperature;
  p.criterion = int(criterion);
  p.strict = strict;

  Tensor score = vector_of(p.rows, ScalarType::Float), prediction = vector_of(p.rows, ScalarType::Long);
  Tensor exit_index = vector_of(p.rows, ScalarType::Long), keep_index = vector_of(p.rows, ScalarType::Long);
  Tensor n_keep = empty_strided({}, {}, ScalarType::Long);
  p.score = (float*)score.data_ptr();
  p.prediction = (int64_t*)prediction.data_ptr();
  p.exits = (int64_t*)exit_index.data_ptr();
  p.keeps = (int64_t*)keep_index.data_ptr();

  // Each chunk writes its lists from its own place on; then they close up, which moves entries down only.
  const auto decide = exit_kernels(checked_isa()).decide[dtype];
  const int64_t work = p.classes + kRowElements;
  const int64_t each = std::clamp<int64_t>(kChunk / work / kExitRows, 1, 16) * kExitRows;
  const int64_t chunks = (p.rows + each - 1) / each;
  Dims kept_of(chunks);
  parallel_for(chunks, std::max<int64_t>(1, kChunk / (each * work)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) kept_of[c] = decide(p, c * each, std::min((c + 1) * each, p.rows));
  });
  int64_t kept = 0, left = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = c * each, leaving = std::min(each, p.rows - first) - kept_of[c];
    std::memmove(p.keeps + kept, p.keeps + first, kept_of[c] * sizeof(int64_t));
    std::memmove(p.exits + left, p.exits + first, leaving * sizeof(int64_t));
    kept += kept_of[c];
    left += leaving;
  }
  std::copy_n(p.exits, left, p.keeps + kept);
  std::copy_n(p.keeps, kept, p.exits + left);
  *(int64_t*)n_keep.data_ptr() = kept;
  return {score, prediction, exit_index, keep_index, n_keep};
}

}  // namespace fastcifar
