"""Variants of one command side by side: the peak by category and by line of the user's code."""

import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec

from tightfit.config.knob import Variant, find_knob
from tightfit.errors import ConfigError
from tightfit.questions.asking import Asked
from tightfit.simulation.details import Detail, Held, StepTime
from tightfit.units import MIB
from tightfit.vgpu.records import CATEGORIES, Place, VirtualCard
from tightfit.wording import say

_MOST_LINES = 40
_SMALL = MIB
"""Bytes below which the difference of a line is not shown."""
K = TypeVar("K", bound=Hashable)


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One variant."""

    change: str
    """Words that make it, as given."""
    outcome: str
    device_bytes: int
    """Peak of the process; where it failed, with the request that failed."""
    free_bytes: int
    phase: str
    """Phase of the peak, or of the failure."""
    reason: str
    step: StepTime | None
    """Estimate of a step's time; None if it did not make two steps."""


class CategoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one category at the peak of each variant."""

    category: str
    bytes: list[int]


class LineRow(Place, frozen=True, kw_only=True):
    """Bytes that one line of the user's code holds at the peak of each variant."""

    function: str
    category: str
    """Category of most of these bytes."""
    bytes: list[int]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Variants side by side, as `tightfit dryrun --compare --json` prints them."""

    script: str
    gpu: VirtualCard
    sides: list[Side]
    categories: list[CategoryRow]
    lines: list[LineRow]
    """The lines that differ, the largest difference first."""
    other_bytes: list[int]
    """Allocated bytes of the lines that do not differ, or little."""
    not_modelled: list[str]
    """Memory that the plays leave out."""
    plays: int
    seconds: float


def compare(asked: Asked, changes: Sequence[str]) -> Comparison:
    """Play each variant. ConfigError for fewer than two, or one that cannot be read or run."""
    if len(changes) < 2:
        raise ConfigError(say("questions.compare.one"))
    started, played = time.monotonic(), asked.simulator.played
    variants = [varied(asked.variant, change) for change in changes]
    details = [asked.must_run(each) for each in asked.play([asked.request(each) for each in variants])]
    lines, others = _lines(details)
    return Comparison(
        script=asked.script,
        gpu=details[0].findings.gpu,
        sides=[_side(change, each) for change, each in zip(changes, details, strict=True)],
        categories=_categories(details),
        lines=lines,
        other_bytes=others,
        not_modelled=list(dict.fromkeys(what for each in details for what in each.findings.not_modelled)),
        plays=asked.simulator.played - played,
        seconds=round(time.monotonic() - started, 1),
    )


def varied(variant: Variant, change: str) -> Variant:
    """Return the variant with the words of `change`: each replaces the argument or variable of its name, or is added.

    ConfigError for words that are no shell words.
    """
    try:
        words = shlex.split(change)
    except ValueError as error:
        raise ConfigError(say("questions.compare.unreadable", change=change, reason=error)) from None
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if not equals and option.startswith("-") and words and not words[0].startswith("-"):
            value = words.pop(0)
            equals = " "
        known = find_knob(variant, option) if equals and option.lstrip("-+").replace("-", "").isidentifier() else None
        if known is not None and known.kind != "added":
            variant = known.set(variant, value)
        elif equals == "=" and option.isupper():
            variant = replace(variant, environ={**variant.environ, option: value})
        else:
            added = (word, value) if equals == " " else (word,)
            variant = replace(variant, words=(*variant.words, *added))
    return variant


def _side(change: str, detail: Detail) -> Side:
    found = detail.findings
    return Side(
        change=change,
        outcome=found.outcome,
        device_bytes=found.needed_bytes,
        free_bytes=found.left_bytes,
        phase=found.failure.phase if found.failure else found.peak.phase,
        reason=found.stopped_because,
        step=detail.step,
    )


def _categories(details: Sequence[Detail]) -> list[CategoryRow]:
    table = [[each.findings.categories.get(name, 0) for each in details] for name in CATEGORIES]
    return [CategoryRow(category=name, bytes=row) for name, row in zip(CATEGORIES, table, strict=True) if any(row)]


def _lines(details: Sequence[Detail]) -> tuple[list[LineRow], list[int]]:
    """Sum tensors by line, and set those apart that differ between variants.

    A compiled variant knows the line of a method, but not its class.
    """
    sums = [summed(each.held, lambda held: (held.file, held.line)) for each in details]
    all_held = [held for each in details for held in each.held]
    by_category = summed(all_held, lambda held: (held.file, held.line, held.category))
    functions = {
        (held.file, held.line): held.function for held in sorted(all_held, key=lambda held: len(held.function))
    }
    rows, others = [], [0] * len(details)
    for key in dict.fromkeys(key for each in sums for key in each):
        row = [each.get(key, 0) for each in sums]
        file, line = key
        most = max((nbytes, name[2]) for name, nbytes in by_category.items() if name[:2] == key)
        rows.append(LineRow(file=file, line=line, function=functions[key], category=most[1], bytes=row))
    rows.sort(key=lambda each: -(max(each.bytes) - min(each.bytes)))
    shown = [each for each in rows if max(each.bytes) - min(each.bytes) >= _SMALL][:_MOST_LINES]
    for rest in rows:
        if rest not in shown:
            others = [one + other for one, other in zip(others, rest.bytes, strict=True)]
    return shown, others


def summed(held: Iterable[Held], key: Callable[[Held], K]) -> dict[K, int]:
    """Sum the bytes of tensors by `key`."""
    sums: dict[K, int] = defaultdict(int)
    for each in held:
        sums[key(each)] += each.bytes
    return sums
