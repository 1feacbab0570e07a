// Raw kernels of the spiking family: pointers and strides, no torch type. Sequences are [T, panels, neurons];
// per-neuron arrays (the state) are [panels, neurons], dense.
#pragma once
#include "types.h"

namespace fastcifar {

// Names and numbers of each neuron: fastcifar/spiking/neurons.py. "Times" takes 1 / tau, of tau that is a power of two
// or as PLIF's parameter; "Direct" does not divide the input by tau.
enum NeuronId : int {
  kIF,
  kLIF,
  kLIFDirect,
  kLIFTimes,
  kLIFTimesDirect,
  kQIF,
  kEIF,
  kIzhikevich,
  kCubaLIF,
  kKLIF,
  kKLIFDirect,
  kILIF,
  kALIF,
  kALIFDirect,
  kSignedIF,
  kLeakySubtract,
  kLeakyZero,
  kLeakyNone,
  kNeurons
};

// fastcifar/spiking/surrogate.py
enum SurrogateId : int {
  kATan,
  kSigmoid,
  kTriangle,
  kTwoLevel,
  kExponential,
  kInverseSquare,
  kGaussian,
  kInverse,
  kOneSided,
  kS2NN,
  kQPseudoSpike,
  kFourier,
  kLogTailed,
  kFakeNumerical,
  kSparse,
  kSurrogates
};

enum SpikeFormat : int { kSpikesLikeX, kSpikeBytes, kSpikeBits, kSpikeFormats };

struct Sequence {
  void* data = nullptr;
  int64_t step = 0;    // elements from one time step to the next (0 where a gradient is expanded over time)
  int64_t panel = 0;   // elements from one panel to the next
  int64_t neuron = 1;  // elements from one neuron to the next
};

// What a neuron is given one of, or one of a channel, or one of its own: neuron n, counted over all panels, takes
// data[n / inner % period], of the compute type, or `number` where data is null.
enum ParameterId : int { kLeak, kThreshold, kGain, kScale, kShift, kParameters };
struct Parameter {
  const void* data = nullptr;
  int64_t inner = 1, period = 1;
  double number = 0;
  // Backward, where the gradient is wanted: each block's sums over time and over the neurons that share a value,
  // [blocks, runs], in the order of the neurons.
  double* partial = nullptr;
  int64_t runs = 0;
};

struct NeuronProblem {
  int neuron = kLIF;
  int storage = kFloat32;  // DType of x, spikes and their gradients
  int64_t steps = 0, panels = 0, neurons = 0;
  int64_t block = 0;  // neurons that one unit of work takes through all steps; see ScratchPlan
  // Sequences hold the storage type, except v_seq and grad_v_seq, which hold the compute type like all state, and
  // spikes in another format. What is neither of the compute type nor of whole registers side by side goes through rows
  // of scratch memory.
  Sequence x, spikes, v_seq, grad_spikes, grad_v_seq, grad_x;
  const void *v = nullptr, *w = nullptr, *grad_v_last = nullptr, *grad_w_last = nullptr;  // null: at rest, zero
  void *v_last = nullptr, *w_last = nullptr, *grad_v = nullptr, *grad_w = nullptr;        // may be null
  Parameter parameters[kParameters];
  double constants[6] = {};
  double v_rest = 0, w_rest = 0;  // where the state starts if it is not given
  double v_reset = 0;
  bool hard_reset = true, detach_reset = false, affine = false;
  int surrogate = kATan;
  double widths[3] = {};
  int spike_format = kSpikesLikeX;
  bool stream = false;  // write sequences with non-temporal stores

