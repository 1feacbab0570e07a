"""The U-ViT with exits beside a loop over single samples, and DeeDiff's losses beside their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastcifar
from fastcifar.diffusion import DeeDiffLoss, UncertaintyHead, UViT, layer_loss, uncertainty_loss, uncertainty_target
from fastcifar.earlyexit import CostModel

SMALL = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 7, "num_heads": 3}


def images(count=21):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 1000, (count,), generator=generator)


def model(**options):
    torch.manual_seed(0)
    net = UViT(**(SMALL | options)).double()
    for block in net.blocks:  # blocks that change their tokens, so that samples differ
        block.fc2.weight.data *= 4
        block.proj.weight.data *= 4
    for head in net.uncertainty:
        head.linear.weight.data *= 3
    return net


@torch.no_grad()
def by_definition(net, x, t):
    """Blocks with explicit skips, all outputs and uncertainties of one sample; images put together patch by patch."""
    half = net.embed_dim // 2
    rates = torch.tensor([10000 ** (-k / half) for k in range(half)], dtype=torch.float64)
    angles = t * rates
    time = torch.cat([angles.cos(), angles.sin()])
    patches = F.unfold(x, 2, stride=2)[0].T @ net.patch_embed.weight.flatten(1).T + net.patch_embed.bias
    tokens = torch.cat([time[None], patches])[None] + net.pos_embed
    depth, outputs, uncertainties, kept = len(net.blocks), [], [], {}
    for k, block in enumerate(net.blocks):
        if k > depth // 2:
            tokens = block.skip_linear(torch.cat([tokens, kept[depth - 1 - k]], -1))
        y = block.norm1(tokens)
        q, key, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in block.qkv(y).chunk(3, -1))
        attention = (q @ key.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v
        tokens = tokens + block.proj(attention.transpose(1, 2).flatten(2))
        tokens = tokens + block.fc2(F.gelu(block.fc1(block.norm2(tokens))))
        kept[k] = tokens
        head = net.heads[k]
        pixels = head.linear(head.norm(tokens[:, 1:]))[0]
        image = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
        for index, patch in enumerate(pixels):
            row, column = divmod(index, 4)
            for i in range(2):
                for j in range(2):
                    image[0, :, 2 * row + i, 2 * column + j] = patch[3 * (2 * i + j) : 3 * (2 * i + j) + 3]
        outputs.append(head.conv(image)[0])
        if k < depth - 1:
            linear = net.uncertainty[k].linear
            uncertainties.append((tokens[0] @ linear.weight[0] + linear.bias).sigmoid().mean())
    return outputs, uncertainties


def test_training_gives_every_layer():
    net = model()
    x, t = images(3)
    outputs, uncertainty = net(x, t)
    assert (len(outputs), len(uncertainty)) == (7, 6)
    for b in range(3):
        expected, unsure = by_definition(net, x[b : b + 1], t[b : b + 1])
        for k in range(7):
            torch.testing.assert_close(outputs[k][b], expected[k], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.stack(uncertainty)[:, b], torch.stack(unsure), rtol=1e-9, atol=1e-9)


def threshold_of(net, x, t, share):
    """Between two uncertainties, wide enough for rounding."""
    with torch.no_grad():
        values = torch.stack(net.train()(x, t).uncertainty).cummin(0).values.flatten().sort().values
    at = int(share * len(values))
    gap = at + int(values[at : at + 8].diff().argmax())
    return ((values[gap] + values[gap + 1]) / 2).item()


@torch.no_grad()
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("cost", [CostModel(math.inf), CostModel(0.0), CostModel()], ids=["move", "carry", "rule"])
def test_equals_single_samples(share, cost):
    net = model(cost=cost)
    x, t = images()
    net.threshold = threshold_of(net, x, t, share)
    output, exit_taken, uncertainty = net.eval()(x, t)
    assert len(exit_taken.unique()) > 2
    for b in range(len(x)):
        outputs, unsure = by_definition(net, x[b : b + 1], t[b : b + 1])
        k = next((k for k, u in enumerate(unsure) if u <= net.threshold), 6)
        assert exit_taken[b] == k
        torch.testing.assert_close(output[b], outputs[k], rtol=1e-9, atol=1e-9)
        if k < 6:
            assert uncertainty[b].item() == pytest.approx(unsure[k].item(), rel=1e-6)
        else:
            assert uncertainty[b].isnan()


@torch.no_grad()
def test_rows_and_skips_are_dropped():
    net = model(cost=CostModel(math.inf))
    x, t = images()
    net.threshold = threshold_of(net, x, t, 0.5)
    rows = []
    for block in net.blocks:
        block.register_forward_pre_hook(
            lambda module, inputs: rows.append([len(y) for y in inputs if isinstance(y, torch.Tensor)])
        )
    exit_taken = net.eval()(x, t).exit_taken
    survivors = [int((exit_taken >= k).sum()) for k in range(7)]
    assert rows == [[n] if k < 4 else [n, n] for k, n in enumerate(survivors) if n]
    assert survivors[4] < 21


@torch.no_grad()
def test_uniform_batches_move_nothing(monkeypatch):
    net = model().eval()
    x, t = images()
    monkeypatch.setattr("fastcifar.diffusion.uvit.compact", lambda *arguments: pytest.fail("rows were moved"))
    net.threshold = 1.0
    runs = []
    net.blocks[1].register_forward_hook(lambda *arguments: runs.append(1))
    assert net(x, t).exit_taken.tolist() == [0] * 21
    assert not runs
    net.threshold = -1.0
    result = net(x, t)
    assert result.exit_taken.tolist() == [6] * 21
    assert result.uncertainty.isnan().all()
    empty = net(x[:0], t[:0])
    assert empty.output.shape == (0, 3, 8, 8)


def test_trains():
    net = model()
    x, t = images()
    outputs, uncertainty = net(x, t)
    DeeDiffLoss()(outputs, uncertainty, torch.randn_like(x)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_uncertainty_head_with_time():
    head = UncertaintyHead(6, time_dim=4)
    x, time = torch.randn(5, 7, 6), torch.randn(5, 4)
    joined = torch.cat([x, time[:, None].expand(-1, 7, -1)], -1)
    torch.testing.assert_close(head(x, time), head.linear(joined).sigmoid().mean((1, 2)))
    with pytest.raises(ValueError, match=r"tokens \[B, L, 6\] and time \[B, 4\]"):
        head(x)
    with pytest.raises(ValueError, match="no time"):
        UncertaintyHead(6)(x, time)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", ["predicted", "target"])
@pytest.mark.parametrize("detach", [True, False])
def test_losses_are_their_formulas(reduction, weight, detach):
    torch.manual_seed(0)
    outputs = [torch.randn(4, 3, 2, 2, requires_grad=True) for _ in range(3)]
    u = [torch.rand(4, requires_grad=True) for _ in range(2)]
    noise = torch.randn(4, 3, 2, 2)
    total = DeeDiffLoss(0.5, 2.0, weight, detach=detach, reduction=reduction)(outputs, u, noise)
    expected = F.mse_loss(outputs[2], noise)
    for k in range(2):
        for b in range(4):
            target = torch.tanh((outputs[k][b] - noise[b]).abs()).mean().detach()
            expected = expected + 0.5 * (u[k][b] - target) ** 2 / (4 if reduction == "mean" else 1)
            w = target if weight == "target" else u[k][b].detach() if detach else u[k][b]
            expected = expected + 2.0 * (1 - w) * F.mse_loss(outputs[k][b], noise[b]) / 4
    torch.testing.assert_close(total, expected)
    inputs = [*outputs, *u]
    for a, b in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UViT(9, 2), "patches that divide the images"),
        (lambda: UViT(8, 2, embed_dim=24, num_heads=5), "heads that divide"),
        (lambda: UViT(8, 2, embed_dim=24, num_heads=3, depth=4), "odd number of blocks, got 4"),
        (lambda: UViT(**SMALL, threshold=math.nan), "finite threshold"),
        (lambda: UViT(**SMALL)(torch.zeros(1, 3, 8, 9), torch.zeros(1)), r"images \[B, 3, 8, 8\]"),
        (lambda: UViT(**SMALL)(torch.zeros(1, 3, 8, 8), torch.zeros(2)), "time step of each of 1 images"),
        (lambda: DeeDiffLoss(weight="luck"), "weight to be one of"),
        (lambda: DeeDiffLoss(reduction="max"), "reduction to be one of"),
        (lambda: DeeDiffLoss(lam=-1.0), "lam and beta of 0 or more"),
        (lambda: DeeDiffLoss()([torch.zeros(1, 3, 2, 2)], [], torch.zeros(1, 3, 2, 2)), "at least one, got 0 of 0"),
        (lambda: uncertainty_loss([], []), "at least one"),
        (lambda: uncertainty_loss([torch.zeros(1)], [torch.zeros(1)], "max"), "reduction to be one of"),
        (lambda: layer_loss([torch.zeros(1, 1)], torch.zeros(1, 1), []), "weights of 1 outputs, got 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_target_has_no_gradient_and_the_family_is_found():
    output = torch.randn(2, 3, 2, 2, requires_grad=True)
    assert not uncertainty_target(output, torch.zeros(2, 3, 2, 2)).requires_grad
    assert fastcifar.diffusion.UViT is UViT
