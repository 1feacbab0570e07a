"""DiffuseVAE beside its formulas written out, preloaded slots, and a shifted solver beside the plain one."""

import math

import pytest
import torch

from fastcifar.diffusion import (
    DiffuseVAE,
    DiscreteVP,
    ImageVAE,
    SolverTable,
    diffusevae_loss,
    diffusevae_noise,
    diffusevae_sample,
    diffusevae_table,
    guidance_of_weight,
    sample,
    shifted_table,
    solver_table,
)
from fastcifar.diffusion._conditioned import run

SCHEDULE = DiscreteVP.linear()
PRODUCT = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
TIMES = [900, 600, 250, 40, 0]


def points(times=TIMES):
    return SCHEDULE.points(len(times), times=times)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Denoiser(torch.nn.Module):
    """A cheap function of all that it is given: x, the condition, and t."""

    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(2 * channels, channels, 3, padding=1).double()

    def forward(self, x, t):
        return self.conv(x).tanh() + t.view(-1, 1, 1, 1) / 1000


def written_out(model, xhat, z0, noise, formulation, method, variance="fixed_large", eta=0.0, weight=None, temp=1.0):
    """The reverse process, formula by formula."""
    shift = xhat if formulation == 2 else torch.zeros_like(xhat)
    x = shift + temp * z0
    for i, t in enumerate(TIMES):
        ab = PRODUCT[t]
        last = i == len(TIMES) - 1
        ab1 = torch.ones((), dtype=torch.float64) if last else PRODUCT[TIMES[i + 1]]
        time = torch.full((len(x),), float(t), dtype=torch.float64)
        e = model(torch.cat([x, xhat], 1), time)
        if weight is not None:
            e = (1 + weight) * e - weight * model(torch.cat([x, torch.zeros_like(xhat)], 1), time)
        x0 = ((x - shift) / ab.sqrt() - (1 / ab - 1).sqrt() * e).clamp(-1, 1)
        beta = 1 - ab / ab1
        if method == "ddpm":
            c1 = beta * ab1.sqrt() / (1 - ab)
            c2 = (1 - beta).sqrt() * (1 - ab1) / (1 - ab)
            mean = c1 * x0 + c2 * x + (1 - c2) * shift
            deviation = (beta if variance == "fixed_large" else beta * (1 - ab1) / (1 - ab)).sqrt()
        else:
            deviation = eta * ((1 - ab1) / (1 - ab) * (1 - ab / ab1)).sqrt()
            rest = (1 - ab1 - deviation**2).sqrt()
            mean = x0 * ab1.sqrt() + rest * (e + shift / (1 - ab).sqrt()) + (1 - rest / (1 - ab).sqrt()) * shift
        x = mean if last else mean + deviation * noise[i]
    return x - shift


@pytest.mark.parametrize("formulation", [1, 2])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ddpm", {"variance": "fixed_large"}),
        ("ddpm", {"variance": "fixed_small"}),
        ("ddim", {"eta": 0.0}),
        ("ddim", {"eta": 0.7}),
    ],
)
@pytest.mark.parametrize("weight", [None, 0.8])
def test_reverse_is_the_formula(formulation, method, options, weight):
    model, xhat, z0, noise = (
        Denoiser(),
        randn(2, 3, 5, 4).tanh(),
        randn(2, 3, 5, 4, seed=1),
        randn(5, 2, 3, 5, 4, seed=2),
    )
    table = diffusevae_table(points(), formulation, method, **options)
    with torch.no_grad():
        expected = written_out(model, xhat, z0, noise, formulation, method, weight=weight, temp=0.9, **options)
    given = {"start": z0, "noise": noise, "temperature": 0.9, "guidance_weight": weight}
    got = diffusevae_sample(model, xhat, table, **given)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert not got.requires_grad
    followed = diffusevae_sample(model, xhat, table, in_place=False, **given)
    torch.testing.assert_close(followed, expected, rtol=1e-11, atol=1e-11)
    assert followed.requires_grad


def test_clamp_matters_and_can_be_left_out():
    xhat, z0 = randn(2, 3, 5, 4).tanh(), randn(2, 3, 5, 4, seed=1)
    results = [
        diffusevae_sample(Denoiser(), xhat, diffusevae_table(points(), 2, "ddim", clip=clip), start=z0)
        for clip in (True, False)
    ]
    assert results[0].abs().max() <= 1 < results[1].abs().max()


