"""What one call costs: seconds, peak extra memory, bytes saved for backward."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter_ns

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DEVICE = torch.device(os.environ.get("FASTCIFAR_BENCH_DEVICE", "cpu"))
FULL = os.environ.get("FASTCIFAR_BENCH_FULL", "0") not in ("", "0")
FLUSH_BYTES = 256 << 20  # beyond the second-level cache of any GPU

_flush: list[Tensor] = []


def seconds(call: Callable[[], object], repeats: int = 1, *, events: bool = True) -> float:
    """Seconds of one call, the mean over ``repeats`` calls on end.

    On CUDA the GPU's own events are read, after its caches are filled with zeros (which also keeps it busy while the
    first kernel is launched); ``events=False`` takes the host's clock instead, for what is bound by launches.
    """
    if DEVICE.type == "cuda" and events:
        if not _flush:
            _flush.append(torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _flush[0].zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats
    synchronize()
    begin = perf_counter_ns()
    for _ in range(repeats):
        call()
    synchronize()
    return (perf_counter_ns() - begin) * 1e-9 / repeats


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that ``call`` holds at its worst moment beyond what was there before it, its result included.

    CUDA: the caching allocator's own peak. CPU: the running sum over torch's allocations in the order of time, from
    the profiler's trace; what a library allocates past torch's allocator is not seen.
    """
    if DEVICE.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def saved_for_backward(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Bytes that autograd keeps between forward and backward: (the inputs themselves, everything else).

    Every distinct storage that is saved counts once, with all its bytes, since all of it is kept alive.
    """
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address returns
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    of_inputs = sum(storage.nbytes() for address, storage in storages.items() if address in given)
    others = sum(storage.nbytes() for address, storage in storages.items() if address not in given)
    del out
    return of_inputs, others
