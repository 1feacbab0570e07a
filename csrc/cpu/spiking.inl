// Spiking neurons over time, forward and backward, for every neuron of neurons.inl.
//
// Both passes are bound by memory, so each takes a block of neurons through all T steps while their state stays in the
// first-level cache. Per neuron and step the forward reads x and writes a spike (8 bytes in float32); the backward
// reads x and the spikes' gradient and writes x's gradient (12 bytes): it computes the membranes again from x instead
// of reading them, which costs a few operations and saves 4 bytes written and 4 read.
//
// Every operation is the reference's, in its order and without fused multiply-add, so that membranes and spikes are
// equal to it to the bit on every instruction set.
#pragma once
#include "neurons.inl"
#include "rows.inl"
#include "spiking.h"
#include "surrogates.inl"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

// The part of the problem that one block sees, and its rows in the thread's scratch memory.
template <class A>
struct Block {
  const NeuronProblem& p;
  const ScratchPlan plan;
  char* scratch;
  int64_t index, panel, offset, neurons, padded;  // neurons, and these rounded up to whole registers
  Constants<A> c;
  const ReadRow<A> read;

  Block(const NeuronProblem& problem, bool backward, void* memory)
      : p(problem),
        plan(problem, backward, sizeof(A)),
        scratch((char*)memory),
        read(RowTables<A>::read[problem.storage]) {
    Values<A>* const values[kParameters] = {&c.leak, &c.threshold, &c.gain, &c.scale, &c.shift};
    const int64_t length = p.neurons < p.block ? round_up(p.neurons) : p.block;
    const double leak = p.parameters[kLeak].number;
    c.times = divides_by_leak(p.neuron) && !p.parameters[kLeak].data && is_power_of_two(A(leak));
    for (int k = 0; k < (p.affine ? kParameters : kScale); ++k) {
      const Parameter& parameter = p.parameters[k];
      A *to = row(plan.parameters[k]), value = A(parameter.number);
      values[k]->at = to;
      if (parameter.data) value = *(const A*)parameter.data;
      if (k == kLeak && c.times) value = A(1) / value;
      if (!varies(parameter))
        for (int64_t i = 0; i < length; ++i) to[i] = value;
    }
    c.reset = A(p.v_reset);
    c.rest = p.hard_reset ? A(p.v_reset) : A(0);
    for (int k = 0; k < 6; ++k) {
      c.c[k] = A(p.constants[k]);
      c.exact[k] = is_power_of_two(c.c[k]);
      c.inverse[k] = A(1) / c.c[k];
    }
  }
  static bool varies(const Parameter& parameter) { return parameter.data && parameter.period > 1; }
  static int64_t round_up(int64_t n) { return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }
  void enter(int64_t block) {
    index = block;
    panel = index / p.blocks_per_panel();
    offset = (index - panel * p.blocks_per_panel()) * p.block;
    neurons = p.neurons - offset < p.block ? p.neurons - offset : p.block;
    padded = round_up(neurons);
    for (int k = 0; k < kParameters; ++k)
      if (varies(p.parameters[k])) load_parameter(p.parameters[k], row(plan.parameters[k]));
  }
  int64_t first() const { return panel * p.neurons + offset; }  // of the block's neurons, over all panels
  void load_parameter(const Parameter& parameter, A* to) const {
    const A* from = (const A*)parameter.data;
    int64_t entry = first() / parameter.inner % parameter.period;
    for (int64_t i = 0, left = parameter.inner - first() % parameter.inner; i < neurons; left = parameter.inner) {
      const int64_t end = neurons - i < left ? neurons : i + left;
      for (const A value = from[entry]; i < end; ++i) to[i] = value;
      if (++entry == parameter.period) entry = 0;
    }
  }
  A* row(int64_t at, int64_t t = 0) const { return (A*)(scratch + at) + t * p.block; }

  int64_t place(const Sequence& s, int64_t t) const { return t * s.step + panel * s.panel + offset * s.neuron; }
  char* memory(const Sequence& s, int64_t t, int64_t item) const { return (char*)s.data + place(s, t) * item; }
  int64_t item() const { return p.storage == kFloat64 ? 8 : p.storage == kFloat32 ? 4 : 2; }
  bool in_place(const Sequence& s) const { return s.neuron == 1 && padded == neurons; }

