// Exit decisions. A row costs one read, an exponential a class, and one logarithm or division a row: what a softmax
// costs without what it writes. kExitRows rows are decided together, in one of two ways:
//
// - Up to kFewClasses classes (CIFAR-10) a register would be nearly empty if it held one row, and reducing its lanes
//   would cost more than the exponentials. So tiles are transposed in registers (three shuffles a register of AVX-512
//   for 10 classes), and every statistic is a loop over classes with a row in each lane.
// - Of more classes, a row is read in blocks of 64 bytes, once for its largest logit and once more, from the cache, for
//   the exponentials, while the rows after it are fetched. The lanes of many rows are reduced together, so that no row
//   waits for its own.
//
// An exponential takes 19 operations of the vector units and the rest of a register's work two (confidence, many
// classes): with two such units, 10.5 cycles. To keep both busy, several rows or registers are computed side by side.
//
// The largest logit's own exponential, 1, is added last: the many small ones would each be rounded to its last place.
#pragma once
#include <type_traits>

#include "earlyexit.h"
#include "lanes.inl"
#include "power.inl"

namespace fastcifar::FASTCIFAR_ISA {

// A tile of kFewClasses classes, kExitRows rows adjacent.
template <class A>
struct alignas(64) ExitTile {
  A at[kFewClasses][kExitRows];
};
template <class A>
struct alignas(64) ExitStatistics {
  A top[kExitRows], second[kExitRows], total[kExitRows], weighted[kExitRows];
  decltype(I<A>{}[0] + 0) index[kExitRows];
};

// Columns [0, columns) of `count` rows into a tile. A row is read past its last column where the rows after it are,
// which spares the masks.
template <class A, class S>
static __attribute__((noinline)) void transpose_rows(const S* rows, int64_t stride, int64_t count, int columns,
                                                     int64_t readable, ExitTile<A>& tile) {
  constexpr int L = kLanes<A>;
  for (int c = 0; c < columns; c += L)
    for (int r = 0; r < count; r += L) {
      const int held = columns - c < L ? columns - c : L;
      const S* from = rows + r * stride + c;
      int64_t step = stride;
      S padded[L][L];
      if (r + L > count || readable - ((r + L - 1) * stride + c) < L) {
        memset((void*)padded, 0, sizeof padded);
        for (int i = 0; i < L && r + i < count; ++i) memcpy((void*)padded[i], from + i * stride, held * sizeof(S));
        from = padded[0], step = L;
      }
      V<A> v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = load_as<A>(from + i * step, Full{});
      exchange<0, L / 2, A>(v, held);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (i < held) store(&tile.at[c + i][r], v[i], Full{});
    }
}

// Registers of rows of few classes that are computed side by side.
constexpr int kAbreast = 2;

// What a criterion needs beyond the largest logit and the sum of the exponentials.
enum class ExitNeed { kNothing, kWeighted, kSecond };

// Numbers of classes, read to fill a register with one: to spread it from a register takes a vector unit's time.
template <class A>
constexpr auto kNumbers = [] {
  struct {
    decltype(I<A>{}[0] + 0) at[kFewClasses];
  } numbers{};
  for (int k = 0; k < kFewClasses; ++k) numbers.at[k] = k;
  return numbers;
}();

template <ExitNeed kNeed, class A>
static void few_classes(const ExitTile<A>& tile, int classes, A inverse, ExitStatistics<A>& out) {
  constexpr int L = kLanes<A>;
  for (int r = 0; r < kExitRows; r += kAbreast * L) {
    V<A> top[kAbreast], second[kAbreast], total[kAbreast] = {}, weighted[kAbreast] = {};
    I<A> index[kAbreast] = {};
    for (int i = 0; i < kAbreast; ++i)
      top[i] = load(&tile.at[0][r + i * L], Full{}), second[i] = splat<A>(-__builtin_inf());
    for (int k = 1; k < classes; ++k)
#pragma GCC unroll 4
      for (int i = 0; i < kAbreast; ++i) {
        const V<A> z = load(&tile.at[k][r + i * L], Full{});
        if constexpr (kNeed == ExitNeed::kSecond) second[i] = larger(second[i], smaller<A>(z, top[i]));
        index[i] = z > top[i] ? I<A>{} + kNumbers<A>.at[k] : index[i];
        top[i] = larger(z, top[i]);
      }
    for (int k = 0; k < classes; ++k) {
      V<A> t[kAbreast], e[kAbreast];
#pragma GCC unroll 4
      for (int i = 0; i < kAbreast; ++i) t[i] = (load(&tile.at[k][r + i * L], Full{}) - top[i]) * inverse;
      powers_of_two<A>(t, e);
#pragma GCC unroll 4
      for (int i = 0; i < kAbreast; ++i) {
        total[i] = total[i] + select<A>(index[i] == kNumbers<A>.at[k], V<A>{}, e[i]);
        if constexpr (kNeed == ExitNeed::kWeighted) weighted[i] = weighted[i] + e[i] * t[i];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kAbreast; ++i) {
      const int at = r + i * L;
      store(out.top + at, top[i], Full{});
      memcpy(out.index + at, &index[i], sizeof index[i]);
      store(out.total + at, total[i], Full{});
      if constexpr (kNeed == ExitNeed::kSecond) store(out.second + at, second[i], Full{});
      if constexpr (kNeed == ExitNeed::kWeighted) store(out.weighted + at, weighted[i], Full{});
    }
  }
}

// The partial statistics of the rows, a lane each.
template <class A>
struct alignas(64) ExitPartials {
  A top[kExitRows][kBlockLanes<A>], second[kExitRows][kBlockLanes<A>];  // also total, weighted
};

// Rows whose exponentials are computed side by side, in four registers in all, so that an operation need not wait for
// the one before it.
template <class A>
constexpr int kSideBySide = 4 * kLanes<A> < kBlockLanes<A> ? 1 : 4 * kLanes<A> / kBlockLanes<A>;

template <class A>
static void sum_lanes(const A (&from)[kExitRows][kBlockLanes<A>], A* to) {
  join_blocks<A, V<A>>(
      kExitRows, [&](int r, int l) { return load(&from[r][l], Full{}); },
      [&](int r, V<A> sum) { store(to + r, sum, Full{}); });
}
template <class A>
static void largest_lanes(const ExitPartials<A>& from, ExitStatistics<A>& out) {
  join_blocks<A, Largest<A>>(
      kExitRows,
      [&](int r, int l) { return Largest<A>{load(&from.top[r][l], Full{}), load(&from.second[r][l], Full{})}; },
      [&](int r, Largest<A> both) {
        store(out.top + r, both.top, Full{});
        store(out.second + r, both.second, Full{});
      });
}

// A row of more classes is scanned for its largest logit in pieces.
constexpr int64_t kExitSegment = 4096;

// Adds `e` where z is not the largest logit (also where it is NaN), and returns where that was, a bit a lane and 1
// above them.
template <class A>
FC_INLINE unsigned add_below(V<A>& total, V<A> z, V<A> top, V<A> e) {
#if FASTCIFAR_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) {
    const __mmask16 below = _mm512_cmp_ps_mask((__m512)z, (__m512)top, _CMP_NGE_UQ);
    total = (V<A>)_mm512_mask_add_ps((__m512)total, below, (__m512)total, (__m512)e);
    return below;
  } else {
    const __mmask8 below = _mm512_cmp_pd_mask((__m512d)z, (__m512d)top, _CMP_NGE_UQ);
    total = (V<A>)_mm512_mask_add_pd((__m512d)total, below, (__m512d)total, (__m512d)e);
    return below;
  }
#else
  const I<A> below = ~(I<A>)(z >= top);
  total = total + (V<A>)(below & (I<A>)e);
  unsigned bits = ~0u << kLanes<A>;
#if FASTCIFAR_VECTOR_BYTES == 32
  return bits | unsigned(sizeof(A) == 4 ? _mm256_movemask_ps((__m256)below) : _mm256_movemask_pd((__m256d)below));
#elif defined(__x86_64__)
  return bits | unsigned(sizeof(A) == 4 ? _mm_movemask_ps((__m128)below) : _mm_movemask_pd((__m128d)below));
#else
  for (int l = 0; l < kLanes<A>; ++l) bits |= unsigned(below[l] & 1) << l;
  return bits;
#endif
#endif
}

// Where a row's largest logit is, found while the exponentials are summed: their loop waits for the vector units, and
// leaves the others idle.
template <class A>
struct TopScan {
  using Bits = std::conditional_t<(kLanes<A> > 8), uint16_t, uint8_t>;
  static constexpr int kParts = kBlockLanes<A> / kLanes<A>;
  static constexpr int kBits = 8 * sizeof(Bits), kWord = 8 / sizeof(Bits);  // a register's; registers in a word
  alignas(64) Bits below[kExitSegment / kLanes<A> + kWord];
  int64_t first = 0, count = 0;  // the first place of the largest logit, 0 of a row that has none; how many there are

