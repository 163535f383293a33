"""Lines of the script's training loop that an early stop would leave unplayed, although they may allocate."""

import ast
import contextlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

from tightfit.vgpu.frames import Frame, is_counted, is_package

_HARMLESS_CALLS = (
    "print len range min max sum str int float bool round abs format join append extend update items keys values get "
    "isinstance hasattr getattr time perf_counter monotonic strftime now exit open write flush close makedirs remove "
    "mkdir exists dump dumps info debug warning error log add_scalar set_postfix set_description add_argument item "
    "state_dict synchronize barrier destroy_process_group get_rank empty_cache manual_seed set_epoch collect "
    "max_memory_allocated max_memory_reserved memory_allocated memory_reserved memory_summary tolist finish "
    "reset_peak_memory_stats get_last_lr perf_counter_ns sleep system basename dirname upper lower strip split "
    "get_world_size"
)
"""Calls by name that print, record or measure: they take no device memory."""
_HARMLESS = frozenset(_HARMLESS_CALLS.split())
_SAVES = frozenset(("torch.save", "np.save", "numpy.save", "plt.savefig"))
"""Calls that write what is there; a library's own `save` may gather a model on the card first."""


_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class LineWatch:
    """Follows which lines of the functions around an optimizer step ran, by Python's own tracing."""

    def __init__(self, backwards: Callable[[], int]) -> None:
        """`backwards` counts the script's backward passes so far."""
        self._backwards = backwards
        self._heads: dict[CodeType, dict[int, int]] = {}
        """First lines of loops by the lines at which their iterations begin."""
        self._begun: dict[tuple[CodeType, int], int] = {}
        """Backward passes when each loop's latest iteration began."""
        self._training: set[tuple[CodeType, int]] = set()
        """Loops with backward passes in an iteration, others than those over optimizers or parameters."""
        self._ran: dict[CodeType, set[int]] = {}
        self._given_up: set[tuple[CodeType, Loop]] = set()
        self._leaving: dict[CodeType, Loop] = {}
        """Functions with a loop to leave before its next iteration."""
        self.is_on = False

    def start(self, frame: FrameType | None) -> None:
        """Follow the user's functions that are running now; a debugger's tracing is left alone."""
        if self.is_on or sys.gettrace() is not None:
            return
        self.is_on = True
        self.follow(frame)
        sys.settrace(self._called)

    def follow(self, frame: FrameType | None) -> None:
        for each in (*own_frames(frame), *package_frames(frame)):
            code = each.f_code
            if code not in self._ran:
                self._ran[code] = {each.f_lineno}
                self._heads[code] = loop_heads(code.co_filename, code.co_firstlineno, code.co_name)
            each.f_trace = self._line

    def stop(self) -> None:
        if self.is_on:
            sys.settrace(None)
            self.is_on = False

    def unplayed(self, frame: FrameType | None, allocated: Iterable[Frame]) -> list[Frame]:
        """List lines of the running functions that can still be reached, may allocate and never ran.

        Lines of `allocated` ran before they were followed.
        """
        found = []
        earlier: dict[str, set[int]] = {}
        for place in allocated:
            earlier.setdefault(place.file, set()).add(place.line)
        for each in own_frames(frame):
            code = each.f_code
            ran = self._ran.get(code, set()) | earlier.get(code.co_filename, set())
            lines = reachable_calls(code.co_filename, code.co_firstlineno, code.co_name, each.f_lineno)
            missed = [line for line, last in lines if ran.isdisjoint(range(line, last + 1))]
            found += [Frame(code.co_filename, line, code.co_qualname) for line in missed]
        return list(dict.fromkeys(found))

    def leave_loops(self, frame: FrameType | None, unplayed: Iterable[Frame]) -> bool:
        """Leave the training loops around `frame` before their next iteration, if all `unplayed` lines are outside.

        Return True if there is such a loop. Works as a debugger's jump does.
        """
        if not self.is_on:
            return False
        left = trains = False
        for each in own_frames(frame):
            code = each.f_code
            lines = tuple(place.line for place in unplayed if place.file == code.co_filename)
            around = _loops_at(each)
            training = around if trains else self._training_loops(code, around)
            free = [loop for loop in training if not any(loop.first <= line <= loop.last for line in lines)]
            if free and free[0].after:
                self._leaving[code] = free[0]
                left = True
            if len(free) < len(training):
                break
            trains = trains or bool(training)
        return left

    def training_loop(self, frame: FrameType | None) -> "TrainingLoop | None":
        """Return the innermost training loop around `frame`, in the user's files or in a package."""
        for each, _ in counted_frames(frame):
            for loop in self._training_loops(each.f_code, _loops_at(each))[-1:]:
                return TrainingLoop(Frame(each.f_code.co_filename, loop.first, each.f_code.co_qualname), loop.last)
        return None

    def give_up_loop(self, frame: FrameType | None) -> bool:
        """Leave the innermost training loop that can be left and was not given up before; False without one."""
        for each, _ in counted_frames(frame):
            code = each.f_code
            for loop in reversed(self._training_loops(code, _loops_at(each))):
                if loop.after and (code, loop) not in self._given_up:
                    self._given_up.add((code, loop))
                    self._leaving[code] = loop
                    return True
        return False

    def unplayed_of(self, places: Iterable[Frame]) -> list[Frame]:
        """List those of the lines that did not run since; a package's loop was not played to its end."""
        ran = {(code.co_filename, line) for code, lines in self._ran.items() for line in lines}
        return [place for place in places if is_package(place) or (place.file, place.line) not in ran]

    def _training_loops(self, code: CodeType, around: Sequence["Loop"]) -> Sequence["Loop"]:
        """Return those of the loops around a line, outermost first, that have backward passes in an iteration."""
        if code.co_flags & _SUSPENDS:
            return ()
        innermost = max(
            (place for place, loop in enumerate(around) if (code, loop.first) in self._training), default=-1
        )
        return around[: innermost + 1]

    def leave(self, code: CodeType, loop: "Loop") -> None:
        """Leave one loop of a running function before its next iteration."""
        self._leaving[code] = loop

    def ran(self, code: CodeType) -> set[int]:
        """Lines of a followed function that ran."""
        return self._ran.get(code, set())

    def _called(self, frame: FrameType, event: str, arg: object) -> Any:  # the type of sys.settrace's functions
        return self._line if frame.f_code in self._ran else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        self._ran[code].add(frame.f_lineno)
        first = self._heads[code].get(frame.f_lineno) if event == "line" else None
        if first is None:
            return self._line
        self._iterates(code, first)
        loop = self._leaving.get(code)
        if loop is not None and first == loop.first:
            del self._leaving[code]
            with contextlib.suppress(ValueError):  # a line that cannot be reached from here
                # By way of a line without blocks: of the several places of a `with` or `for`, Python takes the one
                # that keeps most of what is left behind, here the loop's iterator.
                _JUMP(frame, loop.by_way_of)
                _JUMP(frame, loop.after)
        return self._line

    def _iterates(self, code: CodeType, first: int) -> None:
        """Note that an iteration of a loop begins."""
        now = self._backwards()
        if self._begun.get((code, first), now) < now:
            self._training.add((code, first))
        self._begun[code, first] = now


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


