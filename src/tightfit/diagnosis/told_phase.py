"""The phase in which memory ran out by a person's words: what went well before does not count (told_phases.toml)."""

import functools
import re
from collections.abc import Iterator, Mapping

from tightfit.tables import read_table

_WHEN = r"\b(?:when|while|during|in|at|on|for|until|once|as soon as)\b(?! (?:the )?training\b)[^.\n]{0,40}?"
"""A point in time, and the words between it and the phase."""
_REPORT = 8000
"""Characters of a report in which a person tells what happened."""
_SENTENCE_ENDS = re.compile(r"(?<=\D)[.!?](?=\s|$)|[。！？\n]")
_OF_ERROR = ("setup", "eval", "save", "resume")
"""Phases that count in a sentence on the error, which names no memory."""
_TRAIN = "train"
"""The training's own steps, which are no phase of their own."""


@functools.cache
def _tables() -> Mapping[str, Mapping[str, re.Pattern[str]]]:
    tables = read_table("tightfit.diagnosis", "told_phases.toml", dict[str, dict[str, list[str]]])
    return {
        table: {name: re.compile("|".join(each).replace("@WHEN", _WHEN), re.IGNORECASE) for name, each in lists.items()}
        for table, lists in tables.items()
    }


def phase_told(text: str) -> str | None:
    """Return the phase that a report's sentences tell of, or None.

    >>> phase_told("Training works fine, but OOM occurs in the evaluation step.")
    'eval'
    >>> phase_told("Evaluation is fine, but training runs out of memory.")
    """
    sentences = _SENTENCE_ENDS.split(text[:_REPORT])
    found = next(_behind_turns(sentences), None)
    found = found or next(filter(None, map(_of_sentence, sentences)), None)
    return None if found == _TRAIN else found


def _behind_turns(sentences: list[str]) -> Iterator[str]:
    """Yield the phases behind the words that end what went well: `it works until the model is saved`."""
    parts = _tables()["parts"]
    for before, sentence in zip(["", *sentences], sentences, strict=False):
        story = f"{before}. {sentence}" if parts["turn"].match(sentence.lstrip()) else sentence
        for turn in parts["turn"].finditer(story):
            head, tail = story[: turn.start()], story[turn.end() :]
            fails = parts["until"].match(turn[0]) or _fails(parts["fine"].sub(" ", tail))
            if fails and parts["fine"].search(head) and (found := _first_mention(tail)):
                yield found


def _first_mention(part: str) -> str | None:
    """Return the first phase of a part of a story that is neither past nor left out."""
    part = _tables()["parts"]["left_out"].sub(" ", _tables()["parts"]["past"].sub(" ", part))
    found = {name: words.search(part) for name, words in _tables()["mentions"].items()}
    places = {name: match.start() for name, match in found.items() if match}
    return min(places, key=lambda name: places[name], default=None)


def _of_sentence(sentence: str) -> str | None:
    """Return the phase of a sentence on the lack of memory, or on the error."""
    parts = _tables()["parts"]
    if not _fails(sentence):
        return None
    known = _tables()["told"] if parts["lack"].search(sentence) else _OF_ERROR
    clauses = [each for each in parts["turn"].split(sentence) if not _went_well(each)]
    clauses = [parts["left_out"].sub(" ", parts["past"].sub(" ", each)) for each in clauses]
    return next((phase for phase in known if any(map(_tables()["told"][phase].search, clauses))), None)


def _fails(part: str) -> bool:
    return any(_tables()["parts"][words].search(part) for words in ("lack", "fails"))


def _went_well(clause: str) -> bool:
    """Return True for a clause on what went well, and on no failure."""
    fine = _tables()["parts"]["fine"]
    return bool(fine.search(clause)) and not _fails(fine.sub(" ", clause))
