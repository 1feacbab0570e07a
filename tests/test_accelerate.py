"""``accelerate`` and ``restore``: what is swapped, what is carried over, what is left and why, and that nothing is ever
half done."""

from __future__ import annotations

import copy
import importlib.util
import pickle

import pytest
import torch
from torch import Tensor, nn

import fastcifar
from fastcifar import _observing, _swaps, accelerate, restore
from fastcifar.compat import spikingjelly as ours

needs = {
    package: pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")
    for package in ("spikingjelly", "snntorch", "brevitas", "earlyon", "diffusers")
}


def _spiking() -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(2),
        nn.Linear(48, 32),
        neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan(), detach_reset=True),
        nn.Linear(32, 16),
        neuron.ParametricLIFNode(init_tau=3.0, step_mode="m"),
    )


X = torch.randn(4, 5, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def _train(model: nn.Module, steps: int = 2) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        for module in model.modules():
            if hasattr(module, "detach") and hasattr(module, "reset"):
                module.detach()
    return [p.detach().clone() for p in model.parameters()]


@needs["spikingjelly"]
def test_neurons_are_swapped_with_their_state():
    model = _spiking()
    expected = copy.deepcopy(model)
    for m in (model, expected):
        m(X)  # membranes that are not at rest
    parameters, keys, neuron = list(model.parameters()), list(model.state_dict()), model[2]
    report = accelerate(model, inputs=X, verify=True)
    assert [s.name for s in report.swapped] == ["2", "4"]
    assert not report.left
    assert report.difference == 0
    assert model[2] is neuron, "the object stays"
    assert type(model[2]) is ours.LIFNode
    assert model[2].detach_reset
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(X), expected(X), rtol=0, atol=0)
    assert all(s.gain is not None for s in report.swapped)
    assert "LIFNode" in str(report)


@needs["spikingjelly"]
def test_training_goes_on_and_restore_gives_back_the_peer():
    model, expected = _spiking(), _spiking()
    accelerate(model)
    for a, b in zip(_train(model), _train(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert restore(model) == 2
    assert type(model[2]) is type(expected[2])
    torch.testing.assert_close(model[2].v, expected[2].v, rtol=0, atol=0)
    torch.testing.assert_close(model(X), expected(X), rtol=1e-5, atol=1e-6)
    assert restore(model) == 0


@needs["spikingjelly"]
def test_copies_and_pickles_can_be_restored():
    model = _spiking()
    accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[4]) is ours.ParametricLIFNode
        assert restore(other) == 2
        assert other[4].w is not model[4].w
        assert other[4].w is dict(other.named_parameters())["4.w"]
        torch.testing.assert_close(other(X), _spiking()(X), rtol=0, atol=0)
    assert type(model[4]) is ours.ParametricLIFNode


@needs["spikingjelly"]
def test_hooks_shared_modules_and_plain_references_are_kept():
    model = _spiking()
    model.add_module("again", model[2])
    seen: list[torch.Size] = []
    model[2].register_forward_hook(lambda module, _, out: seen.append(out.shape))
    model.__dict__["neurons"] = [model[2]]
    report = accelerate(model)
    assert len(report.swapped) == 2, "a shared module is one module"
    assert model.again is model[2] is model.__dict__["neurons"][0]
    model[:3](X)
    assert seen == [torch.Size([4, 5, 32])]
    assert restore(model) == 2
    model[:3](X)
    assert len(seen) == 2


@needs["spikingjelly"]
def test_what_is_left_says_why():
    from spikingjelly.activation_based import neuron

    class Mine(neuron.LIFNode):
        pass

    model = nn.Sequential(Mine(), neuron.IFNode(), neuron.LIFNode())
    model[1].forward = lambda x: x
    report = accelerate(model)
    assert [s.why for s in report.left] == [
        "a subclass of SpikingJelly's LIFNode, which may do something else",
        "its forward was replaced on the object",
    ]
    assert [s.name for s in report.swapped] == ["2"]
    assert type(model[0]) is Mine


@needs["spikingjelly"]
def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model = _spiking()
    kinds = [type(m) for m in model]

    def broken(module, parent):
        raise RuntimeError("broken rule")

    key = ("spikingjelly", "ParametricLIFNode")
    rule = _swaps._PACKAGES[key]
    monkeypatch.setitem(_swaps._PACKAGES, key, _swaps.Rule("spiking", "SpikingJelly", broken))
    with pytest.raises(RuntimeError, match="broken rule"):
        accelerate(model)
    assert [type(m) for m in model] == kinds

    def wrong(module, parent):
        return ours.IFNode, {"step_mode": module.step_mode}  # has no w

    monkeypatch.setitem(_swaps._PACKAGES, key, _swaps.Rule("spiking", "SpikingJelly", wrong))
    report = accelerate(model)
    assert "parameters are ['w']" in report.left[0].why
    assert [type(m) for m in model][3:] == kinds[3:]
    restore(model)

    monkeypatch.setitem(_swaps._PACKAGES, key, rule)
    key = ("spikingjelly", "LIFNode")
    monkeypatch.setitem(_swaps._PACKAGES, key, _swaps.Rule("spiking", "SpikingJelly", wrong))
    with pytest.raises(RuntimeError, match="expected outputs within"):
        accelerate(model[2:3], inputs=9 * X, verify=True)
    assert [type(m) for m in model] == kinds
    torch.testing.assert_close(model(X), _spiking()(X), rtol=0, atol=0)


@needs["spikingjelly"]
def test_a_dry_run_changes_nothing():
    model = _spiking()
    report = accelerate(model, dry_run=True)
    assert [s.action for s in report.swaps] == ["would be swapped"] * 2
    assert restore(model) == 0
    torch.testing.assert_close(model(X), _spiking()(X), rtol=0, atol=0)


@needs["spikingjelly"]
def test_families_choose():
    model = _spiking()
    assert accelerate(model, families=["spectral"]).swaps == ()
    assert len(accelerate(model, families=["spiking"]).swaps) == 2
    with pytest.raises(ValueError, match=r"expected families of .*; got 'speking'"):
        accelerate(model, families=["speking"])


@needs["snntorch"]
def test_snntorch_leaky():
    import snntorch as snn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), snn.Leaky(beta=0.9, init_hidden=True, learn_beta=True))
    expected = copy.deepcopy(model)
    x = torch.randn(3, 6)
    model(x), expected(x)
    assert accelerate(model, inputs=x, verify=True).difference == 0
    assert isinstance(model[1].beta, nn.Parameter)
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)
    restore(model)
    assert type(model[1]) is snn.Leaky
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)


