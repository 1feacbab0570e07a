"""The signatures of every kernel that ship, family by family; ``catalogue.py`` compiles them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


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


def fixedpoint() -> Iterator[Entry]:
    """The kernels that kernels/fixedpoint.py launches: every mode, layout of binary points and dtype, and pairs of
    those that meet in more than a conversion. What a type is made of besides its modes are arguments, not kernels."""
    import torch
    import triton.language as tl

    from . import fixedpoint as family
    from . import fixedpoint_kernels as kernels
    from .digits_kernels import _limit_digits_kernel

    floats = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    flags = (True, False)
    # Shapes and strides of x, with a binary point for each index of dimension 1 where there is more than one.
    layouts: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "number": ((2**20,), (1,)),
        "one": ((2**20,), (1,)),
        "rows": ((16, 256, 64), (16384, 64, 1)),
        "long rows": ((16, 16, 4096), (65536, 4096, 1)),
        "columns": ((256, 192), (192, 1)),
    }
    factors: dict[str, Sequence[Any]] = {
        "rounding": range(8),
        "overflow": range(5),
        "saturated_bits": (0, 1, 2),
        "x": tuple(floats),
        "width": (8, 32),
        "points": tuple(layouts),
        "state": ("fp32", "fp64"),
        **dict.fromkeys(("signed", "aligned"), flags),
    }
    few = {"rounding": ("width", "x"), "overflow": ("width", "signed", "saturated_bits"), "state": ("points",)}
    usual: dict[str, Any] = {"rounding": 4, "overflow": 0, "saturated_bits": 0, "x": torch.float32, "width": 8}
    usual |= {"points": "one", "state": "fp32", "signed": True, "aligned": True}
    for kernel, more in (
        (kernels._cast_kernel, {"RAW": flags}),
        (kernels._cast_backward_kernel, {"PASSES": flags, "wants": ("x", "frac_bits", "both")}),
    ):
        first = {**usual, **{name: values[-1] for name, values in more.items()}}
        for row in covering({**factors, **more}, [first], few):
            signed = row["signed"] or row["overflow"] == 4
            shape, strides = layouts[row["points"]]
            frac_bits = None
            if row["points"] != "number":
                frac_bits = torch.empty([shape[1], *[1] * (len(shape) - 2)] if len(shape) > 1 else (), device="meta")
            compute = family.compute_type(row["x"], row["width"])
            walk = family.plan(frac_bits, torch.Size(shape), strides, row["x"].itemsize, compute)
            values: dict[str, Any] = family.modes(signed, row["rounding"], row["overflow"], row["saturated_bits"])
            values |= walk.constexprs()
            x = f"*{floats[row['x']]}:16"
            pointers = {
                **dict.fromkeys(("x_ptr", "out_ptr", "grad_ptr", "grad_x_ptr"), x),
                "frac_bits_ptr": None if frac_bits is None else f"*{row['state']}:16",
                "seed_ptr": "*i64:16" if values["ROUNDING"] == "stochastic" else None,
                "sums_ptr": "*fp64:16",
            }
            if kernel is kernels._cast_kernel:
                raw = "i64" if row["width"] == 32 and not signed else "i32"
                pointers["out_ptr"] = f"*{raw}:16" if row["RAW"] else x
                values["RAW"] = row["RAW"]
            else:
                wants = row["wants"] if frac_bits is not None else "x"
                pointers["grad_x_ptr"] = None if wants == "frac_bits" else x
                pointers["sums_ptr"] = None if wants == "x" else "*fp64:16"
                values["PASSES"] = row["PASSES"] and values["OVERFLOW"] in ("wrap", "wrap_sm")
            multiple = ":16" if row["aligned"] else ""
            signature = {"total": "i64" + multiple, "length": "i64" + multiple}
            for name in kernel.arg_names:
                if name in pointers and pointers[name] is not None:
                    signature[name] = str(pointers[name])
                elif name in pointers:
                    values[name] = None
                elif name not in signature and name not in values:
                    signature[name] = "i32"
            what = [f"{name}={values[name]}" for name in ("ROUNDING", "OVERFLOW", "N")]
            what += [str(row["points"]), x[1:5], *[name for name in ("SIGNED", "RAW", "PASSES") if values.get(name)]]
            what += ["float64"] * (compute == tl.float64) + ["unaligned"] * (not row["aligned"])
            options = dict(family.HOW)
            warps = options.pop("num_warps")
            yield Entry(kernel, signature, values, warps, " ".join([kernel.__name__, *what]), options, exact=True)
    for (dtype, x), signed, multiple in itertools.product(floats.items(), flags, (":16", "")):
        signature = {"x_ptr": f"*{x}:16", "out_ptr": f"*{x}:16", "n": "i64" + multiple, "k": "i32"}
        compute = family.compute_type(dtype, 0)
        values = {"SIGNED": signed, "COMPUTE": compute, "BLOCK": family.tile_of(dtype.itemsize, compute)}
        what = ["_limit_digits_kernel", x, *["SIGNED"] * signed, *["unaligned"] * (not multiple)]
        yield Entry(_limit_digits_kernel, signature, values, warps, " ".join(what), options, exact=True)


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


def diffusion() -> Iterator[Entry]:
    """The kernels of kernels/diffusion_kernels.py and normal_kernels.py, as kernels/diffusion.py launches them. Which
    terms a step has is code of its own: those of published samplers, and all that a tensor of coefficients may ask for.
    """
    import torch

    from . import diffusion as family
    from . import diffusion_kernels, normal_kernels

    floats = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    flags = (False, True)
    options = dict(family.HOW)
    warps = options.pop("num_warps")
    output, h1, h6, uncond, noise = "output_ptr", "h1_ptr", "h6_ptr", "uncond_ptr", "noise_ptr"
    history = [f"h{i}_ptr" for i in range(1, 7)]
    programs = {  # pointers beside x, and rows
        "ddim": ([output], 5),
        "ddpm": ([output, noise], 5),
        "multistep": ([output, h1, "h2_ptr"], 5),
        "corrector": ([output, h1, "h2_ptr", "h3_ptr"], 7),
        "guided": ([output, uncond, h6, noise], 7),
        "all": ([output, uncond, *history, noise], 7),
    }
    factors = {
        "x": tuple(floats),
        "program": tuple(programs),
        "coefficients": ("numbers", "one", "each"),
        **dict.fromkeys(("LIMITED", "draws", "aligned"), flags),
    }
    usual = {"x": torch.float32, "coefficients": "numbers", "LIMITED": False, "draws": False, "aligned": True}
    first = [{"program": name, **usual} for name in programs]
    for kernel, more in (
        (diffusion_kernels._step_kernel, {"kept": ("none", "one", "both")}),
        (diffusion_kernels._step_backward_kernel, {"wants": ("x", "tensors", "coefficients", "all")}),
    ):
        rows = [row | {name: values[-1] for name, values in more.items()} for row in first]
        for row in covering({**factors, **more}, rows):
            pointers, of_rows = programs[row["program"]]
            x = f"*{floats[row['x']]}:16"
            given: dict[str, str | None] = dict.fromkeys(("x_ptr", *pointers), x)
            draws = row["draws"] and noise in pointers
            if draws:
                given[noise] = None
            terms = ["x_ptr", output, *history]
            bits = sum(1 << t for t, name in enumerate(terms) if name in given) | 3 << 8 | (noise in pointers) << 10
            given |= {"seed_ptr": "*i64:16" if draws else None, "x_next_ptr": x, "grads_ptr": x}
            given["coefficients_ptr"] = None if row["coefficients"] == "numbers" else "*fp64:16"
            given["converted_ptr"] = x if row.get("kept") in ("one", "both") else None
            given["corrected_ptr"] = x if row.get("kept") == "both" else None
            given |= {"grad_x_next_ptr": x, "grad_converted_ptr": x if row["LIMITED"] else None}
            wants = {"x": 1, "tensors": bits & 0xFF | (given.get(noise) is not None) << 9, "coefficients": 1 << 10}
            wants["all"] = wants["tensors"] | 1 << 10 | (uncond in given) << 8
            given["sums_ptr"] = "*fp64:16" if row.get("wants") in ("coefficients", "all") else None
            values: dict[str, Any] = {"GIVEN": bits, "ROWS": of_rows, "LIMITED": row["LIMITED"]}
            values |= {"EACH": row["coefficients"] == "each", "GUIDED": uncond in given}
            values |= {
                "WANTS": wants.get(row.get("wants", ""), 0),
                **family.blocks(row["x"], draws and "kept" in row, given["sums_ptr"] is not None),
            }
            multiple = ":16" if row["aligned"] else ""
            kinds = {"total": "i64" + multiple, "length": "i64" + multiple, "blocks": "i32", "stream": "i64"}
            signature, constexprs = {}, {}
            for name in kernel.arg_names:
                if name in values:
                    constexprs[name] = values[name]
                elif name.endswith("_ptr") and given.get(name) is None:
                    constexprs[name] = None
                else:
                    signature[name] = given.get(name) or kinds.get(name, "fp64")
            what = [row["program"], floats[row["x"]], row["coefficients"], *[str(row[name]) for name in more]]
            what += [name for name in ("LIMITED", "draws") if row[name]] + ["unaligned"] * (not row["aligned"])
            yield Entry(kernel, signature, constexprs, warps, " ".join([kernel.__name__, *what]), options, exact=True)
    signature = {"seed_ptr": "*i64:16", "out_ptr": "*fp32:16", "n": "i64", "stream": "i64"}
    block = {"BLOCK": family.NUMBERS_BLOCK}
    yield Entry(normal_kernels._normal_kernel, signature, block, warps, "_normal_kernel", options, exact=True)


FAMILIES = {
    "spiking": spiking,
    "spectral": spectral,
    "fixedpoint": fixedpoint,
    "earlyexit": earlyexit,
    "diffusion": diffusion,
}
