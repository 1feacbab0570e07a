"""fastcifar.compat.brevitas against the definition of brevitas's scales, and against brevitas itself."""

import pytest
import torch
from torch import nn

from fastcifar.compat.brevitas import binary_points, load_binary_points
from fastcifar.fixedpoint import FixedConv2d, FixedFlatten, FixedInput, FixedLinear, FixedPoint, FixedReLU, FixedTensor

SCALE = "fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
# What brevitas 0.13.4 wrote of a small network after three batches, the weights shortened.
STATE = {
    f"inp.act_quant.{SCALE}": torch.tensor(1.6570565700531006),
    "conv.weight": torch.tensor([0.19, -0.03]).view(2, 1, 1, 1),
    "conv.bias": torch.tensor([-0.01060392, 0.02889543]),
    f"conv.output_quant.{SCALE}": torch.tensor(0.9315970540046692),
    f"relu.act_quant.{SCALE}": torch.tensor(0.9202815890312195),
    "fc.weight": torch.tensor([[-0.25, 0.125]]),
    "fc.weight_quant.tensor_quant.scaling_impl.value": torch.tensor(-1.9948675632476807),
    "bn.weight": torch.ones(2),
}


def _scaled(x, exponent, width, low, high, signed=True):
    """brevitas's definition: x / scale, rounded to even, clamped, times the scale."""
    scale = 2.0 ** (exponent - width + signed)
    return (x.double() / scale).round().clamp(low, high).mul(scale).float()


def test_exponents_are_rounded_up():
    points = binary_points(STATE, unsigned=["relu.act_quant"])
    assert {name: int(point.frac_bits) for name, point in points.items()} == {
        "inp.act_quant": 7 - 2,
        "conv.output_quant": 7 - 1,
        "relu.act_quant": 8 - 1,
        "fc.weight_quant": 7 + 1,
        "conv.weight_quant": 7 + 2,  # the largest magnitude, 0.19, is below 2^-2
    }
    assert str(points["conv.weight_quant"].fixed_type) == "ap_fixed<8, -1, AP_RND_CONV, AP_SAT_SYM>"
    assert str(points["relu.act_quant"].fixed_type) == "ap_ufixed<8, 1, AP_RND_CONV, AP_SAT>"


def test_a_power_of_two_is_not_rounded_up():
    key = f"a.act_quant.{SCALE}"
    for exponent, whole in ((1.0, 1), (1.0000001, 2), (-3.0, -3), (-2.9999998, -2), (0.0, 0)):
        assert int(binary_points({key: torch.tensor(exponent)})["a.act_quant"].frac_bits) == 7 - whole
    for largest, whole in ((0.5, -1), (0.50001, 0), (1.0, 0), (0.0, -33)):  # of zeros: that of 1e-10
        points = binary_points({"a.weight": torch.tensor([[largest, 0.0]])})
        assert int(points["a.weight_quant"].frac_bits) == 7 - whole


def test_modules_give_the_numbers():
    points = binary_points(STATE, unsigned=["relu.act_quant"], widths={"fc.weight_quant": 4})
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(points["inp.act_quant"].module()(x), _scaled(x, 2, 8, -128, 127))
    assert torch.equal(points["relu.act_quant"].module()(x), _scaled(x, 1, 8, 0, 255, signed=False))
    assert torch.equal(points["fc.weight_quant"].module()(x), _scaled(x, -1, 4, -7, 7))
    assert isinstance(points["inp.act_quant"].module().frac_bits, nn.Parameter)
    assert not list(points["inp.act_quant"].module(trainable=False).parameters())


def test_weights_of_a_channel_each():
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 5).view(
        5, 1, 1, 1
    )
    point = binary_points({"a.weight": weight}, per_channel=["a.weight_quant"])["a.weight_quant"]
    exponents = weight.abs().amax((1, 2, 3)).log2().ceil()
    assert torch.equal(point.frac_bits.flatten(), 7 - exponents)
    assert len(exponents.unique()) > 3
    expected = torch.stack([_scaled(w, e.item(), 8, -127, 127) for w, e in zip(weight, exponents, strict=True)])
    assert torch.equal(point.module()(weight), expected)
    stored = {"a.weight": weight, "a.weight_quant.tensor_quant.scaling_impl.value": exponents.view(5, 1, 1, 1) - 0.25}
    assert torch.equal(binary_points(stored)["a.weight_quant"].frac_bits, point.frac_bits)
    with pytest.raises(ValueError, match="expected one binary point, got 5"):
        _ = point.fixed_type


