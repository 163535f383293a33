"""Conditions and sizes in functions that a loop's source does not lead to: callbacks, decorators, properties, modules.

`if self.steps == 700:` in a callback decides what a later iteration allocates. Each such function of the script is
looked at when it returns. What counts evenly from one iteration to the next is counted on where iterations are passed
over, and written back to where the script keeps it. The next call shows if that was right.
"""

import itertools
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

from tightfit.vgpu.counters import Roots, current, roots_of, write
from tightfit.vgpu.expressions import Reader, UnknownError
from tightfit.vgpu.far_expressions import NO_VALUE, OfModule, Watched, watched_of, watched_of_module
from tightfit.vgpu.frames import Frame, is_own
from tightfit.vgpu.running_loops import SUSPENDS

_MOST_CALLS = 16
"""Calls in one iteration that are followed each by itself."""
_MOST_VALUES = 1000
_MOST_ITEMS = 64
"""Items of a list that an expression may depend on."""
_FRAMES_TO_LOADER = 40
_RECENT = 3
"""Iterations in which a function must have been called to belong to a loop, and that tell how its numbers grow."""
_PATIENCE = 8
"""Iterations that are waited for to tell that."""
_KEPT = 4
"""Iterations whose calls are compared, if there were so many."""

Place = tuple[CodeType, int]
"""A loop, by its function and first line."""
Iterations = Mapping[Place, int]
"""How often each training loop began an iteration."""
Leaves = tuple[object, ...]
"""Values of what an expression depends on."""


class _Group(NamedTuple):
    """Calls in one iteration of a loop."""

    iteration: int
    calls: list[Leaves]


class _Even(NamedTuple):
    """How much what an expression depends on grows by, from call to call in a loop."""

    place: Place
    changes: tuple[int, ...]


@dataclass(eq=False)
class _Log:
    """One expression as it was seen in calls of its function."""

    watched: Watched
    roots: Roots
    """Where its names are."""
    groups: dict[Place, deque[_Group]] = field(default_factory=dict)
    """Calls in the latest iterations of each loop."""
    latest: Leaves = ()
    """At the latest call, also of those that were passed over."""
    values: set[object] = field(default_factory=set)
    """Values that it had so far."""
    within: _Even | None = None
    """How it grows in the loop whose iterations were passed over last."""
    expected: Leaves | None = None
    """What it should depend on in its next call."""
    last: int = 0
    """Iterations of all loops before the latest call."""
    noted: int = 0
    """Calls so far."""
    varied: set[Place] = field(default_factory=set)
    """Loops between whose iterations a whole number that it depends on changed."""
    is_refuted: bool = False
    """True if it was not what was expected."""
    is_idle: bool = False
    """True if a new value changed nothing."""
    is_uncovered: bool = False
    """True if it may have had another value in iterations that were passed over."""

    def note(self, around: Iterations, now: int, leaves: Leaves) -> None:
        for place, number in around.items():
            groups = self.groups.setdefault(place, deque(maxlen=_KEPT))
            if not groups or groups[-1].iteration != number:
                groups.append(_Group(number, [leaves]))
                if len(groups) > 1 and _differ(groups[-2].calls[0], leaves):
                    self.varied.add(place)
            elif len(groups[-1].calls) < _MOST_CALLS:
                groups[-1].calls.append(leaves)
        self.latest, self.last = leaves, now
        self.noted += 1
        value = self.value(leaves)
        if value is not None and len(self.values) < _MOST_VALUES:
            self.values.add(value)
        if self.expected is not None:
            self.is_refuted |= self.expected != leaves
            self.expected = None

    def value(self, leaves: Leaves) -> object:
        return self.of_interest(self.watched.value(leaves))

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
        return bool(self.missing() if self.watched.lines else self.values and not self.is_idle)

    def belongs_to(self, place: Place, now: Iterations) -> bool:
        groups = self.groups.get(place)
        return bool(groups) and groups is not None and now.get(place, 0) - groups[-1].iteration < _RECENT

    def is_young(self, place: Place, now: Iterations) -> bool:
        """Return True if it counts, but was not seen in enough iterations of a loop to tell how."""
        is_called = self.belongs_to(place, now) if place in self.groups else sum(now.values()) - self.last < _RECENT
        is_steady = bool(self.watched.lines) or 2 * len(self.values) <= self.noted
        return (
            not self.varied.isdisjoint(now)
            and is_called
            and is_steady
            and len(self._evenly(place)) < self._enough(place)
        )

    def _evenly(self, place: Place) -> list[_Group]:
        """Return the latest iterations with calls that lie equally far apart: a loop that begins anew is counted on."""
        groups = list(self.groups.get(place, ()))
        gaps = [two.iteration - one.iteration for one, two in itertools.pairwise(groups)]
        same = sum(1 for _ in itertools.takewhile(lambda gap: gap == gaps[-1], reversed(gaps)))
        return groups[len(groups) - 1 - same :] if groups else []

    def _enough(self, place: Place) -> int:
        """Return the iterations that tell how it grows; where it counts in a loop within the loop, that tells, too."""
        return _RECENT if self._within(place) is None else _RECENT - 1

    def _within(self, place: Place) -> _Even | None:
        return self.within if self.within is not None and self.within.place != place else None

    def courses(self, place: Place, now: Iterations) -> "list[Course]":
        """Return how what it depends on grows from one iteration of a loop to the next, for each call in one."""
        groups = self._evenly(place)
        if len(groups) < self._enough(place) or not self.belongs_to(place, now):
            return []
        gap = groups[-1].iteration - groups[-2].iteration
        inner = self._within(place)
        found = []
        for ordinal in range(1 if inner else min(len(each.calls) for each in groups)):
            calls = [each.calls[ordinal] for each in groups]
            changes = _changes(calls)
            if changes is None:
                return []
            if not self.watched.lines and len(set(map(self.value, calls))) == len(calls):
                continue  # no size: it is another one in each iteration
            within = inner.changes if inner is not None else (0,) * len(changes)
            if any(changes) or any(within):
                found.append(Course(self, calls[-1], changes, groups[-1].iteration, gap, within))
        return found


