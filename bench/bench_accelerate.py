"""``accelerate`` on models of peers, on real images: the layers that it swaps, before and after, and the whole model.

"Layers" are the swapped modules alone, one after the other, each on the input that it had in the model, recorded once
and the same for both sides; of a pipeline, the steps of its scheduler on recorded outputs of its model. Weights are
random: only times and the agreement of the outputs count.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from measure import DEVICE
from paired import Paired
from torch import Tensor, nn

from fastcifar import _swaps, accelerate
from fastcifar.data import cifar10, normalize

TARGET = 0.5  # of the peer's time in the affected layers
LAYERS, WHOLE = 1e-5, 1e-4  # differences that pass, of the magnitude: a model amplifies what rounding leaves of a layer


def images(count: int) -> Tensor:
    return normalize(cifar10(split="test")[0][:count]).to(DEVICE)


# ---- models of peers -------------------------------------------------------------------------------------------------


def spiking_resnet(step_mode: str) -> tuple[nn.Module, Tensor, Callable[[nn.Module], None]]:
    """A residual network of SpikingJelly's layers: a stem and eight blocks of two convolutions, four time steps."""
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    def node() -> nn.Module:
        return neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True)

    def conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
        made = layer.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(made, layer.BatchNorm2d(outputs))

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.node1 = conv(inputs, outputs, stride), node()
            self.conv2, self.node2 = conv(outputs, outputs), node()
            self.down = nn.Identity() if stride == 1 and inputs == outputs else conv(inputs, outputs, stride, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.node2(self.conv2(self.node1(self.conv1(x))) + self.down(x))

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks, inputs = [], 32
            for stage, width in enumerate((32, 64, 128, 256)):
                blocks += [Block(inputs, width, 2 if stage else 1), Block(width, width, 1)]
                inputs = width
            self.body = nn.Sequential(conv(3, 32), node(), *blocks, layer.AdaptiveAvgPool2d(1))
            self.head = nn.Linear(256, 10)

        def forward(self, x: Tensor) -> Tensor:
            if step_mode == "m":
                return self.head(self.body(x).flatten(2))
            return torch.stack([self.head(self.body(step).flatten(1)) for step in x])

    torch.manual_seed(0)
    model = ResNet()
    functional.set_step_mode(model, step_mode)
    return model, images(16).unsqueeze(0).repeat(4, 1, 1, 1, 1), functional.reset_net


class GlobalFilter(nn.Module):
    """GFNet's layer by its definition: gates on the two-dimensional spectrum of the tokens."""

    def __init__(self, dim: int, h: int, w: int) -> None:
        super().__init__()
        self.complex_weight = nn.Parameter(torch.randn(h, w, dim, 2) * 0.02)
        self.w, self.h = w, h

    def forward(self, x: Tensor, spatial_size: tuple[int, int] | None = None) -> Tensor:
        batch, tokens, dim = x.shape
        grid = x.float().view(batch, self.h, tokens // self.h, dim)
        spectrum = torch.fft.rfft2(grid, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.complex_weight)
        return torch.fft.irfft2(spectrum, s=grid.shape[1:3], dim=(1, 2), norm="ortho").reshape(batch, tokens, dim)


def gfnet() -> tuple[nn.Module, Tensor, Callable[[nn.Module], None]]:
    """Patches of 4x4, so 8x8 tokens, 128 channels, six blocks."""

    class Block(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.norm1, self.filter, self.norm2 = nn.LayerNorm(dim), GlobalFilter(dim, 8, 5), nn.LayerNorm(dim)
            self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm2(self.filter(self.norm1(x))))

    class GFNet(nn.Module):
        def __init__(self, dim: int = 128, depth: int = 6) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, dim, 4, 4)
            self.blocks = nn.Sequential(*[Block(dim) for _ in range(depth)])
            self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            return self.head(self.norm(self.blocks(tokens)).mean(1))

    torch.manual_seed(0)
    return GFNet(), images(64), lambda model: None


def quantized_cnn() -> tuple[nn.Module, Tensor, Callable[[nn.Module], None]]:
    """Three convolutions and a linear layer with brevitas's fixed-point weights and activations."""
    qnn = pytest.importorskip("brevitas.nn")
    from brevitas.quant import fixed_point as fp

    weights = {"weight_quant": fp.Int8WeightPerTensorFixedPoint}
    layers: list[nn.Module] = [qnn.QuantIdentity(act_quant=fp.Int8ActPerTensorFixedPoint)]
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [qnn.QuantConv2d(inputs, outputs, 3, padding=1, bias=False, **weights), nn.BatchNorm2d(outputs)]
        layers += [qnn.QuantReLU(act_quant=fp.Uint8ActPerTensorFixedPoint), nn.MaxPool2d(2)]
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Flatten(), qnn.QuantLinear(64 * 16, 10, bias=True, **weights)).to(DEVICE)
    for _ in range(3):  # the ranges of activations
        model(images(64))
    return model.eval(), images(64), lambda model: None


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, Callable]], str]] = {
    "SpikingJelly ResNet, multi-step": (lambda: spiking_resnet("m"), "SpikingJelly"),
    "SpikingJelly ResNet, step by step": (lambda: spiking_resnet("s"), "SpikingJelly"),
    "GFNet": (gfnet, "GFNet"),
    "brevitas CNN": (quantized_cnn, "brevitas"),
}


# ---- the benchmarks --------------------------------------------------------------------------------------------------


def inputs_of(model: nn.Module, names: list[str], x: Tensor) -> list[tuple[str, tuple[Tensor, ...]]]:
    """The calls of these modules in one forward pass: name and arguments, in order."""
    calls: list[tuple[str, tuple[Tensor, ...]]] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: calls.append((name, tuple(a.detach().clone() for a in arguments)))
        )
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return calls


