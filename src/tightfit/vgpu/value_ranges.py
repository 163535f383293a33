"""Smallest and largest whole number of tensors that the host uploaded: indices of nodes, tokens or classes.

A graph network allocates `int(edge_index.max()) + 1` rows; a made-up 0 would hide them. And positions that an operator
picks: they are distinct.
"""

import math
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._ops import OpOverload

from tightfit.kernels.temporaries import Argument, Arguments, Options

_LOOKED_AT = 1 << 25
"""Elements of a host tensor up to which its ends are looked for: 20 ms."""

_WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_WIDENED = {torch.uint16, torch.uint32}
"""Whole numbers whose ends torch finds on no host, such as tokens in files."""

aten = torch.ops.aten

_LARGEST = {aten.max.default, aten.amax.default}
_ENDS = _LARGEST | {aten.min.default, aten.amin.default}


_POSITIONS = {
    aten.argmax.default,
    aten.argmin.default,
    aten.max.dim,
    aten.min.dim,
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
    aten.argsort.default,
}
"""Operators whose last result are positions along a dimension of their first argument."""
_COPIES = {aten._to_copy.default, aten.clone.default}


class Ranges:
    """The ends of whole numbers on the device, as long as nobody writes there."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[torch.UntypedStorage, tuple[int, int, int]] = WeakKeyDictionary()
        self._bounds: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()
        """A number above all positions that an operator found."""

    def follow(self, func: OpOverload, args: Arguments, kwargs: Options, out: Argument) -> None:
        """Note a bound of the positions that an operator returns: predicted classes may be fewer than the samples."""
        if func not in _POSITIONS and func not in _COPIES:
            return
        positions, source = out[-1] if isinstance(out, tuple) else out, args[0]
        if not isinstance(positions, Tensor) or not isinstance(source, Tensor):
            return
        bound = _extent(func, args, kwargs, source) if func in _POSITIONS else self.bound(source)
        if bound is not None and positions.layout is torch.strided:
            self._bounds[positions.untyped_storage()] = bound

    def forget(self, storage: torch.UntypedStorage) -> None:
        """Drop the bound of positions that something was written to."""
        self._bounds.pop(storage, None)

    def bound(self, tensor: Tensor) -> int | None:
        """Return a number above all whole numbers in a tensor, of which none is below 0; None where none is known."""
        if tensor.dtype not in _WHOLE or tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()
        low, high, version = self._known.get(storage, (0, 0, -1)) if _can_tell(tensor) else (0, 0, -1)
        if low >= 0 and version >= 0 and version == tensor._version:
            return high + 1
        return self._bounds.get(storage)

    def learn(self, tensor: Tensor, source: Tensor) -> None:
        """Keep the ends of `source`, of which `tensor` is a copy on the device."""
        is_whole = source.dtype in _WHOLE or source.dtype in _WIDENED
        if is_whole and source.layout is torch.strided and 0 < source.numel() <= _LOOKED_AT and _can_tell(tensor):
            seen = source.to(torch.int64) if source.dtype in _WIDENED else source
            low, high = (int(end) for end in seen.aminmax())
            self._known[tensor.untyped_storage()] = low, high, tensor._version

    def end(self, func: OpOverload, source: object) -> tuple[int, bool] | None:
        """Return a tensor's `max()` or `min()`, and True if all numbers decided it; None if it is unknown.

        Of a part of the numbers it is the bound that all of them give.
        """
        if func not in _ENDS or not isinstance(source, Tensor) or not _can_tell(source):
            return None
        low, high, version = self._known.get(source.untyped_storage(), (0, 0, -1))
        if version != source._version:
            return None
        is_whole = source.numel() * source.element_size() == source.untyped_storage().nbytes()
        return high if func in _LARGEST else low, is_whole


def _extent(func: OpOverload, args: Arguments, kwargs: Options, source: Tensor) -> int:
    """Return the number of positions along the dimension of such an operator; without one, that of all elements."""
    place = next(place for place, each in enumerate(func._schema.arguments) if each.name == "dim")
    dim = args[place] if place < len(args) else kwargs.get("dim", func._schema.arguments[place].default_value)
    return source.shape[dim] if isinstance(dim, int) and source.dim() else source.numel()


_PUTS = {aten.index_put_.default, aten._index_put_impl_.default}
_SCATTERS = {aten.scatter_.value, aten.scatter_.src}
_UNIONS = {aten.bitwise_or.Tensor, aten.__or__.Tensor, aten.logical_or.default}
_BOTH = {aten.bitwise_and.Tensor, aten.__and__.Tensor, aten.logical_and.default}


class TrueCounts:
    """Bounds of the true elements of masks that places were written into, one by one, while they were zeros.

    A detector marks the few hundred boxes that it samples so, and asks later where they are.
    """

    def __init__(self) -> None:
        self._most: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()

    def most(self, mask: Tensor) -> int | None:
        """Return a number that the true elements of a mask do not exceed; None where none is known."""
        if mask.layout is not torch.strided:
            return None
        storage = mask.untyped_storage()
        return self._most.get(storage) if mask.numel() * mask.element_size() <= storage.nbytes() else None

    def written(self, func: OpOverload, args: Arguments, target: Tensor, *, was_zero: bool) -> None:
        """Note what an operator writes into `target`, which was nothing but zeros before if `was_zero`."""
        storage = target.untyped_storage()
        before = 0 if was_zero else self._most.pop(storage, None)
        more = _places_written(func, args) if before is not None and args and args[0] is target else None
        if before is not None and more is not None:
            self._most[storage] = before + more

    def follow(self, func: OpOverload, args: Arguments, out: Argument) -> None:
        """Note a bound of what an operator makes of masks."""
        if func not in _MADE_OF_MASKS or not isinstance(out, Tensor) or out.layout is not torch.strided:
            return
        parts = args[0] if func is aten.cat.default else args[: 1 if func in _COPIES else 2]
        assert isinstance(parts, (list, tuple))
        if not all(isinstance(each, Tensor) and each.numel() <= out.numel() for each in parts):
            return
        counts = [self.most(each) if each.shape == out.shape or func is aten.cat.default else None for each in parts]
        known = [count for count in counts if count is not None]
        if known and (func in _BOTH or len(known) == len(counts)):
            self._most[out.untyped_storage()] = min(known) if func in _BOTH else sum(known)


_MADE_OF_MASKS = _UNIONS | _BOTH | _COPIES | {aten.cat.default}


def _places_written(func: OpOverload, args: Arguments) -> int | None:
    """Return the number of elements that an operator writes by their places; None for any other operator."""
    if func in _SCATTERS:
        index = args[2]
        return index.numel() if isinstance(index, Tensor) else None
    if func not in _PUTS:
        return None
    target, places = args[:2]
    if not isinstance(target, Tensor) or not isinstance(places, (list, tuple)):
        return None
    indices = [each for each in places if isinstance(each, Tensor)]
    if len(indices) != len(places) or any(each.dtype in (torch.bool, torch.uint8) for each in indices):
        return None
    each_place = math.prod(target.shape[len(indices) :])
    return int(torch.broadcast_shapes(*(each.shape for each in indices)).numel()) * each_place


class _Picked(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dim: int
    extent: int
    """Positions to pick from."""
    version: int


_DIMS = {aten.topk.default: 2, aten.sort.default: 1, aten.sort.stable: 99}
"""Operators that return values and their positions, and the place of their dimension among the arguments."""


class Picks:
    """Positions of the largest values or of an order, which a script may read: any will do that differ from each other.

    They begin in the middle. A single one stays 0: it may be a token, and the last one of a vocabulary ends a text.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[torch.UntypedStorage, _Picked] = WeakKeyDictionary()

    def learn(self, func: OpOverload, args: Arguments, kwargs: Options, out: Argument) -> None:
        """Note the positions among an operator's results."""
        if func is aten.randperm.default:
            positions, source, dim = out, out, 0
        elif func is aten.multinomial.default and not (args[2] if len(args) > 2 else kwargs.get("replacement")):
            positions, source, dim = out, args[0], -1
        elif func in _DIMS and isinstance(out, tuple):
            positions, source = out[1], args[0]
            place = _DIMS[func]
            given = args[place] if place < len(args) else kwargs.get("dim", -1)
            dim = given if isinstance(given, int) else -1
        else:
            return
        if not (isinstance(positions, Tensor) and isinstance(source, Tensor)) or not positions.dim():
            return
        if positions.shape[dim] > 1 and _can_tell(positions):
            picked = _Picked(
                positions.shape, positions.stride(), dim % positions.dim(), source.shape[dim], positions._version
            )
            self._known[positions.untyped_storage()] = picked

    def read(self, tensor: Tensor) -> Tensor | None:
        """Return the host's version of such positions, or of a view of them; None for another tensor."""
        picked = self._known.get(tensor.untyped_storage()) if tensor.layout is torch.strided else None
        if picked is None or picked.version != tensor._version or tensor.dtype != torch.int64:
            return None
        count = picked.shape[picked.dim]
        along = (torch.arange(count, device="cpu") + picked.extent // 2) % picked.extent
        others = [count if dim == picked.dim else 1 for dim in range(len(picked.shape))]
        whole = torch.empty_strided(picked.shape, picked.stride, dtype=torch.int64, device="cpu")
        return whole.copy_(along.view(others)).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _can_tell(tensor: Tensor) -> bool:
    """Return True for a tensor that counts how often it was written."""
    return tensor.layout is torch.strided and not tensor.is_inference()
