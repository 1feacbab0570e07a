"""Shared fixtures. Without a GPU, Triton runs in its interpreter, which must be chosen before triton is imported."""

import json
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastcifar import _library

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


# The instruction sets that this machine executes, best last (none where the extension is not built).
BEST_ISA = None if _library.WHY_NO_EXTENSION else _library.cpu_isa()
ISAS = [] if BEST_ISA is None else list(_library.ISAS[: _library.ISAS.index(BEST_ISA) + 1])


@pytest.fixture
def each_isa():
    """Calls its argument once for each instruction set, with that one in use."""

    def each(check):
        for isa in ISAS:
            _library.cpu_isa(isa)
            check(isa)

    yield each
    if BEST_ISA is not None:
        _library.cpu_isa(BEST_ISA)


@pytest.fixture
def threads():
    """Sets torch's thread count for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_runtest_logreport(report):
    """With FASTCIFAR_OUTCOMES=file, a line of JSON a test: name, outcome and reason, which ecosystem/table.py reads."""
    path = os.environ.get("FASTCIFAR_OUTCOMES")
    if path and "PYTEST_XDIST_WORKER" not in os.environ and (report.when == "call" or report.outcome != "passed"):
        if report.when == "teardown" and report.outcome == "passed":
            return
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
        with open(path, "a") as file:
            print(json.dumps([report.nodeid, report.outcome, reason]), file=file)
