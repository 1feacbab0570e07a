// fastcifar._host: the raw kernels on numpy arrays, without torch. For development only (bit-exact tests of each
// instruction set, sanitizers, instruction counts, and the ceilings that the benchmarks hold their times against).
//
// Sequences are C-contiguous [T, N]; the element type is given by name, because numpy has no bfloat16 ("bfloat16" is
// passed as uint16).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "../cpu/dispatch.h"

namespace py = pybind11;

namespace fastcifar {
namespace {

const char* const kIsaNames[kIsas] = {"baseline", "avx2", "avx512"};
const char* const kDTypeNames[kDTypes] = {"float32", "float64", "bfloat16", "float16"};
constexpr int64_t kItemSize[kDTypes] = {4, 8, 2, 2};

template <int n>
int index_of(const char* const (&names)[n], const std::string& name, const char* what) {
  for (int i = 0; i < n; ++i)
    if (name == names[i]) return i;
  throw py::value_error(std::string("unknown ") + what + " '" + name + "'");
}

Isa isa_of(const std::string& name) {
  const int isa = index_of(kIsaNames, name, "instruction set");
  if (isa > best_isa()) throw py::value_error("this machine does not execute " + name);
  return Isa(isa);
}

using Array = std::optional<py::array>;

void* data_of(const Array& a, int64_t elements, int64_t item, const char* name) {
  if (!a) return nullptr;
  if (!(a->flags() & py::array::c_style) || a->itemsize() != item || a->size() != elements)
    throw py::value_error(std::string("expected ") + name + " to be C-contiguous with " + std::to_string(elements) +
                          " elements of " + std::to_string(item) + " bytes");
  return const_cast<void*>(a->data());
}

struct Host {
  LifProblem problem;
  int dtype;
  int64_t sequence, state, item, state_item;

  Host(const std::string& name, int64_t steps, int64_t neurons, double tau, bool decay_input, double v_threshold,
       std::optional<double> v_reset, bool stream)
      : dtype(index_of(kDTypeNames, name, "dtype")),
        sequence(steps * neurons),
        state(neurons),
        item(kItemSize[dtype]),
        state_item(dtype == kFloat64 ? 8 : 4) {
    problem.steps = steps;
    problem.panels = 1;
    problem.neurons = neurons;
    problem.block = lif_block(steps, state_item);
    problem.tau = tau;
    problem.decay_input = decay_input;
    problem.v_threshold = v_threshold;
    problem.hard_reset = v_reset.has_value();
    problem.v_reset = v_reset.value_or(0);
    problem.stream = stream;
  }
  Sequence of(const Array& a, const char* name, bool compute_type = false) const {
    return {data_of(a, sequence, compute_type ? state_item : item, name), problem.neurons, 0};
  }
  void run(LifKernel kernel, int64_t rows) const {
    const std::unique_ptr<void, decltype(&std::free)> scratch(
        std::aligned_alloc(64, (rows * problem.block * state_item + 63) / 64 * 64), &std::free);
    kernel(problem, 0, problem.blocks(), scratch.get());
  }
};

void lif_forward(const std::string& isa, const std::string& dtype, int64_t steps, int64_t neurons, py::array x, Array v,
                 py::array spikes, py::array v_last, Array v_seq, double tau, bool decay_input, double v_threshold,
                 std::optional<double> v_reset, bool stream) {
  Host host(dtype, steps, neurons, tau, decay_input, v_threshold, v_reset, stream);
  LifProblem& p = host.problem;
  p.x = host.of(x, "x");
  p.spikes = host.of(spikes, "spikes");
  p.v_seq = host.of(v_seq, "v_seq", true);
  p.v = data_of(v, host.state, host.state_item, "v");
  p.v_last = data_of(v_last, host.state, host.state_item, "v_last");
  host.run(spiking_kernels(isa_of(isa)).lif_forward[host.dtype], 1);
}

void lif_backward(const std::string& isa, const std::string& dtype, int64_t steps, int64_t neurons,
                  py::array grad_spikes, Array grad_v_last, Array grad_v_seq, py::array x, Array v, py::array grad_x,
                  Array grad_v, double tau, bool decay_input, double v_threshold, std::optional<double> v_reset,
                  int surrogate, double alpha, bool detach_reset, bool stream) {
  if (surrogate < 0 || surrogate >= kSurrogates) throw py::value_error("unknown surrogate");
  Host host(dtype, steps, neurons, tau, decay_input, v_threshold, v_reset, stream);
  LifProblem& p = host.problem;
  p.x = host.of(x, "x");
  p.grad_spikes = host.of(grad_spikes, "grad_spikes");
  p.grad_v_seq = host.of(grad_v_seq, "grad_v_seq", true);
  p.grad_x = host.of(grad_x, "grad_x");
  p.v = data_of(v, host.state, host.state_item, "v");
  p.grad_v_last = data_of(grad_v_last, host.state, host.state_item, "grad_v_last");
  p.grad_v = data_of(grad_v, host.state, host.state_item, "grad_v");
  p.surrogate = surrogate;
  p.alpha = alpha;
  p.detach_reset = detach_reset;
  host.run(spiking_kernels(isa_of(isa)).lif_backward[host.dtype], steps + 1);
}

int64_t peak_flops(const std::string& isa, int64_t iterations) {
  const CommonKernels& kernels = common_kernels(isa_of(isa));
  py::gil_scoped_release release;
  return kernels.multiply_add(iterations);
}

void exp_nonpositive(const std::string& isa, const std::string& dtype, py::array x, py::array out) {
  const int d = index_of(kDTypeNames, dtype, "dtype");
  if (d != kFloat32 && d != kFloat64) throw py::value_error("exp_nonpositive: expected float32 or float64");
  const void* from = data_of(x, x.size(), kItemSize[d], "x");
  common_kernels(isa_of(isa)).exp_nonpositive[d](from, data_of(out, x.size(), kItemSize[d], "out"), x.size());
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
  m.def("lif_forward", &lif_forward, "isa"_a, "dtype"_a, "steps"_a, "neurons"_a, "x"_a, "v"_a, "spikes"_a, "v_last"_a,
        "v_seq"_a = py::none(), py::kw_only(), "tau"_a = 2.0, "decay_input"_a = true, "v_threshold"_a = 1.0,
        "v_reset"_a = 0.0, "stream"_a = false);
  m.def("lif_backward", &lif_backward, "isa"_a, "dtype"_a, "steps"_a, "neurons"_a, "grad_spikes"_a, "grad_v_last"_a,
        "grad_v_seq"_a, "x"_a, "v"_a, "grad_x"_a, "grad_v"_a, py::kw_only(), "tau"_a = 2.0, "decay_input"_a = true,
        "v_threshold"_a = 1.0, "v_reset"_a = 0.0, "surrogate"_a = 0, "alpha"_a = 2.0, "detach_reset"_a = false,
        "stream"_a = false);
  m.def("peak_flops", &peak_flops, "isa"_a, "iterations"_a,
        "Runs independent float32 multiplications and additions and returns how many operations it did.");
  m.def("exp_nonpositive", &exp_nonpositive, "isa"_a, "dtype"_a, "x"_a, "out"_a);
  m.def("convert", &convert, "isa"_a, "dtype"_a, "widen"_a, "from_"_a, "to"_a,
        "Between float32 and bfloat16 or float16 bits (uint16).");
}

}  // namespace fastcifar