def test_both_conventions_of_guidance():
    assert guidance_of_weight(0.0) == 1.0
    model, xhat, start = Denoiser(), randn(2, 3, 4, 4).tanh(), randn(2, 3, 4, 4, seed=1)
    table = diffusevae_table(points(), 1, "ddim")
    by_weight = diffusevae_sample(model, xhat, table, start=start, guidance_weight=1.5)
    by_scale = diffusevae_sample(model, xhat, table, start=start, guidance_scale=2.5)
    none = diffusevae_sample(model, xhat, table, start=start)
    torch.testing.assert_close(by_weight, by_scale, rtol=0, atol=0)
    torch.testing.assert_close(
        diffusevae_sample(model, xhat, table, start=start, guidance_scale=1.0), none, rtol=0, atol=0
    )
    assert (by_weight - none).abs().max() > 1e-3


@pytest.mark.parametrize("formulation", [1, 2])
def test_forward_is_the_formula_and_has_gradients(formulation):
    x0, noise, xhat = (randn(3, 2, 4, 5, seed=s).requires_grad_() for s in range(3))
    t = torch.tensor([0, 500, 999])
    ab = PRODUCT[t].view(-1, 1, 1, 1)
    expected = ab.sqrt() * x0 + (1 - ab).sqrt() * noise + (xhat if formulation == 2 else 0)
    got = diffusevae_noise(x0, noise, t, SCHEDULE, xhat if formulation == 2 else None)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    inputs, weights = [x0, noise, *([xhat] if formulation == 2 else [])], randn(3, 2, 4, 5, seed=9)
    for a, b in zip(*(torch.autograd.grad(y, inputs, weights) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    x = randn(2, 3, 4, 4).to(dtype)
    assert diffusevae_noise(x, x, torch.tensor([1, 2]), SCHEDULE, x).dtype == dtype
    table = diffusevae_table(points(), 2)
    assert diffusevae_sample(lambda x, t: x[:, :3], x, table).dtype == dtype


@pytest.mark.parametrize("formulation", [1, 2])
def test_gradients_through_sampling(formulation):
    """To the reconstruction and to the model, beside those of the formulas, where nothing is clamped."""
    xhat, z0, noise = 0.1 * randn(1, 3, 3, 3), 0.1 * randn(1, 3, 3, 3, seed=1), randn(5, 1, 3, 3, 3, seed=2)
    model = Denoiser()
    xhat.requires_grad_()
    table = diffusevae_table(points(), formulation, "ddpm")
    got = diffusevae_sample(model, xhat, table, start=z0, noise=noise, in_place=False)
    expected = written_out(model, xhat, z0, noise, formulation, "ddpm")
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), [xhat, model.conv.weight]) for y in (got, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert a.abs().max() > 1e-6


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("formulation", [1, 2])
def test_loss(loss, formulation):
    model, x0, xhat, noise = Denoiser(), randn(4, 3, 4, 4), randn(4, 3, 4, 4, seed=1), randn(4, 3, 4, 4, seed=2)
    t = torch.tensor([0, 10, 500, 999])
    ab = PRODUCT[t].view(-1, 1, 1, 1)
    x_t = ab.sqrt() * x0 + (1 - ab).sqrt() * noise + (xhat if formulation == 2 else 0)
    difference = noise - model(torch.cat([x_t, xhat], 1), t)
    expected = difference.abs().mean() if loss == "l1" else difference.square().mean()
    got = diffusevae_loss(model, x0, xhat, SCHEDULE, formulation, t=t, noise=noise, loss=loss)
    torch.testing.assert_close(got, expected)
    got.backward()
    assert model.conv.weight.grad.abs().max() > 0


def test_dropped_conditions_keep_the_shift():
    seen = []

    def model(x, t):
        seen.append(x)
        return x[:, :3]

    x0, xhat = torch.zeros(64, 3, 2, 2), torch.full((64, 3, 2, 2), 5.0)
    given = {"t": torch.zeros(64, dtype=torch.int64), "noise": torch.zeros_like(x0)}
    diffusevae_loss(model, x0, xhat, SCHEDULE, 2, drop=0.5, generator=torch.Generator().manual_seed(0), **given)
    condition = seen[0][:, 3:].flatten(1)
    dropped = (condition == 0).all(1)
    assert 10 < dropped.sum() < 54
    assert bool((condition[~dropped] == 5).all())
    assert bool((seen[0][:, :3] == 5).all())


def test_shifted_table_follows_any_solver():
    """A two-step solver with a corrector, a stored sample and a clamp, on y and on x = y + shift c."""
    steps, c = 4, randn(2, 3, 4, 4, seed=7)
    rows = torch.zeros(steps, 3, 11, dtype=torch.float64)
    numbers = randn(steps, 3, 11, seed=5)
    rows[:, 0, :2] = numbers[:, 0, :2]
    rows[1:, 1, [0, 1, 2, 3, 8]] = numbers[1:, 1, :5]
    rows[1:, 2, [0, 2, 3, 8, 9, 10]] = numbers[1:, 2, :6]
    rows[0, 2, [0, 8]] = 0.5
    store = torch.tensor([[1, 2], [1, 2], [1, 2], [1, 2]])
    table = SolverTable(rows, store, torch.arange(4.0).flip(0), torch.ones(4), limit=2.0)
    shift = randn(steps + 1, seed=6).abs()
    moved = shifted_table(table, shift, scale=0.5)
    assert (moved.preloaded, moved.slots, moved.init_scale) == ((3,), 3, 0.5)
    outputs, noise, y = randn(steps, 2, 3, 4, 4, seed=1), randn(steps, 2, 3, 4, 4, seed=2), randn(2, 3, 4, 4)
    taken = iter(outputs)
    x = run(moved, y + shift[0] * c, lambda x, t, s: next(taken), [c], noise=noise)
    halves = iter(outputs / 2)
    expected = run(table, y.clone(), lambda x, t, s: next(halves), noise=noise / 2) + shift[-1] * c
    torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("solver", ["dpm_solver", "unipc", "pndm", "heun"])
def test_published_solvers_shifted(solver):
    """Through `sample`, which takes what is preloaded: y by the solver, and x = y + c by the shifted one."""
    table, c, y = solver_table(solver, points()), randn(2, 3, 4, 4, seed=7), randn(2, 3, 4, 4)
    shift = torch.ones(len(table) + 1, dtype=torch.float64)
    shift[-1] = 0
    moved = shifted_table(table, shift)

    def model(y, t):
        return y.tanh() + t.view(-1, 1, 1, 1) / 1000

    got = sample(lambda x, t: model(x - c, t), y + c, moved, preload={moved.preloaded[0]: c}, start_scale=1.0)
    expected = sample(model, y, table, start_scale=1.0)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_noise_of_the_kernel():
    """Without a generator: the same after the same seed of torch, in place or not, and of variance 1."""
    xhat, start, results = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), []
    for in_place in (True, False, True):
        torch.manual_seed(5)
        table = diffusevae_table(points(), 2)
        results.append(diffusevae_sample(lambda x, t: x[:, :3], xhat, table, start=start, in_place=in_place))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    other = diffusevae_sample(lambda x, t: x[:, :3], xhat, table, start=start)
    assert not torch.equal(other, results[0])
    zero = torch.zeros(64, 3, 32, 32)
    wide = diffusevae_table(SCHEDULE.points(2, times=[999, 500]), 1, clip=False)
    drawn = diffusevae_sample(lambda x, t: 0 * x[:, :3], zero, wide, start=zero)
    last = wide.coefficients[1, 2, 8] * wide.coefficients[1, 0, 0]  # the last step makes x0 of x, and draws nothing
    assert (drawn / (wide.coefficients[0, 2, 10] * last)).std().item() == pytest.approx(1, rel=0.02)


