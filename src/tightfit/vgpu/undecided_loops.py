"""Loops that end when a value of the card says so: a made-up one may never, so they are left after some iterations."""

import ast
from collections.abc import Callable
from functools import cache
from types import FrameType

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.vgpu.frames import Frame, is_counted
from tightfit.vgpu.loop_source import function_statements
from tightfit.wording import say

Scalar = bool | int | float
Exactly = Callable[[Tensor], Tensor | None]

_MOST = 10
"""Times in a row that one value may keep a loop going. Solvers with adaptive steps take about as many."""
_OTHERS = (0, 1 << 30, -(1 << 30))
"""Numbers that may lead out of a loop that another one keeps going."""
_EXITS = (ast.Break, ast.Return)


class UndecidedLoops:
    """Answers of loops' conditions, as long as each of them is the same and no optimizer steps."""

    def __init__(self, steps: Callable[[], int]) -> None:
        """`steps` counts the optimizer steps so far."""
        self._steps = steps
        self._asked: dict[tuple[int, ...], tuple[object, int]] = {}
        """The latest answer with what it came from, and how often it came in a row, by the loop's frame and lines."""
        self._left: dict[Frame, None] = {}

    def answer(self, start: FrameType | None, value: Scalar, exactly: Exactly | None = None) -> Scalar:
        """Return a value that is read at a line, or another one if it alone keeps a loop going.

        `exactly` is given for a known value: its other side may never change, because a made-up value decides that.
        """
        frame = _reader(start)
        if frame is None:
            return value
        loop, limit, outer = _loop_decided_at(*_place(frame)), _MOST, frame
        if loop is None and exactly is None and isinstance(value, bool) and _chooses_at(*_place(frame)):
            limit, (outer, loop) = _MOST // 2, _loop_around(frame)
        known = _known(loop.test, frame, exactly) if exactly and loop else ()
        if loop is None or (exactly and not known):
            return value
        key = (id(outer), loop.lineno, id(frame.f_code), frame.f_lineno)
        count = self._count(key, (value, known, self._steps()))
        if count <= limit:
            return value
        self._left[Frame(outer.f_code.co_filename, loop.lineno, outer.f_code.co_qualname)] = None
        if isinstance(value, bool) and limit == _MOST:
            del self._asked[key]  # the loop ends: another run of it begins anew
            return not value
        if isinstance(value, bool):
            return value if (count - limit) % 2 == 0 else not value
        return type(value)(_OTHERS[(count - limit - 1) % len(_OTHERS)])

    def _count(self, key: tuple[int, ...], asked: object) -> int:
        before, count = self._asked.get(key, (None, 0))
        self._asked[key] = (asked, count + 1 if before == asked else 1)
        return self._asked[key][1]

    def sentences(self) -> list[str]:
        """Name the loops that were left."""
        return [say("vgpu.undecided.left", file=each.file, line=each.line, count=_MOST) for each in self._left]


def _reader(frame: FrameType | None) -> FrameType | None:
    """Return the frame that reads a value by itself, rather than by a function of torch or another library."""
    ours = __package__.partition(".")[0]
    while frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == ours:
        frame = frame.f_back
    return frame if frame is not None and is_counted(frame) else None


def _place(frame: FrameType) -> tuple[str, int, str, int]:
    code = frame.f_code
    return code.co_filename, code.co_firstlineno, code.co_name, frame.f_lineno


def _known(test: ast.expr, frame: FrameType, exactly: Exactly) -> tuple[str, ...]:
    """Return the values of the card's tensors that a condition names."""
    parts = [each for each in ast.walk(test) if isinstance(each, (ast.Name, ast.Attribute))]
    tensors = [each for each in (_value_of(part, frame) for part in parts) if isinstance(each, FakeTensor)]
    return tuple(str(exactly(each)) for each in tensors)