  // Step t of a sequence of the storage type as a row, read through `staged` where it cannot be read where it lies.
  const A* input(const Sequence& s, int64_t t, int64_t staged) const {
    if (in_place(s) && item() == sizeof(A)) return (const A*)memory(s, t, sizeof(A));
    read(memory(s, t, item()), s.neuron, row(staged), neurons);
    return row(staged);
  }
  const A* current(int64_t t) const {
    const A* x = input(p.x, t, plan.x);
    if (!p.affine) return x;
    A* to = row(plan.x);
    for (int64_t i = 0; i < padded; i += kLanes<A>)
      store(to + i, load(x + i, Full{}) * c.scale[i] + c.shift[i], Full{});
    return to;
  }
  // The same of the compute type; null where there is no such sequence.
  const A* state_input(const Sequence& s, int64_t t, int64_t staged) const {
    if (s.data == nullptr) return nullptr;
    if (in_place(s)) return (const A*)memory(s, t, sizeof(A));
    read_row<A, A>(memory(s, t, sizeof(A)), s.neuron, row(staged), neurons);
    return row(staged);
  }
  // Where a step's results go, and, if that is not their place, on their way there.
  A* output(const Sequence& s, int64_t t, int64_t staged, bool spikes) const {
    const bool direct = in_place(s) && item() == sizeof(A) && (spikes ? p.spike_format == kSpikesLikeX : !p.affine);
    return direct ? (A*)memory(s, t, sizeof(A)) : row(staged);
  }
  void deliver(const A* from, const Sequence& s, int64_t t, int64_t staged, WriteRow<A> write) const {
    if (from == row(staged)) write(from, memory(s, t, item()), s.neuron, neurons, p.stream);
  }
  A* state_output(const Sequence& s, int64_t t, int64_t staged) const {
    if (s.data == nullptr) return nullptr;
    return in_place(s) ? (A*)memory(s, t, sizeof(A)) : row(staged);
  }
  void deliver_state(const A* from, const Sequence& s, int64_t t, int64_t staged) const {
    if (from && from == row(staged)) write_row<A, A>(from, memory(s, t, sizeof(A)), s.neuron, neurons, p.stream);
  }
  void deliver_packed(A* spikes, int64_t t) const {
    if (p.spike_format == kSpikeBytes)
      return write_bytes<A>(spikes, (uint8_t*)memory(p.spikes, t, 1), p.spikes.neuron, neurons, p.stream);
    write_bits<A>(spikes, (uint8_t*)p.spikes.data + t * p.spikes.step + first() / 8, neurons);
  }

  void load_state(const void* from, double otherwise, A* to) const {
    const A* source = from ? (const A*)from + first() : nullptr;
    for (int64_t i = 0; i < neurons; ++i) to[i] = source ? source[i] : A(otherwise);
  }
  void store_state(const A* from, void* to) const {
    if (to) memcpy((A*)to + first(), from, sizeof(A) * neurons);
  }
};

// A row of n neurons, n a multiple of the lanes, through one step. Constants come by value, here and below: by
// reference, every store might change them for all the compiler knows, and it would load them again each time.
template <class M, bool kHard, class A>
void forward_row(const A* x, A* v, A* w, A* spikes, A* v_seq, int64_t n, bool stream, bool stream_v, Constants<A> c) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    prefetch_next_page(x + i);
    const V<A> w_before = M::kSecond ? load(w + i, Full{}) : V<A>{};
    V<A> w_next = w_before;
    const V<A> h = M::template charge<A>(c, i, load(x + i, Full{}), load(v + i, Full{}), w_next);
    const V<A> s = M::template fire<M, A>(c, i, h, w_before);
    const V<A> v_next = M::template after<kHard, A>(c, i, h, s);
    store(v + i, v_next, Full{});
    if constexpr (M::kSecond) store(w + i, M::template second<A>(c, w_next, s), Full{});
    store(spikes + i, M::template output<A>(c, i, s), Full{}, stream);
    if (v_seq) store(v_seq + i, v_next, Full{}, stream_v);
  }
}

