"""A training loop's source with the script's own functions in place of their calls.

`maybe_evaluate(step)` hides `if step % 500 == 0:` from a reader of the loop, and `size_at(step)` hides a table. Nothing
is called: names of a function become the expressions that its caller passes, and what cannot be read is unknown.
"""

import ast
import builtins
import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from types import CodeType, FunctionType, MethodType
from typing import TypeGuard, TypeVar

from torch import Tensor

from tightfit.vgpu.expressions import INNER, is_chance, is_computed
from tightfit.vgpu.frames import Frame, is_own
from tightfit.vgpu.loop_source import allocating_lines, changes_nothing, function_node, head_line, is_harmless
from tightfit.vgpu.plain_branches import ENDS, UNKNOWN
from tightfit.vgpu.running_loops import SUSPENDS

S = TypeVar("S", bound=ast.stmt)

WATCHED = "tightfit.watched"
"""Name, which no script can have, under which an iteration's expressions of the counters leave their values."""
HOLDS = "holds:"
"""Begins the keys of conditions among them, with the first line of the block behind, if it is not on the same line."""
_DEPTH = 4
_MOST_STATEMENTS = 3000
_MOST_ITEMS = 16
_OTHER_FILE = 10_000_000
"""Added to line numbers of functions in other files than the loop's."""
_DERIVED = (ast.IfExp, ast.Subscript, ast.BinOp, ast.Compare, ast.BoolOp, ast.Call)
_HIDE_NAMES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.JoinedStr, ast.Await)

_COMPREHENSIONS = (ast.ListComp, ast.GeneratorExp)
_LOAD = ast.Load()

Look = Callable[[ast.expr], object]
"""Reads the value of an expression of the loop's function; None where only the script could give it."""


@dataclass
class InlinedLoop:
    """A loop as it can be followed without running the script."""

    node: ast.For | ast.While
    line: int
    """Line at which every iteration begins."""
    functions: dict[CodeType, int] = field(default_factory=dict)
    """Functions that were put in, and the offset of their line numbers."""
    modules: set[object] = field(default_factory=set)
    """Names of the modules of these functions."""
    put_in: list[ast.If] = field(default_factory=list)
    """Branches of these functions."""
    on_line: list[ast.If] = field(default_factory=list)
    """Those of them with their body on the line of the `if`."""
    watches: int = 0
    """Expressions of the counters that may decide sizes."""
    seldom: int = 0
    """Those of them behind conditions."""
    collecting: set[int] = field(default_factory=set)
    """Lines behind conditions that put tensors of the card into a list or a dictionary, as they are moved."""

    def missing(self, ran: Callable[[CodeType], set[int]]) -> set[int]:
        """Lines that may allocate in these functions, behind conditions of the counters or of chance, and never ran."""
        lines = self.lines_of(ran)
        stored = stored_in(self.node)
        found = set[int]()
        for branch in self.put_in:
            if _reads(branch.test, stored) or any(map(is_chance, ast.walk(branch.test))):
                calls = allocating_lines([*branch.body, *branch.orelse])
                ran_here = {-line for line in lines if line < 0} if branch in self.on_line else lines
                found |= {first for first, last in calls if ran_here.isdisjoint(range(first, last + 1))}
        return found

    def frame_of(self, line: int) -> Frame | None:
        """Return the place of a line in one of these functions, as their statements are moved."""
        for code, offset in self.functions.items():
            node = function_node(code.co_filename, code.co_firstlineno, code.co_name)
            if node is not None and node.lineno <= line - offset <= (node.end_lineno or 0):
                return Frame(code.co_filename, line - offset, code.co_qualname)
        return None

    def lines_of(self, ran: Callable[[CodeType], set[int]]) -> set[int]:
        """Lines of these functions that ran, moved as their statements are; negative for bodies on an `if`'s line."""
        each_ran = ((line, offset) for code, offset in self.functions.items() for line in ran(code))
        return {line + offset if line > 0 else line - offset for line, offset in each_ran}


