"""Kernels of a run: how many there are, their floating-point operations and the bytes they move.

`torch.utils.flop_counter` counts matrix products and attention; a causal mask halves the work of fused attention.
Every kernel reads its inputs and writes its outputs once. Views and empty tensors need no kernel.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry

from tightfit.kernels.launch import Exchange, Kernel, Place
from tightfit.kernels.temporaries import tensors_in

if TYPE_CHECKING:
    from torch import FunctionSchema, ScriptObject
    from torch._ops import OpOverload

    from tightfit.kernels.temporaries import Argument

_NO_KERNEL = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::detach",
    "aten::lift_fresh",
    "aten::_unsafe_view",
}
_EXCHANGES: dict[str, Exchange] = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::broadcast_": "broadcast",
}
"""Collectives by which cards train together."""
_BY_INDEX = {"aten::gather", "aten::embedding", "aten::index_select", "aten::scatter_add_", "aten::nll_loss_forward"}
"""Operators that touch only the elements an index names: as many as the smaller of their tensors has."""


def kernel_of(
    func: "OpOverload", args: "Sequence[Argument]", kwargs: "Mapping[str, Argument]", out: "Argument"
) -> Kernel | None:
    """Return the kernel behind one operator, or None if it needs none."""
    schema = func._schema
    if schema.name in _NO_KERNEL or _is_view(schema):
        return None
    if func.namespace == "c10d":
        return _exchange(schema, args)
    tensors = _with_storage((*args, *kwargs.values(), out))
    formula = flop_registry.get(func._overloadpacket)
    flops = 0
    if formula is not None:
        flops = int(formula(*args, **{k: v for k, v in kwargs.items() if k != "generator"}, out_val=out))
        flops //= 2 if _is_causal(schema, args, kwargs) else 1
    nbytes = _bytes(tensors)
    if schema.name in _BY_INDEX:
        results = _with_storage((out,))
        indices = [tensor for tensor in tensors if tensor.dtype == torch.int64]
        nbytes = 3 * min(_bytes(results), max(_bytes([index]) for index in indices) if indices else nbytes)
        if schema.name == "aten::embedding":
            nbytes = 2 * _bytes(results)
    return Kernel(flops, nbytes, _dtype(tensors), "attention" in schema.name, _place(tensors))


def _exchange(schema: "FunctionSchema", args: "Sequence[Argument]") -> Kernel | None:
    """Return a collective between cards, with the bytes of the whole tensor; None for other uses of process groups."""
    exchange = _EXCHANGES.get(schema.name)
    tensors = _with_storage(args)
    if exchange is None or not tensors or all(tensor.device.type == "cpu" for tensor in tensors):
        return None
    from torch.distributed import ProcessGroup, get_process_group_ranks  # only where there are several cards

    names = [argument.name for argument in schema.arguments]
    group = ProcessGroup.unbox(cast("ScriptObject", args[names.index("process_group")]))
    ranks = get_process_group_ranks(group)
    nbytes = max(tensor.numel() * tensor.element_size() for tensor in tensors)
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    return Kernel(0, nbytes, _dtype(tensors), exchange=exchange, ranks=len(ranks), stride=stride)


def fused_kernel(tensors: Iterable[Tensor]) -> Kernel:
    """Return the work of one kernel that Inductor wrote, by the buffers it is called with."""
    tensors = list(tensors)
    return Kernel(0, _bytes(tensors), _dtype(tensors))


def _is_causal(schema: "FunctionSchema", args: "Sequence[Argument]", kwargs: "Mapping[str, Argument]") -> bool:
    """Return True for attention that skips the elements above the diagonal."""
    names = [argument.name for argument in schema.arguments]
    if "is_causal" not in names:
        return False
    place = names.index("is_causal")
    return bool(args[place] if place < len(args) else kwargs.get("is_causal", False))


def _with_storage(values: "Iterable[Argument]") -> list[Tensor]:
    """List the tensors that have a storage, in values and their lists."""
    return [each for each in tensors_in(values) if each.layout is torch.strided]


def _is_view(schema: "FunctionSchema") -> bool:
    returns = [each.alias_info for each in schema.returns]
    return bool(returns) and all(info is not None and not info.is_write for info in returns)


def _bytes(tensors: list[Tensor]) -> int:
    """Bytes of the elements of each tensor once. An expanded tensor counts the bytes it has in memory."""
    by_storage: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key, held = storage._cdata, storage.nbytes()
        by_storage[key] = min(by_storage.get(key, 0) + tensor.numel() * tensor.itemsize, held)
    return sum(by_storage.values())


def _place(tensors: list[Tensor]) -> Place:
    on_host = {_where(tensor).type == "cpu" for tensor in tensors if tensor.dim()}
    if len(on_host) == 2:
        return "link"
    return "host" if on_host == {True} else "device"


def _where(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device  # which is slow to ask a fake one


def _dtype(tensors: list[Tensor]) -> str:
    found = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    return str(found).removeprefix("torch.")
