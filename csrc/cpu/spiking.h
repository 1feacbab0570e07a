// Raw kernels of the spiking family: pointers and strides, no torch type. Sequences are [T, panels, neurons] with the
// neurons of a panel dense in memory; per-neuron arrays (the state) are [panels, neurons], dense.
#pragma once
#include "types.h"

namespace fastcifar {

enum SurrogateId : int { kATan = 0, kSigmoid = 1, kPiecewiseQuadratic = 2, kRectangular = 3, kSurrogates = 4 };

struct Sequence {
  void* data = nullptr;
  int64_t step = 0;   // elements from one time step to the next (0 where a gradient is expanded over time)
  int64_t panel = 0;  // elements from one panel to the next
};

struct LifProblem {
  int64_t steps = 0, panels = 0, neurons = 0;
  int64_t block = 0;  // neurons that one unit of work takes through all steps; see lif_block
  // Sequences hold the storage type, except v_seq and grad_v_seq, which hold the compute type like all state.
  Sequence x, spikes, v_seq, grad_spikes, grad_v_seq, grad_x;
  const void *v = nullptr, *grad_v_last = nullptr;  // null: at rest, zero
  void *v_last = nullptr, *grad_v = nullptr;        // grad_v may be null
  double tau = 2, v_threshold = 1, v_reset = 0, alpha = 2;
  bool decay_input = true, hard_reset = true, detach_reset = false;
  int surrogate = kATan;
  bool stream = false;  // write sequences with non-temporal stores

  int64_t blocks_per_panel() const { return (neurons + block - 1) / block; }
  int64_t blocks() const { return panels * blocks_per_panel(); }
};

// Neurons of a block whose membranes over all steps (backward) stay in the first-level cache, a multiple of every lane
// count; where T is so long that they cannot, still enough for whole cache lines.
inline int64_t lif_block(int64_t steps, int64_t compute_bytes) {
  constexpr int64_t kBudget = 24 * 1024, kSmallest = 64, kLargest = 512;
  const int64_t fit = kBudget / (compute_bytes * (steps + 1)) / kSmallest * kSmallest;
  return fit < kSmallest ? kSmallest : fit > kLargest ? kLargest : fit;
}

// A kernel works on blocks [begin, end); scratch holds (steps + 1) * block compute-type elements, 64-byte aligned
// (the forward needs `block` of them only).
using LifKernel = void (*)(const LifProblem&, int64_t begin, int64_t end, void* scratch);

struct SpikingKernels {
  LifKernel lif_forward[kDTypes];
  LifKernel lif_backward[kDTypes];
};

}  // namespace fastcifar
