"""The purpose of a failed run, by its traceback, its command and its words: training, or the use of a trained model."""

import functools
import re
from collections.abc import Sequence

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


def purpose_of(facts: Facts, run: RunFacts) -> str | None:
    """Return TRAINING, INFERENCE, or None where the log does not show it; the surest sign decides."""
    return (
        _PHASES.get(facts.phase or "")
        or _of_frames(facts.frames)
        or _first_of_options(run.text)
        or _only("commands", "\n".join(match[1] for match in _COMMAND.finditer(run.text)))
        or _only("words", _title(run.text))
        or _only("words", run.text)
    )


def _first_of_options(text: str) -> str | None:
    """Return the purpose that the options of a command name; to train and then to test is a training."""
    return next((purpose for purpose, sign in _signs()["options"].items() if sign.search(text)), None)


def _title(text: str) -> str:
    """Return the title of a report, which tells of the part that failed."""
    first = text.lstrip().partition("\n")[0]
    return first if first.startswith("# ") else ""


def _of_frames(frames: Sequence[TraceFrame]) -> str | None:
    for frame in reversed(frames):
        if frame.is_library and "transformers/trainer" not in frame.file and "lightning" not in frame.file:
            continue
        found = _only("frames", f"{frame.file}:{frame.function.rsplit('.', 1)[-1]}".replace("\\", "/"))
        found = found or _only("calls", frame.source or "")
        if found:
            return found
    return None


def _only(kind: str, text: str) -> str | None:
    """Return the purpose that the text has signs of, if it has none of the other."""
    found = [purpose for purpose, sign in _signs()[kind].items() if text and sign.search(text)]
    return found[0] if len(found) == 1 else None
