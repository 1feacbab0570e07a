"""The Triton kernels: equal to the reference (in Triton's interpreter without a GPU), and compiled ahead of time."""

import os
import subprocess
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

pytest.importorskip("triton")

from fastcifar.kernels import catalogue, layout, spiking  # noqa: E402

from fastcifar.spiking.reference import lif  # noqa: E402
from fastcifar.spiking.surrogate import BY_NAME  # noqa: E402

FLAGS = (True, False)

# Each makes an x of T steps with numbers from `randn`. Odd sizes reach the scalar kernels and partly filled programs,
# the others vector accesses; all but the last two are read in place.
LAYOUTS = {
    "odd": lambda T, randn: randn(T, 3, 43),
    "multiple_of_16": lambda T, randn: randn(T, 2, 8, 40),
    "channels_last": lambda T, randn: randn(T, 2, 3, 5, 8).movedim(-1, -3),
    "panels": lambda T, randn: randn(5, T, 112).transpose(0, 1),
    "odd_panels": lambda T, randn: randn(3, T, 43).transpose(0, 1),
    "time_last": lambda T, randn: randn(7, 19, T).movedim(-1, 0),
    "storage_offset": lambda T, randn: randn(T * 32 + 3)[3:].view(T, 32),
    "sliced": lambda T, randn: randn(T, 32, 6)[:, ::2],
    "expanded": lambda T, randn: randn(T, 16, 1).expand(T, 16, 3),
}

# Every pair of these values occurs in some row.
MATRIX = catalogue.covering(
    {
        "layout": tuple(LAYOUTS),
        "T": (1, 3, 5, 16, 33),
        "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        "surrogate": tuple(BY_NAME),
        "tau": (2.0, 2.3),
        "v_reset": (0.0, -0.1, None),
        "grad_spikes": ("dense", "expanded", "other_order"),
        **dict.fromkeys(("decay_input", "detach_reset", "give_v", "store_v_seq", "give_grad_v_last"), FLAGS),
    },
    rows=[],
)


def _state_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(x, v, options):
    names = ("tau", "decay_input", "v_threshold", "v_reset", "store_v_seq")
    return spiking.lif_forward(x, v, *(options[name] for name in names))


def _backward(grads, x, v, options):
    names = ("tau", "decay_input", "v_threshold", "v_reset")
    surrogate = BY_NAME[options["surrogate"]]
    scalars = [*(options[name] for name in names), surrogate.kernel_id, surrogate.alpha, options["detach_reset"]]
    return spiking.lif_backward(*grads, x, v, *scalars)


