"""Sentences on a log without a failure, and on what else a log shows beside the failure."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from tightfit.diagnosis.figure_causes import DECISIVE, causes_of_figures
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.kinds import memory_of
from tightfit.oomlog.last_words import shortened
from tightfit.oomlog.log_reader import LogReading
from tightfit.oomlog.log_record import Other
from tightfit.wording import kinds as wording

if TYPE_CHECKING:
    from tightfit.wording.diagnosis import Words

_SKIPPED = re.compile(
    r"\bskip(?:s|ped|ping)\b|\bOOM: Ran out of memory with exception|^\W*(?:failed \()?CUDA out of memory\) on \w",
    re.IGNORECASE,
)
"""A program's word for a batch that it left out."""


_GRANTED = re.compile(r"\bexceeds \d{1,3}% of\b")
"""TensorFlow's words for a large allocation that it made."""
_ON_HOST = re.compile(r"\bto CPU due to CUDA OOM\b")
"""Detectron2's words for work that it does on the CPU instead."""
_IN_TILES = re.compile(r"\bretrying with tiled\b")
_WITHOUT_BATCH = re.compile(r"regular VAE|\blora \S{1,80}\.weight\b")
"""Words for a part of a program for pictures that no batch makes smaller."""


def nothing_lines(reading: LogReading, words: "Words") -> Iterator[str]:
    """Yield the sentences on a log without a failure."""
    sentences, kind = wording.words(words.language), reading.kind_of_nothing or "nothing"
    kind = "caught_at_end" if kind == "caught" and not reading.went_on else kind
    yield sentences("nothing", kind, evidence=shortened(_whole(reading.evidence)))
    if reading.caught is not None:
        decisive = (cause for cause in causes_of_figures(reading.caught) if cause.code in DECISIVE)
        yield from (words("causes", cause.code, **msgspec.structs.asdict(cause)) for cause in decisive)
    hint = "skipped" if kind.startswith("caught") and _SKIPPED.search(reading.evidence) else f"{kind}_hint"
    if reading.caught is not None and "llama_cpp" in reading.caught.details and kind == "caught":
        hint = "retried_hint"
    if hint == "harmless_hint" and _GRANTED.search(reading.evidence):
        hint = "harmless_granted"
    if hint.startswith("caught") and _ON_HOST.search(reading.evidence):
        yield sentences("nothing", "caught_on_host")
        return
    if hint == "caught_hint" and _IN_TILES.search(reading.evidence):
        hint = "caught_in_tiles"
    if hint == "caught_hint" and reading.retried_batch is not None:
        yield sentences("nothing", "caught_with_batch", batch=reading.retried_batch)
    elif sentences.has("nothing", hint):
        yield sentences("nothing", hint)
    has_batch = not _WITHOUT_BATCH.search(reading.evidence)
    is_open = hint.startswith("caught") and reading.retried_batch is None
    if is_open and has_batch and (reading.caught is None or _batch_avoids(reading.caught)):
        yield sentences("nothing", "caught_batch")


def _whole(evidence: str) -> str:
    """Return the quoted words without a mark before them, and with the bracket that they end.

    >>> _whole(": CUDA out of memory) on sequence b")
    '(CUDA out of memory) on sequence b'
    """
    text = " ".join(evidence.split()).lstrip(": ")
    return f"({text}" if ")" in text and "(" not in text.partition(")")[0] else text


def _batch_avoids(facts: Facts) -> bool:
    """Return True for a lack of device memory that a smaller batch may avoid: one of PyTorch's, in a card's size."""
    total, requested = facts.figures.get("total_bytes"), facts.requested_bytes
    too_large = total is not None and requested is not None and requested > total.high
    return memory_of(facts.kind) == "device" and "llama_cpp" not in facts.details and not too_large


_TO_CPU = re.compile(r"\bfall(?:ing|s)? ?back (?:to|on) (?:the )?CPU\b|\busing (?:the )?CPU instead\b", re.IGNORECASE)
"""A program's words for going on without the GPU."""


def before_of(reading: LogReading) -> Other | None:
    """Return the lack of device memory that a program handled by going on, on the CPU, where it then failed."""
    facts = reading.failure
    is_on_cpu = facts is not None and (
        facts.kind == "host_allocator" or (memory_of(facts.kind) == "host" and _TO_CPU.search(reading.run.text))
    )
    if facts is None or not is_on_cpu:
        return None
    handled = (each for each in reading.others if each.standing == "caught" and each.line < facts.line)
    return next((each for each in handled if memory_of(each.kind) == "device"), None)


def ranks_of(reading: LogReading) -> tuple[int, ...]:
    """Return the other ranks on which the same request failed."""
    facts = reading.failure
    if facts is None or facts.rank is None or facts.requested_bytes is None:
        return ()
    same = (each for each in reading.others if each.standing == "failure" and each.kind == facts.kind)
    return tuple(
        sorted(
            each.rank
            for each in same
            if each.requested_bytes == facts.requested_bytes and each.rank not in (None, facts.rank)
        )
    )


def follows_lines(reading: LogReading, words: "Words") -> Iterator[str]:
    """Yield sentences on what else the log shows: a lack of memory before the failure, and what follows from it."""
    sentences = wording.words(words.language)
    if (before := before_of(reading)) is not None and before.requested_bytes is not None:
        yield sentences("follows", "gpu_before_requested", requested=before.requested_bytes)
    elif before is not None:
        yield sentences("follows", "gpu_before")
    if reading.failure is not None and "failed_afterwards" in reading.failure.notes:
        yield sentences("follows", "failed_afterwards", afterwards=reading.failure.details["afterwards"])
    if reading.failure is not None and "failed_afterwards_cut" in reading.failure.notes:
        yield sentences("follows", "failed_afterwards_cut")
    kinds = dict.fromkeys(each.kind for each in reading.others if each.standing == "failure")
    yield from (sentences("follows", kind) for kind in kinds if sentences.has("follows", kind))
