"""Host copies of the card's data, which nobody computed: zeros in pages that take memory only once they are written."""

import contextlib
import ctypes
import math
import mmap
import sys
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LEAST_BYTES = 1 << 16

_LOOKED_AT = 64
"""Pages in memory that are read, at most: a look at a part of the zeros has brought its first and last page there."""
_KEPT = (None, torch.preserve_format, torch.contiguous_format)

_made: "WeakValueDictionary[int, NDArray[np.uint8]]" = WeakValueDictionary()
"""Arrays of `lazy_zeros` by the address of their data; a tensor's storage keeps its array alive."""


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros in pages that the system provides when they are touched: copies of large models cost nothing."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LEAST_BYTES:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    pages = _pages(nbytes)
    _made[pages.ctypes.data] = pages
    return torch.from_numpy(pages).view(dtype).view(shape)


def _pages(nbytes: int) -> NDArray[np.uint8]:
    """Return zeros; on Linux in small pages of their own, of which `_is_touched` knows each."""
    if sys.platform != "linux":
        return np.zeros(nbytes, dtype=np.uint8)
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapped.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapped, dtype=np.uint8)


def copied_lazily(
    source: Tensor, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None
) -> Tensor | None:
    """Return a copy of untouched zeros, as lazy as they are; None for any other tensor."""
    if memory_format not in _KEPT or not is_untouched(source):
        return None
    return lazy_zeros(tuple(source.shape), dtype or source.dtype)


def is_untouched(tensor: Tensor) -> bool:
    """Return True for a part of `lazy_zeros` that nobody has written since."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes < _LEAST_BYTES or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.is_contiguous():
        return False
    pages = _made.get(tensor.untyped_storage().data_ptr())
    start = tensor.storage_offset() * tensor.element_size()
    return pages is not None and not _is_touched(pages[start : start + nbytes])


def _is_touched(part: NDArray[np.uint8]) -> bool:
    """Return True unless the array is seen to be zeros: pages not in memory are, and a few others are looked at."""
    if sys.platform != "linux":
        return True
    size = mmap.PAGESIZE
    head = -part.ctypes.data % size
    count = (part.nbytes - head) // size
    inner = part[head : head + count * size]
    resident = np.zeros(count, dtype=np.uint8)
    failed = ctypes.CDLL(None).mincore(
        ctypes.c_void_p(inner.ctypes.data), ctypes.c_size_t(inner.nbytes), ctypes.c_void_p(resident.ctypes.data)
    )
    looked_at = np.flatnonzero(resident)
    if failed or len(looked_at) > _LOOKED_AT:
        return True
    edges = part[:head].any() or part[head + inner.nbytes :].any()
    return bool(edges or inner.reshape(count, size)[looked_at].any())