def _reference_gradients(grads, x, v, options, dtype):
    """Gradients of x and v by autograd of the reference in ``dtype``, and the spikes that they belong to."""
    x, v = (None if t is None else t.cpu().to(dtype).requires_grad_() for t in (x, v))
    outputs = lif(x, v, **{**options, "store_v_seq": True})
    used = [(out, grad.cpu().to(dtype)) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    inputs = [x] if v is None else [x, v]
    return torch.autograd.grad([out for out, _ in used], inputs, [grad for _, grad in used]), outputs[0].detach()


def _assert_as_accurate(ours, eager, truth, dtype):
    """float64: equal but for the order of operations. float32: at most twice the error of eager PyTorch, and an ulp."""
    scale = truth.abs().max().item()
    error = (ours.double() - truth).abs().max().item()
    bound = 1e-12 * scale
    if dtype != torch.float64:
        bound = 2 * (eager.double() - truth).abs().max().item() + torch.finfo(torch.float32).eps * scale
    if dtype in (torch.bfloat16, torch.float16):
        bound += torch.finfo(dtype).eps * scale  # one rounding; the interpreter truncates where a GPU rounds
    assert error <= bound


def _name(row):
    return "-".join(str(value).removeprefix("torch.") for value in row.values())


@pytest.mark.parametrize("row", MATRIX, ids=_name)
def test_lif_equals_reference(row):
    torch.manual_seed(0)
    dtype, state = row["dtype"], _state_dtype(row["dtype"])
    options = {k: row[k] for k in ("tau", "v_reset", "surrogate", "decay_input", "detach_reset", "store_v_seq")}
    options["v_threshold"] = 0.7  # not a float32 number

    def randn(*shape, dtype=dtype):
        return torch.randn(shape).mul(2).to(DEVICE, dtype)

    x = LAYOUTS[row["layout"]](row["T"], randn)
    v = randn(*x.shape[1:], dtype=state) if row["give_v"] else None
    assert (layout.dense(x)[0] is x) == (row["layout"] not in ("sliced", "expanded"))

    spikes, v_last, v_seq = _forward(x, v, options)
    expected = lif(x.cpu(), None if v is None else v.cpu(), **{**options, "store_v_seq": True})
    assert (spikes.dtype, spikes.stride()) == (dtype, torch.empty_like(x).stride())
    assert (v_last.dtype, v_last.stride()) == (state, torch.empty_like(x[0]).stride())
    assert torch.equal(spikes.cpu(), expected[0])
    assert torch.equal(v_last.cpu(), expected[1])
    assert torch.equal(v_seq.cpu(), expected[2]) if row["store_v_seq"] else v_seq.shape == (0,)
    assert 0 < spikes.float().mean() < 1

    grad_spikes = {
        "dense": lambda: torch.empty_like(x).copy_(randn(*x.shape)),
        "expanded": lambda: randn(1).expand(x.shape),
        "other_order": lambda: randn(*x.shape[::-1]).permute(*range(x.dim())[::-1]),
    }[row["grad_spikes"]]()
    grad_v_last = randn(*x.shape[1:], dtype=state) if row["give_grad_v_last"] else None
    grad_v_seq = randn(*x.shape, dtype=state) if row["store_v_seq"] else None
    grads = (grad_spikes, grad_v_last, grad_v_seq)
    ours = _backward(grads, x, v, options)
    eager, _ = _reference_gradients(grads, x, v, options, state)
    truth, true_spikes = _reference_gradients(grads, x, v, options, torch.float64)
    same = (true_spikes == expected[0].double()).all(0)  # rounding may decide a spike, and then all else differs
    assert same.double().mean() > 0.95
    assert (ours[0].dtype, ours[0].stride()) == (dtype, spikes.stride())
    _assert_as_accurate(*(t[:, same] for t in (ours[0].cpu(), eager[0], truth[0])), dtype)
    if v is None:
        assert ours[1].shape == (0,)
    else:
        assert (ours[1].dtype, ours[1].stride()) == (state, v_last.stride())
        _assert_as_accurate(*(t[same] for t in (ours[1].cpu(), eager[1], truth[1])), state)


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0), (4, 3, 0), (0, 0)])
@pytest.mark.parametrize("give_v", FLAGS)
def test_lif_without_steps_or_neurons(shape, give_v):
    x = torch.randn(shape, device=DEVICE)
    v = torch.randn(shape[1:], device=DEVICE) if give_v else None
    options = {"tau": 2.0, "decay_input": True, "v_threshold": 1.0, "v_reset": 0.25, "store_v_seq": True}
    spikes, v_last, v_seq = _forward(x, v, options)
    assert spikes.shape == v_seq.shape == shape
    assert torch.equal(v_last, v if give_v else torch.full(shape[1:], 0.25, device=DEVICE))
    assert v_last is not v

    options |= {"surrogate": "atan", "detach_reset": False}
    grad_v_last = torch.randn(shape[1:], device=DEVICE)
    for given, expected in ((grad_v_last, grad_v_last), (None, torch.zeros_like(grad_v_last))):
        grad_x, grad_v = _backward((x, given, None), x, v, options)
        assert grad_x.shape == shape
        assert torch.equal(grad_v, expected) if give_v else grad_v.shape == (0,)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes in numpy
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("tau", [2.0, 3.0, 98.0, 1.1])
def test_lif_extreme_inputs(v_reset, tau):
    """Infinity, NaN, the largest numbers and subnormal ones, whose quotients can lie half-way between two numbers."""
    tiny = torch.arange(1, 400) * 49 * 2.0**-149  # a 98th of it: multiples of half the smallest number
    special = [float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0, 1.0]
    x = torch.cat([tiny, -tiny, torch.tensor(special)]).repeat(3, 1)
    options = {"tau": tau, "decay_input": True, "v_threshold": 1.0, "v_reset": v_reset, "store_v_seq": True}
    for ours, expected in zip(_forward(x.to(DEVICE), None, options), lif(x, **options), strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", BY_NAME)
def test_lif_surrogates_far_from_threshold(name):
    x = torch.tensor([[-1e30, -300.0, -25.0, 25.0, 300.0, 1e30]])
    options = {"tau": 2.0, "decay_input": False, "v_threshold": 1.0, "v_reset": None, "surrogate": name}
    grads = (torch.ones_like(x, device=DEVICE), None, None)
    grad = _backward(grads, x.to(DEVICE), None, {**options, "detach_reset": True})[0].cpu()
    assert grad.isfinite().all()
    torch.testing.assert_close(grad, BY_NAME[name].grad(x - 1.0), rtol=1e-4, atol=1e-37)


def test_catalogue_compiles_without_spills():
    """Every kernel for sm_80, sm_90 and sm_100, which takes no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastcifar.kernels.catalogue", "--jobs", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for arch in catalogue.ARCHS:
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"sm_{arch} ")]
        assert len(lines) > 30
        assert all(" 0 spilled" in line for line in lines)


def test_covering_meets_every_pair():
    factors, always = {"a": (1, 2, 3), "b": "xy", "c": FLAGS}, {"a": 3, "b": "y", "c": True}
    rows = catalogue.covering(factors, [always])
    assert rows[0] == always
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        assert {(r[one], r[other]) for r in rows} == {(p, q) for p in factors[one] for q in factors[other]}


def test_importing_the_package_does_not_import_triton():
    script = "import sys, fastcifar.kernels, fastcifar.kernels.catalogue; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
