"""The kernels of bitsandbytes on the virtual card: its Python code allocates for them, and nothing is launched."""

import ctypes
import mmap
from collections.abc import Callable
from types import ModuleType

from tightfit.vgpu.assign import assign
from tightfit.vgpu.on_import import after_import


def install() -> None:
    """Replace its native library when the script imports it: kernels would read memory that there is not."""
    after_import("bitsandbytes.cextension", _replace)


def _replace(module: ModuleType) -> None:
    assign(module, lib=_Kernels())


class _Kernels:
    """Answers as the library of a CUDA build."""

    compiled_with_cuda = True

    def __init__(self) -> None:
        self._managed: list[mmap.mmap] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments: 0

    def cget_managed_ptr(self, nbytes: ctypes.c_size_t) -> int:
        """Return the address of memory for a paged optimizer's state, which the caching allocator does not hold."""
        memory = mmap.mmap(-1, max(nbytes.value, 1))
        self._managed.append(memory)
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))
