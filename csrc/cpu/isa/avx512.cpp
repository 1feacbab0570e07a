// Every family's kernels for AVX-512 (F, BW, DQ and VL): 512-bit registers.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")
#define FASTCIFAR_ISA avx512
#define FASTCIFAR_VECTOR_BYTES 64
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
