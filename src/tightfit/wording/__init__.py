"""Sentences in English and Japanese, from the TOML files of each room's folder here.

`say("config.sizes.not_a_size", text="x")` is a sentence of `config/en.toml`, table `sizes`, in this process's language:
the one that `speak` chose, or TIGHTFIT_LANG, or the locale's.
"""

import contextlib
import functools
import locale
import os
import string
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import msgspec

from tightfit.errors import ConfigError
from tightfit.units import format_bytes, format_count, format_duration

LANGUAGES = ("en", "ja")
_VARIABLE = "TIGHTFIT_LANG"


def say(sentence: str, /, **values: object) -> str:
    """Fill in the sentence `room.table.key` in this process's language."""
    room, table, key = sentence.split(".", 2)
    return words_of(room, chosen_language(None))(table, key, **values)


def term(table: str, name: str, /, **values: object) -> str:
    """Fill in the sentence `name` of the table `room.table`, or its sentence `other` where it has none so named."""
    room, of_room = table.split(".")
    words = words_of(room, chosen_language(None))
    return words(of_room, name if words.has(of_room, name) else "other", **values)


def speak(language: str | None) -> str:
    """Set the language of this process and its children; return it. ConfigError for one without sentences.

    None leaves the choice to the user's environment.
    """
    language = chosen_language(language)
    os.environ[_VARIABLE] = language
    return language


@contextlib.contextmanager
def language_kept() -> Iterator[None]:
    """Restore the language afterwards: a command that another program calls changes only its own."""
    before = os.environ.get(_VARIABLE)
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
        if before is not None:
            os.environ[_VARIABLE] = before


@functools.cache
def words_of(room: str, language: str) -> "Words":
    """Return the sentences of a room. ConfigError for a language without them."""
    return Words(f"tightfit.wording.{room}", language)


def chosen_language(given: str | None) -> str:
    """Return the given language, TIGHTFIT_LANG or the locale's. ConfigError for a language without sentences."""
    language = given or os.environ.get(_VARIABLE) or locale_language()
    if language not in LANGUAGES:
        source = "--lang" if given else _VARIABLE
        raise ConfigError(f"{source} must be one of {', '.join(LANGUAGES)}, got {language!r}")
    return language


class Words(string.Formatter):
    """The sentences of one language in the folder of `package`: `words("nvml", "other", detail="...")`.

    Formats of its own: `{free_bytes:bytes}` is 2.68 GiB, `{parameters:count}` is 124M, `{step_s:time}` is 2h03m,
    `{passes:pass|passes}` is 1 pass or 4 passes. ConfigError for a language without sentences.
    """

    separator = ("words", "separator")
    """Table and key of the text between the entries of a list."""

    def __init__(self, package: str, language: str) -> None:
        self.language = chosen_language(language)
        self.formats: dict[str, Callable[[Any], str]] = {
            "bytes": format_bytes,
            "count": format_count,
            "time": format_duration,
        }
        text = files("tightfit").joinpath(*package.split(".")[1:], f"{language}.toml").read_text(encoding="utf-8")
        self._tables: dict[str, dict[str, str]] = tomllib.loads(text)

    def __call__(self, table: str, key: str, /, **values: object) -> str:
        """The sentence `key` with its fields filled in.

        A list is joined; the sentence `<name>_one` of the same table words each record or mapping in it. An entry with
        an unknown field, None, takes `<name>_one_unknown` if the table has one.
        """
        shown = {name: self._joined(table, f"{name}_one", value) for name, value in values.items()}
        return self.vformat(self._tables[table][key], (), shown)

    def format_field(self, value: Any, format_spec: str) -> str:
        if "|" in format_spec:
            one, several = format_spec.split("|")
            return f"{value} {one if str(value) == '1' else several}"
        own = self.formats.get(format_spec)
        return own(value) if own else str(super().format_field(value, format_spec))

    def name(self, table: str, key: str) -> str:
        """The word for `key`, or `key` itself for a phase, category or field without one."""
        return self._tables[table].get(key, key)

    def has(self, table: str, key: str) -> bool:
        return key in self._tables.get(table, {})

    def table(self, table: str) -> Mapping[str, str]:
        return self._tables[table]

    def sentences(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Yield each sentence as `table.key`, with its fields and their formats; plurals are of one language."""
        for table, sentences in self._tables.items():
            for key, sentence in sentences.items():
                fields = ((name, spec) for _, name, spec, _ in self.parse(sentence) if name)
                yield (
                    f"{table}.{key}",
                    frozenset(name if "|" in (spec or "") else f"{name}:{spec}" for name, spec in fields),
                )

    def _joined(self, table: str, one: str, value: object) -> object:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return value
        table_of, key = self.separator
        return self._tables[table_of][key].join(self._entry(table, one, entry) for entry in value)

    def _entry(self, table: str, one: str, entry: object) -> str:
        if isinstance(entry, msgspec.Struct):
            entry = msgspec.structs.asdict(entry)
        if not isinstance(entry, Mapping):
            return str(entry)
        is_unknown = None in entry.values() and self.has(table, f"{one}_unknown")
        return self(table, f"{one}_unknown" if is_unknown else one, **entry)


def locale_language() -> str:
    """Return Japanese where the user's environment asks for it, else English."""
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    found = next(filter(None, names), None) or locale.getlocale()[0] or ""
    return "ja" if found.lower().startswith(("ja", "japanese")) else "en"
