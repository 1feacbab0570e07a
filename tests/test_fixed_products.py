"""Products of integers: int64 is the truth, operands of one sign and of the greatest magnitude are the hard case."""

import pytest
import torch

from fastcifar import _library
from fastcifar.fixedpoint.products import integer_conv2d, integer_matmul

needs_kernel = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")


def operands(shapes, largest, kind, seed=0):
    """int16 tensors: ``same`` sign at the limit, ``lowest`` (all -largest), ``alternating`` or ``random``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape, limit in zip(shapes, largest, strict=True):
        if kind == "same":
            t = torch.full(shape, limit)
        elif kind == "lowest":
            t = torch.full(shape, -limit)
        elif kind == "alternating":
            t = (torch.arange(int(torch.Size(shape).numel())).view(shape) % 2 * 2 - 1) * limit
        else:
            t = torch.randint(-limit, limit + 1, shape, generator=generator)
        tensors.append(t.clamp(-32768, 32767).to(torch.int16))
    return tensors


KINDS = ("same", "lowest", "alternating", "random")
LIMITS = ((127, 127), (128, 255), (2047, 2048), (32767, 32767), (32768, 32767), (32768, 32768), (1, 1))


@needs_kernel
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 2, 33), (13, 7, 5), (12, 64, 32), (25, 1025, 49), (3, 4609, 17)], ids=str
)
def test_matrix_product_is_exact_whatever_the_operands(shape, limits, each_isa):
    rows, depth, columns = shape
    cases = [operands(((rows, depth), (columns, depth)), limits, kind) for kind in KINDS]
    expected = [a.long() @ b.long().T for a, b in cases]

    def check(isa):
        for (a, b), truth in zip(cases, expected, strict=True):
            assert torch.equal(integer_matmul(a, b, *limits).long(), truth), isa

    each_isa(check)


GEOMETRIES = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": (2, 1)},
    {"stride": (1, 3), "padding": (0, 2), "dilation": (1, 2)},
]


@needs_kernel
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channels", [(3, 16, 1), (8, 40, 2), (18, 18, 18), (6, 12, 6), (5, 7, 1)], ids=str)
def test_convolution_is_exact_in_every_geometry(channels, geometry, each_isa):
    inputs, outputs, groups = channels
    cases = []
    for limits in ((127, 128), (32768, 32768)):
        for kind in KINDS:
            x, w = operands(((2, inputs, 7, 9), (outputs, inputs // groups, 3, 3)), limits, kind)
            truth = torch.nn.functional.conv2d(x.long(), w.long(), None, groups=groups, **geometry)
            cases.append((x, w, limits, truth))

    def check(isa):
        for x, w, limits, truth in cases:
            for layout in (torch.contiguous_format, torch.channels_last):
                out = integer_conv2d(x.contiguous(memory_format=layout), w, *limits, groups=groups, **geometry)
                assert torch.equal(out.long(), truth), isa

    each_isa(check)


@needs_kernel
def test_one_by_one_convolution_and_empty_batch(each_isa):
    x, w = operands(((3, 10, 5, 5), (17, 10, 1, 1)), (128, 127), "random")
    truth = torch.nn.functional.conv2d(x.long(), w.long())

    def check(_):
        assert torch.equal(integer_conv2d(x, w, 128, 127).long(), truth)
        assert integer_conv2d(x[:0], w, 128, 127).shape == (0, 17, 5, 5)

    each_isa(check)


@needs_kernel
def test_same_bits_for_any_thread_count(threads, each_isa):
    x, w = operands(((4, 32, 16, 16), (48, 32, 3, 3)), (32768, 32768), "random")
    seen = []

    def check(_):
        for count in (1, 2, 3):
            threads(count)
            seen.append(integer_conv2d(x, w, 32768, 32768, padding=1))

    each_isa(check)
    truth = torch.nn.functional.conv2d(x.long(), w.long(), padding=1)
    assert all(torch.equal(s, truth) for s in seen)


@needs_kernel
def test_narrow_sums_come_as_int32_and_are_refused_where_they_might_not_fit():
    a, b = operands(((2, 64), (3, 64)), (127, 127), "same")
    assert integer_matmul(a, b, 127, 127).dtype == torch.int32
    assert integer_matmul(a, b, 32767, 32767).dtype == torch.int64
    x, w = (t.view(-1, 1, 1, 64) * 200 for t in (a, b))
    with pytest.raises(RuntimeError, match="expected sums that fit int32"):
        torch.ops.fastcifar.integer_conv.default(x, w, [1, 1], [0, 0], [1, 1], 1, False)


@needs_kernel
@pytest.mark.parametrize("in_dims", [(0, None), (2, None), (None, 1), (1, 0)], ids=str)
def test_vmap_over_images_weights_and_both_equals_a_loop(in_dims):
    given = operands(((4, 2, 6, 5, 4), (4, 9, 2, 3, 3)), (128, 128), "random")
    mapped = [t[0] if d is None else t.movedim(0, d) for t, d in zip(given, in_dims, strict=True)]

    def convolution(x, w):
        return integer_conv2d(x, w, 128, 128, padding=1, groups=3)

    out = torch.func.vmap(convolution, in_dims=in_dims)(*mapped)
    for i in range(4):
        x, w = (t[0] if d is None else t[i] for t, d in zip(given, in_dims, strict=True))
        assert torch.equal(out[i], convolution(x, w))


@needs_kernel
def test_opcheck():
    x, w = operands(((2, 5, 6, 4), (6, 3, 3, 2)), (128, 128), "random")
    for wide in (False, True):
        torch.library.opcheck(torch.ops.fastcifar.integer_conv.default, (x, w, [1, 2], [1, 0], [1, 1], 2, wide))


@pytest.mark.parametrize("bits", [(16, 16), (20, 20), (31, 16), (16, 31), (27, 31), (31, 27), (40, 16)], ids=str)
def test_without_the_kernel_wider_integers_are_exact_too(bits, monkeypatch):
    monkeypatch.setattr(_library, "OWNERS", {})
    limits = [1 << (b - 1) for b in bits]
    generator = torch.Generator().manual_seed(0)
    for fill in (False, True):
        x, w = (
            torch.full(shape, -limit) if fill else torch.randint(-limit, limit, shape, generator=generator)
            for shape, limit in zip(((2, 4, 5, 5), (3, 4, 3, 3)), limits, strict=True)
        )
        truth = torch.nn.functional.conv2d(x, w, padding=1)
        assert torch.equal(integer_conv2d(x, w, *limits, padding=1), truth)
        a, b = x.flatten(1)[:, :31], w.flatten(1)[:, :31]
        assert torch.equal(integer_matmul(a, b, *limits), a @ b.T)


def test_sums_beyond_64_bits_are_refused():
    a = torch.ones(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="integer_matmul: expected sums that fit 64 bits"):
        integer_matmul(a, a, 1 << 31, 1 << 31)