def _brevitas() -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import fixed_point as fp

    torch.manual_seed(0)
    weight, act = fp.Int8WeightPerTensorFixedPoint, fp.Int8ActPerTensorFixedPoint
    model = nn.Sequential(
        qnn.QuantConv2d(3, 4, 3, weight_quant=weight, output_quant=act),
        qnn.QuantReLU(act_quant=fp.Uint8ActPerTensorFixedPoint),
        qnn.QuantIdentity(),  # not a power of two
    )
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    return model


@needs["brevitas"]
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_brevitas_fixed_point():
    model, expected = _brevitas(), _brevitas()
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    for m in (model, expected):
        m.eval()  # where scales are parameters
    report = accelerate(model, inputs=x, verify=True)
    assert report.difference == 0
    assert len(report.swapped) == 3
    assert "not a power of two" in report.left[0].why
    for m in (model, expected):
        m(x).square().sum().backward()
    names = dict(model.named_parameters())
    assert any("scaling_impl" in name for name in names)
    for name, p in expected.named_parameters():
        torch.testing.assert_close(names[name].grad, p.grad, rtol=2e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert restore(model) == 3
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)


@needs["earlyon"]
def test_earlyon_wrapper_as_the_model_itself():
    from earlyon.core.exit_head import EarlyExitHead
    from earlyon.core.types import EarlyExitConfig, ExitPoint
    from earlyon.core.wrappers import EarlyExitWrapper

    torch.manual_seed(0)
    config = EarlyExitConfig("cnn", 4, [ExitPoint("first", "0", 8)], confidence_thresholds=[0.3])
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model = EarlyExitWrapper(backbone, {"first": EarlyExitHead(8, 4)}, nn.Identity(), config, (1, 3, 8, 8)).eval()
    x = torch.randn(1, 3, 8, 8)
    expected = model(x)
    report = accelerate(model, inputs=x, verify=True)
    assert report.swapped[0].name == ""
    assert report.difference < 1e-6
    assert model(torch.randn(5, 3, 8, 8)).exit_taken.shape == (5,), "takes batches now"
    assert restore(model) == 1
    assert type(model) is EarlyExitWrapper
    assert _observing.tensors(model(x))
    for a, b in zip(_observing.tensors(model(x)), _observing.tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(backbone[0]._forward_hooks) == 1


def _pipeline(scheduler):
    from diffusers import DDIMPipeline, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _images(pipeline):
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipeline(2, generator, num_inference_steps=5, output_type="np").images)


