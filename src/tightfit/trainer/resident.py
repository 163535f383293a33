"""Memory of this process: how much now, how much at most, and whether the C library keeps what is freed."""

import contextlib
import ctypes
import mmap
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from tightfit.units import GIB, MIB

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
"""mallopt's parameters, from glibc's malloc.h."""
_RESERVED = 32 * MIB
"""As much as plans leave free in any case (plan.budget)."""


@dataclass(frozen=True)
class MemoryUse:
    now_bytes: int
    peak_bytes: int


def memory_use(device: torch.device) -> MemoryUse:
    """On CUDA what PyTorch's allocator reserves; elsewhere the resident memory of this process."""
    if device.type == "cuda":
        return MemoryUse(torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        now = torch.mps.driver_allocated_memory()
        return MemoryUse(now, now)
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return MemoryUse(*(int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")))
    except (OSError, KeyError):
        return _from_getrusage()


def _from_getrusage() -> MemoryUse:
    if sys.platform == "win32":
        return MemoryUse(0, 0)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return MemoryUse(peak, peak)


class Reserve:
    """Addresses that nobody uses until memory is short: for what a step in smaller pieces needs before it is one.

    oneDNN makes code for every new shape, some MiB of it, and ends the process where it gets none. Only limits of a
    process count addresses; to control groups and to the machine this is nothing.
    """

    def __init__(self) -> None:
        self._held: mmap.mmap | None = None
        self.take()

    def take(self) -> None:
        """Hold it again, if it is to be had."""
        if self._held is None and sys.platform == "linux":
            with contextlib.suppress(OSError):
                self._held = mmap.mmap(-1, _RESERVED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def release(self) -> None:
        """Let others have it."""
        if self._held is not None:
            self._held.close()
            self._held = None


def keep_freed_memory(parameters: int) -> bool:
    """Have glibc keep large freed blocks for the next step, for a model of so many parameters; True where it does.

    By default each large tensor of a step is mapped anew and its pages are cleared again: 20 to 40% of a training
    step on the CPU. What is kept is also fragmented: GPT-2 124M would hold 150 MiB more, so models whose float32
    parameters, gradients and moments take over 1 GiB are left alone. Holds for the whole process: only the training
    program calls this.
    """
    if parameters * 16 > GIB or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * MIB))
    results = [mallopt(parameter, value) for parameter, value in settings]
    return all(results)


def return_freed_memory() -> bool:
    """Have glibc give every large block back to the system when it is freed; True where it does.

    By itself it comes to keep blocks of up to 32 MiB, in a heap that fragments: a step of GPT-2 124M with 2 x 1024
    tokens peaked at 3416 MiB, of which 2990 were in use; with this at 3127. Holds for the whole process.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_M_MMAP_THRESHOLD, MIB), mallopt(_M_TRIM_THRESHOLD, MIB)])
