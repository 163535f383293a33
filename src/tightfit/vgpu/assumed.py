"""Lengths and values that only the card's data decide: their bounds, and the user's own figures (`--assume`)."""

import linecache
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tightfit.vgpu.frames import Frame, users_line
from tightfit.vgpu.records import NeededLength
from tightfit.wording import say

_VIEW = re.compile(r"shape '\[([-\d, ]+)\]' is invalid for input of size (\d+)")
_BROADCAST = re.compile(r"broadcast a dimension of length (\d+) at (-\d+)!.* broadcastable to \[([\d, ]+)\]")
_PAIRS = tuple(
    map(
        re.compile,
        (
            r"The size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)",
            r"expanded size of the tensor \((\d+)\) must match the existing size \((\d+)\)",
            r"batch_size \((\d+)\) to match target batch_size \((\d+)\)",
            r"Expected (?:size )?(\d+)(?: in dimension \d+)? but got (?:size )?(\d+)",
            r"target size \(torch\.Size\(\[(\d+)[^)]*\)\).* input size \(torch\.Size\(\[(\d+)",
            r"same reduction dim, but got \[\d+, (\d+)\] X \[(\d+),",
            r"got \[(\d+)[\d, ]*\] but expected shape compatible with \[(\d+)",
            r"cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)",
        ),
    )
)
"""Messages of torch about two sizes that differ."""


@dataclass(slots=True)
class _Length:
    """Longest result of one line, with the bound that held for it."""

    played: int
    largest: int | None
    """None where nothing bounds it."""
    is_given: bool
    is_needed: bool
    """True if a later line works with no other length."""


class Assumed:
    """Answers for lines of the script, by the text of an expression there or as FILE:LINE."""

    def __init__(self, given: Sequence[tuple[str, float]] = (), needed: Iterable[NeededLength] = ()) -> None:
        self._given = given
        self._needed = {(each.file, each.line, each.largest): each.length for each in needed}
        self._used: set[str] = set()
        self._lengths: dict[Frame | None, _Length] = {}
        self._made_up: dict[tuple[Frame, int], int] = {}
        """Lengths that were made up, by their line and the bound that held for them; the latest is the last."""

    def value(self, frames: tuple[Frame, ...]) -> float | None:
        """Return the value given for one of these lines, the innermost first; None without one."""
        for frame in frames if self._given else ():
            for expression, value in self._given:
                if _is_at(expression, frame):
                    self._used.add(expression)
                    return value
        return None

    def length(self, frames: tuple[Frame, ...], played: int, largest: int | None) -> int:
        """Return the length of a result: the given one within its bounds, or the one to play without."""
        given = self.value(frames)
        length = played if given is None else max(0, int(given))
        if largest is not None:
            length = min(length, largest)
        line = users_line(frames)
        needed = self._needed_at(line, largest) if given is None else None
        if needed is not None:
            length = needed
        elif given is None and line is not None and largest is not None:
            self._made_up.pop((line, largest), None)
            self._made_up[line, largest] = length
        before = self._lengths.get(line)
        if before is None or before.played <= length:
            self._lengths[line] = _Length(length, largest, given is not None, needed is not None)
        return length

    def _needed_at(self, line: Frame | None, largest: int | None) -> int | None:
        return self._needed.get((line.file, line.line, largest)) if line and largest is not None else None

    def needed_by(self, error: BaseException) -> NeededLength | None:
        """Return the only length with which the operator that raised `error` can run, instead of one made up."""
        for (line, largest), played in reversed(self._made_up.items()):
            length = _length_for(str(error), played) if played > 1 else None
            if length is not None:
                return NeededLength(file=line.file, line=line.line, largest=largest, length=length)
        return None

    def sentences(self) -> list[str]:
        """Tell the bounds of lengths, and name assumptions that nothing used."""
        found = []
        for line, each in self._lengths.items():
            place = f"{line.file}:{line.line}" if line else "?"
            if each.is_given:
                found.append(say("vgpu.assumed.given", place=place, played=each.played))
            elif each.is_needed:
                found.append(say("vgpu.assumed.needed", place=place, played=each.played))
            elif each.largest is not None:
                found.append(say("vgpu.assumed.largest", place=place, played=each.played))
            else:
                found.append(say("vgpu.assumed.unbounded", place=place, played=each.played))
        unused = [expression for expression, _ in self._given if expression not in self._used]
        return found + [say("vgpu.assumed.unused", expression=expression) for expression in unused]


def _length_for(message: str, played: int) -> int | None:
    """Return the length that torch's message about shapes asks for in place of `played`; None if it is about others.

    >>> _length_for("shape '[4, 8]' is invalid for input of size 100", 50)
    16
    >>> _length_for("shape '[4, -1]' is invalid for input of size 50", 50)
    48
    """
    if view := _VIEW.search(message):
        sizes, elements = [int(each) for each in view[1].split(",")], int(view[2])
        each, rest = divmod(elements, played)
        whole = math.prod(size for size in sizes if size >= 0)
        if rest or not whole or not each:
            return None
        step = whole // math.gcd(whole, each)
        length = played // step * step if -1 in sizes else step
        return length if 0 < length < played and (-1 in sizes or length * each == whole) else None
    pair = _sizes_that_differ(message)
    return min(pair) if played == max(pair) and 0 < min(pair) < played else None


def _sizes_that_differ(message: str) -> tuple[int, int]:
    """Return the two sizes that torch's message calls unequal, or zeros.

    >>> _sizes_that_differ("The size of tensor a (8) must match the size of tensor b (3) at non-singleton dimension 0")
    (8, 3)
    """
    if found := _BROADCAST.search(message):
        expected = found[3].split(",")
        place = int(found[2])
        return int(found[1]), int(expected[place]) if -place <= len(expected) else 0
    matches = filter(None, (pair.search(message) for pair in _PAIRS))
    return next(((int(found[1]), int(found[2])) for found in matches), (0, 0))


def _is_at(expression: str, frame: Frame) -> bool:
    file, _, line = expression.rpartition(":")
    if file and line.isdecimal():
        return int(line) == frame.line and f"{os.sep}{frame.file}".endswith(f"{os.sep}{file}")
    source = "".join(linecache.getline(frame.file, frame.line).split())
    return "".join(expression.split()) in source
