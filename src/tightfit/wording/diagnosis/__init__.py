"""Every sentence of an explanation, in English and Japanese; the text itself is in the TOML files beside this."""

import functools
from typing import Any

from tightfit import wording
from tightfit.wording import LANGUAGES, locale_language

__all__ = ["LANGUAGES", "Words", "locale_language", "words"]

_UNITS = ((86_400, "days"), (3600, "hours"), (60, "minutes"), (0, "seconds"))


class Words(wording.Words):
    """More formats: `duration` (26 days), `shape` ((65536, 50304)), `product` (4096 x 11008), `change` (+5%), and
    `named-TABLE`, the word for a value in that table; `Named-TABLE` begins a sentence with it. An unknown value is a
    question mark. Only a list with a sentence for its entries is joined.
    """

    separator = ("units", "separator")

    def __init__(self, package: str, language: str) -> None:
        super().__init__(package, language)
        self.formats |= {
            "duration": self._duration,
            "shape": lambda shape: f"({', '.join(map(str, shape))})",
            "product": lambda shape: " x ".join(map(str, shape)),
            "change": lambda change: f"{change:+.0%}",
        }

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "?"
        if format_spec.startswith("named-"):
            return self.name(format_spec.removeprefix("named-"), str(value))
        if format_spec.startswith("Named-"):
            named = self.name(format_spec.removeprefix("Named-"), str(value))
            return named[:1].upper() + named[1:]
        return super().format_field(value, format_spec)

    def _duration(self, seconds: float) -> str:
        size, unit = next((size, unit) for size, unit in _UNITS if seconds >= 2 * size)
        value = seconds / size if size else seconds
        return self("units", unit, value=f"{value:.0f}" if value >= 9.95 else f"{value:.1f}")

    def _joined(self, table: str, one: str, value: object) -> object:
        return super()._joined(table, one, value) if self.has(table, one) else value


@functools.cache
def words(language: str) -> Words:
    """Return the words of a language. ConfigError for one without sentences."""
    return Words("tightfit.wording.diagnosis", language)
