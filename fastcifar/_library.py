"""The only file that knows torch.library: loads the extension, hands CUDA to Triton, and gives every op its rules."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _rules
from ._rules import state_dtype as state_dtype
from ._version import __version__

NAMESPACE = "fastcifar"  # of the ops; the package itself may go by another name (Hugging Face's kernels)
ISAS = ("baseline", "avx2", "avx512")

# Which kernel owns an op on a device; what is not in here runs the family's reference. doctor() prints it.
OWNERS: dict[tuple[str, str], str] = {}

_keep: list[torch.library.Library] = []  # registrations last as long as their Library object


def _schemas() -> list[str]:
    """The op schemas, from the file that csrc/ops.cpp includes."""
    text = (Path(__file__).parent / "_schemas.inc").read_text()
    return list(ast.literal_eval("[" + re.sub(r"^\s*//.*$", "", text, flags=re.M) + "]"))


def build_stamp(path: Path) -> str | None:
    """The version that a built extension was made for, read from its bytes without loading it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.search(rb"fastcifar-build-stamp:([^;\0]+);", data)
        return found.group(1).decode() if found else None


def _load_extension() -> str | None:
    """Loads fastcifar._C, which defines the ops and owns the CPU; returns why there is none, or None."""
    if torch._C._jit_get_schemas_for_operator(f"{NAMESPACE}::_cpu_isa"):
        raise ImportError(
            "fastcifar: another copy of fastcifar is loaded in this process (one that is installed, or one of Hugging "
            "Face's kernels), and PyTorch holds its ops once only"
        )
    # Beside this file and nowhere else: an editable install elsewhere must not lend its extension to this package.
    spec = importlib.machinery.PathFinder.find_spec(f"{__package__}._C", [str(Path(__file__).parent)])
    if spec is None or spec.origin is None:
        return "the C++ extension is not built (pip install --no-build-isolation . with a C++ compiler builds it)"
    stamp = build_stamp(Path(spec.origin))
    if stamp != __version__:
        raise ImportError(
            f"fastcifar: the extension {Path(spec.origin).name} was built for fastcifar {stamp or '(no stamp)'}, and "
            f"this is {__version__}; rebuild it: pip install --no-build-isolation --force-reinstall --no-deps fastcifar"
        )
    try:
        importlib.import_module("._C", __package__)
    except ImportError as error:
        raise ImportError(
            f"fastcifar: the extension {Path(spec.origin).name} does not load with torch {torch.__version__} "
            f"(it needs 2.10 or later): {error}"
        ) from error
    return None


WHY_NO_EXTENSION = _load_extension()


def _define() -> None:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _keep.append(library)
    if WHY_NO_EXTENSION is not None:
        for schema in _schemas():
            library.define(schema)


def _triton(family: str, *ops: str) -> None:
    """Registers kernels/<family>.py's launchers for CUDA; Triton itself is imported at the first call."""
    library = torch.library.Library(NAMESPACE, "IMPL", "CUDA")
    _keep.append(library)
    for op in ops:

        def launch(*args, _op: str = op):
            return getattr(importlib.import_module(f".kernels.{family}", __package__), _op)(*args)

        library.impl(op, launch)
        OWNERS[op, "cuda"] = f"Triton, kernels/{family}.py"


def owned(op: str, device: str) -> bool:
    """Whether a kernel serves ``op`` on a device type; where none does, the reference runs."""
    return (op, device) in OWNERS


def serves(op: str, x: Tensor) -> bool:
    """:func:`owned` on the device of ``x``, whose name takes longer to ask for than whether it is the CPU.

    Not in forward-mode differentiation (``torch.func.jvp``): PyTorch gives the result of an op that knows nothing of
    it a derivative of 0 in silence. The references have the right one, or raise.
    """
    return (op, "cpu" if x.is_cpu else x.device.type) in OWNERS and forward_ad._current_level < 0


def transformed(t: Tensor) -> bool:
    """Whether a tensor stands for others (under torch.func), so that it cannot be read."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


def direct_apply(function: type[torch.autograd.Function]) -> Callable:
    """``function.apply`` without its overhead where nothing but plain eager autograd is active.

    ``torch.autograd.Function.apply`` inspects the signature of ``forward`` at every call, to fill in defaults: several
    times the cost of a small op. The C-level apply below it is what it calls in the end; torch.compile and torch.func
    need the whole.
    """
    base = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return base(*args)

    return apply


class _Once(torch.autograd.Function):
    """Passes a gradient on unchanged, as a function of the inputs that it depends on, and refuses its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, op, *inputs):
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(f"{ctx.op}: the second derivative is not offered")


