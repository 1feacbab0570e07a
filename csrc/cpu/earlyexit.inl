// Exit decisions. A row costs one read, an exponential a class, and one logarithm or division a row: what a softmax
// costs without what it writes. Sixteen rows are decided together, in one of two ways:
//
// - Up to kFewClasses classes (CIFAR-10) a register would be nearly empty if it held one row, and reducing its lanes
//   would cost more than the exponentials. So tiles are transposed in registers (four shuffles a register of AVX-512),
//   and every statistic is a loop over classes with a row in each lane.
// - Of more classes, a row fills registers of 64 bytes in all, and of sixteen rows the partial statistics, one a lane,
//   are transposed and reduced in the same way, so that no row waits for the reduction of its own lanes.
//
// The largest logit's own exponential, 1, is added last: the many small ones would each be rounded to its last place.
// Sums are over lanes of 64 bytes whatever the instruction set, and so all of them give the same bits.
#pragma once
#include "earlyexit.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

template <class A>
constexpr int kExitLanes = 64 / int(sizeof(A));
// A tile of kFewClasses classes or lanes, sixteen rows adjacent.
template <class A>
struct alignas(64) ExitTile {
  A at[kFewClasses][kExitRows];
};
template <class A>
struct alignas(64) ExitStatistics {
  A top[kExitRows], second[kExitRows], total[kExitRows], weighted[kExitRows], index[kExitRows];  // index: bits of I<A>
};

template <int s, class A>
FC_INLINE void exchange(V<A> (&v)[kLanes<A>]) {
  constexpr int L = kLanes<A>;
  if constexpr (s < L) {
    I<A> low{}, high{};
    for (int l = 0; l < L; ++l) low[l] = l & s ? L + l - s : l, high[l] = l & s ? L + l : l + s;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & s) continue;
      const V<A> a = v[i], b = v[i + s];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + s] = __builtin_shuffle(a, b, high);
    }
    exchange<2 * s, A>(v);
  }
}

// Columns [0, columns) of `count` rows into a tile. A row is read past its last column where the rows after it are,
// which spares the masks.
template <class A, class S>
static __attribute__((noinline)) void transpose_rows(const S* rows, int64_t stride, int64_t count, int columns,
                                                     int64_t readable, ExitTile<A>& tile) {
  constexpr int L = kLanes<A>;
  for (int c = 0; c < columns; c += L)
    for (int r = 0; r < count; r += L) {
      V<A> v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        // Rows that there are not repeat the last one.
        const int64_t from = (r + i < count ? r + i : count - 1) * stride + c;
        if (readable - from >= L)
          v[i] = load_as<A>(rows + from, Full{});
        else
          v[i] = load_as<A>(rows + from, Tail{columns - c < L ? columns - c : L});
      }
      exchange<1, A>(v);
      const int held = columns - c < L ? columns - c : L;
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (i < held) store(&tile.at[c + i][r], v[i], Full{});
    }
}

// The first lane where a mask is set, or -1.
template <class A>
FC_INLINE int first_lane(I<A> mask) {
#if FASTCIFAR_VECTOR_BYTES == 64
  const unsigned bits = sizeof(A) == 4 ? _mm512_movepi32_mask((__m512i)mask) : _mm512_movepi64_mask((__m512i)mask);
#elif FASTCIFAR_VECTOR_BYTES == 32
  const unsigned bits = sizeof(A) == 4 ? _mm256_movemask_ps((__m256)mask) : _mm256_movemask_pd((__m256d)mask);
#else
  unsigned bits = 0;
  for (int l = 0; l < kLanes<A>; ++l) bits |= unsigned(mask[l] & 1) << l;
#endif
  return bits ? __builtin_ctz(bits) : -1;
}

// exp(d) of a distance to the largest logit, d made finite. No result is below the normal numbers, which a processor
// may take a hundred times as long to make: no sum with a 1 in it knows the difference. With kExact such a result is 0.
template <bool kExact, class A>
FC_INLINE V<A> exp_of_distance(V<A>& d) {
  using C = ExpConstants<A>;
  const I<A> tiny = d < C::normal;
  d = larger(splat<A>(C::normal), d);
  const V<A> e = exp_in_range<A>(d);
  return kExact ? select<A>(tiny, V<A>{}, e) : e;
}

