// The fixed-point cast of rows. Values: one read, one write, some 15 operations a register, well below what memory
// takes. Backward recomputes them: two reads, one write, and a sum in double whose order is the elements' own, sixteen
// at a time, whatever the registers hold.
#pragma once
#include "cast.inl"
#include "digits.inl"
#include "fixedpoint.h"
#include "rows.inl"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

constexpr int64_t kStep = 16;  // elements, and sums, at a time

template <int kRounder, int kBounder, class A>
void forward_row(const A* x, A* out, int64_t n, uint64_t index, Cast<A> c, bool stream) {
  for_each_vector<A>(n, [&](int64_t i, auto width) {
    prefetch_next_page(x + i);
    const V<A> q = cast<kRounder, kBounder, A>(load(x + i, width), c, index + i).q;
    store(out + i, q * c.inverse, width, stream);
  });
}

template <class A>
struct Sums {
  V<double> at[kStep / kLanes<double>] = {};

  // The product is rounded to float: an error of the incoming gradient's own size, for half of the conversions.
  FC_INLINE_MEMBER void add(int j, V<float> g, V<float> d) { add_halves(at[2 * j], at[2 * j + 1], g * d); }
  FC_INLINE_MEMBER void add(int j, V<double> g, V<double> d) { at[j] += g * d; }
  FC_INLINE_MEMBER double total() const {
    double s[kStep];
    memcpy(s, at, sizeof s);
    for (int half = kStep / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) s[k] += s[k + half];
    return s[0];
  }
};

// The gradient to x, and the sum of g times what the binary point does to an element: x - out in range, else -out
// (both times ln 2). A step at a time; `n` of a tail are copied into one.
template <int kRounder, int kBounder, class A>
double backward_row(const A* x, const A* g, A* grad_x, int64_t n, uint64_t index, Cast<A> c, bool stream) {
  Sums<A> sums;
  const auto step = [&](const A* xs, const A* gs, A* to, uint64_t first, bool past) {
#pragma GCC unroll 8
    for (int j = 0; j < int(kStep / kLanes<A>); ++j) {
      const int64_t at = j * kLanes<A>;
      const V<A> x1 = load(xs + at, Full{}), g1 = load(gs + at, Full{});
      const Stored<A> s = cast<kRounder, kBounder, A>(x1, c, first + at);
      const V<A> kept = (V<A>)((I<A>)x1 & s.inside);
      sums.add(j, g1, kept - s.q * c.inverse);
      store(to + at, (V<A>)((I<A>)g1 & s.inside), Full{}, past);
    }
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    prefetch_next_page(x + i);
    prefetch_next_page(g + i);
    step(x + i, g + i, grad_x + i, index + i, stream);
  }
  if (i < n) {
    alignas(64) A room[3][kStep] = {};
    memcpy(room[0], x + i, (n - i) * sizeof(A));
    memcpy(room[1], g + i, (n - i) * sizeof(A));
    step(room[0], room[1], room[2], index + i, false);
    memcpy(grad_x + i, room[2], (n - i) * sizeof(A));
  }
  return sums.total();
}

// Adds each of the first `count` lanes to a sum of its own.
FC_INLINE void add_each(double* sums, V<float> x, int64_t count) {
  if (count < kLanes<float>) {
    for (int k = 0; k < count; ++k) sums[k] += x[k];
    return;
  }
  V<double> low = load(sums, Full{}), high = load(sums + kLanes<double>, Full{});
  add_halves(low, high, x);
  store(sums, low, Full{});
  store(sums + kLanes<double>, high, Full{});
}
FC_INLINE void add_each(double* sums, V<double> x, int64_t count) {
  for (int k = 0; k < count && k < kLanes<double>; ++k) sums[k] += x[k];
}

// The same for columns with a binary point each: x is scaled already, and every column has a sum of its own.
template <int kRounder, int kBounder, class A>
void backward_columns(const A* y, const A* g, A* grad_x, double* sums, int64_t n, uint64_t index, Cast<A> c) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const V<A> y1 = load(y + i, Full{}), g1 = load(g + i, Full{});
    const Stored<A> s = cast<kRounder, kBounder, A>(y1, c, index + i);
    add_each(sums + i, g1 * ((V<A>)((I<A>)y1 & s.inside) - s.q), n - i);
    store(grad_x + i, (V<A>)((I<A>)g1 & s.inside), Full{});
  }
}

