"""What a search of schedules has tried and found, and the file that it goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .found import FoundSchedule
from .search_space import Candidate

__all__ = ["SearchResult", "Trial"]


@dataclass(frozen=True)
class Trial:
    """One candidate that was tried.

    Attributes:
        candidate, error: what it is, and how well it did.
        stage: "drawn", "child" or "refined".
        used: evaluations by then, its own among them.
        damping: of a refined one, where its refinement would go on from.
    """

    candidate: Candidate
    error: float
    stage: str
    used: int
    damping: float = 0.0

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"candidate": self.candidate.record()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Trial:
        """What :meth:`record` gave."""
        return cls(**{**record, "candidate": Candidate.from_record(record["candidate"])})


class SearchState:
    """The trials of a search, saved to a file where there is one."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any], trials: dict[int, list[Trial]]) -> None:
        self.path, self.settings, self.trials = path, settings, trials

    @classmethod
    def open(cls, path: str | PathLike[str] | None, settings: Mapping[str, Any]) -> SearchState:
        """Raises:
        ValueError: the file is of a search with other settings."""
        if path is None or not Path(path).exists():
            return cls(None if path is None else Path(path), settings, {})
        record = json.loads(Path(path).read_text())
        # Through JSON as well, which knows no tuples.
        expected = json.loads(json.dumps(settings))
        different = [name for name in expected if record["settings"].get(name) != expected[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"search_schedule: expected a state of the same search, got {path} with {name} "
                f"{record['settings'].get(name)!r} and not {expected[name]!r}"
            )
        trials = {int(count): [Trial.from_record(t) for t in found] for count, found in record["trials"].items()}
        return cls(Path(path), settings, trials)

    def save(self) -> None:
        """All or nothing, so that an interruption leaves the last whole generation."""
        if self.path is None:
            return
        trials = {str(count): [trial.record() for trial in found] for count, found in self.trials.items()}
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps({"settings": self.settings, "trials": trials}))
        os.replace(partial, self.path)


class SearchResult:
    """What :func:`fastcifar.diffusion.search_schedule` found. ``result[steps]`` is the best schedule of that many calls
    of the model.

    Attributes:
        trials: of each number of steps, every :class:`Trial` in order.
        settings: of the search.
    """

    def __init__(
        self, trials: Mapping[int, list[Trial]], start: float, end: float, settings: Mapping[str, Any]
    ) -> None:
        self.trials, self.start, self.end, self.settings = dict(trials), start, end, dict(settings)

    def __getitem__(self, steps: int) -> FoundSchedule:
        if steps not in self.trials:
            raise ValueError(f"SearchResult: expected steps of {list(self.trials)}, got {steps}")
        best = min(self.trials[steps], key=lambda trial: trial.error)
        return FoundSchedule(best.candidate, self.start, self.end, steps, best.error)

    def __iter__(self) -> Iterator[int]:
        return iter(self.trials)

    @property
    def best(self) -> FoundSchedule:
        """Of all, the one of least error."""
        return min((self[steps] for steps in self.trials), key=lambda found: found.error)

    def pareto(self) -> list[tuple[int, float]]:
        """Steps and errors of the schedules that no other one undercuts with as few steps."""
        front: list[tuple[int, float]] = []
        for steps in sorted(self.trials):
            error = self[steps].error
            if not front or error < front[-1][1]:
                front.append((steps, error))
        return front

    def plot(self, path: str | PathLike[str], others: Mapping[str, Mapping[int, float]] | None = None) -> None:
        """Draws every trial's error over the steps, the Pareto front, and errors of ``others`` by name and steps, and
        beside it how the search came down, into a file. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for steps, trials in self.trials.items():
            left.plot([steps] * len(trials), [t.error for t in trials], ".", color="gray", alpha=0.2)
            least, curve = float("inf"), []
            for trial in trials:
                least = min(least, trial.error)
                curve.append(least)
            right.step([t.used for t in trials], curve, where="post", label=f"{steps} evaluations of the model")
        left.plot(*zip(*self.pareto(), strict=True), "o-", color="tab:green", label="searched")
        for name, errors in (others or {}).items():
            left.plot(list(errors), list(errors.values()), "s--", label=name)
        left.set(xlabel="evaluations of the model", ylabel="error", yscale="log")
        right.set(xlabel="schedules tried", ylabel="least error so far", yscale="log")
        left.legend()
        right.legend()
        figure.savefig(path, dpi=150)
