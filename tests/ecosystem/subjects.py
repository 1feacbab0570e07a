"""The rows of the ecosystem's matrix: every public module, how it is made, what goes in, what cannot apply and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar import diffusion, earlyexit, fixedpoint, spectral, spiking
from fastcifar.compat import afno, earlyon, gfnet, snntorch, spectformer, spectformer_hierarchical, spikingjelly

FEATURES = {
    "compile": "torch.compile, one graph",
    "dynamic": "torch.compile, one graph for any batch",
    "export": "torch.export",
    "aoti": "AOTInductor package",
    "autocast": "autocast",
    "scaler": "GradScaler",
    "ddp": "DDP",
    "fsdp": "FSDP",
    "grad": "torch.func.grad",
    "vmap": "vmap",
    "checkpoint": "activation checkpointing",
    "copy": "deepcopy, pickle, state_dict",
    "meta": "fake tensors",
}

GRAPHS = ("compile", "dynamic", "export", "aoti", "vmap", "meta")

# Reasons, each a sentence; a link where the limit is torch's.
DECIDES = (
    "Which rows go on is read from the data, so there is no one graph; its mode `masked` has one "
    "([torch's page](https://docs.pytorch.org/docs/stable/export.html#data-shape-dependent-control-flow))."
)
LEAVES = "In evaluation rows leave at exits that are read from the data; in training it is one graph."
TYPED = (
    "The type of a result travels beside the tensor and follows trained binary points, which are read as numbers, so a "
    "graph of tensors cannot hold it. `quantize`, `quantize_trainable` and `FixedPoint` trace, and `to_hls` writes a "
    "network of these layers as C++."
)
BOUNDS = "SpikingJelly keeps its bounds as tensors, which are read as numbers."
MEMBRANE = (
    "snnTorch keeps the membrane as a buffer that takes the input's shape at the first call, which the buffer of an "
    "exported program cannot."
)
NESTED = (
    "PyTorch's reentrant variant does not look into nested inputs and outputs ([torch's page]"
    "(https://docs.pytorch.org/docs/stable/checkpoint.html)); the other one does."
)
INFINITE = (
    "An open bound is an infinity, which AOTInductor's package writes as a string and then cannot read (torch 2.13: "
    "`type must be number, but is string`); a finite bound works."
)
SCALARS = (
    "PyTorch's `fully_shard` takes no scalar parameters ([torch's page]"
    "(https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html)): give them a shape of `(1,)`, or name "
    "them in `ignored_params`."
)
STATE = "Batch statistics of mapped copies cannot be written into one buffer ([torch's page](https://docs.pytorch.org/docs/stable/func.batch_norm.html))."


@dataclass(frozen=True)
class Subject:
    """One public module.

    Attributes:
        name: ``family.Class``.
        make: a module, with the same parameters at each call.
        inputs: its arguments; the first dimension that ``batch`` names is the one that grows.
        without: features that do not apply, with the reason.
        batch: the dimension of the batch in every input.
        trains: whether outputs have a gradient to the inputs or the parameters.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    without: dict[str, str] = field(default_factory=dict)
    batch: int = 0
    trains: bool = True


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make(*args, **options)

    return build