template <class A>
struct CastRows {
  void (*forward)(const A* x, A* out, int64_t n, uint64_t index, Cast<A> c, bool stream);
  double (*backward)(const A* x, const A* g, A* grad_x, int64_t n, uint64_t index, Cast<A> c, bool stream);
  void (*columns)(const A* y, const A* g, A* grad_x, double* sums, int64_t n, uint64_t index, Cast<A> c);
};
template <class A>
struct CastTable {
  CastRows<A> rows[kRounders][kBounders] = {};
};
template <class A, int kRounder, int... kBounderIds>
constexpr void fill_casts(CastTable<A>& table) {
  ((table.rows[kRounder][kBounderIds] = {forward_row<kRounder, kBounderIds, A>, backward_row<kRounder, kBounderIds, A>,
                                         backward_columns<kRounder, kBounderIds, A>}),
   ...);
}
template <class A>
constexpr CastTable<A> make_casts() {
  CastTable<A> table;
  fill_casts<A, kByThreshold, kClamp, kZeroOutside, kModulo, kTopBits, kTopBitsOfFloor>(table);
  fill_casts<A, kToEven, kClamp, kZeroOutside, kModulo, kTopBits, kTopBitsOfFloor>(table);
  fill_casts<A, kAtRandom, kClamp, kZeroOutside, kModulo, kTopBits, kTopBitsOfFloor>(table);
  return table;
}
template <class A>
constexpr CastTable<A> cast_table = make_casts<A>();

// ---- between memory and rows of the compute type --------------------------------------------------------------------

static constexpr int64_t kStorageBytes[kDTypes] = {4, 8, 2, 2};

template <class A>
FC_INLINE bool in_place(int dtype) {
  return dtype == (sizeof(A) == 4 ? kFloat32 : kFloat64);
}

// n elements from `at` on: where they lie, or converted into `room`.
template <class A>
const A* read(const void* memory, int dtype, int64_t at, int64_t n, A* room, float* floats) {
  const char* from = (const char*)memory + at * kStorageBytes[dtype];
  if (in_place<A>(dtype)) return (const A*)from;
  if constexpr (sizeof(A) == 8) {
    if (dtype != kFloat32) {  // half precision by way of float
      RowTables<float>::read[dtype](from, 1, floats, n);
      for (int64_t i = 0; i < n; ++i) room[i] = floats[i];
      return room;
    }
  }
  RowTables<A>::read[dtype](from, 1, room, n);
  return room;
}

template <class A>
void write(const A* row, const CastProblem& p, int64_t at, int64_t n, float* floats) {
  char* to = (char*)p.out + at * kStorageBytes[p.dtype];
  if constexpr (sizeof(A) == 8) {
    if (p.dtype == kBFloat16 || p.dtype == kFloat16) {  // as torch converts: to float first
      for (int64_t i = 0; i < n; ++i) floats[i] = float(row[i]);
      RowTables<float>::write[p.dtype](floats, to, 1, n, false);
      return;
    }
  }
  RowTables<A>::write[p.dtype](row, to, 1, n, p.stream);
}

template <class A>
void write_raw(const A* row, const CastProblem& p, int64_t at, int64_t n) {
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes<A>)));
  char* to = (char*)p.out + at * p.raw_bytes;
  for_each_vector<A>(n, [&](int64_t i, auto width) {
    V<A> q = load(row + i, Full{});
    q = select<A>(q == q, q, V<A>{});
    if constexpr (sizeof(A) == 8)
      if (p.raw_bytes == 8)  // unsigned; the machine's conversion to 64 bits is not in every instruction set
        return store_raw((int64_t*)to + i, (I<A>)(q + A(0x1p52)) - (I<A>)splat<A>(A(0x1p52)), width, false);
    store_raw((int32_t*)to + i, __builtin_convertvector(q, Ints), width, false);
  });
}