def _loops_at(frame: FrameType) -> tuple["Loop", ...]:
    code = frame.f_code
    return loops_around(code.co_filename, code.co_firstlineno, code.co_name, frame.f_lineno)


def is_in_loop(frame: FrameType) -> bool:
    """Return True if a function is at a line within a `for` or `while` statement of its own."""
    return bool(_loops_at(frame))


def innermost_loop(frame: FrameType) -> "Loop | None":
    """Return the `for` loop of its own that a function is in, unless it is a generator, whose reader counts on it."""
    if frame.f_code.co_flags & _SUSPENDS:
        return None
    around = _loops_at(frame)
    return around[-1] if around and around[-1].counts else None


class Loop(NamedTuple):
    first: int
    last: int
    after: int
    """Line of the statement that follows in the same block; 0 without one, or without a way there."""
    by_way_of: int
    """Line of a statement in the same block that has no block of its own."""
    counts: bool = False
    """True for `for`, whose end does not depend on what its body does."""


class TrainingLoop(NamedTuple):
    """A loop with backward passes in its iterations."""

    place: Frame
    last: int

    def has(self, line: Frame) -> bool:
        return line.file == self.place.file and self.place.line <= line.line <= self.last


_JUMP = FrameType.__dict__["f_lineno"].__set__
"""Sets a frame's next line, which Python lets trace functions do alone."""
_PLAIN = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Import, ast.ImportFrom, ast.Return, ast.Delete)


@cache
def loops_around(file: str, first: int, name: str, line: int) -> tuple[Loop, ...]:
    """Find the loops around a line of a function, outermost first."""
    blocks = [_body(file, first, name)]
    found = []
    while blocks:
        block = blocks.pop()
        for statement, following in zip(block, [*block, None][1:], strict=True):
            if not statement.lineno <= line <= (statement.end_lineno or statement.lineno):
                continue
            if isinstance(statement, (ast.For, ast.While)):
                last = statement.end_lineno or statement.lineno
                plain = next((each.lineno for each in block if isinstance(each, _PLAIN)), 0)
                after = following.lineno if following and plain else 0
                found.append(Loop(statement.lineno, last, after, plain, isinstance(statement, ast.For)))
            blocks += _blocks(statement)
    return tuple(found)


