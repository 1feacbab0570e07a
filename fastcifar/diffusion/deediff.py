"""DeeDiff's parts: how uncertain a layer is, what that is trained to be, and what it weighs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._checks import expect_tensors

WEIGHTS = ("predicted", "target")
REDUCTIONS = ("mean", "sum")

__all__ = ["DeeDiffLoss", "UncertaintyHead", "layer_loss", "uncertainty_loss", "uncertainty_target"]


class UncertaintyHead(nn.Module):
    """``u = mean_l sigmoid(w . [x_l, t] + b)``: how uncertain a layer's output is, from its tokens.

    Args:
        dim: features of a token.
        time_dim: features of the time step's embedding, which joins every token. Default 0, no such part.

    ``forward(x, time=None)`` takes tokens ``[B, L, dim]`` and ``[B, time_dim]``, and returns ``[B]``, 0 to 1.

    Raises:
        ValueError: at a call, a shape is not as described.

    Source: Tang et al., "DeeDiff: Dynamic Uncertainty-Aware Early Exiting for Accelerating Diffusion Model Generation",
    arXiv 2309.17074, equation 4; the mean over tokens, and a head a layer, are of razvanmatisan/duodiff.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import UncertaintyHead
        >>> UncertaintyHead(16)(torch.randn(3, 65, 16)).shape
        torch.Size([3])
    """

    def __init__(self, dim: int, time_dim: int = 0) -> None:
        super().__init__()
        self.dim, self.time_dim = dim, time_dim
        self.linear = nn.Linear(dim + time_dim, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        expect_tensors("UncertaintyHead", x=x, **({} if time is None else {"time": time}))
        shape = None if time is None else tuple(time.shape)
        if x.dim() != 3 or x.shape[2] != self.dim or shape != ((len(x), self.time_dim) if self.time_dim else None):
            raise ValueError(
                f"UncertaintyHead: expected tokens [B, L, {self.dim}] and "
                f"{f'time [B, {self.time_dim}]' if self.time_dim else 'no time'}, got {tuple(x.shape)} and {shape}"
            )
        weight, bias = self.linear.weight[0], self.linear.bias
        # The time's part is the same for all tokens: once a sample, not a copy of it beside each token.
        score = x @ weight[: self.dim] + bias
        if time is not None:
            score = score + (time @ weight[self.dim :]).unsqueeze(1)
        return score.sigmoid().mean(1)


def uncertainty_target(output: Tensor, noise: Tensor) -> Tensor:
    """``mean tanh(|output - noise|)`` of each sample, ``[B]``: what the uncertainty of an output should be. It has no
    gradient. Source: DeeDiff, equation 5."""
    with torch.no_grad():
        return (output - noise).abs().tanh().flatten(1).mean(1)


def uncertainty_loss(uncertainty: Sequence[Tensor], target: Sequence[Tensor], reduction: str = "mean") -> Tensor:
    """``sum_i (u_i - target_i)^2`` over the layers, and the mean over the samples, or with "sum" their sum (duodiff).

    Raises:
        ValueError: there are more of one than of the other, or ``reduction`` is unknown.

    Source: DeeDiff, equation 6.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"uncertainty_loss: expected reduction to be one of {', '.join(REDUCTIONS)}; got {reduction!r}"
        )
    if len(uncertainty) != len(target) or not len(target):
        raise ValueError(
            f"uncertainty_loss: expected as many targets as uncertainties, at least one, got {len(target)} and "
            f"{len(uncertainty)}"
        )
    squares = (torch.stack(list(uncertainty)) - torch.stack(list(target))).square().sum(0)
    return squares.mean() if reduction == "mean" else squares.sum()


def layer_loss(outputs: Sequence[Tensor], noise: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``sum_i (1 - w_i) mse(output_i, noise)`` over the early layers, the mean over samples: the uncertainty-aware
    layer loss. ``weights`` are ``[B]`` each. Source: DeeDiff, equation 7."""
    if len(outputs) != len(weights):
        raise ValueError(f"layer_loss: expected weights of {len(outputs)} outputs, got {len(weights)}")
    expect_tensors("layer_loss", noise=noise)
    total = noise.new_zeros(())
    for output, weight in zip(outputs, weights, strict=True):
        total = total + ((1 - weight) * (output - noise).square().flatten(1).mean(1)).mean()
    return total


class DeeDiffLoss(nn.Module):
    r"""``mse(final, noise) + lam * uncertainty_loss + beta * layer_loss``.

    Args:
        lam, beta: weights of the two. Default 1.
        weight: which u the layer loss goes by. ``"predicted"`` (default): the head's, as the paper writes it;
            ``"target"``: what it should have been, as the public reproduction (duodiff) does on purpose.
        detach: with "predicted": whether the layer loss leaves the heads alone. Else they can lower it by claiming to
            be uncertain. Default True.
        reduction: of :func:`uncertainty_loss`. Default ``"mean"``.

    ``forward(outputs, uncertainty, noise)`` takes what :class:`UViT` returns in training.

    Raises:
        ValueError: an option is not as described; at a call, the lists do not fit.

    Source: DeeDiff, equation 8.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import DeeDiffLoss
        >>> noise = torch.zeros(2, 3, 4, 4)
        >>> outputs = [noise + 1, noise]  # of the early layer, and the final one
        >>> round(DeeDiffLoss(lam=0)(outputs, [torch.full((2,), 0.25)], noise).item(), 4)  # (1 - 0.25) * 1
        0.75
    """

    def __init__(
        self,
        lam: float = 1.0,
        beta: float = 1.0,
        weight: str = "predicted",
        *,
        detach: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if weight not in WEIGHTS:
            raise ValueError(f"DeeDiffLoss: expected weight to be one of {', '.join(WEIGHTS)}; got {weight!r}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"DeeDiffLoss: expected reduction to be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
        if not (0 <= lam < math.inf and 0 <= beta < math.inf):
            raise ValueError(f"DeeDiffLoss: expected finite lam and beta of 0 or more, got {lam} and {beta}")
        self.lam, self.beta, self.weight, self.detach, self.reduction = lam, beta, weight, detach, reduction

    def forward(self, outputs: Sequence[Tensor], uncertainty: Sequence[Tensor], noise: Tensor) -> Tensor:
        *early, final = outputs
        if len(uncertainty) != len(early) or not early:
            raise ValueError(
                f"DeeDiffLoss: expected an uncertainty of each early output, at least one, got {len(uncertainty)} of "
                f"{len(early)}"
            )
        target = [uncertainty_target(output, noise) for output in early]
        weights = target if self.weight == "target" else [u.detach() if self.detach else u for u in uncertainty]
        simple = (final - noise).square().mean()
        unsure = uncertainty_loss(uncertainty, target, self.reduction)
        return simple + self.lam * unsure + self.beta * layer_loss(early, noise, weights)
