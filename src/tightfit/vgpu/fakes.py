"""Fake tensors: their mode, shared by the threads of a script, and questions about an operator's arguments."""

import threading
from collections.abc import Iterable, Iterator
from functools import cache
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tightfit.kernels.temporaries import Argument, Arguments, Options

_COMPOSITE = "CompositeImplicitAutograd"


class SharedFakeMode(FakeTensorMode):
    """A fake mode for all threads of a script; `lock` lets one of them in at a time.

    Torch's own mode asserts that no other thread is in a kernel, and keeps its stack of modes in the object.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._thread = threading.local()
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False  # `ResultCache` is asked before; to fill torch's takes longer than most shapes

    @property
    def in_kernel_invocation(self) -> bool:
        return getattr(self._thread, "in_kernel", False)

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, value: bool) -> None:
        self._thread.in_kernel = value

    def create_symbolic_nested_int(self, *, nt_tensor_id: int | None = None) -> torch.SymInt:
        """Return the length of a ragged dimension; torch's own is a symbol of a graph that is being traced."""
        number = self.nt_tensor_id_counter if nt_tensor_id is None else nt_tensor_id
        self.nt_tensor_id_counter = max(self.nt_tensor_id_counter, number + 1)
        nested: torch.SymInt = torch._C._get_nested_int(number, 1)
        return nested

    def __enter__(self) -> Self:
        self.lock.acquire()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self.lock.release()


@cache
def is_wrapper(kind: type) -> bool:
    """Return True for a tensor class that takes operators apart itself, such as DTensor."""
    return (
        issubclass(kind, Tensor)
        and not issubclass(kind, FakeTensor)
        and kind.__module__ != "torch._subclasses.functional_tensor"  # a compiler's
        and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
    )


def plain(tensor: Tensor) -> Tensor:
    """Return a host tensor as one of no library's kind."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or is_wrapper(type(tensor)):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


@cache
def is_composite(func: OpOverload, device: str) -> bool:
    """Return True if a device runs an operator as several others, and not as one kernel.

    Autograd takes such operators apart; tensors of inference mode do not pass it. Decompositions in Python are for
    compilers: eager code runs `upsample_nearest2d` as one kernel, also where this build of torch has none for CUDA.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func._name, _COMPOSITE) and not has_kernel(func._name, device.upper())


def fakes(values: Iterable[Argument]) -> Iterator[FakeTensor]:
    for value in values:
        if isinstance(value, FakeTensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from fakes(value)


def compressed_parts(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places and values of a matrix that is compressed by row (CSR, BSR) or by column (CSC, BSC)."""
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def is_on_meta(args: Arguments, device: Argument) -> bool:
    """Return True for an operator that gives a result without memory: it needs no virtual device."""
    if isinstance(device, torch.device):
        return device.type == "meta"
    return any(isinstance(each, Tensor) and each.is_meta for each in args)


def has_fake(values: Iterable[Argument]) -> bool:
    return next(fakes(values), None) is not None


def is_on_card(args: Arguments, kwargs: Options) -> bool:
    """Return False if all fake tensors are in host memory, where a script may keep some."""
    found = list(fakes(args))
    if kwargs:
        found += fakes(kwargs.values())
    if any(tensor.layout is not torch.strided for tensor in found):
        return False  # the memory of sparse kernels is not known
    return not found or any(tensor.fake_device.type != "cpu" for tensor in found)
