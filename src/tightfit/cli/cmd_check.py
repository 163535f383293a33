"""`tightfit check`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tightfit.cli.exits import FAILED, OK, as_json
from tightfit.cli.parser import Parser
from tightfit.cli.progress import shown
from tightfit.wording import say

if TYPE_CHECKING:
    from tightfit.questions.check import CheckReport


def parser() -> Parser:
    found = Parser("check", say("cli.check.about"), usage="[memory.toml]", examples=["tightfit check memory.toml"])
    found.add_argument("file", nargs="?", default="memory.toml", help=say("cli.check.file"))
    found.flag("--update", say("cli.check.update"))
    found.option("--junit", say("cli.check.junit"))
    found.option("--summary", say("cli.check.summary"))
    found.flag("--json", say("cli.option.json"))
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tightfit.questions.check import check, write_junit, write_summary
    from tightfit.simulation.client import Simulator

    text = say("cli.progress.checking_file", file=options.file)
    with shown(text) as progress, Simulator(progress=progress.count) as simulator:
        report = check(Path(options.file), simulator, update=options.update)
    if options.junit:
        write_junit(report, Path(options.junit))
    if options.summary:
        write_summary(report, Path(options.summary))
    print(as_json(report) if options.json else _text(report), flush=True)
    return FAILED if report.failed else OK


def _text(report: "CheckReport") -> str:
    from tightfit.questions.check import table_rows
    from tightfit.report.sections import Page, Section, Table
    from tightfit.report.terminal import page_text

    title = say("questions.check.title", failed=report.failed, count=len(report.scripts))
    columns = [cell.strip() for cell in say("questions.check.columns").strip("| ").split("|")]
    rows = list(table_rows(report.scripts).values())
    table = Table(caption=title, columns=columns, rows=rows, numbers=frozenset({2, 3, 4}), is_headed=True)
    sections = [Section(id="scripts", title=title, tables=[table])]
    sections += [
        Section(id=each.name, title=each.name, paragraphs=each.problems) for each in report.scripts if each.problems
    ]
    if report.written:
        sections.append(Section(id="written", title=say("questions.check.written", path=report.written)))
    return page_text(Page(title=title, sections=sections)).strip()
