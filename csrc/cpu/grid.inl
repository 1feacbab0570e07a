// One image and one register of channels on its way through a spectrum: the passes over rows and columns that the
// kernels of spectral.inl are made of.
#pragma once
#include "fft.inl"

namespace fastcifar::FASTCIFAR_ISA {

// Rows of a thread's scratch, in elements from its start.
template <class A>
struct Scratch {
  int64_t line;  // of one column of pairs; odd in registers, so that no column falls on the cache sets of another
  int64_t slot;  // of one group of a panel: its gate, edge and sum, which start at the offsets below
  int64_t gate, edge, sum;
  int64_t tile, other, slots, t, u, f, g, stage, zero, waste, end;
  explicit Scratch(const SpectralProblem& p) {
    const int64_t h = p.columns->n, w = p.rows->n, k = w / 2 + 1, lanes = kLanes<A>;
    int64_t at = 0;
    const auto take = [&at](int64_t elements) { return at += elements, at - elements; };
    line = ((h + 1) / 2 * 2 + 1) * lanes;
    tile = take(w * line);
    other = take(w * line);
    gate = 0;
    edge = gate + k * h * 2 * lanes;
    sum = edge + 2 * h * 2 * lanes;
    slot = sum + (p.partial ? k * h * 2 * lanes : 0);
    slots = take(p.panel * slot);
    t = take(2 * kLargestSide * lanes);
    u = take(2 * kLargestSide * lanes);
    f = take(2 * kLargestSide * lanes);
    g = take(2 * kLargestSide * lanes);
    stage = take(2 * w * lanes);
    zero = take(lanes);
    waste = take(lanes);
    end = at;
  }
};

// One thread's view of a problem: the group of channels, the scratch, the steps.
template <class A>
struct Grid {
  const SpectralProblem& p;
  const Scratch<A> at;
  A* const s;
  const int h, w, k, pairs, inner;  // inner: columns 1 .. inner stand for two
  const bool fused;
  const int64_t groups;
  int64_t c = 0;
  int count = kLanes<A>;
  A* own = nullptr;  // the group's slot
  static constexpr int kL = kLanes<A>;

  Grid(const SpectralProblem& p, void* scratch)
      : p(p),
        at(p),
        s((A*)scratch),
        h(p.columns->n),
        w(p.rows->n),
        k(w / 2 + 1),
        pairs((h + 1) / 2),
        inner((w - 1) / 2),
        fused(fused_columns<A>(*p.columns)),
        groups((p.channels + kL - 1) / kL) {
    for (int i = 0; i < kL; ++i) s[at.zero + i] = 0;
  }

  // Channels [first, first + lanes), or those that are left of `rest`.
  void select(int64_t first, int64_t rest) {
    c = first;
    count = rest < kL ? int(rest) : kL;
  }
  // Calls f for each group of a panel, with the distance to the next one in elements, 0 at the last.
  template <class F>
  void each_group(int64_t panel, F f) {
    const int64_t first = panel * p.panel, stop = first + p.panel < groups ? first + p.panel : groups;
    for (int64_t group = first; group < stop; ++group) {
      select(group * kL, p.channels - group * kL);
      own = s + at.slots + (group - first) * at.slot;
      f(group + 1 < stop ? int64_t(kL) : int64_t(0));
    }
  }
  // From the panel's last group back to its first.
  int64_t rewind(int64_t panel) const { return c - panel * p.panel * kL; }
  V<A> get(const A* from) const { return count == kL ? load(from, Full{}) : load(from, Tail{count}); }
  void put(A* to, V<A> x) const { count == kL ? store(to, x, Full{}) : store(to, x, Tail{count}); }
  int order(int j) const { return fused ? p.columns->out[j] : j; }  // frequency that stands at place j of a column
  int row(int i) const { return fused ? p.columns->in[i] : i; }     // row that is i-th in the pairs
  A* column(A* tile, int n) const { return tile + n * at.line; }

