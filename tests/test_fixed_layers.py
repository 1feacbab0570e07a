"""Fixed-point layers: integers from end to end, the same numbers as the floats that are trained, and conversion."""

import copy
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.fixedpoint import (
    FixedAdd,
    FixedAvgPool2d,
    FixedBatchNorm2d,
    FixedCast,
    FixedConfig,
    FixedConv2d,
    FixedFlatten,
    FixedInput,
    FixedLinear,
    FixedMaxPool2d,
    FixedReLU,
    FixedTensor,
    FixedType,
    convert,
)
from fastcifar.fixedpoint.casting import with_type
from fastcifar.fixedpoint.integer import recast


def random_fixed(shape, type, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return FixedTensor(torch.randint(type.lowest, type.highest + 1, shape, generator=generator), type)


def as_floats(x):
    return with_type(x.float(), x.type)


def both(layer, *inputs):
    """The layer on integers and on floats; the same numbers and the same type, or the test fails."""
    layer.eval()
    floats = layer(*[as_floats(x) for x in inputs])  # calibrates
    integers = layer(*inputs)
    assert isinstance(integers, FixedTensor)
    assert floats.dtype == torch.float32
    assert floats.fixed_type == integers.type
    assert torch.equal(integers.float(), floats)
    FixedTensor(integers.raw, integers.type)  # in range
    return integers


SIGNED, UNSIGNED = FixedType(8, 3), FixedType(8, 1, signed=False)
by_width = pytest.mark.parametrize("width", [1, 4, 8, 12, 16])


@by_width
@pytest.mark.parametrize("type", [SIGNED, UNSIGNED, FixedType(16, 5), FixedType(4, 4)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_cast_of_the_exact_sum(type, bias, width):
    torch.manual_seed(0)
    layer = FixedLinear(50, 20, bias, width=width, weight_width=max(width, 2))
    x = random_fixed((7, 50), type)
    out = both(layer, x)
    weight = layer.raw_weight()
    sums = x.raw.long() @ weight.raw.long().T
    frac_bits = type.frac_bits + weight.type.frac_bits
    if bias:
        raw, frac = layer.raw_bias(type)
        sums = sums + (raw << (frac_bits - frac))
        assert torch.equal(raw * 2.0**-frac, (layer.bias.detach().double() * 2.0**frac).round() * 2.0**-frac)
    assert torch.equal(out.raw.long(), recast(sums, frac_bits, out.type))


@by_width
@pytest.mark.parametrize(
    "geometry",
    [{}, {"stride": 2, "padding": 1}, {"padding": (2, 1), "dilation": 2}, {"groups": 4}, {"groups": 8}],
    ids=str,
)
def test_convolution_is_the_cast_of_the_exact_sum(geometry, width):
    torch.manual_seed(0)
    layer = FixedConv2d(8, 16, 3, width=width, **geometry)
    x = random_fixed((2, 8, 9, 7), SIGNED)
    out = both(layer, x)
    weight = layer.raw_weight()
    sums = F.conv2d(x.raw.long(), weight.raw.long(), None, layer.stride, layer.padding, layer.dilation, layer.groups)
    raw, frac = layer.raw_bias(SIGNED)
    frac_bits = SIGNED.frac_bits + weight.type.frac_bits
    sums = sums + (raw << (frac_bits - frac)).view(-1, 1, 1)
    assert torch.equal(out.raw.long(), recast(sums, frac_bits, out.type))


def scaled_channels(layer):
    """Weights of channel after channel 2, 4, 8, ... times smaller, and binary points to suit."""
    with torch.no_grad():
        layer.weight *= 2.0 ** -torch.arange(len(layer.weight)).remainder(5).view(-1, *[1] * (layer.weight.dim() - 1))
    layer.weight_cast.calibrate(layer.weight)
    return layer


@pytest.mark.parametrize("width", [2, 8, 14])
@pytest.mark.parametrize("groups", [None, 1, 2])
def test_a_binary_point_a_channel_gives_the_same_numbers_in_both_ways_and_less_error(width, groups):
    torch.manual_seed(0)
    layers = [
        scaled_channels(
            FixedLinear(30, 12, width=12, weight_width=width, per_channel=each)
            if groups is None
            else FixedConv2d(6, 12, 3, width=12, weight_width=width, groups=groups, per_channel=each)
        )
        for each in (False, True)
    ]
    layers[1].load_state_dict({n: p for n, p in layers[0].state_dict().items() if "cast" not in n}, strict=False)
    layers[1].weight_cast.calibrate(layers[1].weight)
    x = random_fixed((4, 30) if groups is None else (2, 6, 8, 8), SIGNED)
    errors = []
    for layer in layers:
        out = both(layer, x)
        weight = layer.raw_weight()
        assert torch.equal(weight.float(), layer.weight_cast(layer.weight))
        FixedTensor(weight.raw, weight.type)  # in range
        raw, frac = layer.raw_bias(SIGNED)
        frac_bits = SIGNED.frac_bits + weight.type.frac_bits
        long = x.raw.long(), weight.raw.long()
        sums = long[0] @ long[1].T if groups is None else F.conv2d(*long, groups=groups)
        sums = sums + (raw << (frac_bits - frac)).view(-1, *[1] * (sums.dim() - 2))
        assert torch.equal(out.raw.long(), recast(sums, frac_bits, out.type))
        errors.append((weight.float() - layer.weight).square().sum().item())
    assert errors[1] < errors[0]
    points = layers[1].weight_cast.frac_bits
    assert points.shape == (12, *[1] * (layers[1].weight.dim() - 1))
    assert layers[1].weight_cast.fixed_type.width == width + round(points.max().item()) - round(points.min().item())
    assert layers[0].weight_cast.fixed_type.width == width
    layers[1](as_floats(x)).sum().backward()
    assert (points.grad != 0).all()


def test_sums_that_float32_does_not_hold_are_right_in_both_modes():
    """Operands of one sign at the limits of their types: plain float32 sums round here."""
    layer = FixedLinear(4608, 3, bias=False, width=24, weight_width=10, frac_bits=-3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[511 / 512], [511 / 512 - 1 / 512], [-1.0]]).expand(3, 4608))
    layer.weight_cast.frac_bits.data.fill_(9)
    type = FixedType(10, 2)
    raw = torch.full((1, 4608), 511)
    raw[:, ::5] = 509
    out = both(layer, FixedTensor(raw, type))
    exact = [sum(r * w for r in raw[0].tolist()) for w in (511, 510, -512)]
    naive = (raw.float() @ layer.raw_weight().raw.float().T)[0].tolist()
    assert naive != exact
    assert out.raw[0].tolist() == recast(torch.tensor(exact), 17, out.type).tolist()


def test_sums_beyond_float64_are_refused_in_training_and_right_in_integers():
    layer = FixedLinear(4096, 2, bias=False, width=24, weight_width=24, frac_bits=-2)
    x = random_fixed((3, 4096), FixedType(24, 4))
    with pytest.raises(ValueError, match=r"FixedLinear: expected sums of at most 2\^53 units"):
        layer(as_floats(x))
    weight = layer.raw_weight()
    exact = x.raw.long() @ weight.raw.long().T
    assert torch.equal(layer(x).raw.long(), recast(exact, 20 + weight.type.frac_bits, layer.output.fixed_type))


@by_width
@pytest.mark.parametrize("type", [SIGNED, UNSIGNED, FixedType(12, 2)], ids=str)
def test_batch_norm_is_a_scale_and_a_shift_in_fixed_point(type, width):
    torch.manual_seed(0)
    layer = FixedBatchNorm2d(5, width=width)
    with torch.no_grad():
        layer.weight.uniform_(-2, 2)
        layer.bias.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.05, 4)
    x = random_fixed((3, 5, 4, 4), type)
    out = both(layer, x)
    scale, shift = layer.raw_scale_and_shift(type)
    assert scale.type.width == 16
    wide = layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()
    assert (scale.float(torch.float64) - wide).abs().max() <= 2.0**-scale.type.frac_bits
    assert scale.raw.abs().max() >= 2**14  # the binary point just holds the largest
    assert torch.equal(out.raw, (x * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)).cast(out.type).raw)


