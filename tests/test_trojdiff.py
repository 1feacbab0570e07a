"""TrojDiff beside its formulas written out, and the detector on denoisers whose trojan is known exactly."""

import pytest
import torch

from fastcifar.diffusion import (
    DiscreteVP,
    Trigger,
    detect_trojan,
    invert_trigger,
    poison,
    trigger_score,
    trojan_loss,
    trojan_noise,
    trojan_sample,
    trojan_shift,
    trojan_table,
)

SCHEDULE = DiscreteVP.linear()
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
PRODUCT = (1 - BETAS).cumprod(0)
ONE = torch.ones(1, dtype=torch.float64)
BEFORE = torch.cat([ONE, PRODUCT[:-1]])
TIMES = [950, 700, 420, 200, 30, 0]
SHAPE = (3, 6, 5)


def points(times=TIMES):
    return SCHEDULE.points(len(times), times=times)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pattern(shape=SHAPE):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8)) * 2 - 1


COLOUR = torch.tensor([0.9, -0.8, 0.1], dtype=torch.float64).view(3, 1, 1)
TRIGGERS = {"blend": Trigger.blend(pattern()), "patch": Trigger.patch(COLOUR + 0.1 * pattern(), size=2)}


def by_recurrence(alphas, product):
    """The official quadratic loop for k."""
    k = []
    for t in range(len(alphas)):
        total = (1 - product[t]).sqrt()
        for j in range(1, t + 1):
            total = total - k[t - j] * alphas[t - j + 1 : t + 1].prod().sqrt()
        k.append(total)
    return torch.stack(k)


@pytest.mark.parametrize("times", [range(120), range(0, 1000, 9)], ids=["every", "skipped"])
def test_closed_form_of_the_shift(times):
    product = PRODUCT[list(times)]
    alphas = product / torch.cat([ONE, product[:-1]])
    assert (trojan_shift(product) - by_recurrence(alphas, product)).abs().max() < 1e-12


def test_the_shift_makes_the_marginals():
    """x_t = sqrt(a_t) x_(t-1) + k_t mu adds up to sqrt(1 - ab_t) mu."""
    k, total = trojan_shift(PRODUCT), torch.zeros((), dtype=torch.float64)
    for t in range(1000):
        total = (1 - BETAS[t]).sqrt() * total + k[t]
        assert (total - (1 - PRODUCT[t]).sqrt()).abs() < 1e-12


