"""An iteration of a loop, reduced to its counters and to the conditions before lines that never ran."""

import ast
from collections.abc import Collection, Mapping, Sequence
from typing import TypeGuard

from torch import Tensor

from tightfit.vgpu.ending_iterators import begins_alike
from tightfit.vgpu.expressions import INNER, Reader, is_chance, known_part
from tightfit.vgpu.inlined_loop import WATCHED, stored_in
from tightfit.vgpu.loop_source import blocks_of
from tightfit.vgpu.operations import NUMBERS
from tightfit.vgpu.plain_branches import ENDS, is_next
from tightfit.vgpu.tensor_conditions import stays

TAKE, ANEW = "tightfit.take", "tightfit.anew"
"""Names, which no script can have, of functions that count the items of an iterator."""


class ReducedIteration:
    """An iteration of a loop, reduced to its counters and to the conditions before lines that never ran."""

    def __init__(
        self,
        reader: Reader,
        missing: Collection[int],
        ran: Collection[int],
        lengths: Mapping[int, int],
        lists: Collection[str] = (),
        ending: Collection[str] = (),
    ) -> None:
        """`lists`: expressions of lists with lengths that it reads. `ending`: of iterators that it begins anew."""
        self._ending = ending
        self._reader, self._missing, self._ran, self._lengths, self._lists = reader, missing, ran, lengths, lists
        self.unknown: set[int] = set()
        """Lines of `missing` behind a condition that only the script could tell."""
        self.by_chance: set[int] = set()
        """Those of them behind one that chance, or an iterator, decides."""
        self.staying: set[int] = set()
        """Those of them behind one that comes out as before in a play, however long it goes on."""
        self.uncounted: set[int] = set()
        """Those of them in a loop within the loop whose iterations nobody can count."""
        self.has_end = False
        """True if the counters lead out of the loop."""
        self._depth = 0
        self.inner_counters: set[str] = set()
        """Counters of loops within the loop."""
        self.set_anew: set[str] = set()
        """Names that such a loop computes in each of its iterations, and nothing adds to."""
        self.added_to: set[str] = set()
        """Counters that the loop adds to."""
        self.counters: dict[str, ast.expr] = {}
        """Expressions of the names and attributes that count, by their text."""
        self._begun = set[str]()
        """Names that the iteration has set so far."""
        self._stale = set[str]()
        """Those of them that a loop within goes on to change, which nobody can count."""

    def body(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        kept: list[ast.stmt] = []
        for statement in statements:
            kept += self._next_items(statement)
            match statement:
                case ast.If():
                    kept += self._branch(statement)
                case ast.With() | ast.AsyncWith() | ast.Try():
                    for block in blocks_of(statement):
                        kept += self.body(block)
                case ast.For():
                    kept += self._inner(statement)
                case ast.While():
                    self._leave_uncounted(statement)
                case ast.Break() | ast.Continue() if self._depth:
                    kept.append(statement)
                case ast.Break() | ast.Return() | ast.Raise():
                    self.has_end = True
                    kept.append(PLAY)
                case ast.Continue():
                    kept.append(NEXT)
                case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name))], value=value) if name == WATCHED:
                    if self._reader.knows(value) and not self._is_stale(value):
                        kept.append(statement)
                case ast.Expr(value=ast.Call(func=ast.Attribute(value=of, attr="append"), args=[_])):
                    kept += self._append(ast.unparse(of), of)
                case (
                    ast.AugAssign(target=ast.Name() | ast.Attribute() | ast.Subscript() as target, value=value)
                    | ast.Assign(targets=[ast.Name() | ast.Attribute() | ast.Subscript() as target], value=value)
                ) if self._is_count(target, value, isinstance(statement, ast.AugAssign)):
                    kept += self._count(statement, ast.unparse(target), value)
        self.set_anew -= self.added_to
        return kept

    def _next_items(self, statement: ast.stmt) -> list[ast.stmt]:
        """Return statements that take an item of such an iterator, or begin it anew, if this statement does so."""
        match statement:
            case ast.Assign(targets=[target], value=ast.Call(func=ast.Name(id="iter"), args=[items])):
                text = ast.unparse(target)
                if text in self._ending and self._reader.knows(items) and begins_alike(self._reader.value(items)):
                    return [_call(ANEW, ast.Constant(text), ast.parse(text, mode="eval").body, items)]
            case ast.Assign() | ast.Expr() | ast.AugAssign() | ast.AnnAssign():
                taken = [each.args[0] for each in ast.walk(statement) if is_next(each)]
                return [_call(TAKE, each) for each in taken if ast.unparse(each) in self._ending]
        return []

    def _count(self, statement: ast.Assign | ast.AugAssign, text: str, value: ast.expr) -> list[ast.stmt]:
        """Return the statement, unless it reads a name that a loop without a known length would have changed."""
        if isinstance(statement, ast.Assign):
            self._begun.add(text)
            if self._is_stale(value):
                self._stale.add(text)
                return []
            self._stale.discard(text)
        self.counters[text] = ast.parse(text, mode="eval").body
        if isinstance(statement, ast.AugAssign) or text in _parts(value):
            self.added_to.add(text)
        elif self._depth:
            self.set_anew.add(text)
        return [statement]

    def _is_stale(self, value: ast.expr) -> bool:
        return not self._stale.isdisjoint(_parts(value))

    def _append(self, text: str, of: ast.expr) -> list[ast.stmt]:
        """Let a list grow by copies of its last entry if its length is read and the entry is no tensor."""
        found = self._reader.value(of) if text in self._lists and self._reader.knows(of) else None
        if type(found) is not list or not found or not _is_copied(found[-1]):
            return []
        length = f"len({text})"
        self.counters[length] = ast.parse(length, mode="eval").body
        return ast.parse(f"{text}.append({text}[-1])").body

    def _inner(self, loop: ast.For) -> list[ast.stmt]:
        """Return a loop within the loop, reduced likewise, with as many iterations as it had when it ran last."""
        count = self._lengths.get(loop.lineno)
        if count is None or count > MOST_INNER:
            self._leave_uncounted(loop)
            return self.body(loop.orelse)
        counter = loop.target if is_call(loop.iter, "range") else None
        if is_call(loop.iter, "enumerate") and isinstance(loop.target, ast.Tuple):
            counter = loop.target.elts[0]
        elif isinstance(loop.target, ast.Name) and loop.target.id.startswith(INNER):
            counter = loop.target
        items = ast.parse(f"range({count})", mode="eval").body
        if isinstance(counter, ast.Name) and self._reader.has(counter):
            if not counter.id.startswith(INNER):
                self.counters[counter.id] = ast.Name(counter.id, ast.Load())
                self.inner_counters.add(counter.id)
            if is_call(loop.iter, "range") and self._reader.knows_items(loop.iter):
                items = loop.iter
        else:
            counter = ast.Name(INNER, ast.Store())
        others = frozenset(given(loop)) - {counter.id}
        with self._reader.without(others):
            self._depth += 1
            body = self.body(loop.body)
            self._depth -= 1
        behind = self.body(loop.orelse)
        return [ast.For(counter, items, body or [ast.Pass()], behind)] if body or behind else []

    def _leave_uncounted(self, loop: ast.For | ast.While) -> None:
        self.uncounted |= {line for line in self._missing if covers(loop, line)}
        self._stale |= self._begun & stored_in(loop)

    def _branch(self, statement: ast.If) -> list[ast.stmt]:
        test = known_part(statement.test, self._reader.knows)
        if test is None or (test is not statement.test and self._holds_already(statement, test)):
            behind = {line for line in self._missing if covers(statement, line)}
            self.unknown |= behind
            self.by_chance |= behind if any(map(is_chance, ast.walk(statement.test))) else set()
            self.staying |= behind if stays(statement.test, self._reader.peek) else set()
            return self.body(statement.orelse) if statement.body[0].lineno not in self._ran else []
        body, other = (self._taken(each) for each in (statement.body, statement.orelse))
        if is_end(test):
            test = ast.Call(test.func, [*test.args, ast.Constant(ast.unparse(test.args[0]))], [])
            if not any(map(_begins_anew, body)):
                body = [PLAY]  # nobody knows how the iterator goes on
        return [ast.If(test, body or [ast.Pass()], other)] if body or other else []

    def _taken(self, block: list[ast.stmt]) -> list[ast.stmt]:
        return [PLAY] if self._runs_missing(block) else self.body(block)

    def _runs_missing(self, block: list[ast.stmt]) -> bool:
        """Return True if a line of `missing` is in a block without a condition of its own."""
        for statement in block:
            if isinstance(statement, ast.If):
                continue
            inner = [each for each in blocks_of(statement) if each]
            last = inner[0][0].lineno - 1 if inner else statement.end_lineno or 0
            if any(statement.lineno <= line <= last for line in self._missing) or any(map(self._runs_missing, inner)):
                return True
        return False

    def _holds_already(self, statement: ast.If, known: ast.expr) -> bool:
        """Return True if the known part of a condition holds, and its lines did not run: the rest decides."""
        return bool(self._reader.value(known)) and statement.body[0].lineno not in self._ran

    def _is_count(self, target: ast.expr, value: ast.expr, is_added: bool) -> bool:
        parts = (value, target) if is_added else (value,)
        numbers = all(self._reader.knows(each) and isinstance(self._reader.value(each), NUMBERS) for each in parts)
        return numbers and self._reader.has(target)