@needs["diffusers"]
def test_a_pipeline_gets_our_scheduler():
    from diffusers import DDIMScheduler

    pipeline = _pipeline(DDIMScheduler())
    expected = _images(pipeline)
    assert accelerate(pipeline, dry_run=True).swapped[0].action == "would be swapped"
    assert type(pipeline.scheduler) is DDIMScheduler
    report = accelerate(pipeline)
    assert [(s.name, s.by) for s in report.swapped] == [("scheduler", "fastcifar DDIMScheduler")]
    assert type(pipeline.scheduler).__module__.startswith("fastcifar")
    torch.testing.assert_close(_images(pipeline), expected, rtol=1e-5, atol=1e-5)
    assert accelerate(pipeline).swaps == ()
    assert restore(pipeline) == 1
    assert type(pipeline.scheduler) is DDIMScheduler
    torch.testing.assert_close(_images(pipeline), expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match="expected no inputs for a pipeline"):
        accelerate(pipeline, verify=True)


@needs["diffusers"]
def test_a_scheduler_without_counterpart_is_left():
    from diffusers import KDPM2DiscreteScheduler

    class Pipeline:
        components = {"scheduler": KDPM2DiscreteScheduler(), "tokenizer": None}  # noqa: RUF012

    assert accelerate(Pipeline()).left[0].why == "it has no counterpart"
    assert restore(Pipeline()) == 0


class GlobalFilter(nn.Module):
    """A class of a known name whose forward is its own."""

    def __init__(self, dim: int, h: int, w: int):
        super().__init__()
        self.complex_weight = nn.Parameter(torch.randn(h, w, dim, 2) * 0.02)
        self.w, self.h = w, h

    def forward(self, x, spatial_size=None):
        """Documented here."""
        b, n, c = x.shape
        grid = x.float().view(b, self.h, n // self.h, c)
        spectrum = torch.fft.rfft2(grid, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.complex_weight)
        return torch.fft.irfft2(spectrum, s=grid.shape[1:3], dim=(1, 2), norm="ortho").reshape(b, n, c)


def test_copied_classes_are_known_by_what_they_do(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(GlobalFilter(6, 4, 3), nn.LayerNorm(6))
    x = torch.randn(2, 16, 6)
    report = accelerate(model)
    assert report.left[0].why == "its forward is not that of GFNet's GlobalFilter"
    rule = _swaps._COPIED["GlobalFilter"]
    known = _swaps.Rule(rule.family, rule.peer, rule.make, (_swaps.signature(GlobalFilter.forward),))
    monkeypatch.setitem(_swaps._COPIED, "GlobalFilter", known)
    expected = model(x)
    report = accelerate(model, inputs=x, verify=True)
    assert len(report.swapped) == 1
    assert report.difference < 1e-5
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    restore(model)
    assert type(model[0]) is GlobalFilter


def test_signatures_see_what_is_done_and_nothing_else():
    def forward(self, x):
        return x + 1

    first = _swaps.signature(forward)

    def forward(self, x: Tensor) -> Tensor:
        """With a docstring."""
        # and a comment
        return x + 1

    assert _swaps.signature(forward) == first

    def forward(self, x):
        return x + 2

    assert _swaps.signature(forward) != first
    assert _swaps.signature(len) is None


def test_parametrized_modules_are_left(monkeypatch):
    known = _swaps.Rule("spectral", "GFNet", _swaps._filter, (_swaps.signature(GlobalFilter.forward),))
    monkeypatch.setitem(_swaps._COPIED, "GlobalFilter", known)
    model = nn.Sequential(GlobalFilter(6, 4, 3))
    nn.utils.parametrizations.weight_norm(model[0], "complex_weight")
    before = type(model[0])
    report = accelerate(model)
    assert len(report.left) == 1
    assert type(model[0]) is before


def test_bad_input():
    with pytest.raises(TypeError, match=r"accelerate: expected model to be a torch.nn.Module or .* pipeline, got int"):
        accelerate(3)
    with pytest.raises(TypeError, match="expected inputs to verify"):
        accelerate(nn.Identity(), verify=True)
    with pytest.raises(TypeError, match=r"restore: expected model to be a torch.nn.Module"):
        restore(None)
    assert str(fastcifar.accelerate(nn.Identity())) == "accelerate: no module of a known peer found"
