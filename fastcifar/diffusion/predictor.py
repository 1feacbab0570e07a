"""Ranks schedules before they are tried: a small ensemble of networks that learns from those which have been."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

PAIRS, RATE = 256, 0.01

__all__ = ["SchedulePredictor"]


class SchedulePredictor:
    r"""Scores schedules so that a lower score promises a lower error, by an ensemble of two-layer networks.

    What a search asks is which of its candidates are worth an evaluation, so each network learns the order of the
    errors, not their values, over which they range by powers of ten: the loss of a pair of schedules is
    ``softplus(score_better - score_worse)``, averaged over pairs drawn anew each step. The ensemble's networks differ
    by their first weights and their pairs; the score is their mean less ``optimism`` times their deviation, for what
    they disagree on may be better than they know.

    Args:
        members: networks. Default 4.
        hidden: units of a layer. Default 24.
        steps: of Adam, at a rate of 0.01 and with a weight decay of 1e-3, on 256 pairs a network. Default 60.
        optimism: see above. Default 0.5.

    ``fit(features, errors, seed)`` starts anew each time, so the state of a search is its evaluations alone; equal
    input and seed give equal bits for an equal number of threads. ``score(features)`` gives float64 ``[N]``.

    Raises:
        ValueError: features and errors that do not fit, or fewer than two; a score before a fit.

    Source: S3 (Liu et al., ICLR 2024) trains a predictor of a solver's quality within an evolutionary search; this
    network, its loss and its numbers are ours.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion.predictor import SchedulePredictor
        >>> features = torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> predictor = SchedulePredictor().fit(features, features[:, 0].square(), seed=0)
        >>> bool(predictor.score(torch.tensor([[0.05]])) < predictor.score(torch.tensor([[0.9]])))
        True
    """

    def __init__(self, members: int = 4, hidden: int = 24, steps: int = 60, optimism: float = 0.5) -> None:
        self.members, self.hidden, self.steps, self.optimism = members, hidden, steps, optimism
        self._weights: list[Tensor] = []

    def record(self) -> dict[str, float]:
        """The arguments, as JSON has them."""
        return {"members": self.members, "hidden": self.hidden, "steps": self.steps, "optimism": self.optimism}

    def fit(self, features: Tensor, errors: Tensor, seed: int) -> SchedulePredictor:
        features = features.double()
        if features.dim() != 2 or errors.shape != features.shape[:1] or len(errors) < 2:
            raise ValueError(
                f"SchedulePredictor: expected features [N, F] and errors [N] of at least two schedules, got "
                f"{list(features.shape)} and {list(errors.shape)}"
            )
        generator = torch.Generator().manual_seed(seed)
        # Ranks, where ties and infinities (schedules that diverged) are in order too.
        rank = torch.unique(errors.double(), return_inverse=True)[1]
        self._mean, self._std = features.mean(0), features.std(0).clamp(min=1e-6)
        x = (features - self._mean) / self._std
        sizes = [x.shape[1], self.hidden, self.hidden, 1]
        weights = []
        for fan_in, fan_out in pairwise(sizes):
            shape = (self.members, fan_in, fan_out)
            weights.append(torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5)
            weights.append(torch.zeros(self.members, 1, fan_out, dtype=torch.float64))
        self._weights = [w.requires_grad_() for w in weights]
        # Adam by hand: importing torch.optim takes longer than many a search.
        first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        for step in range(1, self.steps + 1):
            gradients = self._gradients(x, rank, generator)
            with torch.no_grad():
                for w, g, m, v in zip(self._weights, gradients, first, second, strict=True):
                    m.lerp_(g, 0.1)
                    v.lerp_(g * g, 0.001)
                    w.mul_(1 - 1e-5).sub_(RATE * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
        self._weights = [w.detach() for w in self._weights]
        return self

    def score(self, features: Tensor) -> Tensor:
        if not self._weights:
            raise ValueError("SchedulePredictor: expected fit to be called before score")
        if features.dim() != 2 or features.shape[1] != len(self._mean):
            raise ValueError(f"SchedulePredictor: expected features [N, {len(self._mean)}], got {list(features.shape)}")
        x = (features.double() - self._mean) / self._std
        scores = self._forward(x.expand(self.members, -1, -1))
        return scores.mean(0) - self.optimism * scores.std(0, correction=0)

    def _gradients(self, x: Tensor, rank: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            pairs = torch.randint(len(x), (2, self.members, PAIRS), generator=generator)
            one, other = self._forward(x.expand(self.members, -1, -1)).expand(2, -1, -1).gather(2, pairs)
            sign = (rank[pairs[0]] - rank[pairs[1]]).sign()
            loss = (F.softplus(-sign * (one - other)) * sign.abs()).mean()
            return torch.autograd.grad(loss, self._weights)

    def _forward(self, x: Tensor) -> Tensor:
        """``[E, N, F]`` to ``[E, N]``."""
        w1, b1, w2, b2, w3, b3 = self._weights
        x = torch.tanh(x @ w1 + b1)
        x = torch.tanh(x @ w2 + b2)
        return (x @ w3 + b3).squeeze(-1)
