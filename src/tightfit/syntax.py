"""Python's operators by their nodes in a syntax tree, for expressions that are read without running them.

Powers and shifts are not among them: their results may not fit any memory.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

Operators = Mapping[type[ast.AST], Callable[..., Any]]
"""`Any`: whatever Python gives for the operands."""

ARITHMETIC: Operators = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
SIGNS: Operators = {ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Not: operator.not_}
COMPARISONS: Operators = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, group: item in group,
    ast.NotIn: lambda item, group: item not in group,
}
