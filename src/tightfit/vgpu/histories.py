"""How the inputs of an expression change from one iteration of a loop to the next.

An input is a name, attribute or item in the expression, such as `self.steps`. Whole numbers that grow by the same
amount each time are extended beyond the iterations that were seen.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import NamedTuple

from tightfit.vgpu.counters import Roots
from tightfit.vgpu.far_expressions import NO_VALUE, Watched
from tightfit.vgpu.frames import Frame

_MOST_CALLS = 16
"""Calls in one iteration that are followed each by itself."""
_MOST_VALUES = 1000
_RECENT = 3
"""Iterations in which a function must have been called to belong to a loop, and that tell how its numbers grow."""
_FAR_AWAY = 1 << 40
"""Iterations that no loop has."""
_KEPT = 4
"""Iterations whose calls are compared, if there were so many."""

Place = tuple[CodeType, int]
"""A loop, by its function and first line."""
Iterations = Mapping[Place, int]
"""How often each training loop began an iteration."""
Inputs = tuple[object, ...]
"""Values of an expression's inputs."""


class _Group(NamedTuple):
    """Calls in one iteration of a loop."""

    iteration: int
    calls: list[Inputs]


class InnerTrend(NamedTuple):
    """By how much each input grows from call to call in a loop, which may be within another one."""

    place: Place
    changes: tuple[int, ...]


@dataclass(eq=False)
class History:
    """An expression and its inputs in the calls of its function so far."""

    watched: Watched
    roots: Roots
    """The places of the names in its inputs."""
    groups: dict[Place, deque[_Group]] = field(default_factory=dict)
    """Calls in the latest iterations of each loop."""
    latest: Inputs = ()
    """Inputs of the latest call, which may be one that was passed over."""
    values: set[object] = field(default_factory=set)
    """Values of the expression so far."""
    within: InnerTrend | None = None
    """Growth in the loop that iterations were passed over in last."""
    expected: Inputs | None = None
    """Inputs that the next call should have."""
    last: int = 0
    """Iterations of all loops before the latest call."""
    noted: int = 0
    """Calls so far."""
    varied: set[Place] = field(default_factory=set)
    """Loops with a whole number among the inputs that changed from one iteration to the next."""
    directions: set[tuple[int, bool]] = field(default_factory=set)
    """Inputs by their place, with True for one that grew from one iteration to the next, False for one that fell."""
    is_refuted: bool = False
    """True if a call had other inputs than expected."""
    is_idle: bool = False
    """True if a new value of the expression changed nothing."""
    is_uncovered: bool = False
    """True if the expression may have had a new value in iterations that were passed over."""

    def note(self, around: Iterations, now: int, inputs: Inputs) -> None:
        for place, number in around.items():
            groups = self.groups.setdefault(place, deque(maxlen=_KEPT))
            if not groups or groups[-1].iteration != number:
                self.directions |= _directions(*list(groups)[-2:])
                groups.append(_Group(number, [inputs]))
                if len(groups) > 1 and differ(groups[-2].calls[0], inputs):
                    self.varied.add(place)
            elif len(groups[-1].calls) < _MOST_CALLS:
                groups[-1].calls.append(inputs)
        self.latest, self.last = inputs, now
        self.noted += 1
        value = self.value(inputs)
        if value is not None and len(self.values) < _MOST_VALUES:
            self.values.add(value)
        if self.expected is not None:
            self.is_refuted |= self.expected != inputs
            self.expected = None

    def value(self, inputs: Inputs) -> object:
        """Return the expression's value, as `of_interest`."""
        return self.of_interest(self.watched.value(inputs))

    def of_interest(self, value: object) -> object:
        """Return True or False for a condition's value, and a size as it is; None for what decides nothing."""
        if self.watched.lines and value is not None:
            return bool(value)
        return value if isinstance(value, (int, str)) else None

    def missing(self) -> tuple[Frame, ...]:
        """Return the lines behind the condition that cannot have run yet."""
        unseen = [key for key in (True, False) if key not in self.values]
        return tuple(line for key in unseen for line in self.watched.lines.get(key, ()))

    def decides(self) -> bool:
        """Return True if a new value may allocate something else."""
        if self.watched.lines:
            return bool(self.missing())
        has_both = len(self.values) == 2 and all(isinstance(each, bool) for each in self.values)
        return bool(self.values) and not (self.is_idle or has_both)

    def belongs_to(self, place: Place, now: Iterations) -> bool:
        groups = self.groups.get(place)
        return bool(groups) and groups is not None and now.get(place, 0) - groups[-1].iteration < _RECENT

    def is_young(self, place: Place, now: Iterations) -> bool:
        """Return True if inputs change, and too few iterations of a loop were seen to tell by how much."""
        is_called = self.belongs_to(place, now) if place in self.groups else sum(now.values()) - self.last < _RECENT
        is_steady = bool(self.watched.lines) or 2 * len(self.values) <= self.noted
        is_early = len(self._evenly(place)) < self._enough(place) and not self.is_settled(place)
        return not self.varied.isdisjoint(now) and is_called and is_steady and is_early

    def is_settled(self, place: Place) -> bool:
        """Return True if the growth between the latest two iterations with calls keeps the value for good."""
        groups = list(self.groups.get(place, ()))[-2:]
        changes = _changes([each.calls[0] for each in groups]) if len(groups) == 2 else None
        if changes is None:
            return False
        return Trend(self, groups[-1].calls[0], changes, 0, 1, (0,) * len(changes)).is_settled()

    def _evenly(self, place: Place) -> list[_Group]:
        """Return the latest iterations with calls that lie equally far apart: a loop that begins anew is counted on."""
        groups = list(self.groups.get(place, ()))
        gaps = [two.iteration - one.iteration for one, two in itertools.pairwise(groups)]
        same = sum(1 for _ in itertools.takewhile(lambda gap: gap == gaps[-1], reversed(gaps)))
        return groups[len(groups) - 1 - same :] if groups else []

    def _enough(self, place: Place) -> int:
        """Return how many iterations tell the growth: one less if the growth in a loop within the loop is known."""
        return _RECENT if self._within(place) is None else _RECENT - 1

    def _within(self, place: Place) -> InnerTrend | None:
        return self.within if self.within is not None and self.within.place != place else None

    def _begins_anew(self, place: int) -> bool:
        """Return True for an input that turns back, such as a position in data: it grows evenly only up to there."""
        return place in self.watched.cyclic or {(place, True), (place, False)} <= self.directions

    def trends(self, place: Place, now: Iterations) -> "list[Trend]":
        """Return the growth of the inputs from one iteration of a loop to the next, for each call in an iteration."""
        groups = self._evenly(place)
        if len(groups) < self._enough(place) or not self.belongs_to(place, now):
            return []
        gap = groups[-1].iteration - groups[-2].iteration
        inner = self._within(place)
        found = []
        for ordinal in range(1 if inner else min(len(each.calls) for each in groups)):
            calls = [each.calls[ordinal] for each in groups]
            changes = _changes(calls)
            if changes is None or any(change and self._begins_anew(at) for at, change in enumerate(changes)):
                return []
            if not self.watched.lines and len(set(map(self.value, calls))) == len(calls):
                continue  # a size that is another one in each iteration would not let steps repeat
            within = inner.changes if inner is not None else (0,) * len(changes)
            if any(changes) or any(within):
                found.append(Trend(self, calls[-1], changes, groups[-1].iteration, gap, within))
        return found


