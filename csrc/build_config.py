"""The one list of sources and flags; setup.py and the sanitizer build both read it."""

from __future__ import annotations

import os
from pathlib import Path

# And what of a family has files of its own.
FAMILIES = ["spiking", "packed", "spectral", "fixedpoint", "integer_matmul", "earlyexit", "diffusion", "tree"]
ISAS = ["baseline", "avx2", "avx512"]

# Raw kernels: no torch, shared by the extension and by the numpy bindings.
KERNEL_SOURCES = ["csrc/cpu/dispatch.cpp", "csrc/cpu/fft_plan.cpp", *[f"csrc/cpu/isa/{isa}.cpp" for isa in ISAS]]
EXTENSION_SOURCES = ["csrc/ops.cpp", *[f"csrc/cpu/{family}.cpp" for family in FAMILIES], *KERNEL_SOURCES]
HOST_SOURCES = ["csrc/host/bindings.cpp", "csrc/host/diffusion.cpp"]  # and the objects of KERNEL_SOURCES
HEADERS = [
    "csrc/butterflies.h",
    "csrc/common.h",
    "csrc/ops.h",
    "csrc/host/arrays.h",
    "csrc/cpu/types.h",
    "csrc/cpu/dispatch.h",
    "csrc/cpu/vec.h",
    "csrc/cpu/common_kernels.h",
    "csrc/cpu/common_kernels.inl",
    "fastcifar/_schemas.inc",
    *[f"csrc/cpu/{family}.{ending}" for family in FAMILIES for ending in ("h", "inl")],
    *[f"csrc/cpu/{part}" for part in ("neurons.inl", "surrogates.inl", "rows.inl", "parameters.h")],  # of spiking
    *[f"csrc/cpu/{part}" for part in ("cast.inl", "digits.inl")],  # of fixedpoint
    "csrc/cpu/normal.inl",  # of diffusion
    *[f"csrc/cpu/{part}" for part in ("lanes.inl", "power.inl")],  # of earlyexit
    *[f"csrc/cpu/{part}" for part in ("fft.inl", "codelets.inl", "grid.inl")],  # of spectral
]

# -O3, not -O2: it takes the branches on a call's options out of the inner loops, which halves their time.
# -ffp-contract=off: g++ otherwise fuses a multiplication and an addition into one rounding, and the result differs from
# eager PyTorch. TORCH_TARGET_VERSION: torch's stable ABI as of 2.10. Py_LIMITED_API: CPython's as of 3.10.
CXX_FLAGS = [
    f"-ffile-prefix-map={Path(__file__).parent.parent}/=",  # an error names the source, not the folder it was built in
    *("-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden"),
    *("-Wall", "-Wno-maybe-uninitialized"),  # gcc 12 warns of its own AVX-512 header
]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]

# Calls in place of inlined checks of memory: a transform that is written out has thousands of accesses, and compiles in
# seconds instead of minutes. vptr and null double the time of undefined's, and there are no virtual functions here.
SANITIZERS = {
    "address": [
        *("-fsanitize=address,undefined", "-fno-sanitize=vptr,null", "-fno-sanitize-recover=undefined"),
        *("--param", "asan-instrumentation-with-call-threshold=0"),
    ],
    "thread": ["-fsanitize=thread"],
}


def flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags, with those of the sanitizer that FASTCIFAR_SANITIZE names, if any."""
    name = os.environ.get("FASTCIFAR_SANITIZE")
    if not name:
        return CXX_FLAGS, []
    quick = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-var-tracking"]
    return [*CXX_FLAGS, *SANITIZERS[name], *quick], SANITIZERS[name][:1]