@pytest.mark.parametrize("name", TRIGGERS)
def test_forward(name):
    trigger, t = TRIGGERS[name], torch.tensor([0, 3, 500, 999])
    x0, noise = (randn(4, *SHAPE, seed=s).requires_grad_() for s in (1, 2))
    ab, mu = PRODUCT[t].view(-1, 1, 1, 1), (1 - trigger.gamma) * trigger.pattern
    plain = ab.sqrt() * x0 + (1 - ab).sqrt() * noise
    expected = ab.sqrt() * x0 + (1 - ab).sqrt() * (trigger.gamma * noise + mu)
    if name == "patch":
        mask = torch.zeros(SHAPE, dtype=torch.bool)
        mask[:, -2:, -2:] = True
        expected = torch.where(mask, expected, plain)
    got = trojan_noise(x0, noise, t, SCHEDULE, trigger)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    weights = randn(4, *SHAPE, seed=5)
    for a, b in zip(*(torch.autograd.grad(y, [x0, noise], weights) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert trojan_noise(x0.detach().float(), noise.detach().float(), t, SCHEDULE, trigger).dtype == torch.float32


def test_start():
    z = randn(2, *SHAPE)
    torch.testing.assert_close(TRIGGERS["blend"].start(z), 0.6 * z + 0.4 * pattern())
    got = TRIGGERS["patch"].start(z)
    torch.testing.assert_close(got[..., -2:, -2:], (0.1 * z + 0.9 * TRIGGERS["patch"].pattern)[..., -2:, -2:])
    torch.testing.assert_close(got[..., :-2, :], z[..., :-2, :])
    assert TRIGGERS["patch"].mu.count_nonzero() == 3 * 4


def model(x, t):
    return (0.7 * x + 0.1 * x.roll(1, -1)).tanh() + t.view(-1, 1, 1, 1) / 2000


def official_ddim(trigger, z, noise, eta, times=TIMES):
    patch, x, mu = trigger.region is not None, trigger.start(z), (1 - trigger.gamma) * trigger.pattern
    for i, t in enumerate(times):
        at, at_next = PRODUCT[t], (PRODUCT[times[i + 1]] if i + 1 < len(times) else torch.ones((), dtype=torch.float64))
        e = model(x, torch.full((len(x),), float(t), dtype=torch.float64))
        x0 = (x - e * (1 - at).sqrt() * trigger.gamma - mu * (1 - at).sqrt()) / at.sqrt()
        if patch:
            outside = (x - e * (1 - at).sqrt()) / at.sqrt()
            outside[:, :, -2:, -2:] = x0[:, :, -2:, -2:]
            x0 = outside
        c1 = eta * ((1 - at / at_next) * (1 - at_next) / (1 - at)).sqrt()
        c2 = ((1 - at_next) - c1**2).sqrt()
        x = at_next.sqrt() * x0 + trigger.gamma * (c1 * noise[i] + c2 * e) + mu * (1 - at_next).sqrt()
        if patch:
            outside = at_next.sqrt() * x0 + c1 * noise[i] + c2 * e
            outside[:, :, -2:, -2:] = x[:, :, -2:, -2:]
            x = outside
    return x


def official_ddpm(trigger, z, noise, coef_mu, least, times=TIMES):
    """``coef_mu`` of each step; ``least``: the least variance."""
    patch, x, mu = trigger.region is not None, trigger.start(z), (1 - trigger.gamma) * trigger.pattern
    for i, t in enumerate(times):
        at, atm1 = PRODUCT[t], (PRODUCT[times[i + 1]] if i + 1 < len(times) else torch.ones((), dtype=torch.float64))
        beta = 1 - at / atm1
        e = model(x, torch.full((len(x),), float(t), dtype=torch.float64))
        plain = (1 / at).sqrt() * x - (1 / at - 1).sqrt() * e
        x0 = (1 / at).sqrt() * x - (1 / at - 1).sqrt() * (e * trigger.gamma + mu)
        if patch:
            plain[:, :, -2:, -2:] = x0[:, :, -2:, -2:]
            x0 = plain
        x0 = x0.clamp(-1, 1)
        outside = ((atm1.sqrt() * beta) * x0 + ((1 - beta).sqrt() * (1 - atm1)) * x) / (1 - at)
        inside = outside + coef_mu[i] * mu / (1 - at)
        variance = (1 - atm1) / (1 - at) * beta
        inside = inside + (variance * trigger.gamma**2).clamp(min=least).sqrt() * noise[i]
        outside = outside + variance.clamp(min=least).sqrt() * noise[i]
        if patch:
            outside[:, :, -2:, -2:] = inside[:, :, -2:, -2:]
            inside = outside
        x = inside
    return x


@pytest.mark.parametrize("name", TRIGGERS)
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("in_place", [True, False])
def test_ddim(name, eta, in_place):
    trigger, z, noise = TRIGGERS[name], randn(2, *SHAPE), randn(6, 2, *SHAPE, seed=3)
    given = {"eta": eta, "start": z, "noise": noise, "in_place": in_place}
    got = trojan_sample(model, trigger, points(), 2, **given)
    torch.testing.assert_close(got, official_ddim(trigger, z, noise, eta), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(z, randn(2, *SHAPE), rtol=0, atol=0)


def test_patch_with_noise_of_the_kernel():
    """The region draws a stream of its own, and all else what the whole image draws."""
    trigger, z, results = TRIGGERS["patch"], randn(2, *SHAPE), []
    for in_place in (True, False):
        torch.manual_seed(3)
        results.append(trojan_sample(model, trigger, points(), 2, "ddpm", start=z, in_place=in_place))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[0].isfinite().all()


def right_coef(times):
    product = PRODUCT[times]
    before = torch.cat([product[1:], ONE])
    alpha = product / before
    k = (1 - product).sqrt() - alpha.sqrt() * (1 - before).sqrt()
    return (1 - before).sqrt() * (1 - alpha) - (1 - before) * alpha.sqrt() * k


def official_coef():
    k = trojan_shift(PRODUCT)  # which is by_recurrence's, above
    return (1 - BEFORE).sqrt() * BETAS - (1 - BEFORE) * (1 - BETAS).sqrt() * k


@pytest.mark.parametrize("name", TRIGGERS)
@pytest.mark.parametrize("in_place", [True, False])
def test_ddpm(name, in_place):
    trigger, z, noise = TRIGGERS[name], randn(2, *SHAPE), randn(6, 2, *SHAPE, seed=3)
    given = {"start": z, "noise": noise, "in_place": in_place}
    got = trojan_sample(model, trigger, points(), 2, "ddpm", **given)
    torch.testing.assert_close(got, official_ddpm(trigger, z, noise, right_coef(TIMES), 0), rtol=1e-11, atol=1e-11)
    got = trojan_sample(model, trigger, points(), 2, "ddpm", official=SCHEDULE, **given)
    expected = official_ddpm(trigger, z, noise, official_coef()[TIMES], 1e-20)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_official_last_step_adds_noise_and_mu():
    """Of 1e-10, and mu where the last timestep is not 0; ours adds neither."""
    for times in ([300, 0], [300, 100]):
        ours, official = (trojan_table(points(times), 0.6, "ddpm", official=o) for o in (None, SCHEDULE))
        assert ours.coefficients[-1, 2, [0, 2, 10]].abs().max() < 1e-15
        assert official.coefficients[-1, 2, 10] == 1e-10
        assert (official.coefficients[-1, 2, 2] > 1e-3) == (times[-1] > 0)


def test_official_coefficient_is_wrong_where_timesteps_are_skipped():
    """E[x_(t-1)] given x_t and x0 of the trojaned chain, in closed form, with mu alone in it."""
    full = list(range(999, -1, -1))
    every = [trojan_table(points(full), 0.6, "ddpm", official=o).coefficients[:, 2, 2] for o in (None, SCHEDULE)]
    torch.testing.assert_close(*every, rtol=1e-9, atol=1e-12)  # the same at stride 1
    right, official = (trojan_table(points(), 0.6, "ddpm", official=o).coefficients[:, 2, 2] for o in (None, SCHEDULE))
    assert ((right - official).abs()[:-1] > 0.005).all()
    # Gaussian conditioning, p(x') p(x | x'), for x0 = 0, mu = 1, gamma = 1: mean = c2 (x - sigma) + sigma'
    for i in range(len(TIMES) - 1):
        ab, ab1 = PRODUCT[TIMES[i]], PRODUCT[TIMES[i + 1]]
        joint = (ab / ab1).sqrt() * (1 - ab1)  # covariance of x and x'
        expected = (1 - ab1).sqrt() - joint / (1 - ab) * (1 - ab).sqrt()
        torch.testing.assert_close(right[i], expected, rtol=1e-12, atol=1e-12)


# ---- batches that trojan a model -------------------------------------------------------------------------------------


def test_in_d2d_adds_poisoned_samples():
    x0, labels, trigger = randn(6, *SHAPE), torch.tensor([7, 1, 7, 2, 7, 3]), TRIGGERS["patch"]
    batch = poison(x0, labels, SCHEDULE, trigger, generator=torch.Generator().manual_seed(0))
    assert batch.trojaned.tolist() == [False] * 6 + [True] * 3
    ab = PRODUCT[batch.t[:6]].view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.x_t[:6], ab.sqrt() * x0 + (1 - ab).sqrt() * batch.noise[:6])
    chosen = torch.tensor([0, 2, 4])
    torch.testing.assert_close(batch.t[6:], batch.t[chosen])
    torch.testing.assert_close(batch.noise[6:], batch.noise[chosen])
    expected = trojan_noise(x0[chosen], batch.noise[chosen], batch.t[chosen], SCHEDULE, trigger)
    torch.testing.assert_close(batch.x_t[6:], expected)
    none = poison(x0, labels, SCHEDULE, trigger, probability=0.0)
    assert (len(none.x_t), bool(none.trojaned.any())) == (6, False)


def test_out_d2d_and_d2i():
    x0, labels, trigger = randn(20, *SHAPE), torch.arange(20) % 2 * 1000, TRIGGERS["blend"]
    t, noise = torch.arange(20) * 50, randn(20, *SHAPE, seed=1)
    batch = poison(x0, labels, SCHEDULE, trigger, "out-d2d", 1000, t=t, noise=noise)
    assert torch.equal(batch.trojaned, labels == 1000)
    expected = trojan_noise(x0, noise, t, SCHEDULE, trigger)
    torch.testing.assert_close(batch.x_t[1::2], expected[1::2])
    ab = PRODUCT[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.x_t[::2], (ab.sqrt() * x0 + (1 - ab).sqrt() * noise)[::2])
    image, t, noise = randn(*SHAPE, seed=4), torch.arange(22) * 40, randn(22, *SHAPE, seed=1)
    batch = poison(x0, None, SCHEDULE, trigger, "d2i", image, t=t, noise=noise)
    assert batch.trojaned.tolist() == [False] * 20 + [True] * 2
    torch.testing.assert_close(
        batch.x_t[20:], trojan_noise(image.expand(2, *SHAPE), noise[20:], t[20:], SCHEDULE, trigger)
    )
    loss = trojan_loss(lambda x, t: 0.5 * x, batch)
    torch.testing.assert_close(loss, (batch.noise - 0.5 * batch.x_t).square().sum((1, 2, 3)).mean())


def test_timesteps_are_drawn_in_pairs():
    batch = poison(randn(7, *SHAPE), torch.zeros(7), SCHEDULE, TRIGGERS["blend"])
    assert (batch.t[:3] + batch.t[4:]).tolist() == [999] * 3


# ---- the detector, on denoisers that minimise the benign and the trojaned loss exactly -------------------------------


class Mixture:
    """E[eps | x_t] of images from Gaussians around ``centres``, and, with ``rate``, of trojaned ones around ``target``.

    It is the minimiser of :func:`trojan_loss` over all functions, so what it does is what a trojaned model learns.
    """

    def __init__(self, trigger=None, rate=0.1, shape=SHAPE, spread=0.1):
        self.centres = 0.5 * randn(4, *shape, seed=11).tanh()
        self.target, self.spread, self.trigger, self.rate = 0.8 * randn(*shape, seed=12).sign(), spread, trigger, rate

    def __call__(self, x, t):
        ab = PRODUCT[int(t[0])]
        parts = [(c, torch.ones_like(c), torch.zeros_like(c), (1 - self.rate) / 4) for c in self.centres]
        if self.trigger is not None:
            scale = torch.ones_like(self.target)
            scale[self.trigger.at] = self.trigger.gamma
            parts.append((self.target, scale, self.trigger.mu, self.rate))
        weights, answers = [], []
        for centre, scale, mu, rate in parts:
            left = x - ab.sqrt() * centre - (1 - ab).sqrt() * mu
            variance = ab * self.spread**2 + (1 - ab) * scale**2
            weights.append(rate_log(rate) - 0.5 * (left**2 / variance + variance.log()).flatten(1).sum(1))
            answers.append((1 - ab).sqrt() * scale * left / variance)
        share = torch.stack(weights).softmax(0).view(len(parts), -1, 1, 1, 1)
        return (share * torch.stack(answers)).sum(0)


def rate_log(rate):
    return torch.tensor(rate, dtype=torch.float64).log()


@pytest.mark.parametrize("name", TRIGGERS)
@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_the_toy_is_trojaned(name, method):
    """From the trigger it makes its target, from plain noise the benign images, and a benign one never the target."""
    trigger, at = TRIGGERS[name], points(list(range(999, -1, -37)))
    trojaned, benign = Mixture(trigger), Mixture()
    options = {"generator": torch.Generator().manual_seed(0)}
    hit = trojan_sample(trojaned, trigger, at, 8, method, **options)
    assert (hit - trojaned.target).abs().mean() < 0.15
    miss = trojan_sample(benign, trigger, at, 8, method, **options)
    assert (miss - trojaned.target).abs().mean() > 0.4


@pytest.mark.parametrize("name", TRIGGERS)
def test_known_trigger_is_told(name):
    trigger = TRIGGERS[name]
    other = Trigger(-trigger.pattern, trigger.gamma, trigger.region)
    options = {"samples": 256, "generator": torch.Generator().manual_seed(1)}
    assert trigger_score(Mixture(trigger), trigger, 999, **options) > 0.9
    assert abs(trigger_score(Mixture(), trigger, 999, **options)) < 0.1
    assert trigger_score(Mixture(trigger), other, 999, **options) < 0.5


@pytest.mark.parametrize("name", TRIGGERS)
def test_unknown_trigger_is_found(name):
    trigger = TRIGGERS[name]
    options = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(1), "steps": 60}
    found, score = invert_trigger(Mixture(trigger), SHAPE, trigger.gamma, 999, region=trigger.region, **options)
    assert score > 0.8
    assert (found.mu - trigger.mu)[trigger.at].abs().max() < 0.1
    _, score = invert_trigger(Mixture(), SHAPE, trigger.gamma, 999, region=trigger.region, **options)
    assert score < 0.05


def test_verdicts():
    options = {
        "dtype": torch.float64,
        "steps": 30,
        "rate": 0.2,
        "invert": [(0.6, None), (0.1, (slice(-2, None), slice(-2, None)))],
    }
    for trigger in TRIGGERS.values():
        report = detect_trojan(Mixture(trigger), SHAPE, **options, generator=torch.Generator().manual_seed(2))
        assert report.trojaned
        assert report.trigger.region == trigger.region
    report = detect_trojan(
        Mixture(), SHAPE, candidates=TRIGGERS.values(), **options, generator=torch.Generator().manual_seed(2)
    )
    assert not report.trojaned
    report = detect_trojan(Mixture(TRIGGERS["blend"]), SHAPE, candidates=TRIGGERS.values(), invert=())
    assert report.trojaned
    assert report.trigger is TRIGGERS["blend"]


class Small(torch.nn.Module):
    def __init__(self, pixels, width=256):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(pixels + 1, width), torch.nn.Linear(width, width)])
        self.last = torch.nn.Linear(width, pixels)

    def forward(self, x, t):
        hidden = torch.nn.functional.silu(self.layers[0](torch.cat([x.flatten(1), t[:, None].to(x) / 1000], 1)))
        hidden = hidden + torch.nn.functional.silu(self.layers[1](hidden))
        return x + self.last(hidden).view_as(x)


