"""to_hls: the C++ that it writes compiles and gives PyTorch's numbers to the bit; what it refuses.

FASTCIFAR_AP_TYPES=folder in the environment also compiles every project with the ap_fixed.h in that folder, the FPGA
tool's own.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastcifar.fixedpoint import (
    FixedAdd,
    FixedAvgPool2d,
    FixedBatchNorm2d,
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
from fastcifar.fixedpoint.hls import headers, to_hls

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") and shutil.which("make")), reason="no g++ or no make")
FOLDERS = [None, *([os.environ["FASTCIFAR_AP_TYPES"]] if "FASTCIFAR_AP_TYPES" in os.environ else [])]
ROUNDINGS = ("rnd", "rnd_zero", "rnd_min_inf", "rnd_inf", "rnd_conv", "trn", "trn_zero")
OVERFLOWS = ("sat", "sat_zero", "sat_sym", "wrap", "wrap_sm")


class EveryLayer(nn.Module):
    """Strides, padding, groups and dilation that differ in the two directions, and a shortcut."""

    def __init__(self):
        super().__init__()
        self.input = FixedInput(8)
        self.conv1 = FixedConv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = FixedBatchNorm2d(8)
        self.relu1 = FixedReLU()
        self.conv2 = FixedConv2d(8, 8, 3, padding=(1, 2), dilation=(1, 2), groups=2, width=10)
        self.add = FixedAdd(width=9, rounding="rnd", overflow="wrap")
        self.pool = FixedMaxPool2d(3, 2, 1, ceil_mode=True)
        self.down = FixedConv2d(8, 6, (1, 3), stride=(2, 1), weight_width=5, width=12)
        self.average = FixedAvgPool2d(3)
        self.flatten = FixedFlatten(1)
        self.fc = FixedLinear(6, 10, width=12)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(self.input(x))))
        x = self.add(self.conv2(x), x)
        return self.fc(self.flatten(self.average(self.down(self.pool(x)))))


def _trained(model, x, passes=3):
    """In evaluation mode, with binary points, statistics and parameters that are not those of a fresh one."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-2, 2)
                module.bias.normal_()
        model.train()
        for _ in range(passes):
            model(x)
    return model.eval()