def inlined(node: ast.For | ast.While, look: Look, code: CodeType, names: Mapping[str, object]) -> InlinedLoop:
    """Put functions in for their calls in the loop at `node` of a function with these global `names`."""
    own = stored_in(node)
    made = _inlined(node, look, code, names, own)
    stored = stored_in(made.node)
    by_functions = any(not each.startswith(WATCHED) for each in stored - own)
    return _inlined(node, look, code, names, stored) if by_functions else made


def _inlined(
    node: ast.For | ast.While, look: Look, code: CodeType, names: Mapping[str, object], stored: Set[str]
) -> InlinedLoop:
    """Do so, watching also the names of `stored` where functions are given them."""
    made = InlinedLoop(node, head_line(node))
    builder = _Builder(made, look, code, names, stored)
    body = builder.statements(node.body, _Scope(None, {}, names, 0), 0)
    if isinstance(node, ast.While):
        made.node = ast.While(node.test, body, [])
    else:
        made.node = ast.For(node.target, node.iter, body, [])
    ast.copy_location(made.node, node)
    builder.count_tests()
    return made


def stored_in(node: ast.For | ast.While) -> set[str]:
    """Return the names, attributes and items that a loop assigns, by their text."""
    return {ast.unparse(each) for each in _targets(node)}


def _targets(node: ast.For | ast.While) -> Iterator[ast.expr]:
    for each in ast.walk(node):
        match each:
            case ast.Assign(targets=targets):
                parts = targets
            case ast.AugAssign(target=target) | ast.For(target=target):
                parts = [target]
            case _:
                parts = []
        for part in parts:
            yield from _assigned(part)


def _assigned(target: ast.expr) -> Iterator[ast.expr]:
    """Yield the names, attributes and items of a target, which may be a tuple of them."""
    if isinstance(target, (ast.Tuple, ast.List)):
        for each in target.elts:
            yield from _assigned(each)
    elif isinstance(target, ast.Starred):
        yield from _assigned(target.value)
    else:
        yield target


def _reads(test: ast.expr, texts: set[str]) -> bool:
    return any(isinstance(each, ast.expr) and ast.unparse(each) in texts for each in ast.walk(test))


@dataclass(frozen=True)
class _Scope:
    """One function of the script while it is put in."""

    code: CodeType | None
    """None for the loop's own function."""
    values: dict[str, ast.expr]
    """Expressions of the loop's function for its parameters and variables."""
    globals: Mapping[str, object]
    offset: int
    once: frozenset[str] = frozenset()
    """Variables that the function assigns in one place only."""


