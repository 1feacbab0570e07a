"""Candidates timed in turn within one pytest-benchmark test, so that a ratio compares neighbours in time."""

from __future__ import annotations

import gc
import itertools
import os
import random
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from time import perf_counter
from typing import Any

from measure import FULL, seconds

BUDGET = float(os.environ.get("FASTCIFAR_BENCH_SECONDS", "30" if FULL else "12"))  # of timing, a test
FEWEST, MOST, WARM_UP = 5, 300, 2  # rounds


def summary(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and the least."""
    fifths = quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": median(values), "p20": fifths[0], "p80": fifths[3], "min": min(values)}


def duration(seconds: float | None) -> str:
    """Seconds with three digits and a fitting unit; nothing for None."""
    if seconds is None:
        return ""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    value = seconds * scale
    return f"{value:.{0 if value >= 99.5 else 1 if value >= 9.95 else 2}f} {unit}"


def _processor_use() -> tuple[float, float, float]:
    """Seconds since some start: of the clock, of work on all processors (stolen time included), of this process."""
    own = os.times()
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, interrupt, soft, steal = (int(n) for n in file.readline().split()[1:9])
    except (OSError, ValueError):  # not Linux
        return own.elapsed, 0.0, 0.0
    busy = (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")
    return own.elapsed, busy, own.user + own.system


class Paired:
    """The ``paired`` fixture: times callables as rounds of A, B, C, ... and keeps every figure in ``extra_info``.

    One round calls each candidate once (or ``repeats`` times, the same for all), in an order drawn anew each round
    from a fixed seed, so that no candidate always follows the same other one. All get the same warm-up rounds; the
    number of rounds fills BUDGET seconds. The garbage collector is off in a round. A ratio of two candidates is the
    median over the rounds of the ratio within a round.
    """

    def __init__(self, benchmark: Any, progress: Callable[[str, int, int], None]) -> None:
        self.benchmark = benchmark
        self.progress = progress  # (what is being done, how much of it is done, of how much)
        self.info: dict[str, Any] = benchmark.extra_info
        self.info["candidates"] = {}

    def describe(self, group: str, **facts: Any) -> None:
        """Names the table that the test belongs to, and adds facts about the workload."""
        self.benchmark.group = group
        self.info.update(group=group, **facts)

    def record(self, name: str, **facts: Any) -> None:
        """Adds facts about one candidate (or, with ``skipped="reason"``, says why it is not timed)."""
        self.info["candidates"].setdefault(name, {}).update(facts)

    def time(
        self,
        calls: Mapping[str, Callable[[], object]],
        *,
        repeats: int = 1,
        events: bool = True,
    ) -> dict[str, dict[str, float]]:
        """Times the candidates and returns median, p20 and p80 in seconds, by name.

        Args:
            calls: what to time, by name. Each does the whole of one work, the same for all, and keeps nothing.
            repeats: calls of a candidate within a round; for what lasts microseconds.
            events: on CUDA, the GPU's clock; else the host's. See :func:`measure.seconds`.
        """
        times: dict[str, list[float]] = {name: [] for name in calls}
        shuffle = random.Random(0)
        done = itertools.count(1)
        rounds = 1

        def one_round(keep: bool = True) -> None:
            order = list(calls)
            shuffle.shuffle(order)
            gc.collect()
            gc.disable()
            try:
                for name in order:
                    elapsed = seconds(calls[name], repeats, events=events)
                    if keep:
                        times[name].append(elapsed)
            finally:
                gc.enable()
            if keep:
                self.progress("timing", next(done), rounds)

        if not self.benchmark.disabled:
            for _ in range(WARM_UP):
                begin = perf_counter()
                one_round(keep=False)
                round_seconds = perf_counter() - begin
            rounds = max(FEWEST, min(MOST, int(BUDGET / round_seconds)))
        before = _processor_use()
        self.benchmark.pedantic(one_round, rounds=rounds, iterations=1)
        elapsed, busy, own = (now - then for now, then in zip(_processor_use(), before, strict=True))

        # Other programs slow down most what waits for all threads most often, which is the eager loops: say so.
        others = max(0.0, busy - own) / (elapsed * (os.cpu_count() or 1))
        self.info.update(rounds=rounds, repeats=repeats, warm_up_rounds=WARM_UP, other_programs=others)
        return self._summarise(times)

    def keep(self, times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
        """Takes times that were measured elsewhere (in other processes), in place of :meth:`time`."""
        self.benchmark.pedantic(lambda: None)  # pytest-benchmark writes no result for a test that times nothing
        self.info.update(rounds=len(next(iter(times.values()))), repeats=1, warm_up_rounds=0, other_programs=0.0)
        return self._summarise(times)

    def _summarise(self, times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
        for name, values in times.items():
            self.record(name, seconds=summary(values), times=values)
        self.info["ratios"] = {
            above: {below: summary([a / b for a, b in zip(times[above], times[below], strict=True)]) for below in times}
            for above in times
        }
        return {name: self.info["candidates"][name]["seconds"] for name in times}
