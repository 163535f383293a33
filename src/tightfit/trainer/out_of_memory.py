"""Recognize errors that mean memory ran out, read the refused size from them, and release the memory they hold.

Every layer below the trainer words it differently: PyTorch's allocators, the drivers, the libraries of kernels, the
collectives, numpy, the C library. This module knows them by class where there is one, else by text.
"""

import contextlib
import ctypes
import gc
import platform
import re
import traceback
import warnings
from collections.abc import Iterator
from enum import Enum

import torch

from tightfit.system.memory_limits import host_memory


class Kind(Enum):
    """State of the process after an error."""

    RECOVERABLE = "recoverable"
    """An allocation was refused and nothing else happened: the process can go on."""
    BROKEN = "context broken"
    """The device's context or a collective is beyond repair: only a new process can go on."""


_OUT_OF_MEMORY = re.compile(
    r"out of memory"  # CUDA, HIP, XPU and MPS: allocators and drivers
    r"|can't allocate memory|not enough memory: you tried"  # DefaultCPUAllocator on Linux and on Windows
    r"|Unable to allocate [\d.]+ \w+ for an array"  # numpy
    r"|CUBLAS_STATUS_ALLOC_FAILED|HIPBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|CUSOLVER_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED|CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"
    r"|UR_RESULT_ERROR_OUT_OF_\w*MEMORY|std::bad_alloc|Cannot allocate memory|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
_WHEN_FULL = re.compile(r"CUBLAS_STATUS_NOT_INITIALIZED|HIPBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_NOT_INITIALIZED")
"""Messages of a library that could not allocate its workspace; with memory to spare they mean another fault."""
_WHEN_HOST_FULL = re.compile(r"could not (create|execute) a (primitive|memory object|reorder)\b(?! desc)")
"""Messages of oneDNN without memory for its code or its scratch space; with memory to spare, another fault."""
SLOW_FALLBACK = r"mkldnn_\w+ failed, switching"
"""A warning: products run without oneDNN, a hundred times as slow, for as long as their thread lives."""
_NO_THREAD = re.compile(r"can't start new thread")
"""Python's message without memory for a thread's stack, or at the system's limit on threads."""
_BROKEN = re.compile(
    r"an illegal memory access was encountered|unspecified launch failure|misaligned address"
    r"|NCCL error|ncclUnhandledCudaError|ncclSystemError",
    re.IGNORECASE,
)
_FULL_BYTES = 512 * 2**20
"""Free memory below which cuBLAS counts a device as full: its handle and workspace take up to 100 MiB on recent
cards."""
_HOST_FULL_BYTES = 256 * 2**20
_SIZES = (
    re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGTPE]i?B)?", re.IGNORECASE),
    re.compile(r"Unable to allocate ([\d.]+) ?(bytes|[KMGTPE]i?B)", re.IGNORECASE),
)
_POWERS = {"k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def is_out_of_memory(error: BaseException, *, after_another: bool = False) -> Kind | None:
    """Return the kind of out-of-memory error that this or an error behind it is; None for any other error.

    `after_another`: an OOM was just handled, so errors of allocating a library's workspace count as OOM, although the
    memory may be free again.
    Triton's OutOfResources does not count: it is about a kernel's shared memory, and smaller plans do not cure it.
    """
    kinds = {_kind(each, after_another) for each in error_chain(error)}
    return Kind.BROKEN if Kind.BROKEN in kinds else Kind.RECOVERABLE if Kind.RECOVERABLE in kinds else None


def spoils_its_thread(error: BaseException) -> bool:
    """Return True if this error's thread can run no new kernel any more, however much memory is free.

    oneDNN's assembler sets a thread-local variable when it gets no memory for its code, and nothing clears it (seen
    with torch 2.13 on x86): every later new kernel of that thread fails with the same message. Other threads work.
    """
    return any(_WHEN_HOST_FULL.search(str(each)) for each in error_chain(error))


def requested_bytes(error: BaseException) -> int | None:
    """Return the refused size if the message names it.

    >>> requested_bytes(RuntimeError("CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has ..."))
    6592774799
    >>> requested_bytes(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."))
    4096
    """
    for each in error_chain(error):
        for pattern in _SIZES:
            if found := pattern.search(str(each)):
                unit = (found[2] or "bytes")[0].lower()
                return int(float(found[1]) * 2 ** _POWERS.get(unit, 0))
    return None


def set_process_warnings() -> None:
    """Turn oneDNN's warning `SLOW_FALLBACK` into an error in the whole process, so that a run recovers instead."""
    warnings.filterwarnings("error", message=SLOW_FALLBACK)


def release_frames(error: BaseException) -> None:
    """Drop the local variables of the failed functions: a traceback keeps their tensors alive."""
    for each in list(error_chain(error)):
        traceback.clear_frames(each.__traceback__)
        each.__traceback__ = each.__cause__ = each.__context__ = None


def release_memory(device: torch.device) -> None:
    """Release unused memory: reference cycles, cached blocks, cuBLAS's workspaces, the C library's free lists."""
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still allocate, its own cached blocks included; None if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return host_memory().budget_bytes if device.type == "cpu" else None


def room_bytes(device: torch.device) -> tuple[int, int] | None:
    """Bytes free now, and those plus what this process holds; None if unknown.

    Leaves out this process's own limits on the host: no other process uses them up.
    """
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return free, free + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    memory = host_memory()
    shared = (limit.left_bytes for limit in memory.limits if not limit.source.startswith("RLIMIT"))
    free = min([memory.available_bytes, *shared])
    return free, free + memory.used_by_this_process_bytes


def _kind(error: BaseException, after_another: bool) -> Kind | None:
    if type(error).__name__ == "OutOfResources":
        return None
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):  # numpy's _ArrayMemoryError is a MemoryError
        return Kind.RECOVERABLE
    if not isinstance(error, (RuntimeError, OSError, UserWarning)):
        return None
    text = str(error)
    if _BROKEN.search(text):
        # NCCL's own allocations: "Cuda failure 2 'out of memory'". Its communicator is lost, and so is the collective.
        return Kind.BROKEN if "NCCL" not in text.upper() or _OUT_OF_MEMORY.search(text) else None
    if _OUT_OF_MEMORY.search(text):
        return Kind.RECOVERABLE
    of_device, of_host = _WHEN_FULL.search(text), _WHEN_HOST_FULL.search(text) or _NO_THREAD.search(text)
    full = (of_device and (after_another or _device_is_full())) or (of_host and (after_another or _host_is_full()))
    return Kind.RECOVERABLE if full else None


def _host_is_full() -> bool:
    return host_memory().budget_bytes < _HOST_FULL_BYTES


def _device_is_full() -> bool:
    if not torch.cuda.is_available():
        return False
    with contextlib.suppress(RuntimeError):
        return int(torch.cuda.mem_get_info()[0]) < _FULL_BYTES
    return True  # a device that cannot even report its free memory


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, its causes and contexts; torch's compiler keeps its cause as `inner_exception`."""
    seen: list[BaseException | None] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is not None and not any(each is other for other in seen):
            seen.append(each)
            yield each
            waiting += [each.__cause__, each.__context__, getattr(each, "inner_exception", None)]
