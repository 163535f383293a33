"""`tightfit report`."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tightfit.cli.exits import OK
from tightfit.cli.parser import Parser
from tightfit.config import TrainConfig, to_dict
from tightfit.errors import DataError, TightfitError
from tightfit.wording import chosen_language, say

_HTML = "--html"


def parser() -> Parser:
    found = Parser(
        "report",
        say("cli.report.about"),
        examples=["tightfit report out-stdlib --out report.html --lang ja"],
    )
    found.add_argument("out_dir", help=say("cli.report.out_dir"))
    found.option("--out", say("cli.report.out"))
    found.option("--plan", say("cli.report.plan"))
    found.option("--dryrun", say("cli.report.dryrun"))
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tightfit.report.html import run_report
    from tightfit.report.page import write
    from tightfit.report.runs import read_object
    from tightfit.vgpu.records import read_findings

    plan = read_object(Path(options.plan)) if options.plan else None
    findings = read_findings(Path(options.dryrun)) if options.dryrun else None
    if findings is not None and findings.timeline is None:
        raise DataError(say("cli.report.no_timeline", file=options.dryrun))
    html = run_report(options.out_dir, lang=options.lang, plan=plan, findings=findings)
    goal = Path(options.out or Path(options.out_dir, "report.html"))
    write(html, goal)
    print(_written(goal, html))
    return OK


def _written(goal: Path, html: str) -> str:
    return say("cli.report.written", goal=goal, size=f"{len(html.encode()) / 1000:,.0f} kB")


@contextlib.contextmanager
def page_at_end(file: str | None, config: TrainConfig) -> Iterator[None]:
    """Write the page of a run when it ends, in whatever way; a page that cannot be written is only a warning.

    DataError at once for a place where no file can be written.
    """
    if file is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    from tightfit.report.page import check_folder

    goal = Path(file)
    check_folder(goal)
    before = _state(config.out_dir)
    has_ended = False
    try:
        yield
        has_ended = True
    finally:
        if has_ended or _state(config.out_dir) != before:  # else what is there is of a run before
            _write_page(goal, config)


def _state(out_dir: str) -> tuple[int, int] | None:
    from tightfit.storage import METRICS

    with contextlib.suppress(OSError):
        found = Path(out_dir, METRICS).stat()
        return found.st_mtime_ns, found.st_size
    return None


def _write_page(goal: Path, config: TrainConfig) -> None:
    from tightfit.report.html import run_report
    from tightfit.report.page import write

    try:
        html = run_report(config.out_dir, lang=chosen_language(None), config=to_dict(config))
        write(html, goal)
        print(_written(goal, html), flush=True)
    except TightfitError as error:
        print(f"tightfit: {_HTML}: {error}", file=sys.stderr, flush=True)
