"""The threshold searches equal the loops that they replace, and the front equals all thresholds tried one by one."""

import math

import pytest
import torch

from fastcifar.earlyexit import exit_shares, find_thresholds, first_exit, pareto


def budgeted_search(confidence, p):
    """MSDNet's search as its authors walk it (adaptive_inference.py), from the description: sample by sample."""
    exits, samples = confidence.shape
    order = confidence.sort(dim=1, descending=True).indices
    filtered, thresholds = torch.zeros(samples), torch.full((exits,), 1e8, dtype=confidence.dtype)
    for k in range(exits - 1):
        wanted, count = math.floor(samples * p[k]), 0
        for i in range(samples):
            sample = order[k][i]
            if filtered[sample] == 0:
                count += 1
                if count == wanted:
                    thresholds[k] = confidence[k][sample]
                    break
        filtered.add_(confidence[k].ge(thresholds[k]).type_as(filtered))
    thresholds[exits - 1] = -1e8
    return thresholds


def budgeted_evaluation(confidence, thresholds):
    """MSDNet's evaluation: the first exit at or above its threshold, sample by sample."""
    return [
        next(k for k in range(len(confidence)) if confidence[k][i].item() >= thresholds[k])
        for i in range(confidence.shape[1])
    ]


def _confidences(exits, samples, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    logits = (1 + torch.arange(exits)).view(-1, 1, 1) * torch.randn(exits, samples, 10, generator=generator)
    confidence = logits.softmax(2).amax(2)
    return (confidence * 20).round() / 20 if ties else confidence


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("exits", "samples"), [(1, 20), (2, 1), (3, 101), (5, 200)])
def test_thresholds_equal_the_official_search(exits, samples, ties):
    confidence = _confidences(exits, samples, ties=ties)
    shares = exit_shares(exits)
    assert shares.shape == (39, exits)
    ours = find_thresholds(confidence)
    expected = torch.stack([budgeted_search(confidence, p) for p in shares])
    assert torch.equal(ours, expected)
    for q in (0, 19, 38):
        assert torch.equal(find_thresholds(confidence, shares[q]), expected[q])
        exits_taken = first_exit(confidence, expected[q])
        assert exits_taken.tolist() == budgeted_evaluation(confidence, expected[q])


@pytest.mark.parametrize("q", [0.05, 0.5, 1.0, 1.95, (0.3, 3.0)])
def test_shares_are_geometric(q):
    shares = exit_shares(4, q)
    numbers = torch.tensor(q).unsqueeze(-1)
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:-1]))
    torch.testing.assert_close(shares[..., 1:] / shares[..., :-1], numbers.expand(shares[..., 1:].shape))
    assert torch.equal(find_thresholds(_confidences(4, 50), q=q), find_thresholds(_confidences(4, 50), shares))


def test_a_share_of_nobody_keeps_an_exit_closed():
    """floor(n p) of 0, and more than are left: 1e8, and nobody exits there."""
    confidence = _confidences(4, 30)
    thresholds = find_thresholds(confidence, [0.01, 0.6, 0.6, 0.0])
    assert thresholds[0] == 1e8
    assert thresholds[2] == 1e8
    assert thresholds[3] == -1e8
    assert first_exit(confidence, thresholds).bincount(minlength=4).tolist() == [0, 18, 0, 12]
    none = find_thresholds(torch.zeros(3, 0), [0.3, 0.3, 0.4])
    assert none.tolist() == torch.tensor([1e8, 1e8, -1e8]).tolist()


def test_nan_confidences_are_not_walked():
    confidence = _confidences(3, 40)
    confidence[0, :10] = math.nan
    low = confidence.clone()
    low[0, :10] = -1.0
    assert torch.equal(find_thresholds(confidence, q=1.0), find_thresholds(low, q=1.0))
    assert (first_exit(confidence, [0.0, 2.0, 0.0])[:10] == 2).all()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("exits", [1, 2, 6])
def test_first_exit_equals_a_loop(exits, strict):
    confidence = _confidences(exits, 60, ties=True)
    for thresholds in (0.5, [0.3 + 0.1 * k for k in range(exits)], torch.full((exits,), 0.5)):
        limits = torch.as_tensor(thresholds, dtype=torch.float32).expand(exits)
        expected = []
        for i in range(60):
            for k in range(exits):
                reached = confidence[k, i] > limits[k] if strict else confidence[k, i] >= limits[k]
                if reached or k == exits - 1:
                    expected.append(k)
                    break
        assert first_exit(confidence, thresholds, strict).tolist() == expected


