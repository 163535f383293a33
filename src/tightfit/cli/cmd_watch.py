"""`tightfit watch`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tightfit.cli.exits import OK
from tightfit.cli.parser import Parser
from tightfit.errors import ConfigError


def parser() -> Parser:
    found = Parser(
        "watch",
        "Show the memory of every card and of the host, live; with a run's folder, also its last step.",
        examples=["tightfit watch out-stdlib --log memory.csv"],
    )
    found.add_argument("out_dir", nargs="?", help="the folder of a training run, to show its step and memory too")
    found.add_argument("--interval", type=float, default=1.0, help="seconds between samples (default 1)")
    found.flag("--once", "print one sample, then end")
    found.option("--log", "append every sample to this CSV file")
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if not (math.isfinite(options.interval) and 0.1 <= options.interval <= 3600):
        raise ConfigError(f"--interval must be from 0.1 to 3600 seconds, got {options.interval:g}")
    folder = Path(options.out_dir) if options.out_dir else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name the folder of a run, its out_dir")
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
