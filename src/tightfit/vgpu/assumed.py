"""Lengths and values that only the card's data decide: their bounds, and the user's own figures (`--assume`)."""

import linecache
import os
from collections.abc import Sequence
from dataclasses import dataclass

from tightfit.vgpu.frames import Frame, users_line
from tightfit.wording import say


@dataclass(slots=True)
class _Length:
    """Longest result of one line, with the bound that held for it."""

    played: int
    largest: int | None
    """None where nothing bounds it."""
    is_given: bool


class Assumed:
    """Answers for lines of the script, by the text of an expression there or as FILE:LINE."""

    def __init__(self, given: Sequence[tuple[str, float]] = ()) -> None:
        self._given = given
        self._used: set[str] = set()
        self._lengths: dict[Frame | None, _Length] = {}

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
        before = self._lengths.get(line)
        if before is None or before.played <= length:
            self._lengths[line] = _Length(length, largest, given is not None)
        return length

    def sentences(self) -> list[str]:
        """Tell the bounds of lengths, and name assumptions that nothing used."""
        found = []
        for line, each in self._lengths.items():
            place = f"{line.file}:{line.line}" if line else "?"
            if each.is_given:
                found.append(say("vgpu.assumed.given", place=place, played=each.played))
            elif each.largest is not None:
                found.append(say("vgpu.assumed.largest", place=place, played=each.played))
            else:
                found.append(say("vgpu.assumed.unbounded", place=place, played=each.played))
        unused = [expression for expression, _ in self._given if expression not in self._used]
        return found + [say("vgpu.assumed.unused", expression=expression) for expression in unused]


def _is_at(expression: str, frame: Frame) -> bool:
    file, _, line = expression.rpartition(":")
    if file and line.isdecimal():
        return int(line) == frame.line and f"{os.sep}{frame.file}".endswith(f"{os.sep}{file}")
    source = "".join(linecache.getline(frame.file, frame.line).split())
    return "".join(expression.split()) in source