class _Net(nn.Module):
    """Named as the network that STATE is of."""

    def __init__(self):
        super().__init__()
        self.inp, self.conv, self.relu = FixedInput(8), FixedConv2d(1, 2, 1), FixedReLU(width=8)
        self.flatten, self.fc = FixedFlatten(), FixedLinear(2, 1, bias=False)

    def forward(self, x):
        return self.fc(self.flatten(self.relu(self.conv(self.inp(x)))))


def test_layers_are_filled_by_name_and_compute_the_same():
    model = _Net()
    model.load_state_dict(STATE, strict=False)
    filled, left = load_binary_points(model, STATE)
    assert filled == ["inp.output", "conv.weight_cast", "conv.output", "relu.output", "fc.weight_cast"]
    assert left == ["fc.output"]
    x = torch.randn(50, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 3
    hidden = _scaled(x, 2, 8, -128, 127)
    hidden = hidden * _scaled(STATE["conv.weight"], -2, 8, -127, 127).view(1, 2, 1, 1)
    model.conv.bias = None
    hidden = _scaled(_scaled(hidden, 1, 8, -128, 127).relu(), 1, 8, 0, 255, signed=False)
    assert torch.equal(model.relu(model.conv(model.inp(x))), hidden)
    model.train()(x)  # calibrates what was left
    trained = model(x)
    integers = model.eval()(x)
    assert isinstance(integers, FixedTensor)
    assert torch.equal(integers.float(), trained.detach())


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_of_a_layer_with_a_binary_point_a_channel(per_channel):
    layer = nn.Sequential(FixedConv2d(2, 3, 1, per_channel=per_channel))
    weight = torch.tensor([[0.3, -0.1], [2.0, 1.9], [-0.06, 0.05]]).view(3, 2, 1, 1)
    layer.load_state_dict({"0.weight": weight}, strict=False)
    assert load_binary_points(layer, {"0.weight": weight}) == (["0.weight_cast"], ["0.output"])
    exponents = [-1, 1, -4] if per_channel else [1, 1, 1]
    expected = torch.stack([_scaled(w, e, 8, -127, 127) for w, e in zip(weight, exponents, strict=True)])
    assert torch.equal(layer[0].weight_cast(weight).detach(), expected)
    assert torch.equal(layer[0].raw_weight().float(), expected)


def test_cast_modules_are_filled_by_name():
    model = nn.ModuleDict({"inp": FixedPoint(8, 4, trainable=True, calibration="mse"), "other": FixedPoint(8, 4)})
    assert load_binary_points(model, STATE) == (["inp"], ["other"])
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(model["inp"](x), _scaled(x, 2, 8, -128, 127))
    assert torch.equal(model["other"](x), FixedPoint(8, 4)(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: binary_points(STATE, unsigned=["relu"]), "unsigned to name quantizers .*inp.act_quant.*, got relu"),
        (lambda: binary_points({}, widths={"a": 3}), r"\(none\), got a"),
        (lambda: binary_points(STATE, per_channel=["x"]), "expected per_channel to name"),
        (lambda: binary_points(STATE, width=33), "width of 1 to 32 for inp.act_quant, got 33"),
        (lambda: binary_points(STATE, widths={"fc.weight_quant": 1}), "width of 2 to 32 for fc.weight_quant, got 1"),
        (lambda: binary_points(STATE, unsigned=["fc.weight_quant"]), "weight's numbers to have a sign"),
        (lambda: binary_points({f"a.act_quant.{SCALE}": torch.tensor(torch.nan)}), "finite numbers, got others in a"),
        (
            lambda: binary_points({"a.weight": torch.full((1, 1), 1e-3)})["a.weight_quant"].module(),
            "int_bits of -4 to 40, which casts hold; got -8",
        ),
        (
            lambda: load_binary_points(_Net(), {"conv.weight": torch.full((1, 1), 1e-3)}),
            "load_binary_points, conv.weight_cast: expected",
        ),
        (
            lambda: load_binary_points(_Net(), {f"inp.act_quant.{SCALE}": torch.ones(3, 1, 1)}),
            "as many binary points for inp.output as it has, 1; got 3",
        ),
    ],
)
def test_refuses_in_a_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_nothing_is_changed_where_one_is_refused():
    model = _Net()
    before = {name: t.clone() for name, t in model.named_parameters()}
    with pytest.raises(ValueError, match="relu"):
        load_binary_points(model, STATE | {f"relu.act_quant.{SCALE}": torch.tensor(99.0)})
    assert all(torch.equal(t, before[name]) for name, t in model.named_parameters())


