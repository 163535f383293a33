"""Every sentence of doctor and watch, in English and Japanese; the text itself is in the TOML files beside this."""

import functools

from tightfit.wording import LANGUAGES, Words

__all__ = ["LANGUAGES", "Words", "words"]


@functools.cache
def words(language: str) -> Words:
    """Sentences in one language. ConfigError for a language without them."""
    return Words("tightfit.wording.system", language)
