"""The verdict of a memory test: the problems of a play, in sentences."""

import os
from pathlib import Path

from tightfit.questions.baseline import Entry, category_name, difference, entry_of, in_words
from tightfit.simulation.details import Detail
from tightfit.wording import say


def problems_of(detail: Detail, *, limit_bytes: int | None, before: Entry | None, root: Path) -> list[str]:
    """Return the problems of a play; none if it fits, keeps its limit and took no more than before."""
    found = detail.findings
    if found.outcome == "error":
        return [say("questions.verdict.error", reason=found.stopped_because)]
    if found.failure is not None:
        failure = found.failure
        place = f"{os.path.relpath(failure.file, root)}:{failure.line}" if failure.file else failure.operator
        sizes = {"requested": failure.requested_bytes, "free": failure.free_bytes}
        return [say("questions.verdict.out_of_memory", card=found.gpu.name, place=place, **sizes)]
    problems = []
    if limit_bytes is not None and found.peak.device_bytes > limit_bytes:
        problems.append(say("questions.verdict.above", peak=found.peak.device_bytes, limit=limit_bytes))
        problems += _largest(detail, root)
    if before is not None:
        now = entry_of(detail, root)
        if now.gpu != before.gpu:
            return [say("questions.verdict.other_card", before=before.gpu, after=now.gpu)]
        change = difference(before, now)
        if change.has_grown:
            problems += in_words(change)
    return problems


def _largest(detail: Detail, root: Path) -> list[str]:
    return [
        say(
            "questions.verdict.largest",
            size=each.bytes,
            category=category_name(each.category),
            shape=each.shape,
            place=each.place,
            source=each.source,
        )
        for each in entry_of(detail, root).tensors[:3]
    ]