def test_batch_norm_in_training_follows_torch():
    torch.manual_seed(0)
    ours, plain = FixedBatchNorm2d(6, width=16), nn.BatchNorm2d(6)
    x = random_fixed((8, 6, 5, 5), FixedType(12, 4))
    for _ in range(3):
        out, expected = ours(as_floats(x)), plain(x.float())
    assert (out - expected).abs().max() <= 2e-3
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name))


@by_width
def test_elementwise_layers_are_casts_of_exact_results(width):
    x, y = random_fixed((2, 3, 8, 8), SIGNED), random_fixed((2, 3, 8, 8), UNSIGNED, seed=1)
    out = both(FixedReLU(width=width), x)
    assert not out.type.signed
    assert torch.equal(out.raw.long(), recast(x.raw.clamp_min(0), 5, out.type))
    out = both(FixedAdd(width=width), x, y)
    assert torch.equal(out.raw, (x + y).cast(out.type).raw)
    pooled = both(FixedMaxPool2d(2), x)
    assert pooled.type == x.type
    assert torch.equal(pooled.raw.double(), F.max_pool2d(x.raw.double(), 2))
    assert both(FixedFlatten(), x).shape == (2, 192)


@pytest.mark.parametrize(("kernel", "size"), [(None, 8), (2, 8), (3, 9), (None, 7), (5, 13), (None, 1)])
def test_average_pool_is_exact_for_powers_of_two_and_as_documented_otherwise(kernel, size):
    x = random_fixed((2, 3, size, size), SIGNED)
    out = both(FixedAvgPool2d(kernel, width=12), x)
    window = kernel or size
    sums = F.avg_pool2d(x.raw.double(), window, divisor_override=1).long()
    count = window * window
    bits = 15 + (count - 1).bit_length()
    reciprocal = round(Fraction(2**bits, count))
    assert torch.equal(out.raw.long(), recast(sums * reciprocal, 5 + bits, out.type))
    if count & (count - 1) == 0:
        assert Fraction(reciprocal, 2**bits) == Fraction(1, count)


