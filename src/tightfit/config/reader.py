"""Read a command line in nanoGPT's habit: config files and `--key=value` in order, the later one winning."""

import ast
import difflib
import os
import warnings
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Generic

from tightfit.config.pyfile import Value, read_pyfile
from tightfit.config.schema import C, SampleConfig, Schema, Setting, TrainConfig, checked, defaults
from tightfit.errors import ConfigError
from tightfit.wording import say

COMMAND_LINE = "command line"
_WORDS = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}


@dataclass(frozen=True)
class Resolved(Generic[C]):
    """A configuration and the source of each of its values."""

    config: C
    sources: dict[str, str]
    """For each key: "default", "configs/x.py:12" or "command line"."""
    warnings: tuple[str, ...]
    """Sentences about names in config files that are not keys."""


def read_config(
    schema: type[C], arguments: Sequence[str], *, warn: Callable[[str], object] | None = None
) -> Resolved[C]:
    """Read the configuration from `arguments`; call `warn` with each warning.

    >>> read_config(TrainConfig, ["--batch_size=8", "--max-iters", "1e5", "--no-compile"]).config.max_iters
    100000
    """
    own = defaults(schema)
    # Sampling may name a training file, and the other way round: the other's keys are known, and left out.
    known = defaults(SampleConfig) | defaults(TrainConfig) | own
    given: dict[str, tuple[Value, str]] = {}
    notes: list[str] = []
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        if argument.startswith("--"):
            key, value = _option(schema, argument, rest)
            given[key] = value, COMMAND_LINE
            continue
        _refuse_bare_key(argument, own)
        file = read_pyfile(argument, known | {key: value for key, (value, _) in given.items()})
        given |= {key: (it.value, f"{argument}:{it.line}") for key, it in file.values.items() if key in own}
        notes += file.warnings
    for note in notes:
        if warn:
            warn(note)
    values = {key: _checked_at(source, schema, key, value) for key, (value, source) in given.items()}
    sources = {key: given[key][1] if key in given else "default" for key in own}
    return Resolved(schema(**values), sources, tuple(notes))


def describe(resolved: Resolved[C]) -> list[tuple[str, object, str]]:
    """Key, value and source of every value that differs from its default, in the order of the schema."""
    usual = defaults(type(resolved.config))
    found = ((key, getattr(resolved.config, key), source) for key, source in resolved.sources.items())
    return [(key, value, source) for key, value, source in found if value != usual[key]]


def _checked_at(source: str, schema: type[Schema], key: str, value: object) -> Setting:
    try:
        return checked(schema, key, value)
    except ConfigError as error:
        raise ConfigError(str(error) if source == COMMAND_LINE else f"{source}: {error}") from None


def _option(schema: type[Schema], argument: str, rest: deque[str]) -> tuple[str, Value]:
    """One `--key=value`, `--key value`, `--key` or `--no-key`; takes its value from `rest` if it is there."""
    written, equals, text = argument[2:].partition("=")
    key, kinds = written.replace("-", "_"), schema.__annotations__
    positive = key.removeprefix("no_")
    if key not in kinds and kinds.get(positive) in (bool, bool | str):
        if equals:
            raise ConfigError(say("config.reader.takes_no_value", option=written, value=text, key=positive))
        return positive, False
    if key not in kinds:
        near = difflib.get_close_matches(key, list(kinds), n=1)
        hint = say("config.reader.did_you_mean", near=near[0]) if near else say("config.reader.how_keys_look")
        raise ConfigError(say("config.reader.no_key", option=written, hint=hint))
    kind = kinds[key]
    if equals:
        return key, _from_text(kind, text)
    if kind in (bool, bool | str):
        words = _WORDS if kind is bool else [*_WORDS, "auto"]
        return key, _from_text(kind, rest.popleft()) if rest and rest[0].lower() in words else True
    if not rest or rest[0].startswith("--"):
        raise ConfigError(say("config.reader.needs_value", option=written, key=key))
    return key, _from_text(kind, rest.popleft())


def _from_text(kind: type | UnionType, text: str) -> Value:
    """Read `text` for a key of this type; the check later refuses text that means nothing to it."""
    if kind in (bool, bool | str):
        word = text.strip("'\" ").lower()
        return _WORDS.get(word, word)
    quoted = len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]
    if kind is str and not quoted:
        return text  # --wandb_run_name=123 and --start=\n stay as typed
    value = literal(text)
    return value if isinstance(value, str) == (kind is str) else text


def literal(text: str) -> Value:
    """The Python value that `text` writes down, or `text` itself; nothing is executed.

    >>> literal("1e5"), literal("out-owt")
    (100000.0, 'out-owt')
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value: Value = ast.literal_eval(text)
            return value
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def _refuse_bare_key(argument: str, keys: Container[str]) -> None:
    """Name the mistake in `batch_size=8`, `-batch_size=8` and `batch_size 8`, which are no files."""
    name, equals, value = argument.lstrip("-").partition("=")
    if (equals or argument.startswith("-") or name in keys) and not os.path.exists(argument):
        raise ConfigError(say("config.reader.bare_key", argument=argument, name=name, value=value or "VALUE"))
