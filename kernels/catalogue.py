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
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Entry:
    """One kernel with one signature.

    Args:
        kernel: the ``@triton.jit`` function.
        signature: type of each argument that is not a constant, as Triton spells it; ``:16`` after it says that the
            number, or the address in bytes, is a multiple of 16.
        constexprs: value of each constant argument; None for a pointer that is absent.
        num_warps: warps of a program.
        name: what to print.
        options: further compiler options, as at the launch.
        exact: its results equal the reference bit for bit, so no multiply and add may have been fused.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False


def covering(
    factors: Mapping[str, Sequence[Any]],
    rows: Sequence[dict[str, Any]],
    few: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """These rows, and more until every value of every factor has met every value of every other factor.

    All combinations of spiking's options are millions of kernels; all pairs of values fit in about 40. What breaks a
    kernel (a type that does not match, a pointer that is None, a register too many) is mostly one option, or two that
    meet.

    Args:
        few: for a factor with many values, the only others that these have to meet.
    """
    few = few or {}
    names, rng, rows = list(factors), random.Random(4), list(rows)
    meet = [
        (a, b)
        for a, b in itertools.combinations(names, 2)
        if (a not in few or b in few[a]) and (b not in few or a in few[b])
    ]
    todo = {(a, va, b, vb) for a, b in meet for va in factors[a] for vb in factors[b]}

    def pairs(row: Mapping[str, Any]) -> set[tuple[str, Any, str, Any]]:
        return {(a, row[a], b, row[b]) for a, b in meet} & todo

    for row in rows:
        todo -= pairs(row)
    while todo:
        # A pair of the two factors with the most values, as all their combinations must occur; then the best of
        # some random ways to fill the row.
        a, va, b, vb = max(todo, key=lambda pair: (len(factors[pair[0]]) * len(factors[pair[2]]), repr(pair)))
        tries = [{name: rng.choice(factors[name]) for name in names} | {a: va, b: vb} for _ in range(200)]
        rows.append(max(tries, key=lambda row: len(pairs(row))))
        todo -= pairs(rows[-1])
    return rows


def spiking() -> Iterator[Entry]:
    """The kernels of kernels/neuron_kernels.py, as kernels/spiking.py launches them."""
    import torch
    import triton.language as tl

    from . import neuron_kernels, neurons
    from . import spiking as family

    flags = (True, False)
    kinds = ("number", "one", "neuron", "run")
    common = {
        "NEURON": family.NEURONS,
        "state": ("fp32", "fp64"),
        "x": ("as state", "bf16", "fp16"),
        "parameters": kinds,
        **dict.fromkeys(("aligned", "HARD_RESET", "SCALE_RESET", "HAS_V", "HAS_W", "PANELS"), flags),
    }

    def entry(kernel: Any, row: dict[str, Any], blocks: dict[str, Any], pointers: dict[str, str | None]) -> Entry:
        multiple = ":16" if row["aligned"] else ""
        signature = {"T": "i32", "run": "i32", "period": "i32", "row": "i64"}
        signature |= {"N": "i64" + multiple, "inner": "i64" + multiple}
        constexprs = {"STATE": tl.float64 if row["state"] == "fp64" else tl.float32, **blocks}
        num_warps = constexprs.pop("num_warps")
        options = {"enable_fp_fusion": False}
        options |= {"maxnreg": constexprs.pop("maxnreg")} if "maxnreg" in constexprs else {}
        for name in family.PARAMETERS:
            constexprs[name.upper()] = row["parameters"]
            pointers[f"{name}_ptr"] = None if row["parameters"] == "number" else row["state"]
        for name, what in pointers.items():
            if what is None:
                constexprs[name] = None
            else:
                signature[name] = f"*{what}:16"
        for name in kernel.arg_names:
            if name in row:
                constexprs[name] = row[name]
            elif name not in signature and name not in constexprs:
                signature[name] = "fp64"  # the scalars
        signature = {name: kind for name, kind in signature.items() if name in kernel.arg_names}
        on = [name if value is True else f"{name}={value}" for name, value in row.items() if value is not False]
        exact = "forward" in kernel.__name__ and row["NEURON"] != "eif"
        return Entry(kernel, signature, constexprs, num_warps, " ".join([kernel.__name__, *on]), options, exact)

    def possible(row: dict[str, Any]) -> dict[str, Any]:
        """The row with what its neuron does not have taken away."""
        row, neuron = dict(row), row["NEURON"]
        second = neurons.has_second_state(neuron)
        if row["state"] == "fp64":
            wide = row["x"] != "as state" and neuron in ("if", "signed_if")
            row["x"] = "fp32" if wide else "fp64"
        elif row["x"] == "as state":
            row["x"] = "fp32"
        row["HARD_RESET"] &= not neurons.soft_reset_only(neuron)
        row["SCALE_RESET"] &= neurons.is_a(neuron, "klif")
        row["HAS_W"] &= second
        if "bytes" in row:
            row["bytes"] &= neuron != "signed_if"
        else:
            row["HAS_GRAD_W_LAST"] &= second
            if row["WANTED"] and row["parameters"] == "number":
                row["parameters"] = "one"
        return row

    # First what nearly everyone runs: float32, tau = 2, hard reset, and no gradient but that of the spikes.
    usual: dict[str, Any] = {"NEURON": "lif_times", "state": "fp32", "x": "as state", "parameters": "number"}
    usual |= {"aligned": True, "HARD_RESET": True}
    usual |= dict.fromkeys(("SCALE_RESET", "HAS_V", "HAS_W", "PANELS"), False)

    states = {"fp32": torch.float32, "fp64": torch.float64}
    factors: dict[str, Sequence[Any]] = {"steps": (4, 32), **common, "STORE_V_SEQ": flags, "bytes": flags}
    first = [{"steps": T, **usual, "STORE_V_SEQ": False, "bytes": False} for T in factors["steps"]]
    for row in map(possible, covering(factors, first, {"NEURON": ("HARD_RESET", "state")})):
        pointers = {
            "x_ptr": row["x"],
            "v_ptr": row["state"] if row["HAS_V"] else None,
            "w_ptr": row["state"] if row["HAS_W"] else None,
            "spikes_ptr": "u8" if row["bytes"] else row["x"],
            "v_last_ptr": row["state"],
            "w_last_ptr": row["state"] if neurons.has_second_state(row["NEURON"]) else None,
            "v_seq_ptr": row["state"] if row["STORE_V_SEQ"] else None,
        }
        blocks = family.forward_blocks(row["steps"], states[row["state"]], row["aligned"])
        yield entry(neuron_kernels._neuron_forward_kernel, row, blocks, pointers)

    more = ("DETACH_RESET", "HAS_GRAD_V_LAST", "HAS_GRAD_W_LAST", "HAS_GRAD_V_SEQ")
    factors = {"steps": (4, 8, 16, 32, 64), **common, "SURROGATE": tuple(range(15)), "WANTED": (0, 31)}
    factors |= dict.fromkeys(more, flags)
    usual |= {"SURROGATE": 0, "WANTED": 0, **dict.fromkeys(more, False)}
    first = [{"steps": T, **usual} for T in factors["steps"]]
    few = {"NEURON": ("HARD_RESET", "state", "WANTED"), "SURROGATE": ("state",)}
    for row in map(possible, covering(factors, first, few)):
        plain = row["parameters"] == "number" and not row["HAS_GRAD_V_SEQ"]
        blocks = family.backward_blocks(
            row["steps"], states[row["state"]], row["aligned"], row["NEURON"], row["WANTED"], plain
        )
        pointers = {
            "grad_spikes_ptr": row["x"],
            "grad_v_last_ptr": row["state"] if row["HAS_GRAD_V_LAST"] else None,
            "grad_w_last_ptr": row["state"] if row["HAS_GRAD_W_LAST"] else None,
            "grad_v_seq_ptr": row["state"] if row["HAS_GRAD_V_SEQ"] else None,
            "x_ptr": row["x"],
            "v_ptr": row["state"] if row["HAS_V"] else None,
            "w_ptr": row["state"] if row["HAS_W"] else None,
            "grad_x_ptr": row["x"],
            "grad_v_ptr": row["state"] if row["HAS_V"] else None,
            "grad_w_ptr": row["state"] if row["HAS_W"] else None,
            "sums_ptr": "fp64" if row["WANTED"] else None,
            "checkpoint_ptr": row["state"] if blocks["SEGMENTED"] else None,
        }
        yield entry(neuron_kernels._neuron_backward_kernel, row, blocks, pointers)


def spectral() -> Iterator[Entry]:
    """The kernels that kernels/spectral.py launches: each in its largest tiles, and in types that differ in more than a
    conversion."""
    from . import spectral as family
    from . import spectral_kernels as kernels
    from . import spectral_large_kernels as large

    def entry(kernel: Any, H: int, W: int, x: str = "fp32", absent: Sequence[str] = (), **constexprs: Any) -> Entry:
        how = family.plan(H, W, kernel is kernels._gate_backward_kernel)
        options = {"num_warps": 8 if kernel is large._columns_backward_kernel else 4, "num_stages": 1}
        options |= {name: how.pop(name) for name in tuple(how) if name in options}
        if "P" in how:
            how["H"] = H
        elif kernel is not large._rows_kernel:
            how["CT"] = how["COLUMNS"]
        values = {**how, "W": W, "PRECISION": family.PRECISION, **constexprs, **dict.fromkeys(absent)}
        signature = {}
        for name in kernel.arg_names:
            if name.endswith("_ptr") or name == "matrices":
                tokens = name in ("x_ptr", "y_ptr", "g_ptr", "grad_x_ptr")
                signature[name] = f"*{x if tokens else 'fp32'}:16"
            else:
                multiple = name in ("C", "again") or name[-2:] in ("_b", "_h", "_w")
                signature[name] = "fp64" if name == "inner" else "i32:16" if multiple else "i32"
        signature = {name: kind for name, kind in signature.items() if name not in values}
        values = {name: value for name, value in values.items() if name in kernel.arg_names}
        what = [f"{H}x{W}", x, *[f"{name}={value}" for name, value in constexprs.items()]]
        what += [f"no {name}" for name in absent]
        warps = options.pop("num_warps")
        return Entry(kernel, signature, values, warps, " ".join([kernel.__name__, *what]), options)

    for side, x in ((4, "bf16"), (8, "fp32"), (14, "fp32"), (16, "fp16")):
        yield entry(kernels._gate_kernel, side, side, x, CONJ=x != "fp32")
        yield entry(kernels._gate_backward_kernel, side, side, x, WANTS_X=side != 4)
        yield entry(kernels._spectrum_kernel, side, side, x if side == 4 else "fp32", INVERSE=side != 4)
        if side > 8:  # rows that do not start on 16 bytes take more registers for addresses
            plain = entry(kernels._gate_backward_kernel, side, side, x, WANTS_X=True)
            signature = {name: kind.partition(":")[0] for name, kind in plain.signature.items()}
            yield replace(plain, signature=signature, name=f"{plain.name} unaligned")
    yield entry(kernels._spectrum_kernel, 16, 16, INVERSE=False)
    for side, x in ((32, "bf16"), (64, "fp32")):
        for inverse in (False, True):
            yield entry(large._rows_kernel, side, side, x, INVERSE=inverse)
        yield entry(large._columns_kernel, side, side, absent=["s_ptr"], CONJ=True, INVERSE=False)
        yield entry(large._columns_kernel, side, side, absent=["w_ptr"], CONJ=False, INVERSE=side == 64)
        yield entry(large._columns_backward_kernel, side, side, SPECTRUM=side == 64, WANTS_X=True)


def earlyexit() -> Iterator[Entry]:
    """The kernels of kernels/earlyexit_kernels.py, as kernels/earlyexit.py launches them."""
    import triton.language as tl

    from . import earlyexit as family
    from . import earlyexit_kernels as kernels

    factors = {
        "x": ("fp32", "fp64", "bf16", "fp16"),
        "K": (2, 10, 100, 1000, 100_000),
        "CRITERION": (0, 1, 2, 3),
        "STRICT": (False, True),
        "limits": ("number", "one", "row"),
        "aligned": (False, True),
    }
    usual = {"CRITERION": 0, "STRICT": False, "limits": "number"}
    rows = [{"x": "fp32", "K": K, "aligned": K == 1000, **usual} for K in factors["K"]]
    for row in covering(factors, rows):
        double = row["x"] == "fp64"
        how = family.blocks(row["K"], double)
        multiple = ":16" if row["aligned"] else ""
        signature = {"logits_ptr": f"*{row['x']}{multiple}", "score_ptr": "*fp32:16", "prediction_ptr": "*i64:16"}
        signature |= {"stays_ptr": "*u8:16", "counts_ptr": "*i32:16", "B": "i32", "K": "i32"}
        signature |= {"stride": f"i32{multiple}", "threshold": "fp32", "temperature": "fp64", "inverse": "fp64"}
        constexprs = {name: row[name] for name in ("CRITERION", "STRICT")}
        constexprs |= {"EACH": row["limits"] == "row", "COMPUTE": tl.float64 if double else tl.float32}
        if row["limits"] == "number":
            constexprs["thresholds_ptr"] = None
        else:
            signature["thresholds_ptr"] = "*fp32:16"
        warps = how.pop("num_warps")
        name = " ".join(f"{key}={value}" for key, value in row.items())
        yield Entry(kernels._exit_scores_kernel, signature, constexprs | how, warps, f"_exit_scores_kernel {name}")
    signature = {"stays_ptr": "*u8:16", "counts_ptr": "*i32:16", "exit_ptr": "*i64:16", "keep_ptr": "*i64:16"}
    signature |= {"n_keep_ptr": "*i64:16", "B": "i32", "N": "i32", "per": "i32:16"}
    constexprs = {"ROWS": family.LIST_ROWS, "COUNTS": family.COUNTS}
    yield Entry(kernels._exit_lists_kernel, signature, constexprs, 4, "_exit_lists_kernel")


FAMILIES = {"spiking": spiking, "spectral": spectral, "earlyexit": earlyexit}


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
