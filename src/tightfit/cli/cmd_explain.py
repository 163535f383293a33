"""`tightfit explain`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tightfit.cli.exits import OK
from tightfit.cli.parser import Parser
from tightfit.config import TrainConfig, read_config
from tightfit.errors import ConfigError
from tightfit.wording import chosen_language


def parser() -> Parser:
    found = Parser(
        "explain",
        "Explain an error log: what failed, which tensor it was, why, and fixes checked on a virtual GPU.\n"
        "LOG is a file, a PyTorch memory snapshot (.pickle), or standard input.",
        usage="[LOG] [--config FILE] [--key=value ...] [--gpu NAME] [--lang en|ja] [--html FILE]",
        examples=[
            "tightfit explain oom.log --config configs/train_openwebtext.py",
            "tightfit explain oom.log --script train.py -- --batch_size=64",
        ],
        takes_keys=TrainConfig,
    )
    found.add_argument("--config", action="append", default=[], help="the run's configuration file; may be repeated")
    found.option("--gpu", "the card's name, such as 'RTX 3060 12GB', if the log does not name it")
    found.option("--script", "a training script to play instead of a configuration; its arguments follow --")
    found.option("--html", "write the explanation as a page, with charts and lines to copy")
    found.flag("--verbose", "print the arithmetic, and what to paste for each fix")
    found.flag("--json", "print the same facts for machines")
    return found


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    rest, script_arguments = _cut(list(words))
    configs: list[str] = options.config
    keys, logs = _keys_and_logs(rest)
    if len(logs) > 1:
        raise ConfigError(f"one log is explained at a time, got {len(logs)}: {', '.join(logs)}; configurations follow "
                          "--config")  # fmt: skip
    if script_arguments and not options.script:
        raise ConfigError("-- comes before the arguments of a script; name it with --script")
    config = None
    if configs or keys:
        config = read_config(TrainConfig, [*configs, *keys], warn=lambda line: print(line, file=sys.stderr)).config
    if options.html:
        from tightfit.report.html import check_folder

        check_folder(options.html)
    from tightfit.diagnosis.explanation import explain

    found = explain(
        _source(logs, optional=bool(options.script)),
        config=config,
        lang=chosen_language(options.lang),
        gpu=options.gpu,
        script=options.script,
        arguments=script_arguments,
        config_names=[*configs, *keys],
    )
    if options.html:
        from tightfit.report.html import explanation_report, write

        write(explanation_report(found), options.html)
    if options.json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        from tightfit.cli.explained import text_for_terminal

        print(text_for_terminal(found, verbose=options.verbose))
    return OK


def _source(logs: list[str], *, optional: bool) -> Path | IO[bytes] | None:
    if logs and logs[0] != "-":
        return Path(logs[0])
    if sys.stdin is None or sys.stdin.isatty():
        if optional and not logs:
            return None
        raise ConfigError("there is no log; give its path, or pipe it in: python train.py 2>&1 | tightfit explain")
    return sys.stdin.buffer


def _cut(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _keys_and_logs(words: list[str]) -> tuple[list[str], list[str]]:
    """The configuration's keys with their values, and what stands between them."""
    keys: list[str] = []
    logs: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            logs.append(word)
            continue
        keys.append(word)
        if "=" not in word and words and not words[0].startswith("-") and _takes_value(word):
            keys.append(words.pop(0))
    return keys, logs


def _takes_value(name: str) -> bool:
    """Return True if a value follows `--key`: for all but yes-or-no flags, which a log may follow."""
    kind = TrainConfig.__annotations__.get(name[2:].replace("-", "_"))
    return kind is not None and kind not in (bool, bool | str)
