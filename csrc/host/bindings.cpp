// fastcifar._host: the raw kernels on numpy arrays, without torch. For development only (bit-exact tests of each
// instruction set, sanitizers, instruction counts, and the ceilings that the benchmarks hold their times against).
//
// Sequences are C-contiguous [T, N]; the element type is given by name, because numpy has no bfloat16 ("bfloat16" is
// passed as uint16).
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "arrays.h"

namespace fastcifar {
namespace {

struct Host {
  NeuronProblem problem;
  int64_t sequence, state, item, state_item;

  Host(const std::string& name, int neuron, int64_t steps, int64_t neurons, const std::vector<double>& numbers,
       std::optional<double> v_reset, bool stream)
      : sequence(steps * neurons), state(neurons) {
    if (neuron < 0 || neuron >= kNeurons) throw py::value_error("unknown neuron");
    if (numbers.size() < 3 || numbers.size() > 9) throw py::value_error("expected 3 to 9 numbers");
    problem.storage = index_of(kDTypeNames, name, "dtype");
    item = kItemSize[problem.storage];
    state_item = problem.storage == kFloat64 ? 8 : 4;
    problem.neuron = neuron;
    problem.steps = steps;
    problem.panels = 1;
    problem.neurons = neurons;
    problem.block = neuron_block(steps, state_item);
    for (size_t i = 0; i < numbers.size(); ++i)
      (i < 3 ? problem.parameters[i].number : problem.constants[i - 3]) = numbers[i];
    problem.hard_reset = v_reset.has_value();
    problem.v_reset = v_reset.value_or(0);
    problem.v_rest = neuron == kSignedIF ? 0.5 : problem.v_reset;
    problem.stream = stream;
  }
  Sequence of(const Array& a, const char* name, bool compute_type = false) const {
    return {data_of(a, sequence, compute_type ? state_item : item, name), problem.neurons, 0, 1};
  }
  void run(NeuronKernel const (&kernels)[2][kNeurons], bool backward) const {
    const ScratchPlan plan(problem, backward, state_item);
    const auto scratch = scratch_of(plan.bytes);
    kernels[problem.storage == kFloat64][problem.neuron](problem, 0, problem.blocks(), scratch.get());
  }
};

void neuron_forward(const std::string& isa, const std::string& dtype, int neuron, int64_t steps, int64_t neurons,
                    py::array x, Array v, py::array spikes, py::array v_last, Array v_seq,
                    const std::vector<double>& numbers, std::optional<double> v_reset, bool stream) {
  Host host(dtype, neuron, steps, neurons, numbers, v_reset, stream);
  NeuronProblem& p = host.problem;
  p.x = host.of(x, "x");
  p.spikes = host.of(spikes, "spikes");
  p.v_seq = host.of(v_seq, "v_seq", true);
  p.v = data_of(v, host.state, host.state_item, "v");
  p.v_last = data_of(v_last, host.state, host.state_item, "v_last");
  host.run(spiking_kernels(isa_of(isa)).forward, false);
}

void neuron_backward(const std::string& isa, const std::string& dtype, int neuron, int64_t steps, int64_t neurons,
                     py::array grad_spikes, Array grad_v_last, Array grad_v_seq, py::array x, Array v, py::array grad_x,
                     Array grad_v, const std::vector<double>& numbers, std::optional<double> v_reset, int surrogate,
                     const std::vector<double>& widths, bool detach_reset, bool stream) {
  if (surrogate < 0 || surrogate >= kSurrogates || widths.size() != 3) throw py::value_error("unknown surrogate");
  Host host(dtype, neuron, steps, neurons, numbers, v_reset, stream);
  NeuronProblem& p = host.problem;
  p.x = host.of(x, "x");
  p.grad_spikes = host.of(grad_spikes, "grad_spikes");
  p.grad_v_seq = host.of(grad_v_seq, "grad_v_seq", true);
  p.grad_x = host.of(grad_x, "grad_x");
  p.v = data_of(v, host.state, host.state_item, "v");
  p.grad_v_last = data_of(grad_v_last, host.state, host.state_item, "grad_v_last");
  p.grad_v = data_of(grad_v, host.state, host.state_item, "grad_v");
  p.surrogate = surrogate;
  for (int i = 0; i < 3; ++i) p.widths[i] = widths[i];
  p.detach_reset = detach_reset;
  host.run(spiking_kernels(isa_of(isa)).backward, true);
}

// Tokens [B, H, W, C] and weight [H, K, C, 2], C-contiguous, of one dtype (float32 or float64).
struct HostGrid {
  FftPlan rows, columns;
  SpectralProblem problem;
  const SpectralKernels& kernels;
  bool is_double;
  int64_t groups;

