"""Exit decisions and the moving of rows as functions: the arguments, what they mean, and what is refused.

:mod:`fastcifar.earlyexit.reference` spells the formulas out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _library
from . import reference
from .reference import CRITERIA

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CRITERION = {name: index for index, name in enumerate(CRITERIA)}

__all__ = ["CRITERIA", "ExitDecision", "compact", "exit_decide", "scatter_results"]


class ExitDecision(NamedTuple):
    """What :func:`exit_decide` returns; B rows of logits.

    Attributes:
        score: the criterion, float32 ``[B]``.
        prediction: the class of the largest logit, the first where several are, int64 ``[B]``.
        exit_index: the rows that exit, ascending, int64 ``[n_exit]``.
        keep_index: the rows that stay, ascending, int64 ``[n_keep]``.
        n_keep: how many stay, an int.

    In the form of fixed size (the rule on a GPU) ``n_keep`` is an int64 tensor on the device, and both lists hold all B
    rows: ``keep_index`` those that stay and then those that exit, ``exit_index`` the reverse.
    """

    score: Tensor
    prediction: Tensor
    exit_index: Tensor
    keep_index: Tensor
    n_keep: int | Tensor

    def exit_mask(self) -> Tensor:
        """Which rows exit, bool ``[B]``; in either form, without waiting for a GPU."""
        mask = torch.ones_like(self.prediction, dtype=torch.bool)
        if isinstance(self.n_keep, Tensor):
            place = torch.arange(len(mask), device=mask.device)
            return mask.scatter(0, self.keep_index, place >= self.n_keep)
        return mask.index_fill(0, self.keep_index, False)


def exit_decide(
    logits: Tensor,
    threshold: float | Tensor,
    criterion: str = "confidence",
    temperature: float = 1.0,
    strict: bool = False,
    *,
    fixed_size: bool | None = None,
) -> ExitDecision:
    r"""Who exits: the softmax statistics of each row, their comparison with a threshold, and both lists of rows, in one
    read of the logits. No probability is written.

    With ``m`` the largest logit of a row, ``m2`` the second largest (of all K, so equal to ``m`` in a tie), T the
    temperature, ``S = sum exp((z - m) / T)`` and ``W = sum exp((z - m) / T) (z - m) / T``:

    ==============  ==================================  ===================  ============
    criterion       score                               exits at             ``strict``
    ==============  ==================================  ===================  ============
    ``confidence``  ``1 / S``, the largest probability  score >= threshold   score >
    ``entropy``     ``ln S - W / S``, in nats           score <= threshold   score <
    ``margin``      ``(1 - exp((m2 - m) / T)) / S``     score >= threshold   score >
    ``energy``      ``-T ln S - m``                     score <= threshold   score <
    ==============  ==================================  ===================  ============

    The score is computed in float32 (in float64 of float64 logits), rounded to float32, and compared in float32 with
    the threshold in float32, whatever the logits' dtype and wherever the op runs. A row with a NaN, with plus infinity
    or of nothing but minus infinity has no softmax: its score is NaN and it never exits. Classes of minus infinity have
    probability 0. A row that is one class alone has a confidence of exactly 1, so a threshold of 1 does not turn an
    exit off; infinity does. With K = 1 confidence and margin are 1 and entropy is 0.

    Of float32 logits on a CPU, the confidence is within 4 ulp, and the other scores are within 4 ulp of themselves or
    of 1, whichever is larger; all instruction sets and numbers of threads give the same bits. The decision has no
    gradient, and the results never require one.

    Args:
        logits: ``[B, K]``, float32, float64, bfloat16 or float16; rows may have gaps between them, and other layouts
            are copied once.
        threshold: a number, or a floating tensor on the logits' device with one element or one for each row. A number
            may be infinite but not NaN; a NaN in a tensor lets no row exit.
        criterion: one of the above. Default ``"confidence"``.
        temperature: T, positive. Default 1.
        strict: whether a score equal to the threshold stays. Default False.
        fixed_size: None gives lists of exact length and an int on a CPU, and the form of fixed size elsewhere, which
            needs no synchronisation and can be captured in a CUDA graph. True gives that form everywhere, as
            torch.compile, torch.export and vmap need it; False waits for the device.

    Returns:
        :class:`ExitDecision`.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a shape, the criterion, the temperature or the threshold is not as described, or devices differ.

    Source: the criteria of BranchyNet (Teerapittayanon et al., ICPR 2016; entropy), Shallow-Deep Networks (Kaya et al.,
    ICML 2019) and MSDNet (Huang et al., ICLR 2018; confidence, ``>=``), CALM (Schuster et al., NeurIPS 2022; margin),
    Dynamic Confidence (Li et al., ICCV 2023; confidence, ``>``), and energy (Liu et al., NeurIPS 2020).

    Example:
        >>> import torch
        >>> from fastcifar.earlyexit import exit_decide
        >>> decision = exit_decide(torch.tensor([[0.0, 4.0], [0.1, 0.0], [3.0, 0.0]]), 0.9)
        >>> decision.exit_index.tolist(), decision.keep_index.tolist(), decision.n_keep
        ([0, 2], [1], 1)
        >>> decision.prediction.tolist()
        [1, 0, 0]
    """
    if not isinstance(logits, Tensor) or logits.dtype not in FLOATING or logits.layout is not torch.strided:
        got = f"{logits.dtype}, {logits.layout}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(
            f"exit_decide: expected logits to be a dense tensor in float32, float64, bfloat16 or float16, got {got}"
        )
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"exit_decide: expected logits [B, K] of at least one class K, got {tuple(logits.shape)}")
    if criterion not in _CRITERION:
        raise ValueError(f"exit_decide: expected criterion to be one of {', '.join(CRITERIA)}; got {criterion!r}")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"exit_decide: expected temperature to be a number, got {type(temperature).__name__}")
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"exit_decide: expected temperature to be positive, 1e-30 to 1e30, got {temperature}")
    if isinstance(threshold, Tensor):
        number, tensor = 0.0, _thresholds(threshold, logits)
    else:
        number, tensor = threshold, None
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"exit_decide: expected threshold to be a number or a tensor, got {type(number).__name__}")
        if number != number:  # which a trace can hold, unlike math.isnan
            raise ValueError("exit_decide: expected threshold to be a number, got nan")

    if logits.requires_grad:
        logits = logits.detach()
    if _library.serves("exit_decide", logits):
        results = torch.ops.fastcifar.exit_decide.default(
            logits, tensor, number, _CRITERION[criterion], temperature, strict
        )
    else:
        results = reference.exit_decide(logits, number if tensor is None else tensor, criterion, temperature, strict)
    if fixed_size or (fixed_size is None and not logits.is_cpu):
        return ExitDecision(*results)
    score, prediction, exit_index, keep_index, count = results
    n_keep = count.item()
    return ExitDecision(score, prediction, exit_index[: len(score) - n_keep], keep_index[:n_keep], n_keep)


def _thresholds(threshold: Tensor, logits: Tensor) -> Tensor:
    """One threshold, or one for each row, as the op takes them."""
    if not threshold.is_floating_point():
        raise TypeError(f"exit_decide: expected threshold in a floating dtype, got {threshold.dtype}")
    if threshold.dim() > 1 or threshold.numel() not in (1, logits.shape[0]):
        raise ValueError(
            f"exit_decide: expected threshold to have one element or one for each of {logits.shape[0]} rows, "
            f"got {tuple(threshold.shape)}"
        )
    if threshold.device != logits.device:
        raise ValueError(
            f"exit_decide: expected threshold on the logits' device {logits.device}, got {threshold.device}"
        )
    return threshold.detach().reshape(-1).to(torch.float32)


def compact(tree: Any, keep_index: Tensor) -> Any:
    """The rows ``keep_index`` of every tensor in a tree: hidden states, membranes, skip stacks, caches.

    Each result has its tensor's order of dimensions in memory (channels_last stays channels_last). The gradient to a
    tensor is that of its rows, and 0 in the rows that were dropped.

    Args:
        tree: any nesting of lists, tuples, dictionaries and whatever ``torch.utils._pytree`` knows, or one tensor; all
            tensors ``[B, ...]``. What is not a tensor (None, a number) is passed on.
        keep_index: int64 or int32 ``[n]``, rows to take, in this order.

    Returns:
        A tree of the same form with tensors ``[n, ...]``.

    Raises:
        TypeError: ``keep_index`` is no tensor of integers.
        ValueError: it is not one-dimensional, or a tensor has no or another number of rows.
        IndexError: there is no such row.

    Source: what DREX (arXiv 2512.15705) calls rebatching.

    Example:
        >>> import torch
        >>> from fastcifar.earlyexit import compact
        >>> compact({"v": torch.arange(6.0).view(3, 2), "w": None}, torch.tensor([0, 2]))
        {'v': tensor([[0., 1.],
                [4., 5.]]), 'w': None}
    """
    _check_index("compact", "keep_index", keep_index)
    if isinstance(tree, Tensor):
        _check_rows([tree])
        return _rows(tree, keep_index)
    leaves, form = pytree.tree_flatten(tree)
    _check_rows([leaf for leaf in leaves if isinstance(leaf, Tensor)])
    return pytree.tree_unflatten(
        [_rows(leaf, keep_index) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form
    )


def _rows(x: Tensor, index: Tensor) -> Tensor:
    # No kernel of ours: index_select moves rows at the speed of the memory, and one call for a whole tree, or rows that
    # move within their tensor, were not measurably faster.
    return x.index_select(0, index) if x.is_contiguous() else reference.compact(x, index)


def scatter_results(out: Any, index: Tensor, rows: Any, *, inplace: bool = True) -> Any:
    """Puts ``rows`` into the places ``index`` of ``out``: the inverse of :func:`compact`.

    The gradient to ``rows`` is that of the places they went to; to ``out``, it is 0 in these places.

    Args:
        out: a tree of tensors ``[B, ...]``, or one tensor.
        index: int64 ``[n]``, without repetition.
        rows: a tree of the same form, of tensors ``[n, ...]`` in the same dtypes.
        inplace: whether ``out`` itself is written to, and returned. Default True; False returns copies.

    Raises:
        TypeError: ``index`` is no tensor of integers, or a dtype differs.
        ValueError: ``index`` is not one-dimensional, or a shape or the form of a tree differs.
        IndexError: there is no such row.

    Example:
        >>> import torch
        >>> from fastcifar.earlyexit import scatter_results
        >>> scatter_results(torch.zeros(3), torch.tensor([0, 2]), torch.tensor([1.0, 2.0]))
        tensor([1., 0., 2.])
    """
    op = "scatter_results"
    _check_index(op, "index", index)
    places, form = pytree.tree_flatten(out)
    given, other = pytree.tree_flatten(rows)
    if form != other:
        raise ValueError(f"{op}: expected rows to be of the form of out, {form}, got {other}")
    index = index.long()
    results = []
    for place, row in zip(places, given, strict=True):
        if not isinstance(place, Tensor) or not isinstance(row, Tensor):
            results.append(place)
            continue
        if place.dtype != row.dtype:
            raise TypeError(f"{op}: expected rows in out's {place.dtype}, got {row.dtype}")
        if place.dim() == 0 or tuple(row.shape) != (len(index), *place.shape[1:]):
            raise ValueError(
                f"{op}: expected rows [{len(index)}, ...] for out {tuple(place.shape)}, got {tuple(row.shape)}"
            )
        results.append(place.index_copy_(0, index, row) if inplace else place.index_copy(0, index, row))
    return pytree.tree_unflatten(results, form)


def _check_index(op: str, name: str, index: Tensor) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{op}: expected {name} to be a tensor in int64 or int32, got {got}")
    if index.dim() != 1:
        raise ValueError(f"{op}: expected {name} to have one dimension, got {tuple(index.shape)}")


def _check_rows(tensors: list[Tensor]) -> None:
    for t in tensors:
        if t.dim() == 0 or tensors[0].dim() == 0 or t.shape[0] != tensors[0].shape[0]:
            rows = tensors[0].shape[0] if tensors[0].dim() else "B"
            raise ValueError(f"compact: expected tensors [{rows}, ...], got {tuple(t.shape)}")