def _parts(value: ast.expr) -> set[str]:
    """Return the expressions within one, and itself, by their text."""
    return {ast.unparse(each) for each in ast.walk(value) if isinstance(each, ast.expr)}


def _call(name: str, *arguments: ast.expr) -> ast.stmt:
    return ast.Expr(ast.Call(ast.Name(name, ast.Load()), list(arguments), []))


def is_end(test: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(test, ast.Call) and getattr(test.func, "id", "") == ENDS


def _begins_anew(statement: ast.stmt) -> bool:
    calls = (each for each in ast.walk(statement) if isinstance(each, ast.Call))
    return any(getattr(each.func, "id", "") == ANEW for each in calls)


def is_call(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


MOST_INNER = 1_000_000
"""Iterations of such a loop up to which it is followed."""
PLAY = ast.parse("assert False").body[0]
NEXT = ast.parse("raise StopIteration").body[0]


def _is_copied(entry: object) -> bool:
    """Return True for an entry of a list that may be repeated without hiding memory that tensors would take."""
    if isinstance(entry, tuple):
        return not any(isinstance(each, Tensor) for each in entry)
    return isinstance(entry, NUMBERS)


def given(node: ast.For | ast.While) -> dict[str, ast.Name | ast.Attribute]:
    """Names and attributes that a loop itself assigns, by their text."""
    if isinstance(node, ast.While):
        return {}
    parts = [node.target]
    found: dict[str, ast.Name | ast.Attribute] = {}
    while parts:
        match parts.pop():
            case ast.Name() | ast.Attribute() as part:
                found[ast.unparse(part)] = part
            case ast.Tuple(elts=inner) | ast.List(elts=inner):
                parts += inner
    return found


def covers(statement: ast.stmt, line: int) -> bool:
    return statement.lineno <= line <= (statement.end_lineno or 0)
