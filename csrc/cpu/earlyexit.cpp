// Host side of exit decisions: checks, allocation, the split over torch's threads, and the joining of what each found.
#include "earlyexit.h"

#include <cstring>

#include "../ops.h"

namespace fastcifar {

namespace {

// An exponential takes about a nanosecond, and a row about ten whatever its classes.
constexpr int64_t kRowElements = 8;
// So many of them are worth a thread: ten microseconds.
constexpr int64_t kChunk = kGrain / 2;

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

namespace {

// A row of a tensor whose rows are dense, in whatever order of their dimensions.
struct Rows {
  char* data;
  int64_t bytes, stride;  // of a row, and from a row to the next
};

// A thread is worth waking for this many bytes.
constexpr int64_t kCopyBytes = 128 << 10;

Rows rows_of(const char* op, const Tensor& t, int64_t rows) {
  FC_CHECK(t.is_cpu() && t.dim() >= 1 && t.size(0) == rows, op, ": expected tensors of as many rows on the CPU");
  const Dims sizes = sizes_of(t), strides = strides_of(t);
  Dims order;
  for (int64_t d = 1; d < t.dim(); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t elements = 1;
  for (const int64_t d : order) {
    FC_CHECK(strides[d] == elements || t.numel() == 0, op, ": expected rows without gaps");
    elements *= sizes[d];
  }
  const int64_t item = t.element_size();
  return {(char*)t.data_ptr(), elements * item, strides[0] * item};
}

// The rows to take, checked against how many there are.
const int64_t* checked_index(const char* op, const Tensor& index, int64_t rows) {
  FC_CHECK(index.is_cpu() && index.dim() == 1 && index.scalar_type() == ScalarType::Long && index.is_contiguous(), op,
           ": expected index [n], int64, contiguous, on the CPU");
  const int64_t* const at = (const int64_t*)index.data_ptr();
  for (int64_t i = 0; i < index.size(0); ++i)
    FC_CHECK(at[i] >= 0 && at[i] < rows, op, ": expected rows below ", rows, ", got row ", at[i]);
  return at;
}

}  // namespace

std::vector<Tensor> take_rows(std::vector<Tensor> tensors, Tensor index) {
  const char* const op = "take_rows";
  if (tensors.empty()) return {};
  FC_CHECK(tensors[0].dim() >= 1, op, ": expected tensors with rows");
  const int64_t all = tensors[0].size(0);
  const int64_t* const at = checked_index(op, index, all);
  const int64_t taken = index.size(0);
  std::vector<Tensor> results;
  std::vector<Rows> from, to;
  int64_t bytes = 1;
  for (const Tensor& t : tensors) {
    from.push_back(rows_of(op, t, all));
    const int64_t row = from.back().bytes;
    Dims sizes = sizes_of(t), strides = strides_of(t);
    sizes[0] = taken;
    strides[0] = row / int64_t(t.element_size());
    results.push_back(empty_strided(sizes, strides, t.scalar_type()));
    to.push_back({(char*)results.back().data_ptr(), row, row});
    bytes += row;
  }
  parallel_for(taken, std::max<int64_t>(1, kCopyBytes / bytes), [&](int64_t begin, int64_t end) {
    for (size_t t = 0; t < to.size(); ++t)
      for (int64_t i = begin; i < end && to[t].bytes > 0; ++i)
        std::memcpy(to[t].data + i * to[t].stride, from[t].data + at[i] * from[t].stride, to[t].bytes);
  });
  return results;
}

void move_rows(std::vector<Tensor> tensors, Tensor index) {
  const char* const op = "move_rows";
  if (tensors.empty()) return;
  FC_CHECK(tensors[0].dim() >= 1, op, ": expected tensors with rows");
  const int64_t all = tensors[0].size(0);
  const int64_t* const at = checked_index(op, index, all);
  const int64_t taken = index.size(0);
  for (int64_t i = 1; i < taken; ++i) FC_CHECK(at[i] > at[i - 1], op, ": expected rows in ascending order");
  // A row moves to where none lies that is still to move. Threads take a part of every row each: rows would have to
  // wait for one another.
  struct Part {
    char* data;
    int64_t bytes, stride;
  };
  std::vector<Part> parts;
  const int64_t piece = std::max<int64_t>(4096, kCopyBytes / std::max<int64_t>(1, taken));
  for (const Tensor& t : tensors) {
    const Rows r = rows_of(op, t, all);
    FC_CHECK(r.stride >= r.bytes || all <= 1, op, ": expected rows that do not overlap");
    for (int64_t b = 0; b < r.bytes; b += piece) parts.push_back({r.data + b, std::min(piece, r.bytes - b), r.stride});
  }
  parallel_for(parts.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t i = 0; i < taken; ++i)
        if (at[i] != i)
          std::memcpy(parts[k].data + i * parts[k].stride, parts[k].data + at[i] * parts[k].stride, parts[k].bytes);
  });
}

}  // namespace fastcifar
