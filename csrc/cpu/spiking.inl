// Leaky integrate-and-fire over time, forward and backward; formulas in fastcifar/spiking/reference.py.
//
// Both passes are bound by memory, so each takes a block of neurons through all T steps while the membranes stay in the
// first-level cache. Per neuron and step the forward reads x and writes a spike (8 bytes in float32); the backward
// reads x and the spikes' gradient and writes x's gradient (12 bytes): it computes the membranes again from x instead
// of reading them, which costs about 8 operations and saves 4 bytes written and 4 read.
//
// Every operation is the reference's, in its order and without fused multiply-add, so that membranes and spikes are
// equal to it to the bit on every instruction set.
#pragma once
#include "spiking.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

template <class A>
struct LifConstants {
  A tau, reciprocal_tau, threshold, reset, rest;
  bool decay_input, exact_reciprocal;
  A alpha, atan_slope, atan_height, alpha_squared, half_width;

  explicit LifConstants(const LifProblem& p)
      : tau(A(p.tau)),
        reciprocal_tau(A(1) / tau),
        threshold(A(p.v_threshold)),
        reset(A(p.v_reset)),
        rest(p.hard_reset ? A(p.v_reset) : A(0)),
        decay_input(p.decay_input),
        exact_reciprocal(is_power_of_two(tau)),
        alpha(A(p.alpha)),
        atan_slope(A(1.5707963267948966 * p.alpha)),
        atan_height(A(p.alpha / 2)),
        alpha_squared(A(p.alpha * p.alpha)),
        half_width(A(p.surrogate == kRectangular ? 0.5 / p.alpha : 1 / p.alpha)) {}

  // Dividing by a power of two is multiplying by its reciprocal, to the bit; any other tau takes the slow division.
  static bool is_power_of_two(A tau) {
    int exponent;
    const A mantissa = __builtin_frexp(tau, &exponent);
    return mantissa == A(0.5) && exponent > -60 && exponent < 60;
  }
  FC_INLINE_MEMBER V<A> over_tau(V<A> x) const { return exact_reciprocal ? x * reciprocal_tau : x / tau; }
  FC_INLINE_MEMBER V<A> charge(V<A> x, V<A> v) const {
    return decay_input ? v + over_tau(x - (v - rest)) : v - over_tau(v - rest) + x;
  }
  template <bool kHard>
  FC_INLINE_MEMBER V<A> after_reset(V<A> h, V<A> s) const {
    if constexpr (kHard) return s * reset + (A(1) - s) * h;
    return h - s * threshold;
  }
};

template <class A>
FC_INLINE V<A> heaviside(V<A> u) {
  return select<A>(u >= A(0), splat<A>(1), V<A>{});
}

template <int kSurrogate, class A>
FC_INLINE V<A> surrogate_grad(V<A> u, const LifConstants<A>& c) {
  if constexpr (kSurrogate == kATan) {
    const V<A> slope = c.atan_slope * u;
    return c.atan_height / (A(1) + slope * slope);
  } else if constexpr (kSurrogate == kSigmoid) {
    const V<A> e = exp_nonpositive<A>(-abs<A>(c.alpha * u)), one_e = A(1) + e;
    return c.alpha * e / (one_e * one_e);
  } else if constexpr (kSurrogate == kPiecewiseQuadratic) {
    const V<A> distance = abs<A>(u);
    return select<A>(distance > c.half_width, V<A>{}, c.alpha - c.alpha_squared * distance);
  } else {
    return select<A>(abs<A>(u) < c.half_width, splat<A>(c.alpha), V<A>{});
  }
}

// The part of the problem that one block sees.
template <class S>
struct LifBlock {
  using A = compute_t<S>;
  int64_t neurons, panel, offset;

  LifBlock(const LifProblem& p, int64_t index) {
    panel = index / p.blocks_per_panel();
    offset = (index - panel * p.blocks_per_panel()) * p.block;
    neurons = p.neurons - offset < p.block ? p.neurons - offset : p.block;
  }
  template <class E>
  E* row(const Sequence& s, int64_t t) const {
    return s.data ? (E*)s.data + t * s.step + panel * s.panel + offset : nullptr;
  }
  template <class P>
  A* state(const LifProblem& p, P* data) const {
    return data ? (A*)data + panel * p.neurons + offset : nullptr;
  }
  void load_state(const LifProblem& p, const void* from, A otherwise, A* to) const {
    const A* source = state(p, from);
    for (int64_t i = 0; i < neurons; ++i) to[i] = source ? source[i] : otherwise;
  }
  void store_state(const LifProblem& p, const A* from, void* to) const {
    if (A* target = state(p, to)) memcpy(target, from, sizeof(A) * neurons);
  }
};

template <class S, bool kHard>
void lif_forward_row(const S* x, compute_t<S>* v, S* spikes, compute_t<S>* v_seq, int64_t n, bool stream,
                     const LifConstants<compute_t<S>>& c) {
  using A = compute_t<S>;
  for_each_vector<A>(n, [&](int64_t i, auto width) {
    prefetch_next_page(x + i);
    const V<A> h = c.charge(load(x + i, width), load(v + i, Full{}));
    const I<A> fires = h - c.threshold >= A(0);
    const V<A> s = select<A>(fires, splat<A>(1), V<A>{});
    const V<A> v_next = c.template after_reset<kHard>(h, s);
    store(v + i, v_next, Full{});
    if constexpr (sizeof(S) < sizeof(A))
      store_mask(spikes + i, fires, width, stream);
    else
      store(spikes + i, s, width, stream);
    if (v_seq) store(v_seq + i, v_next, width, stream);
  });
}

