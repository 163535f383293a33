"""`tightfit sample`."""

import argparse
import sys
from collections.abc import Sequence

from tightfit.cli.exits import OK
from tightfit.cli.parser import Parser
from tightfit.config import SampleConfig, read_config
from tightfit.wording import say


def parser() -> Parser:
    return Parser(
        "sample",
        say("cli.sample.about"),
        usage="[config.py ...] [--key=value ...]",
        examples=["tightfit sample --out_dir=out-shakespeare-char --start='ROMEO:' --num_samples=3"],
        takes_keys=SampleConfig,
    )


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    resolved = read_config(SampleConfig, rest, warn=lambda line: print(line, file=sys.stderr))
    from tightfit.trainer.sample import samples

    for text in samples(resolved.config, log=lambda line: print(line, file=sys.stderr)):
        print(text)
        print("---------------", flush=True)
    return OK
