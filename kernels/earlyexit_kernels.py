"""Triton kernels of exit decisions; kernels/earlyexit.py launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _largest(z, k, BIG: tl.constexpr):
    """Of rows of logits: the largest that is no NaN, its first place, the second largest, and the first NaN's place."""
    number = tl.where(z == z, z, float("-inf"))
    top = tl.max(number, 1)
    at = tl.min(tl.where(number == top[:, None], k, BIG), 1)
    second = tl.max(tl.where(k == at[:, None], float("-inf"), number), 1)
    nan = tl.min(tl.where(z == z, BIG, k), 1)
    return top, at, second, nan


@triton.jit
def _sums(z, top, inverse):
    """The sum of the exponentials, and of their products with the distances; NaN of a row that has one."""
    d = (z - top[:, None]) * inverse
    e = tl.exp(d)
    return tl.sum(e, 1), tl.sum(tl.where(e == 0, 0.0, e * d), 1)


@triton.jit
def _exit_scores_kernel(
    logits_ptr,  # [B, K], classes adjacent
    thresholds_ptr,  # float32, [1] or [B]; None where `threshold` is the one
    score_ptr,  # float32 [B]
    prediction_ptr,  # int64 [B]
    stays_ptr,  # uint8 [B], 1 where a row stays
    counts_ptr,  # int32 [programs], how many of a program's rows stay
    B,
    K,
    stride,  # elements from a row to the next
    threshold,
    temperature: tl.float64,
    inverse: tl.float64,
    CRITERION: tl.constexpr,
    STRICT: tl.constexpr,
    EACH: tl.constexpr,  # whether each row has a threshold of its own
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # whether a row fits in BLOCK_K
):
    """A program has ROWS rows: one read of the logits where a row fits, else a second one out of the cache."""
    BIG: tl.constexpr = 2147483647
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    there = row < B
    rows_ptr = logits_ptr + row * stride
    columns = tl.arange(0, BLOCK_K)[None, :]
    temperature = tl.full((), temperature, COMPUTE)
    inverse = tl.full((), inverse, COMPUTE)
    if WHOLE:
        mask = there[:, None] & (columns < K)
        z = tl.load(rows_ptr[:, None] + columns, mask, other=float("-inf")).to(COMPUTE)
        top, at, second, nan = _largest(z, columns, BIG)
        total, weighted = _sums(z, top, inverse)
    else:
        top = tl.full((ROWS,), float("-inf"), COMPUTE)
        second = tl.full((ROWS,), float("-inf"), COMPUTE)
        at = tl.full((ROWS,), 0, tl.int32)
        nan = tl.full((ROWS,), BIG, tl.int32)
        for begin in range(0, K, BLOCK_K):
            k = begin + columns
            z = tl.load(rows_ptr[:, None] + k, there[:, None] & (k < K), other=float("-inf")).to(COMPUTE)
            here, place, next_best, first_nan = _largest(z, k, BIG)
            second = tl.maximum(tl.maximum(second, next_best), tl.minimum(top, here))
            at = tl.where(here > top, place, at)
            top = tl.maximum(top, here)
            nan = tl.minimum(nan, first_nan)
        total = tl.full((ROWS,), 0.0, COMPUTE)
        weighted = tl.full((ROWS,), 0.0, COMPUTE)
        for begin in range(0, K, BLOCK_K):
            k = begin + columns
            z = tl.load(rows_ptr[:, None] + k, there[:, None] & (k < K), other=float("-inf")).to(COMPUTE)
            more, more_weighted = _sums(z, top, inverse)
            total += more
            weighted += more_weighted
    if CRITERION == 0:
        score = 1.0 / total
    elif CRITERION == 1:
        score = tl.log(total) - weighted / total
    elif CRITERION == 2:
        score = (1.0 - tl.exp((second - top) * inverse)) / total
    else:
        score = -temperature * tl.log(total) - top
    score = score.to(tl.float32)
    if thresholds_ptr is None:
        limit = tl.full((), threshold, tl.float32)
    elif EACH:
        limit = tl.load(thresholds_ptr + row, there, other=0.0)
    else:
        limit = tl.load(thresholds_ptr)
    value = score
    if CRITERION == 1 or CRITERION == 3:
        value, limit = -value, -limit
    exits = value > limit if STRICT else value >= limit
    stays = (there & (exits == 0)).to(tl.int32)
    tl.store(score_ptr + row, score, there)
    tl.store(prediction_ptr + row, tl.where(nan < BIG, nan, at).to(tl.int64), there)
    tl.store(stays_ptr + row, stays.to(tl.uint8), there)
    tl.store(counts_ptr + program, tl.sum(stays, 0))


@triton.jit
def _exit_lists_kernel(
    stays_ptr,  # uint8 [B]
    counts_ptr,  # int32 [N]
    exit_ptr,  # int64 [B]
    keep_ptr,  # int64 [B]
    n_keep_ptr,  # int64, one
    B,
    N,  # programs of the first kernel
    per,  # of them to one of this
    ROWS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """A program puts its ROWS rows into both lists, where the counts before it say: no order of programs matters."""
    program = tl.program_id(0)
    before = tl.full((), 0, tl.int64)
    kept = tl.full((), 0, tl.int64)
    for begin in range(0, N, COUNTS):
        n = begin + tl.arange(0, COUNTS)
        counts = tl.load(counts_ptr + n, n < N, other=0).to(tl.int64)
        kept += tl.sum(counts, 0)
        before += tl.sum(tl.where(n < program * per, counts, 0), 0)
    first = program.to(tl.int64) * ROWS
    i = tl.arange(0, ROWS)
    row = first + i
    there = row < B
    stays = tl.load(stays_ptr + row, there, other=0).to(tl.int32)
    place = before + tl.cumsum(stays, 0) - stays  # among those that stay
    other = row - place  # among those that exit
    tl.store(keep_ptr + tl.where(stays != 0, place, kept + other), row, there)
    tl.store(exit_ptr + tl.where(stays != 0, B - kept + place, other), row, there)
    tl.store(n_keep_ptr, kept, program == 0)
