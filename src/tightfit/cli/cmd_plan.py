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
from tightfit.errors import ConfigError
from tightfit.wording import say

if TYPE_CHECKING:
    from tightfit.planner.planning import Where
    from tightfit.report.sections import Page


def parser() -> Parser:
    found = Parser(
        "plan",
        say("cli.plan.about"),
        usage="[config.py ...] [--key=value ...] [--gpu NAME] [--memory SIZE] [--used SIZE]",
        examples=[
            'tightfit plan configs/train_openwebtext.py --gpu "RTX 3060 12GB" --used 2GiB',
            'tightfit plan configs/train_openwebtext.py --gpu "2x8x A100 80GB"',
        ],
        takes_keys=TrainConfig,
    )
    found.option("--gpu", say("cli.plan.gpu"))
    found.option("--memory", say("cli.option.gpu_memory"))
    found.add_argument("--used", default="0", help=say("cli.option.used"))
    found.option("--html", say("cli.plan.html"))
    found.option("--capability", say("cli.option.capability"))
    found.option("--cards", say("cli.plan.cards"))
    found.option("--link", say("cli.plan.link"))
    found.option("--network", say("cli.plan.network"))
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
    if unused := [name for name in ("cards", "link", "network") if getattr(options, name)]:
        raise ConfigError(say("cli.dryrun.not_with", option=f"--{unused[0]}", question="--all-gpus"))
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

    where = _where(resolved, options, progress)
    result = make_plan(resolved, where, log=progress.stage, progress=progress.count)
    code = OK if result.choice.best else FAILED
    return plan_page(result, words(options.lang)), plan_record(result), code


def _where(resolved: Resolved[TrainConfig], options: argparse.Namespace, progress: Progress) -> "Where":
    from tightfit.links import read_count, split_count
    from tightfit.planner.planning import where_to_plan, with_cards
    from tightfit.planner.smallest import smallest_set

    nodes, per_node, gpu = split_count(options.gpu) if options.gpu else (1, 1, None)
    is_counted = nodes * per_node > 1
    if options.cards and is_counted:
        raise ConfigError(say("cli.plan.counted_twice", gpu=options.gpu, cards=options.cards))
    if options.cards and options.cards != "auto":
        nodes, per_node = read_count(options.cards)
    links = {"link": options.link or "", "network": options.network or ""}
    if any(links.values()) and nodes * per_node == 1 and options.cards != "auto":
        raise ConfigError(say("cli.plan.link_of_one"))
    where = where_to_plan(
        resolved.config,
        gpu,
        memory_bytes=parse_bytes(options.memory) if options.memory else None,
        used_bytes=parse_bytes(options.used),
        capability=capability(options.capability),
        log=progress.stage,
    )
    if options.cards == "auto":
        return smallest_set(resolved, where, **links, log=progress.stage, progress=progress.count)
    if nodes * per_node > 1:
        return with_cards(where, nodes, per_node, **links)
    return where
