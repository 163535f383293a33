"""Values of a running function's expressions, read without calling anything of the script's."""

import ast
import builtins
import contextlib
import inspect
import math
import operator
from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from types import FunctionType, UnionType
from typing import cast

from torch import Tensor

from tightfit.syntax import ARITHMETIC, COMPARISONS, SIGNS
from tightfit.vgpu.frames import is_own
from tightfit.vgpu.loop_items import FAILURES
from tightfit.vgpu.loop_source import function_node, may_change
from tightfit.vgpu.plain_branches import ENDS
from tightfit.vgpu.pure_functions import is_pure

PLAIN = (int, float, str, bool, type(None), tuple, list, set, frozenset, dict, range)


NUMBERS = (int, float, str, type(None))
"""Kinds of values that count, or that conditions compare."""


INNER = "tightfit.inner"
"""Begins the names, which no script can have, of counters of loops within a loop that is followed."""


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
_FUNCTIONS: dict[str, Callable[..., object]] = {
    each.__name__: each for each in (len, int, float, bool, min, max, abs, round, divmod, sum)
}
_CHECKS = (type.__instancecheck__, ABCMeta.__instancecheck__, UnionType.__instancecheck__)
_OF_MATH: dict[str, Callable[..., object]] = {
    name: getattr(math, name)
    for name in ["ceil", "floor", "trunc", "sqrt", "isqrt", "exp", "log", "log2", "log10", "cos", "sin", "gcd", "fmod"]
}
_METHODS = ("size", "numel", "dim", "get", "is_integer", "bit_length", "startswith", "endswith")

Unsure = frozenset[str]