@dataclass(frozen=True, eq=False)
class Course:
    """An expression that depends on what counts evenly."""

    log: _Log
    leaves: Leaves
    """Values at the first call in the latest iteration with one."""
    changes: tuple[int, ...]
    """What each grows by until the next iteration with a call."""
    iteration: int
    gap: int
    """Iterations from call to call."""
    inner: tuple[int, ...]
    """What each grows by from call to call within an iteration, in a loop within the loop."""

    def times(self, iteration: int) -> int:
        """Return the iterations with calls, after the latest one, up to and with this one."""
        return (iteration - self.iteration) // self.gap

    def calls(self) -> int:
        """Return the calls within the latest iteration, by how far its numbers came."""
        each = zip(self.leaves, self.log.latest, self.inner, strict=True)
        counts = [
            (last - first) // change + 1
            for first, last, change in each
            if change and isinstance(first, int) and isinstance(last, int)
        ]
        return max([1, *counts])

    def is_sound(self) -> bool:
        """Return True if the numbers go on where the iteration before ended, or begin anew."""
        calls = self.calls()
        pairs = zip(self.changes, self.inner, strict=True)
        return all(not (change and within) or change == calls * within for change, within in pairs)


class _Deciding(NamedTuple):
    """An expression of which a new value is looked for."""

    log: _Log
    value_at: Callable[[int, int], object]
    iteration: int
    gap: int
    calls: range

    @classmethod
    def on(cls, course: Course) -> "_Deciding":
        value_at = course.log.watched.along(course.leaves, course.changes, course.inner)
        return cls(course.log, value_at, course.iteration, course.gap, range(course.calls()))

    def is_new(self, iteration: int) -> bool:
        """Return True if the expression has a new value in an iteration."""
        times, remainder = divmod(iteration - self.iteration, self.gap)
        if remainder:
            return False
        log = self.log
        for call in self.calls:
            try:
                value = log.of_interest(self.value_at(times, call))
            except NO_VALUE:
                continue
            if value is not None and value not in log.values:
                return True
        return False


