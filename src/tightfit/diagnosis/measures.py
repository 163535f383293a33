"""Measures that a report writes about: those that were tried in vain, and the quantity that its title names."""

import functools
import re
from collections.abc import Sequence

from tightfit.diagnosis.remedies import Remedy
from tightfit.tables import read_patterns

_SENTENCE = re.compile(r"(?<=[^\d\s])[.!?。！？](?=\s|$)|\n")
_ITEM = re.compile(r"\s*(?:[-*•]|\d{1,2}[.)]) ")
_ADVICE = re.compile(
    r"ried to allocate(?s:.){0,700}?(?:max_split_size_mb|expandable_segments:True)\s+to\s+avoid\s+fragmentation"
)
"""PyTorch's message, whose words would read as a person's: tried, already, try setting."""
_LONG = 20_000
"""Characters of a report, up to which a person's words are looked for."""
_ALIKE = {"smaller_batch": "split_general", "split_logged": "split_general", "split_in_parts": "split_general"}
"""Remedies under another code's words."""
_ALIKE |= {"less_at_once": "split_general", "smaller_inputs": "smaller_picture"}


_tables = functools.partial(read_patterns, "tightfit.diagnosis", "measures.toml", re.IGNORECASE)


def tried_in(text: str) -> frozenset[str]:
    """Return the codes of the measures that the report says were tried in vain.

    >>> sorted(tried_in("Reducing the batch_size didn't help. I use bf16."))
    ['split_general']
    """
    found: set[str] = set()
    is_list_of_tried = False
    for sentence in _SENTENCE.split(_ADVICE.sub("", text[:_LONG])):
        is_item = bool(_ITEM.match(sentence))
        in_vain = bool(_tables()["vain"]["words"].search(sentence))
        if not is_item and sentence.strip():
            is_list_of_tried = in_vain
        if in_vain or (is_item and is_list_of_tried):
            found.update(code for code, words in _tables()["measures"].items() if words.search(sentence))
    return frozenset(found)


def titled_in(text: str) -> frozenset[str]:
    """Return the codes of the remedies for the quantity in a report's title.

    >>> sorted(titled_in("# OOM with a long context"))
    ['shorter_length', 'smaller_cache']
    """
    title = text.lstrip().partition("\n")[0]
    if not title.startswith("#"):
        return frozenset()
    return frozenset(code for code, words in _tables()["titled"].items() if words.search(title))


def is_among(fix: Remedy, tried: frozenset[str]) -> bool:
    """Return True if a fix, or another one with the same words, was tried in vain."""
    return fix.code in tried or _ALIKE.get(fix.code) in tried


def in_order_of_report(cures: Sequence[Remedy], text: str) -> list[Remedy]:
    """Return the fixes with those of the quantity in the title first, and those that were tried in vain last."""
    titled, tried = titled_in(text), tried_in(text)

    def place(fix: Remedy) -> int:
        if is_among(fix, tried):
            return 2
        if fix.code == "shorter_length" and not fix.paste:  # nobody's option: what the title asks for is the length
            return 1
        return 0 if fix.code in titled or (_ALIKE.get(fix.code) in titled and fix.code != "less_at_once") else 1

    return sorted(cures, key=place)
