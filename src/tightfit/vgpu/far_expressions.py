"""Expressions of a function that decide its allocations: its conditions, and sizes that it computes.

They are read from its source once. Their inputs, such as `self.steps`, are read each time that the function returns.
"""

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import CodeType, FunctionType
from typing import NamedTuple, cast

from tightfit.vgpu.expressions import known_part
from tightfit.vgpu.frames import Frame, is_own
from tightfit.vgpu.inlined_loop import as_statement, without_returns
from tightfit.vgpu.loop_source import allocating_lines, blocks_of, changes_nothing, function_nodes, is_harmless

_FUNCTIONS: dict[str, object] = {each.__name__: each for each in (min, max, abs, int, float, bool, round, divmod)}
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_HARMLESS_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.RShift, ast.BitAnd, ast.BitOr)
_PURE = (
    ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.IfExp, ast.Constant, ast.Tuple, ast.List, ast.Set,
    ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.expr_context,
)  # fmt: skip
_LONGEST = 64
"""Largest base and exponent of a power that is computed."""
_BENT = (ast.FloorDiv, ast.Mod, ast.RShift, ast.BitAnd, ast.BitOr, ast.Call, ast.IfExp, ast.Compare, ast.Mult, ast.Div)
"""Parts of an expression that may not grow evenly although its inputs do."""
_STEPPED = (ast.FloorDiv, ast.Mod, ast.RShift, ast.BitAnd)
"""Operators whose results stay the same for several iterations."""


@dataclass(frozen=True, eq=False)
class Watched:
    """An expression that decides."""

    inputs: tuple[ast.expr, ...]
    """Names, attributes and items in the expression."""
    expression: ast.expr
    """The expression itself, with `input_name(0)` and so on in place of its inputs."""
    lines: Mapping[bool, tuple[Frame, ...]] = field(default_factory=dict)
    """For True and False, lines that may allocate if a condition has that value; empty for a size."""
    cyclic: frozenset[int] = frozenset()
    """Places of inputs that the function sets to a remainder, so that they begin anew."""

    @cached_property
    def _code(self) -> CodeType:
        return compile(ast.fix_missing_locations(ast.Expression(self.expression)), "<expression>", "eval")

    @cached_property
    def is_monotone(self) -> bool:
        """Return True for one `<` or `>` between numbers that grow evenly: it changes once at most."""
        test = self.expression.operand if isinstance(self.expression, ast.UnaryOp) else self.expression
        if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
            return False
        sides = (test.left, *test.comparators)
        return len(sides) == 2 and not any(isinstance(each, _BENT) for side in sides for each in ast.walk(side))

    def value(self, inputs: tuple[object, ...]) -> object:
        """Return the value for given inputs; None if there is none."""
        names = {input_name(place): value for place, value in enumerate(inputs)}
        try:
            return eval(self._code, {"__builtins__": _FUNCTIONS}, names)
        except NO_VALUE:
            return None

    def along(
        self, inputs: tuple[object, ...], changes: tuple[int, ...], inner: tuple[int, ...]
    ) -> Callable[[int, int], object]:
        """Return a function of a number of iterations and a number of calls in the last of them, for the value then.

        Each iteration adds `changes` to the inputs, each call adds `inner`.
        """
        fixed = {input_name(place): value for place, value in enumerate(inputs)}
        growing = {input_name(place): each for place, each in enumerate(zip(changes, inner, strict=True)) if any(each)}
        body = _Growing(growing).visit(copy.deepcopy(self.expression))
        arguments = ast.arguments([], [ast.arg("iterations"), ast.arg("calls")], None, [], [], None, [])
        made = ast.fix_missing_locations(ast.Expression(ast.Lambda(arguments, body)))
        found = eval(compile(made, "<expression>", "eval"), {"__builtins__": _FUNCTIONS, **fixed})
        return cast("Callable[[int, int], object]", found)


NO_VALUE = (ArithmeticError, LookupError, TypeError, ValueError)
"""Errors of an expression that has no value for some inputs."""


class _Growing(ast.NodeTransformer):
    """Writes `input` as `input + change * iterations + inner * calls`."""

    def __init__(self, changes: Mapping[str, tuple[int, int]]) -> None:
        self._changes = changes

    def visit_Name(self, node: ast.Name) -> ast.expr:
        change, inner = self._changes.get(node.id, (0, 0))
        text = f"{node.id} + {change} * iterations" + (f" + {inner} * calls" if inner else "")
        return ast.parse(text, mode="eval").body if change or inner else node


def input_name(place: int) -> str:
    return f"input{place}"


