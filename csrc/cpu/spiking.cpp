// Host side of the spiking family: check, allocate, bring every sequence into one walk, split it over the threads.
#include "spiking.h"

#include "../ops.h"

namespace fastcifar {
namespace {

// A sequence's layout as the kernels walk it: x's own where x is dense in any order of dimensions (contiguous,
// channels-last, batch before time), else the dense layout that torch.empty_like gives.
struct Walk {
  Dims sizes, inner_sizes;
  Dims strides, state_strides;  // of outputs like x, and of the state
  int dtype;
  bool time_innermost;

  Walk(const Tensor& x, const char* op) : sizes(sizes_of(x)), dtype(dtype_index(x, op)) {
    FC_CHECK(!sizes.empty(), op, ": expected x of shape [T, N...], got a scalar");
    FC_CHECK(x.is_cpu(), op, ": expected a CPU tensor");
    inner_sizes.assign(sizes.begin() + 1, sizes.end());
    if (x.is_contiguous()) {
      strides = contiguous_strides(sizes);
      state_strides = contiguous_strides(inner_sizes);
      time_innermost = false;
      return;
    }
    strides = strides_of(torch::stable::empty_like(x));
    state_strides = dense_strides(inner_sizes, Dims(strides.begin() + 1, strides.end()));
    time_innermost = sizes[0] > 1 && strides[0] == 1;
  }

