"""Long series made short enough for a page, and no peak lost: spans with their lowest, highest and mean values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SPANS = 1000
"""Spans of a curve: a screen has hardly more columns."""
_DIGITS = 6

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps. Where points were put together into spans, `low` and `high` hold the extremes of each."""

    x: list[float]
    mean: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    points: int
    """Points that it was made of."""
    not_finite: int = 0
    """Values that were no numbers, as of a run that diverged; they are left out."""


def curve(points: Sequence[tuple[float, float]], spans: int = SPANS) -> Curve:
    """`points` as (step, value) in order of steps; up to two for each of `spans` are kept as they are.

    >>> curve([(0, 1.0), (1, 9.0), (2, 2.0), (3, 4.0), (4, 3.0)], spans=2).high
    [9, 4]
    """
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    finite = np.isfinite(table[:, 1])
    dropped = int(len(table) - finite.sum())
    table = table[finite]
    if len(table) <= 2 * spans:
        return Curve(x=_plain(table[:, 0]), mean=_short(table[:, 1]), points=len(table), not_finite=dropped)
    starts = _starts(len(table), spans)
    counts = np.diff([*starts, len(table)])
    x, y = table[:, 0], table[:, 1]
    return Curve(
        x=_plain(np.round(np.add.reduceat(x, starts) / counts)),
        mean=_short(np.add.reduceat(y, starts) / counts),
        low=_short(np.minimum.reduceat(y, starts)),
        high=_short(np.maximum.reduceat(y, starts)),
        points=len(table),
        not_finite=dropped,
    )


def highest(points: Sequence[tuple[float, float]], spans: int = SPANS) -> Curve:
    """The same by the highest value of each span, at the step where it was."""
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    table = table[np.isfinite(table[:, 1])]
    if len(table) <= 2 * spans:
        return Curve(x=_plain(table[:, 0]), mean=_short(table[:, 1]), points=len(table))
    edges = [*_starts(len(table), spans), len(table)]
    kept = [start + int(np.argmax(table[start:end, 1])) for start, end in pairwise(edges)]
    return Curve(x=_plain(table[kept, 0]), mean=_short(table[kept, 1]), points=len(table))


def _starts(count: int, spans: int) -> list[int]:
    return sorted({count * span // spans for span in range(spans)})


def _plain(values: Numbers) -> list[float]:
    """Whole numbers as such: they are shorter."""
    return [int(value) if value.is_integer() else value for value in values.tolist()]


def _short(values: Numbers) -> list[float]:
    """Six significant digits, more than a screen can show; bytes stay whole."""
    return [int(v) if v.is_integer() else float(f"{v:.{_DIGITS}g}") for v in values.tolist()]


def median(values: Sequence[float]) -> float | None:
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else None
