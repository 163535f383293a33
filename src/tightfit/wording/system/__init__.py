"""Every sentence of doctor and watch, in English and Japanese; the text itself is in the TOML files beside this."""

import functools

from tightfit.wording import LANGUAGES, Words, words_of

__all__ = ["LANGUAGES", "Words", "words"]

words = functools.partial(words_of, "system")
"""Sentences in one language. ConfigError for a language without them."""
