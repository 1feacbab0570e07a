"""The Triton kernels of exit decisions equal the reference, in Triton's interpreter without a GPU.

tests/test_triton.py compiles them ahead of time with the rest of the catalogue; a test here sees that they are in it.
"""

import inspect
import math
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

pytest.importorskip("triton")

from fastcifar.kernels import catalogue, earlyexit, earlyexit_kernels  # noqa: E402

from fastcifar.earlyexit import CRITERIA, exit_decide, reference  # noqa: E402

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan


def _logits(rows, classes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)


def _check(logits, threshold, criterion, temperature=1.0, strict=False):
    number, tensor = (0.0, threshold) if isinstance(threshold, torch.Tensor) else (threshold, None)
    arguments = logits, tensor, number, CRITERIA.index(criterion), temperature, strict
    score, *rest = earlyexit.exit_decide(*arguments)
    expected = reference.exit_decide(logits, threshold, criterion, temperature, strict)
    truth = reference.exit_scores(logits.double(), criterion=criterion, temperature=temperature).double()
    eager = expected[0].double()
    assert torch.equal(score.isnan(), eager.isnan())
    finite = truth.isfinite() & eager.isfinite()
    if bool(finite.any()):
        error, of_eager = (float((t.double() - truth)[finite].abs().max()) for t in (score, eager))
        assert error <= 2 * of_eager + 2e-7 * max(1.0, float(truth[finite].abs().max()))
    for mine, theirs in zip(rest, expected[1:], strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 10, 33, 100, 1000])
def test_decision_equals_reference(classes, dtype):
    thresholds = {"confidence": 0.4321, "entropy": 0.9876, "margin": 0.2345, "energy": -5.4321}
    for i, (criterion, threshold) in enumerate(thresholds.items()):
        _check(_logits(67, classes, dtype), threshold, criterion, (1.0, 2.5)[i % 2], strict=i > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_of_several_tiles_equal_the_reference(dtype, monkeypatch):
    monkeypatch.setattr(earlyexit, "LARGEST_TILE", 64)
    logits = _logits(9, 300, dtype)
    logits[2, 250] = NAN
    logits[4, 3] = INF
    logits[5, :] = -INF
    logits[6, 40:] = -INF
    logits[7, 10] = logits[7, 210] = logits[7].amax() + 1
    for criterion in CRITERIA:
        _check(logits, 0.3456, criterion)


@pytest.mark.parametrize("rows", [0, 1, 1023, 1024, 1025, 5000])
def test_lists_of_many_rows(rows, monkeypatch):
    monkeypatch.setattr(earlyexit, "COUNTS", 16)  # several loads of counts
    logits = _logits(rows, 3)
    for threshold in (0.8, INF, -INF):
        if rows:
            _check(logits, threshold, "confidence")
        score, prediction, exit_index, keep_index, n_keep = earlyexit.exit_decide(
            logits, None, threshold, 0, 1.0, False
        )
        assert len(score) == len(prediction) == len(exit_index) == len(keep_index) == rows
        assert n_keep.shape == ()
        assert int(n_keep) == int((~(score >= threshold)).sum())


@pytest.mark.parametrize("classes", [10, 100])
def test_traps(classes):
    """NaN, infinities, ties, a score at the threshold, thresholds of each row, and rows with gaps."""
    logits = _logits(40, classes)
    logits[3, 0] = logits[5, classes - 1] = logits[8, 4] = logits[8, 6] = NAN
    logits[11, 4] = logits[11, 7] = INF
    logits[13] = -INF
    logits[17, 1::2] = -INF
    logits[19, 2] = logits[19, 8] = 50.0
    logits[21] = 0.0
    logits[21, 3] = 1000.0
    for criterion in CRITERIA:
        for threshold in (INF, -INF, 1.0, 0.0):
            _check(logits, threshold, criterion)
            _check(logits, threshold, criterion, strict=True)
        score = reference.exit_scores(logits, criterion=criterion)
        ours = earlyexit.exit_decide(logits, score, 0.0, CRITERIA.index(criterion), 1.0, False)[0]
        for strict in (False, True):
            result = earlyexit.exit_decide(logits, ours, 0.0, CRITERIA.index(criterion), 1.0, strict)
            assert int(result[4]) == (40 if strict else int(ours.isnan().sum()))
        _check(logits, torch.tensor([0.6789], device=DEVICE), criterion)
    wide = _logits(40, 2 * classes)
    _check(wide[:, classes:], 0.5678, "margin")
    _check(wide.t()[:40], 0.3456, "confidence")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_graph_captures_a_decision():
    """Which it could not if anything waited for the device."""
    logits = _logits(1024, 10)
    exit_decide(logits, 0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decision = exit_decide(logits, 0.5)
    logits.copy_(_logits(1024, 10, seed=1))
    graph.replay()
    expected = exit_decide(logits, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(decision, expected, strict=True))
    assert torch.equal(decision.exit_mask(), expected.score >= 0.5)


def test_every_kernel_is_in_the_catalogue():
    kernels = {name for name, value in inspect.getmembers(earlyexit_kernels) if name.endswith("_kernel")}
    assert {entry.kernel.__name__ for entry in catalogue.entries(("earlyexit",))} == kernels
