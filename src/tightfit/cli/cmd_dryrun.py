"""`tightfit dryrun`."""

import argparse
import os
import sys
from collections.abc import Sequence

from tightfit.cli.exits import FAILED, OK, as_json
from tightfit.cli.parser import Parser, capability
from tightfit.config.sizes import parse_bytes
from tightfit.errors import ConfigError
from tightfit.vgpu.records import Findings, Settings


def parser() -> Parser:
    found = Parser(
        "dryrun",
        "Run a PyTorch training script on a virtual GPU: its memory, or the line where it would fail.\n"
        "The script runs with your user's rights: run only scripts that you trust.",
        usage="--gpu NAME [options] script.py [its own arguments]",
        examples=['tightfit dryrun --gpu "RTX 3060" --used 2GiB train.py --batch_size=64'],
    )
    found.add_argument("--gpu", required=True, help="a card's name, such as 'RTX 3060 12GB', 4090, A100 or H200")
    found.option("--memory", "its total memory as the driver reports it, such as 11.69GiB")
    found.add_argument("--used", default="0", help="memory that other programs use, such as 2GiB")
    found.option("--context", "memory outside PyTorch's allocator, instead of the table's estimate")
    found.option("--capability", "compute capability of an unknown card, such as 8.6")
    found.add_argument("--steps", type=int, help="stop after so many optimizer steps")
    found.add_argument("--timeout", type=float, help="stop after so many seconds")
    found.option("--snapshot", "write PyTorch's memory snapshot (.pickle) for its viewer")
    found.option("--timeline", "draw memory over time to a .png or .svg file")
    found.option("--html", "write a page with charts of memory and its tensors")
    found.add_argument("--no-explain", dest="explain", action="store_false", help="do not explain why it fails")
    found.flag("--json", "print the same facts for machines")
    found.add_argument("script", help="the training script")
    found.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.timeline and not options.timeline.lower().endswith((".png", ".svg")):
        raise ConfigError(f"--timeline={options.timeline} must end in .png or .svg")
    from tightfit.simulation.dry_run import dryrun_script

    found = dryrun_script(options.script, options.arguments, settings_of(options))
    _write_pictures(found, options)
    if options.json:
        print(as_json(found))
    else:
        _show(found, options)
    return OK if found.outcome == "fits" else FAILED


def settings_of(options: argparse.Namespace) -> Settings:
    """Return what is asked of the virtual GPU. ConfigError for a size that cannot be read."""
    return Settings(
        gpu=options.gpu,
        memory_bytes=parse_bytes(options.memory) if options.memory else None,
        used_bytes=parse_bytes(options.used),
        context_bytes=parse_bytes(options.context) if options.context else None,
        capability=capability(options.capability),
        steps=options.steps,
        timeout_s=options.timeout,
        timeline=bool(options.timeline or options.html),
        snapshot=os.path.abspath(options.snapshot) if options.snapshot else None,
    )


def _write_pictures(found: Findings, options: argparse.Namespace) -> None:
    if options.timeline and found.timeline:
        from tightfit.report.timeline_picture import timeline_picture

        timeline_picture(found.timeline, options.timeline, card=found.gpu.name, outcome=found.outcome)
    if options.html:
        from tightfit.report.html import findings_report, write

        write(findings_report(found, lang=options.lang), options.html)


def _show(found: Findings, options: argparse.Namespace) -> None:
    from tightfit.report.dryrun_page import dryrun_page
    from tightfit.report.terminal import page_text
    from tightfit.wording.report import words

    sys.stderr.flush()
    print(page_text(dryrun_page(found, words(options.lang))), flush=True)
    if found.failure and options.explain:
        from tightfit.cli.explained import text_for_terminal
        from tightfit.diagnosis.explaining import explain_dryrun

        print(f"\n{text_for_terminal(explain_dryrun(found, options.script, options.arguments, lang=options.lang))}")
