// Parameters that are tensors: broadcast against the neurons, seen in the order of the kernels' walk; and the sum of
// their gradients over the blocks.
#pragma once
#include <array>
#include <cstring>

#include "../common.h"
#include "spiking.h"

namespace fastcifar {

struct Parameters {
  Parameter folded[kParameters];

  // Checks that each broadcasts against [N...] and folds it. Neurons are counted in the order of state_strides.
  Parameters(const std::array<OptionalTensor, kParameters>& given, const Dims& inner_sizes, const Dims& state_strides,
             ScalarType dtype, const char* op) {
    static const char* const names[kParameters] = {"leak", "threshold", "gain", "scale", "shift"};
    Dims order;  // dimensions of [N...], outermost first
    for (size_t d = 0; d < inner_sizes.size(); ++d) order.push_back(d);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return state_strides[a] > state_strides[b]; });
    for (int i = 0; i < kParameters; ++i) {
      if (!given[i]) continue;
      const Tensor& t = *given[i];
      const Dims sizes = sizes_of(t);
      const size_t offset = inner_sizes.size() - sizes.size();  // of its dimensions in [N...]
      bool fits = t.is_cpu() && t.scalar_type() == dtype && sizes.size() <= inner_sizes.size();
      for (size_t d = 0; fits && d < sizes.size(); ++d) fits = sizes[d] == 1 || sizes[d] == inner_sizes[offset + d];
      FC_CHECK(fits, op, ": expected ", names[i],
               " to broadcast against x without its first dimension, on the CPU, in the state's dtype");
      fold_one(i, t, inner_sizes, order, offset);
    }
  }

  // Room for each block's sums of the gradients that are wanted, entered into the problem.
  std::vector<std::unique_ptr<double[]>> partials(NeuronProblem& p, int64_t wanted) {
    std::vector<std::unique_ptr<double[]>> rooms;
    for (int i = 0; i < kParameters; ++i) {
      Parameter& parameter = p.parameters[i];
      parameter.partial = nullptr;
      if (!(wanted >> i & 1)) continue;
      parameter.runs = parameter.period == 1 ? 1 : std::min(p.block, (p.block - 1) / parameter.inner + 2);
      rooms.emplace_back(new double[std::max<int64_t>(1, p.blocks() * parameter.runs)]);
      parameter.partial = rooms.back().get();
    }
    return rooms;
  }

  // The wanted gradients, one after the other, each in its tensor's own order. `divides`: the kernel summed the
  // gradient of 1 / leak.
  Tensor gradients(const NeuronProblem& p, int64_t wanted, bool divides) const {
    int64_t total = 0;
    for (int i = 0; i < kParameters; ++i) total += wanted >> i & 1 ? elements_[i] : 0;
    Tensor out = empty_strided({total}, {1}, ScalarType::Double);
    double* to = (double*)out.data_ptr();
    std::fill(to, to + total, 0.0);
    for (int i = 0; i < kParameters; ++i) {
      if (!(wanted >> i & 1)) continue;
      const std::vector<double> sums = over_blocks(p, p.parameters[i]);
      const bool inverse = divides && i == kLeak, wide = values_[i]->scalar_type() == ScalarType::Double;
      for (int64_t entry = 0; entry < p.parameters[i].period; ++entry) {
        const void* data = p.parameters[i].data;
        const double value = wide ? ((const double*)data)[entry] : ((const float*)data)[entry];
        to[places_[i].empty() ? entry : places_[i][entry]] += inverse ? -sums[entry] / (value * value) : sums[entry];
      }
      to += elements_[i];
    }
    return out;
  }

 private:
  OptionalTensor values_[kParameters];  // in the order of the walk
  Dims places_[kParameters];            // where an entry of the walk lies in the tensor; empty: where it is
  int64_t elements_[kParameters] = {};

  void fold_one(int i, const Tensor& t, const Dims& inner_sizes, const Dims& order, size_t offset) {
    const Dims sizes = sizes_of(t);
    Parameter& f = folded[i];
    elements_[i] = t.numel();
    // Its dimensions in the order of the walk: those that it shares one value over must be outermost or innermost;
    // else it is spread over all neurons.
    const auto shared = [&](int64_t d) { return size_t(d) < offset || sizes[d - offset] == 1; };
    size_t first = 0, last = order.size();
    const auto skip = [&](int64_t d) { return shared(d) || inner_sizes[d] == 1; };
    while (first < last && skip(order[first])) ++first;
    while (last > first && skip(order[last - 1])) --last;
    bool folds = true;
    for (size_t k = first; k < last; ++k) folds = folds && (!shared(order[k]) || inner_sizes[order[k]] == 1);
    if (!folds) first = 0, last = order.size();
    for (size_t k = last; k < order.size(); ++k) f.inner *= inner_sizes[order[k]];
    for (size_t k = first; k < last; ++k) f.period *= inner_sizes[order[k]];

    // Which element of t each entry is: t's own contiguous order, walked in the order of the neurons.
    const Dims own = contiguous_strides(sizes);
    Dims places(1, 0);
    places.reserve(f.period);
    bool in_order = true;
    for (size_t k = first; k < last; ++k) {
      const int64_t d = order[k], stride = shared(d) ? 0 : own[d - offset];
      Dims next;
      next.reserve(places.size() * inner_sizes[d]);
      for (int64_t place : places)
        for (int64_t j = 0; j < inner_sizes[d]; ++j) next.push_back(place + j * stride);
      places = std::move(next);
    }
    for (size_t entry = 0; in_order && entry < places.size(); ++entry) in_order = places[entry] == int64_t(entry);
    const Tensor packed = t.is_contiguous() ? t : copy_as(t, own);
    if (in_order && int64_t(places.size()) == elements_[i]) {
      values_[i] = packed;
    } else {
      values_[i] = empty_strided({f.period}, {1}, t.scalar_type());
      const int64_t item = t.element_size();
      for (size_t entry = 0; entry < places.size(); ++entry)
        memcpy((char*)values_[i]->data_ptr() + entry * item, (const char*)packed.data_ptr() + places[entry] * item,
               item);
      places_[i] = std::move(places);
    }
    f.data = values_[i]->data_ptr();
  }

  // Sums over the blocks, in their order, whatever the threads: these share the entries, not the blocks.
  static std::vector<double> over_blocks(const NeuronProblem& p, const Parameter& parameter) {
    std::vector<double> sums(std::max<int64_t>(1, parameter.period), 0.0);
    if (p.steps == 0 || p.neurons == 0) return sums;
    parallel_for(parameter.period, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t index = 0; index < p.blocks(); ++index) {
        const double* from = parameter.partial + index * parameter.runs;
        const int64_t panel = index / p.blocks_per_panel();
        const int64_t start = (index - panel * p.blocks_per_panel()) * p.block;
        const int64_t neurons = std::min(p.block, p.neurons - start), first = panel * p.neurons + start;
        const int64_t runs = (first + neurons - 1) / parameter.inner - first / parameter.inner + 1;
        if (parameter.period == 1) {
          sums[0] += from[0];
          continue;
        }
        // The block's runs are entries at, at + 1, ... and wrap around.
        for (int64_t k = 0, at = first / parameter.inner % parameter.period; k < runs; at = 0) {
          const int64_t count = std::min(runs - k, parameter.period - at);
          const int64_t low = std::max(begin, at), high = std::min(end, at + count);
          for (int64_t entry = low; entry < high; ++entry) sums[entry] += from[k + entry - at];
          k += count;
        }
      }
    });
    return sums;
  }
};

}  // namespace fastcifar
