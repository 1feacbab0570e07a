// What tells one neuron from another: its charge and that charge's derivative, and, where it is not the common one, how
// it fires and resets. Formulas: fastcifar/spiking/reference.py; the operations are its, in its order. spiking.inl runs
// them over time.
#pragma once
#include "spiking.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

// A parameter as a block sees it: a row of its neurons' values, also where all are the same number, since a load from
// the first-level cache is part of an arithmetic instruction.
template <class A>
struct Values {
  const A* at = nullptr;
  FC_INLINE_MEMBER V<A> operator[](int64_t i) const { return load(at + i, Full{}); }
};

template <class A>
struct Constants {
  Values<A> leak, threshold, gain, scale, shift;
  A reset, rest;  // where a hard reset goes; where the membrane leaks to
  A c[6];
  // Dividing by a power of two is multiplying by its reciprocal, to the bit, and many times as fast: then leak holds
  // the reciprocal, and so does inverse of c.
  bool times, exact[6];
  A inverse[6];

  FC_INLINE_MEMBER V<A> over_leak(V<A> x, int64_t i) const { return times ? x * leak[i] : x / leak[i]; }
  FC_INLINE_MEMBER V<A> over(V<A> x, int k) const { return exact[k] ? x * inverse[k] : x / c[k]; }
};
template <class A>
bool is_power_of_two(A x) {
  int exponent;
  return __builtin_frexp(x, &exponent) == 0.5 && exponent > -60 && exponent < 60;
}

// One step of some neurons: before it, the charged membrane, and what the neuron has asked to keep.
template <class A>
struct Before {
  V<A> x, v, w, h, kept;
};
// Gradients on their way back through a step: v holds dL/dV' before fire_backward, dL/dH after it, and dL/dV after
// charge_backward; w holds dL/dW' and then dL/dW.
template <class A>
struct Gradient {
  V<A> x, v, w, leak, threshold, gain;
};

template <class A>
FC_INLINE V<A> where(I<A> mask, V<A> x) {  // x, or +0
  return (V<A>)((I<A>)x & mask);
}
template <class A>
FC_INLINE V<A> round_half_even(V<A> x) {  // of 0 <= x < 2^22
  constexpr A kMagic = ExpConstants<A>::round;
  return (x + kMagic) - kMagic;
}

// ---- what most neurons share ----------------------------------------------------------------------------------------

struct Binary {
  static constexpr bool kSecond = false, kBinary = true;
  static constexpr bool kCurved = false;        // its derivative depends on the state before the charge
  static constexpr bool kSloped = true;         // takes its spikes' derivative from a surrogate
  static constexpr bool kTwoSlopes = false;     // from two, for either sign
  static constexpr bool kOwnPotential = false;  // fires at another potential than the threshold, which it keeps
  static constexpr bool kKeeps = false;         // keeps a value from recomputation for backward