def layers_alone(model: nn.Module, calls: list[tuple[str, tuple[Tensor, ...]]], backward: bool) -> list[Tensor]:
    """Outputs of the modules on their own inputs, and with ``backward`` the gradients of these."""
    results = []
    for name, arguments in calls:
        leaves = tuple(
            a.requires_grad_() if backward and i == len(arguments) - 1 else a for i, a in enumerate(arguments)
        )
        out = model.get_submodule(name)(*leaves)
        results.append(out)
    if not backward:
        return results
    wanted = [arguments[-1] for _, arguments in calls]
    return [*results, *torch.autograd.grad([o.sum() for o in results], wanted)]


def agree(what: str, ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        difference = float((a - b).norm() / b.norm().clamp(min=1e-30))
        if not difference <= tolerance:
            pytest.fail(f"{what}: accelerated and original differ by {difference:.1e} of their magnitude")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("what", MODELS)
def test_models(paired: Paired, monkeypatch: pytest.MonkeyPatch, what: str, mode: str) -> None:
    make, peer = MODELS[what]
    rule = _swaps._COPIED["GlobalFilter"]  # the class above is the published one in other words
    known = _swaps.Rule(rule.family, rule.peer, rule.make, (_swaps.signature(GlobalFilter.forward),))  # type: ignore[arg-type]
    monkeypatch.setitem(_swaps._COPIED, "GlobalFilter", known)
    theirs, x, reset = make()
    theirs, backward = theirs.to(DEVICE), mode != "forward"
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    names = [swap.name for swap in report.swapped]
    calls = inputs_of(theirs, names, x)
    reset(theirs)

    def whole(model: nn.Module) -> list[Tensor]:
        out = model(x)
        # Scales of activations that brevitas still measures have no gradient, on either side.
        wanted = list(model.parameters()) if backward else []
        grads = torch.autograd.grad(out.square().sum(), wanted, materialize_grads=True) if backward else ()
        reset(model)
        return [out, *grads]

    def alone(model: nn.Module) -> list[Tensor]:
        results = layers_alone(model, calls, backward)
        reset(model)
        return results

    family = {"SpikingJelly": "spiking", "GFNet": "spectral", "brevitas": "fixedpoint"}[peer]
    shape = ",".join(map(str, x.shape))
    paired.describe("accelerate", op=what, workload=f"[{shape}], {len(names)} layers of {family}", mode=mode)
    with torch.set_grad_enabled(backward):
        agree(f"{what}, layers", alone(ours), alone(theirs), LAYERS)
        agree(f"{what}, model", whole(ours), whole(theirs), WHOLE)
        paired.record(f"{peer}, layers", role="reference")
        paired.record("fastcifar, layers", role="ours", target=TARGET)
        paired.record(f"{peer}, model", role="peer", note="the whole model")
        paired.record("fastcifar, model", role="ours", note="the whole model")
        paired.time(
            {
                f"{peer}, layers": lambda: alone(theirs),
                "fastcifar, layers": lambda: alone(ours),
                f"{peer}, model": lambda: whole(theirs),
                "fastcifar, model": lambda: whole(ours),
            }
        )


PIPELINES = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}),
    "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
}
STEPS = 10


def sampler(unet: nn.Module, scheduler: Any) -> Any:
    """A pipeline for any scheduler: diffusers' own unconditional ones pass arguments that some do not take."""
    from diffusers import DiffusionPipeline

    class Sampler(DiffusionPipeline):
        def __init__(self, unet: nn.Module, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)
            self.takes_generator = "generator" in inspect.signature(scheduler.step).parameters

        def __call__(self, x: Tensor) -> Tensor:
            generator = torch.Generator(DEVICE).manual_seed(0)
            options = {"generator": generator} if self.takes_generator else {}
            self.scheduler.set_timesteps(STEPS)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t).sample, t, x, **options).prev_sample
            return x

    return Sampler(unet, scheduler)


@torch.no_grad()
@pytest.mark.parametrize("what", PIPELINES)
def test_pipelines(paired: Paired, what: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    name, config = PIPELINES[what]
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 32, "layers_per_block": 1, "norm_num_groups": 4, "block_out_channels": (8, 16)}
    unet = diffusers.UNet2DModel(**sizes, **blocks).to(DEVICE).eval()
    theirs, ours = (sampler(unet, getattr(diffusers, name)(**config)) for _ in range(2))
    accelerate(ours)
    x = images(64)
    noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(STEPS)]
    outputs = [0.5 * x + 0.1 * n for n in noise]

    replayed = itertools.cycle(outputs)
    alone = {
        pipe: sampler(lambda x, t: SimpleNamespace(sample=next(replayed)), pipe.scheduler) for pipe in (ours, theirs)
    }

    def steps(pipe: Any) -> list[Tensor]:
        return [alone[pipe](x)]

    paired.describe(
        "accelerate", op=f"diffusers pipeline, {what}", workload=f"[64,3,32,32], {STEPS} steps", mode="sample"
    )
    agree(f"{what}, steps", steps(ours), steps(theirs), LAYERS)
    agree(f"{what}, pipeline", [ours(x)], [theirs(x)], WHOLE)
    paired.record("diffusers, steps", role="reference")
    paired.record("fastcifar, steps", role="ours", target=TARGET)
    paired.record("diffusers, pipeline", role="peer", note="the whole pipeline")
    paired.record("fastcifar, pipeline", role="ours", note="the whole pipeline")
    paired.time(
        {
            "diffusers, steps": lambda: steps(theirs),
            "fastcifar, steps": lambda: steps(ours),
            "diffusers, pipeline": lambda: theirs(x),
            "fastcifar, pipeline": lambda: ours(x),
        }
    )
