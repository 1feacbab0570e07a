#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace fastcifar {

#if defined(__x86_64__)
#define FC_TABLES(family, Table)                                                                   \
  namespace baseline {                                                                             \
  extern const Table family;                                                                       \
  }                                                                                                \
  namespace avx2 {                                                                                 \
  extern const Table family;                                                                       \
  }                                                                                                \
  namespace avx512 {                                                                               \
  extern const Table family;                                                                       \
  }                                                                                                \
  const Table& family(Isa isa) {                                                                   \
    static const Table* const tables[kIsas] = {&baseline::family, &avx2::family, &avx512::family}; \
    return *tables[isa];                                                                           \
  }
#else
#define FC_TABLES(family, Table) \
  namespace baseline {           \
  extern const Table family;     \
  }                              \
  const Table& family(Isa) { return baseline::family; }
#endif

FC_TABLES(common_kernels, CommonKernels)
FC_TABLES(integer_kernels, IntegerKernels)
FC_TABLES(spiking_kernels, SpikingKernels)
FC_TABLES(packed_kernels, PackedKernels)
FC_TABLES(spectral_kernels, SpectralKernels)
FC_TABLES(fixedpoint_kernels, FixedPointKernels)
FC_TABLES(exit_kernels, ExitKernels)
FC_TABLES(diffusion_kernels, DiffusionKernels)
FC_TABLES(tree_kernels, TreeKernels)

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return kAvx2;
#endif
  return kBaseline;
}

static Isa from_environment() {
  const char* wanted = std::getenv("FASTCIFAR_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  const char* const names[kIsas] = {"baseline", "avx2", "avx512"};
  for (int isa = 0; isa <= best_isa(); ++isa)
    if (std::strcmp(wanted, names[isa]) == 0) return Isa(isa);
  return kIsaUnavailable;
}

static std::atomic<int>& active() {
  static std::atomic<int> isa{from_environment()};
  return isa;
}

Isa active_isa() { return Isa(active().load(std::memory_order_relaxed)); }

Isa select_isa(int isa) {
  if (isa < kBaseline || isa > best_isa()) return kIsaUnavailable;
  active().store(isa, std::memory_order_relaxed);
  return Isa(isa);
}

}  // namespace fastcifar
