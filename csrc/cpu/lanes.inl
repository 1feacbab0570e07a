// Rows of numbers in registers: turned so that a register holds one column of several rows, read side by side, and
// reduced to one number each. A row is seen in blocks of 64 bytes whatever the instruction set, and so the order of
// every sum is the same for all of them.
#pragma once
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

template <class A>
constexpr int kBlockLanes = 64 / int(sizeof(A));

// Of two rows, the lanes without bit s side by side, and those with it.
template <int s, class A>
FC_INLINE void part(V<A> a, V<A> b, V<A>& without, V<A>& with) {
  constexpr int L = kLanes<A>;
  I<A> low{}, high{};
  for (int l = 0; l < L; ++l) low[l] = l & s ? L + l - s : l, high[l] = l & s ? L + l : l + s;
  without = __builtin_shuffle(a, b, low);
  with = __builtin_shuffle(a, b, high);
}
// Registers [first, first + 2 s) transposed, of which those from `held` on are not needed.
template <int first, int s, class A>
FC_INLINE void exchange(V<A> (&v)[kLanes<A>], int held) {
  if constexpr (s > 0) {
    if (held > first + s) {
#pragma GCC unroll 8
      for (int i = first; i < first + s; ++i) part<s, A>(v[i], v[i + s], v[i], v[i + s]);
      exchange<first + s, s / 2, A>(v, held);
    } else {
#pragma GCC unroll 8
      for (int i = first; i < first + s; ++i) {
        V<A> unused;
        part<s, A>(v[i], v[i + s], v[i], unused);
      }
    }
    exchange<first, s / 2, A>(v, held);
  }
}

template <class A>
FC_INLINE I<A> lanes_counted() {
  I<A> lane{};
  for (int l = 0; l < kLanes<A>; ++l) lane[l] = l;
  return lane;
}

template <class A>
FC_INLINE bool any_lane(I<A> mask) {
#if FASTCIFAR_VECTOR_BYTES == 64
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask);
#elif FASTCIFAR_VECTOR_BYTES == 32
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  decltype(mask[0] + 0) any = 0;
  for (int l = 0; l < kLanes<A>; ++l) any |= mask[l];
  return any;
#endif
}

// f(offset, registers of 64 bytes of each row); those of the rows' ends are filled up with minus infinity.
template <class A, class S, int n, class F>
FC_INLINE void over_rows(const S* (&rows)[n], int64_t classes, F f) {
  constexpr int L = kLanes<A>, kParts = kBlockLanes<A> / L;
  V<A> z[n * kParts];
  int64_t c = 0;
  for (; c + kBlockLanes<A> <= classes; c += kBlockLanes<A>) {
#pragma GCC unroll 16
    for (int i = 0; i < n * kParts; ++i) z[i] = load_as<A>(rows[i / kParts] + c + i % kParts * L, Full{});
    f(c, z);
  }
  if (c == classes) return;
  using Int = decltype(I<A>{}[0] + 0);
  const I<A> lane = lanes_counted<A>();
#pragma GCC unroll 16
  for (int i = 0; i < n * kParts; ++i) {
    const S* at = rows[i / kParts] + c + i % kParts * L;
    const int64_t left = classes - c - i % kParts * L;
    z[i] = splat<A>(-__builtin_inf());
    if (left >= L)
      z[i] = load_as<A>(at, Full{});
    else if (left > 0)
      z[i] = select<A>(lane < Int(left), load_as<A>(at, Tail{int(left)}), z[i]);
  }
  f(c, z);
}

template <class A>
struct Largest {
  V<A> top, second;
};
template <class A>
FC_INLINE V<A> join(V<A> a, V<A> b) {
  return a + b;
}
template <class A>
FC_INLINE Largest<A> join(Largest<A> a, Largest<A> b) {
  return {larger(a.top, b.top), larger(larger(a.second, b.second), smaller<A>(a.top, b.top))};
}
template <int s, class A>
FC_INLINE V<A> join_lanes(V<A> a, V<A> b) {
  V<A> without, with;
  part<s, A>(a, b, without, with);
  return without + with;
}
template <int s, class A>
FC_INLINE Largest<A> join_lanes(Largest<A> a, Largest<A> b) {
  Largest<A> without, with;
  part<s, A>(a.top, b.top, without.top, with.top);
  part<s, A>(a.second, b.second, without.second, with.second);
  return join<A>(without, with);
}
// One number a row, in as many lanes as there are rows: half as many registers a step.
template <int s, class A, class T>
FC_INLINE void join_rows(T (&v)[kLanes<A>]) {
  if constexpr (s > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < s; ++i) v[i] = join_lanes<s, A>(v[i], v[i + s]);
    join_rows<s / 2, A>(v);
  }
}
// Of a whole number of registers of rows: from(row, lane) is a register of a row's block, to(row, register) takes a
// number a row.
template <class A, class T, class From, class To>
FC_INLINE void join_blocks(int rows, From from, To to) {
  constexpr int L = kLanes<A>, kParts = kBlockLanes<A> / L;
  for (int r = 0; r < rows; r += L) {
    T v[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      T parts[kParts];
      for (int part = 0; part < kParts; ++part) parts[part] = from(r + i, part * L);
#pragma GCC unroll 4
      for (int half = kParts / 2; half > 0; half /= 2)
        for (int part = 0; part < half; ++part) parts[part] = join<A>(parts[part], parts[part + half]);
      v[i] = parts[0];
    }
    join_rows<L / 2, A>(v);
    to(r, v[0]);
  }
}

}  // namespace fastcifar::FASTCIFAR_ISA