template <class M, bool kHard, class A>
void forward_blocks(const NeuronProblem& p, int64_t begin, int64_t end, void* scratch) {
  Block<A> b(p, false, scratch);
  const WriteRow<A> write = (M::kBinary ? RowTables<A>::write_binary : RowTables<A>::write)[p.storage];
  A *v = b.row(b.plan.v), *w = b.row(b.plan.w);
  for (int64_t index = begin; index < end; ++index) {
    b.enter(index);
    b.load_state(p.v, p.v_rest, v);
    if constexpr (M::kSecond) b.load_state(p.w, p.w_rest, w);
    for (int64_t t = 0; t < p.steps; ++t) {
      A *spikes = b.output(p.spikes, t, b.plan.out, true), *v_seq = b.state_output(p.v_seq, t, b.plan.v_seq);
      forward_row<M, kHard, A>(b.current(t), v, w, spikes, v_seq, b.padded, p.stream && spikes != b.row(b.plan.out),
                               p.stream && v_seq != b.row(b.plan.v_seq), b.c);
      if (p.spike_format == kSpikesLikeX)
        b.deliver(spikes, p.spikes, t, b.plan.out, write);
      else
        b.deliver_packed(spikes, t);
      b.deliver_state(v_seq, p.v_seq, t, b.plan.v_seq);
    }
    b.store_state(v, p.v_last);
    if constexpr (M::kSecond) b.store_state(w, p.w_last);
  }
  stream_fence();
}

// Forward again, keeping what backward asks for instead of the spikes; previous may be null.
template <class M, bool kHard, class A>
void recompute_row(const A* x, A* v, A* w, A* charged, A* previous, A* previous_w, A* kept, int64_t n, Constants<A> c) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    prefetch_next_page(x + i);
    const V<A> v_before = load(v + i, Full{}), w_before = M::kSecond ? load(w + i, Full{}) : V<A>{};
    V<A> w_next = w_before;
    const V<A> h = M::template charge<A>(c, i, load(x + i, Full{}), v_before, w_next);
    const V<A> s = M::template fire<M, A>(c, i, h, w_before);
    store(charged + i, h, Full{});
    if (previous) store(previous + i, v_before, Full{});
    if constexpr (M::kKeeps) store(kept + i, M::template keep<M, A>(c, i, v_before, w_before), Full{});
    store(v + i, M::template after<kHard, A>(c, i, h, s), Full{});
    if constexpr (M::kSecond) {
      store(previous_w + i, w_before, Full{});
      store(w + i, M::template second<A>(c, w_next, s), Full{});
    }
  }
}

FC_INLINE void add_to(double* sums, V<double> term) { store(sums, load(sums, Full{}) + term, Full{}); }
FC_INLINE void add_to(double* sums, V<float> term) {  // each float in double, so that a sum over time does not round
  V<double> low = load(sums, Full{}), high = load(sums + kLanes<double>, Full{});
  add_halves(low, high, term);
  store(sums, low, Full{});
  store(sums + kLanes<double>, high, Full{});
}

// The rows of one step of backpropagation through time.
template <class A>
struct BackwardRows {
  const A *grad_spikes, *x, *current;  // the input, and what the neuron charges with: scale x + shift
  const A *grad_v_seq, *charged, *previous, *previous_w, *kept, *slope, *other_slope;
  A *carry, *carry_w;  // dL/dV and dL/dW: after the step on entry, before it on return
  A* grad_x;
  double* sums[kParameters];  // null where the gradient is not wanted
};