class Reader:
    """Evaluates expressions of a running function without calling anything of the script's."""

    def __init__(self, names: Mapping[str, object], others: Mapping[str, object], unsure: Unsure) -> None:
        self._names, self._others, self._unsure = names, others, unsure
        self.read: dict[str, object] = {}
        """Values that were looked at, by their expressions."""

    def _name(self, name: str) -> object:
        if name.startswith(INNER):
            return 0
        value = self._names.get(name, self._others.get(name, UnknownError))
        if name in self._unsure or value is UnknownError:
            raise UnknownError
        self.read[name] = value
        return value

    def _attribute(self, node: ast.Attribute, holder: object) -> object:
        text = ast.unparse(node)
        if text in self._unsure or isinstance(holder, Tensor):
            raise UnknownError
        value = _of_property(holder, node.attr)
        if value is None:
            try:
                value = getattr(holder, node.attr)
            except FAILURES:  # a library's property may raise anything
                raise UnknownError from None
        self.read[text] = value
        return value

    def knows(self, node: ast.expr) -> bool:
        """Return True if an expression has a value without the script, whichever of its parts Python evaluates."""
        try:
            for each in (node, *(part for inner in ast.walk(node) for part in _left_out(inner))):
                self.value(each)
        except UnknownError:
            return False
        return True

    def knows_items(self, items: ast.expr) -> bool:
        """Return True if all arguments of `range(...)` have such values."""
        return isinstance(items, ast.Call) and not items.keywords and all(map(self.knows, items.args))

    @contextlib.contextmanager
    def without(self, names: frozenset[str]) -> Iterator[None]:
        """Take some names as unknown within."""
        before, self._unsure = self._unsure, self._unsure | names
        try:
            yield
        finally:
            self._unsure = before

    def has(self, node: ast.expr) -> bool:
        """Return True if there is such a name or attribute, whatever its value."""
        return Reader(self._names, self._others, frozenset()).knows(node)

    def value(self, node: ast.expr) -> object:
        """Return the value of an expression. UnknownError if only the script could give it."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._name(name)
            case ast.Attribute():
                return self._attribute(node, self.value(node.value))
            case ast.BoolOp():
                return self._any_or_all(node)
            case ast.UnaryOp(op=op, operand=operand):
                return _of(op, self.value(operand))
            case ast.BinOp(left=left, op=op, right=right):
                return _of(op, self.value(left), self.value(right))
            case ast.Compare():
                return self._comparison(node)
            case ast.IfExp(test=test, body=one, orelse=two):
                return self.value(one if self.value(test) else two)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                return [self.value(each) for each in parts]
            case ast.Subscript(value=of, slice=key) if (text := ast.unparse(node)) not in self._unsure:
                item = _item(self.value(of), self.value(key))
                if isinstance(key, ast.Constant):
                    self.read[text] = item
                return item
            case ast.Call(func=ast.Name(id=name), args=[of]) if name == ENDS and ENDS in self._names:
                return cast("Callable[[object], bool]", self._names[ENDS])(self.value(of))
            case ast.Call(func=ast.Name(id="len"), args=[of], keywords=[]):
                return self._length(node, self.value(of))
            case ast.Call(func=ast.Name(id="isinstance"), args=[of, kinds], keywords=[]):
                return _called(isinstance, [self.value(of), self._kinds(kinds)])
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                return _called(_FUNCTIONS[name], [self.value(each) for each in arguments])
            case ast.Call(func=ast.Attribute(attr=name, value=of), args=arguments, keywords=[]) if name in _OF_MATH:
                if self.value(of) is not math:
                    raise UnknownError
                return _called(_OF_MATH[name], [self.value(each) for each in arguments])
            case ast.Call(func=ast.Attribute(attr=name, value=of), args=arguments, keywords=[]) if name in _METHODS:
                return _called(getattr(self.value(of), name, None), [self.value(each) for each in arguments])
            case ast.Call(func=ast.Name() | ast.Attribute() as func):
                return self._of_pure_function(node, func)
        raise UnknownError

    def _of_pure_function(self, call: ast.Call, func: ast.Name | ast.Attribute) -> object:
        """Return the value of a function of the script that only computes. UnknownError if it does more."""
        arguments = [self.value(each) for each in call.args]
        options = {each.arg: self.value(each.value) for each in call.keywords if each.arg is not None}
        if isinstance(func, ast.Attribute):
            owner = self.value(func.value)
            found = inspect.getattr_static(type(owner), func.attr, None)
            arguments.insert(0, owner)
        else:
            found = self._names.get(func.id, self._others.get(func.id))
        if not isinstance(found, FunctionType) or len(options) < len(call.keywords):
            raise UnknownError
        if not is_pure(found, arguments, options):
            raise UnknownError
        return _called(partial(found, **options), arguments)

    def _kinds(self, node: ast.expr) -> object:
        """Return the classes of an `isinstance`. UnknownError if one of them decides on its instances itself."""
        if isinstance(node, ast.Tuple):
            return tuple(map(self._kinds, node.elts))
        is_builtin = isinstance(node, ast.Name) and node.id not in {**self._others, **self._names}
        found = vars(builtins).get(ast.unparse(node)) if is_builtin else self.value(node)
        if getattr(type(found), "__instancecheck__", None) not in _CHECKS:
            raise UnknownError
        return found

    def _length(self, node: ast.expr, of: object) -> object:
        text = ast.unparse(node)
        if text in self._unsure:
            raise UnknownError
        found = self.read[text] = _called(len, [of])
        return found

    def _any_or_all(self, node: ast.BoolOp) -> object:
        """Return the part that decides an `and` or `or`, although its other parts may be unknown."""
        decides = isinstance(node.op, ast.Or)
        unknown = False
        value: object = not decides
        for each in node.values:
            try:
                value = self.value(each)
            except UnknownError:
                unknown = True
                continue
            if bool(value) is decides:
                return value
        if unknown:
            raise UnknownError
        return value

    def _comparison(self, node: ast.Compare) -> bool:
        one = self.value(node.left)
        for op, right in zip(node.ops, node.comparators, strict=True):
            other = self.value(right)
            if not _of(op, one, other):
                return False
            one = other
        return True


def _of_property(holder: object, name: str) -> object:
    """Return a property of the script's that only returns an expression; None for anything else that has this name.

    UnknownError if it does more: it is not called.
    """
    found = inspect.getattr_static(type(holder), name, None)
    getter = found.fget if isinstance(found, property) else None
    if not isinstance(getter, FunctionType) or not is_own(getter.__code__):
        return None
    code = getter.__code__
    node = function_node(code.co_filename, code.co_firstlineno, code.co_name)
    match node.body[-1:] if node is not None and len(node.body) <= 1 + (ast.get_docstring(node) is not None) else []:
        case [ast.Return(value=ast.expr() as value)]:
            return Reader({code.co_varnames[0]: holder}, getter.__globals__, frozenset()).value(value)
    raise UnknownError


def _item(of: object, key: object) -> object:
    if isinstance(of, dict) and isinstance(key, Tensor):  # an optimizer's states
        if key not in of:
            raise UnknownError
        return of[key]
    return _of(_ITEM, of, key)


def _left_out(node: ast.AST) -> list[ast.expr]:
    """List the parts of an expression that Python evaluates only for some values of the others."""
    match node:
        case ast.BoolOp(values=parts) | ast.Compare(comparators=[_, *parts]):
            return parts
        case ast.IfExp(body=one, orelse=two):
            return [one, two]
    return []


_ITEM = ast.Subscript(ast.Name("", ast.Load()), ast.Name("", ast.Load()), ast.Load())


def _of(op: ast.AST, *values: object) -> object:
    if not isinstance(op, _IDENTITY) and not all(isinstance(each, PLAIN) for each in values):
        raise UnknownError
    if isinstance(op, ast.Subscript):
        return _called(operator.getitem, values)
    if type(op) not in _OPERATIONS:
        raise UnknownError
    return _called(_OPERATIONS[type(op)], values)


def _called(function: Callable[..., object] | None, values: Sequence[object]) -> object:
    if function is None:
        raise UnknownError
    try:
        return function(*values)
    except FAILURES:  # whatever the script would raise there
        raise UnknownError from None


def is_computed(call: ast.Call) -> bool:
    """Return True if a call gives a number of its arguments, as `min(...)` does."""
    return isinstance(call.func, ast.Name) and call.func.id in _FUNCTIONS


def always(test: ast.expr, names: Mapping[str, object], others: Mapping[str, object], changing: Set[str]) -> bool:
    """Return True if a condition holds, and depends on no name or attribute that may change."""
    if isinstance(test, ast.BoolOp):
        each = (always(part, names, others, changing) for part in test.values)
        return any(each) if isinstance(test.op, ast.Or) else all(each)
    return not may_change(test, changing) and bool(value_in(test, names, others))


def known_part(test: ast.expr, knows: Callable[[ast.expr], bool]) -> ast.expr | None:
    """Return a condition without the unknown parts of its `and` and `or`; None if no part is known."""
    if not isinstance(test, ast.BoolOp):
        return test if knows(test) else None
    parts = [part for each in test.values if (part := known_part(each, knows)) is not None]
    if parts == test.values:
        return test
    return ast.BoolOp(test.op, parts) if len(parts) > 1 else (parts[0] if parts else None)


_CHANCE = ("next", ENDS, "random", "rand", "randint", "randrange", "uniform", "choice", "bernoulli")


def is_chance(node: ast.AST) -> bool:
    """Return True for a call of an iterator or a random number generator."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", "")) in _CHANCE


def value_in(node: ast.expr, names: Mapping[str, object], others: Mapping[str, object]) -> object:
    """Return an expression's value in a running function; None where only the script could give it."""
    try:
        return Reader(names, others, frozenset()).value(node)
    except UnknownError:
        return None