// What a criterion needs beyond the largest logit and the sum of the exponentials.
enum class ExitNeed { kNothing, kWeighted, kSecond };

template <ExitNeed kNeed, class A>
static void few_classes(const ExitTile<A>& tile, int classes, A inverse, ExitStatistics<A>& out) {
  using Int = decltype(I<A>{}[0] + 0);
  for (int r = 0; r < kExitRows; r += kLanes<A>) {
    V<A> top = load(&tile.at[0][r], Full{}), second = splat<A>(-__builtin_inf());
    I<A> index{};
    for (int k = 1; k < classes; ++k) {
      const V<A> z = load(&tile.at[k][r], Full{});
      const I<A> above = z > top;
      if constexpr (kNeed == ExitNeed::kSecond) second = larger(second, smaller<A>(z, top));
      index = above ? I<A>{} + Int(k) : index;
      top = larger(z, top);
    }
    V<A> total{}, weighted{};
#pragma GCC unroll 2
    for (int k = 0; k < classes; ++k) {
      V<A> d = (load(&tile.at[k][r], Full{}) - top) * inverse;
      const V<A> e = exp_of_distance<kNeed == ExitNeed::kWeighted, A>(d);
      total = total + select<A>(index == Int(k), V<A>{}, e);
      if constexpr (kNeed == ExitNeed::kWeighted) weighted = weighted + e * d;
    }
    store(out.top + r, top, Full{});
    store(out.index + r, (V<A>)index, Full{});
    store(out.total + r, total, Full{});
    if constexpr (kNeed == ExitNeed::kSecond) store(out.second + r, second, Full{});
    if constexpr (kNeed == ExitNeed::kWeighted) store(out.weighted + r, weighted, Full{});
  }
}

// The partial statistics of sixteen rows, a lane each.
template <class A>
struct alignas(64) ExitPartials {
  A top[kExitRows][kExitLanes<A>], second[kExitRows][kExitLanes<A>];  // also total, weighted
};

template <class A>
FC_INLINE I<A> lanes_counted() {
  I<A> lane{};
  for (int l = 0; l < kLanes<A>; ++l) lane[l] = l;
  return lane;
}

// f(offset, part of 64 bytes, register); the registers of a row's end are filled up with minus infinity.
template <class A, class S, class F>
FC_INLINE void over_row(const S* row, int64_t classes, F f) {
  constexpr int L = kLanes<A>, kParts = kExitLanes<A> / L;
  int64_t c = 0;
  for (; c + kExitLanes<A> <= classes; c += kExitLanes<A>)
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) f(c, part, load_as<A>(row + c + part * L, Full{}));
  if (c == classes) return;
  using Int = decltype(I<A>{}[0] + 0);
  const I<A> lane = lanes_counted<A>();
#pragma GCC unroll 8
  for (int part = 0; part < kParts; ++part) {
    const int64_t left = classes - c - part * L;
    if (left >= L)
      f(c, part, load_as<A>(row + c + part * L, Full{}));
    else if (left > 0)
      f(c, part,
        select<A>(lane < Int(left), load_as<A>(row + c + part * L, Tail{int(left)}), splat<A>(-__builtin_inf())));
  }
}

// The lanes of sixteen rows as a tile.
template <class A>
FC_INLINE void lanes_to_tile(const A (&from)[kExitRows][kExitLanes<A>], ExitTile<A>& to) {
  transpose_rows<A, A>(&from[0][0], kExitLanes<A>, kExitRows, kExitLanes<A>, kExitRows * kExitLanes<A>, to);
}
template <class A>
static void sum_lanes(const A (&from)[kExitRows][kExitLanes<A>], ExitTile<A>& tile, A* to) {
  lanes_to_tile<A>(from, tile);
  for (int r = 0; r < kExitRows; r += kLanes<A>) {
    V<A> sum = load(&tile.at[0][r], Full{});
    for (int l = 1; l < kExitLanes<A>; ++l) sum = sum + load(&tile.at[l][r], Full{});
    store(to + r, sum, Full{});
  }
}
template <class A>
static void largest_lanes(const ExitPartials<A>& partial, bool second_too, ExitTile<A>& tile, ExitTile<A>& other,
                          ExitStatistics<A>& out) {
  lanes_to_tile<A>(partial.top, tile);
  if (second_too) lanes_to_tile<A>(partial.second, other);
  for (int r = 0; r < kExitRows; r += kLanes<A>) {
    V<A> top = load(&tile.at[0][r], Full{}), second = load(&other.at[0][r], Full{});
    for (int l = 1; l < kExitLanes<A>; ++l) {
      const V<A> z = load(&tile.at[l][r], Full{});
      if (second_too) second = larger(larger(second, load(&other.at[l][r], Full{})), smaller<A>(z, top));
      top = larger(z, top);
    }
    store(out.top + r, top, Full{});
    store(out.second + r, second, Full{});
  }
}

