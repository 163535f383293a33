"""Sections of a report: made once from a record, then shown as terminal text or as an HTML page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import msgspec

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""Value that JSON can hold."""


class Segment(NamedTuple):
    """Piece of a bar: start and width as shares of the axis, colour as a custom property of the style sheet."""

    start: float
    width: float
    colour: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a caption; `numbers` are the columns set flush right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    bars: Sequence[Sequence[Segment]] = ()
    """Bars below the first cell of each row; the row's figures hold the same facts."""
    limit: float | None = None
    """Share of the bars' axis at which a line stands."""
    tones: Sequence[str] = ()
    """Colour of the second cell of each row: good, bad or nothing."""
    note: str = ""
    is_headed: bool = False
    """A terminal shows the columns' names, too."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Advice below a heading of its own, with lines to paste."""

    title: str
    remark: str
    """Set in bold, in the colour of its tone: good, bad or nothing."""
    tone: str
    text: str = ""
    """Text that follows the remark."""
    code: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Chart for templates/charts, which read `spec`; `summary` describes it in words."""

    spec: Mapping[str, JSON] | msgspec.Struct
    summary: str
    notes: Sequence[str] = ()
    table: Table
    """The chart's figures, for readers who cannot see it."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Heading with the text, tables and chart below it."""

    id: str
    title: str
    page_only: bool = False
    """True for details that a terminal has no room for."""
    chart: Chart | None = None
    tables: Sequence[Table] = ()
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    """Entries of a list."""
    labelled: Sequence[tuple[str, str]] = ()
    """Entries of a numbered list, each after the label of its basis."""
    preformatted: str = ""
    code: str = ""
    """Lines to paste."""
    advice: Sequence[Advice] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """Report from top to bottom."""

    title: str
    verdict: str = ""
    is_bad: bool = False
    facts: Sequence[tuple[str, str, str]] = ()
    """Name, value and a remark."""
    sections: Sequence[Section] = field(default_factory=tuple)