@cache
def loop_heads(file: str, first: int, name: str) -> dict[int, int]:
    """Map the lines at which the iterations of a function's loops begin to the first lines of the loops.

    Python does not come back to the line of `while True`, but to the one below.
    """
    loops = [each for each in _statements(_body(file, first, name)) if isinstance(each, (ast.For, ast.While))]
    endless = (each for each in loops if isinstance(each, ast.While) and isinstance(each.test, ast.Constant))
    return {each.body[0].lineno: each.lineno for each in endless} | {each.lineno: each.lineno for each in loops}


@cache
def reachable_calls(file: str, first: int, name: str, line: int) -> tuple[tuple[int, int], ...]:
    """Find the first and last lines of calls that may allocate: in the outermost loop around `line`, or after it.

    A branch does not count if the loop never changes its condition, as it can never be taken.
    Error handling and functions that print or measure do not count either.
    """
    body = _body(file, first, name)
    around = [each for each in _statements(body) if each.lineno <= line <= (each.end_lineno or each.lineno)]
    loop = next((each for each in around if isinstance(each, (ast.For, ast.AsyncFor, ast.While))), None)
    found: set[tuple[int, int]] = set()
    if loop is not None:
        changing = _stored(loop) | _attributes(_tree(file))
        found |= set(_calls(loop.body, changing))
    end = (loop.end_lineno or line) if loop is not None else line
    found |= {each for each in _calls(body, None) if each[0] > end}
    return tuple(sorted(found))


@cache
def calls_of_loop(file: str, first: int, name: str, loop_line: int) -> tuple[tuple[int, int], ...]:
    """Find the first and last lines of calls that may allocate in the loop that starts at a line."""
    loops = (
        each for each in _statements(_body(file, first, name)) if isinstance(each, ast.For) and each.lineno == loop_line
    )
    return tuple(found for loop in loops for found in _calls(loop.body, _stored(loop) | _attributes(_tree(file))))


@cache
def _tree(file: str) -> ast.Module:
    """Parse a file; one that is not there or is no Python is empty."""
    try:
        return ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


@cache
def _body(file: str, first: int, name: str) -> list[ast.stmt]:
    """Return the statements of a function, or of the module."""
    if name == "<module>":
        return _tree(file).body
    for node in ast.walk(_tree(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            starts = {node.lineno, *(each.lineno for each in node.decorator_list)}
            if first in starts:
                return node.body
    return []


def _blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """List the bodies within a statement, without those of functions, classes and error handling."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return []
    blocks = [getattr(statement, key, []) for key in ("body", "orelse", "finalbody")]
    return blocks + [case.body for case in getattr(statement, "cases", [])]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for block in _blocks(statement):
            yield from _statements(block)


def _calls(body: list[ast.stmt], changing: set[str] | None) -> Iterator[tuple[int, int]]:
    """Yield the lines of statements with calls that may allocate. A condition may depend on the names `changing`."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Raise, ast.Assert)):
            continue
        heads = [each for each in ast.iter_child_nodes(statement) if isinstance(each, (ast.expr, ast.withitem))]
        if any(_may_allocate(head) for head in heads):
            ends = [head.end_lineno or 0 for head in heads if isinstance(head, ast.expr)]
            yield statement.lineno, max([statement.lineno, *ends])
        if isinstance(statement, ast.If) and changing is not None and not _may_change(statement.test, changing):
            continue
        for block in _blocks(statement):
            yield from _calls(block, changing)


def _may_allocate(node: ast.AST) -> bool:
    calls = (each.func for each in ast.walk(node) if isinstance(each, ast.Call))
    return any(_name_of(each) not in _HARMLESS and ast.unparse(each) not in _SAVES for each in calls)


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _may_change(test: ast.expr, changing: set[str]) -> bool:
    names = {each.id for each in ast.walk(test) if isinstance(each, ast.Name)}
    names |= {each.attr for each in ast.walk(test) if isinstance(each, ast.Attribute)}
    return bool(names & changing) or any(isinstance(each, ast.Call) for each in ast.walk(test))


def _stored(loop: ast.stmt) -> set[str]:
    return {each.id for each in ast.walk(loop) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}


def _attributes(tree: ast.Module) -> set[str]:
    """Collect the attributes that something other than `__init__` assigns."""
    fixed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        for inner in ast.walk(node)
    }
    return {
        each.attr
        for each in ast.walk(tree)
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and id(each) not in fixed
    }
