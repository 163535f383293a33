"""Every sentence of an explanation, in English and Japanese; the text itself is in the TOML files beside this."""

import functools
import string
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from tightfit.errors import ConfigError
from tightfit.units import format_bytes, format_count

LANGUAGES = ("en", "ja")
_UNITS = ((86_400, "days"), (3600, "hours"), (60, "minutes"), (0, "seconds"))


class Words(string.Formatter):
    """The sentences of one language: `words("causes", "outside", outside_bytes=...)`.

    Formats of its own: `bytes` (6.14 GiB), `count` (124M), `duration` (26 days), `shape` ((65536, 50304)), `change`
    (+5%), and `named-TABLE`, which says a value by its word in that table.
    """

    def __init__(self, language: str) -> None:
        self.language = language
        text = files("tightfit.explain.words").joinpath(f"{language}.toml").read_text(encoding="utf-8")
        self._tables: dict[str, dict[str, str]] = tomllib.loads(text)

    def __call__(self, table: str, key: str, /, **values: object) -> str:
        """A value that is a list of mappings is joined, each said by the sentence `<name>_one` of the same table."""
        shown = {name: self._joined(table, f"{name}_one", value) for name, value in values.items()}
        return self.vformat(self._tables[table][key], (), shown)

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "?"
        if format_spec.startswith("named-"):
            return self.name(format_spec.removeprefix("named-"), str(value))
        own: dict[str, Callable[[Any], str]] = {
            "bytes": format_bytes,
            "count": format_count,
            "duration": self._duration,
            "shape": lambda shape: f"({', '.join(map(str, shape))})",
            "change": lambda change: f"{change:+.0%}",
        }
        return own[format_spec](value) if format_spec in own else format(value, format_spec)

    def name(self, table: str, key: str) -> str:
        """The word for `key`, or `key` itself: a phase or category that there is no word for."""
        return self._tables[table].get(key, key)

    def has(self, table: str, key: str) -> bool:
        return key in self._tables.get(table, {})

    def sentences(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Each sentence as `table.key`, with the fields that it fills in."""
        for table, sentences in self._tables.items():
            for key, sentence in sentences.items():
                fields = ((name, spec) for _, name, spec, _ in self.parse(sentence) if name)
                yield f"{table}.{key}", frozenset(f"{name}:{spec}" for name, spec in fields)

    def _duration(self, seconds: float) -> str:
        size, unit = next((size, unit) for size, unit in _UNITS if seconds >= 2 * size)
        value = seconds / size if size else seconds
        return self("units", unit, value=f"{value:.0f}" if value >= 9.95 else f"{value:.1f}")

    def _joined(self, table: str, one: str, value: object) -> object:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value or not isinstance(value[0], Mapping):
            return value
        return self._tables["units"]["separator"].join(self(table, one, **item) for item in value)


@functools.cache
def words(language: str) -> Words:
    """ConfigError for a language that there are no words in."""
    if language not in LANGUAGES:
        raise ConfigError(f"--lang must be one of {', '.join(LANGUAGES)}, got {language!r}")
    return Words(language)
