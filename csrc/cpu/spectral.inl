// Spectral mixing of one image and as many channels as a register has lanes at a time.
//
// Rows of the image are transformed in pairs (one complex transform for two real rows of the same channel, so that no
// channel meets another), columns are transformed, multiplied by the gate and transformed back, and rows again. Between
// the passes the image is W x H / 2 complex numbers in the first or second level of the cache; memory is read once and
// written once. Columns 0 and W / 2 of a real signal's spectrum are spectra of real signals themselves and share one
// transform. Factors (orthonormal transforms, pairs) are in the gate.
//
// Vector additions and multiplications of an image: 8 x 8: 1.2 k, 14 x 14: 7 k, 32 x 32: 35 k; loads and stores come to
// half as many.
#pragma once
#include "grid.inl"

namespace fastcifar::FASTCIFAR_ISA {

template <class A>
void spectral_gate(const SpectralProblem& p, int64_t begin, int64_t end, void* scratch) {
  Grid<A> grid(p, scratch);
  A *const tile = grid.s + grid.at.tile, *const g = grid.s + grid.at.g;
  int64_t prepared = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t panel = i / p.batch, b = i % p.batch, next = i + 1 < end ? i + 1 : i;
    auto x_ahead = grid.template ahead<0>(p.x, next / p.batch, next % p.batch);
    auto out_ahead = grid.template ahead<1>(p.stream ? Tokens{} : p.out, next / p.batch, next % p.batch);
    grid.each_group(panel, [&] {
      if (panel != prepared) grid.prepare_gate();
      grid.rows_in(p.x, b, tile, x_ahead);
      grid.edge_forward(tile, g);
      grid.gate_edge(tile, g);
      for (int n = 1; n <= grid.inner; ++n) {
        x_ahead.step();
        out_ahead.step();
        grid.template gated_column<kGate>(tile, n);
      }
      grid.rows_out(tile, p.out, b, out_ahead);
    });
    prepared = panel;
  }
  if (p.stream) stream_fence();
}

// Sums conj(spectrum of x) * (spectrum of the gradient) over the images of a chunk, and on the way back gates the
// gradient's spectrum with the conjugate weight.
template <class A>
void spectral_backward(const SpectralProblem& p, int64_t begin, int64_t end, void* scratch) {
  Grid<A> grid(p, scratch);
  A *const s = grid.s, *const tile = s + grid.at.tile, *const other = s + grid.at.other;
  A *const f = s + grid.at.f, *const g = s + grid.at.g;
  const int64_t column = int64_t(grid.h) * kPair<A>, all = grid.k * column;
  const int64_t panels = (grid.groups + p.panel - 1) / p.panel;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t chunk = i / panels, panel = i % panels, start = chunk * p.chunk;
    const int64_t stop = start + p.chunk < p.batch ? start + p.chunk : p.batch;
    grid.each_group(panel, [&] {
      if (p.out.data) grid.prepare_gate();
      memset(grid.own + grid.at.sum, 0, sizeof(A) * all);
    });
    for (int64_t b = start; b < stop; ++b) {
      const int64_t next = b + 1 < stop ? b + 1 : b;
      auto x_ahead = grid.template ahead<0>(p.x, panel, next), grad_ahead = grid.template ahead<0>(p.grad, panel, next);
      auto out_ahead = grid.template ahead<1>(p.stream ? Tokens{} : p.out, panel, next);
      grid.each_group(panel, [&] {
        A* const sum = grid.own + grid.at.sum;
        grid.rows_in(p.x, b, tile, x_ahead);
        grid.rows_in(p.grad, b, other, grad_ahead);
        grid.edge_forward(tile, f);
        grid.edge_forward(other, g);
        grid.add_edge_products(f, g, sum);
        if (p.out.data) grid.gate_edge(other, g);
        for (int n = 1; n <= grid.inner; ++n) {
          x_ahead.step();
          grid.column_forward(tile, n, f);
          grad_ahead.step();
          if (p.out.data) {
            grid.template gated_column<kGradient>(other, n, f, sum + n * column);
            out_ahead.step();
          } else {
            grid.column_forward(other, n, g);
            grid.add_products(f, g, sum + n * column);
          }
        }
        if (p.out.data) grid.rows_out(other, p.out, b, out_ahead);
      });
    }
    grid.each_group(panel, [&] {
      const int64_t group = grid.c / kLanes<A>;
      memcpy((A*)p.partial + (chunk * grid.groups + group) * all, grid.own + grid.at.sum, sizeof(A) * all);
    });
  }
  if (p.stream) stream_fence();
}

