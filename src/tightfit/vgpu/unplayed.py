"""Lines of the script's training loop that an early stop would leave unplayed, although they may allocate."""

import inspect
import itertools
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from functools import partial
from types import CodeType, FrameType
from typing import Any, NamedTuple, cast

from tightfit.vgpu.expressions import always, value_in
from tightfit.vgpu.far_conditions import FarConditions, Passing
from tightfit.vgpu.frames import Frame
from tightfit.vgpu.histories import Iterations
from tightfit.vgpu.inlined_loop import InlinedLoop, inlined
from tightfit.vgpu.left_loops import LeftLoops
from tightfit.vgpu.loop_items import (
    iterator_of,
    left_of,
    makes_items,
    replace_iterator,
)
from tightfit.vgpu.loop_source import (
    Loop,
    allocating_lines,
    counts_for_later,
    endless_test,
    loop_node,
    loops_around,
    reachable_calls,
    sets_for_later,
)
from tightfit.vgpu.phases import Phases
from tightfit.vgpu.ran_lines import RanLines
from tightfit.vgpu.read_loops import CHANGES_IN_TURN, CHANGES_OF_A_START, MOST_CHANGES, ReadLoops, Tried
from tightfit.vgpu.running_loops import (
    SUSPENDS,
    LoopLengths,
    TrainingLoop,
    counted_frames,
    loops_at,
    own_frames,
    package_frames,
)
from tightfit.vgpu.skipping import Aims, LoopItems, Skip, Surroundings, closed_lines, lines_in_reach
from tightfit.vgpu.taken_items import TakenItems
from tightfit.vgpu.watched_values import WatchedValues

_MOST_ENDS = 32
"""Times that the iterations left of one loop are passed over, instead of a jump behind it."""


class Sought(NamedTuple):
    """Lines that iterations of a loop were passed over for."""

    code: CodeType
    loop: Loop
    lines: frozenset[int]

    def head(self) -> Frame:
        return Frame(self.code.co_filename, self.loop.first, self.code.co_qualname)

    def frames(self) -> list[Frame]:
        return [Frame(self.code.co_filename, abs(line), self.code.co_qualname) for line in self.lines]


