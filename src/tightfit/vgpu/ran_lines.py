"""Lines that ran in the functions that Python's tracing follows."""

from collections import defaultdict
from collections.abc import Iterable
from types import CodeType, FrameType

from tightfit.vgpu.frames import Frame, is_package
from tightfit.vgpu.loop_source import bodies_on_line, loop_heads
from tightfit.vgpu.running_loops import is_behind

_STEPS_TO_COMPARE = 3
"""Steps that tell which lines run in each."""
_ITERATIONS_TO_COMPARE = 2
"""Whole iterations that do: several optimizers step in each, or one in several."""
_MOST_STEPS = 12
"""Steps after which it no longer matters if there were as many iterations."""
Lines = defaultdict[CodeType, set[int]]


class RanLines:
    """The functions that are followed, and which of their lines ran."""

    def __init__(self) -> None:
        self.of: dict[CodeType, set[int]] = {}
        """Lines that ran, by their function; negative for the body of an `if` on its line."""
        self.heads: dict[CodeType, dict[int, int]] = {}
        """First lines of loops by the lines at which their iterations begin."""
        self.bodies: dict[CodeType, dict[int, int]] = {}
        """Columns of bodies on the line of their `if`."""
        self.modules: set[object] = set()
        """Names of these functions' modules: to look at code is slow wherever Python has an audit hook."""
        self._followed: dict[int, CodeType] = {}
        """Their code by its identity: to hash code costs more than the rest of a call."""
        self._steps: list[Lines] = []
        """Lines that ran in each of the latest steps, the last one first, while that is noted."""
        self._loop: tuple[CodeType, int] | None = None
        self._iterations: list[Lines] = []
        """Lines that ran in each of that loop's iterations since, the last one first."""
        self.notes_steps = False

    def add(self, code: CodeType) -> None:
        """Follow a function from now on."""
        self._followed[id(code)] = code
        self.of[code] = set()
        self.heads[code] = loop_heads(code.co_filename, code.co_firstlineno, code.co_name)
        self.bodies[code] = bodies_on_line(code.co_filename, code.co_firstlineno, code.co_name)

    def follows(self, frame: FrameType) -> bool:
        return frame.f_globals.get("__name__") in self.modules and id(frame.f_code) in self._followed

    def has(self, code: CodeType) -> bool:
        """Return True for a function that is followed, whatever its module."""
        return id(code) in self._followed

    def note(self, frame: FrameType) -> None:
        """Note that a function is at a line."""
        code = frame.f_code
        self.of[code].add(frame.f_lineno)
        if self.notes_steps:
            for each in (*self._steps[:1], *self._iterations[:1]):
                each[code].add(frame.f_lineno)

    def note_body(self, frame: FrameType, event: str) -> None:
        """Note if the body of an `if` on its line runs, by the instructions of that line."""
        code, line = frame.f_code, frame.f_lineno
        column = self.bodies[code].get(line)
        if event == "opcode" and column is not None and is_behind(frame, column):
            self.of[code].add(-line)
        frame.f_trace_opcodes = column is not None and -line not in self.of[code]

    def begin_steps(self, loop: tuple[CodeType, int]) -> None:
        """Begin to note which lines run in each of the next steps, and in each iteration of a loop."""
        self._steps, self._iterations = [defaultdict(set)], []
        self._loop, self.notes_steps = loop, True

    def after_step(self) -> None:
        if self.notes_steps and not self.knows_steps():
            self._steps.insert(0, defaultdict(set))

    def at_iteration(self, loop: tuple[CodeType, int]) -> None:
        """Note that an iteration of a loop begins."""
        if self.notes_steps and loop == self._loop:
            self._iterations.insert(0, defaultdict(set))

    def knows_steps(self) -> bool:
        """Return True once enough steps were noted."""
        steps = len(self._steps) - 1
        has_iterated = len(self._iterations) > _ITERATIONS_TO_COMPARE
        return steps >= _STEPS_TO_COMPARE and (has_iterated or steps >= _MOST_STEPS)

    def in_each(self, code: CodeType) -> set[int]:
        """Return the lines of a function that ran in each of the latest steps, or iterations; note no more."""
        self.notes_steps = False
        noted = self._steps[1 : _STEPS_TO_COMPARE + 1], self._iterations[1 : _ITERATIONS_TO_COMPARE + 1]
        is_enough = True, len(self._iterations) > _ITERATIONS_TO_COMPARE  # but for the one that runs
        in_all = (
            set.intersection(*(each[code] for each in one))
            for one, enough in zip(noted, is_enough, strict=True)
            if enough
        )
        return set().union(*in_all)

    def missing_of(self, places: Iterable[Frame]) -> list[Frame]:
        """List those of the lines that did not run since; a package's loop was not played to its end."""
        ran = {
            (code.co_filename, abs(line))
            for code, lines in self.of.items()
            for line in lines
            if line < 0 or line not in self.bodies[code]
        }
        return [place for place in places if is_package(place) or (place.file, place.line) not in ran]
