"""The memory of a card as a table with bars: each part begins where the one before it ends, up to the card's end."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from tightfit.report.sections import Segment, Table
from tightfit.report.timeline_picture import CATEGORY_COLOURS
from tightfit.units import format_bytes
from tightfit.wording.report import Words

OTHERS, OUTSIDE, CACHE, MARGIN, ALARM, GOOD = "--others", "--outside", "--cache", "--margin", "--alarm", "--good"
"""Custom properties of the style sheet."""


class Part(NamedTuple):
    """Part of a card's memory."""

    name: str
    bytes: int
    colour: str
    basis: str = ""
    """Source of the figure. Without one in any part the table has no such column."""


def colour_of(category: str) -> str:
    """Return the chart's colour of a category, or that of the rest.

    >>> colour_of("optimizer state"), colour_of("of another version")
    ('--c-optimizer-state', '--c-other')
    """
    return f"--c-{category.replace(' ', '-')}" if category in CATEGORY_COLOURS else "--c-other"


def parts_table(caption: str, parts: Sequence[Part], total_bytes: int, t: Words) -> Table:
    """Parts of `total_bytes`, or of more than there is; those of no bytes are left out."""
    kept = [each for each in parts if each.bytes > 0]
    ends = [0, *accumulate(each.bytes for each in kept)]
    axis = max(total_bytes, ends[-1])
    columns = ["part", "bytes", "share", *(["basis"] if any(each.basis for each in kept) else [])]
    cells = [[each.name, format_bytes(each.bytes), _share(each.bytes / total_bytes), each.basis] for each in kept]
    return Table(
        caption=caption,
        columns=[t("bars", key) for key in columns],
        rows=[row[: len(columns)] for row in cells],
        numbers=frozenset({1, 2}),
        bars=[[Segment(start / axis, each.bytes / axis, each.colour)] for start, each in zip(ends, kept, strict=False)],
        limit=total_bytes / axis,
        note=t("bars", "note", total=format_bytes(total_bytes)),
    )


def _share(of_card: float) -> str:
    """In per cent; nothing that is there is shown as zero.

    >>> _share(0.5249), _share(0.0001)
    ('52.5%', '< 0.1%')
    """
    return f"{of_card:.1%}" if of_card >= 0.001 else "< 0.1%"
