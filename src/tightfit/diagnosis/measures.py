"""Measures that a report writes about: those that were tried in vain, and the quantity that its title names."""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from tightfit.diagnosis.own_options import lowered_by
from tightfit.diagnosis.remedies import Remedy
from tightfit.tables import read_patterns

_SENTENCE = re.compile(r"(?<=[^\d\s])[.!?。！？](?=\s|$)|\n")
_ITEM = re.compile(r"\s*(?:[-*•]|\d{1,2}[.)]) ")
_ADVICE = re.compile(
    r"ried to allocate(?s:.){0,700}?(?:max_split_size_mb|expandable_segments:True)\s+to\s+avoid\s+fragmentation"
)
"""PyTorch's message, whose words would read as a person's: tried, already, try setting."""
_OPTION = re.compile(r"\b[a-z]{2,20}(?:_[a-z]{2,20}){1,4}\b")
_LONG = 20_000
"""Characters of a report, up to which a person's words are looked for."""
_ALIKE = {"smaller_batch": "split_general", "split_logged": "split_general", "split_in_parts": "split_general"}
"""Remedies under another code's words."""
_ALIKE |= {"kind_vllm_shorter": "smaller_cache", "kind_vllm_shorter_fits": "smaller_cache"}
_ALIKE |= dict.fromkeys(("kind_vllm_share_higher", "kind_vllm_share_lower_general"), "share_of_card")
_ALIKE |= {"less_at_once": "split_general", "smaller_inputs": "smaller_picture"}


_tables = functools.partial(read_patterns, "tightfit.diagnosis", "measures.toml", re.IGNORECASE)


@functools.lru_cache(maxsize=4)
def _sentences(text: str) -> tuple[str, ...]:
    """Return a person's sentences, without PyTorch's message."""
    return tuple(_SENTENCE.split(_ADVICE.sub("", text[:_LONG])))


def tried_in(text: str) -> frozenset[str]:
    """Return the codes of the measures that the report says were tried in vain.

    >>> sorted(tried_in("Reducing the batch_size didn't help. I use bf16."))
    ['split_general']
    """
    found: set[str] = set()
    is_list_of_tried = False
    for sentence in _sentences(text):
        is_item = bool(_ITEM.match(sentence))
        in_vain = bool(_tables()["vain"]["words"].search(sentence))
        if not is_item and sentence.strip():
            is_list_of_tried = in_vain
        if in_vain or (is_item and is_list_of_tried):
            found.update(code for code, words in _tables()["measures"].items() if words.search(sentence))
            found.update(each for name in _OPTION.findall(sentence) if (each := lowered_by(name)) is not None)
    return frozenset(found)


@functools.lru_cache(maxsize=8)
def without_effect(text: str) -> frozenset[str]:
    """Return the codes of the quantities of which the report says that no value helped.

    >>> sorted(without_effect("I set the batch_size to 10 and 128, and both result in the error."))
    ['split_general']
    >>> without_effect("With batch size 64 and 128 it fails, with 32 it works.")
    frozenset()
    """
    found: set[str] = set()
    is_list_of_tried = False
    for sentence, next_one in itertools.pairwise((*_sentences(text), "")):
        is_item = bool(_ITEM.match(sentence))
        if not is_item and sentence.strip():
            is_list_of_tried = bool(_words("no_effect", "all_fail").search(sentence))
        if _words("no_effect", "works").search(sentence):
            continue
        of_all = is_list_of_tried or bool(_words("no_effect", "all_fail").search(f"{sentence} {next_one}"))
        for code in (code for code, words in _tables()["knobs"].items() if words.search(sentence)):
            whatever, several = _knob(code)
            if whatever.search(sentence) or (of_all and _differ(several.search(sentence))):
                found.add(code)
    return frozenset(found)


_FEWEST, _APART = 3, 4
"""Values that show that none helps, and how many times the smaller one the larger of fewer values is."""


def _differ(values: re.Match[str] | None) -> bool:
    """Return True for values far enough apart that one of them should have helped."""
    if values is None:
        return False
    numbers = [float(each) for each in re.findall(r"\d+(?:\.\d+)?", values[0])]
    return len(numbers) >= _FEWEST or (len(numbers) > 1 and max(numbers) >= _APART * min(numbers))


@functools.cache
def _words(table: str, name: str) -> re.Pattern[str]:
    return _tables()[table][name]


@functools.cache
def _knob(code: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the words for `no value of this quantity helps`, and those for several values."""
    whatever, several, values = (_words("no_effect", name).pattern for name in ("any_value", "values", "several"))
    name = f"(?:{_tables()['knobs'][code].pattern})"
    first, second = (each.replace("KNOB", name).replace("VALUES", values) for each in (whatever, several))
    return re.compile(first, re.IGNORECASE), re.compile(second, re.IGNORECASE)


class Excluded(NamedTuple):
    """Ways that the report's writer does not want."""

    words: tuple[str, ...]
    codes: frozenset[str]

    def has(self, fix: Remedy) -> bool:
        """Return True for a fix with one of the names in its lines, or about one of the quantities."""
        return fix.code in self.codes or any(name in line for name in self.words for line in fix.paste)


_NAME = re.compile(r"\b[A-Z]{2,}_[A-Z_\d]{4,}\b|--[a-z][\w-]{3,}")
"""A variable of the environment, or an option."""
_KEEPS_BATCH = "split_general"
"""A smaller batch with more accumulation, which a wish for the same batch does not exclude."""


def excluded_in(text: str) -> Excluded:
    """Return the ways that the report asks to do without.

    >>> sorted(excluded_in("Is there a way to train it without lowering the resolution?").codes)
    ['smaller_picture']
    >>> excluded_in("Any workaround except PYTORCH_MPS_HIGH_WATERMARK_RATIO?").words
    ('PYTORCH_MPS_HIGH_WATERMARK_RATIO',)
    """
    tables, words, codes = _tables(), list[str](), set[str]()
    for sentence in _sentences(text):
        if not tables["excluded"]["asks"].search(sentence):
            continue
        for found in tables["excluded"]["but"].finditer(sentence):
            what = found[found.lastgroup or 0]
            words += _NAME.findall(what)
            codes.update(code for code, each in tables["knobs"].items() if each.search(what))
            codes.update(code for code, each in tables["measures"].items() if each.search(what))
    return Excluded(tuple(words), frozenset(codes - {_KEEPS_BATCH}))


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