  HostGrid(const std::string& isa, const std::string& dtype, const py::array& x, const py::array& weight)
      : kernels(spectral_kernels(isa_of(isa))) {
    const int d = index_of(kDTypeNames, dtype, "dtype");
    if (d != kFloat32 && d != kFloat64) throw py::value_error("expected float32 or float64");
    if (x.ndim() != 4 || std::min(x.shape(1), x.shape(2)) < 1 || std::max(x.shape(1), x.shape(2)) > kLargestSide)
      throw py::value_error("expected x [B, H, W, C], H and W of 1 to 64");
    is_double = d == kFloat64;
    rows = make_fft_plan(int(x.shape(2)));
    columns = make_fft_plan(int(x.shape(1)));
    problem.rows = &rows;
    problem.columns = &columns;
    problem.batch = x.shape(0);
    problem.channels = x.shape(3);
    problem.x = tokens(x, x, d, "x");
    problem.weight = data_of(weight, x.shape(1) * (x.shape(2) / 2 + 1) * x.shape(3) * 2, kItemSize[d], "weight");
    groups = (problem.channels + kernels.lanes[is_double] - 1) / kernels.lanes[is_double];
    problem.panel = groups;
  }
  static Tokens tokens(const py::array& a, const py::array& like, int dtype, const char* name) {
    const int64_t row = like.shape(2) * like.shape(3);
    return {data_of(a, like.size(), kItemSize[dtype], name), like.shape(1) * row, row, like.shape(3), dtype};
  }
  void run(SpectralKernel kernel, int64_t items) const {
    const auto scratch = scratch_of(kernels.scratch_bytes(problem, is_double));
    kernel(problem, 0, items, scratch.get());
  }
};

void spectral_gate(const std::string& isa, const std::string& dtype, py::array x, py::array weight, py::array out) {
  HostGrid grid(isa, dtype, x, weight);
  grid.problem.out = HostGrid::tokens(out, x, grid.problem.x.dtype, "out");
  grid.run(grid.kernels.gate[grid.is_double], grid.problem.batch);
}

void spectral_backward(const std::string& isa, const std::string& dtype, py::array grad, py::array x, py::array weight,
                       py::array grad_x, py::array grad_weight) {
  HostGrid grid(isa, dtype, x, weight);
  SpectralProblem& p = grid.problem;
  p.grad = HostGrid::tokens(grad, x, p.x.dtype, "grad");
  p.out = HostGrid::tokens(grad_x, x, p.x.dtype, "grad_x");
  p.grad_weight = data_of(grad_weight, weight.size(), kItemSize[p.x.dtype], "grad_weight");
  p.conjugate = true;
  p.chunk = std::max<int64_t>(p.batch, 1);
  const int64_t lanes = grid.kernels.lanes[grid.is_double];
  std::vector<double> partial(grid.groups * x.shape(1) * (x.shape(2) / 2 + 1) * 2 * lanes);
  p.partial = partial.data();
  grid.run(grid.kernels.backward[grid.is_double], 1);
  grid.run(grid.kernels.reduce[grid.is_double], grid.groups);
}

// x [N, H, W, C] and weight [O, kH, kW, C / groups], or [kH, kW, C] where each channel has an output of its own; int16.
void integer_conv(const std::string& isa, py::array x, py::array weight, py::array out,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, int64_t groups) {
  const bool depthwise = weight.ndim() == 3;
  if (x.ndim() != 4 || (!depthwise && weight.ndim() != 4) || out.ndim() != 4)
    throw py::value_error("integer_conv: expected x [N, H, W, C], weight [O, kH, kW, C / groups] or [kH, kW, C], out");
  if (stride.size() != 2 || padding.size() != 2 || dilation.size() != 2 || out.itemsize() % 4)
    throw py::value_error("integer_conv: expected pairs, and out of int32 or int64");
  const IntegerKernels& kernels = integer_kernels(isa_of(isa));
  IntegerConv p;
  p.images = x.shape(0);
  p.height = x.shape(1);
  p.width = x.shape(2);
  p.channels = x.shape(3);
  p.outputs = depthwise ? p.channels : weight.shape(0);
  p.groups = depthwise ? p.channels : groups;
  for (int d = 0; d < 2; ++d) {
    p.kernel[d] = weight.shape(d + !depthwise);
    p.stride[d] = stride[d];
    p.padding[d] = padding[d];
    p.dilation[d] = dilation[d];
    if (stride[d] < 1 || padding[d] < 0 || dilation[d] < 1) throw py::value_error("integer_conv: expected sizes");
    const int64_t reach = x.shape(1 + d) + 2 * padding[d] - dilation[d] * (p.kernel[d] - 1) - 1;
    if (reach < 0) throw py::value_error("integer_conv: expected a kernel no larger than the padded image");
    (d ? p.out_width : p.out_height) = reach / stride[d] + 1;
  }
  if (p.groups < 1 || p.channels % p.groups || p.outputs % p.groups) throw py::value_error("integer_conv: bad groups");
  p.x = (const int16_t*)data_of(x, p.images * p.height * p.width * p.channels, 2, "x");
  p.weight = (const int16_t*)data_of(weight, p.outputs * p.depth(), 2, "weight");
  p.out = data_of(out, p.rows() * p.outputs, out.itemsize(), "out");
  const int64_t product = kernels.largest(p.x, x.size()) * kernels.largest(p.weight, weight.size());
  p.block = std::max<int64_t>(INT32_MAX / std::max<int64_t>(product, 1), 2) / 2 * 2;
  const bool wide = out.itemsize() == 8;
  if (p.is_depthwise()) return kernels.depthwise[wide](p, 0, p.rows());
  const auto packed = scratch_of(kernels.packed_pairs(p) * 4), scratch = scratch_of(kernels.scratch_bytes(p));
  p.packed = (int32_t*)packed.get();
  kernels.pack(p, 0, kernels.blocks(p));
  const int64_t tiles = (p.rows() + kernels.tile_rows - 1) / kernels.tile_rows;
  kernels.product[wide](p, 0, tiles * p.groups, scratch.get());
}

// One binary point for all of x; with `grad` the backward. Returns the latter's sum, 0 without.
double fixed_cast(const std::string& isa, const std::string& dtype, py::array x, Array grad, py::array out, int width,
                  int frac_bits, int rounding, int overflow, bool is_signed, int saturated_bits, uint64_t seed) {
  if (width < 1 || width > 32 || rounding < 0 || rounding >= kRoundings || overflow < 0 || overflow >= kOverflows)
    throw py::value_error("fixed_cast: expected a width of 1 to 32 and modes");
  Format f;
  f.width = width;
  f.rounding = rounding;
  f.overflow = overflow;
  f.saturated_bits = saturated_bits;
  f.is_signed = is_signed;
  CastProblem p;
  p.dtype = index_of(kDTypeNames, dtype, "dtype");
  p.x = data_of(x, x.size(), kItemSize[p.dtype], "x");
  p.grad = data_of(grad, x.size(), kItemSize[p.dtype], "grad");
  p.out = data_of(out, x.size(), kItemSize[p.dtype], "out");
  p.rounder = f.rounder();
  p.bounder = f.bounder();
  p.length = p.total = x.size();
  const bool is_double = p.dtype == kFloat64 || width > 24 || frac_bits < 0;
  const Cast<float> single(f, frac_bits, seed);
  const Cast<double> twice(f, frac_bits, seed);
  p.casts = is_double ? (const void*)&twice : &single;
  std::vector<double> sums(p.items());
  p.partial = sums.data();
  const auto scratch = scratch_of(kCastScratch * kCastBlock * 8);
  const FixedPointKernels& kernels = fixedpoint_kernels(isa_of(isa));
  (grad ? kernels.backward : kernels.forward)[is_double](p, 0, p.items(), scratch.get());
  double sum = 0;
  for (double part : sums) sum += part;
  return sum;
}

int64_t peak_flops(const std::string& isa, int64_t iterations) {
  const CommonKernels& kernels = common_kernels(isa_of(isa));
  py::gil_scoped_release release;
  return kernels.multiply_add(iterations);
}

void on_array(const ArrayKernel (&kernels)[kDTypes], const std::string& dtype, const py::array& x,
              const py::array& out) {
  const int d = index_of(kDTypeNames, dtype, "dtype");
  if (d != kFloat32 && d != kFloat64) throw py::value_error("expected float32 or float64");
  const void* from = data_of(x, x.size(), kItemSize[d], "x");
  kernels[d](from, data_of(out, x.size(), kItemSize[d], "out"), x.size());
}
void exp(const std::string& isa, const std::string& dtype, py::array x, py::array out) {
  on_array(common_kernels(isa_of(isa)).exp, dtype, x, out);
}
void log(const std::string& isa, const std::string& dtype, py::array x, py::array out) {
  on_array(common_kernels(isa_of(isa)).log, dtype, x, out);
}

int64_t exit_decide(const std::string& isa, const std::string& dtype, py::array logits, double threshold, int criterion,
                    py::array score, py::array prediction, py::array exits, py::array keeps) {
  if (logits.ndim() != 2 || logits.shape(1) < 1) throw py::value_error("expected logits [B, K]");
  if (criterion < 0 || criterion >= kCriteria) throw py::value_error("unknown criterion");
  const int d = index_of(kDTypeNames, dtype, "dtype");
  ExitProblem p;
  p.rows = logits.shape(0);
  p.classes = p.row_stride = logits.shape(1);
  p.logits = data_of(logits, p.rows * p.classes, kItemSize[d], "logits");
  p.threshold = float(threshold);
  p.criterion = criterion;
  p.score = (float*)data_of(score, p.rows, 4, "score");
  p.prediction = (int64_t*)data_of(prediction, p.rows, 8, "prediction");
  p.exits = (int64_t*)data_of(exits, p.rows, 8, "exits");
  p.keeps = (int64_t*)data_of(keeps, p.rows, 8, "keeps");
  return exit_kernels(isa_of(isa)).decide[d](p, 0, p.rows);
}

TreeProblem tree_of(py::array value, py::array start, py::array count, py::array pool, double lam) {
  TreeProblem p;
  p.nodes = value.size();
  p.slots = pool.size();
  p.value = (const double*)data_of(value, p.nodes, 8, "value");
  p.start = (const int64_t*)data_of(start, p.nodes, 8, "start");
  p.count = (const int64_t*)data_of(count, p.nodes, 8, "count");
  p.pool = (const int64_t*)data_of(pool, p.slots, 8, "pool");
  p.lam = lam;
  return p;
}

void tree_sample(const std::string& isa, py::array value, py::array start, py::array count, py::array pool, double lam,
                 py::array roots, py::array uniform, py::array leaves) {
  TreeProblem p = tree_of(value, start, count, pool, lam);
  if (uniform.ndim() != 2) throw py::value_error("expected uniform [draws, levels]");
  const int64_t draws = uniform.shape(0);
  p.levels = uniform.shape(1);
  const int64_t* root = (const int64_t*)data_of(roots, draws, 8, "roots");
  const double* numbers = (const double*)data_of(uniform, uniform.size(), 8, "uniform");
  int64_t* leaf = (int64_t*)data_of(leaves, draws, 8, "leaves");
  for (int64_t i = 0; i < draws; ++i) leaf[i] = tree_kernels(isa_of(isa)).descend(p, root[i], numbers + i * p.levels);
}

bool tree_soften(const std::string& isa, py::array value, py::array start, py::array count, py::array pool, double lam,
                 py::array nodes) {
  const TreeProblem p = tree_of(value, start, count, pool, lam);
  const int64_t* given = (const int64_t*)data_of(nodes, nodes.size(), 8, "nodes");
  return tree_kernels(isa_of(isa)).soften(p, (double*)value.mutable_data(), given, nodes.size());
}

void convert(const std::string& isa, const std::string& dtype, bool widen, py::array from, py::array to) {
  const int d = index_of(kDTypeNames, dtype, "dtype");
  if (d != kBFloat16 && d != kFloat16) throw py::value_error("convert: expected bfloat16 or float16");
  const void* source = data_of(from, from.size(), widen ? 2 : 4, "from");
  void* target = data_of(to, from.size(), widen ? 4 : 2, "to");
  const CommonKernels& kernels = common_kernels(isa_of(isa));
  (widen ? kernels.widen : kernels.narrow)[d](source, target, from.size());
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  using namespace pybind11::literals;
  m.doc() = "The raw kernels on numpy arrays (C-contiguous [T, N]), without torch; for development.";
  m.def(
      "isas",
      [] {
        py::list names;
        for (int isa = 0; isa <= best_isa(); ++isa) names.append(kIsaNames[isa]);
        return names;
      },
      "Instruction sets that this machine executes, best last.");
  const std::vector<double> lif{2.0, 1.0, 0.0}, atan{1.0, 3.141592653589793, 0.0};  // tau, threshold; alpha = 2
  m.def("neuron_forward", &neuron_forward, "isa"_a, "dtype"_a, "neuron"_a, "steps"_a, "neurons"_a, "x"_a, "v"_a,
        "spikes"_a, "v_last"_a, "v_seq"_a = py::none(), py::kw_only(), "numbers"_a = lif, "v_reset"_a = 0.0,
        "stream"_a = false,
        "A neuron (NeuronId in csrc/cpu/spiking.h) over all steps; numbers are leak, threshold, ...");
  m.def("neuron_backward", &neuron_backward, "isa"_a, "dtype"_a, "neuron"_a, "steps"_a, "neurons"_a, "grad_spikes"_a,
        "grad_v_last"_a, "grad_v_seq"_a, "x"_a, "v"_a, "grad_x"_a, "grad_v"_a, py::kw_only(), "numbers"_a = lif,
        "v_reset"_a = 0.0, "surrogate"_a = 0, "widths"_a = atan, "detach_reset"_a = false, "stream"_a = false);
  m.def("spectral_gate", &spectral_gate, "isa"_a, "dtype"_a, "x"_a, "weight"_a, "out"_a,
        "irfft2(rfft2(x) * weight) of tokens [B, H, W, C].");
  m.def("spectral_backward", &spectral_backward, "isa"_a, "dtype"_a, "grad"_a, "x"_a, "weight"_a, "grad_x"_a,
        "grad_weight"_a);
  const std::vector<int64_t> ones{1, 1}, zeros{0, 0};
  m.def("integer_conv", &integer_conv, "isa"_a, "x"_a, "weight"_a, "out"_a, py::kw_only(), "stride"_a = ones,
        "padding"_a = zeros, "dilation"_a = ones, "groups"_a = 1,
        "Exact convolution of int16 images [N, H, W, C] into int32 or int64.");
  m.def("fixed_cast", &fixed_cast, "isa"_a, "dtype"_a, "x"_a, "grad"_a, "out"_a, py::kw_only(), "width"_a,
        "frac_bits"_a, "rounding"_a, "overflow"_a, "signed"_a = true, "saturated_bits"_a = 0, "seed"_a = 0,
        "The cast of x, or with grad its backward and the sum of the gradient to the binary point.");
  m.def("peak_flops", &peak_flops, "isa"_a, "iterations"_a,
        "Runs independent float32 multiplications and additions and returns how many operations it did.");
  m.def("exp", &exp, "isa"_a, "dtype"_a, "x"_a, "out"_a);
  m.def("log", &log, "isa"_a, "dtype"_a, "x"_a, "out"_a, "Of positive normal numbers.");
  m.def("exit_decide", &exit_decide, "isa"_a, "dtype"_a, "logits"_a, "threshold"_a, "criterion"_a, "score"_a,
        "prediction"_a, "exits"_a, "keeps"_a, "Writes scores, predictions and both lists; returns how many are kept.");
  m.def("tree_sample", &tree_sample, "isa"_a, "value"_a, "start"_a, "count"_a, "pool"_a, "lam"_a, "roots"_a,
        "uniform"_a, "leaves"_a, "Ends of Boltzmann descents; -1 where the arrays are not a tree.");
  m.def("tree_soften", &tree_soften, "isa"_a, "value"_a, "start"_a, "count"_a, "pool"_a, "lam"_a, "nodes"_a,
        "Soft values of these nodes in place, in their order; False where the arrays are not a tree.");
  m.def("convert", &convert, "isa"_a, "dtype"_a, "widen"_a, "from_"_a, "to"_a,
        "Between float32 and bfloat16 or float16 bits (uint16).");
  bind_diffusion(m);
}

}  // namespace fastcifar
