"""Random valid calls of the public functions that fastcifar/<family>/spec.py declares, against their references: sizes,
values, layouts, dtypes, options, gradients and hostile values drawn at random. Part of tests/fuzz.py."""

from __future__ import annotations

import random

import torch
from fuzz_mutations import relaid
from torch import Tensor

from fastcifar.spec import Inputs, OpSpec, all_specs, compare

SPECS = {spec.name: spec for spec in all_specs()}
HOSTILE = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0)


# Sizes of the first tensor that stay: options name them, or they must divide one another.
FIXED = {"inverse_spectrum": (2, 4), "spectrum": (26,), "integer_conv2d": (3, 5)}


def resized(spec: OpSpec, inputs: Inputs, rng: random.Random) -> Inputs:
    """The same tensors with other sizes: elements are repeated or left out along each dimension of the first tensor,
    and along those of the others that have its size."""
    first = next(iter(inputs.values()))
    least = 3 if spec.name == "integer_conv2d" else 1  # its kernel
    varied = [n for n in first.shape if n > 1 and n not in FIXED.get(spec.name, ())]
    sizes = {n: rng.choice((n, n, least, rng.randint(least, n + 4))) for n in varied}
    if spec.name == "spectral_gate" and 7 in sizes:  # weight is [H, W // 2 + 1, C, 2]
        sizes[4] = sizes[7] // 2 + 1
    draw = torch.Generator().manual_seed(rng.randrange(2**60))

    def picked(t: Tensor) -> Tensor:
        for d, n in enumerate(t.shape):
            if n in sizes:
                index = torch.randint(0, n, (sizes[n],), generator=draw)
                t = t.index_select(d, index)
        return t

    if len(set(first.shape)) < first.dim():
        return inputs
    return {name: picked(t) for name, t in inputs.items()}


def spoilt(inputs: Inputs, rng: random.Random) -> Inputs:
    """Values at random replaced by NaN, infinities and zeros, where there are several."""
    result = {}
    for name, t in inputs.items():
        t = t.clone(memory_format=torch.contiguous_format)
        if t.dim() and t.is_floating_point():
            flat = t.view(-1)
            for _ in range(rng.randint(0, 4)):
                if len(flat):
                    flat[rng.randrange(len(flat))] = rng.choice(HOSTILE)
        result[name] = t
    return result


def check(name: str, rng: random.Random) -> None:
    """One call; AssertionError where it is not what the reference says."""
    spec = SPECS[name]
    dtype, options = rng.choice(spec.dtypes), rng.choice(spec.options)
    # torch's sigmoid of one number and of many, which the reference takes it of, differ in the last bit for some.
    seed = 0 if name == "plif" else rng.randrange(1000)
    inputs = spec.sample(rng.choice(("prime", "prime", "prime", "one")), dtype, "cpu", seed)
    if rng.random() < 0.8:
        inputs = resized(spec, inputs, rng)
    # Which elements of a Fourier transform an infinity reaches depends on the order of its sums.
    hostile = dtype.is_floating_point and spec.family != "spectral" and rng.random() < 0.3
    if hostile:
        inputs = spoilt(inputs, rng)
    inputs = {n: relaid(t, rng) if rng.random() < 0.7 else t for n, t in inputs.items()}
    gradients = tuple(n for n in spec.gradients(inputs, options) if not hostile and rng.random() < 0.6)
    shapes = {n: (tuple(t.shape), t.stride()) for n, t in inputs.items()}
    problems = compare(spec, inputs, options, gradients)
    assert not problems, f"{name} {dtype} {shapes} hostile={hostile}: {problems}"