template <class S, bool kHard>
void lif_forward_blocks(const LifProblem& p, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const LifConstants<A> c(p);
  A* v = (A*)scratch;
  for (int64_t index = begin; index < end; ++index) {
    const LifBlock<S> block(p, index);
    block.load_state(p, p.v, c.rest, v);
    for (int64_t t = 0; t < p.steps; ++t)
      lif_forward_row<S, kHard>(block.template row<const S>(p.x, t), v, block.template row<S>(p.spikes, t),
                                block.template row<A>(p.v_seq, t), block.neurons, p.stream, c);
    block.store_state(p, v, p.v_last);
  }
  stream_fence();
}

// Forward again, keeping the charged membranes h[t] of the block instead of the spikes.
template <class S, bool kHard>
void lif_recompute_row(const S* x, compute_t<S>* v, compute_t<S>* charged, int64_t n,
                       const LifConstants<compute_t<S>>& c) {
  using A = compute_t<S>;
  for_each_vector<A>(n, [&](int64_t i, auto width) {
    prefetch_next_page(x + i);
    const V<A> h = c.charge(load(x + i, width), load(v + i, Full{}));
    store(charged + i, h, Full{});
    store(v + i, c.template after_reset<kHard>(h, heaviside<A>(h - c.threshold)), Full{});
  });
}

// One step of backpropagation through time; `carry` is dL/dV[t] on entry and dL/dV[t-1] on return.
template <class S, bool kHard, bool kDetach, int kSurrogate>
void lif_backward_row(const S* grad_spikes, const compute_t<S>* charged, const compute_t<S>* grad_v_seq,
                      compute_t<S>* carry, S* grad_x, int64_t n, bool stream, const LifConstants<compute_t<S>>& c) {
  using A = compute_t<S>;
  for_each_vector<A>(n, [&](int64_t i, auto width) {
    const V<A> h = load(charged + i, Full{}), u = h - c.threshold, s = heaviside<A>(u);
    V<A> grad_v = load(carry + i, Full{});
    if (grad_v_seq) grad_v = grad_v + load(grad_v_seq + i, width);
    prefetch_next_page(grad_spikes + i);
    V<A> grad_s = load(grad_spikes + i, width);
    if constexpr (!kDetach) grad_s = grad_s + (kHard ? grad_v * (c.reset - h) : -(grad_v * c.threshold));
    const V<A> grad_h = grad_s * surrogate_grad<kSurrogate, A>(u, c) + (kHard ? grad_v * (A(1) - s) : grad_v);
    const V<A> leaked = c.over_tau(grad_h);
    store(grad_x + i, c.decay_input ? leaked : grad_h, width, stream);
    store(carry + i, grad_h - leaked, Full{});
  });
}

template <class S, bool kHard, bool kDetach, int kSurrogate>
void lif_backward_blocks(const LifProblem& p, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const LifConstants<A> c(p);
  A *carry = (A*)scratch, *charged = carry + p.block;
  for (int64_t index = begin; index < end; ++index) {
    const LifBlock<S> block(p, index);
    block.load_state(p, p.v, c.rest, carry);  // first the membrane of the recomputation, then the gradient's carry
    for (int64_t t = 0; t < p.steps; ++t)
      lif_recompute_row<S, kHard>(block.template row<const S>(p.x, t), carry, charged + t * p.block, block.neurons, c);
    block.load_state(p, p.grad_v_last, A(0), carry);
    for (int64_t t = p.steps - 1; t >= 0; --t)
      lif_backward_row<S, kHard, kDetach, kSurrogate>(block.template row<const S>(p.grad_spikes, t),
                                                      charged + t * p.block,
                                                      block.template row<const A>(p.grad_v_seq, t), carry,
                                                      block.template row<S>(p.grad_x, t), block.neurons, p.stream, c);
    block.store_state(p, carry, p.grad_v);
  }
  stream_fence();
}

template <class S>
void lif_forward(const LifProblem& p, int64_t begin, int64_t end, void* scratch) {
  (p.hard_reset ? lif_forward_blocks<S, true> : lif_forward_blocks<S, false>)(p, begin, end, scratch);
}

template <class S, int kSurrogate>
LifKernel lif_backward_for(const LifProblem& p) {
  if (p.hard_reset)
    return p.detach_reset ? lif_backward_blocks<S, true, true, kSurrogate>
                          : lif_backward_blocks<S, true, false, kSurrogate>;
  return p.detach_reset ? lif_backward_blocks<S, false, true, kSurrogate>
                        : lif_backward_blocks<S, false, false, kSurrogate>;
}

template <class S>
void lif_backward(const LifProblem& p, int64_t begin, int64_t end, void* scratch) {
  constexpr LifKernel (*kFor[kSurrogates])(const LifProblem&) = {
      lif_backward_for<S, kATan>, lif_backward_for<S, kSigmoid>, lif_backward_for<S, kPiecewiseQuadratic>,
      lif_backward_for<S, kRectangular>};
  kFor[p.surrogate](p)(p, begin, end, scratch);
}

extern const SpikingKernels spiking_kernels;
const SpikingKernels spiking_kernels = {
    {lif_forward<float>, lif_forward<double>, lif_forward<bfloat16>, lif_forward<float16>},
    {lif_backward<float>, lif_backward<double>, lif_backward<bfloat16>, lif_backward<float16>},
};

}  // namespace fastcifar::FASTCIFAR_ISA