  // ---- rows ----
  template <class S>
  void copy_in(const S* from, int64_t stride, A* to) const {
    for (int i = 0; i < w; ++i, from += stride, to += kL)
      store(to, count == kL ? load_as<A>(from, Full{}) : load_as<A>(from, Tail{count}), Full{});
  }
  template <class S>
  void copy_out(const A* from, S* to, int64_t stride) const {
    if (count == kL && p.stream)
      for (int i = 0; i < w; ++i, from += kL, to += stride) store_as(to, load(from, Full{}), Full{}, true);
    else if (count == kL)
      for (int i = 0; i < w; ++i, from += kL, to += stride) store_as(to, load(from, Full{}), Full{}, false);
    else
      for (int i = 0; i < w; ++i, from += kL, to += stride) store_as(to, load(from, Full{}), Tail{count}, false);
  }
  template <class F>
  static void with_storage(int dtype, void* data, F f) {
    if constexpr (sizeof(A) == 8)
      return dtype == kFloat64 ? f((double*)data) : f((float*)data);
    else
      return dtype == kFloat32 ? f((float*)data) : dtype == kBFloat16 ? f((bfloat16*)data) : f((float16*)data);
  }
  bool direct(const Tokens& x) const { return count == kL && x.dtype == (sizeof(A) == 4 ? kFloat32 : kFloat64); }

  // Asks for one row of pixels. Without it a thread waits for memory most of the time: 64 bytes a pixel, then a jump
  // over the other channels, is no pattern that the hardware follows.
  template <int kWrite>
  void prefetch_row(const Tokens& x, int64_t at) const {
    const int64_t bytes = x.dtype == kFloat64 ? 8 : x.dtype == kFloat32 ? 4 : 2;
    const char* from = (const char*)x.data + at * bytes;
    for (int i = 0; i < w; ++i, from += x.pixel * bytes) __builtin_prefetch(from, kWrite, 2 + kWrite);
  }

  void prefetch_image(const Tokens& out, int64_t b) const {
    for (int i = 0; i < h; ++i) prefetch_row<1>(out, b * out.image + i * out.row + c);
  }

  // `ahead`: elements from here to what the next call will read, 0 for nothing; `out`: what this image will be written
  // to, or null. Both are on their way while this image is worked on.
  void rows_in(const Tokens& x, int64_t b, A* tile, int64_t ahead, const Tokens* out = nullptr) const {
    for (int i = 0; i < pairs; ++i) {
      const bool lone = 2 * i + 1 == h;
      const int64_t first = b * x.image + row(2 * i) * x.row + c,
                    second = lone ? 0 : b * x.image + row(2 * i + 1) * x.row + c;
      for (int j = 2 * i; j < 2 * i + 2 - lone; ++j) {
        if (ahead) prefetch_row<0>(x, b * x.image + row(j) * x.row + c + ahead);
        if (out) prefetch_row<1>(*out, b * out->image + row(j) * out->row + c);
      }
      Signal<A> in;
      if (direct(x)) {
        in = {(A*)x.data + first, lone ? s + at.zero : (A*)x.data + second, x.pixel, lone ? 0 : x.pixel};
      } else {
        with_storage(x.dtype, x.data, [&](auto* data) {
          copy_in(data + first, x.pixel, s + at.stage);
          if (!lone) copy_in(data + second, x.pixel, s + at.stage + w * kL);
        });
        in = {s + at.stage, lone ? s + at.zero : s + at.stage + w * kL, kL, lone ? 0 : kL};
      }
      A* out = tile + i * kPair<A>;
      fft<A>(*p.rows, in, {out, out + kL, at.line, at.line}, s + at.t);
    }
  }
  void rows_out(A* tile, const Tokens& y, int64_t b) const {
    for (int i = 0; i < pairs; ++i) {
      const bool lone = 2 * i + 1 == h;
      const int64_t first = b * y.image + row(2 * i) * y.row + c,
                    second = lone ? 0 : b * y.image + row(2 * i + 1) * y.row + c;
      A* in = tile + i * kPair<A>;
      const Signal<A> from{in + kL, in, at.line, at.line};
      A* nowhere = s + at.waste;
      if (direct(y) && !p.stream) {
        A* data = (A*)y.data;
        fft<A>(*p.rows, from, {lone ? nowhere : data + second, data + first, lone ? 0 : y.pixel, y.pixel}, s + at.t);
      } else {
        A* stage = s + at.stage;
        fft<A>(*p.rows, from, {lone ? nowhere : stage + w * kL, stage, lone ? 0 : kL, kL}, s + at.t);
        with_storage(y.dtype, y.data, [&](auto* data) {
          copy_out(stage, data + first, y.pixel);
          if (!lone) copy_out(stage + w * kL, data + second, y.pixel);
        });
      }
    }
  }