@cache
def watched_of(code: CodeType) -> tuple[Watched, ...]:
    """Find the expressions that may decide the allocations of a function."""
    found: list[Watched] = []
    for node in function_nodes(code.co_filename, code.co_firstlineno, code.co_name):
        reading = _Reading(code, node)
        body: list[ast.stmt] = [as_statement(node.body)] if isinstance(node, ast.Lambda) else without_returns(node.body)
        found += reading.of_block(body)
    return tuple(found)


class OfModule(NamedTuple):
    """An expression in a method of a module, with inputs of the module alone."""

    watched: Watched
    owner: str
    """Name of the module in the method, `self`."""
    others: dict[str, object]
    """Global names of the method."""


def watched_of_module(kind: type) -> tuple[OfModule, ...]:
    """Find such expressions in the methods of a class that the script defines."""
    found = []
    methods = [each for base in kind.__mro__ for each in vars(base).values() if isinstance(each, FunctionType)]
    for method in methods:
        code = method.__code__
        if is_own(code) and code.co_argcount and code.co_name != "__init__":
            inner = {*code.co_varnames[1:], *code.co_cellvars, *code.co_freevars}
            found += [
                OfModule(watched, code.co_varnames[0], method.__globals__)
                for watched in watched_of(code)
                if inner.isdisjoint(each.id for each in _names(watched))
            ]
    return tuple(found)


def _names(watched: Watched) -> Iterator[ast.Name]:
    return (each for each_input in watched.inputs for each in ast.walk(each_input) if isinstance(each, ast.Name))


class _Reading:
    """Reads one function."""

    def __init__(self, code: CodeType, node: ast.FunctionDef | ast.Lambda) -> None:
        self._code = code
        self._meanings = _meanings(node) if isinstance(node, ast.FunctionDef) else {}
        self._cyclic = frozenset(_set_to_remainders(node))

    def of_block(self, block: list[ast.stmt]) -> Iterator[Watched]:
        for statement in block:
            if isinstance(statement, _SCOPES):
                continue
            if isinstance(statement, ast.If):
                lines = {True: self._frames(statement.body), False: self._frames(statement.orelse)}
                yield from self._conditions(statement.test, lines)
                if not all(map(changes_nothing, [*statement.body, *statement.orelse])):
                    yield from self._holding(statement.test)
            elif not isinstance(statement, ast.While):
                for value in (each for each in ast.iter_child_nodes(statement) if isinstance(each, ast.expr)):
                    yield from self._parts(value)
            for inner in blocks_of(statement):
                yield from self.of_block(inner)

    def _frames(self, block: list[ast.stmt]) -> tuple[Frame, ...]:
        lines = [abs(first) for first, _ in allocating_lines(block)]
        return tuple(Frame(self._code.co_filename, line, self._code.co_qualname) for line in lines)

    def _conditions(self, test: ast.expr, lines: Mapping[bool, tuple[Frame, ...]]) -> Iterator[Watched]:
        """Yield a condition, as far as it is known."""
        known = known_part(test, lambda each: self._watched(each, {}) is not None) if any(lines.values()) else None
        made = self._watched(known, lines) if known is not None else None
        if made is not None:
            yield made

    def _holding(self, test: ast.expr) -> Iterator[Watched]:
        """Yield if a condition holds: its block may free memory, or change what later iterations need."""
        made = self._watched(ast.UnaryOp(ast.Not(), ast.UnaryOp(ast.Not(), test)), {})
        if made is not None:
            yield made

    def _parts(self, value: ast.expr) -> Iterator[Watched]:
        """Yield the largest parts of an expression that may be sizes, or answers to whoever asks the function."""
        parts = [value]
        while parts:
            part = parts.pop()
            if isinstance(part, (*_SCOPES, ast.JoinedStr)) or _prints(part):
                continue
            if isinstance(part, ast.IfExp):
                lines = self._frames([as_statement(part.body), as_statement(part.orelse)])
                if lines:
                    yield from self._conditions(part.test, {True: lines, False: lines})
                    continue
            made = self._watched(part, {}) if _may_stay(part) else None
            if made is not None:
                yield made
                continue
            parts += [each for each in ast.iter_child_nodes(part) if isinstance(each, ast.expr)]
            parts += [each.value for each in getattr(part, "keywords", [])]

    def _watched(self, value: ast.expr, lines: Mapping[bool, tuple[Frame, ...]]) -> Watched | None:
        inputs = _Inputs(self._meanings)
        try:
            pure = inputs.expression(_copied(value))
        except _UnfitError:
            return None
        if not inputs.found:
            return None
        cyclic = frozenset(place for place, text in enumerate(inputs.found) if text in self._cyclic)
        return Watched(tuple(inputs.found.values()), pure, lines, cyclic)


