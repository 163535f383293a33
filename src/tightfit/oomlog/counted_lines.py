"""Lines of progress: counts of steps, batches or files by which a program shows that it went on."""

import re
from collections.abc import Iterable, Mapping

Counts = tuple[int, ...]
"""Whole numbers of a line, in its order."""
_COUNTS = re.compile(
    r"\b(?:steps?|epochs?|iter(?:ation)?s?|batch(?:es)?|samples?|images?|frames?|files?|items?|sequences?|rounds?|"
    r"episodes?|process(?:ing|ed)|trials?|folds?|completed|predict(?:ing|ed))\b|\b\d{1,9}/\d{1,9}\b",
    re.IGNORECASE,
)
"""Words for what a program counts."""
_NO_COUNT = re.compile(
    r"[=:]? ?[-+]?\d+(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+)|(?<!\d)\d{1,3}(?::\d\d){1,2}\b|[|#█▏▎▍▌▋▊▉ ]+|\d+%"
)
"""Measures, times and bars, which differ in every line."""
_BAR_END = re.compile(r"\[(?=[^\]\n]{0,60}(?:it/s|s/it|\?it))")
_LAST = 60
"""Lines before a failure in which a program's progress is looked for."""


def counters_of(lines: list[str]) -> dict[str, Counts]:
    """Return the counts of the last lines of progress, by the text around them.

    >>> counters_of(["step 11 | loss 2.30"])
    {'step0loss': (11,)}
    """
    return {shape: counts for line in lines[-_LAST:] for shape, counts in _counted(line)}


def advanced(counters: Mapping[str, Counts], lines: Iterable[str]) -> int:
    """Return the number of lines of progress with a higher count than before.

    >>> advanced({'step0loss': (11,)}, ["step 11 | loss 2.30", "step 13 | loss 2.29"])
    1
    """
    found = (each for line in lines for each in _counted(line))
    return sum(counts > counters[shape] for shape, counts in found if shape in counters)


def _counted(line: str) -> Iterable[tuple[str, Counts]]:
    """Yield the text of a line of progress without its numbers, and its counts; nothing for any other line."""
    if len(line) > 1000 or not _COUNTS.search(line):
        return
    plain = _NO_COUNT.sub("", line[: bar.start()] if (bar := _BAR_END.search(line)) else line)
    counts = tuple(int(each) for each in re.findall(r"\d{1,12}", plain))
    if counts:
        yield re.sub(r"\d+", "0", plain), counts
