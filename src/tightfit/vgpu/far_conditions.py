"""Conditions and sizes in functions that a loop's source does not lead to: callbacks, decorators, properties, modules.

`if self.steps == 700:` in a callback decides what a later iteration allocates. The inputs of such an expression are
read when its function returns. Where iterations are passed over, inputs that grow evenly are counted on and written
back to the script's objects. The next call shows if that was right.
"""

import ast
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

from tightfit.vgpu.counters import current, roots_of, write
from tightfit.vgpu.expressions import Reader
from tightfit.vgpu.far_expressions import NO_VALUE, OfModule, Watched, watched_of, watched_of_module
from tightfit.vgpu.frames import Frame, is_own
from tightfit.vgpu.histories import History, InnerTrend, Iterations, Place, Trend, grown
from tightfit.vgpu.operations import UnknownError
from tightfit.vgpu.read_loops import CHANGES_IN_TURN
from tightfit.vgpu.running_loops import SUSPENDS
from tightfit.vgpu.watched_values import Extremes

_MOST_ITEMS = 64
"""Items of a list that is an input."""
_MOST_CALLERS = 40
"""Callers of a function that are looked at."""
_MOST_AHEAD = 100_000
"""Iterations in which the largest and the smallest size are looked for."""
_PATIENCE = 8
"""Iterations that are played to learn how inputs grow."""


class _Deciding(NamedTuple):
    """An expression, and its values in later iterations."""

    history: History
    value_at: Callable[[int, int], object]
    """Gives the value after some iterations with a call, at one of the calls in the last of them."""
    iteration: int
    """Number of the iteration that is counted from."""
    gap: int
    """Iterations from one with a call to the next."""
    calls: range
    chosen: frozenset[int] | None = None
    """Iterations that have to run; None if each with a new value has to."""

    @classmethod
    def on(cls, trend: Trend, first: int, left: int | None) -> "_Deciding":
        """Look at iterations from the `first` on, of which so many are `left`; None if nobody knows."""
        value_at = trend.history.watched.along(trend.inputs, trend.changes, trend.inner)
        made = cls(trend.history, value_at, trend.iteration, trend.gap, range(trend.calls()))
        changes_often = not trend.history.watched.lines and len(trend.history.values) > CHANGES_IN_TURN
        return made._replace(chosen=made._choose(first, left)) if changes_often and left is not None else made

    def _choose(self, first: int, left: int) -> frozenset[int]:
        """Return the iterations with the largest and the smallest value, if they exceed those so far."""
        extremes = Extremes(self.history.values)
        for iteration in range(first, first + min(left, _MOST_AHEAD)):
            for value in self._values(iteration):
                extremes.note(value, iteration)
        return frozenset(extremes.chosen())

    def is_new(self, iteration: int) -> bool:
        """Return True if the expression has a new value in an iteration that has to run."""
        is_chosen = self.chosen is None or iteration in self.chosen
        return is_chosen and any(value not in self.history.values for value in self._values(iteration))

    def _values(self, iteration: int) -> Iterator[object]:
        times, remainder = divmod(iteration - self.iteration, self.gap)
        for call in self.calls if not remainder else ():
            try:
                value = self.history.of_interest(self.value_at(times, call))
            except NO_VALUE:
                continue
            if value is not None:
                yield value


