"""Every sentence of a report, in English and Japanese; the text itself is in the TOML files beside this."""

import functools

from tightfit.wording import LANGUAGES, Words, locale_language, words_of

__all__ = ["LANGUAGES", "Words", "locale_language", "words"]

words = functools.partial(words_of, "report")
"""Sentences in one language. ConfigError for a language without them."""
