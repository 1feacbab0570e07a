// The extension's entry point: every schema (fastcifar/_schemas.inc) and, a block a family, its CPU implementation.
#include "ops.h"

#include <Python.h>

#include "common.h"

#define FC_STRING(x) #x
#define FC_EXPAND(x) FC_STRING(x)
// Read from the file's bytes before the library is loaded (fastcifar/_library.py): a binary that was built for another
// version must not run.
extern "C" __attribute__((used, visibility("default"))) const char fastcifar_build_stamp[] =
    "fastcifar-build-stamp:" FC_EXPAND(FASTCIFAR_VERSION) ";";

namespace fastcifar {

static int64_t cpu_isa(int64_t isa) {
  if (isa < 0) return active_isa();
  return isa < kIsas ? select_isa(int(isa)) : kIsaUnavailable;
}

static void stream_copy(Tensor dst, Tensor src) {
  const int64_t bytes = dst.numel() * dst.element_size();
  FC_CHECK(dst.is_cpu() && src.is_cpu() && dst.is_contiguous() && src.is_contiguous() &&
               src.numel() * int64_t(src.element_size()) == bytes,
           "_stream_copy: expected two contiguous CPU tensors of as many bytes");
  char* to = (char*)dst.data_ptr();
  const char* from = (const char*)src.data_ptr();
  const auto copy = common_kernels(checked_isa()).stream_copy;
  constexpr int64_t kPiece = 4096;
  parallel_for((bytes + kPiece - 1) / kPiece, kGrain / kPiece, [&](int64_t begin, int64_t end) {
    copy(to + begin * kPiece, from + begin * kPiece, std::min(end * kPiece, bytes) - begin * kPiece);
  });
}

}  // namespace fastcifar

STABLE_TORCH_LIBRARY(fastcifar, m) {
  const char* const schemas[] = {
#include "../fastcifar/_schemas.inc"
  };
  for (const char* schema : schemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(fastcifar, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&fastcifar::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(fastcifar, CPU, m) {
  m.impl("_stream_copy", TORCH_BOX(&fastcifar::stream_copy));
  // spiking
  m.impl("neuron_forward", TORCH_BOX(&fastcifar::neuron_forward));
  m.impl("neuron_backward", TORCH_BOX(&fastcifar::neuron_backward));
  m.impl("packed_conv", TORCH_BOX(&fastcifar::packed_conv));
  // spectral
  m.impl("spectral_gate_forward", TORCH_BOX(&fastcifar::spectral_gate_forward));
  m.impl("spectral_gate_backward", TORCH_BOX(&fastcifar::spectral_gate_backward));
  m.impl("spectrum_forward", TORCH_BOX(&fastcifar::spectrum_forward));
  m.impl("spectrum_inverse", TORCH_BOX(&fastcifar::spectrum_inverse));
  m.impl("spectrum_real_parts", TORCH_BOX(&fastcifar::spectrum_real_parts));
  // fixedpoint
  m.impl("fixed_quantize", TORCH_BOX(&fastcifar::fixed_quantize));
  m.impl("fixed_to_raw", TORCH_BOX(&fastcifar::fixed_to_raw));
  m.impl("fixed_quantize_backward", TORCH_BOX(&fastcifar::fixed_quantize_backward));
  m.impl("limit_digits", TORCH_BOX(&fastcifar::limit_digits));
  m.impl("integer_conv", TORCH_BOX(&fastcifar::integer_conv));
  // earlyexit
  m.impl("exit_decide", TORCH_BOX(&fastcifar::exit_decide));
  // diffusion
  m.impl("solver_step", TORCH_BOX(&fastcifar::solver_step));
  m.impl("solver_step_into", TORCH_BOX(&fastcifar::solver_step_into));
  m.impl("solver_table_step", TORCH_BOX(&fastcifar::solver_table_step));
  m.impl("solver_step_backward", TORCH_BOX(&fastcifar::solver_step_backward));
  m.impl("normal_numbers", TORCH_BOX(&fastcifar::normal_numbers));
  m.impl("magnitude_quantile", TORCH_BOX(&fastcifar::magnitude_quantile));
  // diffusion: tree search
  m.impl("tree_select", TORCH_BOX(&fastcifar::tree_select));
  m.impl("tree_sample", TORCH_BOX(&fastcifar::tree_sample));
  m.impl("tree_backup", TORCH_BOX(&fastcifar::tree_backup));
}

// Importing the file registers the ops above; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
