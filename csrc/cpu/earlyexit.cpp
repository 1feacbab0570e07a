// Host side of exit decisions: checks, allocation, the split over torch's threads, and the joining of what each found.
#include "earlyexit.h"

#include "../ops.h"

namespace fastcifar {

namespace {

// An exponential takes about a nanosecond, and a row about ten whatever its classes.
constexpr int64_t kRowElements = 8;

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
  int64_t* const exits = (int64_t*)exit_index.data_ptr();
  int64_t* const keeps = (int64_t*)keep_index.data_ptr();
  int64_t& kept = *(int64_t*)n_keep.data_ptr();

  // Chunks of some twenty microseconds; their lists are joined afterwards, each in its place.
  const auto decide = exit_kernels(checked_isa()).decide[dtype];
  const int64_t each = std::max<int64_t>(1, kGrain / (p.classes + kRowElements) / kExitRows) * kExitRows;
  const int64_t chunks = (p.rows + each - 1) / each;
  Dims before(chunks + 1, 0);  // how many are kept before a chunk
  std::vector<int64_t> lists(2 * p.rows);
  p.keeps = lists.data();
  p.exits = lists.data() + p.rows;
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) before[c + 1] = decide(p, c * each, std::min((c + 1) * each, p.rows));
  });
  for (int64_t c = 0; c < chunks; ++c) before[c + 1] += before[c];
  kept = before[chunks];
  const auto place = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * each, rows = std::min(first + each, p.rows) - first;
      const int64_t staying = before[c + 1] - before[c], leaving = rows - staying;
      const int64_t left = first - before[c];  // how many leave before this chunk
      std::copy_n(p.keeps + first, staying, keeps + before[c]);
      std::copy_n(p.keeps + first, staying, exits + (p.rows - kept) + before[c]);
      std::copy_n(p.exits + first, leaving, exits + left);
      std::copy_n(p.exits + first, leaving, keeps + kept + left);
    }
  };
  parallel_for(chunks, std::max<int64_t>(1, kGrain / each), place);
  return {score, prediction, exit_index, keep_index, n_keep};
}

}  // namespace fastcifar
