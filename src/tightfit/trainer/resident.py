"""Read this process's memory, hold some in reserve, and set whether the C library keeps freed blocks."""

import contextlib
import ctypes
import mmap
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tightfit.units import MIB

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
"""mallopt's parameters, from glibc's malloc.h."""
_RESERVED = 32 * MIB
"""As much as plans leave free in any case (planner.budget)."""


@dataclass(frozen=True)
class MemoryUse:
    now_bytes: int
    peak_bytes: int


def memory_use(device: torch.device) -> MemoryUse:
    """Read the bytes that PyTorch's allocator reserves on CUDA; elsewhere the resident memory of this process."""
    if device.type == "cuda":
        return MemoryUse(torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        now = torch.mps.driver_allocated_memory()
        return MemoryUse(now, now)
    now = psutil.Process().memory_info().rss
    return MemoryUse(now, max(now, _peak_bytes()))


def _peak_bytes() -> int:
    """Bytes of this process at its resident peak, where psutil has no such figure; 0 if unknown.

    On Linux from /proc: getrusage's peak includes that of the program before exec.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
            return int(found[1]) * 1024 if found else 0
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))  # of Windows


class Reserve:
    """Unused addresses, released when memory is short so that a step in smaller pieces can start.

    oneDNN generates some MiB of code for every new shape, and ends the process if it gets no memory for it. Only a
    process's own limits count addresses; control groups and the machine do not.
    """

    def __init__(self) -> None:
        self._held: mmap.mmap | None = None
        self.take()

    def take(self) -> None:
        """Hold the addresses again, if the system gives them."""
        if self._held is None and sys.platform == "linux":
            with contextlib.suppress(OSError):
                self._held = mmap.mmap(-1, _RESERVED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def release(self) -> None:
        """Give the addresses back."""
        if self._held is not None:
            self._held.close()
            self._held = None


def set_process_malloc(*, keep: bool) -> bool:
    """Let glibc keep large freed blocks for the next step, or return each to the system; True if it does.

    This changes the whole process. By default each large tensor of a step is mapped anew and its pages are cleared
    again: 20 to 40% of a training step on the CPU. After a while glibc does keep blocks of up to 32 MiB, in a heap that
    fragments: a step of GPT-2 124M with 2 x 1024 tokens peaked at 3416 MiB, of which 2990 were in use; with
    `keep=False` it peaks at 3127.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    kept = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * MIB))
    returned = ((_M_MMAP_THRESHOLD, MIB), (_M_TRIM_THRESHOLD, MIB))
    mallopt = ctypes.CDLL(None).mallopt
    results = [mallopt(parameter, value) for parameter, value in (kept if keep else returned)]
    return all(results)