def _spiking() -> list[Subject]:
    sequence = lambda: (numbers(4, 6, 5) * 2,)  # noqa: E731
    images = lambda: (numbers(4, 3, 5, 4, 4) * 2,)  # noqa: E731
    limits = {"PLIF": {"fsdp": SCALARS}, "KLIF": {"fsdp": SCALARS}, "SignedIF": {"aoti": INFINITE}}
    found = [
        Subject(f"spiking.{name}", seeded(getattr(spiking, name)), sequence, limits.get(name, {}), batch=1)
        for name in (
            *("IF", "LIF", "PLIF", "QIF", "EIF", "KLIF", "ILIF", "Leaky", "Izhikevich", "CUBALIF", "ALIF", "SignedIF"),
        )
    ]
    norms = {"ThresholdDependentBatchNorm": (0.7, 1.5, 5), "TemporalEffectiveBatchNorm": (4, 5)}
    norms["BatchNormThroughTime"] = (4, 5)
    for name, arguments in norms.items():
        for dims, x in (("1d", sequence), ("2d", images)):
            make = seeded(getattr(spiking, name + dims), *arguments)
            found.append(Subject(f"spiking.{name}{dims}", make, x, batch=1, without={"vmap": STATE}))
    found.append(
        Subject(
            "spiking.FusedNeuron",
            lambda: spiking.FusedNeuron(nn.BatchNorm1d(5).eval(), spiking.IF()).eval(),
            sequence,
            batch=1,
        )
    )
    plain = lambda: (numbers(6, 5),)  # noqa: E731
    found += [
        Subject("spiking.QCFS", spiking.QCFS, plain, {"fsdp": SCALARS}),
        Subject("spiking.LSQ", lambda: spiking.LSQ(init=0.2), plain, {"fsdp": SCALARS}),
    ]

    def network() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), spiking.QCFS(4), nn.Flatten(), nn.Linear(16, 5))
        net(numbers(8, 3, 4, 4))
        return spiking.convert(net.eval(), steps=4).eval()

    image = lambda: (numbers(5, 3, 4, 4),)  # noqa: E731
    found.append(Subject("spiking.SpikingNetwork", network, image, trains=False))
    found.append(
        Subject(
            "spiking.DynamicConfidence",
            lambda: spiking.DynamicConfidence(network(), steps=4).eval(),
            image,
            without=dict.fromkeys(GRAPHS, DECIDES),
            trains=False,
        )
    )
    return found


def _spectral() -> list[Subject]:
    tokens, grid = (lambda: (numbers(3, 16, 8),)), (lambda: (numbers(3, 4, 4, 8),))
    picture = lambda: (numbers(3, 3, 16, 16),)  # noqa: E731
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_classes": 5}
    stages = {"embed_dims": (8, 8, 8, 8), "num_heads": (2, 2, 2, 2), "depths": (1, 1, 1, 1), "mlp_ratios": (2, 2, 2, 2)}
    pyramid = {"img_size": 32, "embed_dim": (8, 8, 8, 8), "depth": (1, 1, 1, 1), "num_classes": 5}
    return [
        Subject("spectral.GlobalFilter", seeded(spectral.GlobalFilter, 8, 4, 3), tokens),
        Subject("spectral.SpectralGatingNetwork", seeded(spectral.SpectralGatingNetwork, 8, 4, 3), tokens),
        Subject("spectral.FourierLayer", spectral.FourierLayer, tokens),
        Subject("spectral.AFNO1D", seeded(spectral.AFNO1D, 8, 2), tokens),
        Subject("spectral.AFNO2D", seeded(spectral.AFNO2D, 8, 2), grid),
        Subject("spectral.BFNO2D", seeded(spectral.BFNO2D, 8, 2), grid),
        Subject("spectral.GFNet", seeded(spectral.GFNet, **small), picture),
        Subject("spectral.SpectFormer", seeded(spectral.SpectFormer, **small, alpha=1, num_heads=2), picture),
        Subject("spectral.GFNetPyramid", seeded(spectral.GFNetPyramid, **pyramid), lambda: (numbers(2, 3, 32, 32),)),
        Subject(
            "spectral.SpectFormerH",
            seeded(spectral.SpectFormerH, num_classes=5, stem_hidden_dim=8, img_size=32, **stages),
            lambda: (numbers(2, 3, 32, 32),),
            without={"vmap": STATE},
        ),
    ]


