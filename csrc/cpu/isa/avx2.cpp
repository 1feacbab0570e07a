// Every family's kernels for AVX2: 256-bit registers, hardware float16 conversion.
#if defined(__x86_64__)
#pragma GCC target("avx2,f16c")
#define FASTCIFAR_ISA avx2
#define FASTCIFAR_VECTOR_BYTES 32
#include "../common_kernels.inl"
#include "../diffusion.inl"
#include "../earlyexit.inl"
#include "../fixedpoint.inl"
#include "../integer_matmul.inl"
#include "../packed.inl"
#include "../spectral.inl"
#include "../spiking.inl"
#include "../tree.inl"
#endif
