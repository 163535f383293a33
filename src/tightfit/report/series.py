"""Long series made short enough for a page, and no peak lost: spans with their lowest, highest and mean values."""

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPANS = 1000
"""Spans of a curve: a screen has hardly more columns."""
MOMENTS = 400
"""Stretches of a memory timeline; each keeps up to two moments and one more for each category."""
_LARGEST_OF_EACH = 3
"""Tensors that are named for each category at a moment."""
MOST_TENSORS = 20_000
_LONGEST_LISTS = 1000
_DIGITS = 6

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps. Where points were put together into spans, `low` and `high` hold the extremes of each."""

    x: list[float]
    mean: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    points: int
    """Points that it was made of."""
    not_finite: int = 0
    """Values that were no numbers, as of a run that diverged; they are left out."""


def curve(points: Sequence[tuple[float, float]], spans: int = SPANS) -> Curve:
    """`points` as (step, value) in order of steps; up to two for each of `spans` are kept as they are.

    >>> curve([(0, 1.0), (1, 9.0), (2, 2.0), (3, 4.0), (4, 3.0)], spans=2).high
    [9, 4]
    """
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    finite = np.isfinite(table[:, 1])
    dropped = int(len(table) - finite.sum())
    table = table[finite]
    if len(table) <= 2 * spans:
        return Curve(x=_plain(table[:, 0]), mean=_short(table[:, 1]), points=len(table), not_finite=dropped)
    starts = _starts(len(table), spans)
    counts = np.diff([*starts, len(table)])
    x, y = table[:, 0], table[:, 1]
    return Curve(
        x=_plain(np.round(np.add.reduceat(x, starts) / counts)),
        mean=_short(np.add.reduceat(y, starts) / counts),
        low=_short(np.minimum.reduceat(y, starts)),
        high=_short(np.maximum.reduceat(y, starts)),
        points=len(table),
        not_finite=dropped,
    )


def highest(points: Sequence[tuple[float, float]], spans: int = SPANS) -> Curve:
    """The same by the highest value of each span, at the step where it was."""
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    table = table[np.isfinite(table[:, 1])]
    if len(table) <= 2 * spans:
        return Curve(x=_plain(table[:, 0]), mean=_short(table[:, 1]), points=len(table))
    edges = [*_starts(len(table), spans), len(table)]
    kept = [start + int(np.argmax(table[start:end, 1])) for start, end in pairwise(edges)]
    return Curve(x=_plain(table[kept, 0]), mean=_short(table[kept, 1]), points=len(table))


def _starts(count: int, spans: int) -> list[int]:
    return sorted({count * span // spans for span in range(spans)})


def _plain(values: Numbers) -> list[float]:
    """Whole numbers as such: they are shorter."""
    return [int(value) if value.is_integer() else value for value in values.tolist()]


def _short(values: Numbers) -> list[float]:
    """Six significant digits, more than a screen can show; bytes stay whole."""
    return [int(v) if v.is_integer() else float(f"{v:.{_DIGITS}g}") for v in values.tolist()]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Memory over a run at the moments that are kept; `tensors` are the largest of each category at any of them."""

    event_count: int
    events: list[int]
    category_bytes: dict[str, list[int]]
    reserved_bytes: list[int] | None
    phases: list[tuple[int, str]]
    failures: list[Mapping[str, Any]]
    peak_event: int
    tensors: list[Mapping[str, Any]]
    given_moments: int
    given_tensors: int

    def at(self, event: int) -> int:
        """The position in `events` of the state that held after `event`."""
        return max(0, int(np.searchsorted(self.events, event, side="right")) - 1)


