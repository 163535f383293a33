"""Iterations of a training loop that repeat pass without running, up to one that would run lines that never ran.

`if step % 500 == 0: evaluate()` runs at step 500, which may be an hour away on the virtual card. The loop's counters
and conditions are read from its source and followed; nothing of the script is called. A condition that depends on
anything else counts as not met. One iteration runs first, to check that the counters were read correctly.
"""

import ast
import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from time import monotonic, process_time
from types import FrameType
from typing import TypeGuard

from tightfit.vgpu.ending_iterators import EndingIterators
from tightfit.vgpu.expressions import INNER, Reader, Unsure, value_in
from tightfit.vgpu.followed_iteration import FollowedIteration, Names
from tightfit.vgpu.loop_items import FAILURES
from tightfit.vgpu.loop_source import blocks_of, head_line
from tightfit.vgpu.operations import NUMBERS, PLAIN, UnknownError
from tightfit.vgpu.plain_branches import ENDS
from tightfit.vgpu.reduced_iteration import (
    ANEW,
    MOST_INNER,
    PLAY,
    TAKE,
    ReducedIteration,
    covers,
    given,
    is_call,
    is_end,
)
from tightfit.vgpu.watched_values import Values, WatchedValues

_SECONDS, _WAIT = 10.0, 40.0
"""Seconds of the processor, and of the clock, for passing over iterations of one loop; then they run again."""
_MOST_CUT_OFF = 3


@dataclass(frozen=True)
class LoopItems:
    """Items of the loop that is passed over."""

    left: int | None
    """Items that a `for` loop has left; None if nobody knows."""
    advance: Callable[[], bool]
    """Takes the next item away; False if there is none."""
    has_to_run: Callable[[int], bool]
    """Tells if so many next items hold one that is not to be taken away."""
    has_those: Callable[[object, int], bool]
    """Tells the same of any iterator."""
    put_back: Callable[[int], bool]
    """Lets the loop have so many of the items that were taken last; False if that cannot be done."""
    differ: bool = False
    """True if the last one may be smaller than the others: the loop may leave its tensors behind."""


@dataclass(frozen=True)
class Aims:
    """A loop to pass over, and its iterations that have to run."""

    node: ast.For | ast.While
    missing: Collection[int] = ()
    """Lines that never ran, for which an iteration has to."""
    ran: Collection[int] = ()
    """Lines that ran."""
    steps: int = 1
    """Iterations of one optimizer step: an iteration to run is reached with all of its step."""
    line: int = 0
    """Line where every iteration begins, if the body of `node` is not as it is in the file."""
    to_end: bool = False
    """Go on to the loop's end if nothing is missing, or to its last step if that takes several iterations."""
    plays_last: bool = False
    """Go on to its last step also if that is one iteration."""


@dataclass(frozen=True)
class Surroundings:
    """Answers about a loop from the object that follows the script."""

    lengths: Callable[[], Mapping[int, int]] = dict
    """Returns the iterations of loops within the loop, by their lines, as far as they ran."""
    far: Callable[[int | None], Callable[[int], bool] | None] = lambda left: None
    """Is called when iterations begin to be passed over, with those that are left. Returns a function of their number
    that is True if the next one has to run, for conditions not in this loop."""
    newly: Callable[[], Collection[int]] = tuple
    """Returns the lines that ran for the first time since."""