  // Kernels run along neurons, so a sequence whose time is innermost is walked through a copy with time outermost.
  Dims walk_strides() const {
    if (!time_innermost) return strides;
    Dims outermost{1};
    for (int64_t size : inner_sizes) outermost[0] *= std::max<int64_t>(size, 1);
    outermost.insert(outermost.end(), state_strides.begin(), state_strides.end());
    return outermost;
  }
  bool same(const Tensor& t) const { return sizes_of(t) == sizes; }
  ScalarType state_dtype() const { return compute_dtype(dtype); }
  Tensor new_sequence(ScalarType scalar) const { return empty_strided(sizes, walk_strides(), scalar); }
  Tensor new_state() const { return empty_strided(inner_sizes, state_strides, state_dtype()); }
  Tensor none(ScalarType scalar) const { return empty_strided({0}, {1}, scalar); }
  // What a caller sees: a result that was walked in another layout goes back to x's own.
  Tensor result(const Tensor& t) const { return time_innermost ? copy_as(t, strides) : t; }
};

// State in the walk's memory order.
OptionalTensor state_input(const OptionalTensor& t, const Walk& walk, const char* op, const char* name) {
  if (!t) return {};
  FC_CHECK(t->is_cpu() && t->scalar_type() == walk.state_dtype() && sizes_of(*t) == walk.inner_sizes, op, ": expected ",
           name,
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
  Panels panels;

  Sequences(const Walk& walk, std::vector<Tensor> given, LifProblem& p, const std::vector<Sequence*>& into,
            const std::vector<Sequence*>& outputs)
      : tensors(std::move(given)) {
    const Dims out = walk.walk_strides();
    std::vector<Dims> strides{out};
    for (const Tensor& t : tensors) strides.push_back(strides_of(t));
    Dims panel_strides, unused;
    Panels best;
    fold(walk.sizes, {out}, best, unused);
    const bool folds = fold(walk.sizes, strides, panels, panel_strides);
    if (!folds || (panels.neurons < kShortestRow && panels.neurons < best.neurons)) {
      for (size_t i = 0; i < tensors.size(); ++i)
        if (strides[i + 1] != out) tensors[i] = copy_as(tensors[i], strides[i + 1] = out);
      fold(walk.sizes, strides, panels, panel_strides);
    }
    p.steps = walk.sizes[0];
    p.panels = panels.panels;
    p.neurons = panels.neurons;
    p.block = lif_block(p.steps, compute_bytes(walk.dtype));
    for (size_t i = 0; i < tensors.size(); ++i)
      *into[i] = {tensors[i].data_ptr(), strides[i + 1][0], panel_strides[i + 1]};
    for (Sequence* s : outputs) s->step = out[0], s->panel = panel_strides[0];
  }
};

LifProblem options(double tau, bool decay_input, double v_threshold, const std::optional<double>& v_reset) {
  LifProblem p;
  p.tau = tau;
  p.decay_input = decay_input;
  p.v_threshold = v_threshold;
  p.hard_reset = v_reset.has_value();
  p.v_reset = v_reset.value_or(0);
  return p;
}

void run(LifKernel kernel, LifProblem& p, const Walk& walk, int64_t scratch_rows, const Tensor& out) {
  // Non-temporal stores need rows that start on a cache line in every step and panel.
  const int64_t bytes = out.element_size(), line = 64 / bytes;
  const auto aligned = [&](const Sequence& s) {
    return s.data == nullptr || ((uintptr_t)s.data % 64 == 0 && s.step % line == 0 && s.panel % line == 0);
  };
  p.stream = out.numel() * bytes >= kStreamBytes && aligned(p.spikes) && aligned(p.grad_x) && aligned(p.v_seq);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.steps * std::min(p.block, p.neurons)));
  parallel_for(p.blocks(), grain, [&](int64_t begin, int64_t end) {
    const auto scratch = aligned_scratch(scratch_rows * p.block * compute_bytes(walk.dtype));
    kernel(p, begin, end, scratch.get());
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lif_forward(Tensor x, OptionalTensor v, double tau, bool decay_input,
                                               double v_threshold, std::optional<double> v_reset, bool store_v_seq) {
  const Walk walk(x, "lif_forward");
  v = state_input(v, walk, "lif_forward", "v");
  Tensor spikes = walk.new_sequence(x.scalar_type()), v_last = walk.new_state();
  Tensor v_seq = store_v_seq ? walk.new_sequence(walk.state_dtype()) : walk.none(walk.state_dtype());

  LifProblem p = options(tau, decay_input, v_threshold, v_reset);
  const Sequences inputs(walk, {x}, p, {&p.x}, {&p.spikes, &p.v_seq});
  p.spikes.data = spikes.data_ptr();
  p.v_seq.data = store_v_seq ? v_seq.data_ptr() : nullptr;
  p.v = v ? v->data_ptr() : nullptr;
  p.v_last = v_last.data_ptr();
  run(spiking_kernels(checked_isa()).lif_forward[walk.dtype], p, walk, 1, spikes);
  return {walk.result(spikes), v_last, store_v_seq ? walk.result(v_seq) : v_seq};
}

std::tuple<Tensor, Tensor> lif_backward(Tensor grad_spikes, OptionalTensor grad_v_last, OptionalTensor grad_v_seq,
                                        Tensor x, OptionalTensor v, double tau, bool decay_input, double v_threshold,
                                        std::optional<double> v_reset, int64_t surrogate, double alpha,
                                        bool detach_reset) {
  const char* const op = "lif_backward";
  const Walk walk(x, op);
  FC_CHECK(grad_spikes.is_cpu() && walk.same(grad_spikes) && grad_spikes.scalar_type() == x.scalar_type(), op,
           ": expected grad_spikes like x");
  FC_CHECK(!grad_v_seq ||
               (grad_v_seq->is_cpu() && walk.same(*grad_v_seq) && grad_v_seq->scalar_type() == walk.state_dtype()),
           op, ": expected grad_v_seq with x's shape, in the state's dtype");
  FC_CHECK(surrogate >= 0 && surrogate < kSurrogates, op, ": unknown surrogate ", surrogate);
  const bool need_grad_v = v.has_value();
  v = state_input(v, walk, op, "v");
  grad_v_last = state_input(grad_v_last, walk, op, "grad_v_last");
  Tensor grad_x = walk.new_sequence(x.scalar_type());
  Tensor grad_v = need_grad_v ? walk.new_state() : walk.none(walk.state_dtype());

  LifProblem p = options(tau, decay_input, v_threshold, v_reset);
  std::vector<Tensor> given{x, grad_spikes};
  std::vector<Sequence*> into{&p.x, &p.grad_spikes};
  if (grad_v_seq) given.push_back(*grad_v_seq), into.push_back(&p.grad_v_seq);
  const Sequences inputs(walk, std::move(given), p, into, {&p.grad_x});
  p.grad_x.data = grad_x.data_ptr();
  p.v = v ? v->data_ptr() : nullptr;
  p.grad_v_last = grad_v_last ? grad_v_last->data_ptr() : nullptr;
  p.grad_v = need_grad_v ? grad_v.data_ptr() : nullptr;
  p.surrogate = int(surrogate);
  p.alpha = alpha;
  p.detach_reset = detach_reset;
  run(spiking_kernels(checked_isa()).lif_backward[walk.dtype], p, walk, p.steps + 1, grad_x);
  return {walk.result(grad_x), grad_v};
}

}  // namespace fastcifar
