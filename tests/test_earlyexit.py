"""What is special about exit decisions: traps, ties, both bodies of the kernel, lists; conformance.py runs the rest."""

import math

import pytest
import torch

from fastcifar import _library
from fastcifar.earlyexit import CRITERIA, exit_decide, reference

needs_kernel = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
# Classes in the lanes of one register, of two tiles, at the border between the two bodies, one past a block, and many.
CLASSES = (1, 2, 3, 10, 16, 17, 31, 32, 33, 47, 64, 65, 100, 1000)


def _logits(rows, classes, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)


def _isas(each_isa, check):
    """With every instruction set, or without a kernel once."""
    each_isa(check) if _library.WHY_NO_EXTENSION is None else check(None)


def _between(scores):
    """A threshold that parts the scores in the middle, as far from both neighbours as from each other."""
    ordered = scores.double().sort().values
    if len(ordered) < 2:
        return 0.0
    middle = len(ordered) // 2
    gap = (ordered[1:] - ordered[:-1])[max(0, middle - 5) : middle + 5]
    at = max(0, middle - 5) + int(gap.argmax())
    return float((ordered[at] + ordered[at + 1]) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_equals_reference_in_both_bodies(classes, dtype, each_isa):
    """Numbers of rows that fill no tile, one, and more; every criterion."""
    problems = []
    for rows in (1, 15, 16, 17, 101):
        logits = _logits(rows, classes, dtype)
        for criterion in CRITERIA:
            for temperature in (1.0, 2.5):
                options = {"criterion": criterion, "temperature": temperature}
                truth = reference.exit_scores(logits.double(), **options).double()
                eager = reference.exit_scores(logits, **options).double()
                options |= {"threshold": _between(truth)}
                expected = reference.exit_decide(logits, **options)

                def check(isa, logits=logits, options=options, expected=expected, truth=truth, eager=eager):
                    ours = exit_decide(logits, **options, fixed_size=True)
                    for mine, theirs in zip(ours[1:], expected[1:], strict=True):
                        if not torch.equal(mine, theirs):
                            problems.append((isa, options, len(logits)))
                    error, of_eager = (float((t.double() - truth).abs().max()) for t in (ours.score, eager))
                    ulp = torch.finfo(torch.float32).eps * max(1.0, float(truth.abs().max()))
                    if len(logits) > 10 and not error <= 2 * of_eager + ulp:  # of one row it is one draw
                        problems.append((isa, options, len(logits), error, of_eager))

                _isas(each_isa, check)
    assert not problems, problems[:3]


@needs_kernel
@pytest.mark.parametrize("classes", [2, 10, 32, 100, 1000])
def test_scores_are_within_their_stated_bounds(classes, each_isa):
    """What the docstring of exit_decide says, against the float64 truth of float32 logits."""
    logits = torch.cat([_logits(4096, classes, scale=s) for s in (0.3, 3.0, 30.0)])

    def check(_):
        for criterion in CRITERIA:
            exact = _exact_scores(logits.double(), criterion)
            ours = exit_decide(logits, 0.5, criterion).score.double()
            # ulps of the score itself, or of 1 where it is a difference of numbers of about 1
            scale = exact.abs() if criterion == "confidence" else exact.abs().clamp(min=1.0)
            ulps = (ours - exact).abs() / (torch.finfo(torch.float32).eps * scale)
            assert float(ulps.max()) <= 4, (criterion, float(ulps.max()))

    each_isa(check)


def _exact_scores(z, criterion):
    """In float64, from torch's own softmax."""
    p, logp = z.softmax(1), z.log_softmax(1)
    if criterion == "confidence":
        return p.amax(1)
    if criterion == "entropy":
        return -(p * logp).sum(1)
    if criterion == "margin":
        top = p.topk(2).values
        return top[:, 0] - top[:, 1]
    return -z.logsumexp(1)


@pytest.mark.parametrize("classes", [3, 10, 32, 33, 100, 1000, 5000])
def test_first_of_equal_logits_wins(classes, each_isa):
    """Ties within a lane, over lanes, over registers, over blocks of 64 bytes and over segments of 4096; a tie's
    margin is 0, and both of it count in the sum."""
    places = sorted({0, 1, classes // 2, classes - 2, *(min(p, classes - 1) for p in (16, 17, 4095, 4096, classes))})
    pairs = [(a, b) for a in places for b in places if a < b]
    logits = torch.full((len(pairs), classes), -1.0)
    for row, pair in enumerate(pairs):
        logits[row, list(pair)] = 2.0
    first = torch.tensor([a for a, _ in pairs])
    total = 2 + (classes - 2) * math.exp(-3)

    def check(_):
        for x in (logits, logits.double(), logits.bfloat16()):
            decision = exit_decide(x, 0.0, "margin")
            assert torch.equal(decision.prediction, first)
            assert (decision.score == 0).all()
            assert decision.n_keep == 0
            assert exit_decide(x, 0.0, "margin", strict=True).n_keep == len(pairs)
            confidence = exit_decide(x, 0.0).score.double()
            # To 1e-5: equal terms round alike, addition by addition. A class too many or too few is 4e-3.
            torch.testing.assert_close(confidence, torch.full_like(confidence, total).reciprocal(), rtol=1e-5, atol=0)

    _isas(each_isa, check)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("classes", [10, 100])
def test_a_score_at_the_threshold_exits_unless_strict(classes, criterion, dtype, each_isa):
    logits = _logits(50, classes, dtype)

    def check(_):
        score = exit_decide(logits, 0.0, criterion).score
        for threshold in (score, score.double()):  # one a row
            assert exit_decide(logits, threshold, criterion).n_keep == 0
            assert exit_decide(logits, threshold, criterion, strict=True).n_keep == 50
        falls = criterion in ("entropy", "energy")
        for row in (0, 7, 49):  # as a number: of one row the tie, of the others the comparison
            at = score[row].item()
            inside = score <= at if falls else score >= at
            assert torch.equal(exit_decide(logits, at, criterion).exit_mask(), inside)
            assert torch.equal(exit_decide(logits, torch.tensor(at), criterion).exit_mask(), inside)
            beyond = score < at if falls else score > at
            assert torch.equal(exit_decide(logits, at, criterion, strict=True).exit_mask(), beyond)

    _isas(each_isa, check)


def test_float64_logits_are_compared_in_float32(each_isa):
    """As everywhere: what differs from the threshold in float64 alone is a tie."""
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64) + torch.tensor([[0.0, 1e-12]], dtype=torch.float64)

    def check(_):
        decision = exit_decide(logits, 0.75)
        assert decision.score.dtype == torch.float32
        assert decision.score.item() == 0.75
        assert decision.n_keep == 0
        assert exit_decide(logits, 0.75, strict=True).n_keep == 1

    _isas(each_isa, check)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_softmax_never_exit(classes, dtype, each_isa):
    logits = _logits(40, classes, dtype)
    logits[3, 0] = logits[5, classes - 1] = logits[8, classes // 2] = NAN
    logits[8, classes // 2 + 1] = NAN
    logits[11, 4] = logits[11, 7] = INF
    logits[13] = -INF
    logits[17] = NAN
    bad = {3: 0, 5: classes - 1, 8: classes // 2, 11: 4, 13: 0, 17: 0}

    def check(_):
        for criterion in CRITERIA:
            always = INF if criterion in ("entropy", "energy") else -INF
            decision = exit_decide(logits, always, criterion)
            assert decision.keep_index.tolist() == sorted(bad)
            assert decision.prediction[list(bad)].tolist() == list(bad.values())
            assert decision.score[list(bad)].isnan().all()
            assert exit_decide(logits, -always, criterion).n_keep == 40

    _isas(each_isa, check)


@pytest.mark.parametrize("classes", [10, 100])
def test_minus_infinity_is_a_class_of_probability_zero(classes, each_isa):
    logits = _logits(40, classes)
    logits[:, 1::2] = -INF
    half = logits[:, ::2]

    def check(_):
        for criterion in CRITERIA:
            ours, without = (exit_decide(x, 0.5, criterion).score for x in (logits, half))
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, without, rtol=1e-6, atol=1e-6)
            one = torch.full((3, classes), -INF).index_fill(1, torch.tensor([classes - 1]), 2.0)
            alone = exit_decide(one, 0.5, criterion)
            assert alone.prediction.tolist() == [classes - 1] * 3
            expected = {"confidence": 1.0, "entropy": 0.0, "margin": 1.0, "energy": -2.0}[criterion]
            assert (alone.score == expected).all()

    _isas(each_isa, check)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_rows(classes, dtype, each_isa):
    """A confidence of exactly 1 and an entropy of exactly 0: a threshold there does not turn the exit off."""
    logits = torch.zeros(20, classes, dtype=dtype)
    logits[:, 3] = 1000.0

    def check(_):
        assert exit_decide(logits, 1.0).n_keep == 0
        assert exit_decide(logits, 1.0, strict=True).n_keep == 20
        assert exit_decide(logits, INF).n_keep == 20
        entropy = exit_decide(logits, 0.0, "entropy")
        assert (entropy.score == 0).all()
        assert entropy.n_keep == 0
        assert exit_decide(logits, -INF, "entropy").n_keep == 20
        assert (exit_decide(logits, 1.0, "margin").score == 1).all()

    _isas(each_isa, check)


def test_one_class(each_isa):
    logits = torch.tensor([[-3.0], [0.0], [2.0]])

    def check(_):
        expected = {"confidence": [1.0] * 3, "margin": [1.0] * 3, "entropy": [0.0] * 3, "energy": [3.0, 0.0, -2.0]}
        for criterion, scores in expected.items():
            decision = exit_decide(logits, 0.0, criterion)
            assert decision.score.tolist() == scores
            assert decision.prediction.tolist() == [0, 0, 0]

    _isas(each_isa, check)


def test_empty_batch():
    for fixed_size in (None, True):
        decision = exit_decide(torch.zeros(0, 10), torch.zeros(0), fixed_size=fixed_size)
        assert [t.shape for t in decision[:4]] == [(0,)] * 4
        assert int(decision.n_keep) == 0
        assert decision.exit_mask().shape == (0,)


def test_both_forms_say_the_same():
    logits = _logits(1000, 10)
    exact, fixed = (exit_decide(logits, 0.8, fixed_size=f) for f in (None, True))
    mask = reference.exit_scores(logits) >= 0.8
    rows = torch.arange(1000)
    assert isinstance(exact.n_keep, int)
    assert torch.equal(exact.exit_index, rows[mask])
    assert torch.equal(exact.keep_index, rows[~mask])
    assert exact.n_keep == len(exact.keep_index) == int(fixed.n_keep)
    assert torch.equal(fixed.keep_index, torch.cat([rows[~mask], rows[mask]]))
    assert torch.equal(fixed.exit_index, torch.cat([rows[mask], rows[~mask]]))
    for decision in (exact, fixed):
        assert torch.equal(decision.exit_mask(), mask)


@needs_kernel
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("classes", [3, 100])
def test_lists_that_threads_join_are_in_order(classes, share, threads):
    rows = 100_003 if classes == 3 else 5003
    logits = _logits(rows, classes)
    score = exit_decide(logits, 0.0).score
    threshold = {0.0: INF, 1.0: -INF}.get(share, score.quantile(0.7).item())
    mask = score >= threshold
    for count in (1, 2, 3):
        threads(count)
        decision = exit_decide(logits, threshold)
        assert torch.equal(decision.exit_index, mask.nonzero().squeeze(1))
        assert torch.equal(decision.keep_index, (~mask).nonzero().squeeze(1))


@needs_kernel
def test_same_bits_for_many_classes_whatever_the_threads_and_instructions(threads, each_isa):
    logits, seen = _logits(1031, 100), []

    def check(_):
        for count in (1, 2, 3):
            threads(count)
            seen.append([exit_decide(logits, 0.5, c).score for c in CRITERIA])

    each_isa(check)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("classes", [10, 33])
def test_rows_with_gaps_are_read_in_place(classes, each_isa):
    wide = torch.full((50, classes + 30), NAN)
    logits = wide[:, 7 : 7 + classes].copy_(_logits(50, classes))
    expected = reference.exit_decide(logits, 0.5)
    same = logits[:1].expand(50, classes)

    def check(_):
        for mine, theirs in zip(exit_decide(logits, 0.5, fixed_size=True)[1:], expected[1:], strict=True):
            assert torch.equal(mine, theirs)
        score = exit_decide(same, 0.5).score
        assert (score == score[0]).all()
        assert score[0] == exit_decide(logits, 0.5).score[0]

    _isas(each_isa, check)


def test_a_decision_never_requires_a_gradient():
    decision = exit_decide(_logits(8, 10).requires_grad_(), torch.tensor(0.5, requires_grad=True))
    assert not any(t.requires_grad for t in decision[:4])


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_exits_as_the_official_shallow_deep_loop(threshold):
    """One sample at a time, as ResNet_SDN.early_exit: the first head whose largest softmax is at least the threshold,
    else the head that was surest."""
    heads = [_logits(64, 10, seed=s, scale=1.0 + s) for s in range(4)]
    expected = []
    for i in range(64):
        confidences, outcome = [], None
        for k, head in enumerate(heads):
            softmax = torch.nn.functional.softmax(head[i : i + 1], dim=1)
            confidence = torch.max(softmax)
            if confidence >= threshold:
                outcome = (k, int(softmax.argmax()))
                break
            confidences.append(float(confidence))
        if outcome is None:
            k = max(range(4), key=lambda k: confidences[k])
            outcome = (k, int(heads[k][i].argmax()))
        expected.append(outcome)
    ours: list = [None] * 64
    left, best, surest = torch.arange(64), torch.full((64,), -1.0), [None] * 64
    for k, head in enumerate(heads):
        decision = exit_decide(head.index_select(0, left), threshold)
        for place in decision.exit_index.tolist():
            ours[left[place]] = (k, int(decision.prediction[place]))
        for place in decision.keep_index.tolist():
            row = int(left[place])
            if decision.score[place] > best[row]:
                best[row], surest[row] = decision.score[place], (k, int(decision.prediction[place]))
        left = left.index_select(0, decision.keep_index)
    ours = [surest[i] if o is None else o for i, o in enumerate(ours)]
    assert ours == expected