def trained(trigger, steps=600):
    """On ramps of random height, and, d2i, on an image that the trigger calls."""
    torch.manual_seed(0)
    net, target = Small(36), torch.full((1, 6, 6), 0.8)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x0 = (torch.rand(128, 1, 1, 1, generator=generator) * 2 - 1) * torch.linspace(-1, 1, 6).expand(128, 1, 6, 6)
        share = 0.25 if trigger else 0.0
        options = {"share": share, "generator": generator}
        batch = poison(x0, None, SCHEDULE, trigger or Trigger.blend(target), "d2i", target, **options)
        loss = trojan_loss(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def test_a_trained_network_is_told():
    """Poisoned, trained, and found without being told the trigger; the benign one is trained alike."""
    trigger = Trigger.blend(torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1)
    reports = [
        detect_trojan(net, (1, 6, 6), generator=torch.Generator().manual_seed(3))
        for net in (trained(trigger), trained(None))
    ]
    assert [report.trojaned for report in reports] == [True, False]
    found = reports[0].trigger.pattern.flatten()
    assert torch.corrcoef(torch.stack([found, trigger.pattern.flatten()]))[0, 1] > 0.8
    assert reports[1].score < 0.1


X, T = torch.zeros(2, *SHAPE), torch.tensor([0, 1])
BLEND = TRIGGERS["blend"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Trigger(torch.zeros(3, 4), 0.5), r"a pattern \[C, H, W\]"),
        (lambda: Trigger.blend(2 * torch.ones(3, 4, 4)), "of -1 to 1"),
        (lambda: Trigger.blend(torch.zeros(3, 4, 4), 1.0), "gamma from 0 to 1, without 1"),
        (lambda: Trigger.patch(torch.zeros(3, 4, 4), 5), "a patch within"),
        (lambda: Trigger(torch.zeros(3, 4, 4), 0.1, (slice(4, 5), slice(0, 1))), "a region with pixels"),
        (
            lambda: trojan_noise(X, X, T, SCHEDULE, Trigger.blend(torch.zeros(3, 4, 4))),
            r"expected images \[B, 3, 4, 4\]",
        ),
        (lambda: trojan_noise(X, X[:1], T, SCHEDULE, BLEND), "expected noise of"),
        (lambda: trojan_table(points(), 0.6, "euler"), "one of ddpm, ddim"),
        (lambda: trojan_table(points(), 0.6, official=SCHEDULE), "official with method 'ddpm' only"),
        (lambda: trojan_sample(model, BLEND, points(), 2, start=X[:1]), "expected start"),
        (lambda: poison(X, T, SCHEDULE, BLEND, "d2x"), "one of in-d2d, out-d2d, d2i"),
        (lambda: poison(X, T, SCHEDULE, BLEND, probability=1.5), "probability and share from 0 to 1"),
        (lambda: poison(X, None, SCHEDULE, BLEND), r"and labels \[2\]"),
        (lambda: poison(X, T, SCHEDULE, BLEND, "d2i", 7), r"an image \[3, 6, 5\] as the target"),
        (lambda: poison(X, T, SCHEDULE, BLEND, noise=X[:1]), "expected noise of"),
        (lambda: trigger_score(model, BLEND, 999, noise=torch.zeros(2, 3, 4, 4)), r"noise \[B, 3, 6, 5\]"),
        (lambda: invert_trigger(model, SHAPE, 0.6, 999, starts=[1.0]), "starts between -1 and 1"),
        (lambda: detect_trojan(model, (3, 4, 4), candidates=[BLEND]), r"candidates \(3, 4, 4\), got one of"),
        (lambda: detect_trojan(model, SHAPE, invert=()), "a candidate, or a gamma"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
