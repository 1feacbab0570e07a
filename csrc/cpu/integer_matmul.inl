// Products of int16 summed in int32, two at a time: one instruction (pmaddwd, on AVX-512 machines that have it
// vpdpwssd) multiplies 2 integers a lane and adds the two products, 4 operations a lane where a float multiply-add
// does 2.
//
// A product of a gathered matrix [rows, depth] with the weight, packed by columns so that a register is one pair of
// `depth` for as many columns as it has lanes. A tile of rows and columns stays in registers for a whole block of
// `depth`; a pair of x is broadcast from memory. Per pair: kTileRows * kTileVectors multiply-adds, kTileRows +
// kTileVectors loads of at most 64 bytes from the first and second level of the cache.
//
// Sums are exact because a block is so short that no sum of its products leaves int32; blocks are added up in the type
// of the output. The shortest block is one pair, for which the bound just fails: 2 * (-32768)^2 = 2^31 arrives as
// -2^31. No other pair gives that number (the least sum is 2 * -32768 * 32767), so that the value is known again: see
// `widened`. Integer sums do not depend on their order, so results do not depend on threads or instruction set.
#pragma once
#include "integer_matmul.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

typedef int32_t Lanes32 __attribute__((vector_size(kVectorBytes)));
typedef int16_t Lanes16 __attribute__((vector_size(kVectorBytes)));
constexpr int kColumns = kVectorBytes / 4;  // of one register
// 12 x 2 of 32 registers with AVX-512, else 6 x 2 of 16; the rest holds two registers of weights and a pair of x.
constexpr int kTileRows = kVectorBytes == 64 ? 12 : 6;
constexpr int kTileVectors = 2, kTileColumns = kTileVectors * kColumns;
constexpr int64_t kDepthBlock = 1024;       // weights of a tile then stay in the second level of the cache
constexpr int64_t kPanelBytes = 192 << 10;  // and so do the gathered rows that meet them

