// One image and one register of channels on its way through a spectrum: the passes over rows and columns that the
// kernels of spectral.inl are made of.
#pragma once
#include "codelets.inl"

namespace fastcifar::FASTCIFAR_ISA {

// Rows of a thread's scratch, in elements from its start.
template <class A>
struct Scratch {
  int64_t pitch;  // of a pair of rows; an odd number of complex numbers, so that no pair falls on another's cache sets
  int64_t slot;   // of one group of a panel: its gate, edge and sum, which start at the offsets below
  int64_t gate, edge, sum;
  int64_t tile, other, slots, t, u, f, g, stage, zero, waste, end;
  explicit Scratch(const SpectralProblem& p) {
    const int64_t h = p.columns->n, w = p.rows->n, k = w / 2 + 1, lanes = kLanes<A>;
    int64_t at = 0;
    const auto take = [&at](int64_t elements) { return at += elements, at - elements; };
    pitch = (w | 1) * 2 * lanes;
    tile = take((h + 1) / 2 * pitch);
    other = take((h + 1) / 2 * pitch);
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
    zero = take(2 * lanes);
    waste = take(2 * lanes);
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
  const bool written_out;           // columns of codelets.inl
  const bool fused;                 // columns with rounds of their own
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
        written_out(with_length<A>(h, []<int N>() {})),
        fused(!written_out && fused_columns<A>(*p.columns)),
        groups((p.channels + kL - 1) / kL) {
    for (int i = 0; i < kPair<A>; ++i) s[at.zero + i] = 0;
  }

  // Channels [first, first + lanes), or those that are left of `rest`.
  void select(int64_t first, int64_t rest) {
    c = first;
    count = rest < kL ? int(rest) : kL;
  }
  // Calls f for each group of a panel.
  template <class F>
  void each_group(int64_t panel, F f) {
    const int64_t first = panel * p.panel, stop = first + p.panel < groups ? first + p.panel : groups;
    for (int64_t group = first; group < stop; ++group) {
      select(group * kL, p.channels - group * kL);
      own = s + at.slots + (group - first) * at.slot;
      f();
    }
  }
  V<A> get(const A* from) const { return count == kL ? load(from, Full{}) : load(from, Tail{count}); }
  void put(A* to, V<A> x) const { count == kL ? store(to, x, Full{}) : store(to, x, Tail{count}); }
  int order(int j) const { return fused ? p.columns->out[j] : j; }  // frequency that stands at place j of a column
  int row(int i) const { return fused ? p.columns->in[i] : i; }     // row that is i-th in the pairs
  static A* column(A* tile, int n) { return tile + n * kPair<A>; }

  // ---- rows ----
  struct Pair {
    A *first, *second;
    int64_t stride, second_stride;
  };
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

  // What a thread will need next of an image and a panel, from the first pixel to the last, asked for a piece at a time
  // while it works on something else. Each group reads 64 bytes here and 64 bytes there, a pattern that the hardware
  // does not follow; a panel's pixels in the order of their addresses are one that it does.
  template <int kWrite>
  class Ahead {
   public:
    Ahead() = default;
    Ahead(const Grid& grid, const Tokens& t, int64_t b, int64_t first, int64_t last, int steps)
        : at_((const char*)t.data + (b * t.image + first) * bytes(t)),
          pixel_(t.pixel * bytes(t)),
          row_(t.row * bytes(t)),
          lines_(int(((last - first) * bytes(t) + 63) / 64)),
          width_(grid.w),
          pixels_(grid.h * grid.w),
          steps_(steps) {}
    void step() {
      if (step_ >= steps_) return;
      const int stop = int(int64_t(pixels_) * ++step_ / steps_);
      for (; done_ < stop; ++done_) {
        const char* from = at_ + column_ * pixel_;
        for (int i = 0; i < lines_; ++i) __builtin_prefetch(from + 64 * i, kWrite, 2 + kWrite);
        if (++column_ == width_) column_ = 0, at_ += row_;
      }
    }

   private:
    static int64_t bytes(const Tokens& t) { return t.dtype == kFloat64 ? 8 : t.dtype == kFloat32 ? 4 : 2; }
    const char* at_ = nullptr;
    int64_t pixel_ = 0, row_ = 0;
    int lines_ = 0, width_ = 1, pixels_ = 0, steps_ = 0, step_ = 0, done_ = 0, column_ = 0;
  };
  // Of a panel of an image; each of its groups takes a step at every pair of rows and every column.
  template <int kWrite>
  Ahead<kWrite> ahead(const Tokens& t, int64_t panel, int64_t b) const {
    if (!t.data) return {};
    const int64_t first = panel * p.panel, stop = first + p.panel < groups ? first + p.panel : groups;
    const int64_t last = stop * kL < p.channels ? stop * kL : p.channels;
    return {*this, t, b, first * kL, last, int(stop - first) * (pairs + inner)};
  }

  void rows_in(const Tokens& x, int64_t b, A* tile, Ahead<0>& next) const {
    const bool in_place = direct(x);
    for (int i = 0; i < pairs; ++i) {
      const bool lone = 2 * i + 1 == h;
      const int64_t first = b * x.image + row(2 * i) * x.row + c,
                    second = lone ? 0 : b * x.image + row(2 * i + 1) * x.row + c;
      next.step();
      Pair in;
      if (in_place) {
        in = {(A*)x.data + first, lone ? s + at.zero : (A*)x.data + second, x.pixel, lone ? 0 : x.pixel};
      } else {
        with_storage(x.dtype, x.data, [&](auto* data) {
          copy_in(data + first, x.pixel, s + at.stage);
          if (!lone) copy_in(data + second, x.pixel, s + at.stage + w * kL);
        });
        in = {s + at.stage, lone ? s + at.zero : s + at.stage + w * kL, kL, lone ? 0 : kL};
      }
      A* const to = tile + i * at.pitch;
      if (!with_length<A>(w, [&]<int N>() { row_forward<N, A>(in.first, in.second, in.stride, in.second_stride, to); }))
        fft<A>(*p.rows, {in.first, in.second, in.stride, in.second_stride}, packed_signal(to), s + at.t);
    }
  }
  void rows_out(A* tile, const Tokens& y, int64_t b, Ahead<1>& next) const {
    const bool whole = with_length<A>(w, []<int N>() {}), in_place = direct(y) && (whole || !p.stream);
    for (int i = 0; i < pairs; ++i) {
      const bool lone = 2 * i + 1 == h;
      const int64_t first = b * y.image + row(2 * i) * y.row + c,
                    second = lone ? 0 : b * y.image + row(2 * i + 1) * y.row + c;
      next.step();
      A *const from = tile + i * at.pitch, *const nowhere = s + at.waste, *const stage = s + at.stage;
      Pair out;
      if (in_place)
        out = {(A*)y.data + first, lone ? nowhere : (A*)y.data + second, y.pixel, lone ? 0 : y.pixel};
      else
        out = {stage, lone ? nowhere : stage + w * kL, kL, lone ? 0 : kL};
      if (!with_length<A>(w, [&]<int N>() {
            if (in_place && p.stream)
              row_inverse<N, true, A>(from, out.first, out.second, out.stride, out.second_stride);
            else
              row_inverse<N, false, A>(from, out.first, out.second, out.stride, out.second_stride);
          }))
        fft<A>(*p.rows, swapped(packed_signal(from)), {out.second, out.first, out.second_stride, out.stride}, s + at.t);
      if (in_place) continue;
      with_storage(y.dtype, y.data, [&](auto* data) {
        copy_out(stage, data + first, y.pixel);
        if (!lone) copy_out(stage + w * kL, data + second, y.pixel);
      });
    }
  }

  // ---- columns ----
  Column<A> pair_of_columns(A* tile, int n) const { return {column(tile, n), column(tile, w - n), at.pitch}; }
  // Column W / 2, or without one zeros or waste in its place, and from one pair of rows to the next in it.
  struct Last {
    A* at;
    int64_t pitch;
  };
  Last last_column(A* tile, int64_t instead) const {
    return w % 2 ? Last{s + instead, 0} : Last{column(tile, w / 2), at.pitch};
  }
  // The spectrum of column n (1 .. inner), twice the value, in places 0 .. h - 1.
  void column_forward(A* tile, int n, A* spectrum) const {
    const Column<A> col = pair_of_columns(tile, n);
    if (with_length<A>(h, [&]<int N>() { column_through<N, kNothing, A>(col, spectrum); })) return;
    if (fused) return fused_column<kNothing, A>(*p.columns, col, spectrum);
    A* u = s + at.u;
    for (int i = 0; i < pairs; ++i) {
      Z<A> first, second;
      unpack(col.zk + i * at.pitch, col.zm + i * at.pitch, first, second);
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
      pack(zk + i * at.pitch, zm + i * at.pitch, load_complex(u + row(2 * i) * kPair<A>), second);
    }
  }
  // Columns 0 and w / 2 as one complex column, in natural order.
  void edge_forward(A* tile, A* spectrum) const {
    const A* const z0 = column(tile, 0);
    const Last last = last_column(tile, at.zero);
    if (with_length<A>(h, [&]<int N>() { edge_through<N, A>(z0, last.at, at.pitch, last.pitch, spectrum); })) return;
    A* u = s + at.u;
    for (int i = 0; i < pairs; ++i) {
      const Z<A> a = load_complex(z0 + i * at.pitch), b = load_complex(last.at + i * last.pitch);
      store_complex(u + row(2 * i) * kPair<A>, Z<A>{a.re, b.re});
      if (2 * i + 1 < h) store_complex(u + row(2 * i + 1) * kPair<A>, Z<A>{a.im, b.im});
    }
    fft<A>(*p.columns, packed_signal(u), packed_signal(spectrum), s + at.t);
  }
  void edge_inverse(A* tile, A* spectrum) const {
    A *const z0 = column(tile, 0), *const u = s + at.u;
    const Last last = last_column(tile, at.waste);
    fft<A>(*p.columns, swapped(packed_signal(spectrum)), packed_signal(u), s + at.t);
    for (int i = 0; i < pairs; ++i) {
      const Z<A> first = load_complex(u + row(2 * i) * kPair<A>);
      const Z<A> second = 2 * i + 1 < h ? load_complex(u + row(2 * i + 1) * kPair<A>) : Z<A>{};
      store_complex(z0 + i * at.pitch, Z<A>{first.im, second.im});
      store_complex(last.at + i * last.pitch, Z<A>{first.re, second.re});
    }
  }
  // sum += conj(f) * g, all places of a column.
  void add_products(const A* f, const A* g, A* sum) const {
    for (int64_t i = 0; i < h * kPair<A>; i += kPair<A>)
      store_complex(sum + i, load_complex(sum + i) + conj_times(load_complex(f + i), load_complex(g + i)));
  }
  // The same for columns 0 and W / 2, whose spectra share f and g.
  void add_edge_products(const A* f, const A* g, A* sum) const {
    for (int n = 0; n < h; ++n) {
      const Z<A> x = load_complex(f + n * kPair<A>), x_mirror = mirrored(f, n);
      const Z<A> y = load_complex(g + n * kPair<A>), y_mirror = mirrored(g, n);
      A* const first = sum + n * kPair<A>;
      store_complex(first, load_complex(first) + conj_times(x + x_mirror, y + y_mirror));
      if (w % 2) continue;
      A* const last = first + w / 2 * h * kPair<A>;
      store_complex(last, load_complex(last) + conj_times(x - x_mirror, y - y_mirror));
    }
  }
  // Transform, (gradient of the weight,) gate and transform back of column n.
  template <Between kBetween>
  void gated_column(A* tile, int n, const A* spectrum = nullptr, A* sum = nullptr) const {
    const A* gate = own + at.gate + (n - 1) * h * kPair<A>;
    const Column<A> col{column(tile, n), column(tile, w - n), at.pitch, gate, spectrum, sum};
    if (with_length<A>(h, [&]<int N>() { column_through<N, kBetween, A>(col, nullptr); })) return;
    if (fused) return fused_column<kBetween, A>(*p.columns, col, s + at.t);
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
    const Last last = last_column(tile, at.waste);
    if (with_length<A>(h, [&]<int N>() {
          edge_back<N, A>(spectrum, own + at.edge, column(tile, 0), last.at, at.pitch, last.pitch);
        }))
      return;
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
