// Between memory in any storage type and stride, and rows of the compute type: what a block does before and after the
// neurons' own arithmetic, where it cannot read and write memory in place.
#pragma once
#include "spiking.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

// to[i] = from[i * stride], n of them; `to` has room for whole registers.
template <class S, class A>
void read_row(const void* memory, int64_t stride, A* to, int64_t n) {
  const S* from = (const S*)memory;
  for_each_vector<A>(n, [&](int64_t i, auto width) {
    if (stride == 1) {
      prefetch_next_page(from + i);
      store(to + i, load_as<A>(from + i, width), Full{});
    } else {
      S lanes[kLanes<A>];
      const int64_t count = n - i < kLanes<A> ? n - i : kLanes<A>;
      for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = from[(i + lane) * stride];
      store(to + i, load_as<A>(lanes, width), Full{});
    }
  });
}

// to[i * stride] = from[i], n of them. Half precision rounds, which spikes, being small whole numbers, have no need of.
template <class S, class A>
void write_row(const A* from, void* memory, int64_t stride, int64_t n, bool stream) {
  S* to = (S*)memory;
  for_each_vector<A>(n, [&](int64_t i, auto width) {
    const V<A> x = load(from + i, Full{});
    if (stride == 1) {
      store_as(to + i, x, width, stream);
    } else {
      S lanes[kLanes<A>];
      store_as(lanes, x, width, false);
      const int64_t count = n - i < kLanes<A> ? n - i : kLanes<A>;
      for (int64_t lane = 0; lane < count; ++lane) to[(i + lane) * stride] = lanes[lane];
    }
  });
}
template <class S>
void write_spikes(const float* from, void* memory, int64_t stride, int64_t n, bool stream) {
  if (stride != 1) return write_row<S, float>(from, memory, stride, n, stream);
  for_each_vector<float>(
      n, [&](int64_t i, auto width) { store_mask((S*)memory + i, load(from + i, Full{}) != 0.0f, width, stream); });
}

// A row of whole numbers as bytes.
template <class A>
void write_bytes(const A* from, uint8_t* to, int64_t stride, int64_t n, bool stream) {
  for_each_vector<A>(n, [&](int64_t i, auto width) {
    const V<A> x = load(from + i, Full{});
    if (stride == 1) {
      store_bytes<A>(to + i, x, width, stream);
    } else {
      uint8_t lanes[kLanes<A>];
      store_bytes<A>(lanes, x, Full{}, false);
      const int64_t count = n - i < kLanes<A> ? n - i : kLanes<A>;
      for (int64_t lane = 0; lane < count; ++lane) to[(i + lane) * stride] = lanes[lane];
    }
  });
}
// A row of 0 and 1 as bits, the first in the lowest; `from` has room for whole registers.
template <class A>
void write_bits(const A* from, uint8_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) to[i / 8] = eight_bits(from + i);
  if (i < n) to[i / 8] = uint8_t(eight_bits(from + i) & ((1 << (n - i)) - 1));
}

template <class A>
using ReadRow = void (*)(const void* from, int64_t stride, A* to, int64_t n);
template <class A>
using WriteRow = void (*)(const A* from, void* to, int64_t stride, int64_t n, bool stream);

// By storage type; null where no kernel of that compute type reads it.
template <class A>
struct RowTables;
template <>
struct RowTables<float> {
  static constexpr ReadRow<float> read[kDTypes] = {read_row<float, float>, nullptr, read_row<bfloat16, float>,
                                                   read_row<float16, float>};
  static constexpr WriteRow<float> write[kDTypes] = {write_row<float, float>, nullptr, write_row<bfloat16, float>,
                                                     write_row<float16, float>};
  static constexpr WriteRow<float> write_binary[kDTypes] = {write_row<float, float>, nullptr, write_spikes<bfloat16>,
                                                            write_spikes<float16>};
};
template <>
struct RowTables<double> {
  static constexpr ReadRow<double> read[kDTypes] = {read_row<float, double>, read_row<double, double>};
  static constexpr WriteRow<double> write[kDTypes] = {write_row<float, double>, write_row<double, double>};
  static constexpr const WriteRow<double> (&write_binary)[kDTypes] = write;
};

}  // namespace fastcifar::FASTCIFAR_ISA