class LineWatch:
    """Follows which lines of the functions around an optimizer step ran, by Python's own tracing."""

    is_on = False
    sought: Sought | None = None
    """Lines that iterations were passed over for last."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._ran = RanLines()
        self._begun: dict[tuple[CodeType, int], int] = {}
        """Backward passes when each loop's latest iteration began."""
        self._training: set[tuple[CodeType, int]] = set()
        """Loops with backward passes in an iteration, others than those over optimizers or parameters."""
        self._given_up: set[tuple[CodeType, Loop]] = set()
        self._iterations: Counter[tuple[CodeType, int]] = Counter()
        self._runs: Counter[tuple[CodeType, int]] = Counter()
        """Times that each loop began."""
        self._lengths = LoopLengths()
        self._earliest: dict[tuple[CodeType, int], int] = {}
        """First instruction at which an iteration of each loop began."""
        self._at_steps: deque[Counter[tuple[CodeType, int]]] = deque([Counter(), Counter()], maxlen=2)
        """Iterations of each loop at the last two optimizer steps."""
        self._states: dict[tuple[CodeType, int], tuple[int, Hashable, bool]] = {}
        """For each outer loop the latest iteration in which steps repeated, how they did, and if the one before did so.
        """
        self._skips: dict[tuple[CodeType, int], tuple[Loop, Skip]] = {}
        """Loops, by their first lines, whose iterations are passed over from their next one on."""
        self._read = ReadLoops()
        self._stale: dict[str, object] | None = None
        """Values of a function's names as they were read; Python keeps them until they are read again."""
        self.unsure: list[Frame] = []
        """Lines of loops that may allocate, behind conditions that nobody can tell, in iterations passed over."""
        self.closed: set[Frame] = set()
        """Lines behind conditions that keep loops from them, as nothing in these loops changes what they read."""
        self._staying: set[Frame] = set()
        """Those that no further iteration of the play comes to, although one of a card may."""
        self.changing: list[Frame] = []
        """Lines with sizes that change further in iterations that were not played."""
        self._endless: dict[tuple[CodeType, int], bool] = {}
        """Loops that cannot end; True for one whose function may be left from within it."""
        self._at_training: Iterations | None = None
        """Iterations of the training loops, until one of them begins another."""
        self._far = FarConditions(self._training_iterations, self._iterations_around)
        self._ends: Counter[tuple[CodeType, int]] = Counter()
        """Times that the iterations left of a loop were passed over; the most of them if that cannot be done."""
        self._passings: dict[tuple[CodeType, int], Passing] = {}
        """For loops whose iterations are passed over, how functions that they lead to are followed."""
        self.has_to_run: Callable[[object, int], bool] = lambda items, count: False
        """Tells whether some of the next items of a loop are not to be passed over."""
        self.taken = TakenItems()
        self.left = LeftLoops(self.taken, self.forget_names, self._far.left)
        self.at_head: Callable[[FrameType, int], None] | None = None
        """Called where an iteration of a loop begins that is neither left nor passed over, with the loop's first line.
        """

    def start(self, frame: FrameType | None) -> None:
        """Follow the user's functions that are running now; a debugger's tracing is left alone."""
        if self.is_on or sys.gettrace() is not None:
            return
        self.is_on = True
        self.follow(frame)
        self._phases.trace = self._called
        self._phases.after_module = self._far.after_module
        self._phases.resume_trace()

    def follow(self, frame: FrameType | None) -> None:
        for each in (*own_frames(frame), *package_frames(frame)):
            code = each.f_code
            if code not in self._ran.of:
                self._ran.modules.add(each.f_globals.get("__name__"))
                self._ran.add(code)
                self._ran.note(each)
            each.f_trace, each.f_trace_lines = self._line, True

    def after_step(self) -> None:
        """Note how many iterations each loop had at an optimizer step."""
        self._at_steps.append(self._iterations.copy())
        self._ran.after_step()

    def stop(self) -> None:
        if self.is_on:
            self._phases.trace = self._phases.after_module = None
            sys.settrace(None)
            self.is_on = False

    def unplayed(self, frame: FrameType | None, allocated: Iterable[Frame]) -> list[Frame]:
        """List lines of the running functions that can still be reached, may allocate and never ran.

        Lines of `allocated` ran before they were followed.
        """
        found = []
        earlier: dict[str, set[int]] = {}
        for place in allocated:
            earlier.setdefault(place.file, set()).update((place.line, -place.line))
        for each in own_frames(frame):
            code = each.f_code
            ran = self.ran(code) | earlier.get(code.co_filename, set())
            calls = reachable_calls(code.co_filename, code.co_firstlineno, code.co_name, each.f_lineno)
            around = [loop for loop in loops_at(each) if (code, loop.first) in self._endless]
            missed = [abs(call.first) for call in calls if call.is_missed(ran)]
            within = [line for line in missed if not around or line <= around[0].last]
            found += [Frame(code.co_filename, line, code.co_qualname) for line in within]
            if around and not self._endless[code, around[0].first]:
                break
        return list(dict.fromkeys(found))

    def _learn_end(self, frame: FrameType, first: int) -> None:
        """Note if a function's outermost loop cannot end: nothing changes its condition."""
        code = frame.f_code
        found = endless_test(code.co_filename, code.co_firstlineno, code.co_name, first)
        if found is not None:
            names = frame.f_locals
            if always(found.test, names, frame.f_globals, found.changing):
                self._endless[code, first] = found.returns
            self.forget_names(frame, names)

    def read_around(self, frame: FrameType | None) -> None:
        """Let the training loops around `frame` be read at their next iterations."""
        for each, training in self._training_around(frame):
            places = ((each.f_code, loop.first) for loop in training if not each.f_code.co_flags & SUSPENDS)
            self._read.unread.update(place for place in places if place not in self._read.loops)

    def hidden(self, frame: FrameType | None) -> list[Frame]:
        """List the training loops around `frame` in which later iterations may do more in a function that they call.

        Or in which a size that the loop's counters decide changes only later.
        """
        found: list[Frame] = []
        for each, training in self._training_around(frame) if self.is_on else ():
            code = each.f_code
            for loop in training if not code.co_flags & SUSPENDS else ():
                made = self._read.loops.get((code, loop.first))
                if made is None:
                    self._read.unread.add((code, loop.first))
                    found.append(Frame(code.co_filename, loop.first, code.co_qualname))
                    continue
                place, missing = (code, loop.first), made.missing(self.ran)
                watches = made.watches and self._read.changes[place] < MOST_CHANGES
                is_tried = any(each[:2] == place and missing <= each[2] for each in self._read.tried)
                watches = watches or self._read.has_to_collect(place)
                is_on_its_way = place in self._skips or self._read.reached[place] > 0
                if watches or is_on_its_way or self._far.is_open(place) or (missing and not is_tried):
                    found.append(Frame(code.co_filename, loop.first, code.co_qualname))
        return found

    def _read_in(self, frame: FrameType, first: int) -> None:
        """Read a loop with the script's functions in place of their calls, and follow these functions.

        Only while Python traces the function: names that are read elsewhere are written back later.
        """
        code, names, others = frame.f_code, frame.f_locals, frame.f_globals
        node = loop_node(code.co_filename, code.co_firstlineno, code.co_name, first)
        if node is not None:
            made = inlined(node, lambda each: value_in(each, names, others), code, others)
            self._read.loops[code, first] = made
            inside = range(node.lineno, (node.end_lineno or 0) + 1)
            closed = closed_lines(made.node, inside, names, others)
            self.closed |= {Frame(code.co_filename, line, code.co_qualname) for line in closed}
            self._ran.modules |= made.modules
            for each in made.functions.keys() - self._ran.of.keys():
                self._ran.add(each)
        self._read.unread.discard((code, first))
        self.forget_names(frame, names)

    def leave_loops(
        self, frame: FrameType | None, unplayed: Iterable[Frame], state: Hashable, *, epoch_ends: bool
    ) -> bool:
        """Leave the training loops around `frame` before their next iteration, if all `unplayed` lines are outside.

        Outer ones only if the steps of their last two iterations repeated with the same `state`; the innermost one
        not if a DataLoader goes on to its last batch in it (`epoch_ends`). Return True if there is such a loop. Works
        as a debugger's jump does.
        """
        if not self.is_on:
            return False
        alike = self.note_state(frame, state)
        found: list[tuple[CodeType, Loop]] = []
        for each, training in self._training_around(frame):
            code = each.f_code
            lines = tuple(place.line for place in unplayed if place.file == code.co_filename)
            for loop in reversed(training):
                has_unplayed = any(loop.first <= line <= loop.last for line in lines)
                if has_unplayed or not alike.get((code, loop.first), True) or not (loop.after or loop.counts):
                    break
                found.append((code, loop))
            else:
                continue
            break
        if epoch_ends and found and found[0][1].has_items:
            del found[0]
        for code, loop in found:
            if not self._ends_for_later(code, loop):
                self.left.leave(code, loop)
        return bool(found)

    def _ends_for_later(self, code: CodeType, loop: Loop) -> bool:
        """Pass over the rest of a loop that counts, or sets late, what is read behind it: a jump would not do that."""
        made = self._read.loops.get((code, loop.first))
        if made is None:
            return False
        of_loop = made.node, code.co_filename, code.co_firstlineno, code.co_name
        sets = sets_for_later(*of_loop)
        return (sets or counts_for_later(*of_loop)) and self._pass_to_end(code, loop, plays_last=sets)

    def pace(self, frame: FrameType | None) -> int:
        """Return the iterations of the innermost training loop around `frame` that its latest optimizer step took."""
        for each, training in self._training_around(frame):
            for loop in training[-1:]:
                return max(1, self._pace((each.f_code, loop.first)))
        return 1

    def _pace(self, place: tuple[CodeType, int]) -> int:
        before, now = (at[place] for at in self._at_steps)
        return now - before

    def passes_to_end(self, frame: FrameType | None, *, has_batches: bool) -> bool:
        """Pass over the iterations that are left of the innermost training loop if a step takes several of them.

        Its last step is played, so that what is held behind the loop is what an accumulation leaves there.
        `has_batches`: it takes a DataLoader's batches, whose number is known.
        """
        for each, training in self._training_around(frame):
            for loop in training[-1:]:
                is_finite = loop.counts or has_batches
                return is_finite and self._pace((each.f_code, loop.first)) > 1 and self._pass_to_end(each.f_code, loop)
        return False

    def _pass_to_end(self, code: CodeType, loop: Loop, *, plays_last: bool = False) -> bool:
        """Pass over the iterations that are left of a loop; False if nobody can count them."""
        place = code, loop.first
        made = self._read.loops.get(place)
        if made is None or code.co_flags & SUSPENDS or place in self._skips or self._ends[place] >= _MOST_ENDS:
            return False
        self._ends[place] += 1
        self._begin_skip(place, loop, made, frozenset(), to_end=True, watches=False, plays_last=plays_last)
        return True

    def _begin_skip(
        self,
        place: tuple[CodeType, int],
        loop: Loop,
        made: InlinedLoop,
        missing: frozenset[int],
        *,
        to_end: bool,
        watches: bool,
        is_outer: bool = False,
        plays_last: bool = False,
    ) -> None:
        """Pass over iterations of a loop from its next one on."""
        code = place[0]
        ran = made.lines_of(self.ran) | self.ran(code)
        around = Surroundings(
            lengths=partial(self._lengths.of, {code: 0, **made.functions}),
            far=partial(self._begin_passing, place),
            newly=partial(self._ran_since, code, made, frozenset(ran)),
        )
        watched = WatchedValues(
            self._read.seen[place] if watches else None,
            is_on=watches,
            only_extremes=self._read.changes[place] > CHANGES_IN_TURN + CHANGES_OF_A_START,
            grows=place in self._read.growing,
            has_seldom=made.seldom > 0,
            is_outer=is_outer,
        )
        skip = Skip(Aims(made.node, missing, ran, self._pace(place), made.line, to_end, plays_last), around, watched)
        self._skips[place] = loop, skip

    def _ran_since(self, code: CodeType, made: InlinedLoop, before: frozenset[int]) -> set[int]:
        """Return the lines of a loop that ran for the first time since."""
        newly = (made.lines_of(self.ran) | self.ran(code)) - before
        with_bodies = self._with_bodies(code, made)
        return {abs(line) for line in newly if line < 0 or line not in with_bodies}

    def _with_bodies(self, code: CodeType, made: InlinedLoop) -> set[int]:
        """Return the lines of a loop on which an `if` has its body, which may not have run."""
        return {*self._ran.bodies[code], *(each.lineno for each in made.on_line)}

    def note_state(self, frame: FrameType | None, state: Hashable) -> dict[tuple[CodeType, int], bool]:
        """Note how steps repeat in this iteration of the outer training loops; return if they did so in the one before.

        A loop over a list that is written out, or over settings, is taken as one whose iterations differ.
        """
        alike = {}
        inner = True
        for each, training in self._training_around(frame):
            for loop in reversed(training):
                if inner:
                    inner = False
                    continue
                place = (each.f_code, loop.first)
                number = self._iterations[place]
                before = self._states.get(place)
                if before is None or before[0] != number:
                    repeats = before is not None and before[:2] == (number - 1, state)
                    repeats = repeats and not loop.is_listed and place not in self._lengths.of_settings
                    self._states[place] = (number, state, repeats)
                alike[place] = self._states[place][2]
        return alike

    def differing(self, frame: FrameType | None, state: Hashable) -> list[Frame]:
        """List the outer training loops around `frame` that may differ in their next iteration."""
        alike = self.note_state(frame, state) if self.is_on else {}
        return [
            Frame(code.co_filename, first, code.co_qualname) for (code, first), repeats in alike.items() if not repeats
        ]

    def _training_around(self, frame: FrameType | None) -> Iterator[tuple[FrameType, Sequence[Loop]]]:
        """Yield the user's running functions, innermost first, with their training loops, outermost first."""
        trains = False
        for each in own_frames(frame):
            around = loops_at(each)
            training = around if trains else self._training_loops(each.f_code, around)
            yield each, training
            trains = trains or bool(training)

    def skip_ahead(self, frame: FrameType | None, unplayed: Sequence[Frame], state: Hashable) -> bool:
        """Pass over iterations of a training loop up to one that runs some of the `unplayed` lines.

        Or up to its last one, if it cannot be left otherwise. Return True if that begins, or goes on in the innermost
        loop: until an outer one comes to its next iteration, those within it are passed over by themselves.
        """
        if not self.is_on:
            return False
        alike = self.note_state(frame, state)
        is_inner = True
        for each, training in self._training_around(frame):
            code = each.f_code
            lines = {place.line for place in unplayed if place.file == code.co_filename}
            for loop in reversed(training):
                if (code, loop.first) in self._skips:
                    return is_inner
                is_outer, is_inner = not is_inner and loop.counts, False
                to_end = bool(unplayed) and not (loop.after or loop.counts)
                is_alike = alike.get((code, loop.first), True)
                if is_alike and self._start_skip(code, loop, lines, to_end=to_end, is_outer=is_outer):
                    self._far.begin(state)
                    return True
        return False

    def _start_skip(self, code: CodeType, loop: Loop, lines: set[int], *, to_end: bool, is_outer: bool) -> bool:
        made = self._read.loops.get((code, loop.first))
        if made is None or code.co_flags & SUSPENDS or self._read.reached[code, loop.first] > 0:
            return False
        if self._ran.notes_steps:
            return False
        if self._far.waits((code, loop.first)):
            return False
        missing = frozenset(lines_in_reach(made.node, lines, of_inner=True) | made.missing(self.ran))
        missing |= self._read.collect((code, loop.first))
        tried = (code, loop.first, missing)
        if tried in self._read.tried and not self._begins_another_run(tried):
            missing, to_end = frozenset(), False  # such a line may be on its way in this very iteration
        watches = bool(made.watches) and self._read.changes[code, loop.first] < MOST_CHANGES
        if not (missing or watches or to_end or self._far.can_pass((code, loop.first))):
            return False
        self._read.tried.add((code, loop.first, missing))
        self._read.changes[code, loop.first] += CHANGES_OF_A_START
        self._begin_skip((code, loop.first), loop, made, missing, to_end=to_end, watches=watches, is_outer=is_outer)
        self.sought = Sought(code, loop, missing)
        return True

    def _begin_passing(self, place: tuple[CodeType, int], left: int | None) -> Callable[[int], bool] | None:
        passing = self._passings[place] = self._far.passing(place, left)
        return passing.has_to_run if passing.trends else None

    def _begins_another_run(self, tried: Tried) -> bool:
        """Return True the first time in each iteration of an outer loop, if that loop is to be passed over next."""
        for outer in self._skips:
            run = (*tried, outer, self._iterations[outer])
            if run not in self._read.runs:
                self._read.runs.add(run)
                return True
        return False

    def is_seeking(self, sought: Sought) -> bool:
        """Return True while iterations are passed over, or the one with the lines runs."""
        place = sought.code, sought.loop.first
        return place in self._skips or self._read.reached[place] > 0

    def seek_again(self, sought: Sought) -> list[Frame]:
        """Let the lines of a loop be looked for once more, and list them."""
        frames = sought.frames()
        self._read.again(frames)
        return frames

    def again(self, frame: FrameType | None, lines: Iterable[Frame]) -> list[Frame]:
        """Let training loops around `frame` be passed over for their lines once more; list those among `lines`."""
        loops = [_placed(each.f_code, loop) for each, training in self._training_around(frame) for loop in training]
        within = [line for line in lines if any(loop.has(line) for loop in loops)]
        self._read.again(within)
        return within

    def run_of(self, sought: Sought) -> int:
        """Return how often the loop of such lines began."""
        return self._runs[sought.code, sought.loop.first]

    def note_reruns(self, sought: Sought) -> None:
        """Begin to note which lines run in the next steps; until then no iterations begin to be passed over."""
        self._ran.begin_steps((sought.code, sought.loop.first))

    def knows_reruns(self) -> bool:
        """Return True once enough steps were noted."""
        return self._ran.knows_steps()

    def rare_of(self, sought: Sought) -> Sought:
        """Return the lines that run seldom: not in each step noted, nor in each iteration. Also others of that loop."""
        made, code = self._read.loops[sought.code, sought.loop.first], sought.code
        often = (made.lines_of(self._ran.in_each) | self._ran.in_each(code)) - self._with_bodies(code, made)
        behind = lines_in_reach(made.node, {abs(first) for first, _ in allocating_lines(made.node.body)}, of_inner=True)
        ran = made.lines_of(self.ran) | self.ran(code)
        return sought._replace(lines=(sought.lines | (behind & ran)) - often)

    def training_loop(self, frame: FrameType | None) -> TrainingLoop | None:
        """Return the innermost training loop around `frame`, in the user's files or in a package."""
        for each, _ in counted_frames(frame):
            for loop in self._training_loops(each.f_code, loops_at(each))[-1:]:
                return _placed(each.f_code, loop)
        return None

    def give_up_loop(self, frame: FrameType | None) -> bool:
        """Leave the innermost training loop that can be left and was not given up before; False without one."""
        for each, _ in counted_frames(frame):
            code = each.f_code
            for loop in reversed(self._training_loops(code, loops_at(each))):
                if loop.after and (code, loop) not in self._given_up:
                    self._given_up.add((code, loop))
                    self.left.leave(code, loop)
                    return True
        return False

    def waits_in_vain(self, unplayed: Collection[Frame]) -> bool:
        """Return True if no further iteration of the play comes to any of the lines."""
        return bool(unplayed) and self._staying.issuperset(unplayed)

    def unplayed_of(self, places: Iterable[Frame]) -> list[Frame]:
        """List those of the lines that did not run since; a package's loop was not played to its end."""
        return self._ran.missing_of(places)

    def _training_loops(self, code: CodeType, around: Sequence[Loop]) -> Sequence[Loop]:
        """Return those of the loops around a line, outermost first, that have backward passes in an iteration."""
        if code.co_flags & SUSPENDS:
            return ()
        innermost = max(
            (place for place, loop in enumerate(around) if (code, loop.first) in self._training), default=-1
        )
        return around[: innermost + 1]

    def go_to_largest(self, frame: FrameType | None) -> bool:
        """Let the innermost training loop go on to the largest item that it has left; False if it was asked before.

        And False for a loop that counts.
        """
        for each, training in self._training_around(frame) if self.is_on else ():
            for loop in training[-1:]:
                place = (each.f_code, loop.first)
                if not loop.has_items or place in self._read.asked_for_largest:
                    return False
                self._read.asked_for_largest.add(place)
                self.left.leave_with_largest(each.f_code, loop)
                return True
        return False

    def ran(self, code: CodeType) -> set[int]:
        """Lines of a followed function that ran."""
        return self._ran.of.get(code, set())

    def count_ran(self) -> int:
        """Return the number of lines that ran in all functions that are followed."""
        return sum(map(len, self._ran.of.values()))

    def _called(self, frame: FrameType, event: str, arg: object) -> Any:  # the type of sys.settrace's functions
        if not self._ran.follows(frame):
            return self._far.called(frame) if self._far.is_own(frame) else None
        code = frame.f_code
        for place in [each for each in self._begun if each[0] is code]:  # backward passes before this call
            del self._begun[place]
            self._far.reopen(place)
        return self._line

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if self._stale is not None:
            self._stale.clear()
            self._stale = None
        if self._ran.bodies[code]:
            self._ran.note_body(frame, event)
            if event == "opcode":
                return self._line
        self._ran.note(frame)
        if event == "return":
            self._far.returned(frame)
        first = self._ran.heads[code].get(frame.f_lineno) if event == "line" else None
        if first is None or self._comes_back(frame, first):
            return self._line
        self._read.reached[code, first] -= 1
        is_first = (code, first) not in self._begun
        self._lengths.learn(frame, first, is_first=is_first)
        if is_first:
            self._runs[code, first] += 1
            self._read.begin_again((code, first))
        if not self._iterations[code, first]:
            self._learn_end(frame, first)
        self._iterates(code, first)
        if (code, first) in self._read.unread:
            self._read_in(frame, first)
        loop = self.left.of(code, first)
        if loop is not None:
            self.left.leave_now(frame, loop)
            self._ran.note(frame)  # after a jump Python does not call for the line that it led to
        elif (code, first) in self._skips and frame.f_lineno == self._skips[code, first][1].line:
            self._skip(frame, first)
        elif self.at_head is not None:
            self.at_head(frame, first)
        return self._line

    def _comes_back(self, frame: FrameType, first: int) -> bool:
        """Return True at the end of a `with` that is the first statement of `while True`: Python comes to its line."""
        place = (frame.f_code, first)
        earliest = self._earliest[place] = min(self._earliest.get(place, frame.f_lasti), frame.f_lasti)
        return first != frame.f_lineno and frame.f_lasti > earliest

    def _skip(self, frame: FrameType, first: int) -> None:
        """Pass over iterations of the loop that a function is at."""
        place = code, _ = frame.f_code, first
        loop, skip = self._skips[place]
        items = iterator_of(frame) if loop.counts else None
        if loop.counts and items is None:
            del self._skips[place]
            return
        with self.taken.passing():
            left = self._lengths.left(place) if (seen := left_of(items)) is None else seen
            takes, has_to_run = partial(self._takes_next, items), partial(self._has_to_run, items)
            put_back = partial(self._put_back, frame, items)
            self.taken.latest = deque(maxlen=skip.steps if loop.counts and left is None else 0)
            skip.at_head(frame, LoopItems(left, takes, has_to_run, self.has_to_run, put_back, makes_items(items)))
            self.taken.latest.clear()
        self.forget_names(frame, skip.names)
        skip.names = {}  # they would keep the function's objects, if its loop ends before the next iteration
        if skip.is_over:
            del self._skips[place]
            if skip.to_end and not (skip.is_exhausted or skip.is_reached):  # it took too long, or nobody can count it
                self._ends[place] = _MOST_ENDS
            self._end_passing(place, skip)
            self._lengths.pass_over(place, skip.passed)
            self._list_open(place, loop, skip)
            self._note_changes(place, skip)
            self._read.reached[place] = skip.steps if skip.is_reached else 0
            if skip.is_changing:  # the lines that it was for are still to come
                self._read.forget(place)
            if skip.is_reached:  # the lines may be in a loop within the loop, far from its first iteration
                self._read.forget_within(code, first, loop.last)

    def _list_open(self, place: tuple[CodeType, int], loop: Loop, skip: Skip) -> None:
        """List lines that may have run in iterations passed over."""
        code = place[0]
        self._staying |= {Frame(code.co_filename, abs(line), code.co_qualname) for line in skip.staying_lines}
        own = (line for line in map(abs, skip.unsure_lines) if loop.first <= line <= loop.last)
        self.unsure += [Frame(code.co_filename, line, code.co_qualname) for line in own]
        by_chance = (self._read.loops[place].frame_of(abs(line)) for line in skip.chance_lines)
        self.unsure += [each for each in by_chance if each is not None]

    def _note_changes(self, place: tuple[CodeType, int], skip: Skip) -> None:
        """Note if another iteration may have a size that never was; list such lines if they changed too often."""
        watched, code = skip.watched, place[0]
        may_turn = bool(watched.conditions) or (bool(watched.sizes) and skip.counts_on)
        self._read.note_changes(place, sizes=watched.has_new_size, may_turn=may_turn)
        if not watched.is_on:
            return
        changes = self._read.changes[place] - CHANGES_OF_A_START + 1
        goes_on = (skip.is_changing or skip.is_reached) and not skip.is_exhausted
        self._read.changes[place] = changes if goes_on else MOST_CHANGES
        if goes_on and changes >= MOST_CHANGES:
            for line in watched.lines():
                found = self._read.loops[place].frame_of(line)
                self.changing.append(found or Frame(code.co_filename, line, code.co_qualname))

    def _takes_next(self, items: object) -> bool:
        """Take an item of a `for` loop away; False if there is none, or no more time."""
        return not self.taken.is_cut_short and (items is None or self.taken.take(items))

    def _put_back(self, frame: FrameType, items: object, count: int) -> bool:
        """Let a `for` loop have so many of the items that were taken last."""
        latest = list(self.taken.latest)[-count:]
        return len(latest) == count and replace_iterator(
            frame, itertools.chain(latest, cast("Iterator[object]", items))
        )

    def _has_to_run(self, items: object, count: int) -> bool:
        return items is not None and self.has_to_run(items, count)

    def _end_passing(self, place: tuple[CodeType, int], skip: Skip) -> None:
        passing = self._passings.pop(place, None)
        if passing is not None:
            is_stuck = not (skip.is_exhausted or skip.is_reached or skip.is_changing)
            self._far.end(passing, skip.passed, is_exhausted=skip.is_exhausted, is_stuck=is_stuck)

    def forget_names(self, frame: FrameType, names: dict[str, object]) -> None:
        """Let go, at the next line, of `names` as they were read from a function: they keep its tensors of now.

        Python writes them back when the event of this line ends; reading them again would undo what changed there.
        """
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED and sys.version_info < (3, 13):
            self._stale = names

    def take_away(self, frame: FrameType, first: int, count: int) -> None:
        """Count iterations of a loop as begun, and take their items away if it is a `for`."""
        self._iterations[frame.f_code, first] += count
        items = iterator_of(frame)
        if items is None:
            return
        with self.taken.passing():
            for _ in range(count):
                if not self.taken.take(items):
                    break

    def _training_iterations(self) -> Iterations:
        if self._at_training is None:
            self._at_training = {place: self._iterations[place] for place in self._training}
        return self._at_training

    def _iterations_around(self, frame: FrameType | None) -> Iterations:
        """Return how often each loop around a running line began an iteration."""
        found: dict[tuple[CodeType, int], int] = {}
        while frame is not None:
            code = frame.f_code
            if self._ran.has(code):
                places = [(code, loop.first) for loop in loops_at(frame)]
                found |= {place: self._iterations[place] for place in places if place in self._iterations}
            frame = frame.f_back
        return found

    def far_lines(self, *, is_left: bool) -> list[Frame]:
        """List lines that may have run in iterations that were passed over, in functions that no loop leads to.

        `is_left`: the script was left before its end.
        """
        if is_left:
            self._far.left_all()
        return self._far.unsure()

    def _iterates(self, code: CodeType, first: int) -> None:
        """Note that an iteration of a loop begins."""
        self._iterations[code, first] += 1
        self._ran.at_iteration((code, first))
        self._at_training = None
        now = self._phases.all_passes()
        if self._begun.get((code, first), now) < now:
            self._training.add((code, first))
        self._forget_inner(code, first)
        self._begun[code, first] = now

    def _forget_inner(self, code: CodeType, first: int) -> None:
        """Let the loops within a loop begin anew: backward passes before them are none of theirs."""
        for line in [line for each, line in self._begun if each is code and line > first]:
            around = loops_around(code.co_filename, code.co_firstlineno, code.co_name, line)
            if any(loop.first == first for loop in around):
                del self._begun[code, line]
                self._far.reopen((code, line))


def _placed(code: CodeType, loop: Loop) -> TrainingLoop:
    return TrainingLoop(Frame(code.co_filename, loop.first, code.co_qualname), loop.last)
