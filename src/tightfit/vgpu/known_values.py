"""Answers to a script that reads values from the device, where no kernel computed them.

A tensor on the virtual GPU has no data. Some values are known all the same: tensors filled with one number, and whole
numbers and flags from the host (lengths, positions, masks). Operators on known values alone also run on the host, so
their results are known. A library that asks "is every entry of this mask one?" gets the true answer, and takes the same
path as on a card.

All other answers are made up, so that they hold together. A fraction is one half, a loss is 10, a whole number is 0
(random ones are in the middle of their range). Tensors that nobody computed are equal to each other and to no special
number. A flag is not raised, a mask with counted elements is true everywhere, and nothing is infinite. So the smallest
value is not above the largest one, and a loss that never changes does not look measured. The same tensor gives the same
answer twice, and all results of made-up values are marked. Every made-up answer is counted by the line that asked.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.kernels.temporaries import Argument, Arguments, Options, tensors_in
from tightfit.vgpu.frames import Frame, user_frames, users_line
from tightfit.vgpu.undecided_loops import UndecidedLoops
from tightfit.vgpu.untouched import is_untouched, lazy_zeros
from tightfit.vgpu.value_ranges import Picks, Ranges, TrueCounts

Scalar = bool | int | float

_FRACTION = 0.5
"""Made up for a float: within [0, 1), as probabilities, pixels and random numbers are, and not 0, to divide by."""
_LOSS = 10.0
"""Made up for a single number that has a gradient to pass on: as high as an untrained model's loss, so that training
"until the loss is low" goes on. It stays the same, so that it does not look measured."""
_TOLERANCE = 1e-2
"""A difference that a script compares with less is taken as smaller: it checks that something holds."""

_WHOLE_NUMBERS, _FRACTIONS = 1 << 16, 256
"""Elements up to which a tensor's single values are followed, by type: masks, positions and lengths decide what a
library does next, fractions seldom do."""

_LOOKED_AT = 1 << 22
"""Elements of a host tensor up to which an upload looks whether they are all the same: masks of ones are. Also the
bytes up to which a row of them is followed: processes send each other pickled objects so."""

aten = torch.ops.aten

_FILLED: dict[OpOverload, Scalar] = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.zero_.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
}
_UNWRITTEN = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default}
"""Operators whose result a script may write element by element, as a list of lengths."""
_FILLED_BY_ARGUMENT: dict[OpOverload, int] = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.fill_.Scalar: 1,
    aten.scalar_tensor.default: 0,
}
"""Position of the argument that all elements of the result equal."""

_ASSUMED: dict[OpOverload, bool] = {
    aten.isnan.default: False,
    aten.isinf.default: False,
    aten.isposinf.default: False,
    aten.isneginf.default: False,
    aten.isfinite.default: True,
}
"""Answers for unknown data."""

_KEPT = {
    *(getattr(packet, overload) for packet in (aten.any, aten.all) for overload in ("default", "dim", "dims")),
    *(packet.default for packet in (aten.amax, aten.amin, aten.max, aten.min, aten.mean)),
    *(packet.default for packet in (aten._to_copy, aten.repeat, aten.flip)),
    aten.mean.dim,
    aten._is_all_true.default,
    aten._is_any_true.default,
}
"""Operators whose result has the same value everywhere if their argument has."""

_QUANTIZES = {aten.quantize_per_tensor.default, aten.quantize_per_channel.default}
_COUNTED = {
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default, aten.logspace.default),
    *(aten.eye.default, aten.eye.m, aten.tril_indices.default, aten.triu_indices.default),
}
"""Operators that make their result of numbers alone."""
_COUNTS = {aten.sum.default, aten.sum.dim_IntList}
_COPIES = {aten.copy_.default, aten.fill_.Tensor}
_GRADIENTS_ARE_FINITE = aten._amp_foreach_non_finite_check_and_unscale_.default


_SCALES = {aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor}
"""Of a made-up number, these make a new one: a sum over tokens that is divided by their number is a loss again."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Content of a tensor's storage."""

    value: Tensor
    """On the host: without dimensions if all elements are the same, else all elements of the storage in order."""
    made_up: bool = False

    @property
    def is_uniform(self) -> bool:
        return self.value.dim() == 0

    def seen_by(self, tensor: Tensor) -> Tensor:
        """The host's version of `tensor`, which may be a view of the storage."""
        if self.is_uniform:
            return self.value.expand(tensor.shape)
        return self.value.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