class _Translator(ast.NodeTransformer):
    """Writes an expression of a function as one of the loop's function."""

    def __init__(self, scope: _Scope, builder: "_Builder", depth: int) -> None:
        self._scope, self._builder, self._depth = scope, builder, depth

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, _HIDE_NAMES):
            is_kept = isinstance(node, _COMPREHENSIONS) and self._scope.code is None and not self._scope.values
            return node if is_kept else ast.Name(UNKNOWN, ast.Load())
        found: ast.AST = super().visit(node)
        return found

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._builder.name(node, self._scope)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> ast.AST:
        """Replace `name := value` by its value; who reads the name later finds that it is unknown."""
        found: ast.AST = self.visit(node.value)
        return found

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace a call of a function that only returns an expression, or of `getattr`."""
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name))]):
                return ast.copy_location(ast.Attribute(owner, name, ast.Load()), node)
        if self._depth >= _DEPTH:
            return node
        called = self._builder.called(node)
        body = [each for each in called[0].body if not _is_text(each)] if called else []
        if called is None or len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
            return node
        inner = self._builder.scope_of(node, *called)
        return self._builder.translated(body[0].value, inner, self._depth + 1)


class _Replaced(ast.NodeTransformer):
    """Puts an expression in for a call."""

    def __init__(self, call: ast.Call, by: ast.expr) -> None:
        self._call, self._by = call, by

    def visit_Call(self, node: ast.Call) -> ast.expr:
        return self._by if node is self._call else node


class _Builder:
    """Puts functions in for their calls."""

    def __init__(
        self, made: InlinedLoop, look: Look, code: CodeType, names: Mapping[str, object], stored: Set[str]
    ) -> None:
        self._made, self._look, self._code, self._names, self._stored = made, look, code, names, stored
        self._left = _MOST_STATEMENTS
        self._branches = 0
        self._anew = set(_set_in_each(made.node.body))
        """Names that each iteration sets."""
        self._tests: list[ast.expr] = []

    def count_tests(self) -> None:
        """Count the conditions that may change among the watched expressions."""
        stored = stored_in(self._made.node)
        self._made.watches += sum(_reads(test, stored) for test in self._tests)

    def statements(self, block: Sequence[ast.stmt], scope: _Scope, depth: int) -> list[ast.stmt]:
        """Return the statements of a block with the functions that they call before them."""
        found: list[ast.stmt] = []
        for statement in without_returns(block) if scope.code else block:
            self._left -= 1
            if self._left < 0:
                break
            found += self._statement(statement, scope, depth)
        return found

    def _statement(self, statement: ast.stmt, scope: _Scope, depth: int) -> list[ast.stmt]:
        match statement:
            case ast.If(test=test, body=body, orelse=other):
                before, value = self._asked(test, scope, depth)
                branch = self._branch(statement, value, body, other, scope, depth)
                changes = not all(map(changes_nothing, [*body, *other]))
                first = body[0].lineno + scope.offset if body[0].lineno > test.lineno else 0
                watched = self._watched_test(branch.test, first, scope, depth) if changes else ()
                return [*before, *watched, branch]
            case ast.Expr(value=ast.IfExp(test=test, body=one, orelse=two)):
                value = self.translated(test, scope, depth)
                return [self._branch(statement, value, [as_statement(one)], [as_statement(two)], scope, depth)]
            case ast.With() | ast.AsyncWith() | ast.Try():
                made = copy.copy(statement)
                made.body = self.statements(statement.body, scope, depth)
                if isinstance(statement, ast.Try) and isinstance(made, ast.Try):
                    made.orelse = self.statements(statement.orelse, scope, depth)
                    made.finalbody = self.statements(statement.finalbody, scope, depth)
                return [self._placed(made, scope)]
            case ast.For():
                return self._inner(statement, scope, depth)
            case ast.While() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                return [self._placed(copy.deepcopy(statement), scope)]
        values = [each for each in ast.iter_child_nodes(statement) if isinstance(each, ast.expr)]
        if self._branches and self._keeps(statement, scope, depth):
            self._made.collecting.add(scope.offset + statement.lineno)
        before = [each for value in values for each in self._simple(value, scope, depth)]
        return [*before, *self._kept(statement, scope, depth)]

    def _asked(self, test: ast.expr, scope: _Scope, depth: int) -> tuple[list[ast.stmt], ast.expr]:
        """Return the counts of a function that a condition calls first, and the condition with its result put in.

        Such a function counts its calls, `self.calls += 1`, and tells if one is due.
        """
        value = self.translated(test, scope, depth)
        call = _first_call(value)
        called = self.called(call) if call is not None and depth < _DEPTH else None
        body = [each for each in called[0].body if not _is_text(each)] if called else []
        match body:
            case [*counts, ast.Return(value=ast.expr() as returned)] if counts and all(map(_is_assignment, counts)):
                assert call is not None
                assert called is not None
                inner = self.scope_of(call, *called)
                before = self.statements(counts, inner, depth + 1)
                found = self.translated(returned, inner, depth + 1)
                return before, _Replaced(call, found).visit(value)
        return [], value

    def _keeps(self, statement: ast.stmt, scope: _Scope, depth: int) -> bool:
        """Return True if a statement keeps tensors of the card for later iterations: in a list, or under a name."""
        holder = _collected_in(statement)
        if holder is not None:
            return _holds_tensors(self._look(self.translated(holder, scope, depth)))
        match statement:
            case ast.Assign(targets=[ast.Name(id=name) as target]) if scope.code is None and name not in self._anew:
                return _holds_tensors([self._look(target)])
            case ast.Assign(targets=[ast.Attribute() as target]):
                return _holds_tensors([self._look(self.translated(target, scope, depth))])
        return False

    def _branch(
        self,
        statement: ast.stmt,
        test: ast.expr,
        body: Sequence[ast.stmt],
        other: Sequence[ast.stmt],
        scope: _Scope,
        depth: int,
    ) -> ast.If:
        self._branches += 1
        made = ast.If(
            test,
            self.statements(body, scope, depth) or [ast.copy_location(ast.Pass(), statement)],
            self.statements(other, scope, depth),
        )
        self._branches -= 1
        if scope.code is not None:
            self._made.put_in.append(made)
            if isinstance(statement, ast.If) and body[0].lineno == statement.lineno:
                self._made.on_line.append(made)
        ast.copy_location(made, statement)
        return self._placed(made, scope)

    def _inner(self, loop: ast.For, scope: _Scope, depth: int) -> list[ast.stmt]:
        """Return a loop within the loop; its body once for each item of a short list, such as one of callbacks."""
        items = self.translated(loop.iter, scope, depth)
        found = self._look(items)
        if isinstance(loop.target, ast.Name) and isinstance(found, (list, tuple)) and _is_short(found):
            made: list[ast.stmt] = []
            for place in range(len(found)):
                item = ast.Subscript(items, ast.Constant(place), ast.Load())
                values = {**scope.values, loop.target.id: ast.fix_missing_locations(ast.copy_location(item, loop))}
                made += self.statements(loop.body, replace(scope, values=values), depth)
            return made
        target = loop.target if scope.code is None else self._counter_of(loop, scope)
        body, behind = (self.statements(block, scope, depth) for block in (loop.body, loop.orelse))
        inner = ast.copy_location(ast.For(target, items, body, behind), loop)
        return [*self._simple(loop.iter, scope, depth), self._placed(inner, scope)]

    def _counter_of(self, loop: ast.For, scope: _Scope) -> ast.expr:
        """Return a name of its own for the counter of a function's loop, and let the function's name stand for it."""
        match loop:
            case ast.For(target=ast.Name(id=name), iter=ast.Call(func=ast.Name(id="range"))):
                counts = name
            case ast.For(
                target=ast.Tuple(elts=[ast.Name(id=name), *_]),
                iter=ast.Call(func=ast.Name(id="enumerate"), args=[_], keywords=[]),
            ):
                counts = name
            case _:
                counts = ""
        if counts not in scope.once:
            return ast.Name(UNKNOWN, ast.Store())
        own = f"{INNER}:{scope.offset + loop.lineno}"
        scope.values[counts] = ast.fix_missing_locations(ast.copy_location(ast.Name(own, ast.Load()), loop))
        return ast.Name(own, ast.Store())

    def _simple(self, value: ast.expr, scope: _Scope, depth: int) -> list[ast.stmt]:
        """Return the bodies of the functions that an expression calls, and its parts that the counters decide."""
        found: list[ast.stmt] = []
        whole = self.translated(value, scope, depth)
        for call in [each for each in ast.walk(whole) if isinstance(each, ast.Call)] if depth < _DEPTH else ():
            called = self.called(call)
            if called is not None:
                found += self.statements(called[0].body, self.scope_of(call, *called), depth + 1)
        for part in (*_derived(whole), *_given_names(whole, self._stored)):
            if self._look(part) is not None and not self._reads_item(part):
                key = ast.Constant(f"{scope.offset}:{part.lineno}:{part.col_offset}:{depth}")
                target = ast.Subscript(ast.Name(WATCHED, ast.Load()), key, ast.Store())
                found.append(ast.copy_location(ast.Assign([target], part), value))
                self._made.watches += 1
                self._made.seldom += self._branches > 0
        return found

    def _watched_test(self, test: ast.expr, first: int, scope: _Scope, depth: int) -> Iterator[ast.stmt]:
        """Watch a condition alone: its block may free memory, or change what later iterations need."""
        is_counted = any(map(_is_named, ast.walk(test))) and not self._reads_item(test)
        if is_counted and self._look(test) is not None:
            holds = ast.UnaryOp(ast.Not(), ast.UnaryOp(ast.Not(), test))
            key = ast.Constant(f"{HOLDS}{first}:{scope.offset}:{test.lineno}:{test.col_offset}:{depth}")
            target = ast.Subscript(ast.Name(WATCHED, ast.Load()), key, ast.Store())
            yield ast.fix_missing_locations(ast.copy_location(ast.Assign([target], holds), test))
            self._tests.append(test)

    def _reads_item(self, part: ast.expr) -> bool:
        """Return True if an expression depends on a tensor, or on the loop's item: only the item itself could tell."""
        loop = self._made.node
        given = set(map(ast.unparse, _assigned(loop.target))) if isinstance(loop, ast.For) else set[str]()
        names = (each for each in ast.walk(part) if _is_named(each))
        values = ((ast.unparse(each), self._look(each)) for each in names)
        return any(
            isinstance(found, Tensor) or (text in given and not isinstance(found, int)) for text, found in values
        )

    def _kept(self, statement: ast.stmt, scope: _Scope, depth: int) -> list[ast.stmt]:
        """Return the statement itself; in the loop's own words if it counts in a function."""
        made = copy.deepcopy(statement)
        if scope.code is None and not scope.values:
            return [made]
        match made:
            case ast.Assign(targets=[target], value=value) | ast.AugAssign(target=target, value=value):
                is_local = isinstance(target, ast.Name) and target.id in scope.values
                self._learn(statement, scope, depth)
                own = as_statement(self.translated(value, scope, depth), made)
                made = own if is_local else self._in_own_words(made, scope, depth)
        return [self._placed(made, scope)]

    def _learn(self, statement: ast.stmt, scope: _Scope, depth: int) -> None:
        """Let a variable that is assigned here only stand for its value."""
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in scope.once and name in scope.values:
                known = self.translated(value, scope, depth)
                if self._look(known) is not None:
                    scope.values[name] = known

    def _in_own_words(self, statement: ast.stmt, scope: _Scope, depth: int) -> ast.stmt:
        translator = _Translator(scope, self, depth)
        for name, value in ast.iter_fields(statement):
            if isinstance(value, ast.expr):
                setattr(statement, name, _stored(translator.visit(value), name))
            elif name == "targets":
                setattr(statement, name, [_stored(translator.visit(each), name) for each in value])
        return statement

    def _placed(self, statement: S, scope: _Scope) -> S:
        """Move a statement of another file to lines of its own, and all that were made to some line."""
        if scope.offset and statement.lineno < _OTHER_FILE:
            statement.lineno += scope.offset
            statement.end_lineno = (statement.end_lineno or statement.lineno) + scope.offset
        return statement

    def translated(self, value: ast.expr, scope: _Scope, depth: int) -> ast.expr:
        found = _Translator(scope, self, depth).visit(copy.deepcopy(value))
        assert isinstance(found, ast.expr)
        return ast.fix_missing_locations(ast.copy_location(found, value))

    def name(self, node: ast.Name, scope: _Scope) -> ast.expr:
        """Return a name's expression in the loop's function."""
        if node.id in scope.values:
            return copy.deepcopy(scope.values[node.id])
        if scope.code is None or node.id == ENDS:
            return node
        if node.id not in scope.globals:
            is_builtin = hasattr(builtins, node.id) or node.id in self._code.co_cellvars
            return node if is_builtin else ast.Name(UNKNOWN, node.ctx)
        if scope.globals is self._names and node.id not in (*self._code.co_varnames, *self._code.co_cellvars):
            return node
        value = scope.globals[node.id]
        if value is None or isinstance(value, (int, float, str)):
            return ast.Constant(value)
        return ast.Name(UNKNOWN, node.ctx)

    def called(self, call: ast.Call) -> tuple[ast.FunctionDef, FunctionType, ast.expr | None] | None:
        """Return the source of the script's function that is called, the function and its `self`."""
        found = self._look(call.func)
        owner = None
        if isinstance(found, MethodType) and isinstance(call.func, ast.Attribute):
            found, owner = found.__func__, call.func.value
        elif isinstance(of_kind := inspect.getattr_static(type(found), "__call__", None), FunctionType) and is_own(
            of_kind.__code__
        ):
            found, owner = of_kind, call.func
        found = inspect.unwrap(found) if isinstance(found, FunctionType) else found
        if not isinstance(found, FunctionType):
            return None
        code = found.__code__
        if code.co_flags & SUSPENDS or not is_own(code):
            return None
        node = function_node(code.co_filename, code.co_firstlineno, code.co_name)
        return (node, found, owner) if node is not None else None

    def scope_of(self, call: ast.Call, node: ast.FunctionDef, function: FunctionType, owner: ast.expr | None) -> _Scope:
        """Return the names of a function that is called so."""
        code = function.__code__
        files = [self._code.co_filename, *(each.co_filename for each in self._made.functions)]
        known = files.index(code.co_filename) if code.co_filename in files else len(files)
        offset = self._made.functions.setdefault(code, known * _OTHER_FILE)
        self._made.modules.add(function.__globals__.get("__name__"))
        values = dict.fromkeys((*code.co_varnames, *code.co_cellvars), _unknown())
        values |= _given(call, node, owner)
        stored = Counter(
            each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
        )
        given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values |= {name: _unknown() for name in given if name in stored}
        once = frozenset(name for name, times in stored.items() if times == 1 and name not in given)
        scope = _Scope(code, values, function.__globals__, offset, once)
        self._read_variables(node, scope)
        return scope

    def _read_variables(self, node: ast.FunctionDef, scope: _Scope) -> None:
        """Learn the variables of a function that are assigned once, from known values."""
        for statement in node.body:
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                continue
            target = statement.targets[0]
            value = self.translated(statement.value, scope, _DEPTH)
            if self._look(value) is None:
                continue
            parts = target.elts if isinstance(target, ast.Tuple) else []
            pairs: list[tuple[ast.expr, ast.expr]] = (
                [(target, value)]
                if not parts
                else [(part, ast.Subscript(value, ast.Constant(place), ast.Load())) for place, part in enumerate(parts)]
            )
            for part, each_value in pairs:
                if isinstance(part, ast.Name) and part.id in scope.once and part.id in scope.values:
                    scope.values[part.id] = ast.fix_missing_locations(ast.copy_location(each_value, statement))


