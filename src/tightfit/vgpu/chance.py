"""Numbers that a script draws by chance: their smallest and their largest values are played, too.

`n = random.randint(16, 4096)` differs in each step, and `random.random() < 0.003` holds in few of them. Where a line of
the script draws one number in a step, a later step gets the smallest that it may draw, and the next two the largest:
the first of them may make an optimizer's states. If these came to the largest of all steps, the line goes on with the
same number, so that steps repeat.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from tightfit.kernels.temporaries import Arguments
from tightfit.vgpu.frames import Frame, is_own
from tightfit.vgpu.running_loops import counted_frames

aten = torch.ops.aten

RARE = 1e-4
"""Share of the draws of a fraction that lie outside of what counts as its smallest and its largest."""
_ENOUGH = 12
"""Numbers that a line draws by itself before the others are tried, or go on."""
_ENOUGH_ALIKE = 3
"""Numbers of its own after which steps that repeat do so by themselves."""
_MOST_SOUGHT = 8
"""Steps in which a line that draws seldom is looked for, each time."""

Ends = tuple[Any, Any]
"""The smallest and the largest number that a line may draw, or pairs of them."""

_NATURAL, _SMALLEST, _LARGEST, _LARGEST_AGAIN, _OVER = range(5)


@dataclass
class _Place:
    """A line of the script that draws one number in a step."""

    code: CodeType
    frame: Frame
    step: int
    """The latest step in which it drew one."""
    stage: int = _NATURAL
    draws: int = 1
    sizes: list[int] = field(default_factory=lambda: [0] * _OVER)
    """Most bytes of a step in each stage."""
    ends: Ends = (0, 0)
    goes_on: object = None
    """The number that it goes on with."""
    own: int = 0
    """Numbers of its own since it came to the ends."""
    sought: int = 0
    """Steps in which it was looked for, since its latest draw."""

    @property
    def is_steady(self) -> bool:
        """True if no other step was larger than those with the ends."""
        return self.stage == _OVER and self.sizes[_NATURAL] <= max(self.sizes[1:])

    def may_go_on(self) -> bool:
        """Return True if it may draw the same number from now on: not if it begins at 0, which chooses an item."""
        smallest = self.ends[0]
        chooses = hasattr(smallest, "__index__") and not isinstance(smallest, bool) and int(smallest) <= 0
        return self.draws >= _ENOUGH and self.is_steady and not chooses


class Draws:
    """The lines of the script that draw numbers."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], _Place] = {}
        self._several: dict[tuple[int, int], CodeType] = {}
        """Code of lines that draw several numbers in a step: kept, so that its identity stays its own."""
        self._step = 0
        self._repeats = False
        """True once steps repeated."""

    def given(self, frame: FrameType, value: Any, ends: Callable[[], Ends | None]) -> Any:
        """Return the number that a line gets, which drew `value`."""
        key = id(frame.f_code), frame.f_lasti
        if key in self._several:
            return value
        place = self._places.get(key)
        if place is None:
            code = frame.f_code
            where = Frame(code.co_filename, frame.f_lineno, code.co_qualname)
            self._places[key] = _Place(code, where, self._step)
            return value
        if place.step == self._step:  # before the first step, a script may try what it will do in each
            if self._step and place.stage != _OVER:
                self._several[key] = self._places.pop(key).code
            return value
        place.step, place.draws, place.sought = self._step, place.draws + 1, 0
        return self._next(place, value, ends)

    def into(self, out: Tensor, func: OpOverload, args: Arguments) -> None:
        """Give a tensor of one element on the host, which `func` drew, the number that its line gets."""
        frame, is_packages = next(counted_frames(sys._getframe(1)), (None, False))
        if frame is not None and not is_packages:
            value = out.item()
            given = self.given(frame, value, lambda: OF_TENSORS[func](*args))
            if given is not value:
                out.fill_(given)

    def _next(self, place: _Place, value: Any, ends: Callable[[], Ends | None]) -> Any:
        if place.goes_on is not None:
            return place.goes_on
        if place.stage == _NATURAL and (self._repeats or place.draws >= _ENOUGH):
            found = ends()
            place.ends, place.stage = found or place.ends, _SMALLEST if found else _OVER
        elif _NATURAL < place.stage < _OVER:
            place.stage += 1
        place.own += place.stage == _OVER
        if place.may_go_on():
            place.goes_on = value
        if _NATURAL < place.stage < _OVER:
            return place.ends[place.stage > _SMALLEST]
        return value

    def after_step(self, size: int) -> None:
        """Note the bytes that a step allocated. The first one's are not like others: the model's are among them."""
        self._step += 1
        for each in self._places.values() if self._step > 1 else ():
            stage = each.stage % _OVER
            each.sizes[stage] = max(each.sizes[stage], size)

    def goes_on(self) -> bool:
        """Return True if lines that drew in the latest steps have not come to their ends, now that steps repeat.

        Or if they came to them only now: steps with both ends may be alike where all others differ.
        """
        self._repeats = True
        latest = [each for each in self._places.values() if each.step >= self._step - 1]
        return any(each.stage < _OVER or (each.goes_on is None and each.own < _ENOUGH_ALIKE) for each in latest)

    def seldom(self) -> Iterator[Frame]:
        """Yield lines that drew a number, but not in the latest steps, and have not come to their ends."""
        for each in self._places.values():
            if each.stage < _OVER and each.sought < _MOST_SOUGHT:
                each.sought += 1
                yield each.frame

    def deciding(self) -> Iterator[tuple[Frame, Ends]]:
        """Yield the lines with ends that changed the steps, and these ends."""
        for each in self._places.values():
            if each.sizes[_SMALLEST] != each.sizes[_LARGEST] and each.stage == _OVER:
                yield each.frame, each.ends


def drawing_frame() -> FrameType | None:
    """Return the caller of the caller's caller, if it is a function of the user's own files."""
    frame = sys._getframe(2)
    return frame if is_own(frame.f_code) else None


def fraction(*_: object, **__: object) -> Ends:
    return RARE, 1 - RARE


def uniform(low: float = 0.0, high: float = 1.0, *_: object, **__: object) -> Ends:
    part = (high - low) * RARE
    return low + part, high - part


def _below(high: int, *_: object) -> Ends:
    return 0, high - 1


def _between(low: int, high: int, *_: object) -> Ends:
    return low, high - 1


def _flag(*_: object) -> Ends:
    return 0, 1


OF_TENSORS: dict[OpOverload, Callable[..., Ends]] = {
    aten.rand.default: fraction,
    aten.randint.default: _below,
    aten.randint.low: _between,
    aten.bernoulli.default: _flag,
    aten.bernoulli_.float: _flag,
    aten.uniform_.default: lambda tensor, *ends: uniform(*ends),
}
"""Operators that draw, each with the ends by its arguments. They count where they draw one number on the host."""
