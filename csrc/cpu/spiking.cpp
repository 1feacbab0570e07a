// Host side of the spiking family: check, allocate, bring every sequence into one walk, split it over the threads.
#include "spiking.h"

#include "../ops.h"
#include "parameters.h"

namespace fastcifar {
namespace {

// A sequence's layout as the kernels walk it: x's own where x is dense in any order of dimensions (contiguous,
// channels-last, batch before time, time last), else the dense layout that torch.empty_like gives.
struct Walk {
  Dims sizes, inner_sizes;
  Dims strides, state_strides;  // of outputs like x, and of the state
  int dtype;
  bool wide;  // the state is float64
  const char* op;

  Walk(const Tensor& x, const OptionalTensor& v, const char* name)
      : sizes(sizes_of(x)), dtype(dtype_index(x, name)), op(name) {
    FC_CHECK(!sizes.empty(), op, ": expected x of shape [T, N...], got a scalar");
    FC_CHECK(x.is_cpu(), op, ": expected a CPU tensor");
    wide = dtype == kFloat64 || (dtype == kFloat32 && v && v->scalar_type() == ScalarType::Double);
    inner_sizes.assign(sizes.begin() + 1, sizes.end());
    strides = x.is_contiguous() ? contiguous_strides(sizes) : strides_of(torch::stable::empty_like(x));
    state_strides = dense_strides(inner_sizes, Dims(strides.begin() + 1, strides.end()));
  }
  int64_t neurons() const {
    int64_t n = 1;
    for (int64_t size : inner_sizes) n *= size;
    return n;
  }
  bool same(const Tensor& t) const { return sizes_of(t) == sizes; }
  ScalarType state_dtype() const { return wide ? ScalarType::Double : ScalarType::Float; }
  int64_t state_bytes() const { return wide ? 8 : 4; }
  Tensor new_sequence(ScalarType scalar) const { return empty_strided(sizes, strides, scalar); }
  Tensor new_state() const { return empty_strided(inner_sizes, state_strides, state_dtype()); }
  Tensor none() const { return empty_strided({0}, {1}, state_dtype()); }
};

// State in the walk's memory order.
OptionalTensor state_input(const OptionalTensor& t, const Walk& walk, const char* name) {
  if (!t) return {};
  FC_CHECK(t->is_cpu() && t->scalar_type() == walk.state_dtype() && sizes_of(*t) == walk.inner_sizes, walk.op,
           ": expected ", name,
           " with x's shape without its first dimension, on the CPU, in float64 for float64 x and float32 otherwise");
  for (size_t d = 0; d < walk.inner_sizes.size(); ++d)
    if (walk.inner_sizes[d] > 1 && t->stride(d) != walk.state_strides[d]) return copy_as(*t, walk.state_strides);
  return t;
}

// Rows shorter than this waste most of a register's lanes, and a copy into longer rows pays.
constexpr int64_t kShortestRow = 64;

// Sequences that were given, brought into one walk: as they are where that is possible, copied where it is not.
struct Sequences {
  std::vector<Tensor> tensors;

