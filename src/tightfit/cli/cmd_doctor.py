"""`tightfit doctor`."""

import sys
from collections.abc import Sequence

import msgspec
from rich.console import Console

from tightfit.cli.cmd_train import PREPARED_WHEN_MISSING
from tightfit.cli.keys import last, split_options
from tightfit.cli.main import FAILED, OK, wants_help
from tightfit.config import TrainConfig, read_config
from tightfit.wording import chosen_language


def run(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        print(
            "usage: tightfit doctor [config.py ...] [--key=value ...] [--json] [--lang en|ja]\n\n"
            "Checks this machine, and the run if keys are given: cards, driver, torch, memory, limits, compilers,\n"
            "allocator settings, disk, dataset. It stops no program and changes no setting.\n"
            "Exit code 1 if something would make a run fail.\n\n"
            "example: tightfit doctor configs/train_shakespeare_char.py --device=cuda"
        )
        return OK
    values, flags, rest = split_options(arguments, ["--lang"], ["--json"])
    from tightfit.system.doctor import diagnose, diagnosis, has_problem, print_table
    from tightfit.system.machine import read_machine
    from tightfit.wording.system import words

    said = words(chosen_language(last(values).get("--lang")))
    config = read_config(TrainConfig, rest, warn=lambda line: print(line, file=sys.stderr)).config if rest else None
    checks = diagnose(read_machine(), config, prepares_itself=PREPARED_WHEN_MISSING)
    if flags:
        print(msgspec.json.format(msgspec.json.encode(diagnosis(checks, said)), indent=2).decode())
    else:
        print_table(checks, said, Console(highlight=False, emoji=False))
    return FAILED if has_problem(checks) else OK
