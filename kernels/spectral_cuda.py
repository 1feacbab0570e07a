"""csrc/cuda/spectral.cu, where ``make cuda`` has built it into fastcifar/_cuda.so, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from .. import _library
from .._version import __version__

SIDES = (4, 7, 8, 14, 16)  # of the square grids that it has
BLOCKS = 1024  # that images are dealt to; the same on every GPU, as sums depend on it
_LANES = 32  # channels a block


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built.

    Raises:
        ImportError: it was built for another version.
    """
    path = Path(_library.__file__).parent / "_cuda.so"
    if not path.exists():
        return None
    stamp = _library.build_stamp(path)
    if stamp != __version__:
        raise ImportError(
            f"fastcifar: {path.name} was built for fastcifar {stamp or '(no stamp)'}, and this is {__version__}; "
            "rebuild it (make cuda) or remove it"
        )
    return ctypes.CDLL(str(path))


def owner() -> str:
    """What serves the gate on CUDA, for doctor()."""
    if library() is None:
        return "Triton, kernels/spectral.py"
    sides = ", ".join(f"{side} x {side}" for side in SIDES)
    return f"CUDA C++, csrc/cuda/spectral.cu (float32, {sides}); Triton, kernels/spectral.py"


def serves(x: Tensor) -> bool:
    """Whether it is there and has a kernel for such tokens, whose channels are adjacent."""
    square = x.shape[1] == x.shape[2] and x.shape[1] in SIDES
    return x.is_cuda and x.dtype == torch.float32 and square and library() is not None


def gate(x: Tensor, weight: Tensor, y: Tensor, conj: bool) -> None:
    """Writes the gate's output; ``weight`` and ``y`` are contiguous, of ``x`` the channels are."""
    with torch.cuda.device_of(x):
        _call("spectral_gate", x, (x, weight, y), x.stride()[:3], (x.shape[0], x.shape[3], int(conj)))


def gate_backward(grad: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor | None) -> Tensor:
    """Writes the gradient to ``x`` where room for it is given, and returns that to the weight."""
    B, C = x.shape[0], x.shape[3]
    per = -(-B // max(1, BLOCKS // -(-C // _LANES)))
    sums = weight.new_empty(-(-B // per), *weight.shape)
    with torch.cuda.device_of(x):
        strides = (*grad.stride()[:3], *x.stride()[:3])
        _call("spectral_gate_backward", x, (grad, x, weight, grad_x, sums), strides, (B, C, per))
    return sums[0] if len(sums) == 1 else sums.sum(0)  # torch's sum over chunks: in a fixed order


def _call(
    name: str, x: Tensor, tensors: tuple[Tensor | None, ...], strides: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    found = library()
    assert found is not None
    stream = torch.cuda.current_stream(x.device).cuda_stream
    error = getattr(found, f"fastcifar_{name}")(
        ctypes.c_int(x.shape[1]),
        *[ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors],
        *[ctypes.c_int64(number) for number in (*strides, *sizes)],
        ctypes.c_void_p(stream),
    )
    if error:
        raise RuntimeError(f"{name}: CUDA error {error} (cudaError_t) at the launch")