class FarConditions:
    """Reads the inputs of such expressions, and tells which later iterations have to run for their sake."""

    def __init__(self, iterations: Callable[[], Iterations], around: Callable[[FrameType | None], Iterations]) -> None:
        """`iterations` returns how often the training loops began an iteration, `around` all loops around a frame."""
        self._iterations, self._around = iterations, around
        self._is_own: dict[object, bool] = {}
        """True for names of modules that are in the user's own files."""
        self._watched: dict[int, tuple[CodeType, tuple[Watched, ...]]] = {}
        """Expressions by their functions' code, which is kept so that its identity stays its own."""
        self._of_modules: dict[type[nn.Module], tuple[OfModule, ...]] = {}
        self._histories: dict[tuple[Watched, int], History] = {}
        self._hits: list[History] = []
        """Expressions with a new value in the iteration that others were passed over for."""
        self._state: Hashable = None
        """Allocations of the steps that repeated before that iteration."""
        self._waiting: dict[Place, int] = {}
        """First iterations that were played, in each loop, to learn how inputs grow."""
        self._ended: set[Place] = set()
        """Loops that were followed to their end, or as far as possible."""

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
        """Return the function for Python to call when this one returns; None if nothing in it decides."""
        if not self._of(frame.f_code) or _is_fetching(frame):
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
        """Read the inputs in a function of the script that returns; its names die with it, so that none is kept."""
        watched = self._of(frame.f_code)
        if watched:
            around, names = self._around(frame.f_back), frame.f_locals
            for each in watched:
                self._note(around, each, 0, names, frame.f_globals, frame.f_code)

    def after_module(self, module: nn.Module) -> None:
        """Read the inputs in a module after its forward pass, in which Python's tracing is off."""
        kind = type(module)
        watched = self._of_modules.get(kind)
        if watched is None:
            watched = self._of_modules[kind] = watched_of_module(kind)
        if watched:
            around = self._around(sys._getframe(1))
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
        inputs = tuple(_read(reader, each) for each in watched.inputs)
        history = self._histories.get((watched, owner))
        roots = roots_of(watched.inputs, names, others, code)
        if history is None:
            history = self._histories[watched, owner] = History(watched, roots)
        history.roots = roots
        history.note(around, sum(self._iterations().values()), inputs)

    def is_open(self, place: Place) -> bool:
        """Return True if an expression may have a new value in a later iteration, or nobody can tell yet."""
        return self.can_pass(place) or self.waits(place)

    def waits(self, place: Place) -> bool:
        """Return True if more iterations of a loop have to be played to learn how inputs grow."""
        now = self._iterations()
        histories = (each for each in self._histories.values() if not each.is_refuted and each.decides())
        if place in self._ended or not any(each.is_young(place, now) for each in histories):
            return False
        return now.get(place, 0) - self._waiting.setdefault(place, now.get(place, 0)) < _PATIENCE

    def can_pass(self, place: Place) -> bool:
        """Return True if inputs grow evenly, and a later iteration may have a new value."""
        return place not in self._ended and any(
            each.history.decides() and not each.is_settled() for each in self._trends(place)
        )

    def _trends(self, place: Place) -> list[Trend]:
        now = self._iterations()
        histories = (each for each in self._histories.values() if not each.is_refuted)
        return [trend for history in histories for trend in history.trends(place, now)]

    def reopen(self, place: Place) -> None:
        """Note that a loop begins anew."""
        self._ended.discard(place)
        self._waiting.pop(place, None)

    def begin(self, state: Hashable) -> None:
        """Note the steps that repeat when a loop begins to be passed over: a new size that changed nothing is idle."""
        if self._state == state:
            for history in self._hits:
                history.is_idle |= not history.watched.lines
        self._hits, self._state = [], state

    def passing(self, place: Place, left: int | None) -> "Passing":
        """Begin to pass over iterations of a loop that has so many `left`; None if nobody knows."""
        sound = [each for each in self._trends(place) if each.is_sound()]
        return Passing(place, sound, self._iterations().get(place, 0), left)

    def end(self, passing: "Passing", passed: int, *, is_exhausted: bool, is_stuck: bool) -> None:
        """Write inputs back after so many iterations were passed over.

        The loop came to its end (`is_exhausted`), or nothing more could be passed over (`is_stuck`).
        """
        place, now = passing.place, self._iterations()
        self._hits = passing.hits
        followed = {id(each.history) for each in passing.trends}
        if passed:
            passing.write(passed)
            for history in self._histories.values():
                history.is_uncovered |= id(history) not in followed and history.belongs_to(place, now)
                history.groups.pop(place, None)
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
        for history in self._histories.values() if place not in self._ended else ():
            history.is_uncovered |= history.belongs_to(place, now) and not history.is_settled(place)

    def unsure(self) -> list[Frame]:
        """List lines that may allocate and never ran, behind conditions that may have held in passed iterations."""
        now = self._iterations()
        histories = (each for each in self._histories.values() if each.is_uncovered and not each.varied.isdisjoint(now))
        return list(dict.fromkeys(line for history in histories for line in history.missing()))


class Passing:
    """The expressions of one loop while its iterations are passed over."""

    def __init__(self, place: Place, trends: list[Trend], iteration: int, left: int | None) -> None:
        """`iteration` is the number of the first one that is passed over."""
        self.place, self.trends, self._first = place, trends, iteration
        self.hits: list[History] = []
        """Expressions with a new value in the iteration that has to run."""
        self._deciding = [_Deciding.on(each, iteration, left) for each in trends if each.history.decides()]
        self._before = [(trend, current(trend.history.watched.inputs, trend.history.roots)) for trend in trends]

    def has_to_run(self, passed: int) -> bool:
        """Return True if an expression has a new value in the iteration after so many that are passed over."""
        for each in self._deciding:
            if each.is_new(self._first + passed):
                self.hits.append(each.history)
        return bool(self.hits)

    def write(self, passed: int) -> None:
        """Write the inputs back to the script's objects, and note the inputs that the next call should have."""
        last = self._first + passed - 1
        for trend, before in self._before:
            history, times = trend.history, trend.times(last)
            for each_input, value, change in zip(history.watched.inputs, before, trend.changes, strict=True):
                if change and times and isinstance(value, int):
                    write(each_input, history.roots, value, value + change * times)
        for trend in reversed(self.trends):
            history, times = trend.history, trend.times(last)
            history.expected = grown(trend.inputs, trend.changes, times + 1)
            if times:
                first = grown(trend.inputs, trend.changes, times)
                history.latest = grown(first, trend.inner, trend.calls() - 1)
            if not any(trend.inner):
                history.within = InnerTrend(self.place, trend.changes)


class _Object:
    """An input that is neither a number nor text, or that has no value yet."""


_OBJECT = _Object()


def _read(reader: Reader, each_input: ast.expr) -> object:
    try:
        return _plain(reader.value(each_input))
    except UnknownError:
        return _OBJECT


def _plain(value: object) -> object:
    """Return numbers, text and short collections of them as they are, and one object for everything else."""
    if isinstance(value, (tuple, list, set, frozenset, dict)):
        parts = (*value, *value.values()) if isinstance(value, dict) else value
        is_plain = len(value) <= _MOST_ITEMS and all(isinstance(each, (int, float, str)) for each in parts)
    else:
        is_plain = isinstance(value, (int, float, str, range, type(None)))
    return value if is_plain else _OBJECT


def _is_fetching(frame: FrameType) -> bool:
    """Return True for a function that makes samples: the items of a loop are really taken where it is passed over."""
    caller = frame.f_back
    for _ in range(_MOST_CALLERS):
        if caller is None:
            return False
        if caller.f_code.co_flags & SUSPENDS or "torch/utils/data/" in caller.f_code.co_filename:
            return True
        caller = caller.f_back
    return False