def _loop_around(frame: FrameType) -> tuple[FrameType, ast.While | None]:
    """Return the innermost running `while` loop, with its frame, if it ends by a condition on the card's tensors."""
    outer: FrameType | None = frame
    while outer is not None:
        loop = _endless_at(*_place(outer)) if is_counted(outer) else None
        if loop is not None:
            parts = [each for each in ast.walk(loop.test) if isinstance(each, (ast.Name, ast.Attribute))]
            is_on_card = any(isinstance(_value_of(each, outer), FakeTensor) for each in parts)
            return outer, loop if is_on_card else None
        outer = outer.f_back
    return frame, None


def _value_of(node: ast.expr, frame: FrameType) -> object:
    """Return the value of a name or of an attribute of one; None where only the script could give it."""
    match node:
        case ast.Name(id=name):
            return frame.f_locals.get(name, frame.f_globals.get(name))
        case ast.Attribute(value=of, attr=name):
            holder = _value_of(of, frame)
            return holder.__dict__.get(name) if hasattr(holder, "__dict__") else _field(holder, name)
    return None


def _field(holder: object, name: str) -> object:
    return getattr(holder, name, None) if isinstance(holder, tuple) else None


@cache
def _chooses_at(file: str, first: int, name: str, line: int) -> bool:
    """Return True for the condition of an `if` with two ways to go on, of which none ends something."""
    tests = [each for each in function_statements(file, first, name) if isinstance(each, ast.If)]
    found = next((each for each in tests if line in _lines(each.test)), None)
    ends = (ast.Raise, ast.Return, ast.Break, ast.Assert)
    return found is not None and bool(found.orelse) and not any(isinstance(each, ends) for each in ast.walk(found))


@cache
def _endless_at(file: str, first: int, name: str, line: int) -> ast.While | None:
    """Return the innermost loop around a line, if it is a `while` that ends by its condition alone."""
    loop = _innermost(file, first, name, line)
    if not isinstance(loop, ast.While) or isinstance(loop.test, ast.Constant):
        return None
    return None if any(isinstance(each, _EXITS) for each in ast.walk(loop)) else loop


def _innermost(file: str, first: int, name: str, line: int) -> ast.For | ast.While | None:
    loops = [each for each in function_statements(file, first, name) if isinstance(each, (ast.For, ast.While))]
    return next((each for each in reversed(loops) if line in _lines(each)), None)


@cache
def _loop_decided_at(file: str, first: int, name: str, line: int) -> ast.While | None:
    """Return the `while` loop that a value read at `line` alone decides, if there is one.

    The value is its condition, a name in it, or the condition of its only `break` or `return`.
    """
    around = [each for each in function_statements(file, first, name) if line in _lines(each)]
    loop = _innermost(file, first, name, line)
    if not isinstance(loop, ast.While):
        return None
    exits = [each for each in ast.walk(loop) if isinstance(each, _EXITS)]
    if isinstance(loop.test, ast.Constant):
        tests = [each for each in around if isinstance(each, ast.If) and line in _lines(each.test)]
        decides = len(exits) == 1 and any(exits[0] in test.body and _is_plain(test.test) for test in tests)
    else:
        decides = (
            not exits
            and _is_plain(loop.test)
            and (line in _lines(loop.test) or any(_sets_name(each, loop) for each in around))
        )
    return loop if decides else None


def _lines(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _is_plain(test: ast.expr) -> bool:
    """Return True for a condition without `and` or `or`: another part may end the loop by itself."""
    return not any(isinstance(each, ast.BoolOp) for each in ast.walk(test))


def _sets_name(statement: ast.stmt, loop: ast.While) -> bool:
    """Return True if a statement of a loop's own body assigns a number that it reads to a name in its condition."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=of)) if statement in loop.body:
            reads = getattr(of, "attr", getattr(of, "id", "")) in ("item", "float")
            return reads and any(isinstance(each, ast.Name) and each.id == name for each in ast.walk(loop.test))
    return False
