"""Libraries' own kinds of tensors and parameters, such as 4-bit weights or images with a header, of a fake tensor."""

import types
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from tightfit.vgpu.assign import assign


def install() -> None:
    """Let `Tensor._make_subclass(kind, data)` keep a fake tensor fake: torch refuses to change its kind."""
    usual: Callable[..., Tensor] = torch.Tensor._make_subclass

    def make(cls: type[Tensor], data: Tensor, requires_grad: bool = False, **kwargs: object) -> Tensor:
        """Dynamo compares these names with its own, and torch's name is `require_grad`."""
        if not isinstance(data, FakeTensor) or issubclass(cls, FakeTensor):
            return usual(cls, data, **{"require_grad": requires_grad, **kwargs})
        made = data.detach()
        _become(made, _fake_kind(cls))
        return made.requires_grad_(bool(kwargs.get("require_grad", requires_grad)))

    assign(torch.Tensor, _make_subclass=staticmethod(make))
    _let_kinds_be_taken()


def _let_kinds_be_taken() -> None:
    """Let `as_subclass` make a kind of a fake tensor, and the kind itself of a copy on the host."""
    usual: Callable[[Tensor, type[Tensor]], Tensor] = torch.Tensor.as_subclass

    @wraps(usual)
    def as_subclass(self: Tensor, cls: type[Tensor]) -> Tensor:
        if not isinstance(self, FakeTensor):
            return usual(self, _kind_on_host(cls))
        with torch._C.DisableTorchFunctionSubclass():
            made: Tensor = torch.ops.aten.alias.default(self)
        if cls is torch.Tensor:
            _of_fake[made] = dict(vars(made))
        else:
            _become(made, cls if issubclass(cls, FakeTensor) else _fake_kind(cls))
        return made

    assign(torch.Tensor, as_subclass=as_subclass)
    assign(FakeTensor, __getattr__=_found_nowhere)
    assign(torch, as_subclass=lambda input, cls: as_subclass(input, cls))  # with torch's names


def is_own_kind(tensor: Tensor) -> bool:
    """Return True for a tensor that `_make_subclass` made fake."""
    return isinstance(tensor, _Kept)


def same_kind(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value` as a tensor of the kind of another one, with its attributes."""
    made = value.detach()
    _become(made, type(tensor))
    vars(made).update(vars(tensor))
    return made.requires_grad_(tensor.requires_grad)


_of_fake = WeakIdKeyDictionary()
"""Attributes by which tensors of fake kinds are fake: a library may copy or replace its tensor's `__dict__`."""


def _found_nowhere(tensor: FakeTensor, name: str) -> object:
    """Return an attribute that is not in a fake tensor's `__dict__`."""
    if name in (kept := _of_fake.get(tensor, {})):
        return kept[name]
    raise AttributeError(f"{type(tensor).__name__!r} object has no attribute {name!r}")


def _become(made: Tensor, kind: type[Tensor]) -> None:
    _of_fake[made] = dict(vars(made))
    vars(made).clear()
    assign(made, __class__=kind)


def exchange(one: Tensor, other: Tensor) -> None:
    """Swap by what two tensors are fake, as their contents are swapped."""
    mine, theirs = _of_fake.pop(one, None), _of_fake.pop(other, None)
    for tensor, kept in ((one, theirs), (other, mine)):
        if kept is not None:
            _of_fake[tensor] = kept


class _Kept:
    """Marks the fake kinds, which name the kind that they stand for."""

    kind_on_host: type[Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: Sequence[type], args: tuple[object, ...] = (), kwargs: Any = None
    ) -> object:
        """Return results of this kind, as tensors do. Torch takes this from a kind with operators of its own."""
        return Tensor.__torch_function__.__func__(cls, func, types, args, kwargs)  # type: ignore[attr-defined]


def _kind_on_host(kind: type[Tensor]) -> type[Tensor]:
    return kind.kind_on_host if issubclass(kind, _Kept) else kind


@cache
def _fake_kind(kind: type[Tensor]) -> type[Tensor]:
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "kind_on_host": kind}
    made: type[Tensor] = types.new_class(
        kind.__name__, (kind, _Kept, FakeTensor), {}, lambda names: names.update(named)
    )
    return made
