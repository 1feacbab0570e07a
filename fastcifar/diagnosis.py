"""``python -m fastcifar doctor`` and ``selftest``: which kernel serves what and why, and whether it tells the truth."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time

import torch

from . import _library
from ._version import __version__


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_line() -> str:
    if _library.WHY_NO_EXTENSION is not None:
        return f"references only: {_library.WHY_NO_EXTENSION}"
    forced = os.environ.get("FASTCIFAR_CPU_ISA")
    try:
        isa = _library.cpu_isa()
    except ValueError as error:
        return f"unusable: {error}"
    return f"{isa} ({'FASTCIFAR_CPU_ISA names it' if forced else 'the best that this processor executes'})"


def _gpu_line() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def doctor() -> str:
    """What runs where, as text: versions, the CPU instruction set in use and why, the GPU, and each op's owner.

    Example:
        >>> import fastcifar
        >>> print(fastcifar.doctor().splitlines()[0].split()[0])
        fastcifar
    """
    from .spec import all_specs

    facts = {
        "fastcifar": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
        "extension": _library.WHY_NO_EXTENSION or "fastcifar/_C.abi3.so, loaded",
        "CPU kernels": _cpu_line(),
        "CPU threads": str(torch.get_num_threads()),
        "GPU": _gpu_line(),
    }
    lines = [f"{name:<12} {value}" for name, value in facts.items()]
    lines += ["", f"{'op':<28} {'device':<7} served by"]
    others = {op: "torch's own ops" for op, _ in _library.OWNERS}
    families = {op: spec.family for spec in all_specs() for op in spec.raw_ops}
    others |= {op: f"the PyTorch reference, fastcifar/{family}/reference.py" for op, family in families.items()}
    others |= {op: "the CPU, where a tree's numbers stay" for op in others if op.startswith("tree_")}
    for op, other in others.items():
        for device in ("cpu", "cuda"):
            lines.append(f"{op:<28} {device:<7} {_library.OWNERS.get((op, device), other)}")
    return "\n".join(lines)


def selftest() -> bool:
    """Checks every op against its reference on every device here and prints a line for each; True where all agree."""
    from .spec import all_specs, compare

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    good = True
    for spec in all_specs():
        for device in devices:
            for dtype in spec.dtypes:
                started = time.perf_counter()
                problems = [
                    problem
                    for options in spec.options
                    for size in ("one", "prime")
                    for problem in compare(spec, spec.sample(size, dtype, device, 0), options)
                ]
                good &= not problems
                verdict = "ok" if not problems else "WRONG: " + "; ".join(problems[:3])
                case = f"{spec.name:<18} {device:<5} {str(dtype).removeprefix('torch.'):<9}"
                print(f"{case} {time.perf_counter() - started:6.2f} s  {verdict}", flush=True)
    print(
        "every op equals its reference" if good else "some op does not equal its reference: please report this output"
    )
    return good
