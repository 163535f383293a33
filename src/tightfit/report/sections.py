"""The parts of a report: made once from a record, and shown as one HTML page or as text in a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec


class Segment(NamedTuple):
    """A piece of a bar; `start` and `width` are shares of the axis, `colour` a custom property of the style sheet."""

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
    """For each row, the bar below its first cell. The row has the same figures."""
    limit: float | None = None
    """Share of the bars' axis at which a line stands."""
    tones: Sequence[str] = ()
    """For each row good, bad or nothing: the colour of its second cell."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A piece of advice below a heading of its own, with lines to paste."""

    title: str
    remark: str
    """Set in bold, in the colour of its tone: good, bad or nothing."""
    tone: str
    text: str = ""
    """Goes on behind the remark."""
    code: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Data of a chart for templates/charts, and the same in a sentence and a table. The terminal leaves it out."""

    spec: Mapping[str, Any] | msgspec.Struct
    summary: str
    notes: Sequence[str] = ()
    table: Table
    """The same figures for a reader who does not see the chart."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with paragraphs, lists, tables or a chart."""

    id: str
    title: str
    page_only: bool = False
    """True for details that a terminal has no room for."""
    chart: Chart | None = None
    tables: Sequence[Table] = ()
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    """A list."""
    labelled: Sequence[tuple[str, str]] = ()
    """A numbered list: the basis of each entry, and the entry."""
    preformatted: str = ""
    code: str = ""
    """Lines to paste."""
    advice: Sequence[Advice] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report from top to bottom."""

    title: str
    verdict: str = ""
    is_bad: bool = False
    facts: Sequence[tuple[str, str, str]] = ()
    """Name, value and a remark."""
    sections: Sequence[Section] = field(default_factory=tuple)
