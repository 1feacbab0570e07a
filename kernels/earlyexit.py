"""Launchers of exit decisions on CUDA tensors, which ``fastcifar._library`` registers.

They check nothing: ``fastcifar.earlyexit`` does. They never wait for the device, and what they allocate and launch
depends on shapes alone, so that a CUDA graph can capture them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .earlyexit_kernels import _exit_lists_kernel, _exit_scores_kernel

LARGEST_TILE = 4096  # logits of a program
LIST_ROWS = 1024
COUNTS = 1024


def blocks(classes: int, double: bool) -> dict[str, int | bool]:
    """Rows and columns of a tile, whether a row fits, and warps, by the number of classes."""
    tile = LARGEST_TILE // 2 if double else LARGEST_TILE
    columns = max(2, triton.next_power_of_2(classes))
    whole = columns <= tile
    columns = min(columns, tile)
    rows = min(64, tile // columns)
    return {"ROWS": rows, "BLOCK_K": columns, "WHOLE": whole, "num_warps": 4 if rows * columns <= 1024 else 8}


def exit_decide(
    logits: Tensor,
    thresholds: Tensor | None,
    threshold: float,
    criterion: int,
    temperature: float,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``fastcifar::exit_decide``."""
    B, K = logits.shape
    score = logits.new_empty(B, dtype=torch.float32)
    prediction, exit_index, keep_index = (logits.new_empty(B, dtype=torch.int64) for _ in range(3))
    n_keep = logits.new_empty((), dtype=torch.int64)
    if B == 0:
        return score, prediction, exit_index, keep_index, n_keep.zero_()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if thresholds is not None:
        thresholds = thresholds.contiguous()
    double = logits.dtype == torch.float64
    how = blocks(K, double)
    programs = triton.cdiv(B, how["ROWS"])
    stays = logits.new_empty(B, dtype=torch.uint8)
    counts = logits.new_empty(programs, dtype=torch.int32)
    with torch.cuda.device_of(logits):
        _exit_scores_kernel[(programs,)](
            logits,
            thresholds,
            score,
            prediction,
            stays,
            counts,
            B,
            K,
            logits.stride(0),
            threshold,
            temperature,
            1 / temperature,
            CRITERION=criterion,
            STRICT=strict,
            EACH=thresholds is not None and thresholds.numel() > 1,
            COMPUTE=tl.float64 if double else tl.float32,
            **how,
        )
        _exit_lists_kernel[(triton.cdiv(B, LIST_ROWS),)](
            stays,
            counts,
            exit_index,
            keep_index,
            n_keep,
            B,
            programs,
            LIST_ROWS // how["ROWS"],
            ROWS=LIST_ROWS,
            COUNTS=COUNTS,
            num_warps=4,
        )
    return score, prediction, exit_index, keep_index, n_keep