  Sequences(const Walk& walk, std::vector<Tensor> given, NeuronProblem& p, const std::vector<Sequence*>& into,
            const std::vector<Sequence*>& outputs)
      : tensors(std::move(given)) {
    std::vector<Dims> strides{walk.strides};
    for (const Tensor& t : tensors) strides.push_back(strides_of(t));
    Panels panels, best;
    std::vector<PanelStrides> folded;
    fold(walk.sizes, {walk.strides}, best, folded);
    const bool folds = fold(walk.sizes, strides, panels, folded);
    if (!folds || (panels.neurons < kShortestRow && panels.neurons < best.neurons)) {
      for (size_t i = 0; i < tensors.size(); ++i)
        if (strides[i + 1] != walk.strides) tensors[i] = copy_as(tensors[i], strides[i + 1] = walk.strides);
      fold(walk.sizes, strides, panels, folded);
    }
    p.steps = walk.sizes[0];
    p.panels = panels.panels;
    p.neurons = panels.neurons;
    const auto sequence = [&](size_t i, void* data) {
      return Sequence{data, strides[i][0], folded[i].panel, folded[i].neuron};
    };
    for (size_t i = 0; i < tensors.size(); ++i) *into[i] = sequence(i + 1, tensors[i].data_ptr());
    for (Sequence* s : outputs) *s = sequence(0, nullptr);
  }
};

bool whole_bytes(const Walk& walk, const Tensor& x) {
  Panels panels;
  std::vector<PanelStrides> folded;
  return fold(walk.sizes, {walk.strides, strides_of(x)}, panels, folded) &&
         (panels.panels == 1 || panels.neurons % 8 == 0);
}

NeuronProblem problem(int64_t neuron, const std::vector<double>& numbers, const std::optional<double>& v_reset,
                      const Parameters& parameters, const Walk& walk) {
  FC_CHECK(neuron >= 0 && neuron < kNeurons, walk.op, ": unknown neuron ", neuron);
  FC_CHECK(numbers.size() >= 3 && numbers.size() <= 9, walk.op, ": expected 3 to 9 numbers");
  FC_CHECK(walk.wide == (walk.dtype == kFloat64) || neuron == kIF || neuron == kSignedIF, walk.op,
           ": expected v in float32, as this neuron keeps no float64 state of float32 currents");
  NeuronProblem p;
  p.neuron = int(neuron);
  p.storage = walk.dtype;
  for (size_t i = 3; i < numbers.size(); ++i) p.constants[i - 3] = numbers[i];
  p.hard_reset = v_reset.has_value();
  p.v_reset = v_reset.value_or(0);
  p.v_rest = neuron == kSignedIF ? 0.5 : p.v_reset;
  for (int i = 0; i < kParameters; ++i) p.parameters[i] = parameters.folded[i];
  for (int i = 0; i < 3; ++i) p.parameters[i].number = numbers[i];
  p.affine = p.parameters[kScale].data || p.parameters[kShift].data;
  p.parameters[kScale].number = 1;
  return p;
}

void run(NeuronKernel kernel, NeuronProblem& p, const Walk& walk, bool backward, const Tensor& out) {
  // Non-temporal stores need rows that start on a cache line in every step and panel.
  const int64_t bytes = out.element_size(), line = 64 / bytes;
  const auto aligned = [&](const Sequence& s) {
    return s.data == nullptr ||
           (s.neuron == 1 && (uintptr_t)s.data % 64 == 0 && s.step % line == 0 && s.panel % line == 0);
  };
  p.stream = out.numel() * bytes >= kStreamBytes && aligned(p.spikes) && aligned(p.grad_x) && aligned(p.v_seq);
  // Bytes are stored eight or sixteen at a time.
  if (p.spike_format == kSpikeBytes) p.stream = p.stream && p.spikes.step % 16 == 0 && p.spikes.panel % 16 == 0;
  const ScratchPlan plan(p, backward, walk.state_bytes());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.steps * std::min(p.block, p.neurons)));
  parallel_for(p.blocks(), grain, [&](int64_t begin, int64_t end) {
    const auto scratch = aligned_scratch(plan.bytes);
    kernel(p, begin, end, scratch.get());
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> neuron_forward(Tensor x, OptionalTensor v, OptionalTensor w,
                                                          OptionalTensor leak, OptionalTensor threshold,
                                                          OptionalTensor gain, OptionalTensor scale,
                                                          OptionalTensor shift, int64_t neuron,
                                                          std::vector<double> numbers, std::optional<double> v_reset,
                                                          int64_t spike_format, bool store_v_seq) {
  const Walk walk(x, v, "neuron_forward");
  FC_CHECK(spike_format >= 0 && spike_format < kSpikeFormats, walk.op, ": unknown format of spikes ", spike_format);
  const Parameters parameters({leak, threshold, gain, scale, shift}, walk.inner_sizes, walk.state_strides,
                              walk.state_dtype(), walk.op);
  NeuronProblem p = problem(neuron, numbers, v_reset, parameters, walk);
  FC_CHECK(spike_format != kSpikeBits || binary_spikes(p.neuron), walk.op, ": expected a neuron whose spikes are bits");
  const bool second = has_second_state(p.neuron);
  FC_CHECK(second || !w, walk.op, ": expected no w, as this neuron keeps one state");
  v = state_input(v, walk, "v");
  w = state_input(w, walk, "w");
  Tensor v_last = walk.new_state(), w_last = second ? walk.new_state() : walk.none();
  Tensor v_seq = store_v_seq ? walk.new_sequence(walk.state_dtype()) : walk.none();

  std::vector<Tensor> given{x};
  // Bits of two panels would share a byte unless panels are whole bytes: otherwise x is copied, time outermost.
  const int64_t step = walk.neurons();
  Walk whole = walk;
  if (spike_format == kSpikeBits && !whole_bytes(walk, x)) {
    whole.strides.assign(1, step);
    whole.strides.insert(whole.strides.end(), walk.state_strides.begin(), walk.state_strides.end());
    if (strides_of(x) != whole.strides) given[0] = copy_as(x, whole.strides);
    if (store_v_seq) v_seq = whole.new_sequence(walk.state_dtype());
  }
  const Sequences inputs(whole, std::move(given), p, {&p.x}, {&p.spikes, &p.v_seq});
  p.block = neuron_block(p.steps, walk.state_bytes());
  p.spike_format = int(spike_format);
  Tensor spikes = spike_format == kSpikeBits
                      ? empty_strided({walk.sizes[0], (step + 7) / 8}, {(step + 7) / 8, 1}, ScalarType::Byte)
                      : walk.new_sequence(spike_format == kSpikeBytes ? ScalarType::Byte : x.scalar_type());
  p.spikes.data = spikes.data_ptr();
  if (spike_format == kSpikeBits) p.spikes.step = (step + 7) / 8, p.spikes.neuron = 1;
  p.v_seq.data = store_v_seq ? v_seq.data_ptr() : nullptr;
  p.v = v ? v->data_ptr() : nullptr;
  p.w = second && w ? w->data_ptr() : nullptr;
  p.v_last = v_last.data_ptr();
  p.w_last = second ? w_last.data_ptr() : nullptr;
  run(spiking_kernels(checked_isa()).forward[walk.wide][p.neuron], p, walk, false, inputs.tensors[0]);
  if (store_v_seq && strides_of(v_seq) != walk.strides) v_seq = copy_as(v_seq, walk.strides);
  return {spikes, v_last, w_last, v_seq};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> neuron_backward(
    Tensor grad_spikes, OptionalTensor grad_v_last, OptionalTensor grad_w_last, OptionalTensor grad_v_seq, Tensor x,
    OptionalTensor v, OptionalTensor w, OptionalTensor leak, OptionalTensor threshold, OptionalTensor gain,
    OptionalTensor scale, OptionalTensor shift, int64_t neuron, std::vector<double> numbers,
    std::optional<double> v_reset, int64_t surrogate, std::vector<double> widths, bool detach_reset, int64_t wanted) {
  const Walk walk(x, v, "neuron_backward");
  FC_CHECK(grad_spikes.is_cpu() && walk.same(grad_spikes) && grad_spikes.scalar_type() == x.scalar_type(), walk.op,
           ": expected grad_spikes like x");
  FC_CHECK(!grad_v_seq ||
               (grad_v_seq->is_cpu() && walk.same(*grad_v_seq) && grad_v_seq->scalar_type() == walk.state_dtype()),
           walk.op, ": expected grad_v_seq with x's shape, in the state's dtype");
  FC_CHECK(surrogate >= 0 && surrogate < kSurrogates && widths.size() == 3, walk.op, ": unknown surrogate ", surrogate);
  const OptionalTensor given_parameters[kParameters] = {leak, threshold, gain, scale, shift};
  bool are_given = wanted >= 0 && wanted < 1 << kParameters;
  for (int i = 0; i < kParameters; ++i) are_given = are_given && (given_parameters[i] || !(wanted >> i & 1));
  FC_CHECK(are_given, walk.op, ": expected gradients to be wanted of parameters that are tensors, got ", wanted);
  Parameters parameters({leak, threshold, gain, scale, shift}, walk.inner_sizes, walk.state_strides, walk.state_dtype(),
                        walk.op);
  NeuronProblem p = problem(neuron, numbers, v_reset, parameters, walk);
  const bool second = has_second_state(p.neuron), need_grad_v = v.has_value(), need_grad_w = w.has_value();
  FC_CHECK(second || !w, walk.op, ": expected no w, as this neuron keeps one state");
  v = state_input(v, walk, "v");
  w = state_input(w, walk, "w");
  grad_v_last = state_input(grad_v_last, walk, "grad_v_last");
  grad_w_last = state_input(grad_w_last, walk, "grad_w_last");
  Tensor grad_x = walk.new_sequence(x.scalar_type());
  Tensor grad_v = need_grad_v ? walk.new_state() : walk.none();
  Tensor grad_w = need_grad_w ? walk.new_state() : walk.none();

  std::vector<Tensor> given{x, grad_spikes};
  std::vector<Sequence*> into{&p.x, &p.grad_spikes};
  if (grad_v_seq) given.push_back(*grad_v_seq), into.push_back(&p.grad_v_seq);
  const Sequences inputs(walk, std::move(given), p, into, {&p.grad_x});
  p.grad_x.data = grad_x.data_ptr();
  p.v = v ? v->data_ptr() : nullptr;
  p.w = second && w ? w->data_ptr() : nullptr;
  p.grad_v_last = grad_v_last ? grad_v_last->data_ptr() : nullptr;
  p.grad_w_last = second && grad_w_last ? grad_w_last->data_ptr() : nullptr;
  p.grad_v = need_grad_v ? grad_v.data_ptr() : nullptr;
  p.grad_w = second && need_grad_w ? grad_w.data_ptr() : nullptr;
  p.surrogate = int(surrogate);
  for (int i = 0; i < 3; ++i) p.widths[i] = widths[i];
  p.detach_reset = detach_reset;
  p.block = neuron_block(p.steps, walk.state_bytes());
  const auto partials = parameters.partials(p, wanted);
  run(spiking_kernels(checked_isa()).backward[walk.wide][p.neuron], p, walk, true, grad_x);
  return {grad_x, grad_v, grad_w, parameters.gradients(p, wanted, divides_by_leak(p.neuron))};
}

}  // namespace fastcifar