def _fixedpoint() -> list[Subject]:
    from fastcifar.fixedpoint.casting import with_type

    kind = fixedpoint.FixedType(8, 3)

    def typed(*shape: int, seed: int = 0) -> Tensor:
        return with_type((numbers(*shape, seed=seed) * 16).round().clamp(-128, 127) / 32, kind)

    def layer(name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            torch.manual_seed(0)
            made = getattr(fixedpoint, name)(*args, **options)
            made(*inputs[name]())  # calibrates
            return made.eval()

        return build

    flat, image = (lambda: (typed(3, 6),)), (lambda: (typed(3, 2, 4, 4),))
    inputs = {
        "FixedLinear": flat,
        "FixedConv2d": image,
        "FixedBatchNorm2d": image,
        "FixedReLU": flat,
        "FixedAdd": lambda: (typed(3, 6), typed(3, 6, seed=1)),
        "FixedAvgPool2d": image,
        "FixedMaxPool2d": image,
        "FixedFlatten": image,
        "FixedInput": lambda: (numbers(3, 6),),
    }
    plain = lambda: (numbers(3, 6),)  # noqa: E731
    typed_alone = dict.fromkeys((*GRAPHS, "grad", "reentrant"), TYPED)
    scalar = {**typed_alone, "fsdp": SCALARS}
    return [
        Subject("fixedpoint.FixedPoint", lambda: fixedpoint.FixedPoint(8, 3), plain),
        Subject("fixedpoint.FixedCast", lambda: fixedpoint.FixedCast(8, 4.0), plain, scalar),
        Subject("fixedpoint.PowerOfTwo", lambda: fixedpoint.PowerOfTwo(2), plain),
        Subject("fixedpoint.FixedInput", layer("FixedInput", 8), inputs["FixedInput"], scalar, trains=False),
        Subject("fixedpoint.FixedLinear", layer("FixedLinear", 6, 5), flat, typed_alone),
        Subject("fixedpoint.FixedConv2d", layer("FixedConv2d", 2, 3, 3), image, typed_alone),
        Subject("fixedpoint.FixedBatchNorm2d", layer("FixedBatchNorm2d", 2), image, typed_alone),
        Subject("fixedpoint.FixedReLU", layer("FixedReLU"), flat, scalar),
        Subject("fixedpoint.FixedAdd", layer("FixedAdd"), inputs["FixedAdd"], scalar),
        Subject("fixedpoint.FixedAvgPool2d", layer("FixedAvgPool2d"), image, scalar),
        Subject("fixedpoint.FixedMaxPool2d", layer("FixedMaxPool2d", 2), image, typed_alone),
        Subject("fixedpoint.FixedFlatten", layer("FixedFlatten"), image, typed_alone),
    ]


def _staged(mode: str) -> nn.Module:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(a, 8), nn.ReLU()) for a in (6, 8)]
    return earlyexit.EarlyExit(stages, [nn.Linear(8, 4) for _ in range(2)], thresholds=0.4, mode=mode).eval()


def _earlyexit() -> list[Subject]:
    rows = lambda: (numbers(5, 6),)  # noqa: E731
    graphs = dict.fromkeys(GRAPHS, DECIDES)
    return [
        Subject("earlyexit.EarlyExit", lambda: _staged("masked"), rows, {"aoti": INFINITE}, trains=False),
        Subject("earlyexit.EarlyExit (compact)", lambda: _staged("compact"), rows, without=graphs, trains=False),
        Subject(
            "earlyexit.JointExitLoss",
            earlyexit.JointExitLoss,
            lambda: ([numbers(5, 4), numbers(5, 4, seed=1)], torch.tensor([0, 1, 2, 3, 0])),
            without={"reentrant": NESTED},
        ),
    ]


class _Means(diffusion.ImageVAE):
    """Without the noise that ``forward`` draws, which no two calls share."""

    def __init__(self) -> None:
        super().__init__(4, size=8, width=4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(x)[0])


