"""Conditions on a tensor's values or on the time: in a play they always come out as before."""

import ast
from collections.abc import Callable

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.vgpu.expressions import is_chance

Look = Callable[[ast.expr], object]
"""Reads the value of an expression; None where only the script could give it."""

_OF_NUMBERS = ("float", "int", "bool", "abs", "len", "round", "min", "max")
_CLOCKS = ("time", "perf_counter", "monotonic", "process_time", "now")


def stays(test: ast.expr, look: Look) -> bool:
    """Return True if made-up values of tensors, or a clock, decide a condition together with known ones."""
    has_chance = any(map(is_chance, ast.walk(test)))
    return not has_chance and look(test) is None and _is_decided(test, look)


def _is_decided(node: ast.expr, look: Look) -> bool:
    if isinstance(node, ast.Constant):
        return True
    if (value := look(node)) is not None:
        return not isinstance(value, Tensor) or isinstance(value, FakeTensor)
    match node:
        case ast.BoolOp(values=parts):
            return all(_is_decided(each, look) for each in parts)
        case ast.UnaryOp(operand=one):
            return _is_decided(one, look)
        case ast.BinOp(left=one, right=two):
            return _is_decided(one, look) and _is_decided(two, look)
        case ast.Compare(left=one, comparators=others):
            return all(_is_decided(each, look) for each in (one, *others))
        case ast.Subscript(value=of) | ast.Attribute(value=of):
            return _is_decided(of, look)
        case ast.Call(func=ast.Name(id=name), args=arguments) if name in _OF_NUMBERS:
            return all(_is_decided(each, look) for each in arguments)
        case ast.Call(func=ast.Attribute(attr=name), args=[]) if name in _CLOCKS:
            return True
        case ast.Call(func=ast.Attribute(value=of), args=arguments):
            is_tensors = isinstance(look(of), FakeTensor) or not isinstance(of, ast.Name | ast.Attribute)
            return (is_tensors or _is_torch(of)) and all(_is_decided(each, look) for each in (of, *arguments))
    return False


def _is_torch(of: ast.expr) -> bool:
    return isinstance(of, ast.Name) and of.id in ("torch", "np", "numpy", "math")
