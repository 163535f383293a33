"""`tightfit watch`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tightfit.cli.exits import OK
from tightfit.cli.parser import Parser
from tightfit.errors import ConfigError
from tightfit.wording import say


def parser() -> Parser:
    found = Parser(
        "watch",
        say("cli.watch.about"),
        examples=["tightfit watch out-stdlib --log memory.csv"],
    )
    found.add_argument("out_dir", nargs="?", help=say("cli.watch.out_dir"))
    found.add_argument("--interval", type=float, default=1.0, help=say("cli.watch.interval"))
    found.flag("--once", say("cli.watch.once"))
    found.option("--log", say("cli.watch.log"))
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if not (math.isfinite(options.interval) and 0.1 <= options.interval <= 3600):
        raise ConfigError(say("cli.watch.bad_interval", given=options.interval))
    folder = Path(options.out_dir) if options.out_dir else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(say("cli.watch.is_a_file", path=folder))
    from tightfit.system.watch import watch
    from tightfit.wording.system import words

    watch(
        folder,
        interval_s=options.interval,
        once=options.once,
        log=Path(options.log) if options.log else None,
        console=Console(highlight=False, emoji=False, markup=False),
        words=words(options.lang),
    )
    return OK
