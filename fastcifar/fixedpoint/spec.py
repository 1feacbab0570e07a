"""What every op of the family promises; see :mod:`fastcifar.spec`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..spec import BadInput, Inputs, OpSpec, Outputs
from . import digits, functional, modules, products, reference

_SIZES = {"empty": (0, 3, 2, 5), "one": (1, 1, 1, 1), "prime": (3, 5, 7, 11), "large": (16, 8, 16, 32)}


def _one(function: Callable[..., Tensor]) -> Callable[..., Outputs]:
    return lambda **arguments: (function(**arguments),)


def _x_sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(_SIZES[size], generator=generator, dtype=torch.float64) * 4
    return {"x": x.to(device, dtype)}


def _trainable_sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """One binary point a channel."""
    x = _x_sample(size, dtype, device, seed)["x"]
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return {"x": x, "frac_bits": torch.linspace(1.2, 5.7, x.shape[1]).to(device, state).view(-1, 1, 1)}


def _x(*shape: int) -> Tensor:
    return torch.zeros(shape or (2, 3))


def _bad(needed: dict[str, Any]) -> tuple[BadInput, ...]:
    def bad(what: str, error: type[Exception], says: str, **arguments: Any) -> BadInput:
        return BadInput(what, lambda: {"x": _x(), **needed, **arguments}, error, says)

    return (
        bad("no tensor", TypeError, "expected x to be a tensor, got list", x=[1.0]),
        bad("integers", TypeError, "got torch.int32", x=_x().int()),
        bad("sparse", TypeError, "dense x, got sparse", x=_x().to_sparse()),
        bad("no bits", ValueError, "width of 1 to 32, got 0", width=0),
        bad("33 bits", ValueError, "width of 1 to 32, got 33", width=33),
        bad("half a bit", TypeError, "width to be an integer, got 8.5", width=8.5),
        bad("signed", TypeError, "True or False, got 1", signed=1),
        bad("rounding", ValueError, "one of rnd, rnd_zero", rounding="nearest"),
        bad("overflow", ValueError, "one of sat, sat_zero", overflow="clip"),
        bad("wrap_sm without sign", ValueError, "signed type under wrap_sm", overflow="wrap_sm", signed=False),
        bad("saturated_bits", ValueError, "saturated_bits of 0 to width = 8, got 9", saturated_bits=9),
        bad("negative saturated_bits", ValueError, "got -1", saturated_bits=-1),
        bad("a seed that is not used", ValueError, "no seed unless rounding is stochastic", seed=3),
        bad("a seed that is a fraction", TypeError, "seed to be an integer", seed=0.5, rounding="stochastic"),
        bad("two seeds", ValueError, "one int64", seed=torch.zeros(2, dtype=torch.int64), rounding="stochastic"),
    )


# ---- products of integers: samples of 8 bits, whatever the dtype asked for -------------------------------------------

_ROWS = {"empty": (0, 5, 7), "one": (1, 1, 1), "prime": (3, 5, 7), "large": (16, 65, 47)}
_IMAGES = {"empty": (0, 3, 5, 4), "one": (1, 1, 3, 2), "prime": (3, 5, 7, 11), "large": (8, 6, 33, 18)}


def _integers(device: str, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 129, shape, generator=generator, dtype=torch.int16).to(device)


def _matmul_sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    shape = _ROWS[size]
    return {"a": _integers(device, seed, *shape), "b": _integers(device, seed + 1, 13, shape[-1])}


def _conv_sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    shape = _IMAGES[size]
    return {"x": _integers(device, seed, *shape), "weight": _integers(device, seed + 1, 7, shape[1], 3, 2)}


def _bad_product(valid: Callable[[], dict[str, Any]]) -> tuple[BadInput, ...]:
    x, weight, *_ = valid()

    def bad(what: str, error: type[Exception], says: str, **arguments: Any) -> BadInput:
        return BadInput(what, lambda: {**valid(), **arguments}, error, says)

    return (
        bad("floats", TypeError, f"{x} to be a tensor of integers .*, got torch.float32", **{x: _x(1, 2, 3, 4)}),
        bad("no tensor", TypeError, f"{weight} to be a tensor of integers .*, got int", **{weight: 3}),
        bad("a bound that is a float", TypeError, f"{x}_largest to be an integer, got 1.5", **{f"{x}_largest": 1.5}),
        bad("a bound below 0", ValueError, f"{weight}_largest of at least 0, got -1", **{f"{weight}_largest": -1}),
        bad("a weight elsewhere", ValueError, "one device, got cpu and meta", **{weight: valid()[weight].to("meta")}),
        bad("one dimension", ValueError, r"got .* and \(6,\)", **{weight: torch.ones(6, dtype=torch.int16)}),
        bad("no outputs", ValueError, "not empty", **{weight: valid()[weight][:0]}),
        bad("sums beyond int64", ValueError, "fit 64 bits, got up to", **{f"{x}_largest": 1 << 40,
                                                                        f"{weight}_largest": 1 << 30}),
    )  # fmt: skip


def _valid_matmul() -> dict[str, Any]:
    return {"a": _integers("cpu", 0, 2, 6), "b": _integers("cpu", 0, 3, 6), "a_largest": 128, "b_largest": 128}


def _valid_conv() -> dict[str, Any]:
    x, weight = _integers("cpu", 0, 2, 6, 4, 5), _integers("cpu", 0, 3, 6, 3, 2)
    return {"x": x, "weight": weight, "x_largest": 128, "weight_largest": 128}


def _bad_conv(what: str, says: str, **arguments: Any) -> BadInput:
    return BadInput(what, lambda: {**_valid_conv(), **arguments}, ValueError, says)


_TRAINABLE = {"width": 8, "frac_bits": torch.tensor(4.0)}

SPECS = [
    OpSpec(
        name="quantize",
        family="fixedpoint",
        function=_one(functional.quantize),
        reference=_one(reference.quantize),
        sample=_x_sample,
        options=(
            {"width": 8, "int_bits": 3, "rounding": "rnd_conv", "overflow": "sat"},
            {"width": 6, "int_bits": 2, "rounding": "rnd", "overflow": "sat_zero"},
            {"width": 5, "int_bits": 3, "signed": False, "rounding": "rnd_inf", "overflow": "sat_sym"},
            {"width": 4, "int_bits": 3, "rounding": "rnd_zero", "overflow": "sat_sym"},
            {"width": 7, "int_bits": 3, "overflow": "wrap", "wrap_gradient": False},
            {
                "width": 7,
                "int_bits": 3,
                "rounding": "rnd_min_inf",
                "overflow": "wrap_sm",
                "wrap_gradient": False,
            },
            {
                "width": 30,
                "int_bits": 3,
                "rounding": "trn_zero",
                "overflow": "wrap_sm",
                "saturated_bits": 3,
                "wrap_gradient": False,
            },
            {"width": 8, "int_bits": 3, "rounding": "stochastic", "overflow": "sat", "seed": 7},
        ),
        differentiable=("x",),
        exact=(0,),
        raw_ops=("fixed_quantize", "fixed_quantize_backward"),
        module=None,
        bad_inputs=(
            *_bad({"width": 8, "int_bits": 3}),
            BadInput(
                "int_bits", lambda: {"x": _x(), "width": 8, "int_bits": 41}, ValueError, "int_bits of -4 to 40, got 41"
            ),
            BadInput(
                "low int_bits", lambda: {"x": _x(), "width": 8, "int_bits": -5}, ValueError, "of -4 to 40, got -5"
            ),
        ),
    ),
    OpSpec(
        name="limit_digits",
        family="fixedpoint",
        function=_one(digits.limit_digits),
        reference=_one(reference.limit_digits),
        sample=_x_sample,
        options=({"k": 2}, {"k": 2, "signed_digits": True}, {"k": 1}, {"k": 60, "signed_digits": True}),
        differentiable=("x",),
        exact=(0,),
        raw_ops=("limit_digits",),
        module=lambda: modules.PowerOfTwo(2, signed_digits=True),
        bad_inputs=(
            BadInput("integers", lambda: {"x": torch.ones(3, dtype=torch.int32), "k": 1}, TypeError, "got torch.int32"),
            BadInput("no digits", lambda: {"x": _x(), "k": 0}, ValueError, "k above 0, got 0"),
            BadInput("half a digit", lambda: {"x": _x(), "k": 1.5}, TypeError, "k to be an integer, got 1.5"),
        ),
    ),
    OpSpec(
        name="quantize_trainable",
        family="fixedpoint",
        function=_one(functional.quantize_trainable),
        reference=_one(reference.quantize_trainable),
        sample=_trainable_sample,
        options=(
            {"width": 6},
            {"width": 6, "rounding": "rnd", "overflow": "wrap"},
            {"width": 5, "rounding": "trn", "overflow": "sat_sym"},
            {"width": 5, "rounding": "rnd_inf", "overflow": "wrap_sm", "wrap_gradient": False},
            {"width": 6, "rounding": "stochastic", "overflow": "sat_zero", "seed": -5},
        ),
        differentiable=("x", "frac_bits"),
        broadcast=("frac_bits",),
        exact=(0,),
        raw_ops=("fixed_quantize", "fixed_quantize_backward"),
        module=lambda: modules.FixedPoint(6, 3, rounding="rnd_conv", overflow="sat", trainable=True),
        bad_inputs=(
            *_bad(_TRAINABLE),
            BadInput(
                "no frac_bits",
                lambda: {"x": _x(), "width": 8, "frac_bits": 4.0},
                TypeError,
                "floating tensor, got float",
            ),
            BadInput(
                "a matrix of frac_bits",
                lambda: {"x": _x(), "width": 8, "frac_bits": _x()},
                ValueError,
                "at most one dimension above 1",
            ),
            BadInput(
                "frac_bits of others", lambda: {"x": _x(), "width": 8, "frac_bits": _x(4)}, ValueError, r"got \(4,\)"
            ),
            BadInput(
                "frac_bits elsewhere",
                lambda: {"x": _x(), "width": 8, "frac_bits": torch.zeros((), device="meta")},
                ValueError,
                "got meta",
            ),
        ),
    ),
    OpSpec(
        name="integer_matmul",
        family="fixedpoint",
        function=_one(products.integer_matmul),
        reference=_one(reference.integer_matmul),
        sample=_matmul_sample,
        options=({"a_largest": 128, "b_largest": 128}, {"a_largest": 32768, "b_largest": 32768}),
        differentiable=(),
        exact=(0,),
        raw_ops=("integer_conv",),
        module=None,
        dtypes=(torch.int16,),
        bad_inputs=(
            *_bad_product(_valid_matmul),
            BadInput(
                "other depths",
                lambda: {**_valid_matmul(), "b": _integers("cpu", 0, 3, 7)},
                ValueError,
                r"got \(2, 6\) and \(3, 7\)",
            ),
        ),
    ),
    OpSpec(
        name="integer_conv2d",
        family="fixedpoint",
        function=_one(products.integer_conv2d),
        reference=_one(reference.integer_conv2d),
        sample=_conv_sample,
        options=(
            {"x_largest": 128, "weight_largest": 128},
            {"x_largest": 32768, "weight_largest": 32768, "padding": 1},
            {"x_largest": 128, "weight_largest": 128, "stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)},
        ),
        differentiable=(),
        exact=(0,),
        raw_ops=("integer_conv",),
        module=None,
        dtypes=(torch.int16,),
        bad_inputs=(
            *_bad_product(_valid_conv),
            _bad_conv(
                "three strides", r"stride to be an integer or two, of at least 1, got \(1, 1, 1\)", stride=(1, 1, 1)
            ),
            _bad_conv("no stride", "stride .* of at least 1, got 0", stride=0),
            _bad_conv("padding below 0", "padding .* of at least 0, got -1", padding=-1),
            _bad_conv("no dilation", "dilation .* of at least 1, got 0", dilation=0),
            _bad_conv("groups", "groups that divide 6 channels and 3 outputs, 6 channels each, got 2", groups=2),
            _bad_conv("a kernel that is too large", r"padded image, got \(3, 2\) over \(4, 5\)", dilation=2),
        ),
    ),
]