@dataclass(frozen=True, eq=False)
class Trend:
    """An expression with inputs that stay as they are or grow evenly."""

    history: History
    inputs: Inputs
    """Inputs of the first call in the latest iteration with a call."""
    changes: tuple[int, ...]
    """Growth of each input until the next iteration with a call."""
    iteration: int
    """Number of the latest iteration with a call."""
    gap: int
    """Iterations from one with a call to the next."""
    inner: tuple[int, ...]
    """Growth of each input from call to call within an iteration."""

    def times(self, iteration: int) -> int:
        """Return the iterations with calls, after the latest one, up to and with this one."""
        return (iteration - self.iteration) // self.gap

    def calls(self) -> int:
        """Return the calls within the latest iteration, by how far its numbers came."""
        each = zip(self.inputs, self.history.latest, self.inner, strict=True)
        counts = [
            (last - first) // change + 1
            for first, last, change in each
            if change and isinstance(first, int) and isinstance(last, int)
        ]
        return max([1, *counts])

    def is_settled(self) -> bool:
        """Return True if the expression keeps its value for good: a comparison that changed already, or never will."""
        watched = self.history.watched
        if not watched.is_monotone or any(self.inner):
            return False
        try:
            later = watched.along(self.inputs, self.changes, self.inner)(_FAR_AWAY, 0)
        except NO_VALUE:
            return False
        return self.history.of_interest(later) in self.history.values

    def is_sound(self) -> bool:
        """Return True if the numbers go on where the iteration before ended, or begin anew."""
        calls = self.calls()
        pairs = zip(self.changes, self.inner, strict=True)
        return all(not (change and within) or change == calls * within for change, within in pairs)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def differ(one: Inputs, two: Inputs) -> bool:
    """Return True if a whole number is another one."""
    return any(_is_count(a) and _is_count(b) and a != b for a, b in zip(one, two, strict=True))


def _directions(*groups: _Group) -> set[tuple[int, bool]]:
    """Return the places of inputs that grew or fell between two iterations with as many calls."""
    if len(groups) < 2 or len(groups[0].calls) != len(groups[1].calls):
        return set()
    pairs = (zip(one, two, strict=True) for one, two in zip(groups[0].calls, groups[1].calls, strict=True))
    places = ((place, a, b) for pair in pairs for place, (a, b) in enumerate(pair))
    return {(place, b > a) for place, a, b in places if isinstance(a, int) and isinstance(b, int) and a != b}


def _changes(calls: list[Inputs]) -> tuple[int, ...] | None:
    """Return by how much each value grows from call to call; None if one does so unevenly."""
    found = []
    for values in zip(*calls, strict=True):
        if all(each == values[0] for each in values):
            found.append(0)
        elif all(map(_is_count, values)):
            each = {two - one for one, two in itertools.pairwise(values)}
            if len(each) > 1:
                return None
            found.append(each.pop())
        else:
            return None
    return tuple(found)


def grown(inputs: Inputs, changes: Iterable[int], times: int) -> Inputs:
    pairs = zip(inputs, changes, strict=True)
    return tuple(value + change * times if change and isinstance(value, int) else value for value, change in pairs)
