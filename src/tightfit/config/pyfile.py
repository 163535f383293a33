"""Read nanoGPT's Python config files without executing them: a small evaluator over the syntax tree.

nanoGPT runs such a file with `exec`, so a file from elsewhere can do anything. Here it can only compute: no
attributes, no loops, no calls but those listed, and every result is bounded before or as soon as it exists.
Without loops the work is bounded by the file's size times the size of a value.
"""

import ast
import difflib
import operator
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tightfit.errors import ConfigError
from tightfit.syntax import ARITHMETIC, COMPARISONS, SIGNS, Operators
from tightfit.wording import say, term

MAX_FILE_BYTES = 64 * 1024  # nanoGPT's longest is 1.1 KB
MAX_WEIGHT = 10_000  # characters of text; an item of a list weighs 10, of a dict 20
MAX_BITS = 1024  # as far as floats reach
MAX_DIGITS = 400  # more than any float has before its point
NEAR = 0.85  # max_iter is max_iters, but eval_batch_size is not batch_size

Value: TypeAlias = "str | int | float | complex | list[Value] | tuple[Value, ...] | dict[Value, Value] | None"
"""A value that an expression may have."""
_UNARY: Operators = {**SIGNS, ast.Invert: operator.invert}
_BINARY: Operators = {
    **ARITHMETIC,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_CONVERSIONS: dict[int, Callable[[Value], str]] = {ord("s"): str, ord("r"): repr, ord("a"): ascii}


def _round(number: float, digits: int | None = None) -> float:
    if digits is not None and abs(digits) > MAX_DIGITS:  # round(1, -10**9) would compute 10**10**9
        raise ValueError(say("config.pyfile.too_many_digits", most=MAX_DIGITS))
    return round(number, digits)


_BUILTINS = (str, int, float, bool, len, min, max, abs)
_FUNCTIONS: dict[str, Callable[..., Value]] = {each.__name__: each for each in _BUILTINS} | {"round": _round}


@dataclass(frozen=True)
class Assigned:
    """The last value of a name, and the line that gave it."""

    value: Value
    line: int


@dataclass(frozen=True)
class PyFile:
    """The keys that a file sets, and warnings about its other names."""

    values: dict[str, Assigned]
    warnings: tuple[str, ...]


def read_pyfile(path: str, known: Mapping[str, Value]) -> PyFile:
    """Read the keys of `known` that the file assigns; its expressions may use a key before it is set.

    Where there is no `configs/NAME.py`, the one that comes with tightfit is read, and a warning names it.
    """
    notes = []
    source = _read_text(own := _own_file(path) or path)
    if own != path:
        notes.append(say("config.pyfile.own", path=path, own=own))
    tree = _parse(path, source)
    evaluator = _Evaluator(path, source, known)
    try:
        evaluator.run(tree.body)
    except RecursionError:
        raise ConfigError(say("config.pyfile.too_deep", path=path)) from None
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    values = {}
    for name, assigned in evaluator.assigned.items():
        if name in known:
            values[name] = assigned
        elif name not in used and not name.startswith("_"):
            notes.append(_unknown(f"{path}:{assigned.line}", name, list(known)))
    return PyFile(values, tuple(notes))


def _unknown(where: str, name: str, keys: list[str]) -> str:
    """The warning about a name that nothing reads; ConfigError if it is surely a key misspelt."""
    if near := difflib.get_close_matches(name, keys, n=1, cutoff=NEAR):
        raise ConfigError(say("config.pyfile.misspelt", where=where, name=name, near=near[0]))
    near = difflib.get_close_matches(name, keys, n=1)
    hint = say("config.pyfile.nearest_key", near=near[0]) if near else ""
    return say("config.pyfile.ignored", where=where, name=name, hint=hint)


def _own_file(path: str) -> str | None:
    """Return the file to read in place of a missing `configs/NAME.py`; None where tightfit has none of that name."""
    wanted = Path(path)
    if wanted.parts != ("configs", wanted.name) or wanted.suffix != ".py" or wanted.exists():
        return None
    return next((str(file) for file in own_configs() if file.name == wanted.name), None)


def own_configs() -> list[Path]:
    """List the configurations that come with tightfit: in the installed package, else in the checkout."""
    package = Path(__file__).parents[1]
    return next(filter(None, (sorted((root / "configs").glob("*.py")) for root in (package, package.parents[1]))), [])


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(say("config.pyfile.too_long", path=path, most=MAX_FILE_BYTES))
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(say("config.pyfile.not_utf8", path=path, byte=error.start)) from None
    except IsADirectoryError:
        files = sorted(Path(path).glob("*.py"))
        hint = say("config.pyfile.like", file=files[0]) if files else ""
        raise ConfigError(say("config.pyfile.folder", path=path, hint=hint)) from None
    except FileNotFoundError:
        raise ConfigError(say("config.pyfile.no_file", path=path, hint=_nearest_file(Path(path)))) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(say("config.pyfile.unreadable", path=path, reason=reason)) from None


def _nearest_file(path: Path) -> str:
    found = {file.name: Path("configs", file.name) for file in own_configs()}
    found |= {file.name: file for folder in (Path("configs"), path.parent) for file in folder.glob("*.py")}
    near = difflib.get_close_matches(path.name, sorted(found), n=1)
    return say("config.pyfile.did_you_mean", near=found[near[0]]) if near else say("config.pyfile.give_file")


def _parse(path: str, source: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like
            return ast.parse(source)
    except SyntaxError as error:
        line = error.lineno or 1
        raise ConfigError(say("config.pyfile.not_python", path=path, line=line, reason=error.msg)) from None
    except (MemoryError, RecursionError):  # the parser's words for too many levels
        raise ConfigError(say("config.pyfile.too_deep", path=path)) from None
    except ValueError as error:
        raise ConfigError(say("config.pyfile.no_source", path=path, reason=error)) from None


def _affordable(action: ast.operator, left: Value, right: Value) -> bool:
    """Return False for a result too large to compute; `_fits` judges results that exist."""
    match action, left, right:
        case (ast.Mult(), str() | list() | tuple(), int()):
            return len(left) * right <= MAX_WEIGHT
        case (ast.Mult(), int(), str() | list() | tuple()):
            return left * len(right) <= MAX_WEIGHT
        case (ast.Pow(), int(), int()):
            return (left.bit_length() - 1) * right <= MAX_BITS
        case (ast.LShift(), int(), int()):
            return left.bit_length() + right <= MAX_BITS
        case (ast.Mod(), str(), _):
            return _is_narrow(left)
    return True


def _is_narrow(template: str) -> bool:
    """Return False if a width or precision in a % template has more than three digits, a `*` or a mapping key."""
    return not any(re.search(r"\d{4}|[*(]", spec) for spec in re.findall(r"%([^%a-zA-Z]*)", template))


def _fits(value: Value) -> bool:
    budget, queue = MAX_WEIGHT, [value]
    while queue and budget >= 0:
        item = queue.pop()
        if isinstance(item, str):
            budget -= len(item)
        elif isinstance(item, int) and item.bit_length() > MAX_BITS:
            return False
        elif isinstance(item, list | tuple):
            budget -= 10 * len(item)
            queue += item
        elif isinstance(item, dict):
            budget -= 20 * len(item)
            queue += [*item.keys(), *item.values()]
    return budget >= 0


class _Evaluator:
    """Statements and expressions of one file; it refuses every other kind by name."""

    def __init__(self, path: str, source: str, known: Mapping[str, Value]) -> None:
        self.path, self.source, self.known = path, source, known
        self.assigned: dict[str, Assigned] = {}

    def error(self, node: ast.stmt | ast.expr, problem: str) -> ConfigError:
        code = (ast.get_source_segment(self.source, node) or type(node).__name__).splitlines()[0]
        code = code if len(code) <= 60 else code[:57] + "..."
        return ConfigError(f"{self.path}:{node.lineno}: `{code}` {problem}")

    def refusal(self, node: ast.stmt | ast.expr) -> ConfigError:
        name = type(node).__name__
        what = term("config.syntax", name.removeprefix("Async"))
        hint = term("config.syntax_hint", name, functions=", ".join(_FUNCTIONS))
        return self.error(node, say("config.pyfile.only_values", what=what, hint=hint))

    def run(self, body: list[ast.stmt]) -> None:
        for node in body:
            match node:
                case ast.Assign(targets=targets, value=expression):
                    value = self.value(expression)
                    for target in targets:
                        self.assign(target, value)
                case ast.AnnAssign(target=ast.Name() as name, value=ast.expr() as expression):
                    self.assign(name, self.value(expression))
                case ast.AugAssign(target=ast.Name() as name, op=action, value=expression):
                    self.assign(name, self.binary(node, action, self.name(name), self.value(expression)))
                case ast.If(test=test, body=then, orelse=otherwise):
                    self.run(then if self.value(test) else otherwise)
                case ast.Expr(value=ast.Constant(value=str())) | ast.Pass():
                    pass
                case ast.Import(names=[ast.alias(name="time", asname=None)]):
                    pass
                case ast.Expr(value=expression):
                    raise self.refusal(expression)
                case _:
                    raise self.refusal(node)

    def assign(self, target: ast.expr, value: Value) -> None:
        match target:
            case ast.Name(id=name, lineno=line):
                self.assigned[name] = Assigned(value, line)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) if all(isinstance(it, ast.Name) for it in parts):
                if not isinstance(value, list | tuple) or len(value) != len(parts):
                    raise self.error(target, say("config.pyfile.needs_values", count=len(parts)))
                for part, item in zip(parts, value, strict=True):
                    self.assign(part, item)
            case _:
                raise self.error(target, say("config.pyfile.not_a_name"))

    def value(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as constant):
                return self.bounded(node, constant)
            case ast.Name():
                return self.name(node)
            case ast.Tuple(elts=items):
                return self.bounded(node, tuple([self.value(item) for item in items]))
            case ast.List(elts=items):
                return self.bounded(node, [self.value(item) for item in items])
            case ast.Dict(keys=keys, values=values) if None not in keys:
                names = [self.value(key) for key in keys if key]
                return self.computed(node, dict, zip(names, map(self.value, values), strict=True))
            case ast.UnaryOp(op=action, operand=operand):
                return self.computed(node, _UNARY[type(action)], self.value(operand))
            case ast.BinOp(left=left, op=operation, right=right):
                return self.binary(node, operation, self.value(left), self.value(right))
            case ast.BoolOp():
                return self.either(node)
            case ast.Compare():
                return self.compare(node)
            case ast.IfExp(test=test, body=then, orelse=otherwise):
                return self.value(then if self.value(test) else otherwise)
            case ast.JoinedStr(values=parts):
                return self.joined(parts)
            case ast.Call(keywords=[]):
                return self.call(node)
        raise self.refusal(node)

    def computed(self, node: ast.stmt | ast.expr, function: Callable[..., Value], *arguments: object) -> Value:
        try:
            result = function(*arguments)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise self.error(node, say("config.pyfile.not_computed", reason=str(error.args[-1]))) from None
        return self.bounded(node, result)

    def bounded(self, node: ast.stmt | ast.expr, result: Value) -> Value:
        if isinstance(result, complex):
            raise self.error(node, say("config.pyfile.complex"))
        if not _fits(result):
            raise self.error(node, say("config.pyfile.too_large"))
        return result

    def name(self, node: ast.Name) -> Value:
        if node.id in self.assigned:
            return self.assigned[node.id].value
        if node.id in self.known:
            return self.known[node.id]
        near = difflib.get_close_matches(node.id, [*self.assigned, *self.known], n=1)
        hint = say("config.pyfile.did_you_mean", near=near[0]) if near else say("config.pyfile.assign_above")
        raise self.error(node, say("config.pyfile.unknown_name", hint=hint))

    def binary(self, node: ast.stmt | ast.expr, action: ast.operator, left: Value, right: Value) -> Value:
        bitwise = isinstance(action, ast.BitAnd | ast.BitOr | ast.BitXor)
        if type(action) not in _BINARY or (bitwise and not isinstance(left, int)):  # no set or dict unions
            raise self.error(node, say("config.pyfile.no_such_operator"))
        if not _affordable(action, left, right):
            raise self.error(node, say("config.pyfile.would_be_too_large"))
        return self.computed(node, _BINARY[type(action)], left, right)

    def either(self, node: ast.BoolOp) -> Value:
        """The value of `and` or `or`: that of the operand that decides."""
        for operand in node.values:
            value = self.value(operand)
            if bool(value) is isinstance(node.op, ast.Or):
                break
        return value

    def compare(self, node: ast.Compare) -> bool:
        left = self.value(node.left)
        for action, operand in zip(node.ops, node.comparators, strict=True):
            right = self.value(operand)
            if not self.computed(node, COMPARISONS[type(action)], left, right):
                return False
            left = right
        return True

    def joined(self, parts: list[ast.expr]) -> str:
        text = ""
        for part in parts:
            text += self.formatted(part) if isinstance(part, ast.FormattedValue) else str(self.value(part))
            self.bounded(part, text)
        return text

    def formatted(self, node: ast.FormattedValue) -> str:
        value = self.value(node.value)
        spec = str(self.value(node.format_spec)) if node.format_spec else ""
        if re.search(r"\d{4}", spec):
            raise self.error(node.value, say("config.pyfile.too_wide"))
        if node.conversion in _CONVERSIONS:
            value = self.computed(node.value, _CONVERSIONS[node.conversion], value)
        return str(self.computed(node.value, format, value, spec))

    def call(self, node: ast.Call) -> Value:
        match node:
            case ast.Call(func=ast.Name(id=name), args=arguments) if name in _FUNCTIONS:
                return self.computed(node, _FUNCTIONS[name], *[self.value(it) for it in arguments])
            case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="time"), args=[]):
                return time.time()
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="time"), attr="strftime"),
                args=[ast.Constant(value=str() as template)],
            ) if _is_narrow(template):
                return self.computed(node, time.strftime, template)
        raise self.refusal(node)