  // ---- columns ----
  // The spectrum of column n (1 .. inner), twice the value, in places 0 .. h - 1.
  void column_forward(A* tile, int n, A* spectrum) const {
    const Column<A> col{column(tile, n), column(tile, w - n), nullptr, nullptr, nullptr};
    if (fused) return fused_column<kNothing, A>(*p.columns, col, spectrum);
    A* u = s + at.u;
    for (int i = 0; i < pairs; ++i) {
      Z<A> first, second;
      unpack(col.zk + i * kPair<A>, col.zm + i * kPair<A>, first, second);
      store_complex(u + 2 * i * kPair<A>, first);
      if (2 * i + 1 < h) store_complex(u + (2 * i + 1) * kPair<A>, second);
    }
    fft<A>(*p.columns, packed_signal(u), packed_signal(spectrum), s + at.t);
  }
  // Back from a spectrum in natural order, whatever `fused` says; spectrum is not kept.
  void column_inverse(A* tile, int n, A* spectrum) const {
    A *zk = column(tile, n), *zm = column(tile, w - n), *u = s + at.u;
    fft<A>(*p.columns, swapped(packed_signal(spectrum)), packed_signal(u), s + at.t);
    for (int i = 0; i < pairs; ++i) {
      const Z<A> second = 2 * i + 1 < h ? load_complex(u + row(2 * i + 1) * kPair<A>) : Z<A>{};
      pack(zk + i * kPair<A>, zm + i * kPair<A>, load_complex(u + row(2 * i) * kPair<A>), second);
    }
  }
  // Columns 0 and w / 2 as one complex column, in natural order.
  void edge_forward(A* tile, A* spectrum) const {
    const A *z0 = column(tile, 0), *zn = w % 2 ? nullptr : column(tile, w / 2);
    A* u = s + at.u;
    for (int i = 0; i < pairs; ++i) {
      const Z<A> a = load_complex(z0 + i * kPair<A>), b = zn ? load_complex(zn + i * kPair<A>) : Z<A>{};
      store_complex(u + row(2 * i) * kPair<A>, Z<A>{a.re, b.re});
      if (2 * i + 1 < h) store_complex(u + row(2 * i + 1) * kPair<A>, Z<A>{a.im, b.im});
    }
    fft<A>(*p.columns, packed_signal(u), packed_signal(spectrum), s + at.t);
  }
  void edge_inverse(A* tile, A* spectrum) const {
    A *z0 = column(tile, 0), *zn = w % 2 ? nullptr : column(tile, w / 2), *u = s + at.u;
    fft<A>(*p.columns, swapped(packed_signal(spectrum)), packed_signal(u), s + at.t);
    for (int i = 0; i < pairs; ++i) {
      const Z<A> first = load_complex(u + row(2 * i) * kPair<A>);
      const Z<A> second = 2 * i + 1 < h ? load_complex(u + row(2 * i + 1) * kPair<A>) : Z<A>{};
      store_complex(z0 + i * kPair<A>, Z<A>{first.im, second.im});
      if (zn) store_complex(zn + i * kPair<A>, Z<A>{first.re, second.re});
    }
  }
  // sum += conj(f) * g, all places of a column.
  void add_products(const A* f, const A* g, A* sum) const {
    for (int64_t i = 0; i < h * kPair<A>; i += kPair<A>)
      store_complex(sum + i, load_complex(sum + i) + conj_times(load_complex(f + i), load_complex(g + i)));
  }
  // Transform, (gradient of the weight,) gate and transform back of column n.
  template <Between kBetween>
  void gated_column(A* tile, int n, const A* spectrum = nullptr, A* sum = nullptr) const {
    const A* gate = own + at.gate + (n - 1) * h * kPair<A>;
    if (fused)
      return fused_column<kBetween, A>(*p.columns, {column(tile, n), column(tile, w - n), gate, spectrum, sum},
                                       s + at.t);
    A* g = s + at.g;
    column_forward(tile, n, g);
    if (kBetween == kGradient) add_products(spectrum, g, sum);
    for (int64_t i = 0; i < h * kPair<A>; i += kPair<A>)
      store_complex(g + i, load_complex(g + i) * load_complex(gate + i));
    column_inverse(tile, n, g);
  }
  Z<A> mirrored(const A* spectrum, int n) const {  // conj of frequency -n
    const Z<A> z = load_complex(spectrum + (n ? h - n : 0) * kPair<A>);
    return {z.re, -z.im};
  }