def _test_bench(folder, headers_folder=None, flags="-O1 -Wall -Wextra -Werror"):
    command = ["make", "-s", "-B", "-C", str(folder), "test"]
    command += [f"AP_TYPES={headers_folder}", "CXXFLAGS=-O1 -w"] if headers_folder else [f"CXXFLAGS={flags}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _assert_same_bits(folder, count):
    for headers_folder in FOLDERS:
        done = _test_bench(folder, headers_folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == f"0 of {count} outputs differ\n"


@pytest.fixture(scope="module")
def every_layer(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 15, 13) * 2
    model, folder = _trained(EveryLayer(), x), tmp_path_factory.mktemp("every_layer") / "new" / "project"
    return folder, to_hls(model, folder, x[:6]), model(x[:6])


@needs_compiler
def test_every_layer_gives_the_same_bits(every_layer):
    folder, types, y = every_layer
    assert len(y.raw.unique()) > 20  # not a network of constants
    assert list(types) == ["input", "conv1", "bn1", "relu1", "conv2", "add", "pool", "down", "average", "fc"]
    assert types["fc"] == y.type
    _assert_same_bits(folder, y.numel())
    source = (folder / "model.cpp").read_text()
    for kind in ("conv2d", "linear", "batch_norm", "relu", "add", "avg_pool2d", "max_pool2d"):
        assert f"layers::{kind}<" in source
    readme = (folder / "README.md").read_text()
    assert all(f"`{type}`" in readme for type in types.values())


@needs_compiler
@pytest.mark.parametrize("what", ["a weight", "a bias", "an output", "an input"])
def test_the_test_bench_sees_one_changed_number(every_layer, tmp_path, what):
    folder = tmp_path / "changed"
    shutil.copytree(every_layer[0], folder)
    file, start = {
        "a weight": ("weights.h", "fc_weight[60] = {"),
        "a bias": ("weights.h", "conv2_bias[8] = {"),
        "an output": ("test_data.h", r"recorded_outputs[6][10] = {"),
        "an input": ("test_data.h", r"recorded_inputs[6][585] = {"),
    }[what]
    text = (folder / file).read_text()
    at = text.index(start) + len(start)
    number = re.compile(r"[-\d.e]+").search(text, at)
    assert number is not None
    (folder / file).write_text(text[: number.start()] + str(-float(number[0]) - 3).split(".")[0] + text[number.end() :])
    done = _test_bench(folder)
    assert done.returncode != 0
    assert re.search(r"^example 0, output \d: expected \S+, got \S+$", done.stdout, re.M), done.stdout + done.stderr


@needs_compiler
def test_every_mode_gives_the_same_bits(tmp_path):
    torch.manual_seed(1)

    class EveryMode(nn.Module):
        def __init__(self):
            super().__init__()
            self.input = FixedInput(6, 3)
            self.linears, self.relus = nn.ModuleList(), nn.ModuleList()
            for rounding in ROUNDINGS:
                for overflow in OVERFLOWS:
                    options = {"rounding": rounding, "overflow": overflow}
                    self.linears.append(FixedLinear(8, 8, width=6, frac_bits=4, **options))
                    signed = overflow == "wrap_sm"
                    self.relus.append(FixedReLU(width=4 + signed, frac_bits=2, signed=signed, **options))
            self.add = FixedAdd(width=7, frac_bits=3)

        def forward(self, x):
            x = self.input(x)
            for linear, relu in zip(self.linears, self.relus, strict=True):
                x = self.add(linear(x), relu(x))
            return x

    model = EveryMode().eval()
    with torch.no_grad():
        for linear in model.linears:
            linear.weight.normal_()
            linear.weight_cast.calibrate(linear.weight)
    x = torch.randn(40, 8) * 3
    types = to_hls(model, tmp_path, x)
    written = " ".join(str(type) for type in types.values())
    assert all(f"AP_{mode.upper()}" in written for mode in (*ROUNDINGS[:5], *ROUNDINGS[6:], *OVERFLOWS[1:3], "wrap_sm"))
    _assert_same_bits(tmp_path, 40 * 8)


@needs_compiler
@pytest.mark.parametrize("seed", [0, 1, 3, 4, 5, 6])
def test_random_networks_give_the_same_bits(tmp_path, seed):
    """Widths to 24 bits, weights of one bit, all pools, with and without bias, wherever the binary points end up."""
    torch.manual_seed(seed)

    def pick(*choices):
        return choices[torch.randint(len(choices), ()).item()]

    def options():
        return {"width": pick(4, 6, 8, 13, 24), "rounding": pick(*ROUNDINGS), "overflow": pick(*OVERFLOWS[:4])}

    channels, groups = 2 * pick(1, 2, 3), pick(1, 2)
    model = nn.Sequential(
        FixedInput(pick(3, 8, 16)),
        FixedConv2d(2, channels, pick(1, 2, 3), pick(1, 2), pick(0, 1), weight_width=pick(1, 4, 16), **options()),
        pick(FixedBatchNorm2d(channels, **options()), nn.Identity()),
        FixedReLU(**options()),
        pick(FixedMaxPool2d(pick(2, 3), pick(1, 2), padding=1), nn.Identity()),
        FixedConv2d(channels, 4, 2, groups=groups, bias=bool(seed % 2), weight_width=pick(2, 9), **options()),
        FixedAvgPool2d(pick(None, 1, 2), **options()),
        FixedFlatten(),
    )
    x = torch.randn(12, 2, 9, 9) * 10.0 ** pick(-2, 0, 3)
    features = model.train()(x).shape[1]
    model.append(FixedLinear(features, 5, bias=pick(True, False), **options()))
    to_hls(_trained(model, x), tmp_path, x[:3], name="network")
    assert len(model(x[:3]).raw.unique()) > 3
    _assert_same_bits(tmp_path, 15)


@needs_compiler
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_converted_network_gives_the_same_bits(tmp_path, per_channel):
    torch.manual_seed(2)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 10)

        def forward(self, x):
            x = self.stem(x)
            x = (self.norm(self.conv(x)) + x).relu()
            return self.head(self.pool(torch.max_pool2d(x, 2)).flatten(1))

    x = torch.randn(8, 3, 8, 8)
    fixed = convert(Residual().eval(), FixedConfig(width=6, per_channel=per_channel), x)
    types = to_hls(fixed, tmp_path, x)
    assert all(type.width in (6, 8, 12) for type in types.values())  # of outputs
    wide = max(int(bits) for bits in re.findall(r"fixed<(\d+).*_weight_t;", (tmp_path / "weights.h").read_text()))
    assert (wide > 6) == per_channel  # aligned by exact shifts
    _assert_same_bits(tmp_path, 80)


@needs_compiler
def test_the_example_exports_a_trained_network_to_the_bit(tmp_path):
    plot = ROOT / "examples" / "output" / "fixedpoint_cifar10.png"
    plot.unlink(missing_ok=True)
    command = [
        sys.executable,
        ROOT / "examples" / "fixedpoint_cifar10.py",
        "--quick",
        "--widths",
        "4",
        "--exported",
        "3",
    ]
    command += ["--channels", "4", "--images", "400", "--epochs", "2", "--tuning", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 30" in done.stdout
    assert plot.stat().st_size > 10_000


@needs_compiler
def test_integers_may_come_without_a_float_input(tmp_path):
    wide = FixedTensor(torch.tensor([[-(2**63), 2**63 - 1, 12345]]), FixedType(64, 20))
    types = to_hls(FixedReLU(width=24, frac_bits=5).eval(), tmp_path, wide)
    assert str(types["input"]) == "ap_fixed<64, 20>"
    _assert_same_bits(tmp_path, 3)


@needs_compiler
def test_names_are_names_in_cpp(tmp_path):
    """Numbers, keywords, names of the project itself, names made from others, and a module that runs twice."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("int", FixedReLU(frac_bits=4))
            self.add_module("input", FixedReLU(frac_bits=4))
            self.a, self.a_weight = FixedLinear(3, 3, frac_bits=4), FixedLinear(3, 3, frac_bits=4)
            self.net = nn.Sequential(FixedReLU(frac_bits=3))
            self.exp = FixedReLU(frac_bits=2)

        def forward(self, x):
            x = self.int(self.input(x))
            return self.exp(self.net(self.a_weight(self.a(self.exp(x)))))

    x = FixedTensor(torch.randint(-128, 128, (5, 3)), FixedType(8, 4))
    types = to_hls(Named().eval(), tmp_path, x, name="top")
    assert list(types)[1:] == ["input_2", "layer_int", "exp", "a", "a_weight_2", "net_0", "exp_2"]
    _assert_same_bits(tmp_path, 15)


class _Calls(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.input, self.relu, self.call = FixedInput(8, 4), FixedReLU(frac_bits=4), call

    def forward(self, x):
        return self.call(self.relu(self.input(x)))


def _branch(x):
    return x if x.raw.sum() > 0 else -x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (nn.Sigmoid(), "expected fixed-point layers, got call, a Sigmoid"),
        (lambda x: x + x, "got a call of add; a sum of two is FixedAdd"),
        (lambda x: x.permute(0, 1), "got the method permute"),
        (_branch, "expected a model that torch.fx can trace"),
        (lambda x: (x, x), "expected a model that returns one fixed-point tensor"),
        (lambda x: x.flatten(0), r"expected flatten to give \[N, features\], got \(6,\)"),
    ],
    ids=["module", "function", "method", "control flow", "two results", "flatten"],
)
def test_what_has_no_layer_is_refused(tmp_path, call, message):
    with pytest.raises(ValueError, match=rf"^to_hls: .*{message}"):
        to_hls(_Calls(call).eval(), tmp_path, torch.randn(2, 3))
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused_in_a_sentence(tmp_path):
    model, x = nn.Sequential(FixedInput(8, 4), FixedReLU(frac_bits=4)).eval(), torch.randn(2, 3)
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "notes.txt").touch()
    file.touch()
    with pytest.raises(ValueError, match=r"expected an empty folder, got .*full with notes.txt in it"):
        to_hls(model, full, x)
    for blocked in (file, file / "below"):
        with pytest.raises(ValueError, match=r"expected a folder that can be written, got .*file"):
            to_hls(model, blocked, x)
    with pytest.raises(TypeError, match=r"expected model to be a torch.nn.Module, got function"):
        to_hls(lambda x: x, tmp_path / "new", x)
    with pytest.raises(TypeError, match="expected example_input to be a tensor, got list"):
        to_hls(model, tmp_path / "new", [1.0])
    for shape in ((3,), (0, 3)):
        with pytest.raises(ValueError, match=r"expected examples \[N, ...\], N at least 1"):
            to_hls(model, tmp_path / "new", torch.zeros(shape))
    for name in ("1st", "a b", "class", "weights", "net", ""):
        with pytest.raises(ValueError, match=r"expected (name to be a name in C|a name other than)"):
            to_hls(model, tmp_path / "new", x, name=name)
    model[1].train()
    with pytest.raises(ValueError, match="expected a model in evaluation mode, got 1 in training mode"):
        to_hls(model, tmp_path / "new", x)
    with pytest.raises(ValueError, match="for 0, a FixedReLU; start the network with a FixedInput"):
        to_hls(FixedReLU(frac_bits=4).eval(), tmp_path / "new", x)
    chance = nn.Sequential(FixedInput(8, 4, rounding="stochastic"), FixedReLU(frac_bits=4)).eval()
    with pytest.raises(ValueError, match="got stochastic rounding in input"):
        to_hls(chance, tmp_path / "new", x)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_write_protected_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"expected a folder that can be written, got .*: Permission denied"):
        to_hls(nn.Sequential(FixedInput(8, 4), FixedReLU(frac_bits=4)).eval(), tmp_path / "new", torch.randn(2, 3))


def test_the_headers_are_in_an_installed_package(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", tmp_path / "base"]
    command += ["--build-lib", tmp_path / "lib"]
    environment = os.environ | {"CXX": "no-such-compiler"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    code = (
        "from fastcifar.fixedpoint.hls import headers; print(*sorted(p.name for p in headers().iterdir()), headers())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=os.environ | {"PYTHONPATH": str(tmp_path / "lib")},
                          capture_output=True, text=True, check=True)  # fmt: skip
    *names, folder = done.stdout.split()
    assert names == ["ap_fixed.h", "layers.h", "recast.h"] == sorted(p.name for p in headers().iterdir())
    assert folder.startswith(str(tmp_path))