  int64_t blocks_per_panel() const { return (neurons + block - 1) / block; }
  int64_t blocks() const { return panels * blocks_per_panel(); }
  bool wants_parameters() const {
    for (const Parameter& parameter : parameters)
      if (parameter.partial) return true;
    return false;
  }
};

constexpr bool has_second_state(int neuron) {
  return neuron == kIzhikevich || neuron == kCubaLIF || neuron == kALIF || neuron == kALIFDirect || neuron == kSignedIF;
}
constexpr bool soft_reset_only(int neuron) {
  return neuron == kILIF || neuron == kSignedIF || neuron >= kLeakySubtract;
}
constexpr bool binary_spikes(int neuron) { return neuron != kILIF && neuron != kSignedIF; }
// Whether its leak is a time constant, by which it divides.
constexpr bool divides_by_leak(int neuron) {
  return neuron == kLIF || neuron == kLIFDirect || neuron == kQIF || neuron == kEIF || neuron == kIzhikevich ||
         neuron == kKLIF || neuron == kKLIFDirect || neuron == kALIF || neuron == kALIFDirect;
}
// Whether backward needs the state before each charge, even where no parameter takes a gradient.
constexpr bool charge_is_curved(int neuron) { return neuron == kQIF || neuron == kIzhikevich || neuron == kLeakyZero; }
// Whether it keeps a value of its own from recomputation.
constexpr bool keeps_a_value(int neuron) { return neuron == kEIF || neuron == kALIF || neuron == kALIFDirect; }

// Where a block's rows lie in a thread's scratch memory, in bytes; every row has `block` elements.
struct ScratchPlan {
  int64_t v, w, parameters[kParameters], x, out, v_seq;  // a row each
  int64_t charged, previous, previous_w, kept;           // backward: a row a step
  int64_t slope, other_slope, grad_spikes, grad_v_seq;   // backward: a row each
  int64_t raw_x, constant;                               // backward: a row each, x before scale and shift
  int64_t sums[kParameters];                             // backward: a row of doubles each
  int64_t bytes = 0;

  ScratchPlan(const NeuronProblem& p, bool backward, int64_t compute_bytes) {
    const auto take = [&](bool wanted, int64_t rows, int64_t item) {
      const int64_t at = bytes;
      if (wanted) bytes += (rows * p.block * item + 63) / 64 * 64;
      return at;
    };
    const int64_t rows = p.steps, A = compute_bytes;
    const bool second = has_second_state(p.neuron), wanted = p.wants_parameters();
    v = take(true, 1, A);
    w = take(second, 1, A);
    for (int i = 0; i < kParameters; ++i) parameters[i] = take(i < kScale || p.affine, 1, A);
    x = take(true, 1, A);
    out = take(true, 1, A);
    v_seq = take(p.v_seq.data, 1, A);
    charged = take(backward, rows, A);
    previous = take(backward && (wanted || charge_is_curved(p.neuron)), rows, A);
    previous_w = take(backward && second, rows, A);
    kept = take(backward && keeps_a_value(p.neuron), rows, A);
    slope = take(backward, 1, A);
    other_slope = take(backward && p.neuron == kSignedIF, 1, A);
    constant = take(backward && p.neuron == kSignedIF, 1, A);
    grad_spikes = take(backward, 1, A);
    grad_v_seq = take(p.grad_v_seq.data, 1, A);
    raw_x = take(backward && p.affine, 1, A);
    for (int i = 0; i < kParameters; ++i) sums[i] = take(p.parameters[i].partial, 1, 8);
  }
};

// Neurons of a block whose membranes over all steps stay in the first-level cache, a multiple of every lane count;
// where T is so long that they cannot, still enough for whole cache lines. Neurons that keep more than their membrane
// have the same blocks, and their further rows in the second-level cache: shorter rows of x cost more than that.
inline int64_t neuron_block(int64_t steps, int64_t compute_bytes) {
  constexpr int64_t kBudget = 40 * 1024, kSmallest = 64, kLargest = 512;
  const int64_t fit = kBudget / (compute_bytes * (steps + 1)) / kSmallest * kSmallest;
  return fit < kSmallest ? kSmallest : fit > kLargest ? kLargest : fit;
}

// A kernel works on blocks [begin, end); scratch is laid out by ScratchPlan and 64-byte aligned.
using NeuronKernel = void (*)(const NeuronProblem&, int64_t begin, int64_t end, void* scratch);

// By compute type: float, double. The storage types of float are float32, bfloat16 and float16, those of double float64
// and, for a membrane that has to be exact, float32.
struct SpikingKernels {
  NeuronKernel forward[2][kNeurons];
  NeuronKernel backward[2][kNeurons];
};

}  // namespace fastcifar
