"""A short run of tests/fuzz.py, whether it would see what it looks for, and what longer runs have found."""

import math
import random
import resource
import sys
from pathlib import Path

import pytest
import torch

from fastcifar import _library

sys.path.insert(0, str(Path(__file__).parent))  # its parts import each other, as they do when it is a program

import fuzz
import fuzz_calls
import fuzz_checks
import fuzz_public
import fuzz_specs

from fastcifar.diffusion import reference as diffusion_reference
from fastcifar.diffusion.spec import program

pytestmark = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")
ops = torch.ops.fastcifar


@pytest.fixture(autouse=True)
def one_thread_and_no_more_memory_than_fits(threads):
    threads(1)
    limit = fuzz.limit_memory()
    yield
    resource.setrlimit(resource.RLIMIT_AS, limit)
    fuzz_checks.perturb_fresh_memory(0)


@pytest.mark.parametrize("name", fuzz_calls.schemas())
def test_hostile_calls_are_answered_rightly_or_refused(name):
    calls = fuzz.OpCalls(name, seed=0)
    assert sum(calls(i) for i in range(120)) > 5


@pytest.mark.parametrize("name", fuzz_specs.SPECS)
def test_random_valid_calls_equal_the_reference(name):
    one = fuzz.caller(f"spec/{name}", seed=0)
    assert all(one(i) for i in range(8))


@pytest.mark.parametrize("name", [n for n in fuzz_public.names() if n != "diffusion.search_schedule"])  # seconds a call
def test_public_names_raise_what_is_documented(name):
    one = fuzz.caller(f"public/{name}", seed=0)
    for i in range(12):
        one(i)


def test_no_schema_is_missing():
    assert set(fuzz_calls.schemas()) == {n.partition("::")[2] for n in _ops_of_the_extension()}
    assert all(fuzz_calls.valid_calls(name) for name in fuzz_calls.schemas())


def _ops_of_the_extension():
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastcifar::")]


# ---- it would see --------------------------------------------------------------------------------------------------


class Planted(fuzz_checks.Op):
    """An op that does what ``body`` says with two tensors: the first may be written to."""

    def __init__(self, body):
        self.name, self.function, self.writes = "planted", body, (True, False)


def _body_right(out, x):
    out.copy_(x)
    return x + 1


def _body_reads_beyond(out, x):
    return x.as_strided((x.numel() + 1,), (1,)).sum()  # the canary, which is not there in a copy


def _body_writes_beside(out, x):
    out.as_strided((out.numel() + 1,), (1,))[-1] = 3.0
    return x + 1


def _body_writes_what_it_reads(out, x):
    x[0] = 5.0
    return x + 1


def _body_depends_on_strides(out, x):
    return x + float(x.stride(0))


def _body_depends_on_threads(out, x):
    return x + torch.get_num_threads()


def _body_leaves_a_part_unwritten(out, x):
    return torch.empty(64).clone() if x[0] == 0 else torch.empty(64)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (_body_writes_beside, "a byte beside an argument"),
        (_body_writes_what_it_reads, "only read has changed"),
        (_body_depends_on_strides, "contiguous copies of its arguments, result 0"),
        (_body_depends_on_threads, "threads, result 0|instruction set"),
        (_body_reads_beyond, "contiguous copies"),
        (_body_leaves_a_part_unwritten, "result 0 has other bits"),
    ],
)
def test_a_planted_fault_is_seen(body, says):
    arguments = [torch.zeros(6), torch.arange(12.0)[1::2]]

    def calls():
        for i in range(12):
            Planted(body).checked(arguments, random.Random(i))

    with pytest.raises(AssertionError, match=says):
        calls()


def test_what_is_right_passes():
    for i in range(12):
        Planted(_body_right).checked([torch.zeros(6), torch.arange(12.0)[1::2]], random.Random(i))


def test_a_wrong_answer_is_seen():
    x = torch.arange(4.0)
    assert fuzz_checks.differs([x], [x.clone()], 0.0) is None
    assert "not equal" in fuzz_checks.differs([x], [x + 1e-6], 0.0)
    assert fuzz_checks.differs([x], [x + 1e-6], 1e-5) is None
    assert "off" in fuzz_checks.differs([x], [x + 1e-3], 1e-5)
    assert "infinities" in fuzz_checks.differs([x / 0], [x], 1e-5)


# ---- what it found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["converted", "corrected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_row_without_terms_is_zero_to_those_that_use_it(row, dtype, each_isa):
    """A pointer that was never set was read."""
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.tensor(program(predict={"x": 0.5, row: 0.7}), dtype=torch.float64)
    expected = diffusion_reference.solver_step(x, x, [], rows).x_next

    def check(_):
        numbers = rows.flatten().tolist()
        found, *_ = ops.solver_step(x, x, None, [], None, None, None, numbers, 1.0, math.inf, 0, 1)
        assert torch.equal(found, expected)

    each_isa(check)