// The first place of a row's largest logit; 0 of a row that has none.
template <class A, class S>
FC_INLINE int64_t place_of(const S* row, int64_t classes, V<A> top) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + L <= classes; c += L) {
    const int lane = first_lane<A>(load_as<A>(row + c, Full{}) == top);
    if (lane >= 0) return c + lane;
  }
  for (; c < classes; ++c)
    if (load_as<A>(row + c, Tail{1})[0] == top[0]) return c;
  return 0;
}

template <ExitNeed kNeed, class S, class A = compute_t<S>>
static void many_classes(const S* rows, int64_t stride, int count, int64_t classes, A inverse, ExitPartials<A>& partial,
                         ExitTile<A>& tile, ExitTile<A>& other, ExitStatistics<A>& out) {
  constexpr int L = kLanes<A>, kParts = kExitLanes<A> / L;
  using Int = decltype(I<A>{}[0] + 0);
  for (int r = 0; r < count; ++r) {
    V<A> top[kParts], second[kParts];
    for (int part = 0; part < kParts; ++part) top[part] = second[part] = splat<A>(-__builtin_inf());
    over_row<A>(rows + r * stride, classes, [&](int64_t, int part, V<A> z) {
      if constexpr (kNeed == ExitNeed::kSecond) second[part] = larger(second[part], smaller<A>(z, top[part]));
      top[part] = larger(z, top[part]);
    });
    for (int part = 0; part < kParts; ++part) {
      store(&partial.top[r][part * L], top[part], Full{});
      if constexpr (kNeed == ExitNeed::kSecond) store(&partial.second[r][part * L], second[part], Full{});
    }
  }
  largest_lanes<A>(partial, kNeed == ExitNeed::kSecond, tile, other, out);
  auto &totals = partial.top, &weights = partial.second;
  for (int r = 0; r < count; ++r) {
    const V<A> top = splat<A>(out.top[r]);
    const Int index = Int(place_of<A>(rows + r * stride, classes, top));
    memcpy(&out.index[r], &index, sizeof index);
    V<A> total[kParts], weighted[kParts];
    I<A> own[kParts];  // the largest logit's place, less that of the lane
    for (int part = 0; part < kParts; ++part) {
      total[part] = weighted[part] = V<A>{};
      own[part] = index - Int(part * L) - lanes_counted<A>();
    }
    over_row<A>(rows + r * stride, classes, [&](int64_t c, int part, V<A> z) {
      V<A> d = (z - top) * inverse;
      const V<A> e = exp_of_distance<kNeed == ExitNeed::kWeighted, A>(d);
      total[part] = total[part] + select<A>(own[part] == Int(c), V<A>{}, e);
      if constexpr (kNeed == ExitNeed::kWeighted) weighted[part] = weighted[part] + e * d;
    });
    for (int part = 0; part < kParts; ++part) {
      store(&totals[r][part * L], total[part], Full{});
      if constexpr (kNeed == ExitNeed::kWeighted) store(&weights[r][part * L], weighted[part], Full{});
    }
  }
  sum_lanes<A>(totals, tile, out.total);
  if constexpr (kNeed == ExitNeed::kWeighted) sum_lanes<A>(weights, tile, out.weighted);
}