  // ---- the gate: factors and symmetry, once for all images of the batch ----
  Z<A> weight(int row, int n) const {
    typedef I<A> Index;
    const A* from = (const A*)p.weight + ((int64_t(row) * k + n) * p.channels + c) * 2;
    const int low_count = 2 * count < kL ? 2 * count : kL;
    const V<A> low = count == kL ? load(from, Full{}) : load(from, Tail{low_count});
    const V<A> high = count == kL ? load(from + kL, Full{}) : load(from + low_count, Tail{2 * count - low_count});
    Index even{}, odd{};
    for (int i = 0; i < kL; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return {__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, odd)};
  }
  void prepare_gate() const {
    const A scale = A(1.0 / (double(h) * w)), sign = p.conjugate ? A(-1) : A(1);
    for (int n = 1; n <= inner; ++n)
      for (int j = 0; j < h; ++j) {
        const Z<A> z = weight(order(j), n);
        store_complex(own + at.gate + ((n - 1) * h + j) * kPair<A>,
                      Z<A>{z.re * (scale / 2), z.im * (scale / 2 * sign)});
      }
    // U and V, the two spectra, are (Z +- conj Z[-n]) / 2 (and / i): gated and put together again that is
    // (u + v) / 2 Z + (u - v) / 2 conj Z[-n], with the Hermitian parts u and v of the two columns' gates.
    for (int n = 0; n < h; ++n) {
      const int m = n ? h - n : 0;
      const auto hermitian = [&](int at_column) {
        const Z<A> a = weight(n, at_column), b = weight(m, at_column);
        return Z<A>{(a.re + b.re) * (scale / 2), (a.im - b.im) * (scale / 2 * sign)};
      };
      const Z<A> u = hermitian(0), v = w % 2 ? u : hermitian(w / 2), sum = u + v, difference = u - v;
      store_complex(own + at.edge + 2 * n * kPair<A>, Z<A>{sum.re * A(0.5), sum.im * A(0.5)});
      store_complex(own + at.edge + (2 * n + 1) * kPair<A>, Z<A>{difference.re * A(0.5), difference.im * A(0.5)});
    }
  }
  void gate_edge(A* tile, const A* spectrum) const {
    A* gated = s + at.f;
    for (int n = 0; n < h; ++n) {
      const A* edge = own + at.edge + 2 * n * kPair<A>;
      store_complex(gated + n * kPair<A>, load_complex(spectrum + n * kPair<A>) * load_complex(edge) +
                                              mirrored(spectrum, n) * load_complex(edge + kPair<A>));
    }
    edge_inverse(tile, gated);
  }
};

}  // namespace fastcifar::FASTCIFAR_ISA
