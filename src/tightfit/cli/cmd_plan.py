"""`tightfit plan`."""

import argparse
import sys
from collections.abc import Sequence

import msgspec

from tightfit.cli.exits import FAILED, OK, as_json
from tightfit.cli.parser import Parser, capability
from tightfit.config import TrainConfig, read_config
from tightfit.config.sizes import parse_bytes


def parser() -> Parser:
    found = Parser(
        "plan",
        "Find the fastest way to fit a run on a device. Keys of the configuration are those of tightfit train.",
        usage="[config.py ...] [--key=value ...] [--gpu NAME] [--memory SIZE] [--used SIZE]",
        examples=['tightfit plan configs/train_openwebtext.py --gpu "RTX 3060 12GB" --used 2GiB'],
        takes_keys=TrainConfig,
    )
    found.option("--gpu", "a card's name, such as 'RTX 3060 12GB'; without it, the card that is here or the processor")
    found.option(
        "--memory", "its total memory as the driver reports it, such as 11.69GiB; host memory for the processor"
    )
    found.add_argument("--used", default="0", help="memory that other programs use, such as 2GiB")
    found.option("--html", "write the plan as a page with charts")
    found.option("--capability", "compute capability of an unknown card, such as 8.6")
    found.flag("--all-gpus", "list the cards that run this configuration, and how fast")
    found.flag("--json", "print the same facts for machines")
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    lang = options.lang
    resolved = read_config(TrainConfig, rest, warn=lambda line: print(line, file=sys.stderr))
    if options.html:
        from tightfit.report.html import check_folder

        check_folder(options.html)
    from tightfit.planner.plan_record import plan_record
    from tightfit.planner.planning import card_here, make_plan, named_card, this_host
    from tightfit.report.plan_terminal import plan_text

    memory = parse_bytes(options.memory) if options.memory else None
    if options.all_gpus:
        from tightfit.planner.survey import every_card
        from tightfit.report.plan_terminal import cards_text

        rows = every_card(resolved, say=_progress)
        print(as_json(rows) if options.json else cards_text(rows))
        return OK
    if options.gpu:
        where = named_card(
            options.gpu,
            memory_bytes=memory,
            used_by_others_bytes=parse_bytes(options.used),
            capability=capability(options.capability),
        )
    else:
        where = (None if resolved.config.device == "cpu" else card_here(limit_bytes=memory)) or this_host(memory)
    result = make_plan(resolved, where, say=_progress)
    if options.html:
        from tightfit.report.html import plan_report, write

        write(plan_report(msgspec.to_builtins(plan_record(result)), lang=lang), options.html)
    print(as_json(plan_record(result)) if options.json else plan_text(result))
    return OK if result.choice.best else FAILED


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)
