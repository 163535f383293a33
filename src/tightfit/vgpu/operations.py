"""Operators, functions and methods that may be applied to values of a script: they change nothing and run no kernel."""

import ast
import builtins
import enum
import math
import operator
from abc import ABCMeta
from collections.abc import Callable, Sequence
from types import UnionType

import torch
from torch import Tensor

from tightfit.syntax import ARITHMETIC, COMPARISONS, SIGNS
from tightfit.vgpu.loop_items import FAILURES

PLAIN = (
    *(int, float, str, bool, type(None), tuple, list, set, frozenset, dict, range),
    *(slice, type, enum.Enum, torch.dtype, torch.device),
)
"""Kinds of values whose operators run nothing of a script and no kernel."""
NUMBERS = (int, float, str, type(None))
"""Kinds of values that count, or that conditions compare."""


class UnknownError(Exception):
    """A value that only running the script would give."""


_MOST_BITS = 4096
"""Bits of a number to which shifts and powers are computed."""


def _left_shift(value: int, places: int) -> int:
    if value.bit_length() + places > _MOST_BITS:
        raise UnknownError
    return value << places


def _power(base: float, exponent: float) -> object:
    if isinstance(base, int) and abs(exponent) * base.bit_length() > _MOST_BITS:
        raise UnknownError
    return base**exponent


_OPERATIONS: dict[type[ast.AST], Callable[..., object]] = {
    **ARITHMETIC,
    **COMPARISONS,
    **SIGNS,
    ast.LShift: _left_shift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.Pow: _power,
}
_IDENTITY = (ast.Is, ast.IsNot)
FUNCTIONS: dict[str, Callable[..., object]] = {
    each.__name__: each for each in (len, int, float, bool, str, min, max, abs, round, divmod, sum, any, all)
}
OF_KINDS: dict[str, Callable[..., object]] = {
    each.__name__: each for each in (isinstance, issubclass, callable, type, hasattr)
}
"""Functions that ask what an object is."""
_CHECKS = (type.__instancecheck__, ABCMeta.__instancecheck__, UnionType.__instancecheck__)
OF_MATH: dict[str, Callable[..., object]] = {
    name: getattr(math, name)
    for name in ["ceil", "floor", "trunc", "sqrt", "isqrt", "exp", "log", "log2", "log10", "cos", "sin", "gcd", "fmod"]
}
METHODS = (
    *("size", "numel", "dim", "is_floating_point", "is_complex", "get", "is_integer", "bit_length"),
    *("startswith", "endswith"),
)
OF_MODULES = ("parameters", "buffers", "modules", "children")
MOST_ITEMS = 2000
"""Items of a comprehension up to which it is read."""
OF_TEXTS = ("lower", "upper", "strip", "split", "isdigit")
KINDS: dict[str, object] = {name: each for name, each in vars(builtins).items() if isinstance(each, type)}
OF_TENSORS = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "is_sparse")
"""A tensor's attributes that no kernel computes."""


def item_of(of: object, key: object) -> object:
    if isinstance(of, dict) and isinstance(key, Tensor):  # an optimizer's states
        if key not in of:
            raise UnknownError
        return of[key]
    return operated(_ITEM, of, key)


_ITEM = ast.Subscript(ast.Name("", ast.Load()), ast.Name("", ast.Load()), ast.Load())


def operated(op: ast.AST, *values: object) -> object:
    if not isinstance(op, _IDENTITY) and not all(isinstance(each, PLAIN) for each in values):
        raise UnknownError
    if isinstance(op, ast.Subscript):
        return called(operator.getitem, values)
    if type(op) not in _OPERATIONS:
        raise UnknownError
    return called(_OPERATIONS[type(op)], values)


def is_plain_kind(kind: object) -> bool:
    """Return False for a class that decides on its instances itself, by code of a script or a package."""
    if isinstance(kind, tuple):
        return all(map(is_plain_kind, kind))
    return getattr(type(kind), "__instancecheck__", None) in _CHECKS


def called(function: Callable[..., object] | None, values: Sequence[object]) -> object:
    if function is None:
        raise UnknownError
    try:
        return function(*values)
    except FAILURES:  # whatever the script would raise there
        raise UnknownError from None
