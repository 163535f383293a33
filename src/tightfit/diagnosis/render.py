"""An explanation as text: problem, cause, fixes, expected result; short, or with the arithmetic."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tightfit.diagnosis.cause_records import COMPUTED
from tightfit.diagnosis.log_sentences import nothing_lines
from tightfit.diagnosis.remedies import DOES_NOT_FIT, FITS, FITS_SLOWLY, NO_EFFECT, NOT_MEMORY, UNCHECKED, Remedy
from tightfit.diagnosis.statements import (
    Sentences,
    arithmetic_lines,
    assumption_lines,
    configuration_lines,
    expected_lines,
    problem_lines,
)
from tightfit.system.wrapping import wrap
from tightfit.wording.diagnosis import Words

if TYPE_CHECKING:
    from tightfit.diagnosis.explanation import Explanation

_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MARKS = {FITS: "✓", FITS_SLOWLY: "✓", UNCHECKED: "?", DOES_NOT_FIT: "✗", NO_EFFECT: "✗", NOT_MEMORY: "-"}
_SHOWN = 5
"""Fixes that are shown unless all are asked for."""
_PLACEHOLDER = re.compile(r"(?<![\w\"'.])(?:BATCH|ACCUMULATION|HALF|MEMORY|MODEL|MODEL_CLASS|GPUS)(?![\w.(])")
"""A word in a line to paste that stands for a value of the user's."""
_NO_CHANGE = 0.005
"""A slowdown that rounds to 0%."""


def render(explanation: "Explanation", words: Words, verbose: bool = False, width: int = 100) -> str:
    """Return the text for a terminal of `width` columns, without control codes of the log."""
    if explanation.facts is None:
        if explanation.played == "script":
            return _plain(words("problem", "not_failed"))
        lines = list(nothing_lines(explanation.reading, words))
        if explanation.foreign is not None and explanation.reading.kind_of_nothing == "empty":
            lines = list(configuration_lines(explanation, explanation.foreign, words))
        return _plain("\n".join("\n".join(wrap(line, width)) for line in lines))
    said = Sentences(explanation, words)
    sections = [
        ("problem", list(problem_lines(explanation, words))),
        ("cause", _causes(explanation, said, words)),
        ("fixes", list(_fixes(explanation, said, words, verbose))),
        ("expected", list(expected_lines(explanation, said, words))),
    ]
    if verbose:
        sections.append(("arithmetic", list(arithmetic_lines(explanation, words))))
    text = "\n\n".join(
        words("titles", title) + "\n" + "\n".join(_indented(line, width) for line in lines)
        for title, lines in sections
        if lines
    )
    return _plain(text)


def _plain(text: str) -> str:
    return _CONTROL.sub("", text)


def _indented(line: str, width: int) -> str:
    """Indent a line below its title, and its continuation further. Lines to copy are never broken."""
    if line.startswith("    "):
        return line
    hang = re.match(r"(?:\d+\. |[✓✗?-] )?", line)
    inside = " " * (2 + (hang.end() if hang else 0))
    first, *rest = wrap(line, width - len(inside)) or [""]
    return "\n".join(["  " + first, *(inside + each for each in rest)])


def _causes(explanation: "Explanation", said: Sentences, words: Words) -> list[str]:
    told = map(said.told, explanation.causes)
    return [
        words(
            "units",
            "bullet",
            number=number,
            text=each.sentence,
            label=words("labels", each.label),
            code=each.stable_code,
        )
        for number, each in enumerate(told, 1)
    ]


def _fixes(explanation: "Explanation", said: Sentences, words: Words, verbose: bool) -> Iterator[str]:
    yield from assumption_lines(explanation, words)
    shown = explanation.remedies if verbose else shown_remedies(explanation)
    for remedy in shown:
        yield from _fix(remedy, said, words, verbose=verbose)
    if any(_PLACEHOLDER.search(line) for remedy in shown for line in remedy.paste):
        yield words("assumed", "placeholders")
    left = [each for each in explanation.remedies if each not in shown]
    if any(each.code not in _IN_EVERY_LOG for each in left):
        may_help = any(each.verdict in _MAY_HELP for each in left)
        yield words("assumed", "more_fixes" if may_help else "left_out", count=len(left))
    if verbose:
        for what in explanation.not_modelled:
            yield words("assumed", "not_modelled", what=what)


_IN_EVERY_LOG = ("empty_cache", "close_others")
"""Measures of which nearly every log says the same."""
_MAY_HELP = (FITS, FITS_SLOWLY, UNCHECKED)


def shown_remedies(explanation: "Explanation") -> tuple[Remedy, ...]:
    """Return the remedies that are shown by default: at most five, without those that do not help if others may."""
    may_help = tuple(each for each in explanation.remedies if each.verdict in _MAY_HELP)
    return (may_help or explanation.remedies)[:_SHOWN]


def _fix(remedy: Remedy, said: Sentences, words: Words, *, verbose: bool) -> Iterator[str]:
    in_full = verbose or remedy.verdict in (FITS, UNCHECKED)
    is_general = remedy.reason == "general"  # advice that no play can check
    verdict = "" if is_general else f": {words('verdicts', remedy.verdict)}"
    text = f"{_MARKS[remedy.verdict]} {said.title(remedy)}{verdict}"
    if remedy.reason != "no_configuration" and not is_general:
        text += words("units", "clause") + said.reason(remedy)
    if in_full and not is_general:
        notes = list(effects(remedy, words)) or ([] if remedy.label == COMPUTED else [words("labels", remedy.label)])
        text += f" [{words('units', 'separator').join(notes)}]" if notes else ""
    yield text
    if in_full:
        yield from (f"      {line}" for line in said.paste(remedy))
    if verbose and remedy.page:
        yield f"      # {remedy.page}"


def effects(remedy: Remedy, words: Words) -> Iterator[str]:
    """Yield exact or lossy, the bytes saved, and the slowdown."""
    if remedy.applicability and remedy.exact is None:
        yield words("effects", remedy.applicability)
    elif remedy.exact is not None:
        yield words("effects", "exact" if remedy.exact else "lossy")
    if remedy.verdict != FITS:
        return
    if remedy.saved_bytes is not None and remedy.saved_bytes > 0:
        yield words("effects", "saves", saved=remedy.saved_bytes)
    if remedy.slowdown is None:
        yield words("effects", "not_estimated")
    elif abs(remedy.slowdown) < _NO_CHANGE:
        yield words("effects", "same_time")
    else:
        yield words("effects", "slower", change=remedy.slowdown)
