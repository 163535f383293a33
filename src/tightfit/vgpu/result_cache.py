"""Results of operators on the virtual card, made again from the shapes of an equal call before.

A training step repeats the calls of the step before it, and of its other blocks. Torch's fake tensors remember calls,
too, but finding one again takes as long as several kernels' descriptions: a third of a dry run's time.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tightfit.kernels.temporaries import Argument, Arguments, Options

aten = torch.ops.aten
_MOST_CALLS = 50_000
"""Calls that are remembered; a script whose shapes never repeat would fill the memory of the host."""
_OWN_KINDS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
_CHANGE_SHAPES = (
    "resize",
    "_resize",
    "set_",
    "lift",
    "_nested",
    "_efficientzerotensor",
    "_sparse",
    "sparse",
    "to_sparse",
    "_to_sparse",
)
_QUANTISED = frozenset((torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4))
_PLAIN_OF_LISTS = (int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of arguments that decide shapes. The floats of operators on lists do not: bias corrections of each step."""
_PLAIN = (float, *_PLAIN_OF_LISTS)

_META = torch.device("meta")
_empty_strided, _make_subclass = torch.empty_strided, Tensor._make_subclass
"""Torch's own, from before scripts' calls are followed."""

Compute = Callable[[], Argument]


class _Same(NamedTuple):
    """The result is an argument, as of an operator in place."""

    place: int