class Skip:
    """Passes over the iterations of one loop of a running function."""

    def __init__(self, aims: Aims, around: Surroundings | None = None, watched: WatchedValues | None = None) -> None:
        """`watched` tells where values that may decide sizes are new."""
        self._node, self._ran, self.to_end = aims.node, aims.ran, aims.to_end
        self._plays_last = aims.plays_last
        self._around = around or Surroundings()
        self.watched = watched or WatchedValues()
        self.steps = max(1, aims.steps)
        self._missing = set(aims.missing)
        self._far: Callable[[int], bool] | None = None
        self.passed = 0
        """Iterations that were passed over."""
        self.is_exhausted = False
        """True if there were no more, but for those of a last step that takes several."""
        self._lists = {
            ast.unparse(each.args[0])
            for each in ast.walk(aims.node)
            if isinstance(each, ast.Call) and _has_length(each)
        }
        self._ending = {ast.unparse(each.args[0]) for each in ast.walk(aims.node) if is_end(each)}
        self._ends = EndingIterators()
        self._before: tuple[dict[str, object], dict[str, object]] | None = None
        """The counters expected after the iteration that runs, and the values that its conditions read."""
        self._inner_counters, self._set_anew = set[str](), set[str]()
        self._cut_off = 0
        """Iterations before it that could not be followed to their ends."""
        self._unsure: Unsure = frozenset()
        self._found: Values = {}
        """Values of the expressions that are watched, in the iteration that runs before any is passed over."""
        self.counts_on = False
        """True if the loop adds to numbers that it does not begin with: another run of it may have other sizes."""
        self.is_changing = False
        """True if iterations were passed up to one in which such a value changes, here or in functions far away."""
        self.unsure_lines: frozenset[int] = frozenset()
        """Lines that may have run in iterations passed over: only the script could tell their conditions."""
        self.chance_lines: frozenset[int] = frozenset()
        """Those of them that chance, or an iterator, decides on."""
        self.staying_lines: frozenset[int] = frozenset()
        """Lines behind conditions that come out as before, however long the play goes on."""
        self.is_reached = False
        """True if they were passed up to one that has to run."""
        self.names: dict[str, object] = {}
        """The function's names as they were read last."""
        self.line = aims.line or head_line(aims.node)
        """Line at which every iteration begins."""
        self.is_over = False
        """True when the next iteration has to run, or nothing more can be passed."""

    def at_head(self, frame: FrameType, items: LoopItems) -> None:
        """Pass over as many iterations as can be, at the line of the loop."""
        self.names = frame.f_locals  # read once: Python writes what changes there back
        self.names |= {ENDS: self._ends.is_at_end, TAKE: self._ends.take, ANEW: self._ends.begin_anew}
        try:
            self._follow(frame, self.names, frame.f_globals, items)
        finally:
            for name in (ENDS, TAKE, ANEW):
                del self.names[name]

    def _follow(self, frame: FrameType, names: Names, others: Names, items: LoopItems) -> None:
        self._missing -= set(self._around.newly())
        if self._before is None:
            cut_off = self._cut_off
            expected = self._expected(frame, names, others)
            if not cut_off < self._cut_off <= _MOST_CUT_OFF:  # else what has to run comes in this one: it tells nothing
                self._before = expected
            return
        self._compare(*self._before, names, others)
        each, _ = self._code(frame, names, others)
        reduced = each.reduced
        self.staying_lines = frozenset(reduced.staying)
        self.counts_on = bool(reduced.added_to)
        begun = process_time(), monotonic()
        self._far = self._around.far(items.left)
        is_counting = bool(reduced.counters) or isinstance(self._node, ast.For) or self._far is not None
        steady = self._steady(each) if is_counting and self.watched.is_on else {}
        self.watched.start(steady, self._ran, self._found)
        most = items.left if isinstance(self._node, ast.For) else MOST_INNER
        if self.watched.looks_ahead and self.watched.is_on and most is not None:
            before = each.values()
            self.watched.choose(self._ahead(each, most))
            self._restore(before, each)
        if is_counting and self._has_aim(reduced):
            self._pass_over(each, items, begun)
        _forget_inner_counters(names)
        self.is_over = True

    def _pass_over(self, each: FollowedIteration, items: LoopItems, begun: tuple[float, float]) -> None:
        """Pass over iterations, a step's at a time, up to one that has to run, or the loop's end or last step."""
        self._ends.is_passing = True
        plays_last = self.steps > 1 or self._plays_last or (self.to_end and items.differ)
        has_left = plays_last and isinstance(self._node, ast.For) and items.left is not None
        goes_back = plays_last and self.to_end and isinstance(self._node, ast.While) and not self._ending
        earlier = before = each.values()
        while not (self.is_exhausted or _is_late(*begun)):
            earlier, before = before, each.values()
            is_last = has_left and (items.left or 0) - self.passed <= self.steps
            has_to_run = is_last or items.has_to_run(self.steps)
            if has_to_run or not self._runs(each, self.steps) or self._takes_kept(items):
                is_behind = goes_back and self.passed > 0  # the loop's last step
                self._restore(earlier if is_behind else before, each)
                self.passed -= self.steps if is_behind else 0
                self.is_reached, self.is_exhausted = True, is_last
                break
            if self._ending:
                self._ends.keep()
            self.unsure_lines, self.chance_lines = frozenset(each.reduced.unknown), frozenset(each.reduced.by_chance)
            taken = sum(items.advance() for _ in range(self.steps))
            self.passed += taken
            self.is_exhausted = taken < self.steps
            if self.is_exhausted and not (plays_last and self._puts_back(each, items, taken, earlier, before)):
                self._restore(before, each)  # there were fewer iterations than were counted
                self._runs(each, taken)
                self._ends.keep()
        if not (self.is_reached or self.is_exhausted):  # too far to be passed over to is too far to be played to
            self.staying_lines = frozenset(self._missing)
        self._ends.end(each.assign)

    def _puts_back(
        self, each: FollowedIteration, items: LoopItems, taken: int, earlier: Values, before: Values
    ) -> bool:
        """Go back to the last step of a loop that is at its end; False if its items cannot be put back.

        `taken` items are of a step that is cut off, which began with the counters `before`; the step before it began
        with `earlier`.
        """
        last = taken or self.steps
        if self.passed < last or not items.put_back(last):
            return False
        self._restore(before if taken else earlier, each)
        self.passed -= last
        self.is_reached = True
        return True

    def _ahead(self, each: FollowedIteration, most: int) -> Iterator[Values]:
        """Yield the watched values of the next iterations, up to one that has to run anyway."""
        begun = process_time(), monotonic()
        for _ in range(most):
            if _is_late(*begun):
                break
            try:
                yield each.count()
            except FAILURES:  # as above
                break

    def _has_aim(self, reduced: ReducedIteration) -> bool:
        """Return True if an iteration that has to run may come: for a line, a size, or the loop's end."""
        is_watching = self.watched.has_aim() and not reduced.uncounted
        is_sought = not self._missing <= reduced.unknown | reduced.uncounted
        goes_to_end = self.to_end and (reduced.has_end or isinstance(self._node, ast.For)) and not reduced.uncounted
        return is_watching or self._far is not None or is_sought or goes_to_end

    def _runs(self, each: FollowedIteration, count: int) -> bool:
        """Count so many iterations; False if one of them has to run."""
        for number in range(count):
            if self._far is not None and self._far(self.passed + number):
                self.is_changing = True
                return False
            found: Values = {}
            has_run = True
            try:
                each.count(found)
            except FAILURES:  # an iteration to run, or whatever the script would raise there
                has_run = False
            has_turned = self.watched.has_turned(found)
            if not has_run or has_turned:
                self.is_changing = self.is_changing or has_run
                return False
            if self.watched.has_to_run(self.passed + number, found):
                self.is_changing = True
                return False
        return True

    def _takes_kept(self, items: LoopItems) -> bool:
        """Return True if the iterations that were counted take an item by `next` that is not to be taken away."""
        counted = self._ends.counted() if self._ending else ()
        return any(items.has_those(iterator, taken) for iterator, taken in counted)

    def _steady(self, each: FollowedIteration) -> Values:
        """Return the watched values of the iteration that ran, without those that change from each one to the next."""
        before = each.values()
        ahead: list[Values] = []
        for _ in range(2):
            with contextlib.suppress(*FAILURES):
                ahead.append(each.count())
        self._restore(before, each)
        if len(ahead) < 2:
            return self._found
        one, two = ahead
        return {key: value for key, value in self._found.items() if key in one and one[key] in (value, two.get(key))}

    def _code(self, frame: FrameType, names: Names, others: Names) -> tuple[FollowedIteration, Values]:
        """Return the next iteration, and the values that its conditions read."""
        reader = Reader(names, others, self._unsure)
        reduced = ReducedIteration(reader, self._missing, self._ran, self._around.lengths(), self._lists, self._ending)
        body = reduced.body(self._node.body)
        if isinstance(self._node, ast.While):
            body.insert(0, ast.If(self._node.test, [ast.Pass()], [PLAY]))
            is_endless = isinstance(self._node.test, ast.Constant)
            reduced.has_end = reduced.has_end or (reader.knows(self._node.test) and not is_endless)
        for name, target in sorted(given(self._node).items()):
            if name not in self._unsure and type(value_in(target, names, others)) is int:
                reduced.counters[name] = ast.parse(name, mode="eval").body
                body.insert(0, ast.AugAssign(target, ast.Add(), ast.Constant(1)))
        python = frame.f_code
        local = {*python.co_varnames, *python.co_cellvars, *python.co_freevars}
        shared = [
            name for name in reduced.counters if names is not others and name.isidentifier() and name not in local
        ]
        if shared:
            body.insert(0, ast.Global(shared))
        module = ast.fix_missing_locations(ast.Module(copy.deepcopy(body), []))
        return FollowedIteration(compile(module, "<loop>", "exec"), reduced, names, others), reader.read

    def _restore(self, values: Values, each: FollowedIteration) -> None:
        self._ends.back()
        each.write(values)

    def _expected(self, frame: FrameType, names: Names, others: Names) -> tuple[Values, Values]:
        """Return the counters expected after the next iteration, and the values that its conditions read."""
        each, read = self._code(frame, names, others)
        before = each.values()
        try:
            self._found = each.count()
        except FAILURES:  # as above
            self._cut_off += 1
        expected = each.values()
        self._restore(before, each)
        self._ends.forget()
        _forget_inner_counters(names)
        reduced = each.reduced
        self._inner_counters, self._set_anew = reduced.inner_counters, reduced.set_anew | reduced.inner_counters
        return expected, {text: value for text, value in read.items() if isinstance(value, NUMBERS)}

    def _compare(
        self,
        expected: dict[str, object],
        read: dict[str, object],
        names: Names,
        others: Names,
    ) -> None:
        """Trust no name that the iteration that ran changed otherwise than was read from its source."""
        reader = Reader(names, others, frozenset())
        wrong, smaller = set(), set()
        counted = {text for text, value in expected.items() if text in read and not _is_same(read[text], value)}
        for text, value in {**read, **expected}.items():
            node = ast.parse(text, mode="eval").body
            if isinstance(node, ast.Call) and any(ast.unparse(each) in counted for each in _arguments(node)):
                continue  # it was asked of other numbers
            found = reader.value(node) if reader.knows(node) else reader
            if not _is_same(found, value):  # a tensor, by now
                wrong.add(text)
            if isinstance(found, int) and isinstance(value, int) and found < value:
                smaller.add(text)
        if smaller & self._inner_counters:  # its batches between were left out, so it ended with a smaller number
            wrong -= self._set_anew & smaller
        self._unsure = frozenset(wrong)


