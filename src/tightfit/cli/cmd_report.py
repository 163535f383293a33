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

_HTML = "--html"


def parser() -> Parser:
    found = Parser(
        "report",
        "Write a training run as one HTML file that needs no network: loss, rate, memory, events, configuration.",
        examples=["tightfit report out-stdlib --out report.html --lang ja"],
    )
    found.add_argument("out_dir", help="the folder of a training run")
    found.option("--out", "the file to write (default: report.html in that folder)")
    found.option("--plan", "output of plan --json, to show its alternatives and prediction")
    found.option("--dryrun", "output of dryrun --json --timeline, to show memory within a step")
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tightfit.report.html import run_report, write
    from tightfit.report.runs import read_object
    from tightfit.vgpu.records import read_findings

    plan = read_object(Path(options.plan)) if options.plan else None
    findings = read_findings(Path(options.dryrun)) if options.dryrun else None
    if findings is not None and findings.timeline is None:
        raise DataError(f"--dryrun={options.dryrun} has no timeline; make it with dryrun --json --timeline memory.png")
    html = run_report(options.out_dir, lang=options.lang, plan=plan, findings=findings)
    goal = Path(options.out or Path(options.out_dir, "report.html"))
    write(html, goal)
    print(_written(goal, html))
    return OK


def _written(goal: Path, html: str) -> str:
    return f"{goal}: {len(html.encode()) / 1000:,.0f} kB; open it in a browser"


@contextlib.contextmanager
def page_at_end(file: str | None, config: TrainConfig) -> Iterator[None]:
    """Write the page of a run when it has ended, in whatever way; what goes wrong with it is only told.

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
    from tightfit.report.html import run_report, write
    from tightfit.wording import chosen_language

    try:
        html = run_report(config.out_dir, lang=chosen_language(None), config=to_dict(config))
        write(html, goal)
        print(_written(goal, html), flush=True)
    except TightfitError as error:
        print(f"tightfit: {_HTML}: {error}", file=sys.stderr, flush=True)
