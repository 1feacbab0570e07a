"""Spectral mixing of the token grids that a patch embedding and a layer norm make of real CIFAR-10 images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from math import log2, prod

import pytest
import torch
import torch.nn.functional as F
from harness import Candidate, Workload, cases, compare
from measure import DEVICE, saved_for_backward
from paired import Paired
from torch import Tensor, nn

from fastcifar import _library
from fastcifar.data import cifar10, normalize
from fastcifar.spectral import SpectFormer, afno, fnet, spectral_gate
from fastcifar.spectral.layers import Attention, GridFilter

KERNEL = _library.owned("spectral_gate_forward", DEVICE.type)
MISSING = "" if KERNEL else "no kernel serves this device, so this is the reference"
Grid = tuple[int, int, int, int]  # B, H, W, C
PATCH = 4


def tokens(shape: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens ``[B, H W, C]`` of a spectral layer: images, resized to four times the grid, through an embedding of
    4 x 4 patches and a layer norm; weights from a fixed seed. 8 x 8 is what an image of 32 x 32 gives as it is."""
    batch, height, width, channels = shape
    images = normalize(cifar10(split="test")[0][:batch])
    if (height, width) != (8, 8):
        images = F.interpolate(images, (PATCH * height, PATCH * width), mode="bilinear", align_corners=False)
    weight = torch.randn(channels, 3, PATCH, PATCH, generator=torch.Generator().manual_seed(0))
    embedded = F.conv2d(images, weight, stride=PATCH).flatten(2).transpose(1, 2)
    return F.layer_norm(embedded, (channels,), eps=1e-6).to(dtype).contiguous()


