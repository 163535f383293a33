"""Operators with a result as long as the data decide: nonzero, masks as indices, unique, repeat_interleave, bincount.

Where the data are known the answer is true. Where they are not, it is the largest possible (a mask is true everywhere,
all values differ), and counted as made up. Indexing by a mask takes the memory of `nonzero` on a card, and so it does
here: 8 bytes for each element that is picked and each dimension of the mask (`expandTensors` of ATen's indexing).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from tightfit.vgpu.known_values import Values

aten = torch.ops.aten


class Device(Protocol):
    """The part of the virtual device that an operator's answer needs."""

    @property
    def fake(self) -> "FakeTensorMode": ...

    where: torch.device
    values: "Values"

    def execute(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def make(self, func: OpOverload, args: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...
    def count_made_up(self, what: str) -> None: ...
    def mode(self) -> "TorchDispatchMode": ...


Handler = Callable[[Device, OpOverload, tuple[Any, ...], dict[str, Any]], Any]

_MADE_UP = "the length of a result that depends on data"
_MASKS = (torch.bool, torch.uint8)


def _nonzero(device: Device, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    source: Tensor = args[0]
    true = device.values.exactly(source)
    if true is None:
        device.count_made_up(_MADE_UP)
    places = None if true is None else true.nonzero()
    count = source.numel() if places is None else len(places)
    by_dimension = device.make(func, args, (source.dim(), count), torch.int64)
    with device.fake:
        out = by_dimension.t()
    if places is not None:
        device.values.learn(out, places)
    return out


def _masked_select(device: Device, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    source, mask = args
    shape: tuple[int, ...] = torch.broadcast_shapes(source.shape, mask.shape)  # type: ignore[no-untyped-call]
    true = device.values.exactly(mask)
    with device.fake:
        spread = mask.expand(shape)
    if true is not None and isinstance(mask, FakeTensor):
        device.values.learn(spread, true.expand(shape))
    places = device.execute(aten.nonzero.default, (spread,), {})
    return device.make(func, args, (places.shape[0],), source.dtype)


def _index(device: Device, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Masks among the indices, put as integers; None if there is no mask."""
    source, indices, *rest = args
    if not any(isinstance(index, Tensor) and index.dtype in _MASKS for index in indices):
        return None
    is_write = bool(rest)
    if is_write and (filled := _as_fill(device, func, args)) is not None:
        return filled
    plain: list[Tensor | None] = []
    for index in indices:
        plain += _columns(device, index) if index is not None and index.dtype in _MASKS else [index]
    if is_write:
        plain = _cut(device, source, plain, rest[0])
    return device.execute(func, (source, plain, *rest), kwargs)


def _columns(device: Device, mask: Tensor) -> list[Tensor | None]:
    if isinstance(mask, FakeTensor):
        places = device.execute(aten.nonzero.default, (mask,), {})
        with device.fake:
            return list(places.unbind(1))
    with device.mode():
        return [column.to(device.where) for column in mask.nonzero().unbind(1)]


def _as_fill(device: Device, func: OpOverload, args: tuple[Any, ...]) -> Any:
    """`x[mask] = 0` is a masked_fill (`canDispatchToMaskedFill`) and takes nothing."""
    source, indices, value, accumulate = (*args, False)[:4]
    given = [index for index in indices if index is not None]
    if accumulate or len(given) != 1 or value.numel() != 1 or value.device.type != "cpu" or not func._schema.is_mutable:
        return None
    before = next(position for position, index in enumerate(indices) if index is not None)
    behind = source.dim() - before - given[0].dim()
    with device.mode():
        mask = given[0].to(device.where)
        mask = mask.reshape(mask.shape + (1,) * behind).bool()
    device.execute(aten.masked_fill_.Scalar, (source, mask, value.item()), {})
    return source


def _cut(device: Device, source: Tensor, indices: list[Tensor | None], values: Tensor) -> list[Tensor | None]:
    """Indices of made-up length as long as the values that are written there."""
    places = [position for position, index in enumerate(indices) if index is not None]
    adjacent = places[-1] - places[0] + 1 == len(places)
    behind = source.dim() - (places[-1] + 1 if adjacent else len(places))
    length = values.shape[-behind - 1] if values.dim() > behind else 1
    if length == 1:
        return indices
    with device.fake:
        return [
            index[:length] if isinstance(index, FakeTensor) and index.dim() == 1 and len(index) > length else index
            for index in indices
        ]


def _unique(device: Device, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    given = _by_name(func, args, kwargs)
    source, dim = given["self"], given.get("dim")
    true = device.values.exactly(source)
    if true is not None:
        answers = func(true, *args[1:], **kwargs)
        shapes = [tuple(answer.shape) for answer in answers]
    else:
        device.count_made_up(_MADE_UP)
        answers = (None, None, None)
        length = source.numel() if dim is None else source.shape[dim]
        whole = tuple(source.shape)
        shapes = [
            (length,) if dim is None else whole,
            (whole if dim is None else (length,))
            if given["return_inverse"] or func is aten.unique_dim.default
            else (0,),
            (length,) if given["return_counts"] or func is aten.unique_dim.default else (0,),
        ]
    out = tuple(
        device.make(func, args, shape, dtype)
        for shape, dtype in zip(shapes, (source.dtype, torch.int64, torch.int64), strict=True)
    )
    for tensor, answer in zip(out, answers, strict=True):
        if answer is not None:
            device.values.learn(tensor, answer)
    return out


def _repeat_interleave(device: Device, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    repeats: Tensor = args[0]
    true = device.values.exactly(repeats)
    given: int | None = kwargs.get("output_size")
    if given is not None:
        length = given
    elif true is not None:
        length = int(true.sum())
    else:
        device.count_made_up(_MADE_UP)
        length = repeats.numel()
    out = device.make(func, args, (length,), repeats.dtype)
    if true is not None:
        device.values.learn(out, torch.repeat_interleave(true))
    return out


def _bincount(device: Device, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Nothing bounds the largest value: where it is unknown, `minlength` is what the script expects."""
    given = _by_name(func, args, kwargs)
    weights, length = given["weights"], given["minlength"]
    true = device.values.exactly(given["self"])
    if true is None:
        device.count_made_up(_MADE_UP)
    elif true.numel():
        length = max(length, int(true.max()) + 1)
    dtype = torch.int64 if weights is None else (torch.float32 if weights.dtype == torch.float32 else torch.float64)
    return device.make(func, args, (length,), dtype)


def _by_name(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    arguments = func._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments}
    return given | dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs


HANDLERS: dict[OpOverload, Handler] = {
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _masked_select,
    aten.index.Tensor: _index,
    aten._unsafe_index.Tensor: _index,
    aten.index_put.default: _index,
    aten.index_put_.default: _index,
    aten._index_put_impl_.default: _index,
    aten._unsafe_index_put.default: _index,
    aten._unique2.default: _unique,
    aten.unique_consecutive.default: _unique,
    aten.unique_dim.default: _unique,
    aten.unique_dim_consecutive.default: _unique,
    aten.repeat_interleave.Tensor: _repeat_interleave,
    aten.bincount.default: _bincount,
}
"""Replacements of operators; an answer of None leaves it to the operator itself."""
