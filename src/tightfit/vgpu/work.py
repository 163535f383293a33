"""What the kernels of a run would do: floating-point operations, bytes moved, and how many there are.

Matrix products and attention count as `torch.utils.flop_counter` does; every kernel reads its inputs and writes its
outputs once. Views and empty tensors take no kernel.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_NO_KERNEL = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::detach", "aten::lift_fresh", "aten::_unsafe_view",
}  # fmt: skip
_BY_INDEX = {"aten::gather", "aten::embedding", "aten::index_select", "aten::scatter_add_", "aten::nll_loss_forward"}
"""Operators that touch only the elements that an index names: as many as the smaller of their tensors has."""


Place = Literal["device", "host", "link"]


@dataclass(frozen=True)
class Kernel:
    """One kernel's work."""

    flops: int
    nbytes: int
    """Read and written."""
    dtype: str
    """Of its first input that is no whole number."""
    is_attention: bool = False
    """Fused attention, which reaches a smaller share of the peak than a matrix product."""
    place: Place = "device"
    """Where its tensors are; `link` for a copy between host and device."""


Observer = Callable[[Kernel], None]
"""Hears of every kernel of the virtual device."""


def kernel_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Kernel | None:
    """The kernel behind one operator, or None if it takes none."""
    schema = func._schema
    if schema.name in _NO_KERNEL or _is_view(schema):
        return None
    tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if _has_storage(leaf)]
    formula = flop_registry.get(func._overloadpacket)
    flops = 0
    if formula is not None:
        flops = int(formula(*args, **{k: v for k, v in kwargs.items() if k != "generator"}, out_val=out))
    nbytes = _bytes(tensors)
    if schema.name in _BY_INDEX:
        results = [leaf for leaf in tree_leaves(out) if _has_storage(leaf)]
        indices = [tensor for tensor in tensors if tensor.dtype == torch.int64]
        nbytes = 3 * min(_bytes(results), max(_bytes([index]) for index in indices) if indices else nbytes)
        if schema.name == "aten::embedding":
            nbytes = 2 * _bytes(results)
    return Kernel(flops, nbytes, _dtype(tensors), "attention" in schema.name, _place(tensors))


def fused_kernel(tensors: Iterable[Tensor]) -> Kernel:
    """One kernel that Inductor wrote, by the buffers it is called with."""
    tensors = list(tensors)
    return Kernel(0, _bytes(tensors), _dtype(tensors))


def _has_storage(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _is_view(schema: Any) -> bool:
    returns = [each.alias_info for each in schema.returns]
    return bool(returns) and all(info is not None and not info.is_write for info in returns)


def _bytes(tensors: list[Tensor]) -> int:
    """Of the elements of each tensor once, an expanded one by what it has in memory."""
    by_storage: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        nbytes = min(tensor.numel() * tensor.element_size(), storage.nbytes())
        by_storage[storage._cdata] = min(by_storage.get(storage._cdata, 0) + nbytes, storage.nbytes())
    return sum(by_storage.values())


def _place(tensors: list[Tensor]) -> Place:
    on_host = {tensor.device.type == "cpu" for tensor in tensors if tensor.dim()}
    if len(on_host) == 2:
        return "link"
    return "host" if on_host == {True} else "device"


def _dtype(tensors: list[Tensor]) -> str:
    found = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    return str(found).removeprefix("torch.")
