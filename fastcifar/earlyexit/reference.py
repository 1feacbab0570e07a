"""Exit decisions in plain PyTorch, written to be read: what the kernels are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

# In the order in which the kernels count them. A sure row has a high confidence or margin, a low entropy or energy.
CRITERIA = ("confidence", "entropy", "margin", "energy")
RISING = ("confidence", "margin")  # those that exit at or above the threshold


def exit_scores(logits: Tensor, *, criterion: str = "confidence", temperature: float = 1.0) -> Tensor:
    """The criterion of each row of logits [B, K], float32 [B]; computed in float32, or in float64 of float64 logits."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    top = z.amax(1) if z.shape[0] else z.sum(1)
    distance = (z - top.unsqueeze(1)) / temperature
    e = distance.exp()
    total = e.sum(1)
    if criterion == "confidence":
        score = 1 / total
    elif criterion == "entropy":
        # A class of probability 0 adds nothing, though its distance is infinite.
        score = total.log() - torch.where(e == 0, 0, e * distance).sum(1) / total
    elif criterion == "margin":
        second = distance.topk(2).values[:, 1] if z.shape[1] > 1 else torch.full_like(total, float("-inf"))
        score = (1 - second.exp()) / total
    else:
        score = -temperature * total.log() - top
    return score.float()


def exit_decide(
    logits: Tensor,
    threshold: float | Tensor,
    criterion: str = "confidence",
    temperature: float = 1.0,
    strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score, prediction, all rows with those that exit first, all rows with those that stay first, and how many stay.

    Both lists of rows are in ascending order on either side of where exits meet the rest.
    """
    score = exit_scores(logits, criterion=criterion, temperature=temperature)
    # A NaN fails every comparison, and so never exits.
    if criterion in RISING:
        exits = score > threshold if strict else score >= threshold
    else:
        exits = score < threshold if strict else score <= threshold
    prediction = logits.argmax(1) if len(logits) else torch.zeros(0, dtype=torch.int64, device=logits.device)
    exit_index = torch.sort(~exits, stable=True).indices
    keep_index = torch.sort(exits, stable=True).indices
    return score, prediction, exit_index, keep_index, (~exits).sum()


def compact(x: Tensor, keep_index: Tensor) -> Tensor:
    """Rows of x, in its order of dimensions in memory."""
    order = sorted(range(1, x.dim()), key=lambda d: -x.stride()[d])
    back = [0] * x.dim()
    for place, d in enumerate([0, *order]):
        back[d] = place
    return x.permute(0, *order).index_select(0, keep_index).permute(back)


def scatter_results(out: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``out`` with ``rows`` in the places ``index``."""
    return out.index_copy(0, index, rows)
