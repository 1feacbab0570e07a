"""csrc/cuda/spectral.cu without a GPU: what its threads do, run by the host compiler, and what nvcc makes of it."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastcifar.spectral import reference

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
SIDES = (4, 7, 8, 14, 16)

# The kernels of spectral.cu with loops for threads, and a barrier where a loop ends.
EMULATION = r"""
#include <vector>
#define FC_BUTTERFLIES emulated
#define FC_BUTTERFLY inline
#include "spectral_body.h"
using namespace emulated;
template <class T, int N, int LANES>
void forward(const T* x, const int64_t* by, const T* w, T* y, int64_t B, int64_t C, T sign) {
  using Here = Tile<T, N, LANES>;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t c = 0; c < C; ++c) {
      std::vector<T> memory(Here::kSize * LANES, T(NAN));
      T* tile = memory.data() + c % LANES;
      for (int job = 0; job < Here::kJobs; ++job) Here::rows(tile, job, x + b * by[0] + c, by[1], by[2]);
      for (int job = 0; job < Here::kSlots; ++job) {
        Complex<T> z[N];
        Here::column(tile, job, z);
        Here::gated(tile, job, z, w + 2 * c, C, sign);
      }
      for (int job = 0; job < Here::kJobs; ++job) Here::rows_back(tile, job, y + b * N * N * C + c, N * C, C);
    }
}
template <class T, int N>
void backward(const T* g, const T* x, const int64_t* by, const T* w, T* grad_x, T* out, int64_t B, int64_t C) {
  using Here = Tile<T, N, 32>;
  for (int64_t c = 0; c < C; ++c) {
    Complex<T> sums[Here::kSlots][N] = {};
    std::vector<T> memory(Here::kSize * 64, T(NAN));
    T *tile_g = memory.data() + c % 32, *tile_x = tile_g + Here::kSize * 32;
    for (int64_t b = 0; b < B; ++b) {
      for (int job = 0; job < Here::kJobs; ++job) {
        Here::rows(tile_g, job, g + b * by[0] + c, by[1], by[2]);
        Here::rows(tile_x, job, x + b * by[3] + c, by[4], by[5]);
      }
      for (int job = 0; job < Here::kSlots; ++job) {
        Complex<T> column_g[N], column_x[N];
        Here::column(tile_g, job, column_g);
        Here::column(tile_x, job, column_x);
        Here::accumulate(sums[job], job, column_x, column_g);
        Here::gated(tile_g, job, column_g, w + 2 * c, C, T(-1));
      }
      for (int job = 0; job < Here::kJobs; ++job) Here::rows_back(tile_g, job, grad_x + b * N * N * C + c, N * C, C);
    }
    for (int job = 0; job < Here::kSlots; ++job) Here::finish(sums[job], job, out + 2 * c, C);
  }
}
#define ENTRY(T, N)                                                                                                    \
  extern "C" void forward_##T##_##N(const T* x, const int64_t* by, const T* w, T* y, int64_t B, int64_t C, int conj) { \
    if (N <= 8) return forward<T, N, 1>(x, by, w, y, B, C, conj ? T(-1) : T(1));                                       \
    forward<T, N, 32>(x, by, w, y, B, C, conj ? T(-1) : T(1));                                                         \
  }                                                                                                                    \
  extern "C" void backward_##T##_##N(const T* g, const T* x, const int64_t* by, const T* w, T* grad_x, T* out,         \
                                     int64_t B, int64_t C) {                                                           \
    backward<T, N>(g, x, by, w, grad_x, out, B, C);                                                                    \
  }
#define BOTH(N) ENTRY(float, N) ENTRY(double, N)
BOTH(4) BOTH(7) BOTH(8) BOTH(14) BOTH(16)
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_body")
    source, library = folder / "emulation.cpp", folder / "emulation.so"
    source.write_text("#include <cmath>\n" + EMULATION)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{CUDA}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def _call(library, name, dtype, side, *arguments):
    typed = []
    for a in arguments:
        if isinstance(a, torch.Tensor):
            typed.append(ctypes.c_void_p(a.data_ptr()))
        elif isinstance(a, tuple):
            typed.append((ctypes.c_int64 * len(a))(*a))
        else:
            typed.append(ctypes.c_int64(a))
    getattr(library, f"{name}_{'float' if dtype == torch.float32 else 'double'}_{side}")(*typed)


def _assert_as_accurate(ours, eager, truth):
    error, of_eager = ((t.double() - truth).abs().max().item() for t in (ours, eager))
    least = 1.2e-7 if ours.dtype == torch.float32 else 4e-15  # in float64 the reference is the truth
    assert error <= 2 * of_eager + least * truth.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_body_equals_reference(emulated, side, dtype):
    torch.manual_seed(side)
    B, C = 3, 35  # more channels than lanes
    x = torch.randn(B, side + 1, side + 2, C, dtype=dtype)[:, 1:, :side]
    grad = torch.randn(B, side, side, C, dtype=dtype)
    weight = torch.randn(side, side // 2 + 1, C, 2, dtype=dtype)
    expected = []
    for to in (dtype, torch.float64):
        leaves = [t.to(to, copy=True).requires_grad_() for t in (x, weight)]
        y = reference.spectral_gate(*leaves)
        expected.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(to))])
    y, adjoint, grad_x, grad_weight = (torch.full_like(t, float("nan")) for t in (grad, grad, grad, weight))
    strides, of_grad = x.stride()[:3], grad.stride()[:3]
    _call(emulated, "forward", dtype, side, x, strides, weight, y, B, C, 0)
    _call(emulated, "forward", dtype, side, grad, of_grad, weight, adjoint, B, C, 1)
    _call(emulated, "backward", dtype, side, grad, x, (*of_grad, *strides), weight, grad_x, grad_weight, B, C)
    for ours, eager, truth in zip((y, grad_x, grad_weight), *expected, strict=True):
        _assert_as_accurate(ours, eager, truth)
    _assert_as_accurate(adjoint, expected[0][1], expected[1][1])


@pytest.mark.parametrize("side", SIDES)
def test_not_a_number_stays_in_its_channel(emulated, side):
    x, weight = torch.randn(1, side, side, 3), torch.randn(side, side // 2 + 1, 3, 2)
    x[0, 1, 1, 1] = float("nan")
    y = torch.empty_like(x)
    _call(emulated, "forward", torch.float32, side, x, x.stride()[:3], weight, y, 1, 3, 0)
    assert y[..., 1].isnan().all()
    assert y[..., ::2].isfinite().all()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_nvcc_compiles_without_spills(tmp_path, arch):
    command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{arch}", "-diag-suppress", "1675", "-DFASTCIFAR_VERSION=0"]
    command += ["-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "spectral.cubin"), str(CUDA / "spectral.cu")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"entry function '\S*?(small|shared|backward)_kernelILi(\d+)", done.stderr)
    sides = {("small", "4"), ("small", "7"), ("small", "8"), ("shared", "14"), ("shared", "16")}
    assert set(kernels) == sides | {("backward", str(side)) for side in SIDES}
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(frames) >= len(kernels)
    assert set(frames) == {("0", "0", "0")}, done.stderr
    used = re.findall(r"Used (\d+) registers", done.stderr)
    for (kernel, side), registers in zip(kernels, used, strict=True):
        assert int(registers) <= 128 or (arch == 100 and kernel == "backward" and side in ("14", "16"))