def _front_by_trying(confidence, correct, costs, strict):
    """Every threshold that there is, one by one; then what no other beats."""
    values = confidence[:-1].unique()
    points = set()
    for threshold in [math.inf, *values.tolist(), -math.inf]:
        exits = first_exit(confidence, threshold, strict)
        right = correct.gather(0, exits.unsqueeze(0)).sum().item()
        points.add((costs[exits].double().sum().item(), right))
    best = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)]
    return sorted(best)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("exits", "samples", "costs"), [(1, 9, None), (2, 1, None), (3, 60, (1, 1, 4)), (7, 80, None)])
def test_front_equals_every_threshold_tried(exits, samples, costs, ties, strict):
    confidence = _confidences(exits, samples, ties=ties)
    chance = 0.4 + 0.5 * torch.arange(exits).view(-1, 1) / exits
    correct = torch.rand(exits, samples, generator=torch.Generator().manual_seed(1)) < chance
    front = pareto(confidence, correct, costs, strict)
    each = torch.arange(1.0, exits + 1) if costs is None else torch.tensor(costs).double()
    expected = _front_by_trying(confidence, correct, each, strict)
    got = [((c * samples).item(), (a * samples).item()) for c, a in zip(front.cost, front.accuracy, strict=True)]
    assert [(round(c, 6), round(a)) for c, a in got] == [(round(c, 6), a) for c, a in expected]
    for threshold, cost, accuracy in zip(*front, strict=True):  # and each threshold reaches its point
        exits_taken = first_exit(confidence, threshold.item(), strict)
        assert each[exits_taken].double().mean().item() == pytest.approx(cost.item())
        right = correct.gather(0, exits_taken.unsqueeze(0)).double().mean()
        assert right.item() == pytest.approx(accuracy.item())


def test_front_is_exact_and_rising():
    confidence = _confidences(5, 3000)
    correct = torch.rand(5, 3000, generator=torch.Generator().manual_seed(2)) < 0.8
    front = pareto(confidence, correct)
    assert len(front.threshold) > 10
    assert (front.cost.diff() > 0).all()
    assert (front.accuracy.diff() > 0).all()
    assert (front.threshold.diff() >= 0).all()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: exit_shares(0), ValueError, "at least one exit, got 0"),
        (lambda: exit_shares(3, 0.0), ValueError, "q to be positive, got 0.0"),
        (lambda: find_thresholds([1.0]), TypeError, "a floating tensor, got list"),
        (lambda: find_thresholds(torch.zeros(3, 4).long()), TypeError, "got torch.int64"),
        (lambda: find_thresholds(torch.zeros(3)), ValueError, r"\[S, n\] of at least one exit, got \(3,\)"),
        (lambda: find_thresholds(torch.zeros(0, 3)), ValueError, r"got \(0, 3\)"),
        (lambda: find_thresholds(torch.zeros(3, 4), [0.5, 0.5]), ValueError, r"S = 3 exits, got \(2,\)"),
        (lambda: find_thresholds(torch.zeros(2, 4), [-0.5, 0.5]), ValueError, "finite and not negative"),
        (lambda: find_thresholds(torch.zeros(2, 4), [math.nan, 0.5]), ValueError, "finite and not negative"),
        (lambda: find_thresholds(torch.zeros(2, 4), [0.5, 0.5], q=1.0), ValueError, "p or q, got both"),
        (lambda: first_exit(torch.zeros(3, 4), [0.5, 0.5]), ValueError, r"each of 3 exits, got \(2,\)"),
        (lambda: first_exit(torch.zeros(3, 4), math.nan), ValueError, "to be numbers, got nan"),
        (lambda: pareto(torch.zeros(3, 4), torch.zeros(3, 4)), TypeError, "a boolean tensor, got torch.float32"),
        (lambda: pareto(torch.zeros(3, 4), torch.zeros(3, 5).bool()), ValueError, r"\(3, 4\) and \(3, 5\)"),
        (lambda: pareto(torch.zeros(3, 0), torch.zeros(3, 0).bool()), ValueError, "at least one sample"),
        (lambda: pareto(torch.zeros(2, 4), torch.zeros(2, 4).bool(), [2, 1]), ValueError, "that do not fall"),
        (lambda: pareto(torch.full((2, 4), math.inf), torch.zeros(2, 4).bool()), ValueError, "no infinite"),
    ],
)
def test_searches_refuse_in_a_sentence(call, error, says):
    with pytest.raises(error, match=says) as caught:
        call()
    assert ": expected" in str(caught.value)
