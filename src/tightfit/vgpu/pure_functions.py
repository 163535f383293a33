"""Functions of the script that only compute: a table of lengths, a schedule. They can be called ahead of the script.

Such a function has nothing but numbers, texts and collections of them, and changes none but its own variables. Its
source shows that, and the values that it reads.
"""

import ast
import builtins
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cache
from types import CodeType, FunctionType
from typing import NamedTuple

from tightfit.vgpu.frames import is_own
from tightfit.vgpu.loop_source import function_node

_STATEMENTS = (ast.Return, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.If, ast.For, ast.Break, ast.Continue, ast.Pass)
_PARTS = (
    *(
        ast.Expr,
        ast.Constant,
        ast.Name,
        ast.Attribute,
        ast.Subscript,
        ast.Slice,
        ast.Tuple,
        ast.List,
        ast.Dict,
        ast.Set,
    ),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call, ast.ListComp, ast.GeneratorExp),
    *(ast.comprehension, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.keyword, ast.Raise),
)
_CALLED_NAMES = (
    "len int float bool str min max abs round divmod sum range reversed enumerate zip sorted list tuple any all"
)
_CALLED = frozenset(_CALLED_NAMES.split())
_METHODS = frozenset(("items", "keys", "values", "get", "index", "count"))
_ERRORS = frozenset(("ValueError", "KeyError", "IndexError", "RuntimeError", "StopIteration"))
_DEPTH = 4
_MOST_ITEMS = 1000


class _Reads(NamedTuple):
    """Names and attributes that a function reads besides its arguments."""

    names: frozenset[str]
    attributes: frozenset[str]
    """Of its first parameter."""


def is_pure(function: FunctionType, arguments: Sequence[object], options: Mapping[str, object], depth: int = 0) -> bool:
    """Return True if a call only computes, with what its function reads now."""
    code = function.__code__
    reads = _reads(code) if depth < _DEPTH and is_own(code) else None
    if reads is None or not all(map(_is_plain, options.values())):
        return False
    owner = arguments[0] if reads.attributes and arguments else None
    others = arguments[1:] if reads.attributes else arguments
    if not all(map(_is_plain, others)) or not all(_is_plain(_own(owner, name)) for name in reads.attributes):
        return False
    return all(_is_known(_named(function, name), name, depth) for name in reads.names)


def _is_known(value: object, name: str, depth: int) -> bool:
    if isinstance(value, FunctionType):
        parameters = value.__code__.co_argcount
        return is_pure(value, [0] * parameters, {}, depth + 1)
    if name in _CALLED or name in _ERRORS:
        return value is getattr(builtins, name)
    return value is math or _is_plain(value)


def _named(function: FunctionType, name: str) -> object:
    """Return the value of a name that is not a function's own; the function itself if there is none."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name in cells:
        try:
            return cells[name].cell_contents
        except ValueError:
            return _NOTHING
    return function.__globals__.get(name, getattr(builtins, name, _NOTHING))


_NOTHING = object()


def _own(owner: object, name: str) -> object:
    """Return an attribute that an object has itself, rather than one that its class computes."""
    kind = type(owner)
    found = inspect.getattr_static(kind, name, None)
    if (
        hasattr(found, "__get__")
        or hasattr(kind, "__getattr__")
        or kind.__getattribute__ is not object.__getattribute__
    ):
        return _NOTHING
    values: Mapping[str, object] = getattr(owner, "__dict__", {})
    return values.get(name, found if found is not None else _NOTHING)


def _is_plain(value: object, depth: int = 0) -> bool:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return depth < _DEPTH and len(value) <= _MOST_ITEMS and all(_is_plain(each, depth + 1) for each in value)
    return value is None or type(value) in (int, float, str, bool, range)


@cache
def _reads(code: CodeType) -> _Reads | None:
    """Read from a function's source what else it reads; None if it does more than compute."""
    node = function_node(code.co_filename, code.co_firstlineno, code.co_name)
    if node is None or node.decorator_list or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        return None
    parts = [each for statement in node.body for each in ast.walk(statement)]
    added = {ast.unparse(each.target) for each in parts if isinstance(each, ast.AugAssign)}
    if not added <= _numbers(parts):
        return None
    own = {*code.co_varnames, *code.co_cellvars, *_comprehended(parts)}
    owner = code.co_varnames[0] if code.co_argcount else ""
    if not all(_computes(each, own, owner) for each in parts):
        return None
    called = {id(each.func) for each in parts if isinstance(each, ast.Call)}
    attributes = {
        each.attr
        for each in parts
        if isinstance(each, ast.Attribute) and _is_name(each.value, owner)
        if id(each) not in called
    }
    names = {each.id for each in parts if isinstance(each, ast.Name)} - own
    return _Reads(frozenset(names), frozenset(attributes))


def _numbers(parts: Sequence[ast.AST]) -> set[str]:
    """Return the variables that are only set to numbers: adding to anything else may change it in place."""
    assigned = [each for each in parts if isinstance(each, ast.Assign)]
    others = {ast.unparse(target) for each in assigned for target in each.targets if not _is_number(each.value)}
    return {ast.unparse(target) for each in assigned for target in each.targets} - others


def _is_number(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, (int, float))


def _comprehended(parts: Sequence[ast.AST]) -> Iterator[str]:
    """Yield the variables of comprehensions, which are functions of their own."""
    for part in parts:
        if isinstance(part, ast.comprehension):
            yield from (each.id for each in ast.walk(part.target) if isinstance(each, ast.Name))


def _computes(node: ast.AST, own: Set[str], owner: str) -> bool:
    """Return True for a part of a function that changes nothing but the function's own variables."""
    match node:
        case ast.Call(func=ast.Name(id=name)):
            return name not in own
        case ast.Call(func=ast.Attribute(attr=name, value=of)):
            return name in _METHODS or _is_name(of, "math")
        case ast.Call():
            return False
        case ast.Attribute(value=of, attr=name):
            return isinstance(node.ctx, ast.Load) and (name in _METHODS or _is_name(of, "math") or _is_name(of, owner))
        case ast.Subscript():
            return isinstance(node.ctx, ast.Load)
    return isinstance(node, (*_STATEMENTS, *_PARTS))


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