@pytest.mark.parametrize("rounding", ["rnd", "rnd_zero", "rnd_min_inf", "rnd_inf", "rnd_conv", "trn", "trn_zero"])
@pytest.mark.parametrize("overflow", ["sat", "sat_zero", "sat_sym", "wrap", "wrap_sm"])
def test_every_mode_of_the_output_gives_the_same_numbers_in_both_ways(rounding, overflow):
    torch.manual_seed(0)
    x = random_fixed((9, 30), SIGNED)
    both(FixedLinear(30, 40, width=6, frac_bits=5, rounding=rounding, overflow=overflow), x)
    both(FixedAdd(width=5, frac_bits=3, rounding=rounding, overflow=overflow), x, x)


def test_calibration_takes_the_binary_point_with_the_least_error():
    torch.manual_seed(0)
    x = torch.randn(20000)
    for width in (3, 4, 8):
        cast = FixedCast(width)
        out = cast(x)
        error = (out - x).square().mean()
        for frac_bits in range(-3, 12):
            other = FixedCast(width, frac_bits)
            assert error <= (other(x) - x).square().mean()
    assert FixedCast(8, frac_bits=3).calibrated
    zero = FixedCast(8)
    assert zero(torch.zeros(5)).tolist() == [0.0] * 5


def test_gradients_reach_inputs_weights_and_binary_points():
    torch.manual_seed(0)
    layer, entry = FixedLinear(12, 4, width=4, weight_width=4), FixedInput(4)
    x = torch.randn(30, 12, requires_grad=True)
    layer(entry(x)).square().sum().backward()
    for parameter in (x, *entry.parameters(), *layer.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    # Where nothing saturates the casts pass gradients on: those of the float layer at the same values.
    wide = FixedLinear(12, 4, width=20, weight_width=20, frac_bits=10)
    leaf = FixedInput(20, frac_bits=12)(x).detach().requires_grad_()
    wide(with_type(leaf, FixedType(20, 8))).square().sum().backward()
    weight = wide.weight_cast(wide.weight).detach().requires_grad_()
    bias, other = wide.bias.detach().clone().requires_grad_(), leaf.detach().clone().requires_grad_()
    F.linear(other, weight, bias).square().sum().backward()
    for ours, plain in ((leaf, other), (wide.weight, weight), (wide.bias, bias)):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=2e-2, atol=2e-2)


# ---- conversion ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.pool, self.fc, self.drop = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10), nn.Dropout(0.1)

    def forward(self, x):
        return self.fc(self.drop(torch.flatten(self.pool(self.blocks(self.stem(x))), 1)))


def trained_net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(16, 3, 16, 16))
    return net.eval()


@pytest.mark.parametrize("width", [4, 6, 8, 12])
def test_a_converted_network_runs_in_integers_and_gives_what_its_floats_give(width):
    net, images = trained_net(), torch.randn(8, 3, 16, 16)
    before = copy.deepcopy(net.state_dict())
    fixed = convert(net, FixedConfig(width=width), images)
    assert not any(
        type(m).__module__.startswith("torch.nn.modules") and not list(m.children()) and not isinstance(m, nn.Identity)
        for m in fixed.modules()
    )
    integers = fixed(images)
    assert isinstance(integers, FixedTensor)
    fixed.get_submodule("input_fixed").train()
    floats = fixed(images)
    assert torch.equal(integers.float(), floats)
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in before.items())
    if width == 12:
        expected = net(images)
        assert (floats - expected).abs().max() <= 0.05 * expected.abs().max()