template <class M, bool kHard, bool kWanted, class A>
void backward_row(BackwardRows<A> r, int64_t n, bool stream, bool detach, Constants<A> c) {
  const I<A> through_reset = I<A>{} - (detach ? 0 : 1);
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    Before<A> before;
    before.h = load(r.charged + i, Full{});
    if (M::kCurved || kWanted) before.v = load(r.previous + i, Full{});
    if (M::kSecond) before.w = load(r.previous_w + i, Full{});
    if (M::kKeeps) before.kept = load(r.kept + i, Full{});
    if (kWanted) before.x = load(r.current + i, Full{});

    Gradient<A> g{};
    g.v = load(r.carry + i, Full{});
    if (r.grad_v_seq) g.v = g.v + load(r.grad_v_seq + i, Full{});
    if (M::kSecond) g.w = load(r.carry_w + i, Full{});
    prefetch_next_page(r.grad_spikes + i);
    const V<A> slope = M::kSloped ? load(r.slope + i, Full{}) : V<A>{};
    const V<A> other = M::kTwoSlopes ? load(r.other_slope + i, Full{}) : V<A>{};
    M::template fire_backward<M, kHard, A>(c, i, before, through_reset, load(r.grad_spikes + i, Full{}), slope, other,
                                           g);
    M::template charge_backward<A>(c, i, before, g);
    if constexpr (kWanted) {
      if (r.sums[kLeak]) add_to(r.sums[kLeak] + i, g.leak);
      if (r.sums[kThreshold]) add_to(r.sums[kThreshold] + i, g.threshold);
      if (r.sums[kGain]) add_to(r.sums[kGain] + i, g.gain);
      if (r.sums[kScale]) add_to(r.sums[kScale] + i, g.x * load(r.x + i, Full{}));
      if (r.sums[kShift]) add_to(r.sums[kShift] + i, g.x);
    }
    store(r.grad_x + i, g.x, Full{}, stream);
    store(r.carry + i, g.v, Full{});
    if (M::kSecond) store(r.carry_w + i, g.w, Full{});
  }
}

// The block's sums for each value of a parameter, in the order of the neurons.
static void reduce_sums(const Parameter& parameter, const double* sums, int64_t index, int64_t first, int64_t neurons) {
  double* out = parameter.partial + index * parameter.runs;
  if (parameter.period == 1) {
    double total = 0;
    for (int64_t i = 0; i < neurons; ++i) total += sums[i];
    out[0] = total;
    return;
  }
  for (int64_t i = 0, left = parameter.inner - first % parameter.inner; i < neurons; left = parameter.inner) {
    const int64_t end = neurons - i < left ? neurons : i + left;
    double total = 0;
    for (; i < end; ++i) total += sums[i];
    *out++ = total;
  }
}

template <class M, bool kHard, bool kWanted, class A>
void backward_blocks(const NeuronProblem& p, int64_t begin, int64_t end, void* scratch) {
  Block<A> b(p, true, scratch);
  const WriteRow<A> write = RowTables<A>::write[p.storage];
  const SurrogateRow<A> surrogate = surrogate_for<A>(p.surrogate);
  A *slope = b.row(b.plan.slope), *other = b.row(b.plan.other_slope);
  BackwardRows<A> r;
  r.slope = slope;
  r.other_slope = other;
  A *v = r.carry = b.row(b.plan.v), *w = r.carry_w = b.row(b.plan.w);
  for (int i = 0; i < kParameters; ++i)
    r.sums[i] = p.parameters[i].partial ? (double*)(b.scratch + b.plan.sums[i]) : nullptr;

  for (int64_t index = begin; index < end; ++index) {
    b.enter(index);
    b.load_state(p.v, p.v_rest, v);
    if constexpr (M::kSecond) b.load_state(p.w, p.w_rest, w);
    for (int64_t t = 0; t < p.steps; ++t)
      recompute_row<M, kHard, A>(b.current(t), v, w, b.row(b.plan.charged, t),
                                 M::kCurved || kWanted ? b.row(b.plan.previous, t) : nullptr,
                                 b.row(b.plan.previous_w, t), b.row(b.plan.kept, t), b.padded, b.c);
    b.load_state(p.grad_v_last, 0, v);
    if constexpr (M::kSecond) b.load_state(p.grad_w_last, 0, w);
    for (double* sums : r.sums)
      if (sums) memset(sums, 0, sizeof(double) * p.block);
    for (int64_t t = p.steps - 1; t >= 0; --t) {
      r.grad_spikes = b.input(p.grad_spikes, t, b.plan.grad_spikes);
      r.grad_v_seq = b.state_input(p.grad_v_seq, t, b.plan.grad_v_seq);
      r.charged = b.row(b.plan.charged, t);
      r.previous = b.row(b.plan.previous, t);
      r.previous_w = b.row(b.plan.previous_w, t);
      r.kept = b.row(b.plan.kept, t);
      r.grad_x = b.output(p.grad_x, t, b.plan.out, false);
      if constexpr (kWanted) {
        r.current = b.current(t);
        r.x = p.affine ? b.input(p.x, t, b.plan.raw_x) : r.current;
      }
      if constexpr (M::kTwoSlopes) {
        A* constant = b.row(b.plan.constant);
        for (int64_t i = 0; i < b.padded; ++i) constant[i] = 1;
        surrogate(r.charged, constant, slope, b.neurons, p.widths);
        for (int64_t i = 0; i < b.padded; ++i) constant[i] = 0;
        surrogate(constant, r.charged, other, b.neurons, p.widths);
      } else if constexpr (M::kSloped) {
        surrogate(r.charged, M::kOwnPotential ? b.row(b.plan.kept, t) : b.c.threshold.at, slope, b.neurons, p.widths);
      }
      backward_row<M, kHard, kWanted, A>(r, b.padded, p.stream && r.grad_x != b.row(b.plan.out), p.detach_reset, b.c);
      if (p.affine)
        for (int64_t i = 0; i < b.padded; i += kLanes<A>)
          store(r.grad_x + i, load(r.grad_x + i, Full{}) * b.c.scale[i], Full{});
      b.deliver(r.grad_x, p.grad_x, t, b.plan.out, write);
    }
    b.store_state(v, p.grad_v);
    if constexpr (M::kSecond) b.store_state(w, p.grad_w);
    for (int i = 0; i < kParameters; ++i)
      if (r.sums[i]) reduce_sums(p.parameters[i], r.sums[i], index, b.first(), b.neurons);
  }
  stream_fence();
}

