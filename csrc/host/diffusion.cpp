// Steps of a linear diffusion solver and counted normal numbers on numpy arrays.
#include <limits>
#include <vector>

#include "arrays.h"

namespace fastcifar {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One sample: all arrays are of one length. `inputs` are x, output and what is kept; `results` converted, corrected and
// the next x; None for what there is not.
struct HostStep {
  StepProblem p;
  int dtype;
  std::vector<Array> inputs;

  HostStep(const std::string& name, const py::array& coefficients, std::vector<Array> given, const Array& noise,
           const Array& uncond, double guidance, double limit, std::optional<uint64_t> seed, uint64_t stream)
      : dtype(index_of(kDTypeNames, name, "dtype")), inputs(std::move(given)) {
    inputs.resize(kInputs);
    if (!inputs[kX]) throw py::value_error("expected x");
    p.length = inputs[kX]->size();
    p.coefficients = (const double*)data_of(coefficients, kCoefficients, 8, "coefficients");
    for (int t = 0; t < kInputs; ++t) p.in[t] = of(inputs[t], "inputs");
    p.noise = of(noise, "noise");
    p.uncond = of(uncond, "uncond");
    p.guidance = guidance;
    p.limit = limit;
    p.draws = seed.has_value();
    p.seed = seed.value_or(0);
    p.step = stream;
    const auto given_at = [&](int t) { return t == kNoise ? p.noise.data || p.draws : t >= kInputs || p.in[t].data; };
    for (int i = 0; i < kCoefficients; ++i)
      if (p.coefficients[i] != 0 && !given_at(i % kTerms)) throw py::value_error("expected what has a coefficient");
  }
  Samples of(const Array& a, const char* name) const {
    return {data_of(a, p.length, kItemSize[dtype], name), p.length};
  }
  static auto noise_scratch() { return scratch_of((kStepBlock + 2 * kNormalBlock) * sizeof(float)); }
};

std::vector<Array> of_rows(std::vector<Array> results) {
  results.resize(kRows);
  return results;
}

void solver_step(const std::string& isa, const std::string& dtype, py::array coefficients, std::vector<Array> inputs,
                 std::vector<Array> results, Array noise, Array uncond, double guidance, double limit,
                 std::optional<uint64_t> seed, uint64_t stream) {
  HostStep step(dtype, coefficients, std::move(inputs), noise, uncond, guidance, limit, seed, stream);
  results = of_rows(std::move(results));
  for (int r = 0; r < kRows; ++r) step.p.out[r] = step.of(results[r], "results");
  const auto drawn = HostStep::noise_scratch();
  diffusion_kernels(isa_of(isa)).step[step.dtype](step.p, 0, step.p.blocks(), (float*)drawn.get());
}

// Returns the gradients of the coefficients.
py::array solver_backward(const std::string& isa, const std::string& dtype, py::array coefficients,
                          std::vector<Array> inputs, std::vector<Array> grads, std::vector<Array> to_inputs,
                          Array noise, Array uncond, double guidance, double limit, std::optional<uint64_t> seed,
                          uint64_t stream) {
  HostStep step(dtype, coefficients, std::move(inputs), noise, uncond, guidance, limit, seed, stream);
  StepProblem& p = step.p;
  p.all_rows = true;
  StepGradients g;
  grads = of_rows(std::move(grads));
  to_inputs.resize(kInputs);
  for (int r = 0; r < kRows; ++r) g.grad[r] = step.of(grads[r], "grads");
  for (int t = 0; t < kInputs; ++t) g.to_in[t] = step.of(to_inputs[t], "to_inputs");
  std::vector<double> partial(p.blocks() * kCoefficients);
  g.sums = partial.data();
  const auto drawn = HostStep::noise_scratch();
  diffusion_kernels(isa_of(isa)).backward[step.dtype](p, g, 0, p.blocks(), (float*)drawn.get());
  py::array_t<double> sums({kRows, kTerms});
  for (int i = 0; i < kCoefficients; ++i) {
    double sum = 0;
    for (int64_t block = 0; block < p.blocks(); ++block) sum += partial[block * kCoefficients + i];
    sums.mutable_data()[i] = sum;
  }
  return sums;
}

void normal_numbers(const std::string& isa, uint64_t seed, uint64_t stream, int64_t first, py::array out) {
  if (first < 0 || first % kNormalBlock || out.size() % kNormalBlock)
    throw py::value_error("normal_numbers: expected whole blocks of " + std::to_string(kNormalBlock));
  diffusion_kernels(isa_of(isa)).normal(seed, stream, first, out.size(), (float*)data_of(out, out.size(), 4, "out"));
}

}  // namespace

void bind_diffusion(py::module_& m) {
  using namespace pybind11::literals;
  m.def("solver_step", &solver_step, "isa"_a, "dtype"_a, "coefficients"_a, "inputs"_a, "results"_a, py::kw_only(),
        "noise"_a = py::none(), "uncond"_a = py::none(), "guidance"_a = 1.0, "limit"_a = kInfinity,
        "seed"_a = py::none(), "stream"_a = 0,
        "Inputs are x, output and what is kept; results are converted, corrected and the next x.");
  m.def("solver_backward", &solver_backward, "isa"_a, "dtype"_a, "coefficients"_a, "inputs"_a, "grads"_a, "to_inputs"_a,
        py::kw_only(), "noise"_a = py::none(), "uncond"_a = py::none(), "guidance"_a = 1.0, "limit"_a = kInfinity,
        "seed"_a = py::none(), "stream"_a = 0, "Returns the gradients of the coefficients, [3, 11].");
  m.def("normal_numbers", &normal_numbers, "isa"_a, "seed"_a, "stream"_a, "first"_a, "out"_a,
        "Numbers first ... of a stream, in float32; whole blocks of 64.");
}

}  // namespace fastcifar