template <class A>
void forward_block(const CastProblem& p, const CastRows<A>& kernel, int64_t at, int64_t n, const Cast<A>& c,
                   const A* scale, const A* inverse, A* scratch) {
  A *const room = scratch, *const result = scratch + kCastBlock;
  float* const floats = (float*)(scratch + 3 * kCastBlock);
  const A* x = read<A>(p.x, p.dtype, at, n, room, floats);
  const bool direct = p.raw_bytes == 0 && scale == nullptr && in_place<A>(p.dtype);
  A* const out = direct ? (A*)p.out + at : result;
  if (scale) {
    for_each_vector<A>(n, [&](int64_t i, auto width) {
      const V<A> x1 = load(x + i, width), a = scaled<A>(x1, load(scale + i, width), splat<A>(c.least));
      store(room + i, (V<A>)((I<A>)a ^ ((I<A>)x1 & (I<A>)splat<A>(A(-0.0)))), width);
    });
    x = room;
  }
  kernel.forward(x, out, n, at, c, direct && p.stream);
  if (scale)
    for (int64_t i = 0; i < n; i += kLanes<A>)
      store(result + i, load(result + i, Full{}) * load(inverse + i, Full{}), Full{});
  if (p.raw_bytes)
    write_raw(result, p, at, n);
  else if (!direct)
    write(result, p, at, n, floats);
}

template <class A>
double backward_block(const CastProblem& p, const CastRows<A>& kernel, int64_t at, int64_t n, const Cast<A>& c,
                      const A* scale, double* sums, A* scratch) {
  A *const room = scratch, *const room_g = scratch + kCastBlock, *const result = scratch + 2 * kCastBlock;
  float* const floats = (float*)(scratch + 3 * kCastBlock);
  const A *x = read<A>(p.x, p.dtype, at, n, room, floats), *const g = read<A>(p.grad, p.dtype, at, n, room_g, floats);
  const bool direct = p.out && scale == nullptr && in_place<A>(p.dtype);
  A* const out = direct ? (A*)p.out + at : result;
  double total = 0;
  if (scale) {
    for_each_vector<A>(n, [&](int64_t i, auto width) {
      const V<A> x1 = load(x + i, width), a = scaled<A>(x1, load(scale + i, width), splat<A>(c.least));
      store(room + i, (V<A>)((I<A>)a ^ ((I<A>)x1 & (I<A>)splat<A>(A(-0.0)))), width);
      store(room_g + i, load(g + i, width), width);
    });
    kernel.columns(room, room_g, out, sums, n, at, c);
  } else {
    total = kernel.backward(x, g, out, n, at, c, direct && p.stream);
  }
  if (p.out && !direct) write(out, p, at, n, floats);
  return total;
}

template <bool kBackward, class A>
void cast_items(const CastProblem& p, int64_t begin, int64_t end, void* scratch) {
  const CastRows<A>& kernel = cast_table<A>.rows[p.rounder][p.bounder];
  const Cast<A>* casts = (const Cast<A>*)p.casts;
  const int64_t blocks = (p.length + kCastBlock - 1) / kCastBlock;  // p.blocks() would be shared code
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks, column = item % blocks * kCastBlock;
    const int64_t width = p.length - column < kCastBlock ? p.length - column : kCastBlock;
    if (p.scale == nullptr) {
      const Cast<A>& c = casts[row % p.channels];
      const int64_t at = row * p.length + column;
      if constexpr (kBackward)
        p.partial[item] = backward_block<A>(p, kernel, at, width, c, nullptr, nullptr, (A*)scratch);
      else
        forward_block<A>(p, kernel, at, width, c, nullptr, nullptr, (A*)scratch);
      continue;
    }
    double* const sums = kBackward ? p.partial + row * p.length + column : nullptr;
    if constexpr (kBackward) memset(sums, 0, width * sizeof(double));
    const A *const scale = (const A*)p.scale + column, *const inverse = (const A*)p.inverse + column;
    for (int64_t r = row * p.chunk; r < (row + 1) * p.chunk && r < p.rows; ++r) {
      const int64_t at = r * p.length + column, left = p.total - at, n = left < width ? left : width;
      if (n <= 0) break;
      if constexpr (kBackward)
        backward_block<A>(p, kernel, at, n, casts[0], scale, sums, (A*)scratch);
      else
        forward_block<A>(p, kernel, at, n, casts[0], scale, inverse, (A*)scratch);
    }
  }
  stream_fence();
}

extern const FixedPointKernels fixedpoint_kernels;
const FixedPointKernels fixedpoint_kernels = {
    {cast_items<false, float>, cast_items<false, double>},
    {cast_items<true, float>, cast_items<true, double>},
    {limit_digits<float>, limit_digits<double>, limit_digits<bfloat16>, limit_digits<float16>}};

}  // namespace fastcifar::FASTCIFAR_ISA