def _diffusion() -> list[Subject]:
    images = lambda: (numbers(2, 3, 8, 8), torch.tensor([0.3, 0.7]))  # noqa: E731

    uvit = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return [
        Subject(
            "diffusion.UViT",
            seeded(diffusion.UViT, **uvit),
            images,
            without={**dict.fromkeys(("dynamic", "export", "aoti", "vmap", "meta"), LEAVES), "reentrant": NESTED},
        ),
        Subject("diffusion.UncertaintyHead", seeded(diffusion.UncertaintyHead, 6), lambda: (numbers(3, 4, 6),)),
        Subject("diffusion.ImageVAE", seeded(_Means), lambda: (numbers(3, 3, 8, 8),)),
    ]


def _compat() -> list[Subject]:
    step = lambda: (numbers(6, 5) * 2,)  # noqa: E731
    tokens = lambda: (numbers(3, 16, 8),)  # noqa: E731
    scalar = {name: {"fsdp": SCALARS} for name in ("ParametricLIFNode", "KLIFNode")}
    found = [
        Subject(f"compat.spikingjelly.{name}", seeded(getattr(spikingjelly, name)), step, scalar.get(name, {}))
        for name in (
            *("IFNode", "LIFNode", "ParametricLIFNode", "QIFNode", "EIFNode", "IzhikevichNode", "KLIFNode"),
            *("CUBALIFNode", "ILIFNode"),
        )
    ]
    bounds = dict.fromkeys(("compile", "dynamic", "export", "aoti", "meta"), BOUNDS)
    return [
        *found,
        Subject("compat.spikingjelly.STBIFNode", lambda: spikingjelly.STBIFNode(torch.tensor(1.0), 4), step, bounds),
        Subject(
            "compat.snntorch.Leaky",
            lambda: snntorch.Leaky(beta=0.9),
            step,
            dict.fromkeys(("export", "aoti", "meta"), MEMBRANE),
        ),
        Subject("compat.gfnet.GlobalFilter", seeded(gfnet.GlobalFilter, 8, 4, 3), tokens),
        Subject("compat.afno.AFNO1D", seeded(afno.AFNO1D, 8, 2), tokens),
        Subject("compat.afno.AFNO2D", seeded(afno.AFNO2D, 8, 2), lambda: (numbers(3, 4, 4, 8),)),
        Subject("compat.spectformer.SpectralGatingNetwork", seeded(spectformer.SpectralGatingNetwork, 8, 4, 3), tokens),
        Subject(
            "compat.spectformer_hierarchical.SpectralGatingNetwork",
            seeded(spectformer_hierarchical.SpectralGatingNetwork, 8, 4, 3),
            lambda: (numbers(3, 16, 8), 4, 4),
        ),
        Subject(
            "compat.earlyon.EarlyExitHead",
            lambda: seeded(earlyon.EarlyExitHead, 6, 4)().eval(),
            lambda: (numbers(3, 6, 4, 4),),
        ),
    ]


SUBJECTS = [*_spiking(), *_spectral(), *_fixedpoint(), *_earlyexit(), *_diffusion(), *_compat()]

UNTRAINED = "It has no parameters, so there is no gradient to share."
DECISION = "It decides or counts, and has no gradient."


def why_not(subject: Subject, feature: str) -> str | None:
    """The reason why a feature does not apply, or None."""
    if feature in ("grad", "scaler", "checkpoint") and not subject.trains:
        return DECISION
    if feature in ("ddp", "fsdp") and not (subject.trains and list(subject.make().parameters())):
        return UNTRAINED if subject.trains else DECISION
    return subject.without.get(feature)


# Public modules without a row of their own.
ELSEWHERE = {
    "diffusion.DiffuseVAE": "Holds a network and samples in a loop; the network and the solver's steps have rows.",
    "diffusion.DeeDiffLoss": "Takes what UViT returns.",
}


def public_modules() -> list[str]:
    """``family.Class`` of every public module of the five families."""
    return [
        f"{family.__name__.rpartition('.')[2]}.{name}"
        for family in (spiking, spectral, fixedpoint, earlyexit, diffusion)
        for name in family.__all__
        if inspect.isclass(getattr(family, name)) and issubclass(getattr(family, name), nn.Module)
    ]
