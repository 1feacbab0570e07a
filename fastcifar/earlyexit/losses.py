"""Training all heads at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import expect_tensors, expect_type

SCHEDULES = ("fixed", "shallow_deep", "deediff")

__all__ = ["JointExitLoss"]


class JointExitLoss(nn.Module):
    r"""``sum_k w_k L_k + L_S`` over the S heads of a model in training; what the weights are, the schedule says.

    - ``"fixed"``: ``weights``, S - 1 numbers for the early heads (with S, the last head has a weight too).
    - ``"shallow_deep"``: ``w_k = min(max_k, 0.01 + t max_k)`` with t the share of training that is done, 0 to 1: early
      heads join slowly, so that they do not spoil what the deep ones need. ``weights`` are the ``max_k``.
    - ``"deediff"``: ``w_k = 1 - u_k`` row by row, with the uncertainty ``u_k`` that the model itself gives of each
      early output: where it is sure, the early output has to be right.

    Args:
        schedule: one of the above. Default ``"fixed"``.
        weights: numbers of 0 or more. Default: 1 ("fixed"), or from 0.15 to 0.9 in even steps ("shallow_deep", whose
            paper has six exits after 15, 30, ... 90 % of the work).
        loss: of one head, ``loss(output, target)`` to one value per row ``[B]`` or to a scalar; per row for "deediff".
            Default: cross entropy per row.
        detach: "deediff": whether no gradient flows from the weights into the uncertainty. Default True.

    ``forward(outputs, target, progress=None, uncertainty=None)`` takes the list of outputs, the target, t, and the list
    of S - 1 tensors ``[B]``; it returns a scalar, the mean over rows.

    Raises:
        ValueError: an argument is not as described; at a call, there are more or fewer outputs than weights, or the
            schedule's ``progress`` or ``uncertainty`` is missing or out of range.

    Source: Kaya et al., "Shallow-Deep Networks", ICML 2019, and yigitcankaya/Shallow-Deep-Networks; Tang et al.,
    "DeeDiff", arXiv 2309.17074, section 3.3 (the uncertainty-aware layer loss).

    Example:
        >>> import torch
        >>> from fastcifar.earlyexit import JointExitLoss
        >>> outputs, target = [torch.zeros(4, 10) for _ in range(3)], torch.arange(4)
        >>> round(JointExitLoss(weights=[0.5, 0.5])(outputs, target).item(), 4)  # 2 log 10
        4.6052
        >>> loss = JointExitLoss("shallow_deep")  # weights 0.15 and 0.9 at the end, 0.01 at the start
        >>> round(loss(outputs, target, progress=0.0).item() / 2.302585, 3)
        1.02
    """

    def __init__(
        self,
        schedule: str = "fixed",
        weights: Sequence[float] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        detach: bool = True,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"JointExitLoss: expected schedule to be one of {', '.join(SCHEDULES)}; got {schedule!r}")
        if weights is not None and schedule == "deediff":
            raise ValueError("JointExitLoss: expected no weights with schedule 'deediff', whose weights are 1 - u")
        if weights is not None and not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(f"JointExitLoss: expected finite weights of 0 or more, got {list(weights)}")
        self.schedule, self.detach = schedule, detach
        self.weights = None if weights is None else tuple(float(weight) for weight in weights)
        self.loss = loss or _cross_entropy

    def forward(
        self,
        outputs: Sequence[Tensor],
        target: Tensor,
        progress: float | None = None,
        uncertainty: Sequence[Tensor] | None = None,
    ) -> Tensor:
        expect_type("JointExitLoss", (list, tuple), "a list of tensors", outputs=outputs)
        expect_tensors("JointExitLoss", target=target, **{f"outputs[{k}]": out for k, out in enumerate(outputs)})
        weights = self._weights(len(outputs), progress, uncertainty)
        total = outputs[0].new_zeros(())
        for weight, output in zip(weights, outputs, strict=True):
            loss = self.loss(output, target)
            if isinstance(weight, Tensor) and loss.shape != weight.shape:
                raise ValueError(
                    f"JointExitLoss: expected a loss for each row {tuple(weight.shape)} with schedule 'deediff', got "
                    f"{tuple(loss.shape)}"
                )
            total = total + (weight * loss).mean()
        return total

    def _weights(
        self, heads: int, progress: float | None, uncertainty: Sequence[Tensor] | None
    ) -> list[float] | list[Tensor | float]:
        exits = heads - 1
        if self.schedule == "deediff":
            if uncertainty is None or len(uncertainty) != exits:
                got = "none" if uncertainty is None else len(uncertainty)
                raise ValueError(f"JointExitLoss: expected the uncertainty of each of {exits} early outputs, got {got}")
            return [1 - (u.detach() if self.detach else u) for u in uncertainty] + [1.0]
        if self.schedule == "fixed":
            weights = list(self.weights or (1.0,) * exits)
        else:
            if progress is None or not 0 <= progress <= 1:
                raise ValueError(
                    f"JointExitLoss: expected progress from 0 to 1 with schedule 'shallow_deep', got {progress}"
                )
            largest = self.weights or torch.linspace(0.15, 0.9, exits, dtype=torch.float64).tolist()
            weights = [min(most, 0.01 + progress * most) for most in largest]
        if len(weights) not in (exits, heads):
            raise ValueError(
                f"JointExitLoss: expected {exits} or {heads} weights for {heads} outputs, got {len(weights)}"
            )
        return weights + [1.0] * (heads - len(weights))

    def extra_repr(self) -> str:
        return f"schedule={self.schedule}, weights={self.weights}"


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")
