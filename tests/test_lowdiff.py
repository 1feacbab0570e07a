"""The cascade beside the plain loop that concatenates and interpolates at every step, and its training pairs."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from fastcifar.diffusion import (
    DiscreteVP,
    diffusevae_table,
    lowdiff_loss,
    lowdiff_pair,
    lowdiff_sample,
    shifted_table,
    upsample_into,
)
from fastcifar.diffusion.reference import solver_step

SCHEDULE = DiscreteVP.linear()
PRODUCT = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
SIZES = [(4, 6), (8, 12), (16, 12)]


def points(times):
    return SCHEDULE.points(len(times), times=times)


TABLES = [
    diffusevae_table(points([900, 700, 500, 250, 0])),
    diffusevae_table(points([800, 400, 100]), 1, "ddim", clip=False),
    diffusevae_table(points([600, 50]), 1, "ddim", eta=1.0),
]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Unified(torch.nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(2 * channels, channels, 3, padding=1).double()
        self.level = torch.nn.Parameter(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))

    def forward(self, x, t, level):
        return (self.conv(x) + self.level[level]).tanh() + t.view(-1, 1, 1, 1) / 1000


@torch.no_grad()
def naive(model, tables, starts, noises, mode):
    """cat and interpolate at each step."""
    images = []
    for level, (table, x, noise) in enumerate(zip(tables, starts, noises, strict=True)):
        for i, t in enumerate(table.timesteps):
            condition = torch.zeros_like(x)
            if images:
                corners = {} if mode == "nearest" else {"align_corners": False}
                condition = F.interpolate(images[-1], x.shape[2:], mode=mode, **corners)
            output = model(torch.cat([x, condition], 1), t.expand(len(x)), level)
            x = solver_step(x, output, (), table.coefficients[i], noise[i], limit=table.limit).x_next
        images.append(x)
    return images


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_equals_the_plain_loop(mode):
    model = Unified()
    starts = [randn(2, 3, *size, seed=i) for i, size in enumerate(SIZES)]
    noises = [randn(len(table), 2, 3, *size, seed=9) for table, size in zip(TABLES, SIZES, strict=True)]
    before = [start.clone() for start in starts]
    got = lowdiff_sample(model, 2, TABLES, SIZES, mode=mode, start=starts, noise=noises)
    expected = naive(model, TABLES, starts, noises, mode)
    for size, a, b, start, kept in zip(SIZES, got, expected, starts, before, strict=True):
        assert a.shape == (2, 3, *size)
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(start, kept, rtol=0, atol=0)  # whoever gave them keeps them
    assert not got[-1].requires_grad


def test_the_input_is_one_buffer_and_its_condition_is_written_once():
    seen = []

    def model(x, t, level):
        seen.append((level, x.data_ptr(), x._version, x[:, 3:].clone()))
        return x[:, :3]

    lowdiff_sample(model, 2, TABLES, SIZES, generator=torch.Generator().manual_seed(0))
    for level in range(3):
        calls = [entry for entry in seen if entry[0] == level]
        assert len(calls) == len(TABLES[level])
        assert len({pointer for _, pointer, _, _ in calls}) == 1
        assert all(after[2] - before[2] <= 1 for before, after in pairwise(calls))  # one write a step
        assert all(torch.equal(condition, calls[0][3]) for *_, condition in calls)
        assert bool(calls[0][3].any()) == (level > 0)


@pytest.mark.parametrize(("small", "large"), [((3, 5), (6, 10)), ((3, 5), (9, 5)), ((3, 5), (7, 11)), ((4, 4), (4, 4))])
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_upsampling_into_a_slice(small, large, mode):
    x, whole = randn(2, 3, *small), torch.full((2, 6, *large), 7.0, dtype=torch.float64)
    corners = {} if mode == "nearest" else {"align_corners": False}
    expected = F.interpolate(x, large, mode=mode, **corners)
    out = upsample_into(whole[:, 3:], x, mode)
    assert out.data_ptr() == whole[:, 3:].data_ptr()
    torch.testing.assert_close(whole[:, 3:], expected, rtol=0, atol=0)
    assert bool((whole[:, :3] == 7).all())


def test_a_noisy_condition():
    seen = []
    generator = torch.Generator().manual_seed(0)

    def model(x, t, level):
        seen.append(x[:, 3:].clone())
        return x[:, :3]

    table = diffusevae_table(points([0]), 1, "ddim")
    images = lowdiff_sample(model, 50, [table] * 2, [(8, 8)] * 2, condition_noise=0.25, generator=generator)
    assert (seen[1] - images[0]).std().item() == pytest.approx(0.25, rel=0.05)
    _, clean = lowdiff_pair(images[0], [(4, 4), (8, 8)], 1, mode="nearest")
    _, noisy = lowdiff_pair(images[0], [(4, 4), (8, 8)], 1, mode="nearest", condition_noise=0.25, generator=generator)
    assert (noisy - clean).std().item() == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_loss(prediction, level):
    sizes, model = [(4, 4), (8, 8), (16, 16)], Unified()
    x0 = randn(2, 3, 16, 16).requires_grad_()
    factor = 16 // sizes[level][0]
    image = F.avg_pool2d(x0, factor)
    condition = torch.zeros_like(image)
    if level:
        condition = F.interpolate(F.avg_pool2d(x0, 2 * factor), sizes[level], mode="bilinear", align_corners=False)
    noise, t = randn(2, 3, *sizes[level], seed=1), torch.tensor([3, 700])
    ab = PRODUCT[t].view(-1, 1, 1, 1)
    x_t = ab.sqrt() * image + (1 - ab).sqrt() * noise
    target = {"epsilon": noise, "sample": image, "v_prediction": ab.sqrt() * noise - (1 - ab).sqrt() * image}[
        prediction
    ]
    expected = (target - model(torch.cat([x_t, condition], 1), t, level)).square().mean()
    got = lowdiff_loss(model, x0, SCHEDULE, sizes, level, prediction=prediction, t=t, noise=noise)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y, [x0, model.conv.weight]) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    drawn = lowdiff_loss(model, x0, SCHEDULE, sizes, level, generator=torch.Generator().manual_seed(0))
    assert bool(drawn.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    images = lowdiff_sample(lambda x, t, level: x[:, :1], 1, TABLES, SIZES, channels=1, dtype=dtype)
    assert [(image.dtype, tuple(image.shape)) for image in images] == [(dtype, (1, 1, *size)) for size in SIZES]


def test_draws_repeat_with_the_generator():
    first, second = (
        lowdiff_sample(lambda x, t, level: x[:, :3], 2, TABLES, SIZES, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def model(x, t, level):
    return x[:, :3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lowdiff_sample(model, 2, TABLES[:2], SIZES), "a table of each of 3 sizes, got 2"),
        (lambda: lowdiff_sample(model, 2, TABLES, SIZES[::-1]), "none smaller than the one before"),
        (lambda: lowdiff_sample(model, 2, [], []), "sizes of 1 or more"),
        (lambda: lowdiff_sample(model, 2, TABLES, SIZES, mode="area"), "one of nearest, bilinear, bicubic; got 'area'"),
        (lambda: lowdiff_sample(model, 2, TABLES, SIZES, condition_noise=-1.0), "condition_noise of 0 or more"),
        (
            lambda: lowdiff_sample(model, 2, TABLES, SIZES, start=[torch.zeros(2, 3, 4, 4)] * 3),
            "start of level 0 to be",
        ),
        (lambda: lowdiff_sample(model, 2, [shifted_table(TABLES[0], 1.0)], SIZES[:1]), "without preloaded slots"),
        (lambda: lowdiff_pair(torch.zeros(1, 3, 8, 8), SIZES, 0), r"images of \(16, 12\), the last size"),
        (lambda: lowdiff_pair(torch.zeros(1, 3, 16, 12), SIZES, 3), "a level from 0 to 2, got 3"),
        (
            lambda: lowdiff_loss(model, torch.zeros(1, 3, 16, 12), SCHEDULE, SIZES, 0, prediction="flow"),
            "one of epsilon",
        ),
        (lambda: lowdiff_loss(model, torch.zeros(1, 3, 16, 12), SCHEDULE, SIZES, 0, noise=torch.zeros(1)), "noise of"),
        (lambda: upsample_into(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 2, 2)), "images of one batch"),
        (lambda: upsample_into(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2), "linear"), "mode to be one of"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
