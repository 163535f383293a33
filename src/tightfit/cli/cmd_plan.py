"""`tightfit plan`."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tightfit.cli.exits import FAILED, OK, as_json
from tightfit.cli.parser import Parser, capability
from tightfit.cli.progress import Progress, shown
from tightfit.config import Resolved, TrainConfig, read_config
from tightfit.config.sizes import parse_bytes
from tightfit.wording import say

if TYPE_CHECKING:
    from tightfit.planner.planning import Where
    from tightfit.report.sections import Page


def parser() -> Parser:
    found = Parser(
        "plan",
        say("cli.plan.about"),
        usage="[config.py ...] [--key=value ...] [--gpu NAME] [--memory SIZE] [--used SIZE]",
        examples=['tightfit plan configs/train_openwebtext.py --gpu "RTX 3060 12GB" --used 2GiB'],
        takes_keys=TrainConfig,
    )
    found.option("--gpu", say("cli.plan.gpu"))
    found.option("--memory", say("cli.option.gpu_memory"))
    found.add_argument("--used", default="0", help=say("cli.option.used"))
    found.option("--html", say("cli.plan.html"))
    found.option("--capability", say("cli.option.capability"))
    found.flag("--all-gpus", say("cli.plan.all_gpus"))
    found.flag("--json", say("cli.option.json"))
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tightfit.report.page import check_folder, render, write
    from tightfit.report.terminal import page_text

    resolved = read_config(TrainConfig, rest, warn=lambda line: print(line, file=sys.stderr))
    if options.html:
        check_folder(options.html)
    with shown(say("cli.progress.planning")) as progress:
        answer = _survey if options.all_gpus else _plan
        page, record, code = answer(resolved, options, progress)
    if options.html:
        write(render(page, lang=options.lang), options.html)
    print(as_json(record) if options.json else page_text(page))
    return code


def _survey(
    resolved: Resolved[TrainConfig], options: argparse.Namespace, progress: Progress
) -> tuple["Page", object, int]:
    from tightfit.planner.survey import every_card
    from tightfit.report.plan_page import cards_page
    from tightfit.wording.report import words

    rows = every_card(resolved, log=progress.stage, progress=progress.count)
    return cards_page(rows, words(options.lang)), rows, OK


def _plan(
    resolved: Resolved[TrainConfig], options: argparse.Namespace, progress: Progress
) -> tuple["Page", object, int]:
    from tightfit.planner.plan_record import plan_record
    from tightfit.planner.planning import make_plan
    from tightfit.report.plan_page import plan_page
    from tightfit.wording.report import words

    where = _where(resolved.config, options, progress)
    result = make_plan(resolved, where, log=progress.stage, progress=progress.count)
    code = OK if result.choice.best else FAILED
    return plan_page(result, words(options.lang)), plan_record(result), code


def _where(config: TrainConfig, options: argparse.Namespace, progress: Progress) -> "Where":
    from tightfit.planner.planning import where_to_plan

    return where_to_plan(
        config,
        options.gpu,
        memory_bytes=parse_bytes(options.memory) if options.memory else None,
        used_bytes=parse_bytes(options.used),
        capability=capability(options.capability),
        log=progress.stage,
    )
