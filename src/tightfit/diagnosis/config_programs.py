"""The program and the run that a configuration describes, by the table config_programs.toml."""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import msgspec

from tightfit.diagnosis.config_values import Value
from tightfit.tables import read_table

_OFF = ("", "none", "null", "false", "no", "0", "off", "[]", "{}", "auto_find")
"""Values that turn a part off, in any language; in small letters."""
_NUMBER = re.compile(r"\d{1,12}")
_MOST = 10**12
ALWAYS = "always"
"""The part that each configuration has, in the tables `gone` and `lines`."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a program's commands that depends on the model: a folder and a size."""

    usual: str
    of: str
    most: int


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """One program of the table, whose head describes the fields."""

    signs: list[list[str]] = msgspec.field(default_factory=list)
    unless: list[list[str]] = msgspec.field(default_factory=list)
    numbers: dict[str, list[str]] = msgspec.field(default_factory=dict)
    texts: dict[str, list[str]] = msgspec.field(default_factory=dict)
    parts: dict[str, list[str]] = msgspec.field(default_factory=dict)
    refuses: list[list[str]] = msgspec.field(default_factory=list)
    needs: dict[str, dict[str, bool | int | float | str]] = msgspec.field(default_factory=dict)
    gone: dict[str, list[str]] = msgspec.field(default_factory=dict)
    lines: dict[str, dict[str, list[str]]] = msgspec.field(default_factory=dict)
    trains_all: bool = False
    recipe: Recipe | None = None


_NO_TRAINING = "no_training"


@functools.cache
def _tables() -> dict[str, Program]:
    table = read_table("tightfit.diagnosis", "config_programs.toml", dict[str, dict[str, object]])
    return {name: msgspec.convert(entry, Program) for name, entry in table.items() if name != _NO_TRAINING}


@functools.cache
def _files() -> dict[str, list[list[str]]]:
    table = read_table("tightfit.diagnosis", "config_programs.toml", dict[str, dict[str, object]])
    return msgspec.convert(table[_NO_TRAINING], dict[str, list[list[str]]])


def program_of(values: Mapping[str, Value]) -> str | None:
    """Return the first program whose signs a configuration has.

    >>> program_of({"train.micro_batch_size": 4, "checkpoint_dir": "x"}), program_of({"micro_batch_size": 4})
    ('litgpt', None)
    """
    for name, entry in _tables().items():
        if _any_of(entry.signs, values) and not _any_of(entry.unless, values):
            return name
    return None


def file_of_no_training(values: Mapping[str, Value]) -> str | None:
    """Return the kind of a file that no training reads, a key of the words' table `files`."""
    return next((kind for kind, signs in _files().items() if _any_of(signs, values)), None)


def known(program: str) -> Program:
    """Return a program's entry of the table; an empty one if it has none."""
    return _tables().get(program, Program())


def _any_of(alternatives: Iterable[Iterable[str]], values: Mapping[str, Value]) -> bool:
    return any(all(_shows(each, values) for each in conditions) for conditions in alternatives)


def _shows(condition: str, values: Mapping[str, Value]) -> bool:
    """Return True if a sign is there: a key shows its program whatever its value."""
    is_bare = condition[0] not in "!~" and not set("=>") & set(condition)
    return holds(f"{condition}=*" if is_bare else condition, values)


_CONDITION = re.compile(r"(?P<mark>[!~]?)(?P<key>[^=>]+)(?:(?P<sign>[=>])(?P<value>.*))?")


def holds(condition: str, values: Mapping[str, Value]) -> bool:
    """Return True if a condition of the table holds.

    >>> [holds(each, {"a": "no", "b.c": 4}) for each in ("a", "!a", "~a", "b.*", "b.c=2|4", "*.c>4")]
    [False, True, False, True, True, False]
    """
    match = _CONDITION.fullmatch(condition)
    assert match is not None, condition
    key, sign, value = match["key"], match["sign"], match["value"]
    found = [each for path, each in values.items() if _is_at(path, key)]
    if match["mark"] == "~":
        return not found
    if match["mark"] == "!":
        return not any(map(_is_on, found))
    if sign == "=":
        words = value.lower().split("|")
        return any(fnmatchcase(str(each).lower(), word) for each in found for word in words)
    if sign == ">":
        return any((number := _number(each)) is not None and number > int(value) for each in found)
    return any(map(_is_on, found))