def gates(shape: Grid) -> Tensor:
    """Complex gates ``[H, W // 2 + 1, C, 2]`` as the official code initialises them."""
    _, height, width, channels = shape
    generator = torch.Generator().manual_seed(2)
    return 0.02 * torch.randn(height, width // 2 + 1, channels, 2, generator=generator)


# ---- the gate, four ways ---------------------------------------------------------------------------------------------


def official(x: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """What GFNet and SpectFormer run: torch.fft in float32, and a complex product."""
    planes = x.view(x.shape[0], *grid, x.shape[-1]).float()
    spectrum = torch.fft.rfft2(planes, dim=(1, 2), norm="ortho") * torch.view_as_complex(weight)
    return torch.fft.irfft2(spectrum, s=grid, dim=(1, 2), norm="ortho").view(x.shape).to(x.dtype)


@lru_cache
def _matrices(height: int, width: int) -> tuple[Tensor, ...]:
    """Cosines and sines of the transform over W, real to half spectrum, and back; the complex one over H and back."""

    def waves(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        turns = torch.outer(torch.arange(rows), torch.arange(columns)) % columns
        angle = turns.double() * (2 * torch.pi / columns)
        return angle.cos() / columns**0.5, angle.sin() / columns**0.5

    columns = width // 2 + 1
    cos, sin = waves(columns, width)
    twice = torch.full((columns,), 2.0, dtype=torch.float64)  # a column stands for itself and its mirror image
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    c, s = waves(height, height)
    over_height = torch.cat([torch.cat([c, s], 1), torch.cat([-s, c], 1)])
    every = (cos, -sin, (cos.T * twice), (-sin.T * twice), over_height, over_height.T)
    return tuple(matrix.float().contiguous().to(DEVICE) for matrix in every)


def matmul_dft(x: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """The transforms as products with small real matrices, which torch.compile can generate code for."""
    (height, width), (batch, _, channels) = grid, x.shape
    columns = width // 2 + 1
    cos, sin, back_cos, back_sin, over_height, back = _matrices(height, width)
    rows = x.view(batch, height, width, channels).float()
    half = torch.stack([cos @ rows, sin @ rows], 1)  # [B, 2, H, K, C]: over W
    z = (over_height @ half.view(batch, 2 * height, columns * channels)).view(half.shape)
    real, imag, w_real, w_imag = *z.unbind(1), *weight.unbind(-1)
    mixed = torch.stack([real * w_real - imag * w_imag, real * w_imag + imag * w_real], 1)
    real, imag = (back @ mixed.view(batch, 2 * height, columns * channels)).view(half.shape).unbind(1)
    return (back_cos @ real + back_sin @ imag).view(x.shape).to(x.dtype)


def ours(x: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    return spectral_gate(x, weight, grid)


def compiled(function: Callable[..., Tensor], *extra: object) -> Callable[..., Tensor]:
    torch.compiler.reset()  # else a new shape is compiled as a dynamic one, which is slower
    fast = torch.compile(function)
    return lambda *inputs: fast(*inputs, *extra)


# ---- what it must cost -----------------------------------------------------------------------------------------------


def butterflies(n: int) -> float:
    """Operations of a complex transform of n points: split radix, 4 n log2 n - 6 n + 8, which other sizes do not
    reach."""
    return 4 * n * log2(n) - 6 * n + 8 if n > 1 else 0.0


def transform(height: int, width: int) -> float:
    """Operations an element of a real transform over the grid: H rows and W columns, two real ones in a complex one."""
    return (butterflies(height) / height + butterflies(width) / width) / 2


def gate_workload(shape: Grid, dtype: torch.dtype = torch.float32, *, full: bool = False, note: str = "") -> Workload:
    """Least traffic: forward reads x and writes y, backward reads x and the gradient g of y and writes that of x, all
    in the dtype of x; the gates are read once each way and their gradient is written once, all in float32.
    Operations an element, k = (W // 2 + 1) / W: two transforms and a complex product (6 k) forward; three transforms
    (x again, g, and the inverse), that product and a complex multiply-add for the gates (8 k) backward."""
    _, height, width, _ = shape
    k = (width // 2 + 1) / width
    one_way = transform(height, width)
    gate_bytes = 8 * k / shape[0]
    half = dtype != torch.float32
    return Workload(
        family="spectral",
        op="spectral_gate",
        title=f"{list(shape)} {'bfloat16' if half else 'float32'}".replace(", ", ","),
        make=lambda: (tokens(shape, dtype), gates(shape)),
        elements=prod(shape),
        forward_bytes=2 * dtype.itemsize + gate_bytes,
        backward_bytes=3 * dtype.itemsize + 2 * gate_bytes,
        forward_flops=2 * one_way + 6 * k,
        backward_flops=3 * one_way + 14 * k,
        output_tolerance=torch.finfo(dtype).eps if half else 2e-6,
        gradient_tolerance=torch.finfo(dtype).eps if half else 2e-6,
        full=full,
        note=note,
    )


SHAPES: tuple[Grid, ...] = ((64, 8, 8, 256), (64, 14, 14, 384), (64, 32, 32, 64))
MORE: tuple[Grid, ...] = (
    (64, 7, 7, 512),
    (64, 16, 16, 256),
    (64, 28, 28, 128),
    (32, 56, 56, 64),
    (1, 8, 8, 256),
    (1, 14, 14, 384),
    (64, 13, 13, 128),
    (64, 9, 15, 128),
    (16, 31, 31, 64),
)
GRIDS = {
    workload: shape[1:3]
    for shapes, full, dtype in (
        (SHAPES, False, torch.float32),
        (MORE, True, torch.float32),
        (SHAPES, True, torch.bfloat16),
    )
    for shape in shapes
    for workload in [gate_workload(shape, dtype, full=full)]
}


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")  # the table shows it
@cases(GRIDS)
def test_spectral_gate(paired: Paired, workload: Workload, mode: str, mapped: bool) -> None:
    grid = GRIDS[workload]
    candidates = [
        Candidate("official, eager", "reference", lambda: partial(official, grid=grid)),
        Candidate("official, torch.compile", "compiled", lambda: compiled(official, grid)),
        Candidate("DFT as matmul", "peer", lambda: partial(matmul_dft, grid=grid)),
        Candidate("DFT as matmul, torch.compile", "compiled", lambda: compiled(matmul_dft, grid), full=True),
        Candidate("fastcifar", "ours", lambda: partial(ours, grid=grid), note=MISSING),
    ]
    compare(paired, workload, mode, mapped, candidates)


# ---- AFNO and FNet ---------------------------------------------------------------------------------------------------

BLOCKS, THRESHOLD = 8, 0.01


def afno_inputs(shape: Grid) -> tuple[Tensor, ...]:
    size = shape[-1] // BLOCKS
    generator = torch.Generator().manual_seed(2)
    sizes = ((2, BLOCKS, size, size), (2, BLOCKS, size), (2, BLOCKS, size, size), (2, BLOCKS, size))
    return tokens(shape), *[0.02 * torch.randn(each, generator=generator) for each in sizes]


def official_afno(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, grid: tuple[int, int]) -> Tensor:
    """AFNO as the official code computes it: real products a part and a layer, written into tensors of zeros."""
    planes = x.float().reshape(x.shape[0], *grid, x.shape[-1])
    z = torch.fft.rfft2(planes, dim=(1, 2), norm="ortho").unflatten(-1, (BLOCKS, -1))

    def layer(real: Tensor, imag: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        product = partial(torch.einsum, "...bi,bio->...bo")
        return (
            product(real, w[0]) - product(imag, w[1]) + b[0],
            product(imag, w[0]) + product(real, w[1]) + b[1],
        )

    hidden, out = ([torch.zeros(z.shape, device=x.device) for _ in range(2)] for _ in range(2))
    for target, part in zip(hidden, layer(z.real, z.imag, w1, b1), strict=True):
        target[:] = part.relu()
    for target, part in zip(out, layer(*hidden, w2, b2), strict=True):
        target[:] = part
    mixed = torch.view_as_complex(F.softshrink(torch.stack(out, -1), THRESHOLD)).flatten(-2)
    return torch.fft.irfft2(mixed, s=grid, dim=(1, 2), norm="ortho").reshape(x.shape).to(x.dtype) + x


def afno_workload(shape: Grid, *, full: bool = False) -> Workload:
    """Traffic as for the gate, the weights left out. Operations: transforms, and two layers of C / BLOCKS complex
    multiply-adds (8 each) a value of the half spectrum; twice that backward, and a transform of x again."""
    _, height, width, channels = shape
    layers = 2 * 8 * channels / BLOCKS * (width // 2 + 1) / width
    one_way = transform(height, width)
    return Workload(
        family="spectral",
        op="afno",
        title=f"{list(shape)} float32".replace(", ", ","),
        make=partial(afno_inputs, shape),
        elements=prod(shape),
        forward_bytes=8,
        backward_bytes=12,
        forward_flops=2 * one_way + layers,
        backward_flops=3 * one_way + 2 * layers,
        output_tolerance=2e-6,
        gradient_tolerance=1e-3,  # where rounding decides whether a ReLU or a threshold passes, it decides a gradient
        full=full,
    )


AFNO_GRIDS = {
    afno_workload(shape, full=full): shape[1:3] for shape, full in (((64, 8, 8, 256), False), ((32, 14, 14, 768), True))
}


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@cases(AFNO_GRIDS)
def test_afno(paired: Paired, workload: Workload, mode: str, mapped: bool) -> None:
    grid = AFNO_GRIDS[workload]
    candidates = [
        Candidate("official, eager", "reference", lambda: partial(official_afno, grid=grid)),
        Candidate("official, torch.compile", "compiled", lambda: compiled(official_afno, grid), full=True),
        Candidate("fastcifar", "ours", lambda: partial(afno, spatial_size=grid, sparsity_threshold=THRESHOLD)),
    ]
    compare(paired, workload, mode, mapped, candidates)


def fnet_workload(shape: Grid, *, full: bool = False) -> Workload:
    """Backward is the same op on the gradient: it reads that, writes that of x, and needs no x."""
    batch, height, width, channels = shape
    flops = transform(height * width, channels)
    return Workload(
        family="spectral",
        op="fnet",
        title=f"[{batch},{height * width},{channels}] float32",
        make=lambda: (tokens(shape),),
        elements=prod(shape),
        forward_bytes=8,
        backward_bytes=8,
        forward_flops=flops,
        backward_flops=flops,
        output_tolerance=2e-6,
        gradient_tolerance=2e-6,
        full=full,
    )


@cases([fnet_workload((64, 8, 8, 256)), fnet_workload((64, 14, 14, 384), full=True)])
def test_fnet(paired: Paired, workload: Workload, mode: str, mapped: bool) -> None:
    candidates = [
        Candidate("official, eager", "reference", lambda: lambda x: torch.fft.fft2(x).real),
        Candidate("fastcifar", "ours", lambda: fnet),
    ]
    compare(paired, workload, mode, mapped, candidates)


# ---- a training step of a whole model --------------------------------------------------------------------------------


def official_attention(layer: Attention, x: Tensor) -> Tensor:
    """Attention as the official code computes it: the matrix of weights in full."""
    q, k, v = layer.qkv(x).reshape(*x.shape[:2], 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return layer.proj((weights @ v).transpose(1, 2).reshape(x.shape))


def official_model(model: SpectFormer) -> SpectFormer:
    """A copy, with the same weights, whose filters and attention run the official formulation."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, GridFilter):
            layer.forward = lambda x, own=layer: official(x, own.complex_weight, own.grid)
        elif isinstance(layer, Attention):
            layer.forward = partial(official_attention, layer)
    return model


@pytest.mark.parametrize(("patch", "dim", "target"), [(2, 64, 1 / 1.5), (4, 256, 1.0)], ids=["patch2", "patch4"])
def test_training_step(paired: Paired, patch: int, dim: int, target: float) -> None:
    """Forward, backward and update of a SpectFormer on a batch of real images. With 256 channels nine tenths of a step
    are linear layers, the same in both."""
    batch, depth, alpha = 32, 8, 4
    every, labels = cifar10(split="test")
    images, labels = normalize(every[:batch]).to(DEVICE), labels[:batch].to(DEVICE)
    torch.manual_seed(0)
    model = SpectFormer(32, patch, num_classes=10, embed_dim=dim, depth=depth, alpha=alpha, num_heads=4).to(DEVICE)
    models = {"official, eager": official_model(model), "fastcifar": model}

    def step(model: nn.Module) -> Callable[[], Tensor]:
        adam = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def call() -> Tensor:
            loss = F.cross_entropy(model(images), labels)
            adam.zero_grad()
            loss.backward()
            adam.step()
            return loss.detach()

        return call

    workload = f"{batch} images, patches of {patch}, {dim} channels, {alpha} spectral blocks and {depth - alpha} others"
    paired.describe("spectral", op="SpectFormer training step", workload=workload, mode="call")
    for name, each in models.items():
        _, saved = saved_for_backward(lambda net=each: F.cross_entropy(net(images), labels), list(each.parameters()))
        role, goal = ("ours", target) if name == "fastcifar" else ("reference", None)
        paired.record(name, role=role, target=goal, note=f"saves {saved * 1e-6:.1f} MB for backward")
    calls = {name: step(each) for name, each in models.items()}
    theirs, own = (call() for call in calls.values())
    assert (theirs - own).abs() <= 1e-5 * theirs, f"the first losses are {theirs} and {own}"
    paired.time(calls)
