"""`tightfit plan`."""

import sys
from collections.abc import Sequence

import msgspec

from tightfit.cli.keys import as_json, capability, last, split_options
from tightfit.cli.main import FAILED, OK, wants_help
from tightfit.config import TrainConfig, read_config
from tightfit.units import parse_bytes
from tightfit.wording import chosen_language

_OPTIONS = {
    "--gpu": "a card's name, such as 'RTX 3060 12GB'; without it the card that is here, or the processor",
    "--memory": "its total memory as the driver reports it, such as 11.69GiB; of the processor: what may be used",
    "--used": "memory that other programs use, such as 2GiB",
    "--html": "write the plan as a page with charts",
    "--lang": "of that page: en or ja; without it, as the locale says",
    "--capability": "compute capability of a card that is not known, such as 8.6",
}
_FLAGS = {"--all-gpus": "which cards run this configuration, and how fast", "--json": "the same facts for machines"}


def run(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        print(_help())
        return OK
    values, flags, rest = split_options(arguments, _OPTIONS, _FLAGS)
    options = last(values)
    lang = chosen_language(options.get("--lang"))
    resolved = read_config(TrainConfig, rest, warn=lambda line: print(line, file=sys.stderr))
    if "--html" in options:
        from tightfit.report.html import check_folder

        check_folder(options["--html"])
    from tightfit.planner.plan_record import plan_record
    from tightfit.planner.planning import card_here, make_plan, named_card, this_host
    from tightfit.report.plan_terminal import plan_text

    memory = parse_bytes(options["--memory"]) if "--memory" in options else None
    if "--all-gpus" in flags:
        from tightfit.planner.survey import every_card
        from tightfit.report.plan_terminal import cards_text

        rows = every_card(resolved, say=_progress)
        print(as_json(rows) if "--json" in flags else cards_text(rows))
        return OK
    if "--gpu" in options:
        where = named_card(
            options["--gpu"],
            memory_bytes=memory,
            used_by_others_bytes=parse_bytes(options.get("--used", "0")),
            capability=capability(options.get("--capability")),
        )
    else:
        where = (None if resolved.config.device == "cpu" else card_here()) or this_host(memory)
    result = make_plan(resolved, where, say=_progress)
    if "--html" in options:
        from tightfit.report.html import plan_report, write

        write(plan_report(msgspec.to_builtins(plan_record(result)), lang=lang), options["--html"])
    print(as_json(plan_record(result)) if "--json" in flags else plan_text(result))
    return OK if result.choice.best else FAILED


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def _help() -> str:
    lines = "\n".join(f"  {name:<13} {text}" for name, text in {**_OPTIONS, **_FLAGS}.items())
    return (
        "usage: tightfit plan [config.py ...] [--key=value ...] [--gpu NAME] [--memory SIZE] [--used SIZE]\n\n"
        'example: tightfit plan configs/train_openwebtext.py --gpu "RTX 3060 12GB" --used 2GiB\n\n'
        f"{lines}\n\nKeys of the configuration are those of tightfit train."
    )