def test_preloaded_slots_of_tables(tmp_path):
    rows = torch.zeros(1, 3, 11, dtype=torch.float64)
    rows[0, 2, 4] = 1.0  # h3
    rest = (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match="reads slot 3, which no step before"):
        SolverTable(rows, *rest)
    table = SolverTable(rows, *rest, preloaded=(3,))
    assert table.slots == 3
    table.save(tmp_path / "table.json")
    assert SolverTable.load(tmp_path / "table.json").preloaded == (3,)
    with pytest.raises(ValueError, match="preloaded slots of 1 to 6"):
        SolverTable(rows, *rest, preloaded=(7,))


def test_scaled_inputs_are_read_scaled():
    """A table of a variance exploding solver: the model reads scale x, while the steps are on x."""
    table = diffusevae_table(points(), 1, "ddim")
    scaled = SolverTable(table.coefficients, table.store, table.timesteps, torch.full((5,), 0.5).double(), table.limit)
    xhat, start, model = randn(2, 3, 4, 4).tanh(), randn(2, 3, 4, 4, seed=1), Denoiser()

    def half(x, t):
        return model(torch.cat([0.5 * x[:, :3], x[:, 3:]], 1), t)

    got = diffusevae_sample(model, xhat, scaled, start=start, guidance_scale=2.0)
    torch.testing.assert_close(got, diffusevae_sample(half, xhat, table, start=start, guidance_scale=2.0))


