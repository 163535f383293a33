"""`tightfit doctor`."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from tightfit.cli.cmd_train import PREPARED_WHEN_MISSING
from tightfit.cli.exits import FAILED, OK, as_json
from tightfit.cli.parser import Parser
from tightfit.config import TrainConfig, read_config
from tightfit.wording import say


def parser() -> Parser:
    found = Parser(
        "doctor",
        say("cli.doctor.about"),
        usage="[config.py ...] [--key=value ...] [--json] [--lang en|ja]",
        examples=["tightfit doctor configs/train_shakespeare_char.py --device=cuda"],
        takes_keys=TrainConfig,
    )
    found.flag("--json", say("cli.option.json"))
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tightfit.system.doctor import diagnose, diagnosis, has_problem, print_table
    from tightfit.system.machine import read_machine
    from tightfit.wording.system import words

    said = words(options.lang)
    config = read_config(TrainConfig, rest, warn=lambda line: print(line, file=sys.stderr)).config if rest else None
    checks = diagnose(read_machine(), config, prepares_itself=PREPARED_WHEN_MISSING)
    if options.json:
        print(as_json(diagnosis(checks, said)))
    else:
        print_table(checks, said, Console(highlight=False, emoji=False))
    return FAILED if has_problem(checks) else OK
