"""A small VAE of images, and DiffuseVAE as a module around it or around a decoder of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import expect_tensors
from .diffusevae import diffusevae_loss, diffusevae_sample, diffusevae_table
from .schedule import DiscreteVP

__all__ = ["DiffuseVAE", "DiffuseVAEResult", "ImageVAE"]


class ImageVAE(nn.Module):
    r"""A convolutional VAE of images from -1 to 1, of a class if ``num_classes`` is given; ours, and small.

    Three convolutions of stride 2 and a linear layer each way, SiLU between them, tanh at the end.

    Args:
        latent: size of z. Default 128.
        channels, size: of the images, whose side 8 divides. Default 3 and 32.
        width: channels after the first convolution. Default 32.
        num_classes: of the labels that encoder and decoder are told; 0 (default): none.
        beta: weight of the divergence. Default 1.

    ``forward(x, y=None)`` is the loss, the mean over samples of
    ``sum (x - decode(z))^2 / 2 + beta KL(N(mean, e^logvar), N(0, 1))``.

    Raises:
        ValueError: a size does not fit; at a call, images of another shape, or labels missing or not asked for.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv 1312.6114.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import ImageVAE
        >>> vae = ImageVAE(latent=8, size=16, width=8)
        >>> x = torch.zeros(2, 3, 16, 16)
        >>> vae.decode(vae.encode(x)[0]).shape, vae(x).shape
        (torch.Size([2, 3, 16, 16]), torch.Size([]))
    """

    def __init__(
        self,
        latent: int = 128,
        channels: int = 3,
        size: int = 32,
        width: int = 32,
        num_classes: int = 0,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        if min(latent, channels, size, width) < 1 or size % 8:
            raise ValueError(
                f"ImageVAE: expected positive sizes and a side that 8 divides, got latent {latent}, "
                f"channels {channels}, size {size}, width {width}"
            )
        self.latent, self.channels, self.size, self.num_classes, self.beta = latent, channels, size, num_classes, beta
        self.grid = (4 * width, size // 8, size // 8)
        flat, wide = 4 * width * (size // 8) ** 2, (channels, width, 2 * width, 4 * width)
        down = [m for i in range(3) for m in (nn.Conv2d(wide[i], wide[i + 1], 4, 2, 1), nn.SiLU())]
        up = [m for i in (3, 2, 1) for m in (nn.SiLU(), nn.ConvTranspose2d(wide[i], wide[i - 1], 4, 2, 1))]
        self.down, self.up = nn.Sequential(*down), nn.Sequential(*up)
        told = latent if num_classes else 0
        self.label = nn.Embedding(num_classes, latent) if num_classes else None
        self.to_latent, self.from_latent = nn.Linear(flat + told, 2 * latent), nn.Linear(latent + told, flat)

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of z, ``[B, latent]`` each."""
        expect_tensors("ImageVAE", x=x)
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.channels, self.size, self.size):
            expected = f"[B, {self.channels}, {self.size}, {self.size}]"
            raise ValueError(f"ImageVAE: expected images {expected}, got {tuple(x.shape)}")
        mean, logvar = self.to_latent(self._told(self.down(x).flatten(1), y)).chunk(2, 1)
        return mean, logvar

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images from z ``[B, latent]``."""
        if z.dim() != 2 or z.shape[1] != self.latent:
            raise ValueError(f"ImageVAE: expected latents [B, {self.latent}], got {tuple(z.shape)}")
        return self.up(self.from_latent(self._told(z, y)).view(-1, *self.grid)).tanh()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean, logvar = self.encode(x, y)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
        return (0.5 * (x - self.decode(z, y)).square().flatten(1).sum(1) + self.beta * divergence).mean()

    def _told(self, features: Tensor, y: Tensor | None) -> Tensor:
        if y is not None:
            expect_tensors("ImageVAE", y=y)
        if (y is not None) != (self.label is not None) or (y is not None and y.shape != (len(features),)):
            expected = f"labels [{len(features)}]" if self.num_classes else "no labels"
            raise ValueError(f"ImageVAE: expected {expected}, got {None if y is None else tuple(y.shape)}")
        return features if y is None or self.label is None else torch.cat([features, self.label(y)], 1)


class DiffuseVAEResult(NamedTuple):
    """Of :meth:`DiffuseVAE.sample`: images, and what the VAE alone made, ``[B, C, H, W]`` each."""

    images: Tensor
    reconstruction: Tensor


class DiffuseVAE(nn.Module):
    r"""A VAE's decoder and the denoiser that refines what it makes.

    Args:
        denoiser: takes ``[B, 2 C, H, W]`` (a noisy image, and the reconstruction) and t ``[B]``; gives the noise.
        decoder: any callable from z ``[B, D]`` to images ``[B, C, H, W]`` from -1 to 1, such as ``ImageVAE().decode``.
        formulation: 1 (default): the reconstruction is an input only; 2: the noisy images are shifted by it too.
        schedule: default ``DiscreteVP.linear()``: T = 1000, beta linear from 1e-4 to 0.02.

    ``forward(x0, reconstruction, **options)`` is :func:`diffusevae_loss`. :meth:`sample` makes images from latents.

    Raises:
        ValueError: ``formulation`` is neither 1 nor 2; at a call, what the functions raise, and steps above T.

    Source: Pandey et al., arXiv 2201.00308.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import DiffuseVAE, ImageVAE
        >>> vae = ImageVAE(latent=8, size=16, width=8)
        >>> class Denoiser(torch.nn.Conv2d):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> model = DiffuseVAE(Denoiser(6, 3, 3, padding=1), vae.decode, formulation=2)
        >>> model.sample(torch.randn(2, 8), steps=10, method="ddim", guidance_weight=0.5).images.shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        denoiser: nn.Module,
        decoder: Callable[[Tensor], Tensor],
        formulation: int = 1,
        schedule: DiscreteVP | None = None,
    ) -> None:
        super().__init__()
        if formulation not in (1, 2):
            raise ValueError(f"DiffuseVAE: expected formulation 1 or 2, got {formulation!r}")
        self.denoiser, self.decoder, self.formulation = denoiser, decoder, formulation
        self.schedule = DiscreteVP.linear() if schedule is None else schedule

    def extra_repr(self) -> str:
        return f"formulation={self.formulation}, T={len(self.schedule)}"

    def forward(self, x0: Tensor, reconstruction: Tensor, **options: Any) -> Tensor:
        return diffusevae_loss(self.denoiser, x0, reconstruction, self.schedule, self.formulation, **options)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        steps: int | None = None,
        method: str = "ddpm",
        *,
        variance: str = "fixed_large",
        eta: float = 0.0,
        clip: bool = True,
        **options: Any,
    ) -> DiffuseVAEResult:
        """Images of latents z ``[B, D]``, by as many steps (default T), their times evenly spaced from 0; the options
        are those of :func:`diffusevae_table` and of :func:`diffusevae_sample`. For other times or solvers, call these.
        """
        points = self.schedule.points(len(self.schedule) if steps is None else steps)
        table = diffusevae_table(points, self.formulation, method, variance=variance, eta=eta, clip=clip)
        reconstruction = self.decoder(z)
        return DiffuseVAEResult(diffusevae_sample(self.denoiser, reconstruction, table, **options), reconstruction)
