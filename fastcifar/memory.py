"""An opt-in for large tensors on the CPU: keep freed memory mapped."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory_mapped() -> None:
    """Tells the C library's allocator to keep large freed blocks for reuse instead of giving them back to the system.

    glibc maps every block above 32 MiB (on a fresh process, above 128 KiB) anew from the system and unmaps it when it
    is freed, so that each such tensor's first write takes a page fault for every 4 KiB. On a memory-bound op these
    faults cost more than the arithmetic: ``docs/memory.md`` has the measurement.

    This is a setting of the whole process: it speeds up every torch program on the CPU that allocates and frees large
    tensors, ours or not, and in exchange the process keeps its peak memory until it ends, and up to about eight blocks
    of the largest size beyond it (glibc settles on which blocks it reuses within the first ten allocations or so). It
    cannot be undone, is never set unasked, and does not concern CUDA memory.

    Raises:
        RuntimeError: the C library is not glibc, or refuses.

    Source: mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD.
    """
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"keep_memory_mapped: expected Linux with glibc, got {sys.platform}")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)):
        raise RuntimeError("keep_memory_mapped: the C library's mallopt is missing or refused; glibc is expected")
