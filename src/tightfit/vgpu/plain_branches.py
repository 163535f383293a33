"""Statements that choose, written as `if`: `test and call()`, `match`, and `next` with `except StopIteration`.

Who reads a loop needs to know one kind of branch only. Every statement keeps its place in the file.
"""

import ast
from collections.abc import Sequence
from typing import TypeGuard

UNKNOWN = "tightfit.unknown"
"""Name, which no script can have, for what only the script could tell."""
ENDS = "tightfit.ends"
"""The same for a function that tells if an iterator is at its end."""


class AsIf(ast.NodeTransformer):
    """Rewrites these statements of a file."""

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        """Write `one and two and call()` as `if one and two: call()`, and `one or call()` as `if not one: call()`."""
        match node.value:
            case ast.BoolOp(op=op, values=[*tests, ast.Call() as call]):
                found = tests[0] if len(tests) == 1 else ast.BoolOp(op, tests)
                test = found if isinstance(op, ast.And) else ast.UnaryOp(ast.Not(), found)
                return _placed(ast.If(test, [_placed(ast.Expr(call), call)], []), node)
        return node

    def visit_Match(self, node: ast.Match) -> ast.AST | list[ast.stmt]:
        """Write cases that are values as a chain of comparisons; what other cases depend on is unknown."""
        self.generic_visit(node)
        calls = any(isinstance(each, ast.Call) for each in ast.walk(node.subject))
        chain: list[ast.stmt] = []
        for case in reversed(node.cases):
            test = _unknown() if calls else _test_of(case, node.subject)
            if isinstance(test, ast.Constant):
                chain = case.body
                continue
            made = ast.If(test, case.body, chain)
            made.lineno, made.col_offset = case.pattern.lineno, case.pattern.col_offset
            made.end_lineno, made.end_col_offset = node.end_lineno, node.end_col_offset
            chain = [ast.fix_missing_locations(made)]
        return [_placed(ast.Expr(node.subject), node.subject), *chain]

    def visit_Try(self, node: ast.Try) -> ast.AST | list[ast.stmt]:
        """Write `try: item = next(items)` with `except StopIteration:` as `if` the items are at their end."""
        self.generic_visit(node)
        taken = [each for statement in node.body for each in ast.walk(statement) if is_next(each)]
        ends = [each for each in node.handlers if isinstance(each.type, ast.Name) and each.type.id == "StopIteration"]
        if not taken or len(ends) != 1 or len(node.handlers) != 1 or node.finalbody:
            return node
        test = ast.Call(ast.Name(ENDS, ast.Load()), [taken[0].args[0]], [])
        test.lineno, test.col_offset = test.end_lineno, test.end_col_offset = node.lineno, node.col_offset
        return _placed(ast.If(test, ends[0].body, [*node.body, *node.orelse]), node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Write `torch.isnan(loss).any()` as False, and `math.isfinite(loss)` as True: made-up numbers are finite."""
        self.generic_visit(node)
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        of = getattr(node.func, "value", None)
        if called in _OF_FINITE_NUMBERS and len(node.args) == 1:
            return ast.copy_location(ast.Constant(_OF_FINITE_NUMBERS[called]), node)
        if called in _SAME and not node.args and isinstance(of, ast.Constant) and isinstance(of.value, bool):
            return of
        match node:
            case ast.Call(func=ast.Name(id="any" | "all"), args=[ast.GeneratorExp(elt=ast.Constant() as each)]):
                return each
        return node


_OF_FINITE_NUMBERS = {"isnan": False, "isinf": False, "isposinf": False, "isneginf": False, "isfinite": True}
_SAME = ("any", "all", "item", "sum")


def is_next(node: ast.AST) -> TypeGuard[ast.Call]:
    """Return True for `next(items)`."""
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "next" and len(node.args) == 1


def _placed(made: ast.stmt, at: ast.AST) -> ast.stmt:
    return ast.fix_missing_locations(ast.copy_location(made, at))


def _unknown() -> ast.expr:
    return ast.Call(ast.Name(UNKNOWN, ast.Load()), [], [])


def _test_of(case: ast.match_case, subject: ast.expr) -> ast.expr:
    """Return the condition of a case, True for one that takes everything."""
    values = _values(case.pattern)
    if values is None:
        return _unknown()
    tests: Sequence[ast.expr] = [ast.Compare(subject, [ast.Eq()], [value]) for value in values]
    test = ast.Constant(True) if not tests else tests[0] if len(tests) == 1 else ast.BoolOp(ast.Or(), list(tests))
    if case.guard is None:
        return test
    return case.guard if not tests else ast.BoolOp(ast.And(), [test, case.guard])


def _values(pattern: ast.pattern) -> list[ast.expr] | None:
    """List the values that a pattern takes, none for `_`; None for other patterns."""
    match pattern:
        case ast.MatchValue(value=value):
            return [value]
        case ast.MatchSingleton(value=single):
            return [ast.Constant(single)]
        case ast.MatchAs(pattern=None, name=None):
            return []
        case ast.MatchOr(patterns=patterns):
            found = [_values(each) for each in patterns]
            return None if None in found or [] in found else [value for each in found for value in each or ()]
    return None
