"""`tightfit prepare`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from tightfit.cli.exits import OK
from tightfit.cli.parser import Parser
from tightfit.data import PrepareResult, prepare
from tightfit.data.recipes import NAMES
from tightfit.data.tokenizers import TOKENIZERS
from tightfit.units import format_count, format_duration


def parser() -> Parser:
    found = Parser(
        "prepare",
        "Turn text into a dataset: train.bin, val.bin and meta.json in DATA_DIR/NAME.",
        examples=["tightfit prepare novels --input ~/texts --tokenizer bpe"],
    )
    found.add_argument("name", metavar="NAME_OR_PATH", help=f"{', '.join(NAMES)}, or text, JSONL or Parquet")
    found.add_argument("--input", nargs="+", metavar="PATH", help="files or folders to read, for a name of your own")
    found.add_argument("--data_dir", default="data", help="folder for datasets (%(default)s)")
    found.add_argument("--tokenizer", choices=TOKENIZERS, help="the name's own, or gpt2 for your files")
    found.add_argument("--vocab_size", type=int, help="of a bpe trained on the text (4096; stdlib 1024)")
    found.add_argument("--val_fraction", type=float, help="share held out for validation")
    found.add_argument("--seed", type=int, default=2357, help="of the choice of what is held out (%(default)s)")
    found.add_argument("--field", default="text", help="JSONL key or Parquet column (%(default)s)")
    found.add_argument("--errors", default="strict", help="strict, or replace bytes that are not UTF-8")
    found.add_argument("--workers", type=int, help="threads that encode (one a core)")
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    given = {name: value for name, value in vars(options).items() if name != "lang"}
    prepare_with_bar(given.pop("name"), **given)
    return OK


def prepare_with_bar(name: str, **options: Any) -> PrepareResult:
    """`prepare` with a progress bar on a terminal, and a line at the end."""
    bar = Progress(
        TextColumn("tokenizing"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("", total=None, tokens="0")

        def show(done_bytes: int, total_bytes: int | None, tokens: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes, tokens=format_count(tokens))

        made = prepare(name, progress=show, **options)
    print(
        f"{made.folder}: {made.train_tokens:,} tokens to train on, {made.val_tokens:,} to validate, "
        f"vocabulary {made.vocab_size:,} ({made.tokenizer}), {format_duration(made.seconds)}"
    )
    return made