def _copied(value: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(value), mode="eval").body


def _may_stay(part: ast.expr) -> bool:
    """Return True for an expression that may keep its value while its inputs grow."""
    if isinstance(part, (ast.Compare, ast.BoolOp, ast.IfExp)) or _is_pure_call(part):
        return True
    return isinstance(part, ast.BinOp) and any(isinstance(each, _STEPPED) for each in ast.walk(part))


def _prints(part: ast.expr) -> bool:
    return isinstance(part, ast.Call) and is_harmless(part) and not _is_pure_call(part)


def _is_pure_call(part: ast.expr) -> bool:
    return isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in _FUNCTIONS


def _meanings(node: ast.FunctionDef) -> dict[str, ast.expr]:
    """Return the expressions of variables that are assigned once."""
    inner = [each for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
    times = Counter(each.id for each in inner)
    found: dict[str, ast.expr] = {}
    for each in ast.walk(node):
        match each:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if times[name] == 1:
                found[name] = value
    return found


def _set_to_remainders(node: ast.AST) -> Iterator[str]:
    """Yield the targets that a function sets to a remainder, as in `self.at = (self.at + 1) % self.size`."""
    for each in ast.walk(node):
        match each:
            case ast.Assign(targets=[target], value=ast.BinOp(op=ast.Mod())) | ast.AugAssign(target, ast.Mod()):
                yield ast.unparse(target)


def _is_written_out(node: ast.BinOp) -> bool:
    """Return True for `10**9` or `1 << 20`, a number of no great length."""
    parts = [each.value for each in (node.left, node.right) if isinstance(each, ast.Constant)]
    is_short = len(parts) == 2 and all(isinstance(each, int) and 0 <= each <= _LONGEST for each in parts)
    return is_short and isinstance(node.op, (ast.Pow, ast.LShift))


class _UnfitError(Exception):
    """An expression that calls something of the script's, or has an operator that is not computed here."""


class _Inputs(ast.NodeTransformer):
    """Puts names in place of an expression's inputs; raises _UnfitError."""

    def __init__(self, meanings: Mapping[str, ast.expr]) -> None:
        self._meanings = meanings
        self.found: dict[str, ast.expr] = {}

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.expr) and _is_chain(node):
            return self._input(node)
        if isinstance(node, ast.NamedExpr):
            return self.visit(node.value)
        if isinstance(node, ast.Call) and _is_pure_call(node) and not node.keywords:
            node.args = [self.expression(each) for each in node.args]
            return node
        if isinstance(node, ast.BinOp) and not isinstance(node.op, _HARMLESS_OPERATORS) and not _is_written_out(node):
            raise _UnfitError
        if not isinstance(node, _PURE):
            raise _UnfitError
        found: ast.AST = self.generic_visit(node)
        return found

    def expression(self, node: ast.expr) -> ast.expr:
        found = self.visit(node)
        assert isinstance(found, ast.expr)
        return found

    def _input(self, node: ast.expr) -> ast.AST:
        """Return the name of an input, or a variable's only expression with inputs of its own."""
        if isinstance(node, ast.Name) and node.id in self._meanings:
            others = {name: value for name, value in self._meanings.items() if name != node.id}
            inner = _Inputs(others)
            inner.found = dict(self.found)
            try:
                meaning = inner.expression(_copied(self._meanings[node.id]))
            except _UnfitError:
                pass
            else:
                self.found = inner.found
                return meaning
        whole = _Resolved(self._meanings).visit(node)
        text = ast.unparse(whole)
        names = list(self.found)
        place = names.index(text) if text in names else len(names)
        self.found[text] = ast.parse(text, mode="eval").body
        return ast.Name(input_name(place), ast.Load())


class _Resolved(ast.NodeTransformer):
    """Writes `state["step"]` as `self.state[p]["step"]`, where `state` was assigned so."""

    def __init__(self, meanings: Mapping[str, ast.expr]) -> None:
        self._meanings = meanings

    def visit_Name(self, node: ast.Name) -> ast.expr:
        meaning = self._meanings.get(node.id)
        return _copied(meaning) if meaning is not None and _is_chain(meaning) else node


def _is_chain(node: ast.expr) -> bool:
    """Return True for a name, and for attributes and items of one."""
    match node:
        case ast.Name():
            return True
        case ast.Attribute(value=of):
            return _is_chain(of)
        case ast.Subscript(value=of, slice=key):
            return _is_chain(of) and (isinstance(key, ast.Constant) or _is_chain(key))
        case ast.Call(func=ast.Name(id="len"), args=[of], keywords=[]):
            return _is_chain(of)
    return False