def _first_call(test: ast.expr) -> ast.Call | None:
    """Return the call that Python makes first for a condition, in any case."""
    match test:
        case ast.Call():
            return test
        case ast.UnaryOp(operand=first) | ast.BoolOp(values=[first, *_]) | ast.Compare(left=first):
            return _first_call(first)
    return None


def _is_assignment(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign))


def _set_in_each(block: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements set whatever the conditions are."""
    for statement in block:
        match statement:
            case ast.With(body=body) | ast.AsyncWith(body=body) | ast.Try(body=body):
                yield from _set_in_each(body)
            case ast.Assign(targets=targets):
                yield from (each.id for one in targets for each in ast.walk(one) if isinstance(each, ast.Name))


def _collected_in(statement: ast.stmt) -> ast.expr | None:
    """Return the list or dictionary that a statement puts something into."""
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=holder, attr="append" | "extend"))):
            return holder
        case ast.Assign(targets=[ast.Subscript(value=holder)]):
            return holder
    return None


def _holds_tensors(holder: object) -> bool:
    """Return True if the latest entry of a list or dictionary has a tensor of the card."""
    entries = list(holder.values()) if isinstance(holder, dict) else holder
    latest = entries[-1:] if isinstance(entries, list) else []
    parts = [part for each in latest for part in (each if isinstance(each, (tuple, list)) else [each])]
    return any(isinstance(each, Tensor) and each.is_cuda for each in parts)


def _is_short(items: Sequence[object]) -> bool:
    return 0 < len(items) <= _MOST_ITEMS and not any(isinstance(each, Tensor) for each in items)


def _given(call: ast.Call, node: ast.FunctionDef, owner: ast.expr | None) -> dict[str, ast.expr]:
    """Return the expressions of a function's parameters in one call."""
    names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
    passed = [owner] if owner is not None else []
    for argument in call.args:
        match argument:
            case ast.Starred(value=ast.Tuple(elts=parts) | ast.List(elts=parts)):
                passed += parts
            case _:
                passed.append(argument)
    values = {
        name: value
        for name, value in zip(names[len(names) - len(node.args.defaults) :], node.args.defaults, strict=True)
        if isinstance(value, ast.Constant)
    }
    for each, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if isinstance(value, ast.Constant):
            values[each.arg] = value
    found: dict[str, ast.expr] = {**values}
    if any(isinstance(each, ast.Starred) for each in passed):
        return {}
    found.update(zip(names, passed, strict=False))
    if node.args.vararg is not None:
        found[node.args.vararg.arg] = ast.Tuple(passed[len(names) :], ast.Load())
    found.update({each.arg: each.value for each in call.keywords if each.arg is not None})
    return found


def without_returns(block: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Put the statements after a branch that may return into the branches, so that no statement returns."""
    for place, statement in enumerate(block):
        if isinstance(statement, ast.Return):
            return [*block[:place], *([as_statement(statement.value, statement)] if statement.value else [])]
        if isinstance(statement, ast.If) and _returns(statement):
            rest = block[place + 1 :]
            made = ast.If(
                statement.test,
                without_returns([*statement.body, *rest]) or [ast.copy_location(ast.Pass(), statement.body[0])],
                without_returns([*statement.orelse, *rest]),
            )
            ast.copy_location(made, statement)
            made.end_lineno = max((each.end_lineno or 0 for each in rest), default=statement.end_lineno)
            return [*block[:place], made]
    return list(block)


def _returns(branch: ast.If) -> bool:
    return any(
        isinstance(each, ast.Return) or (isinstance(each, ast.If) and _returns(each))
        for each in (*branch.body, *branch.orelse)
    )


def _derived(value: ast.expr) -> Iterator[ast.expr]:
    """Yield the largest parts of an expression that may be computed from counters, without those that print."""
    parts: list[ast.expr] = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, _HIDE_NAMES):
            continue
        if isinstance(part, ast.Call) and is_harmless(part) and not is_computed(part):
            parts.append(part.func)  # `model(x).sum()`: not what it is given, but what it is a method of
            continue
        is_read = isinstance(getattr(part, "ctx", _LOAD), ast.Load)  # else it is a target
        if isinstance(part, _DERIVED) and is_read and any(map(_is_named, ast.walk(part))):
            yield part
        parts += [each for each in ast.iter_child_nodes(part) if isinstance(each, ast.expr)]
        parts += [each.value for each in getattr(part, "keywords", [])]


def _given_names(value: ast.expr, stored: Set[str]) -> Iterator[ast.expr]:
    """Yield those of the names that are passed to functions, without those that print."""
    for call in ast.walk(value):
        if isinstance(call, ast.Call) and not is_harmless(call):
            for part in (*call.args, *(each.value for each in call.keywords)):
                yield from (each for each in _entries(part) if _is_named(each) and ast.unparse(each) in stored)


def _entries(part: ast.expr) -> Sequence[ast.expr]:
    return part.elts if isinstance(part, (ast.Tuple, ast.List)) else [part]


def _is_named(node: ast.AST) -> TypeGuard[ast.Name | ast.Attribute]:
    return isinstance(node, (ast.Name, ast.Attribute))


def as_statement(value: ast.expr, at: ast.stmt | None = None) -> ast.Expr:
    """Return an expression as a statement, at its own place or at another one's."""
    return ast.fix_missing_locations(ast.copy_location(ast.Expr(value), at or value))


def _stored(value: ast.AST, field_name: str) -> ast.AST:
    """Let an expression be assigned to, if it is a target."""
    if field_name in ("target", "targets") and isinstance(value, (ast.Name, ast.Attribute, ast.Subscript)):
        value.ctx = ast.Store()
    return value


def _unknown() -> ast.expr:
    return ast.Name(UNKNOWN, ast.Load())


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
