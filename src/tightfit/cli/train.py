"""`tightfit train`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tightfit.cli.keys import keys_help
from tightfit.cli.main import OK, wants_help
from tightfit.cli.prepare import prepare_with_bar
from tightfit.config import Resolved, TrainConfig, read_config
from tightfit.train.supervise import supervise, wants_supervision

PREPARED_WHEN_MISSING = ("stdlib", "shakespeare", "shakespeare_char")
"""Datasets so small that training makes them itself; openwebtext takes 54 GB and an hour."""

_SPIN = ("GOMP_SPINCOUNT", "100000")
"""How long an OpenMP thread waits actively for the others; read when torch is loaded. GNU's default of 300,000 made
a small model's step 300 times slower (17 ms to 5.8 s) when another program used the cores; this costs nothing alone."""


def run(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        print(
            "usage: tightfit train [config.py ...] [--key=value ...]\n\n"
            "example: tightfit train configs/train_shakespeare_char.py --device=cpu --max_iters=2000\n\n"
            f"{keys_help(TrainConfig)}"
        )
        return OK
    resolved = read_config(TrainConfig, arguments, warn=lambda line: print(line, file=sys.stderr))
    _prepare_if_missing(resolved)
    if wants_supervision(resolved.config):
        return supervise(arguments, resolved.config)
    os.environ.setdefault(*_SPIN)
    fallback = None
    if resolved.config.fit == "auto" and not resolved.config.eval_only:
        from tightfit.plan.fit import fit

        is_main = os.environ.get("RANK", "0") == "0"
        fitted = fit(resolved, say=lambda line: print(line, flush=True) if is_main else None)
        resolved, fallback = fitted.resolved, fitted.fallback
    from tightfit.train.loop import train  # torch is imported only when there is something to train

    result = train(resolved, fallback)
    return OK if result.stopped_by is None else 128 + result.stopped_by


def _prepare_if_missing(resolved: Resolved[TrainConfig]) -> None:
    config = resolved.config
    folder = Path(config.data_dir) / config.dataset
    if config.dataset in PREPARED_WHEN_MISSING and not (folder / "train.bin").exists():
        print(f"{folder} is not there yet: preparing it")
        prepare_with_bar(config.dataset, data_dir=config.data_dir)
