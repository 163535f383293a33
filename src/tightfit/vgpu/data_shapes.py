"""Operators with a result as long as the data decide: nonzero, mask indices, unique, repeat_interleave, bincount.

Known data give the true length. Unknown data give the largest one (a mask is true everywhere, all values differ),
which counts as made up. Indexing by a mask takes the memory of `nonzero`, as on a card: 8 bytes for each element that
is picked and each dimension of the mask (`expandTensors` of ATen's indexing).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.kernels.temporaries import Argument, Arguments, Options

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

    def execute(self, func: OpOverload, args: Arguments, kwargs: Options) -> Argument: ...
    def make(self, func: OpOverload, args: Arguments, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...
    def length(self, played: int, largest: int | None = None) -> int: ...
    def mode(self) -> "TorchDispatchMode": ...


Handler = Callable[..., Argument]
"""A function of (device, operator, *args of the operator, **kwargs of the operator)."""

_MASKS = (torch.bool, torch.uint8)
_MOST_PLACES = 1 << 16
"""Elements of a mask up to which the places that it has if it is true everywhere are kept: a script may read them."""
Indices = Sequence[Tensor | None]


def _nonzero(device: Device, func: OpOverload, source: Tensor) -> Tensor:
    true = device.values.exactly(source)
    places = None if true is None else true.nonzero()
    most = device.values.most_true(source)
    count = device.length(most, most) if places is None else len(places)
    by_dimension = device.make(func, (source,), (source.dim(), count), torch.int64)
    with device.fake:
        out = by_dimension.t()
    if places is not None:
        device.values.learn(out, places)
    elif source.numel() <= _MOST_PLACES:
        device.values.learn(out, torch.ones(source.shape, device="cpu").nonzero()[:count], made_up=True)
    return out


def _places(device: Device, mask: Tensor) -> Tensor:
    places = device.execute(aten.nonzero.default, (mask,), {})
    assert isinstance(places, Tensor)
    return places


def _masked_select(device: Device, func: OpOverload, source: Tensor, mask: Tensor) -> Tensor:
    with device.fake:
        spread: Tensor = aten.broadcast_tensors([source, mask])[1]
    return device.make(func, (source, mask), (_places(device, spread).shape[0],), source.dtype)


def _index(
    device: Device, func: OpOverload, source: Tensor, indices: Indices, *written: Argument, **kwargs: Argument
) -> Argument:
    """Index or write with masks turned into integers; None if there is no mask."""
    if not any(index is not None and index.dtype in _MASKS for index in indices):
        return None
    if written and func._schema.is_mutable and _fills(device, source, indices, *written[:2]):
        return source
    plain: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in _MASKS
        plain += _columns(device, index, source.device) if index is not None and is_mask else [index]
    if written:
        plain = _cut(device, source, plain, written[0])
    return device.execute(func, (source, plain, *written), kwargs)


def _columns(device: Device, mask: Tensor, where: torch.device) -> tuple[Tensor, ...]:
    if isinstance(mask, FakeTensor):
        places = _places(device, mask)
        with device.fake:
            return places.unbind(1)
    with device.mode():
        return tuple(column.to(where) for column in mask.nonzero().unbind(1))


def _fills(device: Device, source: Tensor, indices: Indices, value: Argument, accumulate: Argument = False) -> bool:
    """Run `x[mask] = 0` as a masked_fill (`canDispatchToMaskedFill`), which takes nothing; False if it is none."""
    given = [(position, index) for position, index in enumerate(indices) if index is not None]
    assert isinstance(value, Tensor)
    if accumulate or len(given) != 1 or value.numel() != 1 or value.device.type != "cpu":
        return False
    before, index = given[0]
    behind = source.dim() - before - index.dim()
    with device.mode():
        mask = index.to(source.device)
        mask = mask.reshape(mask.shape + (1,) * behind).bool()
    device.execute(aten.masked_fill_.Scalar, (source, mask, value.item()), {})
    return True


def _cut(device: Device, source: Tensor, indices: list[Tensor | None], values: Argument) -> list[Tensor | None]:
    """Shorten indices of made-up length to the number of values that are written there."""
    assert isinstance(values, Tensor)
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


def _unique2(
    device: Device,
    func: OpOverload,
    source: Tensor,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> tuple[Tensor, ...]:
    args = (source, sorted, return_inverse, return_counts)
    return _unique(device, func, args, (source.numel(),), return_inverse, return_counts)


def _unique1(
    device: Device, func: OpOverload, source: Tensor, sorted: bool = True, return_inverse: bool = False
) -> tuple[Tensor, ...]:
    return _unique(device, func, (source, sorted, return_inverse), (source.numel(),), return_inverse, False)[:2]


def _unique_consecutive(
    device: Device,
    func: OpOverload,
    source: Tensor,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> tuple[Tensor, ...]:
    args = (source, return_inverse, return_counts, dim)
    shape = (source.numel(),) if dim is None else tuple(source.shape)
    return _unique(device, func, args, shape, return_inverse, return_counts, dim)


def _unique_dim(
    device: Device, func: OpOverload, source: Tensor, dim: int, sorted: bool = True, *flags: bool
) -> tuple[Tensor, ...]:
    """Return inverse and counts whatever the flags are, as torch does."""
    return _unique(device, func, (source, dim, sorted, *flags), tuple(source.shape), True, True, dim)


def _unique_dim_consecutive(
    device: Device,
    func: OpOverload,
    source: Tensor,
    dim: int,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> tuple[Tensor, ...]:
    args = (source, dim, return_inverse, return_counts)
    return _unique(device, func, args, tuple(source.shape), return_inverse, return_counts, dim)


def _unique(
    device: Device,
    func: OpOverload,
    args: Arguments,
    largest: tuple[int, ...],
    has_inverse: bool,
    has_counts: bool,
    dim: int | None = None,
) -> tuple[Tensor, ...]:
    """Return the values, their inverse and their counts; of the shape `largest` where no value is known to repeat."""
    source = args[0]
    assert isinstance(source, Tensor)
    true = device.values.exactly(source)
    answers: tuple[Tensor, ...] = ()
    if true is None:
        inverse = tuple(source.shape) if dim is None else (source.shape[dim],)
        elements = most = source.numel() if dim is None else source.shape[dim]
        if dim is None and (bound := device.values.bound(source)) is not None:
            most = min(most, bound)
        length = device.length(most, most)
        different = (length,) if dim is None else (*largest[:dim], length, *largest[dim:][1:])
        shapes = [different, inverse if has_inverse else (0,), (length,) if has_counts else (0,)]
    else:
        answers = func(true, *args[1:])
        shapes = [tuple(answer.shape) for answer in answers]
    dtypes = (source.dtype, torch.int64, torch.int64)
    out = tuple(device.make(func, args, shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=False))
    for tensor, answer in zip(out, answers, strict=False):
        device.values.learn(tensor, answer)
    if not answers and has_counts:
        device.values.learn(out[2], _counts_of(elements, length), made_up=True)
    return out


def _counts_of(elements: int, values: int) -> Tensor:
    """Make up how often each value occurs, so that the counts add up."""
    counts = torch.full((values,), elements // max(1, values), dtype=torch.int64, device="cpu")
    counts[:1] += elements - int(counts.sum())
    return counts


def _repeat_interleave(device: Device, func: OpOverload, repeats: Tensor, *, output_size: int | None = None) -> Tensor:
    true = device.values.exactly(repeats)
    if output_size is not None:
        length = output_size
    elif true is not None:
        length = int(true.sum())
    else:
        length = device.length(repeats.numel(), None if repeats.numel() else 0)
    out = device.make(func, (repeats,), (length,), repeats.dtype)
    if true is not None:
        device.values.learn(out, torch.repeat_interleave(true))
    return out


def _bincount(
    device: Device, func: OpOverload, source: Tensor, weights: Tensor | None = None, minlength: int = 0
) -> Tensor:
    """Count up to `minlength` where the largest value is unknown: nothing else bounds it."""
    true = device.values.exactly(source)
    length = minlength
    if true is None:
        bound = device.values.bound(source)
        most = minlength if bound is None else max(minlength, bound)
        length = max(minlength, device.length(most, None if bound is None else most))
    elif true.numel():
        length = max(length, int(true.max()) + 1)
    dtype = torch.int64 if weights is None else (torch.float32 if weights.dtype == torch.float32 else torch.float64)
    out = device.make(func, (source,), (length,), dtype)
    if true is not None and weights is None:
        device.values.learn(out, torch.bincount(true, minlength=minlength))
    elif weights is None:
        device.values.learn(out, _counts_of(source.numel(), length), made_up=True)
    return out


def _pack(
    device: Device, func: OpOverload, padded: Tensor, lengths: Tensor, batch_first: bool
) -> tuple[Tensor, Tensor]:
    """Drop the padding of sequences (PackedSequence.cpp). Their lengths are on the host."""
    batch, longest = padded.shape[:2] if batch_first else (padded.shape[1], padded.shape[0])
    true = device.values.exactly(lengths)
    known = [device.length(longest, longest)] * batch if true is None else [int(each) for each in true.tolist()]
    alive = [sum(each > step for each in known) for step in range(max(known))]
    data = device.make(func, (padded, lengths), (sum(known), *padded.shape[2:]), padded.dtype)
    return data, torch.tensor(alive, dtype=torch.int64, device="cpu")


_MEAN = 1


def _bag_backward(
    device: Device,
    func: OpOverload,
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor,
    offset2bag: Tensor,
    bag_size: Tensor,
    maximum_indices: Tensor,
    rows: int,
    scale: bool,
    mode: int,
    sparse: bool,
    weights: Tensor | None,
    padding_idx: int = -1,
) -> Argument:
    """Take a sparse gradient apart as EmbeddingBag.cpp does; its indices are those of the input."""
    if not sparse:
        return None
    with device.mode():
        values = grad.index_select(0, offset2bag)
        if mode == _MEAN:
            values *= bag_size.to(values.dtype).reciprocal().unsqueeze(1).index_select(0, offset2bag)
        if weights is not None:
            values *= weights.unsqueeze(1)
        made: Tensor = aten.embedding_backward(values, indices, rows, padding_idx, scale, True)
        return made


HANDLERS: dict[OpOverload, Handler] = {
    aten._pack_padded_sequence.default: _pack,
    aten._embedding_bag_backward.default: _bag_backward,
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _masked_select,
    aten.index.Tensor: _index,
    aten._unsafe_index.Tensor: _index,
    aten.index_put.default: _index,
    aten.index_put_.default: _index,
    aten._index_put_impl_.default: _index,
    aten._unsafe_index_put.default: _index,
    aten._unique.default: _unique1,
    aten._unique2.default: _unique2,
    aten.unique_consecutive.default: _unique_consecutive,
    aten.unique_dim.default: _unique_dim,
    aten.unique_dim_consecutive.default: _unique_dim_consecutive,
    aten.repeat_interleave.Tensor: _repeat_interleave,
    aten.bincount.default: _bincount,
}
"""Replacements of operators; an answer of None leaves it to the operator itself."""