def _arguments(call: ast.Call) -> Iterator[ast.expr]:
    """Yield the arguments of a call with their parts."""
    for argument in (*call.args, *(each.value for each in call.keywords)):
        yield from (each for each in ast.walk(argument) if isinstance(each, ast.expr))


def _is_late(cpu: float, clock: float) -> bool:
    """Return True if it began too long ago, in seconds of the processor or of the clock."""
    return process_time() - cpu > _SECONDS or monotonic() - clock > _WAIT


def _forget_inner_counters(names: dict[str, object]) -> None:
    for name in [each for each in names if each.startswith(INNER)]:
        del names[name]


def _has_length(call: ast.Call) -> bool:
    return is_call(call, "len") and len(call.args) == 1


def lines_in_reach(node: ast.For | ast.While, lines: Collection[int], *, of_inner: bool = False) -> set[int]:
    """Return those of the lines that conditions of the loop's own body decide on, rather than loops within it.

    Those of loops within it, too, with `of_inner`.
    """
    found: set[int] = set()
    bodies = [node.body]
    while bodies:
        for statement in bodies.pop():
            if isinstance(statement, ast.If):
                found |= {line for line in lines if covers(statement, line)}
            elif isinstance(statement, (ast.With, ast.AsyncWith, ast.Try)) or (of_inner and _is_loop(statement)):
                bodies += blocks_of(statement)
    return found


def _is_loop(statement: ast.stmt) -> TypeGuard[ast.For | ast.While]:
    return isinstance(statement, (ast.For, ast.While))


def closed_lines(
    node: ast.For | ast.While, lines: Collection[int], names: Mapping[str, object], others: Mapping[str, object]
) -> set[int]:
    """Return those of the lines that a loop cannot come to: it never changes the condition that keeps it from them."""
    kept = (ast.Name, ast.Attribute, ast.Subscript)
    stored = (each for each in ast.walk(node) if isinstance(each, kept) and isinstance(each.ctx, ast.Store))
    reader = Reader(names, others, frozenset(map(ast.unparse, stored)))
    found: set[int] = set()
    for branch in (each for each in ast.walk(node) if isinstance(each, ast.If)):
        with contextlib.suppress(UnknownError):
            value = reader.value(branch.test)
            if isinstance(value, PLAIN):
                block = branch.orelse if value else branch.body
                found |= {line for line in lines if any(covers(each, abs(line)) for each in block)}
    return found


def _is_same(one: object, other: object) -> bool:
    """Return True for equal numbers; a tensor would answer with a tensor."""
    return isinstance(one, NUMBERS) and isinstance(other, NUMBERS) and one == other