  FC_INLINE_MEMBER void start(int64_t columns) {
    memset((void*)&below[(columns + kBlockLanes<A> - 1) / kBlockLanes<A> * kParts], 0xff, 8);
  }
  FC_INLINE_MEMBER void finish(int64_t begin, int64_t columns) {
    const int64_t words = ((columns + kBlockLanes<A> - 1) / kBlockLanes<A> * kParts + kWord - 1) / kWord;
    int64_t place = -1;
    uint64_t several = 0, seen = 0;
    for (int64_t i = words - 1; i >= 0; --i) {
      uint64_t word;
      memcpy(&word, &below[i * kWord], 8);
      word = ~word;
      const uint64_t here = -uint64_t(word != 0);  // no branch: it would be as hard to foresee as the class
      several |= (word & (word - 1)) | (seen & here);
      seen |= here;
      const int bit = __builtin_ctzll(word | uint64_t(1) << 63);
      place = (place & ~here) | (int64_t((i * kWord + bit / kBits) * kLanes<A> + bit % kBits) & here);
    }
    if (place < 0) return;
    if (!count) first = begin + place;
    ++count;
    if (!several) return;
    --count;
    for (int64_t i = 0; i < words; ++i) {
      uint64_t word;
      memcpy(&word, &below[i * kWord], 8);
      count += __builtin_popcountll(~word);
    }
  }
};

template <ExitNeed kNeed, class S, class A = compute_t<S>>
static void many_classes(const S* rows, int64_t stride, int count, int64_t classes, A inverse, ExitPartials<A>& partial,
                         ExitStatistics<A>& out) {
  constexpr int L = kLanes<A>, kParts = kBlockLanes<A> / L, kRows = kSideBySide<A>, n = kRows * kParts;
  using Int = decltype(I<A>{}[0] + 0);
  const S* row[kRows];
  const uintptr_t ahead = kExitRows * stride * sizeof(S);
  for (int r = 0; r < count; r += kRows) {
    for (int i = 0; i < kRows; ++i) row[i] = rows + (r + i < count ? r + i : count - 1) * stride;
    V<A> top[n], second[n];
    for (int i = 0; i < n; ++i) top[i] = second[i] = splat<A>(-__builtin_inf());
    over_rows<A>(row, classes, [&](int64_t, V<A>(&z)[n]) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        if constexpr (kNeed == ExitNeed::kSecond) second[i] = larger(second[i], smaller<A>(z[i], top[i]));
        top[i] = larger(z[i], top[i]);
      }
    });
    for (int i = 0; i < n; ++i) {
      store(&partial.top[r + i / kParts][i % kParts * L], top[i], Full{});
      if constexpr (kNeed == ExitNeed::kSecond)
        store(&partial.second[r + i / kParts][i % kParts * L], second[i], Full{});
    }
  }
  largest_lanes<A>(partial, out);
  auto &totals = partial.top, &weights = partial.second;
  alignas(64) A more[kExitRows] = {};  // how many others equal the largest logit
  for (int r = 0; r < count; r += kRows) {
    for (int i = 0; i < kRows; ++i) row[i] = rows + (r + i < count ? r + i : count - 1) * stride;
    V<A> top[kRows], total[n], weighted[n];
    TopScan<A> scan[kRows];
    for (int i = 0; i < kRows; ++i) top[i] = splat<A>(out.top[r + i]);
    for (int i = 0; i < n; ++i) total[i] = weighted[i] = V<A>{};
    for (int64_t begin = 0; begin < classes; begin += kExitSegment) {
      const int64_t columns = classes - begin < kExitSegment ? classes - begin : kExitSegment;
      for (int i = 0; i < kRows; ++i) scan[i].start(columns);
      over_rows<A>(row, columns, [&](int64_t c, V<A>(&z)[n]) {
        V<A> t[n], e[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) t[i] = (z[i] - top[i / kParts]) * inverse;
        powers_of_two<A>(t, e);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) __builtin_prefetch((const char*)((uintptr_t)(row[i] + c) + ahead));
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
          scan[i / kParts].below[c / L + i % kParts] = add_below<A>(total[i], z[i], top[i / kParts], e[i]);
          if constexpr (kNeed == ExitNeed::kWeighted) weighted[i] = weighted[i] + e[i] * t[i];
        }
      });
      for (int i = 0; i < kRows; ++i) {
        scan[i].finish(begin, columns);
        row[i] += columns;
      }
    }
    for (int i = 0; i < kRows; ++i) {
      out.index[r + i] = Int(scan[i].first);
      more[r + i] = scan[i].count > 1 ? A(scan[i].count - 1) : A(0);
    }
    for (int i = 0; i < n; ++i) {
      store(&totals[r + i / kParts][i % kParts * L], total[i], Full{});
      if constexpr (kNeed == ExitNeed::kWeighted) store(&weights[r + i / kParts][i % kParts * L], weighted[i], Full{});
    }
  }
  sum_lanes<A>(totals, out.total);
  for (int r = 0; r < kExitRows; ++r) out.total[r] += more[r];
  if constexpr (kNeed == ExitNeed::kWeighted) sum_lanes<A>(weights, out.weighted);
}

