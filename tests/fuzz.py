"""Hostile calls: ``python tests/fuzz.py [calls] [seed]`` (``make fuzz``).

Calls that the ops' own declarations make (fastcifar/<family>/spec.py) are taken as they arrive at the dispatcher, and
one to three of their arguments are replaced: other shapes, strides and dtypes, numbers from the edges of their range,
NaN, None, lists of other lengths. An op must answer or refuse: a process of its own makes the calls, so that a crash or
a hang is seen, and says which call it was. Unchanged calls in between must give their first answer to the bit, so that
no call can spoil what comes after it. Memory must stay flat.

A failure prints the command that makes that call alone.
"""

from __future__ import annotations

import argparse
import gc
import math
import mmap
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.spec import all_specs, identical, run

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)
INTEGERS = (-(2**63), -(2**31), -7, -2, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 33, 64, 65, 1000, 2**31, 2**62, 2**63 - 1)
NUMBERS = (0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-320, 1e-30, 1e30, 1e308, math.inf, -math.inf, math.nan)
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
)
SECONDS = 60  # a call that takes longer hangs
STARTING = 2**64 - 1  # in place of a call's number until the first one is made
MEMORY = 6 * 2**30
LEAK = 32 * 2**20


class Recorder(TorchDispatchMode):
    """Keeps the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastcifar":
            copies = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), args)
            self.calls.setdefault(op._schema.name.partition("::")[2], []).append(copies)
        return op(*args, **(kwargs or {}))


def recorded() -> dict[str, list[tuple]]:
    """Valid arguments of every op that a declaration reaches."""
    recorder = Recorder()
    for spec in all_specs():
        for options in spec.options:
            for dtype in spec.dtypes[:1] if len(spec.options) > 8 else spec.dtypes:
                inputs = spec.sample("prime", dtype, "cpu", 0)
                with recorder:
                    run(spec.function, inputs, options, spec.gradients(inputs, options))
    return recorder.calls


def other_tensor(t: Tensor, rng: random.Random) -> Any:
    """What a tensor may be replaced by."""
    kind = rng.randrange(12)
    if kind == 0:
        return t.to(rng.choice(DTYPES))
    if kind == 1:
        return t[:0] if t.dim() else t.reshape(0)[:0] if t.numel() == 0 else t.reshape(1)[:0]
    if kind == 2:
        return t.unsqueeze(rng.randint(0, t.dim()))
    if kind == 3:
        return t.select(rng.randrange(t.dim()), 0) if t.dim() and min(t.shape) else t.new_zeros(())
    if kind == 4 and t.dim():
        return t.transpose(0, -1)
    if kind == 5 and t.dim():
        return t.narrow(rng.randrange(t.dim()), 0, 0 if min(t.shape) == 0 else 1)
    if kind == 6 and t.dim():
        return t[..., :1].expand_as(t) if t.shape[-1] else t
    if kind == 7 and t.dim():
        return torch.cat((t, t), rng.randrange(t.dim()))
    if kind == 8:
        hostile = t.clone(memory_format=torch.contiguous_format)
        if hostile.numel():
            value = torch.tensor(rng.choice(NUMBERS), dtype=torch.float64)
            if not t.is_floating_point():
                value = value.nan_to_num(0, 100, 0).clamp(0, 100)
            hostile.view(-1)[rng.randrange(hostile.numel())] = value.to(t.dtype)
        return hostile
    if kind == 9 and t.dim():
        wide = torch.stack((t, t), -1)
        return wide[..., 0]
    if kind == 10:
        return torch.randn(tuple(rng.choice((0, 1, 2, 3, 5, 8)) for _ in range(rng.randrange(6)))).to(t.dtype)
    return None


def other(value: Any, rng: random.Random) -> Any:
    """What an argument may be replaced by."""
    if isinstance(value, Tensor):
        return other_tensor(value, rng)
    if value is None:
        return rng.choice((None, torch.zeros(1), torch.ones(3, 5), torch.zeros((), dtype=torch.int64), 0.0))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if isinstance(value, list | tuple):
        items = list(value)
        how = rng.randrange(3)
        if how == 0 and items:
            items.pop(rng.randrange(len(items)))
        elif how == 1 and items:
            items.append(items[-1])
        elif items:
            place = rng.randrange(len(items))
            items[place] = other(items[place], rng)
        return items
    return value


def mutated(valid: list[tuple], rng: random.Random) -> list:
    arguments = list(rng.choice(valid))
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(arguments))
        arguments[place] = other(arguments[place], rng)
    return arguments


def same(a: Any, b: Any) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(identical(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def child(op: str, valid: list[tuple], seed: int, begin: int, end: int, progress: mmap.mmap) -> int:
    """Makes calls ``begin`` to ``end`` of an op; returns how many were answered."""
    function = getattr(torch.ops.fastcifar, op).default
    reads_only = not any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)
    first: list[Any] = [None] * len(valid)
    answered, level = 0, 0
    for call in range(begin, end):
        progress[:8] = call.to_bytes(8, "little")
        rng = random.Random(f"{seed} {op} {call}")
        arguments = mutated(valid, rng)
        if not reads_only:
            arguments = pytree.tree_map_only(Tensor, torch.clone, arguments)
        try:
            function(*arguments)
            answered += 1
        except REFUSALS:
            pass
        if call % 50 == 0 and reads_only:
            which = rng.randrange(len(valid))
            again = function(*valid[which])
            if first[which] is None:
                first[which] = pytree.tree_map_only(Tensor, torch.clone, again)
            elif not same(first[which], again):
                raise AssertionError(f"{op}: a valid call gives another answer after call {call}")
        if call == begin + (end - begin) // 2:
            gc.collect()
            level = resident()
    gc.collect()
    if end - begin >= 10_000 and resident() - level > LEAK:
        raise AssertionError(f"{op}: memory grew by {(resident() - level) / 2**20:.0f} MiB over half of the calls")
    return answered


def parts(total: int, ops: list[str]) -> Iterator[tuple[str, int, int]]:
    each = max(1, total // len(ops))
    for op in ops:
        yield op, 0, each


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("calls", nargs="?", type=int, default=1_000_000)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--op", help="this op's calls only, in this process")
    parser.add_argument("--begin", type=int, default=0)
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    calls = recorded()
    if options.op:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY + 16 * 2**30,) * 2)
        with open(options.progress, "r+b") if options.progress else tempfile.TemporaryFile() as file:
            file.write(STARTING.to_bytes(8, "little"))
            file.flush()
            with mmap.mmap(file.fileno(), 8) as progress:
                end = options.begin + options.calls
                answered = child(options.op, calls[options.op], options.seed, options.begin, end, progress)
        print(
            f"{options.op:<28} {options.calls:>9} calls, {answered / max(1, options.calls):5.1%} answered", flush=True
        )
        return 0
    bad = 0
    for op, begin, end in parts(options.calls, sorted(calls)):
        with tempfile.NamedTemporaryFile() as file:
            file.write(STARTING.to_bytes(8, "little"))
            file.flush()
            command = [sys.executable, __file__, str(end - begin), str(options.seed), "--op", op]
            started = time.monotonic()
            process = subprocess.Popen([*command, "--begin", str(begin), "--progress", file.name])
            at, since = -1, time.monotonic()
            while process.poll() is None:
                time.sleep(0.2)
                now = int.from_bytes(Path(file.name).read_bytes()[:8], "little")
                if now != at:
                    at, since = now, time.monotonic()
                elif now != STARTING and time.monotonic() - since > SECONDS:
                    process.kill()
            call = int.from_bytes(Path(file.name).read_bytes()[:8], "little")
        if process.returncode:
            bad += 1
            how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit {process.returncode}"
            again = f"python tests/fuzz.py 1 {options.seed} --op {op} --begin {call}"
            print(f"{op}: {how} in call {call} after {time.monotonic() - started:.0f} s: {again}", flush=True)
    print(f"{bad} of {len(calls)} ops failed" if bad else f"every op answered or refused ({len(calls)} ops)")
    return int(bad > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