def test_a_second_state_that_a_neuron_does_not_keep_is_refused():
    """Its gradient came back as memory that nothing had written."""
    x = torch.zeros(2, 3)
    given = (x, None, None, None, x, x[0], x[0], *[None] * 5, 1, [2.0, 1.0, 0.0], 0.0, 0, [2.0, 0.0, 0.0], False, 0)
    with pytest.raises(RuntimeError, match="neuron_backward: expected no w, as this neuron keeps one state"):
        ops.neuron_backward(*given)
    with pytest.raises(RuntimeError, match="neuron_forward: expected no w"):
        ops.neuron_forward(x, x[0], x[0], *[None] * 5, 1, [2.0, 1.0, 0.0], 0.0, 0, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": [2**62, 4]},  # a division by zero
        {"kernel": [2**32, 2**32]},
        {"padding": [2**62, 0]},
        {"padding": [2**63 - 1, 0]},  # 2 * padding wraps to -2
        {"dilation": [2**62, 1]},
        {"stride": [2**40, 1]},
        {"height": 2**62, "width": 4},
    ],
)
def test_a_window_whose_products_overflow_is_refused(changes):
    geometry = {"height": 5, "width": 5, "kernel": [5, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    given = list((geometry | changes).values())
    bits, weight = torch.zeros(1, 25, dtype=torch.uint8), torch.zeros(40, 16)
    ops.packed_conv(bits, weight, None, *geometry.values())
    with pytest.raises(RuntimeError, match=r"packed_conv: expected pairs of positive sizes, below 2\^24"):
        ops.packed_conv(bits, weight, None, *given)
    if {"padding", "dilation", "stride"} & set(changes):
        x, w = torch.ones(1, 5, 5, 2, dtype=torch.int16), torch.ones(3, 5, 1, 2, dtype=torch.int16)
        with pytest.raises(RuntimeError, match=r"integer_conv: expected pairs of positive sizes, below 2\^24"):
            ops.integer_conv(x, w, *given[3:], 1, False)


def _chain(circle):
    """Three nodes below each other, the last one's child the first where they are a circle."""
    vectors = {"start": [0, 1, 2], "count": [1, 1, int(circle)], "pool": [1, 2, 0]}
    return [torch.zeros(3, dtype=torch.float64), *(torch.tensor(v) for v in vectors.values())]


@pytest.mark.parametrize("levels", [5, 2**62])
def test_descents_end_in_a_circle_and_with_any_number_of_levels(levels):
    """They went round, or were divided among threads by a number that had wrapped to zero."""
    ones, roots = torch.ones(3, dtype=torch.int64), torch.tensor([0])

    def ends(circle):
        value, *lists = _chain(circle)
        taken = torch.full((3,), 99)
        return ops.tree_select(value, ones.clone(), taken, *lists, ones, roots, None, 2, levels, 1, 0.5, 1.0)

    assert ends(False).tolist() == [[2, 2]]
    with pytest.raises(RuntimeError, match="tree_select: expected a tree"):
        ends(True)
    value, *lists = _chain(False)
    none, uniform = roots[:0], torch.zeros(0, levels, dtype=torch.float64)
    assert ops.tree_sample(value, *lists, none, uniform, 0.5).tolist() == []
    depth = torch.arange(3)
    ops.tree_backup(value, depth - 1, depth, *lists, torch.zeros(0, levels, dtype=torch.int64), 0.5)


def test_slots_of_the_ring_are_whole_numbers():
    table = torch.zeros(1, 36, dtype=torch.float64)
    table[0, 33], table[0, 35] = 0.5, math.inf
    with pytest.raises(RuntimeError, match=r"solver_table_step: expected slots of the ring to store to, got 0\.5"):
        ops.solver_table_step(torch.zeros(2, 4), None, table, 0)


@pytest.mark.parametrize("isa", [3, 2**32, 2**62])
def test_an_instruction_set_beyond_those_there_are_is_refused(isa):
    before = ops._cpu_isa(-1)
    assert (ops._cpu_isa(isa), ops._cpu_isa(-1)) == (-1, before)


def test_the_quantile_of_more_numbers_than_float32_counts_stays_in_the_row():
    """The last rank of 2^24 + 4 numbers was rounded to one beyond."""
    x = torch.zeros(1, 2**24 + 4)
    x[0, -1] = 3.0
    assert ops.magnitude_quantile(x, 1.0).item() == 3.0
    assert ops.magnitude_quantile(x, 0.5).item() == 0.0
