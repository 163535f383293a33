"""`tightfit report`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tightfit.cli.main import OK
from tightfit.errors import DataError


def run(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(list(arguments))
    from tightfit.report.html import run_report, write
    from tightfit.report.runs import read_object
    from tightfit.report.words import locale_language

    plan = read_object(Path(options.plan)) if options.plan else None
    findings = read_object(Path(options.dryrun)) if options.dryrun else None
    if findings is not None and "timeline" not in findings:
        raise DataError(f"--dryrun={options.dryrun} has no timeline; make it with dryrun --json --timeline memory.png")
    html = run_report(options.out_dir, lang=options.lang or locale_language(), plan=plan, findings=findings)
    goal = Path(options.out or Path(options.out_dir, "report.html"))
    write(html, goal)
    print(f"{goal}: {len(html.encode()) / 1000:,.0f} kB; open it in a browser")
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tightfit report",
        description="A training run as one HTML file that needs no network: loss, rate, memory, events, configuration.",
        epilog="example: tightfit report out-stdlib --out report.html --lang ja",
        allow_abbrev=False,
    )
    parser.add_argument("out_dir", help="the folder of a training run")
    parser.add_argument("--out", help="the file to write (default: report.html in that folder)")
    parser.add_argument("--lang", help="en or ja (default: as the locale says)")
    parser.add_argument("--plan", help="what plan --json printed, to show its alternatives and prediction")
    parser.add_argument("--dryrun", help="what dryrun --json --timeline printed, to show memory within a step")
    return parser