// Chunks in their order, whichever thread made them.
template <class A>
void spectral_reduce(const SpectralProblem& p, int64_t begin, int64_t end, void* scratch) {
  Grid<A> grid(p, scratch);
  const int64_t chunks = (p.batch + p.chunk - 1) / p.chunk;
  const int64_t column = int64_t(grid.h) * kPair<A>, all = grid.k * column;
  const double scale = 1.0 / (double(grid.h) * grid.w);
  for (int64_t group = begin; group < end; ++group) {
    grid.select(group * kLanes<A>, p.channels - group * kLanes<A>);
    for (int n = 0; n < grid.k; ++n) {
      const bool stands_for_two = n >= 1 && n <= grid.inner;
      // The spectra are twice their value; a column that stands for two counts twice.
      const A factor = A(stands_for_two ? scale / 2 : scale / 4);
      for (int j = 0; j < grid.h; ++j) {
        Z<A> total = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          total = total +
                  load_complex((const A*)p.partial + (chunk * grid.groups + group) * all + n * column + j * kPair<A>);
        A both[2 * kLanes<A>];
        for (int lane = 0; lane < kLanes<A>; ++lane) {
          both[2 * lane] = total.re[lane] * factor;
          both[2 * lane + 1] = total.im[lane] * factor;
        }
        const int64_t at = (int64_t(stands_for_two ? grid.order(j) : j) * grid.k + n) * p.channels + grid.c;
        memcpy((A*)p.grad_weight + 2 * at, both, sizeof(A) * 2 * grid.count);
      }
    }
  }
}

// One image of one group: where its tokens start, and the real parts of its spectrum's row 0 and column 0.
template <class A>
struct SpectrumItem {
  int64_t b, channel, rest;
  A* place;
  SpectrumItem(const SpectralProblem& p, int64_t i) {
    const int64_t size = p.channels / p.blocks, groups = (size + kLanes<A> - 1) / kLanes<A>;
    const int64_t block = i / groups % p.blocks, first = i % groups * kLanes<A>;
    b = i / (p.blocks * groups);
    channel = block * size + first;
    rest = size - first;
    place = (A*)p.spectrum + (block * p.batch + b) * p.columns->n * (p.rows->n / 2 + 1) * 2 * size + first;
  }
};

// Asks for a spectrum, which is read or written 64 bytes here and 64 bytes there.
template <int kWrite, class A>
FC_INLINE void prefetch_spectrum(const SpectralProblem& p, const A* place) {
  const int64_t step = p.channels / p.blocks, count = 2 * p.columns->n * (p.rows->n / 2 + 1);
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(place + i * step, kWrite, 2 + kWrite);
}

template <class A>
void spectrum_forward(const SpectralProblem& p, int64_t begin, int64_t end, void* scratch) {
  Grid<A> grid(p, scratch);
  A *const tile = grid.s + grid.at.tile, *const f = grid.s + grid.at.f;
  const int64_t size = p.channels / p.blocks;
  const double scale = 1 / __builtin_sqrt(double(grid.h) * grid.w);
  const A half = A(scale / 2), inner = A(scale / 2 * p.inner);
  for (int64_t i = begin; i < end; ++i) {
    const SpectrumItem<A> item(p, i), next(p, i + 1 < end ? i + 1 : i);
    A* const out = item.place;
    grid.select(item.channel, item.rest);
    const auto put = [&](int row, int n, Z<A> z) {
      A* to = out + (int64_t(row) * grid.k + n) * 2 * size;
      grid.put(to, z.re);
      grid.put(to + size, z.im);
    };
    typename Grid<A>::template Ahead<0> x_ahead(grid, p.x, next.b, next.channel, next.channel + grid.count, grid.pairs);
    prefetch_spectrum<1>(p, out);
    grid.rows_in(p.x, item.b, tile, x_ahead);
    grid.edge_forward(tile, f);
    for (int n = 0; n < grid.h; ++n) {
      const Z<A> z = load_complex(f + n * kPair<A>), m = grid.mirrored(f, n), u = z + m, v = minus_i(z - m);
      put(n, 0, {u.re * half, u.im * half});
      if (grid.w % 2 == 0) put(n, grid.w / 2, {v.re * half, v.im * half});
    }
    for (int n = 1; n <= grid.inner; ++n) {
      grid.column_forward(tile, n, f);
      for (int j = 0; j < grid.h; ++j) {
        const Z<A> z = load_complex(f + j * kPair<A>);
        put(grid.order(j), n, {z.re * inner, z.im * inner});
      }
    }
  }
}

