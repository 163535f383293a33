"""Values of a running function's expressions, read without calling anything of the script's."""

import ast
import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from types import FunctionType, ModuleType
from typing import cast

import torch
from torch import Tensor

from tightfit.vgpu.frames import is_own
from tightfit.vgpu.loop_items import FAILURES
from tightfit.vgpu.loop_source import function_node, may_change
from tightfit.vgpu.operations import (
    FUNCTIONS,
    KINDS,
    METHODS,
    MOST_ITEMS,
    NUMBERS,
    OF_KINDS,
    OF_MATH,
    OF_MODULES,
    OF_TENSORS,
    OF_TEXTS,
    UnknownError,
    called,
    is_plain_kind,
    item_of,
    operated,
)
from tightfit.vgpu.plain_branches import ENDS
from tightfit.vgpu.pure_functions import is_pure
from tightfit.vgpu.read_calls import body_of, bound, is_question, returned

INNER = "tightfit.inner"
"""Begins the names, which no script can have, of counters of loops within a loop that is followed."""

_DEPTH = 4
"""Functions, each called by the one before, up to which they are read."""

Unsure = frozenset[str]


class Reader:
    """Evaluates expressions of a running function without calling anything of the script's."""

    def __init__(
        self, names: Mapping[str, object], others: Mapping[str, object], unsure: Unsure, depth: int = 0
    ) -> None:
        """`depth`: functions around the one that is read."""
        self._names, self._others, self._unsure, self._depth = names, others, unsure, depth
        self.read: dict[str, object] = {}
        """Values that were looked at, by their expressions."""

    def _name(self, name: str) -> object:
        if name.startswith(INNER):
            return 0
        value = self._names.get(name, self._others.get(name, UnknownError))
        if value is UnknownError and name in KINDS:
            return KINDS[name]
        if name in self._unsure or value is UnknownError:
            raise UnknownError
        self.read[name] = value
        return value

    def _attribute(self, node: ast.Attribute, holder: object) -> object:
        text = ast.unparse(node)
        if text in self._unsure or (isinstance(holder, Tensor) and node.attr not in OF_TENSORS):
            raise UnknownError
        value = _of_property(holder, node.attr)
        if value is None:
            try:
                value = getattr(holder, node.attr)
            except FAILURES:  # a library's property may raise anything
                raise UnknownError from None
        if self._depth and _may_count(value) and not isinstance(holder, (ModuleType, Tensor)):
            raise UnknownError  # nobody follows what a function's objects count
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

    def peek(self, node: ast.expr) -> object:
        """Return the value of an expression; None where only the script could give it."""
        try:
            return self.value(node)
        except UnknownError:
            return None

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
                return operated(op, self.value(operand))
            case ast.BinOp(left=left, op=op, right=right):
                return operated(op, self.value(left), self.value(right))
            case ast.Compare():
                return self._comparison(node)
            case ast.IfExp(test=test, body=one, orelse=two):
                return self.value(one if self.value(test) else two)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                values = [self.value(each) for each in parts]
                return tuple(values) if isinstance(node, ast.Tuple) else values
            case ast.Subscript(value=of, slice=key) if (text := ast.unparse(node)) not in self._unsure:
                item = item_of(self.value(of), self.value(key))
                if isinstance(key, ast.Constant):
                    self.read[text] = item
                return item
            case ast.Slice():
                ends = (node.lower, node.upper, node.step)
                return slice(*(None if each is None else self.value(each) for each in ends))
            case ast.GeneratorExp(generators=[part]) | ast.ListComp(generators=[part]):
                return self._listed(node.elt, part)
            case ast.Call():
                return self._call(node)
        raise UnknownError

    def _listed(self, entry: ast.expr, part: ast.comprehension) -> list[object]:
        """Return the entries of a comprehension that reads nothing of the function but its own items."""
        names = {each.id for each in ast.walk(part.target) if isinstance(each, ast.Name)}
        read = {each.id for one in (entry, *part.ifs) for each in ast.walk(one) if isinstance(each, ast.Name)}
        if not isinstance(part.target, ast.Name) or not self._is_global(read - names):
            raise UnknownError  # Python would not find it: conditions run in a scope of their own
        found: list[object] = []
        for item in self._gone_through(part.iter):
            inner = Reader({part.target.id: item}, self._others, self._unsure, self._depth + 1)
            if all(inner.value(each) for each in part.ifs):
                found.append(inner.value(entry))
        return found

    def _is_global(self, names: Set[str]) -> bool:
        return all(name in self._others or name not in self._names for name in names)

    def _gone_through(self, items: ast.expr) -> Sequence[object]:
        match items:
            case ast.Call(func=ast.Attribute(attr=name, value=of), args=[], keywords=[]) if name in OF_MODULES:
                model = self.value(of)
                found: object = list(getattr(model, name)()) if isinstance(model, torch.nn.Module) else None
            case _:
                found = self.value(items)
        if isinstance(found, (dict, set, frozenset)):
            found = list(found)
        if not isinstance(found, (list, tuple, range)) or len(found) > MOST_ITEMS:
            raise UnknownError
        return found

    def _call(self, node: ast.Call) -> object:
        match node:
            case ast.Call(func=ast.Name(id=name), args=[of]) if name == ENDS and ENDS in self._names:
                return cast("Callable[[object], bool]", self._names[ENDS])(self.value(of))
            case ast.Call(func=ast.Name(id="len"), args=[of], keywords=[]):
                return self._length(node, self.value(of))
            case ast.Call(func=ast.Name(id="getattr"), args=[of, ast.Constant(value=str(name)), *default]):
                owner = self.value(of)
                if default and not hasattr(owner, name):
                    return self.value(default[0])
                return self._attribute(ast.Attribute(of, name, ast.Load()), owner)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                return called(FUNCTIONS[name], [self._host(each) for each in arguments])
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in OF_KINDS:
                values = [self.value(each) for each in arguments]
                if len(values) == 2 and name in ("isinstance", "issubclass") and not is_plain_kind(values[1]):
                    raise UnknownError
                return called(OF_KINDS[name], values)
            case ast.Call(func=ast.Attribute(attr=name, value=of), args=arguments, keywords=[]) if name in OF_MATH:
                if self.value(of) is not math:
                    raise UnknownError
                return called(OF_MATH[name], [self.value(each) for each in arguments])
            case ast.Call(func=ast.Attribute(attr=name, value=of), args=arguments, keywords=[]) if name in METHODS or (
                name in OF_TEXTS and isinstance(self.value(of), str)
            ):
                return called(getattr(self.value(of), name, None), [self.value(each) for each in arguments])
            case ast.Call(func=ast.Name() | ast.Attribute() as func):
                return self._of_function(node, func)
        raise UnknownError

    def _host(self, node: ast.expr) -> object:
        """Return the value of an expression that is no tensor: an operator would run."""
        value = self.value(node)
        if isinstance(value, Tensor):
            raise UnknownError
        return value

    def _of_function(self, call: ast.Call, func: ast.Name | ast.Attribute) -> object:
        """Return the value of a function that only tells, chooses or computes. UnknownError if it does more."""
        if (text := ast.unparse(call)) in self._unsure:
            raise UnknownError
        arguments = [self.value(each) for each in call.args]
        options = {each.arg: self.value(each.value) for each in call.keywords if each.arg is not None}
        if len(options) < len(call.keywords):
            raise UnknownError
        function, owner = self._function(func)
        if is_question(function):
            found = called(partial(cast("Callable[..., object]", function), **options), arguments)
        elif isinstance(function, FunctionType):
            arguments = [*owner, *arguments]
            if is_pure(function, arguments, options):
                return called(partial(function, **options), arguments)
            found = self._read(function, arguments, options)
        else:
            raise UnknownError
        if isinstance(found, NUMBERS):
            self.read[text] = found
        return found

    def _function(self, func: ast.Name | ast.Attribute) -> tuple[object, list[object]]:
        """Return the function that is called, and for a method its object."""
        if isinstance(func, ast.Name):
            found = self._names.get(func.id, self._others.get(func.id))
        else:
            owner = self.value(func.value)
            if not isinstance(owner, ModuleType):
                return inspect.getattr_static(type(owner), func.attr, None), [owner]
            found = inspect.getattr_static(owner, func.attr, None)
        of_kind = inspect.getattr_static(type(found), "__call__", None)
        return (of_kind, [found]) if isinstance(of_kind, FunctionType) else (found, [])

    def _read(self, function: FunctionType, arguments: list[object], options: dict[str, object]) -> object:
        """Return a short function's result, by its source. UnknownError if it may do more, or may count."""
        if self._depth >= _DEPTH:
            raise UnknownError
        body, names = body_of(function), bound(function, arguments, options)
        others = function.__globals__

        def evaluate(value: ast.expr, variables: Mapping[str, object]) -> object:
            return Reader(variables, others, self._unsure, self._depth + 1).value(value)

        return returned(body, names, evaluate)

    def _length(self, node: ast.expr, of: object) -> object:
        text = ast.unparse(node)
        if text in self._unsure:
            raise UnknownError
        found = self.read[text] = called(len, [of])
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
            if not operated(op, one, other):
                return False
            one = other
        return True


def _may_count(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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


def _left_out(node: ast.AST) -> list[ast.expr]:
    """List the parts of an expression that Python evaluates only for some values of the others."""
    match node:
        case ast.BoolOp(values=parts) | ast.Compare(comparators=[_, *parts]):
            return parts
        case ast.IfExp(test=test, body=one, orelse=two):
            return [] if _asks_kind(test) else [one, two]
    return []


def _asks_kind(test: ast.expr) -> bool:
    """Return True for `hasattr(...)`, `isinstance(...)` and the like: only one of the parts has a value at all."""
    return isinstance(test, ast.Call) and getattr(test.func, "id", "") in OF_KINDS


def is_computed(call: ast.Call) -> bool:
    """Return True if a call gives a number of its arguments, as `min(...)` does."""
    return isinstance(call.func, ast.Name) and call.func.id in FUNCTIONS


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
    return Reader(names, others, frozenset()).peek(node)