template <int kNeuron, class A>
void neuron_forward(const NeuronProblem& p, int64_t begin, int64_t end, void* scratch) {
  using M = typename NeuronOf<kNeuron>::type;
  if constexpr (!soft_reset_only(kNeuron))
    if (p.hard_reset) return forward_blocks<M, true, A>(p, begin, end, scratch);
  forward_blocks<M, false, A>(p, begin, end, scratch);
}

template <int kNeuron, class A>
void neuron_backward(const NeuronProblem& p, int64_t begin, int64_t end, void* scratch) {
  using M = typename NeuronOf<kNeuron>::type;
  static_assert(M::kSecond == has_second_state(kNeuron) && M::kBinary == binary_spikes(kNeuron) &&
                M::kCurved == charge_is_curved(kNeuron) &&
                M::kKeeps == keeps_a_value(kNeuron));  // what spiking.h says of it
  const bool wanted = p.wants_parameters();
  if constexpr (!soft_reset_only(kNeuron))
    if (p.hard_reset)
      return (wanted ? backward_blocks<M, true, true, A> : backward_blocks<M, true, false, A>)(p, begin, end, scratch);
  (wanted ? backward_blocks<M, false, true, A> : backward_blocks<M, false, false, A>)(p, begin, end, scratch);
}

template <class A, int... kIds>
constexpr void fill(NeuronKernel (&forward)[kNeurons], NeuronKernel (&backward)[kNeurons]) {
  ((forward[kIds] = neuron_forward<kIds, A>), ...);
  ((backward[kIds] = neuron_backward<kIds, A>), ...);
}
template <class A>
constexpr void fill_all(NeuronKernel (&forward)[kNeurons], NeuronKernel (&backward)[kNeurons]) {
  fill<A, kIF, kLIF, kLIFDirect, kLIFTimes, kLIFTimesDirect, kQIF, kEIF, kIzhikevich, kCubaLIF, kKLIF, kKLIFDirect,
       kILIF, kALIF, kALIFDirect, kSignedIF, kLeakySubtract, kLeakyZero, kLeakyNone>(forward, backward);
}
constexpr SpikingKernels make_spiking_kernels() {
  SpikingKernels kernels = {};
  fill_all<float>(kernels.forward[0], kernels.backward[0]);
  fill_all<double>(kernels.forward[1], kernels.backward[1]);
  return kernels;
}

extern const SpikingKernels spiking_kernels;
constexpr SpikingKernels spiking_kernels = make_spiking_kernels();

}  // namespace fastcifar::FASTCIFAR_ISA