def shortened(data: Mapping[str, Any], moments: int = MOMENTS) -> Timeline:
    """A timeline (see `tightfit.vgpu.timeline`) of any length at a few thousand moments.

    Each of `moments` stretches keeps its highest, its lowest and each category's highest; so do the peak, the failures
    and the end. What was reserved between two moments counts at the later one.
    """
    events = np.asarray(data["events"], dtype=np.int64)
    rows = {name: np.asarray(row, dtype=np.int64) for name, row in data["category_bytes"].items()}
    total = np.zeros(len(events), np.int64)
    for row in rows.values():
        total = total + row
    failures = list(data.get("failures") or [])[-_LONGEST_LISTS:]
    peak = int((data.get("peak") or {}).get("event", 0))
    kept = np.arange(len(events))
    if len(events) > moments * (2 + len(rows)):
        special = [peak, *(int(each["event"]) for each in failures)]
        before = np.searchsorted(events, special, side="right") - 1
        chosen = {0, len(events) - 1, *np.clip(before, 0, None).tolist()}
        for start, end in _stretches(len(events), moments):
            chosen.add(start + int(np.argmin(total[start:end])))
            chosen |= {start + int(np.argmax(row[start:end])) for row in (total, *rows.values())}
        kept = np.array(sorted(chosen))
    reserved = data.get("reserved_bytes")
    if reserved is not None and len(kept):
        since = np.concatenate(([0], kept[:-1] + 1))
        reserved = np.maximum.reduceat(np.asarray(reserved, dtype=np.int64), since).tolist()
    count = int(data["event_count"])
    names = events[kept].tolist()
    tensors = list(data.get("tensors") or [])
    return Timeline(
        event_count=count,
        events=names,
        category_bytes={name: row[kept].tolist() for name, row in rows.items()},
        reserved_bytes=reserved,
        phases=_long_phases([(int(each["event"]), str(each["phase"])) for each in data.get("phases") or []], count),
        failures=failures,
        peak_event=peak,
        tensors=largest_tensors(tensors, names),
        given_moments=len(events),
        given_tensors=len(tensors),
    )


def _stretches(count: int, moments: int) -> list[tuple[int, int]]:
    edges = [*_starts(count, moments), count]
    return list(pairwise(edges))


def _long_phases(phases: list[tuple[int, str]], count: int) -> list[tuple[int, str]]:
    """Phases that can be seen; a shorter one counts to the one before."""
    if len(phases) <= _LONGEST_LISTS:
        return phases
    ends = [start for start, _ in phases[1:]] + [count]
    long: list[tuple[int, str]] = []
    for (start, phase), end in zip(phases, ends, strict=True):
        if (not long or end - start >= count / _LONGEST_LISTS) and not (long and long[-1][1] == phase):
            long.append((start, phase))
    return long


def largest_tensors(
    tensors: Sequence[Mapping[str, Any]], moments: Sequence[int], *, each: int = _LARGEST_OF_EACH
) -> list[Mapping[str, Any]]:
    """Those that are among the `each` largest of their category at any of `moments`, in the order of their birth.

    A tensor is there from the moment `from_event` until before `to_event`, None for the end.
    """
    born = sorted(range(len(tensors)), key=lambda index: tensors[index]["from_event"])
    alive: dict[str, list[tuple[int, int]]] = defaultdict(list)
    wanted: set[int] = set()
    following = 0
    for moment in moments:
        while following < len(born) and tensors[born[following]]["from_event"] <= moment:
            index = born[following]
            heapq.heappush(alive[tensors[index]["category"]], (-tensors[index]["bytes"], index))
            following += 1
        for heap in alive.values():
            wanted |= _top(heap, tensors, moment, each)
    if len(wanted) > MOST_TENSORS:
        wanted = set(heapq.nlargest(MOST_TENSORS, wanted, key=lambda index: tensors[index]["bytes"]))
    return [tensors[index] for index in born if index in wanted]


def _top(heap: list[tuple[int, int]], tensors: Sequence[Mapping[str, Any]], moment: int, each: int) -> set[int]:
    """The largest that live at `moment`; those that are gone leave the heap where they are met."""
    found: list[tuple[int, int]] = []
    while heap and len(found) < each:
        entry = heapq.heappop(heap)
        end = tensors[entry[1]]["to_event"]
        if end is None or end > moment:
            found.append(entry)
    for entry in found:
        heapq.heappush(heap, entry)
    return {index for _, index in found}


def median(values: Sequence[float]) -> float | None:
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else None