def test_a_converted_network_may_have_a_binary_point_a_channel():
    net, images = trained_net(), torch.randn(8, 3, 16, 16)
    fixed = convert(net, FixedConfig(width=5, per_channel=True), images)
    points = {n: p for n, p in fixed.named_parameters() if n.endswith("weight_cast.frac_bits")}
    assert len(points) == 7
    assert all(p.numel() in (8, 10, 16) for p in points.values())
    twin = convert(net, FixedConfig(width=5, per_channel=True), images)
    with torch.no_grad():
        points["stem_0_fixed.weight_cast.frac_bits"][3] += 2
    assert not torch.equal(twin(images).raw, fixed(images).raw)
    twin.load_state_dict(fixed.state_dict())
    integers = fixed(images)
    assert torch.equal(twin(images).raw, integers.raw)
    fixed.get_submodule("input_fixed").train()
    assert torch.equal(integers.float(), fixed(images))


def test_a_converted_network_trains():
    net = trained_net()
    fixed = convert(net, FixedConfig(width=6), torch.randn(8, 3, 16, 16)).train()
    torch.manual_seed(1)
    images, labels = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
    adam = torch.optim.Adam(fixed.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(fixed(images), labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    start = convert(net, FixedConfig(width=6), torch.randn(8, 3, 16, 16))
    moved = [n for n, p in fixed.named_parameters() if n.endswith("frac_bits")]
    assert any(not torch.equal(dict(start.named_parameters())[n], dict(fixed.named_parameters())[n]) for n in moved)
    fixed.eval()
    integers = fixed(images)
    fixed.get_submodule("input_fixed").train()
    assert torch.equal(integers.float(), fixed(images))
    twin = copy.deepcopy(start)
    twin.load_state_dict(fixed.state_dict())
    assert torch.equal(twin.eval()(images).raw, integers.raw)


def test_functions_and_methods_are_converted_too():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            x = F.relu(self.conv(x))
            x = F.max_pool2d(x, 2)
            x = torch.add(x, x).relu()
            x = F.avg_pool2d(x, 2)
            return F.adaptive_avg_pool2d(x, 1).flatten(1)

    images = torch.randn(4, 3, 8, 8)
    fixed = convert(Functional().eval(), FixedConfig(width=10), images)
    kinds = [type(m).__name__ for m in fixed.children()]
    assert kinds.count("FixedReLU") == 2
    assert kinds.count("FixedAvgPool2d") == 2
    assert fixed(images).shape == (4, 4)


class _Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class _Held(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: convert(3), TypeError, "convert: expected a module, got int"),
        (lambda: convert(_Held(nn.GELU())), ValueError, "expected a layer that is known, got layer, a GELU"),
        (
            lambda: convert(_Applied(torch.sigmoid)),
            ValueError,
            "expected a layer or an operation that is known, .*sigmoid",
        ),
        (lambda: convert(_Applied(lambda x: x + 1)), ValueError, "expected an addition of two tensors"),
        (lambda: convert(_Held(nn.AvgPool2d(3, 2))), ValueError, "expected an average over square windows"),
        (lambda: convert(_Held(nn.AdaptiveAvgPool2d(2))), ValueError, "expected an adaptive average to 1 x 1, got 2"),
        (
            lambda: convert(_Held(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))),
            ValueError,
            "expected zeros as padding, got 'reflect'",
        ),
        (lambda: FixedReLU()(torch.ones(2)), TypeError, "FixedReLU: expected a FixedTensor or the output of a fixed"),
        (lambda: FixedConv2d(3, 3, 3, padding="same"), ValueError, "expected padding in numbers, got 'same'"),
        (lambda: FixedCast(25), ValueError, "FixedCast: expected a width of 1 to 24"),
        (lambda: FixedCast(8)(torch.full((3,), torch.nan)), ValueError, "FixedCast: expected finite data"),
        (
            lambda: FixedReLU()(random_fixed((2,), SIGNED)),
            ValueError,
            "FixedCast: expected a calibrated binary point",
        ),
        (
            lambda: FixedAdd()(random_fixed((2,), SIGNED), as_floats(random_fixed((2,), SIGNED))),
            TypeError,
            "FixedAdd: expected two FixedTensors or two float tensors, got one of each",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, error, says):
    with pytest.raises(error, match=says):
        call()
