// Raw kernel of exit decisions: the softmax statistics of rows of logits, their comparison with a threshold, and the
// two lists of rows that follow from it.
#pragma once
#include <stdint.h>

#include "types.h"

namespace fastcifar {

// CRITERIA of fastcifar/earlyexit/reference.py.
enum Criterion : int { kConfidence = 0, kEntropy = 1, kMargin = 2, kEnergy = 3, kCriteria = 4 };

// Up to this many classes, rows lie in the lanes of a register; of more, classes do.
constexpr int64_t kFewClasses = 32;
// Rows that are decided together. Chunks of rows begin at multiples of it.
constexpr int64_t kExitRows = 32;

struct ExitProblem {
  const void* logits = nullptr;  // [rows, classes], classes adjacent
  int64_t rows = 0, classes = 1, row_stride = 1;
  const float* thresholds = nullptr;  // one a row, or null
  float threshold = 0;                // else
  double temperature = 1;
  int criterion = kConfidence;
  bool strict = false;
  float* score = nullptr;         // [rows]
  int64_t* prediction = nullptr;  // [rows]
  int64_t* exits = nullptr;       // [rows]: those of a chunk from the chunk's first row on
  int64_t* keeps = nullptr;       // [rows]: the same
};

struct ExitKernels {
  // Decides rows [begin, end), writes exits[begin...] and keeps[begin...], and returns how many it keeps.
  int64_t (*decide[kDTypes])(const ExitProblem&, int64_t begin, int64_t end);
};

}  // namespace fastcifar