  template <class A>
  FC_INLINE_MEMBER static V<A> fires_at(const Constants<A>& c, int64_t i, V<A>) {
    return c.threshold[i];
  }
  template <class Self, class A>
  FC_INLINE_MEMBER static V<A> keep(const Constants<A>& c, int64_t i, V<A>, V<A> w) {
    return Self::template fires_at<A>(c, i, w);
  }
  // The spikes, from the charged membrane and the second state before the step.
  template <class Self, class A>
  FC_INLINE_MEMBER static V<A> fire(const Constants<A>& c, int64_t i, V<A> h, V<A> w) {
    return select<A>(h - Self::template fires_at<A>(c, i, w) >= A(0), splat<A>(1), V<A>{});
  }
  template <bool kHard, class A>
  FC_INLINE_MEMBER static V<A> after(const Constants<A>& c, int64_t i, V<A> h, V<A> s) {
    if constexpr (kHard) return s * c.reset + (A(1) - s) * h;
    return h - s * c.threshold[i];
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> second(const Constants<A>&, V<A> w, V<A>) {
    return w;
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> output(const Constants<A>&, int64_t, V<A> s) {
    return s;
  }
  // dL/dS beyond the spikes' own gradient, through the second state.
  template <class A>
  FC_INLINE_MEMBER static V<A> through_second(const Constants<A>&, V<A>) {
    return V<A>{};
  }
  // Fire and reset backward, of the spikes' gradient dL/dS; slope is g(H - threshold), through_reset all ones unless
  // the reset is left out.
  template <class Self, bool kHard, class A>
  FC_INLINE_MEMBER static void fire_backward(const Constants<A>& c, int64_t i, const Before<A>& b, I<A> through_reset,
                                             V<A> spike_grad, V<A> slope, V<A> /*g(-Q)*/, Gradient<A>& g) {
    const V<A> s = Self::template fire<Self, A>(c, i, b.h, b.w);
    if constexpr (Self::kSecond) spike_grad = spike_grad + Self::template through_second<A>(c, g.w);
    const V<A> to_spike = kHard ? g.v * (c.reset - b.h) : -(g.v * c.threshold[i]);
    const V<A> u = (spike_grad + where<A>(through_reset, to_spike)) * slope;
    g.threshold = kHard ? -u : -u - g.v * s;
    g.v = u + (kHard ? g.v * (A(1) - s) : g.v);
  }
};

// ---- the neurons ----------------------------------------------------------------------------------------------------

struct IF : Binary {
  template <class A>
  FC_INLINE_MEMBER static V<A> charge(const Constants<A>&, int64_t, V<A> x, V<A> v, V<A>&) {
    return v + x;
  }
  template <class A>
  FC_INLINE_MEMBER static void charge_backward(const Constants<A>&, int64_t, const Before<A>&, Gradient<A>& g) {
    g.x = g.v;
  }
};

template <bool kDecayInput, bool kTimes>
struct LIF : Binary {
  template <class A>
  FC_INLINE_MEMBER static V<A> leaks(const Constants<A>& c, int64_t i, V<A> x) {
    return kTimes ? x * c.leak[i] : c.over_leak(x, i);
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> charge(const Constants<A>& c, int64_t i, V<A> x, V<A> v, V<A>&) {
    if constexpr (kDecayInput) return v + leaks<A>(c, i, x - (v - c.rest));
    return v - leaks<A>(c, i, v - c.rest) + x;
  }
  template <class A>
  FC_INLINE_MEMBER static void charge_backward(const Constants<A>& c, int64_t i, const Before<A>& b, Gradient<A>& g) {
    const V<A> leaked = leaks<A>(c, i, g.v);
    g.leak = g.v * (kDecayInput ? b.x - (b.v - c.rest) : -(b.v - c.rest));
    g.x = kDecayInput ? leaked : g.v;
    g.v = g.v - leaked;
  }
};

struct QIF : Binary {  // a0, v_rest, v_c
  static constexpr bool kCurved = true;
  template <class A>
  FC_INLINE_MEMBER static V<A> drive(const Constants<A>& c, V<A> x, V<A> v) {
    return x + c.c[0] * (v - c.c[1]) * (v - c.c[2]);
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> charge(const Constants<A>& c, int64_t i, V<A> x, V<A> v, V<A>&) {
    return v + c.over_leak(drive<A>(c, x, v), i);
  }
  template <class A>
  FC_INLINE_MEMBER static void charge_backward(const Constants<A>& c, int64_t i, const Before<A>& b, Gradient<A>& g) {
    const V<A> leaked = c.over_leak(g.v, i);
    g.leak = g.v * drive<A>(c, b.x, b.v);
    g.x = leaked;
    g.v = g.v + leaked * (c.c[0] * (b.v - c.c[1]) + c.c[0] * (b.v - c.c[2]));
  }
};

struct EIF : Binary {  // v_rest, theta_rh, delta_T
  static constexpr bool kKeeps = true;
  template <class A>
  FC_INLINE_MEMBER static V<A> rises(const Constants<A>& c, V<A> v) {
    return exp<A>(c.over(v - c.c[1], 2));
  }
  template <class Self, class A>
  FC_INLINE_MEMBER static V<A> keep(const Constants<A>& c, int64_t, V<A> v, V<A>) {
    return rises<A>(c, v);  // the exponential is most of this neuron's time
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> charge(const Constants<A>& c, int64_t i, V<A> x, V<A> v, V<A>&) {
    return v + c.over_leak(x + c.c[0] - v + c.c[2] * rises<A>(c, v), i);
  }
  template <class A>
  FC_INLINE_MEMBER static void charge_backward(const Constants<A>& c, int64_t i, const Before<A>& b, Gradient<A>& g) {
    const V<A> leaked = c.over_leak(g.v, i), rise = b.kept;
    g.leak = g.v * (b.x + c.c[0] - b.v + c.c[2] * rise);
    g.x = leaked;
    g.v = g.v + (leaked * rise - leaked);
  }
};

struct Izhikevich : QIF {  // a0, v_rest, v_c, tau_w, a, b; w is the recovery
  static constexpr bool kSecond = true;
  template <class A>
  FC_INLINE_MEMBER static V<A> charge(const Constants<A>& c, int64_t i, V<A> x, V<A> v, V<A>& w) {
    const V<A> h = v + c.over_leak(drive<A>(c, x, v) - w, i);
    w = w + c.over(c.c[4] * (h - c.c[1]) - w, 3);
    return h;
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> second(const Constants<A>& c, V<A> w, V<A> s) {
    return w + c.c[5] * s;
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> through_second(const Constants<A>& c, V<A> w) {
    return w * c.c[5];
  }
  template <class A>
  FC_INLINE_MEMBER static void charge_backward(const Constants<A>& c, int64_t i, const Before<A>& b, Gradient<A>& g) {
    const V<A> recovered = c.over(g.w, 3);
    g.v = g.v + recovered * c.c[4];
    const V<A> leaked = c.over_leak(g.v, i);
    g.leak = g.v * (drive<A>(c, b.x, b.v) - b.w);
    g.x = leaked;
    g.w = g.w - recovered - leaked;
    g.v = g.v + leaked * (c.c[0] * (b.v - c.c[1]) + c.c[0] * (b.v - c.c[2]));
  }
};

struct CubaLIF : Binary {  // leak is the membrane's decay, gain the current's; w is the current
  static constexpr bool kSecond = true;
  template <class A>
  FC_INLINE_MEMBER static V<A> charge(const Constants<A>& c, int64_t i, V<A> x, V<A> v, V<A>& w) {
    w = w * c.gain[i] + x;
    return v * c.leak[i] + w;
  }
  template <class A>
  FC_INLINE_MEMBER static void charge_backward(const Constants<A>& c, int64_t i, const Before<A>& b, Gradient<A>& g) {
    g.x = g.v + g.w;
    g.gain = g.x * b.w;
    g.leak = g.v * b.v;
    g.w = g.x * c.gain[i];
    g.v = g.v * c.leak[i];
  }
};

template <bool kDecayInput>
struct KLIF : Binary {  // gain is k; scale_reset
  using Leaky = LIF<kDecayInput, false>;
  template <class A>
  FC_INLINE_MEMBER static V<A> charge(const Constants<A>& c, int64_t i, V<A> x, V<A> v, V<A>& w) {
    const V<A> h = c.gain[i] * Leaky::template charge<A>(c, i, x, v, w);
    return select<A>(h < A(0), V<A>{}, h);  // relu, of NaN too
  }
  template <bool kHard, class A>
  FC_INLINE_MEMBER static V<A> after(const Constants<A>& c, int64_t i, V<A> h, V<A> s) {
    if (c.c[0] == A(0)) return Binary::after<kHard, A>(c, i, h, s);
    h = h / c.gain[i];
    if constexpr (kHard) return s * c.reset + (A(1) - s) * h;
    return h - s * (c.threshold[i] / c.gain[i]);
  }
  template <class Self, bool kHard, class A>
  FC_INLINE_MEMBER static void fire_backward(const Constants<A>& c, int64_t i, const Before<A>& b, I<A> through_reset,
                                             V<A> spike_grad, V<A> slope, V<A> other, Gradient<A>& g) {
    if (c.c[0] == A(0))
      return Binary::fire_backward<Self, kHard, A>(c, i, b, through_reset, spike_grad, slope, other, g);
    const V<A> k = c.gain[i], h = b.h / k, s = Binary::fire<Self, A>(c, i, b.h, b.w);
    const V<A> subtract = c.threshold[i] / k, kept = kHard ? g.v * (A(1) - s) : g.v;
    const V<A> to_spike = kHard ? g.v * (c.reset - h) : -(g.v * subtract);
    const V<A> u = (spike_grad + where<A>(through_reset, to_spike)) * slope;
    g.threshold = kHard ? -u : -u - g.v * s / k;
    g.gain = -(kept * h / k);
    if constexpr (!kHard) g.gain = g.gain + g.v * s * subtract / k;
    g.v = u + kept / k;
  }
  template <class A>
  FC_INLINE_MEMBER static void charge_backward(const Constants<A>& c, int64_t i, const Before<A>& b, Gradient<A>& g) {
    V<A> none = {};
    g.v = where<A>(b.h > A(0), g.v);
    g.gain = g.gain + g.v * Leaky::template charge<A>(c, i, b.x, b.v, none);
    g.v = g.v * c.gain[i];
    Leaky::template charge_backward<A>(c, i, b, g);
  }
};

struct ILIF : Binary {  // leak is 1 - 1 / tau; most spikes, lowest and highest h / threshold that pass a gradient
  static constexpr bool kBinary = false, kSloped = false;
  template <class A>
  FC_INLINE_MEMBER static V<A> charge(const Constants<A>& c, int64_t i, V<A> x, V<A> v, V<A>&) {
    return c.leak[i] * v + x;
  }
  template <class Self, class A>
  FC_INLINE_MEMBER static V<A> fire(const Constants<A>& c, int64_t i, V<A> h, V<A>) {
    V<A> scaled = h / c.threshold[i];
    scaled = select<A>(scaled < A(0), V<A>{}, scaled);
    return round_half_even<A>(select<A>(scaled > c.c[0], splat<A>(c.c[0]), scaled));
  }
  template <class Self, bool kHard, class A>
  FC_INLINE_MEMBER static void fire_backward(const Constants<A>& c, int64_t i, const Before<A>& b, I<A> through_reset,
                                             V<A> spike_grad, V<A>, V<A>, Gradient<A>& g) {
    const V<A> th = c.threshold[i], scaled = b.h / th, s = fire<Self, A>(c, i, b.h, b.w);
    const I<A> window = (scaled >= c.c[1]) & (scaled <= c.c[2]);
    const V<A> u = where<A>(window, spike_grad - where<A>(through_reset, g.v * th)) / th;
    g.threshold = -(u * scaled) - g.v * s;
    g.v = u + g.v;
  }
  template <class A>
  FC_INLINE_MEMBER static void charge_backward(const Constants<A>& c, int64_t i, const Before<A>& b, Gradient<A>& g) {
    g.leak = g.v * b.v;
    g.x = g.v;
    g.v = g.v * c.leak[i];
  }
};

template <bool kDecayInput>
struct ALIF : LIF<kDecayInput, false> {  // beta, rho; w is the adaptation
  using Leaky = LIF<kDecayInput, false>;
  static constexpr bool kSecond = true;
  static constexpr bool kOwnPotential = true, kKeeps = true;
  template <class A>
  FC_INLINE_MEMBER static V<A> fires_at(const Constants<A>& c, int64_t i, V<A> w) {
    return c.threshold[i] + c.c[0] * w;
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> charge(const Constants<A>& c, int64_t i, V<A> x, V<A> v, V<A>& w) {
    V<A> none = {};
    w = c.c[1] * w;
    return Leaky::template charge<A>(c, i, x, v, none);
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> second(const Constants<A>&, V<A> w, V<A> s) {
    return w + s;
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> through_second(const Constants<A>&, V<A> w) {
    return w;
  }
  template <class Self, bool kHard, class A>
  FC_INLINE_MEMBER static void fire_backward(const Constants<A>& c, int64_t i, const Before<A>& b, I<A> through_reset,
                                             V<A> spike_grad, V<A> slope, V<A>, Gradient<A>& g) {
    const V<A> s = Binary::fire<Self, A>(c, i, b.h, b.w);
    const V<A> to_spike = kHard ? g.v * (c.reset - b.h) : -(g.v * c.threshold[i]);
    const V<A> u = (spike_grad + g.w + where<A>(through_reset, to_spike)) * slope;
    g.threshold = kHard ? -u : -u - g.v * s;
    g.w = g.w * c.c[1] - u * c.c[0];  // of W already: LIF's charge_backward leaves it
    g.v = u + (kHard ? g.v * (A(1) - s) : g.v);
  }
};

struct SignedIF : Binary {  // s_max, s_min; w is the sum of the spikes, v and h are counted in thresholds
  static constexpr bool kSecond = true, kBinary = false, kTwoSlopes = true;
  template <class A>
  FC_INLINE_MEMBER static V<A> charge(const Constants<A>& c, int64_t i, V<A> x, V<A> v, V<A>&) {
    return v + x / c.threshold[i];
  }
  template <class Self, class A>
  FC_INLINE_MEMBER static V<A> fire(const Constants<A>& c, int64_t, V<A> h, V<A> w) {
    const V<A> up = where<A>((h >= A(1)) & (w < c.c[0]), splat<A>(1));
    return up - where<A>((h < A(0)) & (w > c.c[1]), splat<A>(1));
  }
  template <bool kHard, class A>
  FC_INLINE_MEMBER static V<A> after(const Constants<A>&, int64_t, V<A> h, V<A> s) {
    return h - s;
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> second(const Constants<A>&, V<A> w, V<A> s) {
    return w + s;
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> output(const Constants<A>& c, int64_t i, V<A> s) {
    return s * c.threshold[i];
  }
  template <class Self, bool kHard, class A>
  FC_INLINE_MEMBER static void fire_backward(const Constants<A>& c, int64_t i, const Before<A>& b, I<A> through_reset,
                                             V<A> spike_grad, V<A> up, V<A> down, Gradient<A>& g) {
    const V<A> slope = where<A>(b.w < c.c[0], up) + where<A>(b.w > c.c[1], down);
    g.threshold = spike_grad * fire<Self, A>(c, i, b.h, b.w);
    g.v = (spike_grad * c.threshold[i] - where<A>(through_reset, g.v)) * slope + g.v;
  }
  template <class A>
  FC_INLINE_MEMBER static void charge_backward(const Constants<A>& c, int64_t i, const Before<A>& b, Gradient<A>& g) {
    const V<A> th = c.threshold[i];
    g.threshold = g.threshold - g.v * b.x / (th * th);
    g.x = g.v / th;
  }
};

enum DelayedReset { kSubtract, kZero, kNone };
template <DelayedReset kReset>
struct Leaky : Binary {  // leak is beta; v and h are membranes before their reset
  static constexpr bool kCurved = kReset == kZero;
  template <class Self, class A>
  FC_INLINE_MEMBER static V<A> fire(const Constants<A>& c, int64_t i, V<A> h, V<A>) {
    return select<A>(h - c.threshold[i] > A(0), splat<A>(1), V<A>{});
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> left(const Constants<A>& c, int64_t i, V<A> v) {  // of the membrane, before it decays
    return kReset == kZero ? (A(1) - fire<Leaky, A>(c, i, v, v)) * v : v;
  }
  template <class A>
  FC_INLINE_MEMBER static V<A> charge(const Constants<A>& c, int64_t i, V<A> x, V<A> v, V<A>&) {
    const V<A> h = c.leak[i] * left<A>(c, i, v) + x;
    return kReset == kSubtract ? h - fire<Leaky, A>(c, i, v, v) * c.threshold[i] : h;
  }
  template <bool kHard, class A>
  FC_INLINE_MEMBER static V<A> after(const Constants<A>&, int64_t, V<A> h, V<A>) {
    return h;
  }
  template <class Self, bool kHard, class A>
  FC_INLINE_MEMBER static void fire_backward(const Constants<A>& c, int64_t i, const Before<A>& b, I<A>,
                                             V<A> spike_grad, V<A> slope, V<A>, Gradient<A>& g) {
    const V<A> u = spike_grad * slope;
    g.v = u + g.v;
    g.threshold = kReset == kSubtract ? -u - g.v * fire<Leaky, A>(c, i, b.v, b.v) : -u;
  }
  template <class A>
  FC_INLINE_MEMBER static void charge_backward(const Constants<A>& c, int64_t i, const Before<A>& b, Gradient<A>& g) {
    g.leak = g.v * left<A>(c, i, b.v);
    g.x = g.v;
    g.v = g.v * c.leak[i];
    if constexpr (kReset == kZero) g.v = g.v * (A(1) - fire<Leaky, A>(c, i, b.v, b.v));
  }
};

template <int kNeuron>
struct NeuronOf;
#define FC_NEURON(id, ...)    \
  template <>                 \
  struct NeuronOf<id> {       \
    using type = __VA_ARGS__; \
  }
FC_NEURON(kIF, IF);
FC_NEURON(kLIF, LIF<true, false>);
FC_NEURON(kLIFDirect, LIF<false, false>);
FC_NEURON(kLIFTimes, LIF<true, true>);
FC_NEURON(kLIFTimesDirect, LIF<false, true>);
FC_NEURON(kQIF, QIF);
FC_NEURON(kEIF, EIF);
FC_NEURON(kIzhikevich, Izhikevich);
FC_NEURON(kCubaLIF, CubaLIF);
FC_NEURON(kKLIF, KLIF<true>);
FC_NEURON(kKLIFDirect, KLIF<false>);
FC_NEURON(kILIF, ILIF);
FC_NEURON(kALIF, ALIF<true>);
FC_NEURON(kALIFDirect, ALIF<false>);
FC_NEURON(kSignedIF, SignedIF);
FC_NEURON(kLeakySubtract, Leaky<kSubtract>);
FC_NEURON(kLeakyZero, Leaky<kZero>);
FC_NEURON(kLeakyNone, Leaky<kNone>);
#undef FC_NEURON

}  // namespace fastcifar::FASTCIFAR_ISA
