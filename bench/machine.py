"""What the figures were measured on, and how fast that machine is when it does nothing but copy or multiply."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from statistics import median
from time import perf_counter
from typing import Any

import cpuinfo
import torch
from measure import DEVICE, seconds
from torch import Tensor

from fastcifar import _library

COPY_BYTES = 256 << 20  # of each buffer, or four times the last-level cache where that is more
REPEATS = 12
PACKAGES = ("torch", "triton", "numpy", "spikingjelly", "snntorch", "brevitas", "fastcifar")


def describe() -> dict[str, Any]:
    """Processor, memory, graphics processor and versions, for the head of a report."""
    versions = {"python": platform.python_version(), "compiler": _compiler()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": DEVICE.type,
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "versions": versions,
    }


def isa() -> str:
    """The instruction set that the kernels use or, where they are not built, the best that the processor has."""
    try:
        return _library.cpu_isa()
    except RuntimeError:
        return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")


def ceilings() -> dict[str, float | None]:
    """The fastest of a dozen runs each, on all of torch's threads: bytes per second read plus written by a copy
    (torch's ``copy_``, and non-temporal stores), and float32 operations per second of independent multiply-adds.

    None where it cannot be measured: ``fastcifar._host`` is not built, or the device is a GPU.
    """
    return _cuda_ceilings() if DEVICE.type == "cuda" else _cpu_ceilings()


def copier(count: int) -> Callable[[], None]:
    """A call that moves ``count`` bytes, half of them read and half written, the fastest way that this machine has:
    the floor that a benchmark times in turn with its candidates."""
    source = torch.ones(count // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source).fill_(2)
    ways = [lambda: target.copy_(source)]
    if DEVICE.type == "cpu" and (stream := _stream_copier(target, source)):
        ways.append(stream)
    return min(ways, key=lambda way: median(seconds(way) for _ in range(REPEATS)))


def _stream_copier(target: Tensor, source: Tensor) -> Callable[[], None] | None:
    """The copy with non-temporal stores; None where the extension is not built."""
    if _library.WHY_NO_EXTENSION is not None:
        return None
    return lambda: torch.ops.fastcifar._stream_copy.default(target, source)


def bandwidth(ceilings: dict[str, float | None]) -> float:
    """The faster of the two copies, bytes per second."""
    return max(value for name in ("copy", "stream_copy") if (value := ceilings[name]))


def lines(about: dict[str, Any], ceilings: dict[str, float | None]) -> list[str]:
    """The machine, as :func:`describe` and :func:`ceilings` found it, in words."""
    processor = about["gpu"] or f"{about['cpu']}, {about['threads']} of {about['cores']} threads, {about['isa']}"
    text = [
        f"{processor}, {about['ram_gib']} GiB of memory",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        f"copy (read + write) {bandwidth(ceilings) * 1e-9:.1f} GB/s",
    ]
    if ceilings["flops"]:
        text[-1] += f", float32 multiply-add {ceilings['flops'] * 1e-9:.0f} GFLOP/s"
    if about["device"] == "cpu" and ceilings["stream_copy"] is None:
        text.append("the extension is not built: the copy is torch's copy_ alone, so the floor is too lenient")
    return text


def _cuda_ceilings() -> dict[str, float | None]:
    source = torch.ones(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    best = min(seconds(lambda: target.copy_(source)) for _ in range(REPEATS))
    return {"copy": 2 * source.numel() / best, "stream_copy": None, "flops": None}


def _cpu_ceilings() -> dict[str, float | None]:
    size = max(COPY_BYTES, 4 * _last_level_cache())
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8).fill_(2)
    result: dict[str, float | None] = {
        "copy": 2 * size / min(seconds(lambda: target.copy_(source)) for _ in range(REPEATS)),
        "stream_copy": None,
        "flops": None,
    }

    if stream_copy := _stream_copier(target.zero_(), source):
        result["stream_copy"] = 2 * size / min(seconds(stream_copy) for _ in range(REPEATS))
        assert torch.equal(target, source), "stream_copy did not copy"
    try:
        from fastcifar import _host
    except ImportError:
        return result
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:

        def multiply_add(iterations: int) -> tuple[float, float]:
            begin = perf_counter()
            operations = sum(pool.map(lambda _: _host.peak_flops(isa(), iterations), range(threads)))
            return operations, perf_counter() - begin

        iterations = 1 << 10
        while multiply_add(iterations)[1] < 0.02:
            iterations *= 2
        runs = [multiply_add(iterations) for _ in range(REPEATS)]
        result["flops"] = max(operations / elapsed for operations, elapsed in runs)
    return result


def _last_level_cache() -> int:
    """Bytes of the largest cache that Linux lists, 0 where it lists none."""
    sizes = [0]
    folder = "/sys/devices/system/cpu/cpu0/cache"
    for index in os.listdir(folder) if os.path.isdir(folder) else []:
        try:
            with open(f"{folder}/{index}/size") as file:
                sizes.append(int(file.read().strip().removesuffix("K")) << 10)
        except (OSError, ValueError):
            continue
    return max(sizes)


def _compiler() -> str:
    try:
        command = [os.environ.get("CXX", "c++"), "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "none found"