// Which rows exit, -1 or 0, from their statistics.
template <class A>
static void judge(const ExitProblem& p, ExitStatistics<A>& s, A inverse, const float* thresholds, float* score,
                  int32_t* exits) {
  for (int r = 0; r < kExitRows; r += kLanes<A>) {
    const V<A> top = load(s.top + r, Full{});
    const V<A> total = load(s.total + r, Full{}) + ((top - top) + A(1));  // NaN where the largest is not finite
    V<A> result = A(1) / total;
    if (p.criterion == kEntropy)
      result = log<A>(total) - load(s.weighted + r, Full{}) * result;
    else if (p.criterion == kMargin) {
      V<A> d = (load(s.second + r, Full{}) - top) * inverse;
      result = (A(1) - exp_of_distance<true, A>(d)) * result;
    } else if (p.criterion == kEnergy)
      result = A(-p.temperature) * log<A>(total) - top;
    store(s.total + r, total, Full{});
    store_as(score + r, result, Full{}, false);
  }
  const bool falls = p.criterion == kEntropy || p.criterion == kEnergy;
  for (int r = 0; r < kExitRows; r += kLanes<float>) {
    V<float> value = load(score + r, Full{}), limit = load(thresholds + r, Full{});
    if (falls) value = -value, limit = -limit;
    const I<float> exit = p.strict ? value > limit : value >= limit;
    memcpy(exits + r, &exit, sizeof exit);
  }
}

// Of a row that has no softmax: its first NaN, or else its first largest logit.
template <class A, class S>
static int64_t predict_slowly(const S* row, int64_t classes) {
  int64_t best = 0;
  A top = load_as<A>(row, Tail{1})[0];
  for (int64_t k = 0; k < classes; ++k) {
    const A z = load_as<A>(row + k, Tail{1})[0];
    if (z != z) return k;
    if (z > top) top = z, best = k;
  }
  return best;
}

template <class S>
static int64_t decide(const ExitProblem& p, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  using Int = decltype(I<A>{}[0] + 0);
  const ExitNeed need = p.criterion == kMargin    ? ExitNeed::kSecond
                        : p.criterion == kEntropy ? ExitNeed::kWeighted
                                                  : ExitNeed::kNothing;
  const auto few = need == ExitNeed::kSecond     ? few_classes<ExitNeed::kSecond, A>
                   : need == ExitNeed::kWeighted ? few_classes<ExitNeed::kWeighted, A>
                                                 : few_classes<ExitNeed::kNothing, A>;
  const auto many = need == ExitNeed::kSecond     ? many_classes<ExitNeed::kSecond, S>
                    : need == ExitNeed::kWeighted ? many_classes<ExitNeed::kWeighted, S>
                                                  : many_classes<ExitNeed::kNothing, S>;
  const A inverse = A(1 / p.temperature);
  ExitTile<A> tile, other;
  ExitPartials<A> partial;
  ExitStatistics<A> s;
  memset((void*)&tile, 0, sizeof tile);  // rows that there are not are reduced too
  memset((void*)&partial, 0, sizeof partial);
  memset((void*)&s, 0, sizeof s);
  alignas(64) float score[kExitRows], thresholds[kExitRows];
  alignas(64) int32_t exits[kExitRows];
  for (int r = 0; r < kExitRows; ++r) thresholds[r] = p.threshold;
  int64_t *keep = p.keeps + begin, *leave = p.exits + begin;
  for (int64_t row = begin; row < end; row += kExitRows) {
    const int count = int(end - row < kExitRows ? end - row : kExitRows);
    const S* rows = (const S*)p.logits + row * p.row_stride;
    if (p.classes <= kFewClasses) {
      const int64_t readable = (p.rows - 1 - row) * p.row_stride + p.classes;
      transpose_rows<A, S>(rows, p.row_stride, count, int(p.classes), readable, tile);
      few(tile, int(p.classes), inverse, s);
    } else {
      many(rows, p.row_stride, count, p.classes, inverse, partial, tile, other, s);
    }
    if (p.thresholds) memcpy(thresholds, p.thresholds + row, sizeof(float) * count);
    judge<A>(p, s, inverse, thresholds, score, exits);
    memcpy(p.score + row, score, sizeof(float) * count);
    for (int r = 0; r < count; ++r) {
      Int index;
      memcpy(&index, &s.index[r], sizeof index);
      p.prediction[row + r] = s.total[r] == s.total[r] ? index : predict_slowly<A>(rows + r * p.row_stride, p.classes);
      // Both lists take the row, and the one that it belongs to keeps it.
      *keep = *leave = row + r;
      keep += 1 + exits[r];
      leave -= exits[r];
    }
  }
  return keep - (p.keeps + begin);
}

extern const ExitKernels exit_kernels;
const ExitKernels exit_kernels = {{decide<float>, decide<double>, decide<bfloat16>, decide<float16>}};

}  // namespace fastcifar::FASTCIFAR_ISA