_ANY_PART = re.compile(r"\*[A-Za-z_][\w-]*")


def _is_at(path: str, key: str) -> bool:
    """Return True if a path is one of a condition's; * before a name stands for the parts above it."""
    if path == key or not set("*?[") & set(key):
        return path == key
    if _ANY_PART.fullmatch(key):
        return path.rpartition(".")[2] == key[1:]
    return fnmatchcase(path, key)


def _is_on(value: Value) -> bool:
    return str(value).lower() not in _OFF


def _number(value: Value) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value)
    return int(text) if _NUMBER.fullmatch(text) and 0 < int(text) < _MOST else None


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A run, as far as a configuration describes it."""

    numbers: Mapping[str, int]
    names: Mapping[str, str]
    """Paths of the numbers."""
    texts: Mapping[str, str]
    parts: frozenset[str] = frozenset()
    total: int | None = None
    """Sequences of a step over all cards, which the accumulation follows from."""

    def over(self, other: "Found") -> "Found":
        """Return what this configuration has, and what another one has besides."""
        return Found(
            numbers={**other.numbers, **self.numbers},
            names={**other.names, **self.names},
            texts={**other.texts, **self.texts},
            parts=self.parts | other.parts,
            total=self.total or other.total,
        )

    def with_accumulation(self, cards: int | None) -> "Found":
        """Return it with the accumulation that follows from the batch of a step over this many cards."""
        batch = self.numbers.get("batch_size")
        if (
            not (self.total and batch and cards)
            or "spread" in self.parts
            or "accumulation" in self.numbers
            or self.total % (batch * cards)
        ):
            return self
        numbers = {**self.numbers, "accumulation": self.total // (batch * cards)}
        return msgspec.structs.replace(self, numbers=numbers)


def found_in(program: str, values: Mapping[str, Value]) -> Found:
    """Return the numbers, texts and parts that a program's configuration has."""
    entry = known(program)
    given = {name: found for name, paths in entry.numbers.items() if (found := _first_number(paths, values))}
    numbers = {name: number for name, (number, _) in given.items()}
    names = {name: path for name, (_, path) in given.items()}
    total = numbers.pop("total", None)
    stage = _STAGE.search(str(values.get("deepspeed", "")))
    if stage is not None:  # in the name of a file of DeepSpeed's
        numbers.setdefault("zero_stage", int(stage[1]))
    texts = {name: text for name, paths in entry.texts.items() if (text := _first_text(paths, values))}
    parts = {name for name, conditions in entry.parts.items() if any(holds(each, values) for each in conditions)}
    return Found(numbers=numbers, names=names, texts=texts, parts=frozenset(parts), total=total)


_STAGE = re.compile(r"z(?:ero)?[-_]?(?:stage)?[-_]?([1-3])(?!\d)", re.IGNORECASE)


def _first_number(paths: Iterable[str], values: Mapping[str, Value]) -> tuple[int, str] | None:
    for path in paths:
        terms = [_value(each, values) for each in path.split("*")] if _PRODUCT.fullmatch(path) else []
        factors = [_number(each[1]) for each in terms if each is not None]
        if len(factors) > 1 and len(factors) == len(terms) and all(factors):
            return math.prod(each for each in factors if each), path
        path, _, least = path.partition(">")
        found = _value(path, values)
        if found is not None and (number := _number(found[1])) is not None and number > int(least or 0):
            return number, found[0]
    return None


_PRODUCT = re.compile(r"[\w.]+(?:\*[\w.]+)+")


def _value(path: str, values: Mapping[str, Value]) -> tuple[str, Value] | None:
    if path in values:
        return path, values[path]
    return next(((name, value) for name, value in values.items() if _is_at(name, path)), None)


def _first_text(paths: Iterable[str], values: Mapping[str, Value]) -> str | None:
    for path in paths:
        key, _, word = path.partition("?")
        found = [_value(each, values) for each in key.split("+")]
        kept = [str(each[1]) for each in found if each is not None and _is_on(each[1])]
        if len(kept) == len(found):
            return word or "-".join(kept)
    return None
