"""The user's running functions, and the loops that they are in."""

import inspect
import itertools
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import NamedTuple

from tightfit.vgpu.frames import Frame, is_counted, is_package
from tightfit.vgpu.loop_items import differ, iterator_of, length_of
from tightfit.vgpu.loop_source import Loop, loops_around

SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def own_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield running frames of the user's own files, innermost first."""
    return (each for each, is_packages in counted_frames(frame) if not is_packages)


def package_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield running frames of installed packages other than torch, innermost first."""
    return (each for each, is_packages in counted_frames(frame) if is_packages)


def counted_frames(frame: FrameType | None) -> Iterator[tuple[FrameType, bool]]:
    """Yield running frames without torch's and ours, each with True if it is a package's."""
    while frame is not None:
        if is_counted(frame):
            yield frame, is_package(Frame(frame.f_code.co_filename, frame.f_lineno, ""))
        frame = frame.f_back


def loops_at(frame: FrameType) -> tuple[Loop, ...]:
    code = frame.f_code
    return loops_around(code.co_filename, code.co_firstlineno, code.co_name, frame.f_lineno)


def is_in_loop(frame: FrameType) -> bool:
    """Return True if a function is at a line within a `for` or `while` statement of its own."""
    return bool(loops_at(frame))


def is_behind(frame: FrameType, column: int) -> bool:
    """Return True if a function's next instruction is on its line, from a column on."""
    line, _, start, _ = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    return line == frame.f_lineno and start is not None and start >= column


def innermost_loop(frame: FrameType) -> Loop | None:
    """Return the `for` loop of its own that a function is in; None for a generator, which has a reader that counts."""
    if frame.f_code.co_flags & SUSPENDS:
        return None
    around = loops_at(frame)
    return around[-1] if around and around[-1].counts else None


class TrainingLoop(NamedTuple):
    """A loop with backward passes in its iterations."""

    place: Frame
    last: int

    def has(self, line: Frame) -> bool:
        return line.file == self.place.file and self.place.line <= line.line <= self.last


class LoopLengths:
    """Numbers of items of loops when they ran last, where their iterators show them."""

    def __init__(self) -> None:
        self._known: dict[tuple[CodeType, int], int] = {}
        self._taken: dict[tuple[CodeType, int], int] = {}
        """Items that were taken of loops since they began."""
        self._begun: set[tuple[CodeType, int]] = set()
        """Loops in their first iteration."""
        self._looked_at: set[tuple[CodeType, int]] = set()
        self.of_settings: set[tuple[CodeType, int]] = set()
        """Loops over plain values that differ, as those of a search do."""

    def learn(self, frame: FrameType, first: int, *, is_first: bool) -> None:
        """Look at a loop's iterator at its second iteration, each time that it runs."""
        place = (frame.f_code, first)
        if place not in self._looked_at and (items := iterator_of(frame)) is not None:
            self._looked_at.add(place)
            if differ(items):
                self.of_settings.add(place)
        if place in self._taken:
            self._taken[place] += 1
        if is_first:
            self._taken.pop(place, None)
        if is_first and iterator_of(frame) is None:  # else it began before it was followed
            self._begun.add(place)
            self._taken[place] = 0
        elif not is_first and place in self._begun:
            self._begun.discard(place)
            self._known.pop(place, None)
            length = length_of(iterator_of(frame))
            if length is not None:
                self._known[place] = length

    def pass_over(self, place: tuple[CodeType, int], count: int) -> None:
        """Note that so many items of a loop were taken away."""
        if place in self._taken:
            self._taken[place] += count

    def left(self, place: tuple[CodeType, int]) -> int | None:
        """Return how many items a loop has left at the start of an iteration; None if that cannot be seen."""
        taken = self._taken.get(place)
        return self._known[place] - taken if taken is not None and place in self._known else None

    def of(self, functions: Mapping[CodeType, int]) -> dict[int, int]:
        """Return the numbers by the loops' lines, to which each function adds its offset."""
        return {line + functions[code]: count for (code, line), count in self._known.items() if code in functions}
