"""Libraries' own kinds of tensors and parameters, such as 4-bit weights, made of a fake tensor."""

import types
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.vgpu.assign import assign


def install() -> None:
    """Let `Tensor._make_subclass(kind, data)` keep a fake tensor fake: torch refuses to change its kind."""
    usual: Callable[..., Tensor] = torch.Tensor._make_subclass

    def make(cls: type[Tensor], data: Tensor, requires_grad: bool = False, **kwargs: object) -> Tensor:
        """Dynamo compares these names with its own, and torch's name is `require_grad`."""
        if not isinstance(data, FakeTensor) or issubclass(cls, FakeTensor):
            return usual(cls, data, **{"require_grad": requires_grad, **kwargs})
        made = data.detach()
        assign(made, __class__=_fake_kind(cls))
        return made.requires_grad_(bool(kwargs.get("require_grad", requires_grad)))

    assign(torch.Tensor, _make_subclass=staticmethod(make))


def is_own_kind(tensor: Tensor) -> bool:
    """Return True for a tensor that `_make_subclass` made fake."""
    return isinstance(tensor, _Kept)


def same_kind(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value` as a tensor of the kind of another one, with its attributes."""
    made = value.detach()
    of_fake = dict(vars(made))
    assign(made, __class__=type(tensor))
    vars(made).update({**vars(tensor), **of_fake})
    return made.requires_grad_(tensor.requires_grad)


class _Kept:
    """Marks the fake kinds."""


@cache
def _fake_kind(kind: type[Tensor]) -> type[Tensor]:
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: type[Tensor] = types.new_class(
        kind.__name__, (kind, FakeTensor, _Kept), {}, lambda names: names.update(named)
    )
    return made
