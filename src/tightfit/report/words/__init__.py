"""Every sentence of a report, in English and Japanese; the text itself is in the TOML files beside this."""

import functools
import locale
import os
import string
import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources import files

from tightfit.errors import ConfigError

LANGUAGES = ("en", "ja")


class Words:
    """The sentences of one language: `words("loss", "title")`."""

    def __init__(self, language: str) -> None:
        self.language = language
        text = files("tightfit.report.words").joinpath(f"{language}.toml").read_text(encoding="utf-8")
        self._tables: dict[str, dict[str, str]] = tomllib.loads(text)

    def __call__(self, table: str, key: str, /, **values: object) -> str:
        return self._tables[table][key].format(**values)

    def name(self, table: str, key: str) -> str:
        """The word for `key`, or `key` itself: a phase or a field that there is no word for."""
        return self._tables[table].get(key, key)

    def table(self, table: str) -> Mapping[str, str]:
        return self._tables[table]

    def sentences(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Each sentence as `table.key`, with the fields that it fills in."""
        for table, sentences in self._tables.items():
            for key, sentence in sentences.items():
                yield f"{table}.{key}", frozenset(name for _, name, _, _ in string.Formatter().parse(sentence) if name)


@functools.cache
def words(language: str) -> Words:
    """ConfigError for a language that there are no words in."""
    if language not in LANGUAGES:
        raise ConfigError(f"--lang must be one of {', '.join(LANGUAGES)}, got {language!r}")
    return Words(language)


def locale_language() -> str:
    """Japanese where the user's environment says so, else English."""
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    said = next(filter(None, names), None) or locale.getlocale()[0] or ""
    return "ja" if said.lower().startswith(("ja", "japanese")) else "en"
