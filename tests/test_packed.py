"""Convolutions and linear layers that read spikes as bits."""

import pytest
import torch
import torch.nn.functional as F

from fastcifar import _library
from fastcifar.spiking import pack, packed_conv2d, packed_linear
from fastcifar.spiking.packed import DENSEST

needs_extension = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")


def _spikes(*shape, share=0.05, seed=0):
    """``[T, B, C, H, W]`` in channels-last memory."""
    t, b, c, h, w = shape
    fires = torch.rand(t, b, h, w, c, generator=torch.Generator().manual_seed(seed)) < share
    return fires.float().movedim(-1, 2)


def _expected(spikes, weight, bias, **geometry):
    wide = spikes.flatten(0, 1).double()
    out = F.conv2d(wide, weight.double(), None if bias is None else bias.double(), **geometry)
    return out.unflatten(0, spikes.shape[:2])


def _close(ours, expected, weight):
    assert ours.dtype == torch.float32
    assert ours.shape == expected.shape
    terms = weight[0].numel()
    assert (ours - expected).abs().max() <= terms * torch.finfo(torch.float32).eps * weight.abs().max()


@pytest.mark.parametrize("channels", [8, 64, 72, 136])
@pytest.mark.parametrize("outputs", [1, 16, 37, 80])
@pytest.mark.parametrize("with_bias", [False, True])
def test_conv_equals_torchs(channels, outputs, with_bias, each_isa):
    generator = torch.Generator().manual_seed(1)
    spikes = _spikes(2, 3, channels, 7, 5)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator)
    bias = torch.randn(outputs, generator=generator) if with_bias else None
    packed = pack(spikes)
    for geometry in (
        {"padding": 1},
        {"stride": 2},
        {"padding": (2, 0), "dilation": (1, 2)},
        {"stride": (1, 3), "padding": 3},
    ):
        expected = _expected(spikes, weight, bias, **geometry)
        each_isa(lambda _, g=geometry, e=expected: _close(packed_conv2d(packed, weight, bias, **g), e, weight))


def test_kernels_of_other_sizes(each_isa):
    spikes = _spikes(1, 2, 16, 6, 9)
    for size in ((1, 1), (1, 4), (5, 2), (6, 9)):
        weight = torch.randn(5, 16, *size, generator=torch.Generator().manual_seed(2))
        expected = _expected(spikes, weight, None, padding=1)
        each_isa(lambda _, w=weight, e=expected: _close(packed_conv2d(pack(spikes), w, padding=1), e, w))


def test_dense_spikes_and_other_layouts_give_the_same():
    weight = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(3))
    for spikes in (_spikes(2, 2, 8, 5, 5, share=2 * DENSEST), _spikes(2, 2, 8, 5, 5).contiguous()):
        _close(packed_conv2d(pack(spikes), weight), _expected(spikes, weight, None), weight)


def test_linear_equals_torchs(each_isa):
    spikes = (torch.rand(3, 4, 72, generator=torch.Generator().manual_seed(4)) < 0.05).float()
    weight = torch.randn(10, 72, generator=torch.Generator().manual_seed(5))
    bias = torch.randn(10, generator=torch.Generator().manual_seed(6))
    expected = F.linear(spikes.double(), weight.double(), bias.double())
    each_isa(lambda _: _close(packed_linear(pack(spikes), weight, bias), expected, weight))


@needs_extension
def test_sparse_spikes_are_read_as_bits():
    weight = torch.randn(16, 8, 3, 3)
    with torch.profiler.profile() as profile:
        packed_conv2d(pack(_spikes(1, 1, 8, 5, 5)), weight)
    assert any("packed_conv" in event.key for event in profile.key_averages())


def test_what_does_not_fit_is_refused():
    packed = pack(_spikes(1, 1, 8, 5, 5))
    with pytest.raises(TypeError, match="packed_conv2d: expected spikes to be a PackedSpikes, got Tensor"):
        packed_conv2d(torch.zeros(1, 1, 8, 5, 5), torch.zeros(4, 8, 3, 3))
    with pytest.raises(ValueError, match="packed_conv2d: expected weight of 4 dimensions, the second being 8"):
        packed_conv2d(packed, torch.zeros(4, 9, 3, 3))
    with pytest.raises(ValueError, match="packed_linear: expected spikes of 3 dimensions, time first"):
        packed_linear(packed, torch.zeros(4, 8))
