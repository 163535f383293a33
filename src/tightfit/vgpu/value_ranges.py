"""Smallest and largest whole number of tensors that the host uploaded: indices of nodes, tokens or classes.

A graph network allocates `int(edge_index.max()) + 1` rows; a made-up 0 would hide them.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._ops import OpOverload

_LOOKED_AT = 1 << 25
"""Elements of a host tensor up to which its ends are looked for: 20 ms."""

aten = torch.ops.aten

_LARGEST = {aten.max.default, aten.amax.default}
_ENDS = _LARGEST | {aten.min.default, aten.amin.default}


class Ranges:
    """The ends of whole numbers on the device, as long as nobody writes there."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[torch.UntypedStorage, tuple[int, int, int]] = WeakKeyDictionary()

    def learn(self, tensor: Tensor, source: Tensor) -> None:
        """Keep the ends of `source`, of which `tensor` is a copy on the device."""
        is_whole = not (source.is_floating_point() or source.is_complex() or source.dtype == torch.bool)
        if is_whole and source.layout is torch.strided and 0 < source.numel() <= _LOOKED_AT and _can_tell(tensor):
            low, high = (int(end) for end in source.aminmax())
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


def _can_tell(tensor: Tensor) -> bool:
    """Return True for a tensor that counts how often it was written."""
    return tensor.layout is torch.strided and not tensor.is_inference()