// Which rows exit, -1 or 0, from their statistics; returns whether any has no softmax.
template <class A>
static bool judge(const ExitProblem& p, ExitStatistics<A>& s, A inverse, const float* thresholds, float* score,
                  int32_t* exits) {
  I<A> without{};
  for (int r = 0; r < kExitRows; r += kLanes<A>) {
    const V<A> top = load(s.top + r, Full{});
    const V<A> total = load(s.total + r, Full{}) + ((top - top) + A(1));  // NaN where the largest is not finite
    V<A> result = A(1) / total;
    if (p.criterion == kEntropy) {
      V<A> weighted = load(s.weighted + r, Full{});
      weighted = select<A>(weighted > A(-0x1p-80), V<A>{}, weighted);  // of nothing but classes brought up to `lowest`
      result = log<A>(total) - A(0x1.62e42fefa39efp-1) * weighted * result;
    } else if (p.criterion == kMargin) {
      V<A> t[1] = {(load(s.second + r, Full{}) - top) * inverse}, e[1];
      powers_of_two<A>(t, e);
      result = larger(V<A>{}, A(1) - e[0]) * result;  // 2^0 may be an ulp above 1
    } else if (p.criterion == kEnergy)
      result = A(-p.temperature) * log<A>(total) - top;
    store(s.total + r, total, Full{});
    without |= total != total;
    store_as(score + r, result, Full{}, false);
  }
  const bool falls = p.criterion == kEntropy || p.criterion == kEnergy;
  for (int r = 0; r < kExitRows; r += kLanes<float>) {
    V<float> value = load(score + r, Full{}), limit = load(thresholds + r, Full{});
    if (falls) value = -value, limit = -limit;
    const I<float> exit = p.strict ? value > limit : value >= limit;
    memcpy(exits + r, &exit, sizeof exit);
  }
  return any_lane<A>(without);
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
  const ExitNeed need = p.criterion == kMargin    ? ExitNeed::kSecond
                        : p.criterion == kEntropy ? ExitNeed::kWeighted
                                                  : ExitNeed::kNothing;
  const auto few = need == ExitNeed::kSecond     ? few_classes<ExitNeed::kSecond, A>
                   : need == ExitNeed::kWeighted ? few_classes<ExitNeed::kWeighted, A>
                                                 : few_classes<ExitNeed::kNothing, A>;
  const auto many = need == ExitNeed::kSecond     ? many_classes<ExitNeed::kSecond, S>
                    : need == ExitNeed::kWeighted ? many_classes<ExitNeed::kWeighted, S>
                                                  : many_classes<ExitNeed::kNothing, S>;
  const A inverse = A(0x1.71547652b82fep0 / p.temperature);
  ExitTile<A> tile;
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
      many(rows, p.row_stride, count, p.classes, inverse, partial, s);
    }
    if (p.thresholds) memcpy(thresholds, p.thresholds + row, sizeof(float) * count);
    const bool without = judge<A>(p, s, inverse, thresholds, score, exits);
    int64_t* const prediction = p.prediction + row;
    if (count == kExitRows) {
      memcpy(p.score + row, score, sizeof score);
      for (int r = 0; r < kExitRows; ++r) prediction[r] = s.index[r];
    } else {
      memcpy(p.score + row, score, sizeof(float) * count);
      for (int r = 0; r < count; ++r) prediction[r] = s.index[r];
    }
    if (without)
      for (int r = 0; r < count; ++r)
        if (s.total[r] != s.total[r]) prediction[r] = predict_slowly<A>(rows + r * p.row_stride, p.classes);
    // Both lists take the row, and the one that it belongs to keeps it.
    for (int r = 0; r < count; ++r) {
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
