"""Rows of trees of tensors: taken, put back, and their gradients."""

import pytest
import torch
from torch.utils import _pytree as pytree

from fastcifar.earlyexit import compact, exit_decide, scatter_results

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _images(format=torch.contiguous_format):
    return torch.arange(2.0 * 3 * 4 * 5 * 5).view(10, 3, 4, 5).contiguous(memory_format=format)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_compact_takes_rows_of_every_dtype(dtype, index_dtype):
    x = _images().to(dtype)
    index = torch.tensor([0, 3, 4, 9], dtype=index_dtype)
    assert torch.equal(compact(x, index), x[index.long()])


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "last", "sliced", "expanded", "batch_inside"])
def test_compact_keeps_the_order_of_dimensions(layout):
    x = _images()
    x = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "last": x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
        "sliced": x[:, :, ::2],
        "expanded": x[:, :1].expand_as(x),
        "batch_inside": x.transpose(0, 1).contiguous().transpose(0, 1),
    }[layout]
    index = torch.tensor([1, 2, 7])
    out = compact(x, index)
    assert torch.equal(out, x[index])
    if layout == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)
    if layout in ("channels_last", "transposed", "last"):
        assert out.stride()[1:] == x.stride()[1:]


def test_compact_takes_trees_and_passes_on_what_is_no_tensor():
    tree = {"v": torch.arange(12.0).view(4, 3), "skips": [(_images()[:4], None), torch.arange(4)], "steps": 3}
    out = compact(tree, torch.tensor([1, 3]))
    assert out["steps"] == 3
    assert out["skips"][0][1] is None
    assert pytree.tree_structure(out) == pytree.tree_structure(tree)
    assert torch.equal(out["v"], tree["v"][[1, 3]])
    assert torch.equal(out["skips"][0][0], tree["skips"][0][0][[1, 3]])
    assert out["skips"][1].tolist() == [1, 3]
    assert compact([None], torch.tensor([0])) == [None]


def test_compact_and_scatter_of_no_rows_and_of_all():
    x = _images(torch.channels_last)
    none = torch.zeros(0, dtype=torch.int64)
    assert compact(x, none).shape == (0, 3, 4, 5)
    assert torch.equal(compact(x, torch.arange(10)), x)
    assert torch.equal(scatter_results(x.clone(), none, x[:0]), x)


def test_compact_in_a_trace_and_under_vmap():
    x, index = torch.randn(3, 8, 4), torch.tensor([1, 5])
    compiled = torch.compile(lambda t: compact({"a": t}, index)["a"], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x[0]), x[0][index])
    assert torch.equal(torch.func.vmap(lambda t: compact(t, index))(x), x[:, index])


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_compact_scatters_into_zeros(format):
    x = _images(format).requires_grad_()
    index = torch.tensor([2, 5, 6])
    out = compact(x, index)
    weight = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    expected = torch.zeros_like(x)
    expected[index] = weight
    assert torch.equal(grad, expected)
    double = x.double()
    assert torch.autograd.gradcheck(lambda t: compact(t, index).square(), double.detach().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda t: compact(t, index).square(), double.detach().requires_grad_())


def test_gradient_of_scatter_results():
    out, rows = torch.randn(6, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    index = torch.tensor([4, 1])
    inputs = (out.requires_grad_(), rows.requires_grad_())
    assert torch.autograd.gradcheck(lambda o, r: scatter_results(o, index, r, inplace=False).square(), inputs)
    # In place the same, on a tensor that is no leaf.
    grads = [
        torch.autograd.grad(scatter_results(out * 1, index, rows, inplace=inplace).sin().sum(), inputs)
        for inplace in (True, False)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert (grads[0][0][index] == 0).all()


def test_scatter_undoes_compact():
    x = {"a": _images(torch.channels_last), "b": [torch.arange(10), None]}
    decision = exit_decide(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), 0.4)
    assert 0 < decision.n_keep < 10
    out = pytree.tree_map(lambda t: torch.zeros_like(t) if isinstance(t, torch.Tensor) else t, x)
    for index in (decision.exit_index, decision.keep_index):
        same = scatter_results(out, index, compact(x, index))
        assert same["a"] is out["a"]
    assert torch.equal(out["a"], x["a"])
    assert torch.equal(out["b"][0], x["b"][0])
    untouched = torch.zeros(10)
    copy = scatter_results(untouched, decision.exit_index, torch.ones(len(decision.exit_index)), inplace=False)
    assert untouched.sum() == 0
    assert copy.sum() == len(decision.exit_index)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: compact(torch.zeros(3), [0]), TypeError, "keep_index to be a tensor in int64 or int32, got list"),
        (lambda: compact(torch.zeros(3), torch.tensor([True])), TypeError, "got torch.bool"),
        (lambda: compact(torch.zeros(3), torch.zeros(1, 1).long()), ValueError, r"one dimension, got \(1, 1\)"),
        (lambda: compact(torch.zeros(()), torch.tensor([0])), ValueError, r"got \(\)"),
        (lambda: compact([torch.zeros(3), torch.zeros(4)], torch.tensor([0])), ValueError, r"\[3, ...\], got \(4,\)"),
        (lambda: scatter_results(torch.zeros(3), [0], torch.zeros(1)), TypeError, "index to be a tensor"),
        (lambda: scatter_results(torch.zeros(3), torch.tensor([0]), torch.zeros(1).half()), TypeError, "float16"),
        (lambda: scatter_results(torch.zeros(3), torch.tensor([0]), torch.zeros(2)), ValueError, r"\[1, ...\]"),
        (lambda: scatter_results([torch.zeros(3)], torch.tensor([0]), torch.zeros(1)), ValueError, "the form of out"),
    ],
)
def test_rows_refuse_in_a_sentence(call, error, says):
    with pytest.raises(error, match=says) as caught:
        call()
    assert str(caught.value).startswith(("compact: expected", "scatter_results: expected"))


def test_rows_that_are_not_there_are_refused():
    for index in (torch.tensor([3]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            compact(torch.zeros(3, 2), index)
        with pytest.raises(IndexError):
            compact(torch.zeros(3, 2, requires_grad=True), index)
        with pytest.raises(IndexError):
            scatter_results(torch.zeros(3, 2), index, torch.zeros(1, 2))


def test_thresholds_that_are_strided_are_read_as_they_are(each_isa):
    """Found by the mutation drill."""
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    thresholds = torch.stack([torch.linspace(0.2, 0.9, 9), torch.full((9,), 2.0)], 1)[:, 0]
    assert thresholds.stride() == (2,)
    expected = exit_decide(logits, thresholds.clone(memory_format=torch.contiguous_format))

    def check(_):
        for ours, theirs in zip(exit_decide(logits, thresholds), expected, strict=True):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))

    each_isa(check)
    assert 0 < expected.n_keep < 9
