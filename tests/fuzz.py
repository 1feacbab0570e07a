"""Hostile and random calls: ``python tests/fuzz.py [calls] [seed]`` (``make fuzz``).

Of every schema: valid calls (tests/fuzz_calls.py), most with one to three of their arguments replaced: other shapes,
strides and dtypes, numbers from the edges of their range, NaN, None, lists of other lengths. An op must answer or
refuse, and what it answers must be right: tests/fuzz_checks.py. Of every declared public function random valid calls,
against its reference: tests/fuzz_specs.py. And hostile calls of all public names: tests/fuzz_public.py.

A process of its own makes the calls, so that a crash or a hang is seen, and says which call it was. Unchanged calls in
between must give their first answer to the bit, so that no call can spoil what comes after it. Memory must stay flat.

A failure prints the command that makes that call alone.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fuzz_public
import fuzz_specs
import torch
from fuzz_calls import MAKERS, TREES, TRUTHS, UnsureError, schemas, valid_calls
from fuzz_checks import LARGE, REFUSALS, Op, differs, same_bits
from fuzz_mutations import other, relaid
from torch import Tensor
from torch.utils import _pytree as pytree

SECONDS = 60  # a call that takes longer hangs
STARTING = 2**64 - 1  # in place of a call's number until the first one is made
MEMORY = 3 * 2**30  # beyond the addresses that a process begins with
LEAK = 32 * 2**20
# Shares of all calls; a call of a declared function with its reference takes a hundred times as long as one of an op.
SHARES = {"op": 0.94, "spec": 0.01, "public": 0.05}


class OpCalls:
    """Calls of one op by their number."""

    def __init__(self, name: str, seed: int) -> None:
        self.op, self.seed, self.valid = Op(name), seed, valid_calls(name)
        self.first: list[Any] = [None] * len(self.valid)

    def __call__(self, call: int) -> bool:
        """Whether it was answered."""
        rng, name = random.Random(f"{self.seed} {self.op.name} {call}"), self.op.name
        mutations = rng.choice((0, 1, 1, 2, 3))
        arguments = list(MAKERS[name](rng) if name in MAKERS and rng.random() < 0.5 else rng.choice(self.valid))
        for _ in range(mutations):
            place = rng.randrange(len(arguments))
            arguments[place] = other(arguments[place], rng)
        changes = mutations > 0
        if rng.random() < 0.5:
            arguments = pytree.tree_map_only(Tensor, lambda t: relaid(t, rng) if t.numel() else t, arguments)
            changes = True  # which a tree's vectors or a ring refuse
        if name == "_cpu_isa" and arguments[0] >= 0:
            return self._select(arguments[0])
        before = pytree.tree_map_only(Tensor, torch.clone, arguments)
        try:
            answer = self.op.checked(arguments, rng)
        except REFUSALS as error:
            if not changes:
                raise AssertionError(f"{name}: a valid call is refused") from error
            return False
        small = sum(t.numel() for t in answer) <= LARGE
        if small and name in TRUTHS and (mutations == 0 or (name not in TREES and rng.random() < 0.3)):
            self._compare(answer, before, mutations)
        if call % 50 == 0:
            self._repeat(rng)
        return True

    def _compare(self, answer: list[Tensor], arguments: list[Any], mutations: int) -> None:
        try:
            expected, tolerance = TRUTHS[self.op.name](*arguments)
        except UnsureError:
            return
        except REFUSALS:
            assert mutations, f"{self.op.name}: the reference refuses a valid call"
            return
        problem = differs(answer, expected, tolerance)
        assert problem is None, f"{self.op.name}: {problem}"

    def _select(self, isa: int) -> bool:
        """Another instruction set is in use, or none has changed."""
        now = torch.ops.fastcifar._cpu_isa(-1)
        answer = torch.ops.fastcifar._cpu_isa(isa)
        after = torch.ops.fastcifar._cpu_isa(-1)
        torch.ops.fastcifar._cpu_isa(now)
        assert (answer, after) == ((isa, isa) if 0 <= isa <= now else (-1, now)), f"_cpu_isa: {isa} gave {answer}"
        return answer >= 0

    def _repeat(self, rng: random.Random) -> None:
        which = rng.randrange(len(self.valid))
        again = self.op.answer(self.op.dense(self.valid[which]))
        if self.first[which] is None:
            self.first[which] = [t.clone() for t in again]
        same = all(same_bits(a, b) for a, b in zip(self.first[which], again, strict=True))
        assert same, f"{self.op.name}: a valid call gives another answer than before"


def subjects() -> list[str]:
    """What is called: kind/name."""
    names = {"op": schemas(), "spec": list(fuzz_specs.SPECS), "public": fuzz_public.names()}
    return [f"{kind}/{name}" for kind, of_kind in names.items() for name in of_kind]


def caller(subject: str, seed: int) -> Callable[[int], bool]:
    kind, _, name = subject.partition("/")
    if kind == "op":
        return OpCalls(name, seed)
    if kind == "public":
        return fuzz_public.Calls(name, seed)

    def one(call: int) -> bool:
        fuzz_specs.check(name, random.Random(f"{seed} {name} {call}"))
        return True

    return one


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def child(subject: str, seed: int, begin: int, end: int, report: Callable[[int], None] = lambda call: None) -> int:
    """Makes calls ``begin`` to ``end``; returns how many were answered."""
    one, answered, level = caller(subject, seed), 0, 0
    for call in range(begin, end):
        report(call)
        answered += one(call)
        if call == begin + (end - begin) // 2:
            gc.collect()
            level = resident()
    gc.collect()
    if end - begin >= 10_000 and resident() - level > LEAK:
        raise AssertionError(f"{subject}: memory grew by {(resident() - level) / 2**20:.0f} MiB over half of the calls")
    return answered


def limit_memory() -> tuple[int, int]:
    """Has what asks for too much be refused it; returns the limit before, for resource.setrlimit."""
    before, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + pages * resource.getpagesize(), before[1]))
    return before


def _note(progress: mmap.mmap, call: int) -> None:
    progress[:8] = call.to_bytes(8, "little")


def alone(options: argparse.Namespace) -> int:
    """The calls of one subject, in this process."""
    torch.set_num_threads(1)
    limit_memory()
    with open(options.progress, "r+b") if options.progress else tempfile.TemporaryFile() as file:
        file.write(STARTING.to_bytes(8, "little"))
        file.flush()
        with mmap.mmap(file.fileno(), 8) as progress:
            end = options.begin + options.calls
            answered = child(options.subject, options.seed, options.begin, end, partial(_note, progress))
    print(
        f"{options.subject:<44} {options.calls:>9} calls, {answered / max(1, options.calls):5.1%} answered", flush=True
    )
    return 0


def watched(subject: str, calls: int, seed: int) -> bool:
    """Whether a process that makes the calls ends well."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(STARTING.to_bytes(8, "little"))
        file.flush()
        command = [sys.executable, __file__, str(calls), str(seed), "--subject", subject, "--progress", file.name]
        started = since = time.monotonic()
        process = subprocess.Popen(command)
        at = -1
        while process.poll() is None:
            time.sleep(0.1)
            now = int.from_bytes(Path(file.name).read_bytes()[:8], "little")
            if now != at:
                at, since = now, time.monotonic()
            elif now != STARTING and time.monotonic() - since > SECONDS:
                process.kill()
        call = int.from_bytes(Path(file.name).read_bytes()[:8], "little")
    if process.returncode:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit {process.returncode}"
        again = f"python tests/fuzz.py 1 {seed} --subject {subject} --begin {call}"
        print(f"{subject}: {how} in call {call} after {time.monotonic() - started:.0f} s: {again}", flush=True)
    return process.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("calls", nargs="?", type=int, default=1_000_000)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--subject", help="calls of this one only (op/NAME, spec/NAME, public/NAME), in this process")
    parser.add_argument("--kind", choices=SHARES, help="all calls go to subjects of this kind")
    parser.add_argument("--begin", type=int, default=0)
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.subject:
        return alone(options)
    of_kind = {kind: [s for s in subjects() if s.startswith(kind)] for kind in SHARES}
    shares = SHARES if options.kind is None else {options.kind: 1.0}
    bad = total = 0
    for kind, share in shares.items():
        for subject in of_kind[kind]:
            total += 1
            bad += not watched(subject, max(1, int(options.calls * share / len(of_kind[kind]))), options.seed)
    print(
        f"{bad} of {total} failed" if bad else f"every call was answered rightly or refused ({total} ops and functions)"
    )
    return int(bad > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