struct MultiplyAdd {
  static FC_INLINE_MEMBER Lanes32 add(Lanes32 sum, Lanes32 a, Lanes32 b) {
#if FASTCIFAR_VECTOR_BYTES == 64
    return sum + (Lanes32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif FASTCIFAR_VECTOR_BYTES == 32
    return sum + (Lanes32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return sum + (Lanes32)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const Lanes32 low = ((a << 16) >> 16) * ((b << 16) >> 16), high = (a >> 16) * (b >> 16);
    typedef uint32_t Wrapping __attribute__((vector_size(kVectorBytes)));  // 2 * (-32768)^2 wraps, as in pmaddwd
    return (Lanes32)((Wrapping)sum + (Wrapping)low + (Wrapping)high);
#endif
  }
};

#if FASTCIFAR_VECTOR_BYTES == 64
// In assembly, because the rest of this file must not be compiled for machines that have the instruction.
struct DotProduct {
  static FC_INLINE_MEMBER Lanes32 add(Lanes32 sum, Lanes32 a, Lanes32 b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};
#endif

FC_INLINE Lanes32 pair_at(const char* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return pair - Lanes32{};
}

template <class Out>
FC_INLINE Out widened(int32_t sum) {
  if constexpr (sizeof(Out) == 8) return int64_t(int32_t(uint32_t(sum) - 1)) + 1;
  return sum;
}

// Sums of `pairs` pairs: rows at x and every `stride` bytes, kVectors registers of columns; into out[rows][columns], or
// added to it. Rows go by threes so that three of them need one address register.
template <class Add, int kVectors, class Out>
FC_INLINE void tile(const int16_t* x, int64_t stride, const int32_t* weight, int64_t pairs, Out* out, int64_t outputs,
                    int64_t rows, int64_t columns, bool first) {
  Lanes32 sums[kTileRows][kVectors] = {};
  const char* row[kTileRows / 3];
  for (int r = 0; r < kTileRows / 3; ++r) row[r] = (const char*)x + 3 * r * stride;
  for (int64_t k = 0; k < pairs; ++k, weight += kTileColumns) {
    Lanes32 w[kVectors];
    for (int v = 0; v < kVectors; ++v) memcpy(&w[v], weight + v * kColumns, kVectorBytes);
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows / 3; ++r) {
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const Lanes32 a = pair_at(row[r] + i * stride);
        for (int v = 0; v < kVectors; ++v) sums[3 * r + i][v] = Add::add(sums[3 * r + i][v], a, w[v]);
      }
      row[r] += 4;
    }
  }
  int32_t done[kTileRows][kVectors * kColumns];
  memcpy(done, sums, sizeof done);
  for (int64_t r = 0; r < rows; ++r, out += outputs) {
    if (first)
      for (int64_t c = 0; c < columns; ++c) out[c] = widened<Out>(done[r][c]);
    else
      for (int64_t c = 0; c < columns; ++c) out[c] += widened<Out>(done[r][c]);
  }
}

// One row of the gathered matrix: what the taps of an output pixel see, 0 beyond the image, of a group's channels.
FC_INLINE void gather_row(const IntegerConv& p, int64_t group, int64_t row, int16_t* to) {
  const int64_t channels = p.channels / p.groups, depth = p.depth();
  const int64_t x = row % p.out_width, y = row / p.out_width % p.out_height, image = row / (p.out_width * p.out_height);
  const int64_t left = x * p.stride[1] - p.padding[1], right = left + (p.kernel[1] - 1) * p.dilation[1];
  const bool whole = left >= 0 && right < p.width && p.dilation[1] == 1 && p.groups == 1;
  to[depth] = 0;  // the other half of the last pair where depth is odd
  for (int64_t ky = 0; ky < p.kernel[0]; ++ky) {
    const int64_t line = y * p.stride[0] - p.padding[0] + ky * p.dilation[0];
    if (line < 0 || line >= p.height) {
      memset(to, 0, p.kernel[1] * channels * 2);
      to += p.kernel[1] * channels;
      continue;
    }
    const int16_t* from = p.x + (image * p.height + line) * p.width * p.channels + group * channels;
    if (whole) {
      memcpy(to, from + left * channels, p.kernel[1] * channels * 2);
      to += p.kernel[1] * channels;
      continue;
    }
    for (int64_t kx = 0; kx < p.kernel[1]; ++kx, to += channels) {
      const int64_t column = left + kx * p.dilation[1];
      if (column < 0 || column >= p.width)
        memset(to, 0, channels * 2);
      else
        memcpy(to, from + column * p.channels, channels * 2);
    }
  }
}

FC_INLINE int64_t integer_row_elements(const IntegerConv& p) { return p.pairs() * 2 + 2; }  // 2: gather_row's zero
FC_INLINE int64_t integer_panel_tiles(const IntegerConv& p) {
  const int64_t tiles = kPanelBytes / (integer_row_elements(p) * 2 * kTileRows);
  return tiles < 1 ? 1 : tiles;
}
FC_INLINE int64_t integer_column_blocks(const IntegerConv& p) {
  return (p.outputs / p.groups + kTileColumns - 1) / kTileColumns;
}
static int64_t integer_scratch_bytes(const IntegerConv& p) {
  return integer_panel_tiles(p) * kTileRows * integer_row_elements(p) * 2;
}
static int64_t integer_blocks(const IntegerConv& p) { return integer_column_blocks(p) * p.groups; }
static int64_t integer_packed_pairs(const IntegerConv& p) { return integer_blocks(p) * p.pairs() * kTileColumns; }

// Blocks of columns [begin, end): [pairs][kTileColumns] of pairs, 0 where there is no column.
static void integer_pack(const IntegerConv& p, int64_t begin, int64_t end) {
  const int64_t depth = p.depth(), pairs = p.pairs(), outputs = p.outputs / p.groups;
  const int64_t blocks = integer_column_blocks(p);
  for (int64_t block = begin; block < end; ++block) {
    int32_t* to = p.packed + block * pairs * kTileColumns;
    const int64_t first = block % blocks * kTileColumns;
    const int64_t columns = outputs - first < kTileColumns ? outputs - first : kTileColumns;
    const int16_t* from = p.weight + (block / blocks * outputs + first) * depth;
    if (columns < kTileColumns) memset(to, 0, pairs * kTileColumns * 4);
    for (int64_t k = 0; k < depth / 2; ++k)
      for (int64_t c = 0; c < columns; ++c) memcpy(to + k * kTileColumns + c, from + c * depth + 2 * k, 4);
    if (depth % 2)
      for (int64_t c = 0; c < columns; ++c) {
        const int16_t last[2] = {from[c * depth + depth - 1], 0};
        memcpy(to + (pairs - 1) * kTileColumns + c, last, 4);
      }
  }
}

// Rows [first, first + rows) of a group against all its columns; `x` are those rows, gathered.
template <class Add, class Out>
FC_INLINE void integer_panel(const IntegerConv& p, int64_t group, int64_t first, int64_t rows, const int16_t* x,
                             int64_t stride) {
  const int64_t pairs = p.pairs(), outputs = p.outputs / p.groups, blocks = integer_column_blocks(p);
  const int64_t step = (p.block < kDepthBlock ? p.block : kDepthBlock) / 2;
  Out* out = (Out*)p.out + first * p.outputs + group * outputs;
  for (int64_t k = 0; k < pairs; k += step) {
    const int64_t some = pairs - k < step ? pairs - k : step;
    for (int64_t block = 0; block < blocks; ++block) {
      const int32_t* weight = p.packed + ((group * blocks + block) * pairs + k) * kTileColumns;
      const int64_t column = block * kTileColumns, columns = outputs - column;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int16_t* at = x + r * (stride / 2) + 2 * k;
        const int64_t few = rows - r < kTileRows ? rows - r : kTileRows;
        Out* to = out + r * p.outputs + column;
        if (columns > kColumns)
          tile<Add, kTileVectors>(at, stride, weight, some, to, p.outputs, few,
                                  columns < kTileColumns ? columns : kTileColumns, k == 0);
        else
          tile<Add, 1>(at, stride, weight, some, to, p.outputs, few, columns, k == 0);
      }
    }
  }
}