template <class A>
void spectrum_inverse(const SpectralProblem& p, int64_t begin, int64_t end, void* scratch) {
  Grid<A> grid(p, scratch);
  A *const tile = grid.s + grid.at.tile, *const f = grid.s + grid.at.f;
  const int64_t size = p.channels / p.blocks;
  const double scale = 1 / __builtin_sqrt(double(grid.h) * grid.w);
  const A half = A(scale / 2), inner = A(scale * p.inner);
  for (int64_t i = begin; i < end; ++i) {
    const SpectrumItem<A> item(p, i), next(p, i + 1 < end ? i + 1 : i);
    const A* const in = item.place;
    grid.select(item.channel, item.rest);
    prefetch_spectrum<0>(p, next.place);
    typename Grid<A>::template Ahead<1> out_ahead(grid, p.out, next.b, next.channel, next.channel + grid.count,
                                                  grid.pairs);
    const auto get = [&](int row, int n) {
      const A* from = in + (int64_t(row) * grid.k + n) * 2 * size;
      return Z<A>{grid.get(from), grid.get(from + size)};
    };
    for (int n = 0; n < grid.h; ++n) {
      const int m = n ? grid.h - n : 0;
      const auto hermitian = [&](int column) {
        const Z<A> a = get(n, column), c = get(m, column);
        return Z<A>{(a.re + c.re) * half, (a.im - c.im) * half};
      };
      const Z<A> u = hermitian(0), v = grid.w % 2 ? Z<A>{} : hermitian(grid.w / 2);
      store_complex(f + n * kPair<A>, Z<A>{u.re - v.im, u.im + v.re});
    }
    grid.edge_inverse(tile, f);
    for (int n = 1; n <= grid.inner; ++n) {
      for (int row = 0; row < grid.h; ++row) {
        const Z<A> z = get(row, n);
        store_complex(f + row * kPair<A>, Z<A>{z.re * inner, z.im * inner});
      }
      grid.column_inverse(tile, n, f);
    }
    grid.rows_out(tile, p.out, item.b, out_ahead);
  }
}

template <class A>
void real_parts(const void* half, void* result, int64_t begin, int64_t end, int64_t tokens, int64_t channels) {
  constexpr int kL = kLanes<A>;
  const int64_t kept = channels / 2 + 1;
  I<A> even{}, backwards{};
  for (int i = 0; i < kL; ++i) even[i] = 2 * i, backwards[i] = 2 * (kL - 1 - i);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row % tokens;
    const A* const own = (const A*)half + row * kept * 2;
    const A* const mirror = (const A*)half + (row - n + (n ? tokens - n : 0)) * kept * 2;
    A* const out = (A*)result + row * channels;
    int64_t c = 0;
    for (; c + kL <= kept; c += kL)
      store(out + c, __builtin_shuffle(load(own + 2 * c, Full{}), load(own + 2 * c + kL, Full{}), even), Full{});
    for (; c < kept; ++c) out[c] = own[2 * c];
    for (; c + kL <= channels; c += kL) {  // from channels - c down to channels - c - (kL - 1)
      const A* const from = mirror + 2 * (channels - c - (kL - 1));
      store(out + c, __builtin_shuffle(load(from, Full{}), load(from + kL, Full{}), backwards), Full{});
    }
    for (; c < channels; ++c) out[c] = mirror[2 * (channels - c)];
  }
}

static int64_t spectral_scratch_bytes(const SpectralProblem& p, int is_double) {
  return is_double ? 8 * Scratch<double>(p).end : 4 * Scratch<float>(p).end;
}

extern const SpectralKernels spectral_kernels;
const SpectralKernels spectral_kernels = {
    {kLanes<float>, kLanes<double>},
    spectral_scratch_bytes,
    {spectral_gate<float>, spectral_gate<double>},
    {spectral_backward<float>, spectral_backward<double>},
    {spectral_reduce<float>, spectral_reduce<double>},
    {spectrum_forward<float>, spectrum_forward<double>},
    {spectrum_inverse<float>, spectrum_inverse<double>},
    {real_parts<float>, real_parts<double>},
};

}  // namespace fastcifar::FASTCIFAR_ISA
