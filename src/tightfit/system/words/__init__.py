"""Every sentence of doctor and watch, in English and Japanese; the text itself is in the TOML files beside this."""

import functools
import string
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from tightfit.errors import ConfigError
from tightfit.units import format_bytes, format_count

LANGUAGES = ("en", "ja")


class _Formatter(string.Formatter):
    """Two formats more: `{free_bytes:bytes}` is 2.68 GiB, `{parameters:count}` is 124M."""

    def format_field(self, value: Any, format_spec: str) -> str:
        own = {"bytes": format_bytes, "count": format_count}.get(format_spec)
        return own(value) if own else str(super().format_field(value, format_spec))


class Words:
    """The sentences of one language: `words("nvml", "other", detail="...")`."""

    def __init__(self, language: str) -> None:
        self.language = language
        text = files("tightfit.system.words").joinpath(f"{language}.toml").read_text(encoding="utf-8")
        self._tables: dict[str, dict[str, str]] = tomllib.loads(text)

    def __call__(self, table: str, key: str, /, **values: object) -> str:
        """A value that is a list is joined; each mapping in it is said by the sentence `<name>_one` of the same table.

        An entry in which something is not known, None, is said by `<name>_one_unknown`.
        """
        shown = {name: self._joined(table, f"{name}_one", value) for name, value in values.items()}
        return _Formatter().vformat(self._tables[table][key], (), shown)

    def has(self, table: str, key: str) -> bool:
        return key in self._tables.get(table, {})

    def sentences(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Each sentence as `table.key`, with the fields that it fills in."""
        for table, sentences in self._tables.items():
            for key, sentence in sentences.items():
                fields = ((name, spec) for _, name, spec, _ in string.Formatter().parse(sentence) if name)
                yield f"{table}.{key}", frozenset(f"{name}:{spec}" for name, spec in fields)

    def _joined(self, table: str, one: str, value: object) -> object:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return value
        shown = [
            self(table, f"{one}_unknown" if None in item.values() else one, **item)
            if isinstance(item, Mapping)
            else str(item)
            for item in value
        ]
        return self._tables["words"]["separator"].join(shown)


@functools.cache
def words(language: str) -> Words:
    """ConfigError for a language that there are no words in."""
    if language not in LANGUAGES:
        raise ConfigError(f"--lang must be one of {', '.join(LANGUAGES)}, got {language!r}")
    return Words(language)
