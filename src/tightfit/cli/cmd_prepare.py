"""`tightfit prepare`."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from tightfit.cli.exits import OK
from tightfit.cli.parser import Parser
from tightfit.data import prepare
from tightfit.data.recipes import NAMES
from tightfit.data.tokenizers import TOKENIZERS
from tightfit.wording import say

_SHORT_VALIDATION = 1024
"""The default block_size: evaluating needs more tokens than it has."""


def parser() -> Parser:
    found = Parser(
        "prepare",
        say("cli.prepare.about"),
        examples=["tightfit prepare novels --input ~/texts --tokenizer bpe"],
    )
    found.add_argument("name", metavar="NAME_OR_PATH", help=say("cli.prepare.name", names=", ".join(NAMES)))
    found.add_argument("--input", nargs="+", metavar="PATH", help=say("cli.prepare.input"))
    found.add_argument("--data_dir", default="data", help=say("cli.prepare.data_dir"))
    found.add_argument("--tokenizer", choices=TOKENIZERS, help=say("cli.prepare.tokenizer"))
    found.add_argument("--vocab_size", type=int, help=say("cli.prepare.vocab_size"))
    found.add_argument("--val_fraction", type=float, help=say("cli.prepare.val_fraction"))
    found.add_argument("--block_size", type=int, help=say("cli.prepare.block_size"))
    found.add_argument("--seed", type=int, default=2357, help=say("cli.prepare.seed"))
    found.add_argument("--field", default="text", help=say("cli.prepare.field"))
    found.add_argument("--errors", default="strict", help=say("cli.prepare.errors"))
    found.add_argument("--workers", type=int, help=say("cli.prepare.workers"))
    found.flag("--overwrite", say("cli.prepare.overwrite"))
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    given = {key: value for key, value in vars(options).items() if key not in ("name", "lang")}
    bar = Progress(
        TextColumn(say("cli.prepare.tokenizing")),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[tokens]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("", total=None, tokens="")

        def show(done_bytes: int, total_bytes: int | None, tokens: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes, tokens=say("cli.prepare.tokens", count=tokens))

        made = prepare(options.name, progress=show, **given)
    print(say("cli.prepare.made", made=made))
    if made.val_tokens <= _SHORT_VALIDATION:
        print(say("cli.prepare.short", made=made, most=made.val_tokens - 1))
    return OK