class FarConditions:
    """Follows such expressions."""

    def __init__(self, iterations: Callable[[], Iterations], around: Callable[[FrameType | None], Iterations]) -> None:
        """`iterations` returns how often the training loops began an iteration, `around` all loops around a frame."""
        self._iterations, self._around = iterations, around
        self._is_own: dict[object, bool] = {}
        """For the names of modules whether they are in the user's own files."""
        self._watched: dict[int, tuple[CodeType, tuple[Watched, ...]]] = {}
        """Expressions by their functions' code, which is kept so that its identity stays its own."""
        self._of_modules: dict[type[nn.Module], tuple[OfModule, ...]] = {}
        self._logs: dict[tuple[Watched, int], _Log] = {}
        self._hits: list[_Log] = []
        """Those with a new value in the iteration that others were passed over for."""
        self._state: Hashable = None
        """How steps repeated before that."""
        self._waiting: dict[Place, int] = {}
        """For these loops, the iteration from which on more of them have to tell how something grows."""
        self._ended: set[Place] = set()
        """Loops that were followed to their end, or as far as could be."""

    def is_own(self, frame: FrameType) -> bool:
        """Return True if a function that is called is in a module of the user's own files."""
        name = frame.f_globals.get("__name__")
        known = self._is_own.get(name)
        if known is None:
            known = is_own(frame.f_code)
            if not frame.f_code.co_filename.startswith("<"):  # what a data class generates is in its module, too
                self._is_own[name] = known
        return known

    def called(self, frame: FrameType) -> Any:  # the type of sys.settrace's functions
        """Return what Python shall call when this function returns; None if nothing in it decides."""
        if not self._of(frame.f_code) or not self._iterations() or _is_fetching(frame):
            return None
        frame.f_trace_lines = False
        return self._traced

    def _traced(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "return":
            self.returned(frame)
        return self._traced

    def _of(self, code: CodeType) -> tuple[Watched, ...]:
        known = self._watched.get(id(code))
        if known is None:
            is_followed = is_own(code) and not code.co_flags & SUSPENDS and code.co_name != "__init__"
            found = watched_of(code) if is_followed else ()
            known = self._watched[id(code)] = (code, found)
        return known[1]

    def returned(self, frame: FrameType) -> None:
        """Look at a function of the script that returns: its names die with it."""
        watched = self._of(frame.f_code)
        around = self._around(frame.f_back) if watched else {}
        if around:
            names = frame.f_locals
            for each in watched:
                self._note(around, each, 0, names, frame.f_globals, frame.f_code)

    def after_module(self, module: nn.Module) -> None:
        """Look at a module whose forward pass has ended: Python's tracing is off within it."""
        kind = type(module)
        watched = self._of_modules.get(kind)
        if watched is None:
            watched = self._of_modules[kind] = watched_of_module(kind)
        around = self._around(sys._getframe(1)) if watched else {}
        if around:
            for each in watched:
                self._note(around, each.watched, id(module), {each.owner: module}, each.others, None)

    def _note(
        self,
        around: Iterations,
        watched: Watched,
        owner: int,
        names: Mapping[str, object],
        others: dict[str, object],
        code: CodeType | None,
    ) -> None:
        reader = Reader(names, others, frozenset())
        try:
            leaves = tuple(_plain(reader.value(each)) for each in watched.leaves)
        except UnknownError:
            return
        log = self._logs.get((watched, owner))
        roots = roots_of(watched.leaves, names, others, code)
        if log is None:
            log = self._logs[watched, owner] = _Log(watched, roots)
        log.roots = roots
        log.note(around, sum(self._iterations().values()), leaves)

    def is_open(self, place: Place) -> bool:
        """Return True if one of them may have a new value in a later iteration of a loop, or nobody can tell yet."""
        return self.can_pass(place) or self.waits(place)

    def waits(self, place: Place) -> bool:
        """Return True if more iterations of a loop have to tell how one of them grows."""
        now = self._iterations()
        logs = (each for each in self._logs.values() if not each.is_refuted and each.decides())
        if place in self._ended or not any(each.is_young(place, now) for each in logs):
            return False
        return now.get(place, 0) - self._waiting.setdefault(place, now.get(place, 0)) < _PATIENCE

    def can_pass(self, place: Place) -> bool:
        """Return True if one of them may have a new value in an iteration that others can be passed over for."""
        return place not in self._ended and any(each.log.decides() for each in self._courses(place))

    def _courses(self, place: Place) -> list[Course]:
        now = self._iterations()
        logs = (each for each in self._logs.values() if not each.is_refuted)
        return [course for log in logs for course in log.courses(place, now)]

    def reopen(self, place: Place) -> None:
        """Note that a loop begins anew."""
        self._ended.discard(place)
        self._waiting.pop(place, None)

    def begin(self, state: Hashable) -> None:
        """Note how steps repeat where iterations begin to be passed over: what changed nothing then decides nothing."""
        if self._state == state:
            for log in self._hits:
                log.is_idle |= not log.watched.lines
        self._hits, self._state = [], state

    def passing(self, place: Place) -> "Passing":
        sound = [each for each in self._courses(place) if each.is_sound()]
        return Passing(place, sound, self._iterations().get(place, 0))

    def end(self, passing: "Passing", passed: int, *, is_exhausted: bool, is_stuck: bool) -> None:
        """Write back what counts after so many iterations were passed over.

        The loop may have come to its end, or nothing more could be passed over.
        """
        place, now = passing.place, self._iterations()
        self._hits = passing.hits
        followed = {id(each.log) for each in passing.courses}
        if passed:
            passing.write(passed)
            for log in self._logs.values():
                log.is_uncovered |= id(log) not in followed and log.belongs_to(place, now)
                log.groups.pop(place, None)
        if is_stuck:
            self.left(place)
        if is_exhausted or is_stuck:
            self._ended.add(place)

    def left_all(self) -> None:
        """Note that the script is left before its end."""
        for place in self._iterations():
            self.left(place)

    def left(self, place: Place) -> None:
        """Note that a loop is left before its end."""
        now = self._iterations()
        for log in self._logs.values() if place not in self._ended else ():
            log.is_uncovered |= log.belongs_to(place, now)

    def unsure(self) -> list[Frame]:
        """List the lines that may allocate behind conditions that vary and may have held where nothing was played."""
        now = self._iterations()
        logs = (each for each in self._logs.values() if each.is_uncovered and not each.varied.isdisjoint(now))
        return list(dict.fromkeys(line for log in logs for line in log.missing()))


class Passing:
    """Counts on where iterations of a loop are passed over."""

    def __init__(self, place: Place, courses: list[Course], iteration: int) -> None:
        """`iteration` is the number of the first one that is passed over."""
        self.place, self.courses, self._first = place, courses, iteration
        self.hits: list[_Log] = []
        """Expressions with a new value in the iteration that has to run."""
        self._deciding = [_Deciding.on(each) for each in courses if each.log.decides()]
        self._before = [(course, current(course.log.watched.leaves, course.log.roots)) for course in courses]

    def has_to_run(self, passed: int) -> bool:
        """Return True if an expression has a new value in the iteration after so many that are passed over."""
        for each in self._deciding:
            if each.is_new(self._first + passed):
                self.hits.append(each.log)
        return bool(self.hits)

    def write(self, passed: int) -> None:
        """Write what counts to where the script keeps it, and note what the next call should find."""
        last = self._first + passed - 1
        for course, before in self._before:
            log, times = course.log, course.times(last)
            for leaf, value, change in zip(log.watched.leaves, before, course.changes, strict=True):
                if change and times and isinstance(value, int):
                    write(leaf, log.roots, value, value + change * times)
        for course in reversed(self.courses):
            log, times = course.log, course.times(last)
            log.expected = _grown(course.leaves, course.changes, times + 1)
            if times:
                first = _grown(course.leaves, course.changes, times)
                log.latest = _grown(first, course.inner, course.calls() - 1)
            if not any(course.inner):
                log.within = _Even(self.place, course.changes)


class _Object:
    """Stands for whatever is no number."""


_OBJECT = _Object()


def _plain(value: object) -> object:
    """Return a number or text, or a short collection of such; else only that there is something."""
    if isinstance(value, (tuple, list, set, frozenset, dict)):
        is_plain = len(value) <= _MOST_ITEMS and all(isinstance(each, (int, float, str)) for each in value)
    else:
        is_plain = isinstance(value, (int, float, str, range, type(None)))
    return value if is_plain else _OBJECT


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _differ(one: Leaves, two: Leaves) -> bool:
    """Return True if a whole number is another one."""
    return any(_is_count(a) and _is_count(b) and a != b for a, b in zip(one, two, strict=True))


def _changes(calls: list[Leaves]) -> tuple[int, ...] | None:
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


def _grown(leaves: Leaves, changes: Iterable[int], times: int) -> Leaves:
    pairs = zip(leaves, changes, strict=True)
    return tuple(value + change * times if change and isinstance(value, int) else value for value, change in pairs)


def _is_fetching(frame: FrameType) -> bool:
    """Return True for a function that makes samples: the items of a loop are really taken where it is passed over."""
    caller = frame.f_back
    for _ in range(_FRAMES_TO_LOADER):
        if caller is None:
            return False
        if caller.f_code.co_flags & SUSPENDS or "torch/utils/data/" in caller.f_code.co_filename:
            return True
        caller = caller.f_back
    return False
