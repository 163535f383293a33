"""Host tensors that a script pinned: without a driver there is no such memory, so they are only marked."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_pinned: WeakKeyDictionary[torch.UntypedStorage, bool] = WeakKeyDictionary()


def pin(tensor: Tensor) -> Tensor:
    """Mark a host tensor as pinned. RuntimeError, as PyTorch's, for one of the card."""
    if tensor.device.type == "cuda":
        raise RuntimeError(f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned")
    if tensor.layout is torch.strided and tensor.device.type == "cpu":
        _pinned[tensor.untyped_storage()] = True
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Return True for a tensor in memory that was marked."""
    return tensor.layout is torch.strided and tensor.untyped_storage() in _pinned
