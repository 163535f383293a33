"""The purpose of a failed run, by its traceback, its command and its words: training, or the use of a trained model."""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from tightfit.oomlog.facts import Facts
from tightfit.oomlog.run_facts import RunFacts
from tightfit.oomlog.tracebacks import TraceFrame
from tightfit.tables import read_patterns

TRAINING, INFERENCE = "training", "inference"
_PHASES = {"backward": TRAINING, "optimizer": TRAINING, "loss": TRAINING, "warmup": INFERENCE}
"""Phases of one purpose only; an evaluation or a sample may be part of a training."""
_COMMAND = re.compile(
    r"(?:\bpython\d?(?:\.\d+)?(?=\s)|\btorchrun|\baccelerate launch|\bdeepspeed)\b[^\n]{0,200}?(\S{1,120}\.py)\b"
)


_signs = functools.partial(read_patterns, "tightfit.diagnosis", "purposes.toml", re.IGNORECASE)
"""Reads `frames`, `commands` or `words`, and of each the purposes."""


class Shown(NamedTuple):
    """The purpose of a run, and the sign in its log."""

    purpose: str
    """TRAINING or INFERENCE."""
    sign: str = ""
    """The words of the log that show it, to be quoted; empty where the phase does."""


def purpose_of(facts: Facts, run: RunFacts) -> Shown | None:
    """Return the purpose, or None where the log does not show it; the surest sign decides."""
    phase = _PHASES.get(facts.phase or "")
    if phase is not None:
        return Shown(phase)
    return (
        purpose_of_frames(facts.frames)
        or _first_of_options(run.text)
        or _only("commands", "\n".join(match[1] for match in _COMMAND.finditer(run.text)))
        or _only("words", _title(run.text))
        or _only("words", run.text)
    )


def _first_of_options(text: str) -> Shown | None:
    """Return the purpose that the options of a command name; to train and then to test is a training."""
    found = ((purpose, sign.search(text)) for purpose, sign in _signs()["options"].items())
    return next((Shown(purpose, match[0]) for purpose, match in found if match), None)


def _title(text: str) -> str:
    """Return the title of a report, which tells of the part that failed."""
    first = text.lstrip().partition("\n")[0]
    return first if first.startswith("# ") else ""


def purpose_of_frames(frames: Sequence[TraceFrame]) -> Shown | None:
    """Return the purpose that a traceback shows, by the innermost of the user's frames."""
    for frame in reversed(frames):
        if frame.is_library and "transformers/trainer" not in frame.file and "lightning" not in frame.file:
            continue
        name = f"{frame.file}:{frame.function.rsplit('.', 1)[-1]}".replace("\\", "/")
        found = _only("frames", name) or _only("calls", frame.source or "")
        if found:
            return Shown(found.purpose, f"{name.rpartition('/')[-1].partition(':')[0]}, {frame.function}")
    return None


def _only(kind: str, text: str) -> Shown | None:
    """Return the purpose that the text has signs of, if it has none of the other."""
    found = [(purpose, sign.search(text)) for purpose, sign in _signs()[kind].items() if text]
    matches = [Shown(purpose, _word(match)) for purpose, match in found if match]
    return matches[0] if len(matches) == 1 else None


def purpose_of_words(text: str) -> str | None:
    """Return the purpose that the words of a text have signs of, if they have none of the other."""
    shown = _only("words", text)
    return shown.purpose if shown else None


def _word(match: re.Match[str]) -> str:
    """Return the whole word, or the few words, that a sign stands in."""
    text = match.string
    start, end = match.span()
    before = _WORD_START.search(text[max(0, start - _LONGEST) : start])
    after = _WORD_END.match(text, end, end + _LONGEST)
    return " ".join(f"{before[0] if before else ''}{match[0]}{after[0] if after else ''}".split())


_LONGEST = 24
"""Characters of a word before or behind a sign."""
_WORD_START, _WORD_END = re.compile(r"[A-Za-z0-9_.\-]*\Z"), re.compile(r"[A-Za-z0-9_\-]*(?:\.[A-Za-z]+)?")
