"""`tightfit dryrun`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from tightfit.cli.keys import capability
from tightfit.cli.main import FAILED, OK
from tightfit.errors import ConfigError
from tightfit.units import parse_bytes


def run(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(list(arguments))
    if options.timeline and not options.timeline.lower().endswith((".png", ".svg")):
        raise ConfigError(f"--timeline={options.timeline} must end in .png or .svg")
    from tightfit.vgpu.worker import dryrun_script
    from tightfit.wording import chosen_language

    lang = chosen_language(options.lang)
    found = dryrun_script(
        options.script,
        options.arguments,
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
    if options.timeline:
        from tightfit.report.timeline_picture import timeline_picture

        timeline_picture(found, options.timeline)
    if options.html:
        from tightfit.report.html import findings_report, write

        write(findings_report(found, lang=lang), options.html)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        from tightfit.report.dryrun_terminal import dryrun_text

        sys.stderr.flush()
        print(dryrun_text(found), flush=True)
        if found["failure"] and options.explain:
            from tightfit.cli.explained import text_for_terminal
            from tightfit.diagnosis.explanation import explain_dryrun

            print(f"\n{text_for_terminal(explain_dryrun(found, options.script, options.arguments, lang=lang))}")
    return OK if found["outcome"] == "fits" else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tightfit dryrun",
        description="Run a PyTorch training script on a virtual GPU: what it would use, or where it would fail. "
        "The script runs with your user's rights: run only scripts that you trust.",
        epilog='example: tightfit dryrun --gpu "RTX 3060" --used 2GiB train.py --batch_size=64',
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", required=True, help="a card's name, such as 'RTX 3060 12GB', 4090, A100 or H200")
    parser.add_argument("--memory", help="its total memory as the driver reports it, such as 11.69GiB")
    parser.add_argument("--used", default="0", help="memory that other programs use, such as 2GiB")
    parser.add_argument("--context", help="memory outside PyTorch's allocator, instead of the table's estimate")
    parser.add_argument("--capability", help="compute capability of an unknown card, such as 8.6")
    parser.add_argument("--steps", type=int, help="stop after so many optimizer steps")
    parser.add_argument("--timeout", type=float, help="stop after so many seconds")
    parser.add_argument("--snapshot", help="write PyTorch's memory snapshot (.pickle) for its viewer")
    parser.add_argument("--timeline", help="draw memory over time to a .png or .svg file")
    parser.add_argument("--html", help="write a page with charts of memory and its tensors")
    parser.add_argument("--no-explain", dest="explain", action="store_false", help="do not explain why it fails")
    parser.add_argument("--lang", help="of explanation and page: en or ja; without it, as the locale says")
    parser.add_argument("--json", action="store_true", help="the same facts for machines")
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    return parser
