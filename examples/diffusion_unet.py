"""The denoiser of the diffusion examples: a U-Net of 0.7 million parameters that predicts v, and its weights.

Images are 32 x 32 in [-1, 1], noised as DDPM does (1,000 steps, betas from 1e-4 to 0.02). v = alpha noise - sigma x0 is
what the network is trained on: it stays well scaled where noise is nearly all or nearly nothing. It knows the class of
an image, and one class more that means "any", so guidance can push it away from that (`guided`).
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.diffusion import DiscreteVP

CLASSES = 10
ANY = CLASSES  # the label of an image whose class is not said
SCHEDULE = DiscreteVP.linear()
SIGNAL = SCHEDULE.alpha(torch.arange(len(SCHEDULE))).square()  # the share of the image's variance at each step
WEIGHTS = Path(__file__).parent / "weights" / "diffusion_unet.pt"


class Block(nn.Module):
    """Two convolutions on normalised features; time and class scale and shift between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a block starts as the identity
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding)[..., None, None].chunk(2, 1)
        y = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unflatten(2, (3, self.heads, -1)).unbind(2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return x + self.out(y.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:]))


class UNet(nn.Module):
    """``forward(x, t, label)``: images ``[B, 3, 32, 32]``, steps ``[B]`` from 0 to 999 (between two of them as well),
    classes ``[B]``; returns v."""

    def __init__(self, width: int = 48, deep: int = 96, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = 2 * width
        self.label = nn.Embedding(CLASSES + 1, self.embedding)
        self.time = nn.Sequential(nn.Linear(self.embedding, self.embedding), nn.SiLU())
        self.mix = nn.Sequential(nn.Linear(self.embedding, self.embedding), nn.SiLU())
        self.stem = nn.Conv2d(12, width, 3, padding=1)
        self.down = nn.ModuleList([Block(width, width, self.embedding) for _ in range(2)])
        self.shrink = nn.Conv2d(width, deep, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([Block(deep, deep, self.embedding) for _ in range(blocks)])
        self.attention = nn.ModuleList([Attention(deep) for _ in range(blocks)])
        self.grow = nn.Conv2d(deep, 4 * width, 1)
        self.up = nn.ModuleList([Block(width * (2 - k), width, self.embedding) for k in range(2)])
        self.norm, self.head = nn.GroupNorm(8, width), nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        rates = torch.exp(-math.log(10000) * torch.arange(width) / width)
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        angles = t.to(x.dtype).unsqueeze(1) * self.rates
        embedding = self.mix(self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label))
        x = self.stem(F.pixel_unshuffle(x, 2))
        for block in self.down:
            x = block(x, embedding)
        y = self.shrink(x)
        for block, attention in zip(self.middle, self.attention, strict=True):
            y = attention(block(y, embedding))
        x = torch.cat([x, F.pixel_shuffle(self.grow(y), 2)], 1)
        for block in self.up:
            x = block(x, embedding)
        return F.pixel_shuffle(self.head(F.silu(self.norm(x))), 2)


class Guided:
    """The denoiser of ``labels``, as samplers call it: v of the class and v of any class, which one batch computes."""

    def __init__(self, model: UNet, labels: Tensor) -> None:
        self.model, self.labels = model, torch.cat([labels, torch.full_like(labels, ANY)])
        self.seconds = 0.0

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        begin = time.perf_counter()
        both = x.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        output, uncond = self.model(both, t.repeat(2), self.labels).contiguous().chunk(2)
        self.seconds += time.perf_counter() - begin
        return output, uncond


def save_half(state: dict[str, Tensor], path: Path) -> None:
    """In float16, which halves the file and moves no weight by more than 1 in 2,000."""
    path.parent.mkdir(exist_ok=True)
    torch.save({name: t.half().contiguous() if t.is_floating_point() else t for name, t in state.items()}, path)


def load(path: Path = WEIGHTS) -> UNet:
    """The network that was saved there, in evaluation, its sizes taken from the weights."""
    state = {name: tensor.float() for name, tensor in torch.load(path, weights_only=True).items()}
    model = UNet(len(state["stem.weight"]), len(state["shrink.weight"]))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def tiles(images: Tensor, columns: int) -> Tensor:
    """Images in [-1, 1] side by side, uint8 ``[H, W, 3]``, with a line of white between them."""
    shown = F.pad(((images.clamp(-1, 1) + 1) * 127.5).round().byte(), (0, 1, 0, 1), value=255)
    rows = shown.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # row, its pixels, column, its pixels, colour
    return rows.flatten(0, 1).flatten(1, 2)[:-1, :-1]