def differentiable_once(op: str, grad: Tensor, *inputs: Tensor | None) -> Tensor:
    """``grad`` as a backward pass returns it where no second derivative is offered: differentiating it raises.

    ``torch.autograd.function.once_differentiable`` is not enough: it looks at the incoming gradients only, so that
    where these are constants a gradient penalty would count as a constant in silence. torch.compile refuses by itself.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grad
    return _Once.apply(grad, op, *[t for t in inputs if t is not None])


def cpu_isa(isa: str | None = None) -> str:
    """The instruction set that CPU kernels use, after putting ``isa`` in use if one is given.

    It is the process's, for all threads; a call that has begun keeps to the one that it began with.

    Args:
        isa: ``"baseline"``, ``"avx2"``, ``"avx512"``, or None to ask only.

    Raises:
        RuntimeError: the extension is not built.
        ValueError: this machine does not execute ``isa``, or FASTCIFAR_CPU_ISA names one that it does not.
    """
    if WHY_NO_EXTENSION is not None:
        raise RuntimeError(f"cpu_isa: {WHY_NO_EXTENSION}")
    if isa is not None and isa not in ISAS:
        raise ValueError(f"cpu_isa: expected one of {', '.join(ISAS)}; got {isa!r}")
    level = torch.ops.fastcifar._cpu_isa.default(-1 if isa is None else ISAS.index(isa))
    if level < 0:
        raise ValueError(f"cpu_isa: this machine does not execute the instruction set {isa or 'in FASTCIFAR_CPU_ISA'}")
    return ISAS[level]


_define()
for _op, _source in (
    ("neuron_forward", "spiking"),
    ("neuron_backward", "spiking"),
    ("packed_conv", "packed"),
    ("spectral_gate_forward", "spectral"),
    ("spectral_gate_backward", "spectral"),
    ("spectrum_forward", "spectral"),
    ("spectrum_inverse", "spectral"),
    ("spectrum_real_parts", "spectral"),
    ("fixed_quantize", "fixedpoint"),
    ("fixed_to_raw", "fixedpoint"),
    ("fixed_quantize_backward", "fixedpoint"),
    ("limit_digits", "digits"),
    ("integer_conv", "integer_matmul"),
    ("exit_decide", "earlyexit"),
    ("solver_step", "diffusion"),
    ("solver_step_into", "diffusion"),
    ("solver_table_step", "diffusion"),
    ("solver_step_backward", "diffusion"),
    ("normal_numbers", "diffusion"),
    ("magnitude_quantile", "diffusion"),
    ("tree_select", "tree"),
    ("tree_sample", "tree"),
    ("tree_backup", "tree"),
):
    torch.library.register_fake(f"{NAMESPACE}::{_op}", getattr(_rules, f"{_op}_fake"), lib=_keep[0])
    if hasattr(_rules, f"{_op}_vmap"):
        torch.library.register_vmap(f"{NAMESPACE}::{_op}", getattr(_rules, f"{_op}_vmap"), lib=_keep[0])
    if WHY_NO_EXTENSION is None:
        OWNERS[_op, "cpu"] = f"C++, csrc/cpu/{_source}.inl"

if importlib.util.find_spec("triton") is not None and sys.platform == "linux":
    _triton("spiking", "neuron_forward", "neuron_backward")
    _triton("spectral", "spectral_gate_forward", "spectral_gate_backward", "spectrum_forward", "spectrum_inverse")
    _triton("fixedpoint", "fixed_quantize", "fixed_to_raw", "fixed_quantize_backward", "limit_digits")
    _triton("earlyexit", "exit_decide")
    _diffusion = ("solver_step", "solver_step_into", "solver_table_step", "solver_step_backward", "normal_numbers")
    _triton("diffusion", *_diffusion)
    if (Path(__file__).parent / "_cuda.so").exists():  # `make cuda`
        for _op in ("spectral_gate_forward", "spectral_gate_backward"):
            OWNERS[_op, "cuda"] = "CUDA C++, csrc/cuda/spectral.cu, where it has the grid; else Triton"
