"""The suite's fixture, progress bar and order; the figures themselves come from paired.py and measure.py."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import machine
import pytest
import torch
from measure import DEVICE
from paired import Paired, duration
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastcifar


class Bars:
    """One bar over the tests and one over the work of the test in progress, with a printed line a finished test."""

    def __init__(self, tests: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(highlight=False),
        )
        self.suite = self.progress.add_task("benchmarks", total=tests)
        self.test = self.progress.add_task("ceilings of this machine", total=None)

    def step(self, what: str, done: int, total: int) -> None:
        self.progress.update(self.test, description=what, completed=done, total=total)

    def line(self, text: str) -> None:
        self.progress.print(text, markup=False, soft_wrap=True)


BARS = pytest.StashKey[Bars]()
CEILINGS = pytest.StashKey[dict]()
REMARKS = pytest.StashKey[list]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "keep_mapped: runs last, after fastcifar.keep_memory_mapped()")
    config.stash[REMARKS] = []
    # A compiler cache of this run's own: the first call of torch.compile is then what a user meets on a fresh machine.
    folder = tempfile.TemporaryDirectory(prefix="fastcifar-bench-")
    config.add_cleanup(folder.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("keep_mapped") is not None)  # stable: the rest stays in order


@pytest.fixture(scope="session", autouse=True)
def _session(request: pytest.FixtureRequest) -> Iterator[None]:
    config = request.config
    bars = config.stash[BARS] = Bars(len(request.session.items))
    with bars.progress:
        if not config.getoption("benchmark_disable"):
            config.stash[CEILINGS] = machine.ceilings()
            for line in machine.lines(machine.describe(), config.stash[CEILINGS]):
                bars.line(line)
        yield
        bars.progress.update(bars.test, visible=False)


@pytest.fixture
def _allocator(request: pytest.FixtureRequest) -> None:
    """Changes the allocator for the tests marked keep_mapped, which all others precede."""
    if request.node.get_closest_marker("keep_mapped"):
        if DEVICE.type != "cpu":
            pytest.skip("the setting concerns memory of the CPU only")
        try:
            fastcifar.keep_memory_mapped()
        except RuntimeError as error:
            pytest.skip(str(error))


@pytest.fixture
def paired(_allocator: None, benchmark: Any, request: pytest.FixtureRequest) -> Paired:
    """Times callables in turn; see :class:`paired.Paired`."""
    return Paired(benchmark, request.config.stash[BARS].step)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if report.when == "call" or not report.passed:
        paired = item.funcargs.get("paired")
        info = paired.info if paired and "group" in paired.info else {"op": item.name, "workload": "", "mode": ""}
        name = " ".join([info["op"], info["workload"], info["mode"], "mapped" * info.get("mapped", False)]).strip()
        if report.passed:
            line = f"{name}: {', '.join(_figures(info))}"
        else:
            reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else str(call.excinfo.value)
            line = f"{name}: {report.outcome}, {reason}"
            item.config.stash[REMARKS].append(line)
        if bars := item.config.stash.get(BARS, None):
            bars.progress.advance(bars.suite)
            bars.line(line)
    return report


def _figures(info: dict[str, Any]) -> Iterator[str]:
    for name, facts in info.get("candidates", {}).items():
        yield f"{name} " + (duration(facts["seconds"]["median"]) if "seconds" in facts else facts["skipped"])


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    return (report.outcome, "", "") if report.when == "call" or report.skipped else None  # the bars say it


def pytest_benchmark_group_stats() -> list:
    return []  # pytest-benchmark's own table would show whole rounds; report.py draws the tables


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info.pop("node", None)
    machine_info["fastcifar"] = machine.describe()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    output_json["ceilings"] = [config.stash[CEILINGS], machine.ceilings()]  # before and after; the higher one counts
    output_json["remarks"] = config.stash[REMARKS]
    output_json["threads"] = torch.get_num_threads()
