// Raw kernels of diffusion samplers: one step of a linear solver, its backward pass, normal random numbers that are
// counted, and the quantile of dynamic thresholding.
#pragma once
#include <stdint.h>

#include "types.h"

namespace fastcifar {

// TERMS of fastcifar/diffusion/reference.py.
constexpr int kX = 0, kOutput = 1, kHistory = 2, kConverted = 8, kCorrected = 9, kNoise = 10, kTerms = 11;
constexpr int kConvert = 0, kCorrect = 1, kPredict = 2, kRows = 3;
constexpr int kInputs = kConverted;  // x, output, and six kept tensors
constexpr int kCoefficients = kRows * kTerms;

// Elements that are taken through a step together, of one sample: small enough for what it makes to stay in the cache.
constexpr int64_t kStepBlock = 1024;
// Random numbers come by as many at once: sixteen counters of four words.
constexpr int64_t kNormalBlock = 64;

// A tensor of samples, each of which is adjacent in memory.
struct Samples {
  void* data = nullptr;
  int64_t stride = 0;  // from one sample to the next, elements
};

struct StepProblem {
  int64_t samples = 1, length = 0;  // of each
  Samples in[kInputs], uncond, noise;
  Samples out[kRows];  // converted, corrected, next x; data is null where one is not wanted
  const double* coefficients = nullptr;
  bool per_sample = false;         // kCoefficients for each sample, else for all
  bool all_rows = false;           // also those that no result and no later row needs
  double guidance = 1, limit = 0;  // an infinite limit is none
  bool draws = false;              // noise by counter, from `seed` and `step`
  uint64_t seed = 0, step = 0;
  bool stream = false;

  int64_t blocks_of_sample() const { return (length + kStepBlock - 1) / kStepBlock; }
  int64_t blocks() const { return samples * blocks_of_sample(); }
};

// Backward: what is wanted of which input, and the sums for the coefficients.
struct StepGradients {
  Samples grad[kRows];  // of the results, in the order of the rows; data is null where there is none
  Samples to_in[kInputs], to_uncond, to_noise;  // data is null where not wanted
  double* sums = nullptr;                       // kCoefficients for each block, or null
};

struct DiffusionKernels {
  void (*step[kDTypes])(const StepProblem&, int64_t begin, int64_t end, float* noise);
  void (*backward[kDTypes])(const StepProblem&, const StepGradients&, int64_t begin, int64_t end, float* noise);
  // Numbers [first, first + count) of a stream; first and count are multiples of kNormalBlock.
  void (*normal)(uint64_t seed, uint64_t step, int64_t first, int64_t count, float* out);
};

}  // namespace fastcifar