class _Traits(NamedTuple):
    writes: tuple[int | str, ...]
    """Positions, or names after the star, of the arguments that the operator writes."""
    is_view: bool
    is_pointwise: bool
    is_random: bool
    gathers: bool
    """Writes each process's second argument into the first one."""


_GATHERS = {"c10d::allgather_", "c10d::_allgather_base_", "c10d::gather_"}
_VIEWS_IN_PLACE = {
    *(aten.as_strided_.default, aten.detach_.default, aten.t_.default, aten.transpose_.default),
    *(aten.unsqueeze_.default, aten.squeeze_.default, aten.squeeze_.dim, aten.squeeze_.dims),
}
"""They change how a tensor looks on its storage, and write nothing, although their schemas say so."""
_UNSAID_WRITES = {aten.native_batch_norm.default: (3, 4), aten.cudnn_batch_norm.default: (3, 4)}
"""Running statistics, which these operators write although their schemas do not list them."""


@cache
def _traits(func: OpOverload) -> _Traits:
    is_view = func.is_view or func in _VIEWS_IN_PLACE
    arguments = () if is_view else func._schema.arguments
    return _Traits(
        writes=tuple(
            argument.name if argument.kwarg_only else position
            for position, argument in enumerate(arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        or _UNSAID_WRITES.get(func, ()),
        is_view=is_view,
        is_pointwise=torch.Tag.pointwise in func.tags,
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        gathers=func._schema.name in _GATHERS,
    )


class Values:
    """Known values of tensors, and a count of the values that were made up."""

    def __init__(
        self,
        given: Callable[[tuple[Frame, ...]], Scalar | None] = lambda frames: None,
        steps: Callable[[], int] = lambda: 0,
    ) -> None:
        """`given` returns the user's value for lines that read one, `steps` the number of optimizer steps so far."""
        self._given = given
        self.undecided = UndecidedLoops(steps)
        self._known: WeakKeyDictionary[torch.UntypedStorage, Fact] = WeakKeyDictionary()
        self._ranges = Ranges()
        self._counts = TrueCounts()
        self._picks = Picks()
        self.made_up: Counter[tuple[Frame | None, str]] = Counter()

    # Operators

    def follow(self, func: OpOverload, args: Arguments, kwargs: Options, out: Argument) -> None:
        """Keep what operator `func` reveals of its result `out`; a write makes its target unknown."""
        traits = _traits(func)
        if func in _QUANTIZES or (isinstance(out, Tensor) and out.layout is not torch.strided):
            return
        kwargs = {name: value for name, value in kwargs.items() if name not in _WHERE_AND_HOW}
        self._ranges.follow(func, args, kwargs, out)
        self._counts.follow(func, args, out)
        if traits.gathers:
            self._follow_gather(args[0], args[1])
        elif traits.writes:
            self._follow_writes(func, args, kwargs, traits)
        elif isinstance(out, Tensor) and not traits.is_view:
            fact = self._of_result(func, args, kwargs, out, traits)
            if fact is not None:
                self._known[out.untyped_storage()] = fact
        elif isinstance(out, tuple) and not traits.is_view and not traits.is_random:
            self._picks.learn(func, args, kwargs, out)
            self._follow_several(func, args, kwargs, out)

    def _follow_several(self, func: OpOverload, args: Arguments, kwargs: Options, out: tuple[Argument, ...]) -> None:
        tensors = list(tensors_in((*args, *kwargs.values())))
        facts = self._facts(tensors) if all(map(_is_small, tensors)) else None
        results = self._computed(func, args, kwargs, _seen_by) if facts else None
        if not facts or not isinstance(results, tuple):
            return
        made_up = any(fact.made_up for fact in facts)
        for tensor, result in zip(out, results, strict=False):
            if not isinstance(tensor, Tensor) or not isinstance(result, Tensor):
                continue
            fact = _stored(result, tensor, made_up) if result.shape == tensor.shape else None
            if fact is not None:
                self._known[tensor.untyped_storage()] = fact

    def _of_result(
        self, func: OpOverload, args: Arguments, kwargs: Options, out: Tensor, traits: _Traits
    ) -> Fact | None:
        filled = _filled_with(func, args)
        if filled is not None:
            return Fact(torch.tensor(filled, dtype=out.dtype, device="cpu"))
        if func in _UNWRITTEN:
            return Fact(torch.tensor(0, dtype=out.dtype, device="cpu"), made_up=True) if _may_be_lengths(out) else None
        if traits.is_random:
            self._picks.learn(func, args, kwargs, out)
            drawn = _drawn(func, args)
            return None if drawn is None else Fact(torch.tensor(drawn, dtype=out.dtype, device="cpu"), made_up=True)
        invent = out.numel() == 1 and (traits.is_pointwise or func in _KEPT or func in _COUNTS)
        if args and (end := self._ranges.end(func, args[0])) is not None:
            return Fact(torch.tensor(end[0], dtype=out.dtype, device="cpu"), made_up=not end[1])
        facts = self._facts(tensors_in((*args, *kwargs.values())), invent)
        if facts is None:
            return _of_unknown(func, args, out)
        if not facts and func not in _COUNTED:
            return None
        made_up = any(fact.made_up for fact in facts)
        if made_up and func in _SCALES and out.is_floating_point():
            return None
        if _is_small(out) and all(map(_is_small, tensors_in((*args, *kwargs.values())))):
            result = self._computed(func, args, kwargs, _seen_by)
            return _stored(result, out, made_up) if isinstance(result, Tensor) else None
        if not facts or not all(fact.is_uniform for fact in facts):
            return None
        if func in _KEPT:
            return Fact(facts[0].value.to(out.dtype), made_up)
        if func in _COUNTS and isinstance(args[0], Tensor):
            return Fact(facts[0].value.to(out.dtype) * (args[0].numel() // max(1, out.numel())), made_up)
        if traits.is_pointwise:
            result = self._computed(func, args, kwargs, lambda tensor, fact: fact.value)
            return Fact(result.to(out.dtype), made_up) if isinstance(result, Tensor) else None
        return None

    def _follow_writes(self, func: OpOverload, args: Arguments, kwargs: Options, traits: _Traits) -> None:
        if func is _GRADIENTS_ARE_FINITE:
            self._follow_unscaling(*args)
            return
        written = [args[key] if isinstance(key, int) else kwargs.get(key) for key in traits.writes]
        for tensor in tensors_in(written):
            if isinstance(tensor, FakeTensor) and tensor.layout is torch.strided:
                self._ranges.forget(tensor.untyped_storage())
                self._counts.written(func, args, tensor, was_zero=self._is_zero(tensor))
        results, made_up = self._of_writes(func, args, kwargs, traits, written) or (None, False)
        for place, target in enumerate(written):
            if isinstance(target, FakeTensor) and results and target.layout is torch.strided:
                self._write(target, results[place], made_up)
            else:
                self._forget_all(target)

    def _follow_gather(self, gathered: Argument, own: Argument) -> None:
        """Let each process send what this one does, such as pickled objects and their lengths."""
        pairs = [(gathered, own)]
        if isinstance(gathered, (list, tuple)) and isinstance(own, (list, tuple)):
            pairs = list(zip(gathered, own, strict=False))
        for targets, source in pairs:
            assert isinstance(source, Tensor)
            fact = self._fact(source)
            for target in tensors_in((targets,)):
                times, rest = divmod(target.numel(), max(1, source.numel()))
                if fact is None or rest:  # another process sends more than this one
                    self._forget_all(target)
                    continue
                value = fact.value if fact.is_uniform else fact.seen_by(source).flatten().repeat(times)
                self._write(target, value if fact.is_uniform else value.reshape(target.shape), made_up=True)

    def _follow_unscaling(self, gradients: Argument, found_inf: Argument, *_: Argument) -> None:
        """Make the flag of the AMP scaler's check a made-up one: no gradient is infinite."""
        assert isinstance(found_inf, Tensor)
        found = self._fact(found_inf)
        self._forget_all(gradients)
        if found is not None:
            self._known[found_inf.untyped_storage()] = Fact(found.value, made_up=True)

    def _write(self, target: Tensor, value: Tensor, made_up: bool) -> None:
        """`target`, which may be a part of its storage, now holds `value` of the same shape, or a single number."""
        storage = target.untyped_storage()
        before = self._known.pop(storage, None)
        fact = None
        if _covers(target):
            fact = _stored(value, target, made_up)
        elif before is not None and before.value.dtype == target.dtype:
            elements = storage.nbytes() // target.element_size()
            made_up = made_up or before.made_up
            if before.is_uniform and _is_uniform(value) and bool(before.value == value.flatten()[0]):
                fact = Fact(before.value, made_up)
            elif elements <= _limit(target):
                whole = before.value.expand(elements).clone()
                whole.as_strided(target.size(), target.stride(), target.storage_offset()).copy_(value)
                fact = Fact(whole, made_up)
        if fact is not None:
            self._known[storage] = fact

    def _of_writes(
        self, func: OpOverload, args: Arguments, kwargs: Options, traits: _Traits, written: list[Argument]
    ) -> tuple[list[Tensor], bool] | None:
        """Return the new content of the written arguments, and True if it is made up; None if it is unknown."""
        target = written[0]
        filled = _filled_with(func, args)
        if filled is not None and isinstance(target, Tensor):
            return [torch.tensor(filled, dtype=target.dtype, device="cpu")], False
        if traits.is_random and isinstance(target, Tensor) and (drawn := _drawn(func, args)) is not None:
            return [torch.tensor(drawn, dtype=target.dtype, device="cpu")], True
        if func in _COPIES:
            return self._of_copy(*args)
        fakes = [tensor for tensor in written if isinstance(tensor, FakeTensor)]
        if traits.is_random or len(fakes) < len(written):
            return None
        tensors = list(tensors_in((*args, *kwargs.values())))
        facts = self._facts(tensors, invent=traits.is_pointwise and all(tensor.numel() == 1 for tensor in tensors))
        if facts is None:
            return None
        made_up = any(fact.made_up for fact in facts)
        if made_up and func in _SCALES and fakes[0].is_floating_point():
            return None
        small = all(map(_is_small, tensors))
        if not small and not (traits.is_pointwise and all(fact.is_uniform for fact in facts)):
            return None
        after: dict[int, Tensor] = {}

        def operand(tensor: Tensor, fact: Fact) -> Tensor:
            value = after[id(tensor)] = (fact.seen_by(tensor) if small else fact.value).clone()
            return value

        if self._computed(func, args, kwargs, operand) is None:
            return None
        return [after[id(tensor)] for tensor in fakes], made_up

    def _of_copy(self, target: Argument, source: Argument, *_: Argument) -> tuple[list[Tensor], bool] | None:
        assert isinstance(target, Tensor)
        assert isinstance(source, Tensor)
        if not isinstance(source, FakeTensor):
            few = _is_small(source) or _is_uniform(source)
            return ([source.detach().to(target.dtype)], False) if few else None
        fact = self._fact(source)
        if fact is None or not (fact.is_uniform or _is_small(target)):
            return None
        return [(fact.value if fact.is_uniform else fact.seen_by(source)).to(target.dtype)], fact.made_up

    def _computed(
        self, func: OpOverload, args: Arguments, kwargs: Options, operand: Callable[[Tensor, Fact], Tensor]
    ) -> Argument:
        """Run the operator on the host, on known values; None where the host refuses to."""

        def swap(value: Argument) -> Argument:
            if isinstance(value, Tensor):
                fact = self._fact(value, invent=True)
                assert fact is not None
                return operand(value, fact)
            return [swap(each) for each in value] if isinstance(value, (list, tuple)) else value

        try:
            out: Argument = func(
                *(swap(value) for value in args), **{name: swap(value) for name, value in kwargs.items()}
            )
        except (RuntimeError, NotImplementedError):
            return None
        return out

    # Facts

    def _facts(self, tensors: Iterable[Tensor], invent: bool = False) -> list[Fact] | None:
        """Return the facts of all tensors; None, from the first one without, if one has none."""
        facts = []
        for tensor in tensors:
            fact = self._fact(tensor, invent)
            if fact is None:
                return None
            facts.append(fact)
        return facts

    def _fact(self, tensor: Tensor, invent: bool = False) -> Fact | None:
        """Return the fact of a tensor; with `invent`, make one up (and keep it) for a single element."""
        if not isinstance(tensor, FakeTensor):
            return _fact_of_host(tensor)
        if tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()
        fact = self._known.get(storage)
        if fact is not None and fact.value.dtype == tensor.dtype:
            return fact
        if not invent or tensor.numel() != 1:
            return None
        is_loss = tensor.requires_grad and not tensor.is_leaf and tensor.is_floating_point()
        number = _LOSS if is_loss else self._invented(tensor.dtype)
        picked = self._picks.read(tensor)
        if picked is not None:
            return Fact(picked.reshape(()), made_up=True)
        fact = Fact(torch.tensor(number, dtype=tensor.dtype, device="cpu"), made_up=True)
        if _covers(tensor):
            self._known[storage] = fact
        return fact

    @staticmethod
    def _invented(dtype: torch.dtype) -> Scalar:
        if dtype.is_floating_point or dtype.is_complex:
            return _FRACTION
        return False if dtype == torch.bool else 0

    def learn(self, tensor: Tensor, source: Tensor, made_up: bool = False) -> None:
        """Keep the values of `tensor`, which is a copy of the host's `source`."""
        if not made_up:
            self._ranges.learn(tensor, source)
        if source.layout is not torch.strided or not 0 < source.numel() <= _LOOKED_AT:
            return
        if not (_is_small(source) or _is_uniform(source)):
            return
        fact = _stored(source.detach().to(tensor.dtype), tensor, made_up)
        if fact is not None:
            self._known[tensor.untyped_storage()] = fact

    def assume(self, tensor: Tensor, value: Scalar) -> None:
        """Make up one value for all elements of a tensor without data; known values stay."""
        if isinstance(tensor, FakeTensor) and self.exactly(tensor) is None and _covers(tensor):
            fact = Fact(torch.tensor(value, dtype=tensor.dtype, device="cpu"), made_up=True)
            self._known[tensor.untyped_storage()] = fact

    def forget(self, storage: torch.UntypedStorage) -> None:
        self._known.pop(storage, None)

    def _forget_all(self, tensors: Argument) -> None:
        for tensor in tensors_in((tensors,)):
            if isinstance(tensor, FakeTensor) and tensor.layout is torch.strided:
                self.forget(tensor.untyped_storage())

    # Answers

    def bound(self, tensor: Tensor) -> int | None:
        """Return a number above all whole numbers in a tensor, of which none is below 0; None where none is known."""
        return self._ranges.bound(tensor)

    def exactly(self, tensor: Tensor) -> Tensor | None:
        """Return the true values of a tensor on the host; None if any is unknown or made up."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        fact = self._fact(tensor)
        return None if fact is None or fact.made_up else fact.seen_by(tensor)

    def scalar(self, tensor: Tensor) -> Scalar:
        """Answer `tensor.item()`."""
        fact = self._fact(tensor, invent=True)
        assert fact is not None, "item() is asked of tensors with one element"
        if fact.made_up:
            frames = user_frames(sys._getframe(1))
            if not frames and threading.get_ident() not in _python_threads():
                # autograd's own check for NaN (`detect_anomaly`), in a thread of its engine: no line reads it
                return fact.seen_by(tensor).item()
            self.count("a value read from the device", frames)
            if (given := self._given(frames)) is not None:
                return torch.tensor(given, device="cpu").to(tensor.dtype).item()
        exactly = None if fact.made_up else self.exactly
        return self.undecided.answer(sys._getframe(1), fact.seen_by(tensor).item(), exactly)

    def on_host(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a host tensor for a copy from the device; its pages cost memory only when written."""
        fact = self._fact(tensor, invent=True)
        if fact is None or fact.made_up:
            self.count("a tensor copied to the host")
        if fact is None and (picked := self._picks.read(tensor)) is not None:
            return picked.to(dtype).clone(memory_format=torch.contiguous_format)
        if fact is None or (fact.is_uniform and not fact.value):
            return lazy_zeros(tuple(tensor.shape), dtype)
        return fact.seen_by(tensor).to(dtype).clone(memory_format=torch.contiguous_format)

    def most_true(self, mask: Tensor) -> int:
        """Return a number that the true elements of a mask do not exceed."""
        known = self._counts.most(mask)
        return mask.numel() if known is None else min(known, mask.numel())

    def _is_zero(self, tensor: Tensor) -> bool:
        fact = self._known.get(tensor.untyped_storage())
        return fact is not None and fact.is_uniform and not fact.made_up and not bool(fact.value)

    def count(self, what: str, frames: tuple[Frame, ...] | None = None) -> None:
        """Count a made-up answer for the line that is running, or the innermost of `frames`."""
        self.made_up[(users_line(user_frames(sys._getframe(1)) if frames is None else frames), what)] += 1


_WHERE_AND_HOW = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "generator"})


def _filled_with(func: OpOverload, args: Arguments) -> Argument:
    """Return the number that all elements of the result have; None for another operator."""
    place = _FILLED_BY_ARGUMENT.get(func)
    return _FILLED.get(func) if place is None else args[place]


def _of_unknown(func: OpOverload, args: Arguments, out: Tensor) -> Fact | None:
    """Make up an operator's result when its arguments are unknown."""
    value = _assumed(func, args[0], args[1] if len(args) > 1 else None, out)
    return None if value is None else Fact(torch.tensor(value, dtype=out.dtype, device="cpu"), made_up=True)


def _assumed(func: OpOverload, source: Argument, other: Argument, out: Tensor) -> Scalar | None:
    if func in _ASSUMED:
        return _ASSUMED[func]
    if isinstance(source, Tensor) and source.dtype == torch.bool:
        if func is aten._to_copy.default and out.dtype != torch.bool:
            return 1  # somebody is about to count, or to take the mean
        if func in _COUNTS:
            return source.numel() // max(1, out.numel())
    if source is other and func in (aten.eq.Tensor, aten.ne.Tensor):  # torch.isfinite and isnan compare so
        return func is aten.eq.Tensor
    if func in _ALL:
        return True  # a script checks that all of something is valid
    if func in _OF_TENSORS:
        return _OF_TENSORS[func]
    if func in _IN_SET:
        return False  # no special number: a text that is generated goes on until its longest length
    if func in _OF_NUMBERS and isinstance(source, Tensor) and isinstance(other, (int, float)):
        return _compared(func, source.dtype, other)
    return None


def _compared(func: OpOverload, dtype: torch.dtype, other: float) -> bool:
    """Compare a tensor that nobody computed with a number."""
    if func in _EQUAL:
        return func is aten.ne.Scalar
    if 0 < other < _TOLERANCE and func in (aten.lt.Scalar, aten.le.Scalar):
        return True
    value = _FRACTION if dtype.is_floating_point else 1
    return bool(func(torch.tensor(value, device="cpu"), other))


def _drawn(func: OpOverload, args: Arguments) -> Scalar | None:
    """Return a number that a random operator may draw; None where any number will do."""
    if func in _COINS:
        return 1
    if func is aten.normal_.default:  # half a deviation from the mean: samples that are too far off are drawn anew
        mean = args[1] if len(args) > 1 else 0.0
        deviation = args[2] if len(args) > 2 else 1.0
        return mean + deviation / 2 if isinstance(mean, float | int) and isinstance(deviation, float | int) else None
    place = _RANGES.get(func)
    if place is None:
        return None
    given = [each for each in args[place:] if isinstance(each, (int, float))]
    low, high = (0, given[0]) if len(given) == 1 else given[:2]
    return (low + high) // 2


_COINS = {aten.bernoulli.default, aten.bernoulli.p, aten.bernoulli_.float, aten.bernoulli_.Tensor}
_RANGES: dict[OpOverload, int] = {
    aten.randint.default: 0,
    aten.randint.low: 0,
    aten.randint_like.default: 1,
    aten.randint_like.low_dtype: 1,
    aten.random_.to: 1,
    getattr(aten.random_, "from"): 1,
}
"""Position of the first number of a range from which an operator draws whole numbers; without two, it starts at 0."""
_ALL = {aten.all.default, aten.all.dim, aten.all.dims, aten._is_all_true.default}
_EQUAL = {aten.eq.Scalar, aten.ne.Scalar}
_OF_NUMBERS = {*_EQUAL, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar}
_IN_SET = {aten.isin.Tensor_Tensor, aten.isin.Tensor_Scalar}
_OF_TENSORS: dict[OpOverload, bool] = {
    aten.eq.Tensor: True,
    aten.ne.Tensor: False,
    aten.le.Tensor: True,
    aten.ge.Tensor: True,
    aten.lt.Tensor: False,
    aten.gt.Tensor: False,
    aten.isclose.default: True,
}
"""Comparisons of tensors that nobody computed."""


def _fact_of_host(tensor: Tensor) -> Fact | None:
    """Return the fact of a host tensor with data, such as the positions at which others are written."""
    if tensor.numel() == 1:
        return Fact(tensor.detach().reshape(()))
    is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_floating_point()
    return _stored(tensor.detach(), tensor, made_up=False) if is_plain and _is_small(tensor) else None


def _python_threads() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate()}


def _seen_by(tensor: Tensor, fact: Fact) -> Tensor:
    return fact.seen_by(tensor)


def _stored(data: Tensor, tensor: Tensor, made_up: bool) -> Fact | None:
    """Return the fact that `tensor` holds `data`; None if that is too much to keep."""
    if data.numel() == 0:
        return None
    data = data.to(tensor.dtype)
    if data.dim() == 0 or _is_uniform(data):
        return Fact(data.flatten()[0].clone(), made_up)
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    if elements > _limit(tensor):
        return None
    storage = torch.zeros(elements, dtype=data.dtype, device="cpu")
    storage.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).copy_(data)
    return Fact(storage, made_up)


def _is_uniform(data: Tensor) -> bool:
    if data.numel() == 1 or is_untouched(data):
        return True
    corner = (0,) * data.dim()
    first = data[corner]
    return bool(first == data[tuple(extent - 1 for extent in data.shape)]) and bool((data == first).all())


def _covers(tensor: Tensor) -> bool:
    """Return True if a tensor covers its whole storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _may_be_lengths(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64) and _is_small(tensor)


def _limit(tensor: Tensor) -> int:
    if tensor.dtype == torch.uint8 and tensor.dim() == 1:
        return _LOOKED_AT
    return _FRACTIONS if tensor.is_floating_point() or tensor.is_complex() else _WHOLE_NUMBERS


def _is_small(tensor: Tensor) -> bool:
    """Return True if a tensor's single values are worth following."""
    return tensor.numel() <= _limit(tensor)
