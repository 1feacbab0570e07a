// Every family's kernels for any machine: 128-bit registers (SSE2 on x86-64, NEON on Arm).
#define FASTCIFAR_ISA baseline
#define FASTCIFAR_VECTOR_BYTES 16
#include "../common_kernels.inl"
#include "../diffusion.inl"
#include "../earlyexit.inl"
#include "../fixedpoint.inl"
#include "../integer_matmul.inl"
#include "../packed.inl"
#include "../spectral.inl"
#include "../spiking.inl"
#include "../tree.inl"
