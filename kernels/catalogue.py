"""Every kernel with the signatures that ship, compiled ahead of time on a machine without a GPU.

``python -m fastcifar.kernels.catalogue`` compiles the catalogue for sm_80, sm_90 and sm_100 with the ptxas in the
Triton wheel, prints what each kernel uses, and fails if one does not compile or keeps anything in local memory: a
spilled register is a trip to memory that no kernel here has budgeted for.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .signatures import FAMILIES, Entry

ARCHS = (80, 90, 100)


def entries(families: Sequence[str] = tuple(FAMILIES)) -> list[Entry]:
    """The catalogue of these families."""
    return [entry for family in families for entry in FAMILIES[family]()]


@dataclass(frozen=True)
class Compiled:
    """What one entry uses on one architecture: registers a thread, spilled bytes a thread, shared bytes a program."""

    registers: int
    spills: int
    shared: int


def compile_entry(entry: Entry, arch: int) -> Compiled:
    """Compiles an entry for sm_<arch>; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: i for i, name in enumerate(entry.kernel.arg_names)}
    signature = dict.fromkeys(position, "constexpr")
    attrs = {}
    for name, kind in entry.signature.items():
        signature[name], _, multiple = kind.partition(":")
        if multiple:
            attrs[position[name],] = [["tt.divisibility", int(multiple)]]
    constexprs = {(position[name],): value for name, value in entry.constexprs.items()}
    binary = triton.compile(
        ASTSource(entry.kernel, signature=signature, constexprs=constexprs, attrs=attrs),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": entry.num_warps, **entry.options},
    )
    if entry.exact and "fma." in binary.asm["ptx"]:
        raise ValueError("a multiply and an add were fused, and the result is no longer the reference's")
    if entry.exact and re.search(r"(?<!cvt\.rmi)\.ftz", binary.asm["ptx"]):  # all floors do, whose own business it is
        raise ValueError("subnormal numbers are flushed to 0, and the result is no longer the reference's")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(used["REG"], used["STACK"] + used["LOCAL"], binary.metadata.shared)


_catalogue: list[Entry] = []  # inherited by the worker processes: a JIT function does not pickle


def _work(job: tuple[int, int]) -> Compiled | str:
    try:
        return compile_entry(_catalogue[job[0]], job[1])
    except Exception as error:  # report it in its line and go on with the others
        return f"{type(error).__name__}: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcifar.kernels.catalogue", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities times ten")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=tuple(FAMILIES))
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")

    _catalogue[:] = entries(args.family)
    jobs = list(itertools.product(range(len(_catalogue)), args.arch))
    failures = 0
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        for (index, arch), result in zip(jobs, pool.map(_work, jobs), strict=True):
            if isinstance(result, Compiled):
                failures += result.spills > 0
                verdict = f"{result.registers:4d} registers {result.spills:4d} spilled {result.shared:6d} shared"
            else:
                failures += 1
                verdict = f"FAILED {result}\n   "
            print(f"sm_{arch:<4d}{verdict}  {_catalogue[index].name}", flush=True)
    print(f"{len(_catalogue)} kernels, {len(jobs)} compilations, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