@pytest.mark.parametrize("classes", [0, 4])
def test_module_and_vae_train_and_sample(classes):
    torch.manual_seed(0)
    vae = ImageVAE(latent=6, size=8, width=4, num_classes=classes)
    x = torch.linspace(-1, 1, 16).view(16, 1, 1, 1) * torch.linspace(-1, 1, 8).expand(16, 3, 8, 8)
    y = torch.arange(16) % 4 if classes else None
    optimizer = torch.optim.Adam(vae.parameters(), 2e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(vae(x, y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]
    mean, logvar = vae.encode(x, y)
    assert mean.shape == logvar.shape == (16, 6)
    model = DiffuseVAE(Denoiser().float(), lambda z: vae.decode(z, None if y is None else y[: len(z)]), formulation=2)
    reconstruction = vae.decode(mean, y).detach()
    assert model(x, reconstruction, drop=0.1).requires_grad
    images, decoded = model.sample(torch.randn(3, 6), 4, "ddim", guidance_scale=1.5)
    assert images.shape == decoded.shape == (3, 3, 8, 8)
    assert bool(images.isfinite().all())
    assert "formulation=2, T=1000" in repr(model)


X, T = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
TABLE = diffusevae_table(points(), 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diffusevae_noise(X, X[:1], T, SCHEDULE), r"expected noise of \(2, 3, 4, 4\), as the images"),
        (lambda: diffusevae_noise(X, X, T, SCHEDULE, X[:, :1]), "expected reconstruction of"),
        (lambda: diffusevae_noise(X, X, T + 999, SCHEDULE), "t from 0 to 999, got 999 to 1000"),
        (lambda: diffusevae_noise(X, X, T.float(), SCHEDULE), "an integer t of each of 2 samples"),
        (lambda: diffusevae_table(points(), 3), "formulation 1 or 2, got 3"),
        (lambda: diffusevae_table(points(), 1, "euler"), "one of ddpm, ddim; got 'euler'"),
        (lambda: diffusevae_table(points(), 1, variance="huge"), "variance of fixed_small"),
        (lambda: diffusevae_loss(Denoiser(), X, X, SCHEDULE, 0), "formulation 1 or 2"),
        (lambda: diffusevae_loss(Denoiser(), X, X, SCHEDULE, loss="l3"), "one of l2, l1"),
        (lambda: diffusevae_loss(Denoiser(), X, X, SCHEDULE, drop=2), "drop from 0 to 1"),
        (lambda: diffusevae_sample(Denoiser(), X, TABLE, guidance_weight=1, guidance_scale=2), "got both"),
        (lambda: diffusevae_sample(Denoiser(), X, TABLE, start=X[:1]), "expected start of"),
        (lambda: diffusevae_sample(Denoiser(), X[:, 0, 0, 0], TABLE), r"expected a reconstruction \[B, C, ...\], got"),
        (lambda: shifted_table(TABLE, torch.ones(3)), "a finite shift of each of 6 points"),
        (lambda: shifted_table(TABLE, math.nan), "a finite shift"),
        (lambda: shifted_table(TABLE, 1.0, scale=-1), "scale of 0 or more"),
        (lambda: diffusevae_sample(Denoiser(), X, shifted_table(TABLE, 1.0)), "at most one preloaded slot"),
        (lambda: DiffuseVAE(Denoiser(), None, 3), "formulation 1 or 2"),
        (lambda: DiffuseVAE(Denoiser(), None).sample(X, 1001), "at most 1000 steps"),
        (lambda: ImageVAE(size=12), "a side that 8 divides"),
        (lambda: ImageVAE(4, size=8, width=2).decode(torch.zeros(1, 5)), r"latents \[B, 4\]"),
        (lambda: ImageVAE(4, size=8, width=2).encode(X), r"images \[B, 3, 8, 8\]"),
        (lambda: ImageVAE(4, size=8, width=2, num_classes=2).decode(torch.zeros(1, 4)), r"labels \[1\], got None"),
        (lambda: ImageVAE(4, size=8, width=2).decode(torch.zeros(1, 4), T), "no labels"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_slot_is_free():
    table = TABLE
    for _ in range(5):
        table = shifted_table(table, 1.0)
    with pytest.raises(ValueError, match="uses all 6"):
        shifted_table(table, 1.0)
