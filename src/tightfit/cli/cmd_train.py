"""`tightfit train`."""

import argparse
import faulthandler
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tightfit.cli.cmd_report import page_at_end
from tightfit.cli.exits import FAILED, OK
from tightfit.cli.parser import Parser
from tightfit.config import Resolved, TrainConfig, read_config
from tightfit.errors import TightfitError
from tightfit.trainer.supervise import is_a_file, supervise, wants_supervision
from tightfit.wording import say

PREPARED_WHEN_MISSING = ("stdlib", "shakespeare", "shakespeare_char")
"""Datasets so small that training makes them itself; openwebtext takes 54 GB and an hour."""

_SPIN = ("GOMP_SPINCOUNT", "5000")
"""Rounds that an OpenMP thread waits actively for the others; read when torch is loaded. GNU's default of 300,000 made
a small model's step 300 times slower (17 ms to 5.8 s) when another program used the cores. On busy cores a step of the
README's example takes 1,200 to 1,700 ms of processor time with 100,000 rounds, 840 with 20,000 and 670 with 5,000.
Alone they differ by less than runs do, also with a tiny model: 4.4 to 5.4 ms a step, 4.4 to 5.2 with 5,000."""


def parser() -> Parser:
    found = Parser(
        "train",
        say("cli.train.about"),
        usage="[config.py ...] [--key=value ...] [--html FILE]",
        examples=["tightfit train configs/train_shakespeare_char.py --device=cpu --max_iters=2000"],
        takes_keys=TrainConfig,
    )
    found.option("--html", say("cli.train.html"))
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    resolved = read_config(TrainConfig, rest, warn=lambda line: print(line, file=sys.stderr))
    with page_at_end(options.html, resolved.config):
        return _run(rest, resolved)


def _run(arguments: Sequence[str], resolved: Resolved[TrainConfig]) -> int:
    if code := _prepare_if_missing(resolved.config):
        return code
    if wants_supervision(resolved.config):
        return supervise(arguments, resolved.config)
    if is_a_file(sys.stderr):
        faulthandler.enable()  # a crash of a library leaves the stack of each thread
    os.environ.setdefault(*_SPIN)
    fallback, plan = None, None
    if resolved.config.fit == "auto" and not resolved.config.eval_only:
        from tightfit.planner.fit import fit
        from tightfit.trainer.checkpoint import check_folder

        is_main = os.environ.get("RANK", "0") == "0"
        if is_main:
            check_folder(Path(resolved.config.out_dir))  # planning takes a minute
        fitted = fit(resolved, log=lambda line: print(line, flush=True) if is_main else None)
        resolved, fallback = fitted.resolved, fitted.fallback
        if resolved.config.shard != "none":
            from tightfit.planner.fit_cards import plan_spread

            plan = plan_spread
    from tightfit.trainer.loop import train  # torch is imported only when there is something to train

    try:
        result = train(resolved, fallback, plan)
    except Exception as error:  # of any class: compilers and readers wrap an error of memory in their own
        failed = _out_of_memory(error)
        if failed is None or os.environ.get("RANK", "0") != "0":
            raise
        from tightfit.cli.explained import explain_failed_run

        print(f"tightfit: {error}", file=sys.stderr, flush=True)
        explain_failed_run(failed[0], resolved.config, micro_batch=failed[1])
        return FAILED
    return OK if result.stopped_by is None else 128 + result.stopped_by


def _out_of_memory(error: Exception) -> tuple[str, int | None] | None:
    """Return the device's message and the run's last micro-batch; None for any other error."""
    from tightfit.trainer.out_of_memory import Kind, is_out_of_memory
    from tightfit.trainer.recovery import OutOfMemory, last_line

    if isinstance(error, OutOfMemory):
        return error.message, error.settings.micro_batch if error.settings else None
    if isinstance(error, TightfitError) or is_out_of_memory(error) is not Kind.RECOVERABLE:
        return None
    return last_line(error), None  # --recover=False


def _prepare_if_missing(config: TrainConfig) -> int:
    """In a process of its own: tokenizing a corpus here would leave 100 MiB less to train with."""
    folder = Path(config.data_dir) / config.dataset
    if config.dataset not in PREPARED_WHEN_MISSING or (folder / "train.bin").exists():
        return OK
    print(say("cli.train.preparing", folder=folder), flush=True)
    words = [sys.executable, "-m", "tightfit", "prepare", config.dataset, f"--data_dir={config.data_dir}"]
    return subprocess.run(words).returncode
