"""Forks, workers and threads: kernels work after a fork of a process that has used torch's threads, in workers of a
DataLoader, and under many Python threads at once; and give the same bits however the work is shared."""

import multiprocessing
import os
import threading
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastcifar import _library
from fastcifar.diffusion import DiscreteVP, SolverRun, TreeSampler, ddpm
from fastcifar.earlyexit.functional import exit_decide
from fastcifar.fixedpoint.functional import quantize, quantize_trainable
from fastcifar.fixedpoint.products import integer_conv2d
from fastcifar.spec import identical
from fastcifar.spectral.functional import spectral_gate
from fastcifar.spiking.functional import lif
from fastcifar.spiking.packed import packed_conv2d

needs_kernel = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def answers(seed=0, batch=16):
    """What an op of each family says of some numbers, large enough for several threads."""
    x = randn(8, batch, 24, 16, 16, seed=seed)
    gate = randn(16, 9, 24, 2, seed=seed + 1)
    tokens = randn(batch, 16, 16, 24, seed=seed + 2)
    pixels, weight = (randn(*shape, seed=seed).mul(30).short() for shape in ((batch, 24, 16, 16), (32, 24, 3, 3)))
    spikes, v, *_ = lif(x, tau=2.0)
    logits = randn(64 * batch, 100, seed=seed)
    return [
        spikes,
        v,
        spectral_gate(tokens, gate),
        quantize(x[0], 8, 3),
        integer_conv2d(pixels, weight, 200, 200),
        *exit_decide(logits, threshold=0.5)[:3],
    ]


def gradients(seed=0):
    """Of sums over many elements, whose order threads must not change."""
    x = randn(8, 8, 16, 16, 16, seed=seed).requires_grad_()
    tau = torch.full((16, 1, 1), 2.0, requires_grad=True)
    scale = torch.ones(16, 1, 1, requires_grad=True)
    weight = randn(16, 9, 16, 2, seed=seed).requires_grad_()
    bits = torch.full((16, 1, 1), 4.0, requires_grad=True)
    spikes = lif(x, tau=tau, scale=scale)[0]
    mixed = spectral_gate(spikes[0].movedim(1, -1).contiguous(), weight)
    loss = (mixed * randn(*mixed.shape, seed=3)).sum() + (quantize_trainable(x[0], bits, 8) * x[1]).sum()
    return list(torch.autograd.grad(loss, (x, tau, scale, weight, bits)))


def solver():
    """The end of a run with noise, and of a search in a tree."""
    x = randn(64, 3, 32, 32)
    run = SolverRun(ddpm(DiscreteVP.linear().points(6)), x, seed=3)
    for _ in range(len(run.table)):
        run.step(run.x.clone())
    tree = TreeSampler(
        lambda x, t, g: 0.9 * x + torch.randn(x.shape, generator=g), lambda x: x.sum(1), (3,), 6, trees=64, descents=4,
        generator=torch.Generator().manual_seed(1),
    ).run(8)  # fmt: skip
    return [run.x, tree._forest.value, tree.sample(2000).x]


def packed():
    spikes, *_ = lif(3 * randn(4, 4, 32, 16, 16) - 3, tau=2.0, spike_format="packed")
    return [packed_conv2d(spikes, randn(32, 32, 3, 3, seed=1), padding=1)]


def same(a, b):
    return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))


def in_child(check):
    """Runs ``check`` in a fork of this process; what it raises is raised here."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            check()
            code = 0
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, said or f"the child ended with status {status}"


@needs_kernel
@pytest.mark.parametrize("count", [1, 2])
def test_a_fork_with_one_thread_gives_the_same_bits(threads, count):
    threads(count)
    expected = answers()  # which has started the threads

    def check():
        torch.set_num_threads(1)  # libgomp's threads do not survive a fork
        assert same(answers(), expected)

    in_child(check)
    assert same(answers(), expected)


class Samples(Dataset):
    """Each sample is what the kernels say of it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.cat([t.double().flatten()[:500] for t in answers(seed=index, batch=4)])


@needs_kernel
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_of_a_data_loader_call_the_kernels(threads, how, monkeypatch):
    threads(2)
    expected = torch.stack([Samples()[i] for i in range(4)])
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)  # a spawned worker imports this file by its name
    context = multiprocessing.get_context(how)
    found = list(DataLoader(Samples(), batch_size=2, num_workers=2, multiprocessing_context=context))
    assert torch.equal(torch.cat(found), expected)


@needs_kernel
def test_python_threads_at_once_do_not_disturb_each_other(threads):
    """Each with settings of its own: inference mode, no gradient, gradients."""
    threads(2)
    expected, wanted = [answers(seed) for seed in range(3)], gradients()
    problems, begin = [], threading.Barrier(4)

    def work(seed, mode):
        try:
            begin.wait()
            for _ in range(3):
                with mode():
                    assert same(answers(seed), expected[seed]), f"seed {seed} differs"
        except BaseException as error:
            problems.append(error)

    def backward():
        try:
            begin.wait()
            for _ in range(3):
                assert torch.is_grad_enabled()
                assert same(gradients(), wanted), "gradients differ"
        except BaseException as error:
            problems.append(error)

    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    workers = [threading.Thread(target=work, args=pair) for pair in enumerate(modes)]
    workers.append(threading.Thread(target=backward))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not problems, problems


@needs_kernel
def test_another_instruction_set_while_kernels_run_changes_no_bit(threads, each_isa):
    """Each call keeps to the one that was in use when it began."""
    threads(1)
    expected, stop, problems = answers(), threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                assert same(answers(), expected)
        except BaseException as error:
            problems.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    for _ in range(40):
        each_isa(lambda isa: exit_decide(randn(8, 10), threshold=0.5))
    stop.set()
    worker.join()
    assert not problems, problems


@needs_kernel
@pytest.mark.parametrize("what", [answers, gradients, solver, packed], ids=lambda f: f.__name__)
def test_same_bits_for_1_2_and_3_threads_and_every_time(threads, what):
    threads(1)
    expected = what()
    for count in (1, 2, 3, 2):
        threads(count)
        assert same(what(), expected), f"{count} threads"
