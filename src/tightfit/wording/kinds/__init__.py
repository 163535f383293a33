"""Sentences on the kinds of failure, in English and Japanese; the text itself is in the TOML files beside this.

Of `kind` and `kind__name`, the first is said whose name, a figure or a detail of the message, is known.
"""

import functools

from tightfit.wording import LANGUAGES, Words, words_of

__all__ = ["LANGUAGES", "Words", "words"]

words = functools.partial(words_of, "kinds")
"""Sentences in one language. ConfigError for a language without them."""
