"""What fresh memory costs: the same call in a new process, with the allocator as it is and with
``fastcifar.keep_memory_mapped()``; docs/memory.md explains why."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from measure import DEVICE
from paired import Paired

CALLS, PROCESSES = 30, 3

# A new process, because a heap with a large enough free stretch, left by whatever ran before, hides the effect.
SCRIPT = """
import json, resource, sys, time
import torch, fastcifar
from fastcifar.spiking import lif
if sys.argv[1] == "kept mapped":
    fastcifar.keep_memory_mapped()
x = torch.randn(4, 64, 128, 16, 16)
times, faults = [], []
for _ in range(int(sys.argv[2])):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    lif(x)
    times.append(time.perf_counter() - start)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
half = len(times) // 2  # the allocator settles in the first calls
print(json.dumps([times[half:], sorted(faults[half:])[half // 2]]))
"""


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the setting concerns memory of the CPU only")
def test_fresh_memory(paired: Paired) -> None:
    paired.describe("memory", op="lif", workload="T=4 x [64,128,16,16] float32, new process", mode="call")
    times: dict[str, list[float]] = {}
    for name in ("as it is", "kept mapped"):
        times[name], faults = [], 0
        for done in range(PROCESSES):
            paired.progress(f"allocator {name}", done, PROCESSES)
            command = [sys.executable, "-c", SCRIPT, name, str(CALLS)]
            found, faults = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            times[name] += found
        paired.record(name, role="ours", target=None, note=f"{faults} page faults a call")
    paired.keep(times)