template <class Add, class Out>
void integer_product(const IntegerConv& p, int64_t begin, int64_t end, void* scratch) {
  const int64_t rows = p.rows(), tiles = (rows + kTileRows - 1) / kTileRows, panel = integer_panel_tiles(p);
  const int64_t elements = integer_row_elements(p);
  int16_t* gathered = (int16_t*)scratch;
  for (int64_t item = begin; item < end;) {
    const int64_t group = item / tiles, tile = item % tiles;
    int64_t some = end - item < panel ? end - item : panel;
    if (some > tiles - tile) some = tiles - tile;
    const int64_t first = tile * kTileRows;
    int64_t count = some * kTileRows;
    if (count > rows - first) count = rows - first;
    item += some;
    if (p.is_matrix() && count == some * kTileRows) {  // the last tile may reach beyond x
      integer_panel<Add, Out>(p, group, first, count, p.x + first * p.channels, p.channels * 2);
      continue;
    }
    for (int64_t r = 0; r < count; ++r) gather_row(p, group, first + r, gathered + r * elements);
    memset(gathered + count * elements, 0, (some * kTileRows - count) * elements * 2);
    integer_panel<Add, Out>(p, group, first, count, gathered, elements * 2);
  }
}

template <class Out>
void integer_product_best(const IntegerConv& p, int64_t begin, int64_t end, void* scratch) {
#if FASTCIFAR_VECTOR_BYTES == 64
  if (__builtin_cpu_supports("avx512vnni")) return integer_product<DotProduct, Out>(p, begin, end, scratch);
#endif
  integer_product<MultiplyAdd, Out>(p, begin, end, scratch);
}

// A channel a lane; an output is the sum over the taps in the type of the output.
template <class Out>
void integer_depthwise(const IntegerConv& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t x = row % p.out_width, y = row / p.out_width % p.out_height;
    const int64_t image = row / (p.out_width * p.out_height);
    Out* out = (Out*)p.out + row * p.channels;
    memset(out, 0, p.channels * sizeof(Out));
    for (int64_t ky = 0; ky < p.kernel[0]; ++ky) {
      const int64_t line = y * p.stride[0] - p.padding[0] + ky * p.dilation[0];
      if (line < 0 || line >= p.height) continue;
      for (int64_t kx = 0; kx < p.kernel[1]; ++kx) {
        const int64_t column = x * p.stride[1] - p.padding[1] + kx * p.dilation[1];
        if (column < 0 || column >= p.width) continue;
        const int16_t* from = p.x + ((image * p.height + line) * p.width + column) * p.channels;
        const int16_t* weight = p.weight + (ky * p.kernel[1] + kx) * p.channels;
        for (int64_t c = 0; c < p.channels; ++c) out[c] += Out(int32_t(from[c]) * int32_t(weight[c]));
      }
    }
  }
}

static int64_t integer_largest(const int16_t* x, int64_t n) {
  int16_t least = 0, most = 0;
  for (int64_t i = 0; i < n; ++i) {
    least = x[i] < least ? x[i] : least;
    most = x[i] > most ? x[i] : most;
  }
  return -int64_t(least) > most ? -int64_t(least) : most;
}

extern const IntegerKernels integer_kernels;
const IntegerKernels integer_kernels = {
    integer_largest,
    kTileRows,
    integer_blocks,
    integer_packed_pairs,
    integer_scratch_bytes,
    integer_pack,
    {integer_product_best<int32_t>, integer_product_best<int64_t>},
    {integer_depthwise<int32_t>, integer_depthwise<int64_t>},
};

}  // namespace fastcifar::FASTCIFAR_ISA