class _Made(NamedTuple):
    """The result is a tensor of its own, or a view of an argument."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    viewed: int | None
    offset: int
    """Elements behind the beginning of that argument, where the call is moved to its start."""


class _Value(NamedTuple):
    """The result is no tensor."""

    value: int | float | None


_Recipe = _Same | _Made | _Value


class _Result(NamedTuple):
    kind: type | None
    """Type of several results, list or tuple; None for a single one."""
    parts: tuple["_Recipe", ...]


class ResultCache:
    """Calls of operators on fake tensors of one mode, and the shapes, strides and storages of their results."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self._fake = fake
        self._known: dict[tuple[object, ...], _Result] = {}
        self._fields: dict[torch.device, dict[str, object]] = {}
        """Attributes of a new fake tensor on each device; none of them is a tensor's own."""

    def result(self, func: OpOverload, args: Arguments, kwargs: Options, compute: Compute) -> Argument:
        """Return the result of a call: from memory, or by `compute`, which is then remembered where it can be."""
        shift, equal_args = _moved_to_start(func, args)
        key = self.key_of(func, equal_args, kwargs) if _is_repeatable(func) else None
        if key is None:
            return compute()
        known = self._known.get(key)
        if known is not None:
            return self._again(known, args, shift)
        out = compute()
        if (recipe := self._recipe(out, args, kwargs, shift)) is not None:
            if len(self._known) >= _MOST_CALLS:
                self._known.clear()
            self._known[key] = recipe
        return out

    def key_of(self, func: OpOverload, args: Arguments, kwargs: Options) -> tuple[object, ...] | None:
        """Return everything that a call's shapes depend on; None if an argument has more to it than that."""
        parts: list[object] = [id(func), torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        plain = _PLAIN if not _is_of_lists(func) else _PLAIN_OF_LISTS
        if _has_own_offset(func):
            parts += [each.storage_offset() for each in args if isinstance(each, FakeTensor)]
        if not self._describe(args, parts, plain):
            return None
        for name, value in kwargs.items():
            parts.append(name)
            if not self._describe((value,), parts, plain):
                return None
        return tuple(parts)

    def _describe(self, values: Iterable[Argument], parts: list[object], plain: tuple[type, ...]) -> bool:
        """Append the facts that a result depends on; return False if an argument has more to it than them."""
        for value in values:
            if isinstance(value, FakeTensor):
                if not self._is_plain(value):
                    return False
                parts += (value.shape, value.stride())
                parts += (value.dtype, value.fake_device, value.is_inference())
            elif isinstance(value, (list, tuple)):
                parts += (type(value), len(value))
                if not self._describe(value, parts, plain):
                    return False
            elif isinstance(value, plain):
                parts += (type(value), value)
            elif not isinstance(value, float):
                return False
        return True

    def _is_plain(self, tensor: FakeTensor) -> bool:
        return (
            type(tensor) is FakeTensor
            and tensor.layout is torch.strided
            and tensor.fake_mode is self._fake
            and tensor.constant is None
            and not tensor.dtype.is_complex
            and not tensor.is_neg()
            and not tensor._is_zerotensor()
            and tensor.dtype not in _QUANTISED
        )

    def _recipe(self, out: Argument, args: Arguments, kwargs: Options, shift: int) -> _Result | None:
        outputs: Sequence[Argument] = out if isinstance(out, (tuple, list)) else (out,)
        storages = {_storage(each): place for place, each in enumerate(args) if isinstance(each, FakeTensor)}
        own = [_storage(each) for each in outputs if isinstance(each, Tensor) and _storage(each) not in storages]
        nested = [each for value in args if isinstance(value, (list, tuple)) for each in value] + list(kwargs.values())
        if len(set(own)) < len(own) or any(isinstance(each, Tensor) and _storage(each) in own for each in nested):
            return None
        parts: list[_Recipe] = []
        for each in outputs:
            if (part := self._part(each, args, storages, shift)) is None:
                return None
            parts.append(part)
        return _Result(type(out) if type(out) in (tuple, list) else None, tuple(parts))

    def _part(self, out: Argument, args: Arguments, storages: dict[int, int], shift: int) -> _Recipe | None:
        """Return how to make one result again; None if that cannot be told from shapes."""
        if out is None or isinstance(out, (int, float)):
            return _Value(out)
        for place, each in enumerate(args):
            if each is out:
                return _Same(place)
        if not isinstance(out, FakeTensor) or out.requires_grad or not self._is_plain(out):
            return None
        if out.is_inference() != torch.is_inference_mode_enabled():  # a view of a tensor from before this mode
            return None
        viewed = storages.get(_storage(out))
        if viewed is None and (out.storage_offset() or out.untyped_storage().nbytes() != _dense_bytes(out)):
            return None
        base = None if viewed is None else args[viewed]
        offset = out.storage_offset() - (base.storage_offset() if isinstance(base, Tensor) else 0) - shift
        return _Made(out.shape, out.stride(), out.dtype, out.fake_device, viewed, int(offset))

    def _again(self, known: _Result, args: Arguments, shift: int) -> Argument:
        made = [self._make(part, args, shift) for part in known.parts]
        return made[0] if known.kind is None else made if known.kind is list else tuple(made)

    def _make(self, part: _Recipe, args: Arguments, shift: int) -> Argument:
        match part:
            case _Value(value):
                return value
            case _Same(place):
                return args[place]
        viewed = None if part.viewed is None else args[part.viewed]
        storage = viewed.untyped_storage() if isinstance(viewed, Tensor) else None
        with torch._C._DisableTorchDispatch():
            inner = _empty_strided(part.shape, part.stride, dtype=part.dtype, device=_META)
            if storage is not None and isinstance(viewed, Tensor):
                offset = viewed.storage_offset() + part.offset + shift
                inner.set_(storage, offset, part.shape, part.stride)
        return self._tensor(inner, part.device)

    def _tensor(self, inner: Tensor, device: torch.device) -> FakeTensor:
        """Return `FakeTensor(fake, inner, device)`. Its own constructor, in Python, takes five times as long."""
        fields = self._fields.get(device)
        if fields is None:
            first = FakeTensor(self._fake, inner, device)
            self._fields[device] = dict(vars(first))
            return first
        made: FakeTensor = _make_subclass(
            FakeTensor, inner, False, dispatch_device=True, device_for_backend_keys=device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        vars(made).update(fields)
        return made


@cache
def _is_of_lists(func: OpOverload) -> bool:
    return func._schema.name.startswith("aten::_foreach_")


@cache
def _is_repeatable(func: OpOverload) -> bool:
    """Return True if the shapes of the arguments decide those of the results, and nothing else happens to a tensor."""
    return (
        func.namespace == "aten"
        and not any(tag in func.tags for tag in _OWN_KINDS)
        and not func._schema.name.removeprefix("aten::").startswith(_CHANGE_SHAPES)
        and not any(argument.is_out for argument in func._schema.arguments)
    )


@cache
def _has_own_offset(func: OpOverload) -> bool:
    """Return True if an operator counts the elements before a view otherwise than its argument does."""
    return "as_strided" in func._schema.name or func._overloadname == "dtype" or func in _REINTERPRET


_REINTERPRET = (aten.view_as_real.default, aten.view_as_complex.default, aten.real.default, aten.imag.default)


def _moved_to_start(func: OpOverload, args: Arguments) -> tuple[int, Arguments]:
    """Return an equal call at index 0 of its dimension, and the elements in front of the real one.

    `betas[t]` and `data[i : i + size]` give tensors of one kind for each `t` and `i`.
    """
    match args:
        case (FakeTensor() as tensor, int(dim), int(index)) if func is aten.select.int and tensor.dim():
            size = tensor.shape[dim] if -tensor.dim() <= dim < tensor.dim() else 0
            if -size <= index < size:
                return index % size * tensor.stride(dim), (tensor, dim, 0)
        case (FakeTensor() as tensor, int(dim), int(start), int(end), *step) if func is aten.slice.Tensor:
            size = tensor.shape[dim] if -tensor.dim() <= dim < tensor.dim() else 0
            if 0 < start < end and start < size:
                return start * tensor.stride(dim), (tensor, dim, 0, min(end, size) - start, *step)
    return 0, args


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _dense_bytes(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + reach) * tensor.itemsize
