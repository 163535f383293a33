"""`tightfit sample`."""

import sys
from collections.abc import Sequence

from tightfit.cli.keys import keys_help
from tightfit.cli.main import OK, wants_help
from tightfit.config import SampleConfig, read_config


def run(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        print(
            "usage: tightfit sample [config.py ...] [--key=value ...]\n\n"
            "example: tightfit sample --out_dir=out-shakespeare-char --start='ROMEO:' --num_samples=3\n\n"
            f"{keys_help(SampleConfig)}"
        )
        return OK
    resolved = read_config(SampleConfig, arguments, warn=lambda line: print(line, file=sys.stderr))
    from tightfit.trainer.sample import samples

    for text in samples(resolved.config, say=lambda line: print(line, file=sys.stderr)):
        print(text)
        print("---------------", flush=True)
    return OK