# ---- against brevitas ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """A network of brevitas's own layers after three batches: it, and what went in."""
    qnn = pytest.importorskip("brevitas.nn")
    quant = pytest.importorskip("brevitas.quant.fixed_point")
    generator = torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "inp": qnn.QuantIdentity(act_quant=quant.Int8ActPerTensorFixedPoint),
            "conv": qnn.QuantConv2d(
                *(3, 4, 3),
                weight_quant=quant.Int8WeightPerTensorFixedPoint,
                output_quant=quant.Int8ActPerTensorFixedPoint,
            ),
            "relu": qnn.QuantReLU(act_quant=quant.Uint8ActPerTensorFixedPoint),
            "channels": qnn.QuantConv2d(4, 4, 3, weight_quant=quant.Int8WeightPerChannelFixedPoint),
            "mse": qnn.QuantLinear(6, 5, bias=True, weight_quant=quant.Int8WeightPerTensorFixedPointMSE),
            "channels_mse": qnn.QuantConv2d(4, 4, 3, weight_quant=quant.Int8WeightPerChannelFixedPointMSE),
            "narrow": qnn.QuantLinear(
                6, 5, bias=True, weight_quant=quant.Int8WeightPerTensorFixedPoint, weight_bit_width=4
            ),
            "minmax": qnn.QuantIdentity(
                act_quant=quant.Int8ActPerTensorFixedPointMinMaxInit, min_val=-0.5, max_val=0.5
            ),
        }
    )
    with torch.no_grad():
        model["channels"].weight *= torch.logspace(-0.5, 1, 4).view(4, 1, 1, 1)
        model["channels_mse"].weight *= torch.logspace(-0.5, 1, 4).view(4, 1, 1, 1)
    x = torch.randn(2, 3, 8, 8, generator=generator) * 2
    for _ in range(3):
        hidden = model["relu"](model["conv"](model["inp"](x)))
        model["channels"](hidden), model["channels_mse"](hidden), model["minmax"](x)
        model["mse"](torch.randn(2, 6)), model["narrow"](torch.randn(2, 6))
    return model.eval()


def test_the_casts_give_brevitass_numbers(network):
    points = binary_points(
        network.state_dict(),
        unsigned=["relu.act_quant"],
        widths={"narrow.weight_quant": 4},
        per_channel=["channels.weight_quant"],
    )
    for name in ("conv", "channels", "mse", "channels_mse", "narrow"):
        weight = network[name].weight.detach()
        theirs = network[name].quant_weight().value.detach()
        assert torch.equal(points[f"{name}.weight_quant"].module()(weight).detach(), theirs), name
        assert not torch.equal(theirs, weight)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 3
    for name in ("inp", "relu", "minmax"):
        theirs = network[name](x)
        theirs = getattr(theirs, "value", theirs).detach()
        assert torch.equal(points[f"{name}.act_quant"].module()(x).detach(), theirs), name


def test_the_layers_give_brevitass_numbers(network):
    """A convolution and a ReLU, whose sums float32 holds."""
    model = nn.Sequential()
    model.inp, model.conv, model.relu = FixedInput(8), FixedConv2d(3, 4, 3, bias=False), FixedReLU(width=8)
    state = network.state_dict()
    model.load_state_dict(state, strict=False)
    assert load_binary_points(model, state)[1] == []
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2
    conv = network["conv"]
    bias, conv.bias = conv.bias, None
    theirs = network["relu"](conv(network["inp"](x)))
    conv.bias = bias
    theirs = getattr(theirs, "value", theirs).detach()
    assert torch.equal(model(x).detach(), theirs)
    assert torch.equal(model.eval()(x).float(), theirs)
