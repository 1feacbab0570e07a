// Which instruction set serves the raw kernels: the best one the machine has, unless FASTCIFAR_CPU_ISA names another.
#pragma once
#include "common_kernels.h"
#include "diffusion.h"
#include "earlyexit.h"
#include "fixedpoint.h"
#include "integer_matmul.h"
#include "packed.h"
#include "spectral.h"
#include "spiking.h"
#include "tree.h"

namespace fastcifar {

enum Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kIsas = 3, kIsaUnavailable = -1 };

// The best instruction set that this machine executes.
Isa best_isa();

// The one in use. The first call reads FASTCIFAR_CPU_ISA; kIsaUnavailable where that names one that this machine lacks.
Isa active_isa();

// Puts another one in use (tests compare them within one process); kIsaUnavailable, and no change, where it is lacking.
Isa select_isa(int isa);

// One table a family and instruction set.
const CommonKernels& common_kernels(Isa isa);
const IntegerKernels& integer_kernels(Isa isa);
const SpikingKernels& spiking_kernels(Isa isa);
const PackedKernels& packed_kernels(Isa isa);
const SpectralKernels& spectral_kernels(Isa isa);
const FixedPointKernels& fixedpoint_kernels(Isa isa);
const ExitKernels& exit_kernels(Isa isa);
const DiffusionKernels& diffusion_kernels(Isa isa);
const TreeKernels& tree_kernels(Isa isa);

}  // namespace fastcifar
