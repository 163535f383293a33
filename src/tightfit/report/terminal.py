"""A report as text for a terminal."""

import io
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from tightfit.report.sections import Page, Section, Segment, Table

_WIDTH = 110
_BAR = 24
_BAR_COLUMN = 2
_INDENT = (0, 0, 0, 2)


def page_text(page: Page) -> str:
    """Render a page in at most 110 columns, without charts and without sections that only a page shows."""
    out = io.StringIO()
    console = Console(file=out, width=_WIDTH, color_system=None, legacy_windows=False)
    _lines(console, [page.verdict])
    if page.facts:
        console.print(Padding(_grid(page.facts, numbers=frozenset({1})), _INDENT))
    for section in page.sections:
        if not section.page_only and section.chart is None:
            _section(console, section)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _section(console: Console, section: Section) -> None:
    _lines(console, ["", section.title, *section.paragraphs])
    pasted = [*section.preformatted.splitlines(), *section.code.splitlines()]
    for line in pasted:
        console.print(Text(f"    {line}"), soft_wrap=True)
    for point in section.points:
        console.print(Padding(Text(point), _INDENT))
    for table in section.tables:
        if table.caption != section.title:
            _lines(console, [table.caption])
        moved = frozenset(column + (column >= _BAR_COLUMN and bool(table.bars)) for column in table.numbers)
        console.print(Padding(_grid(_rows(table), numbers=moved), _INDENT))


def _rows(table: Table) -> list[list[str]]:
    """Put the bar of each row behind its second cell, and the columns' names above a headed table."""
    bars = [[_bar(each)] for each in table.bars]
    rows = [[*row[:_BAR_COLUMN], *bar, *row[_BAR_COLUMN:]] for row, bar in zip_longest(table.rows, bars, fillvalue=())]
    return [[*table.columns], *rows] if table.is_headed else rows


def _lines(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(Text(line))


def _grid(rows: Sequence[Sequence[str]], *, numbers: frozenset[int]) -> Grid:
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for column in range(max(map(len, rows), default=0)):
        grid.add_column(justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _bar(segments: Sequence[Segment]) -> str:
    """Draw segments as blocks, each at least one wide."""
    drawn = ""
    for each in segments:
        drawn = f"{drawn:<{min(_BAR - 1, round(_BAR * each.start))}}" + "█" * max(1, round(_BAR * each.width))
    return f"{drawn:<{_BAR}}"
