"""`tightfit explain`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tightfit.cli.keys import last, split_options
from tightfit.cli.main import OK, wants_help
from tightfit.config import TrainConfig, read_config
from tightfit.errors import ConfigError
from tightfit.wording import chosen_language

_OPTIONS = {
    "--config": "the run's configuration file; it may be given again, and --key=value replaces its keys",
    "--gpu": "the card's name, such as 'RTX 3060 12GB', if the log does not tell it",
    "--script": "somebody's own training script, played instead of a configuration; its arguments follow --",
    "--lang": "en or ja; without it, as the locale says",
    "--html": "write the explanation as a page, with charts and lines to copy",
}
_FLAGS = {"--verbose": "the arithmetic, and what to paste for each fix", "--json": "the same facts for machines"}


def run(arguments: Sequence[str]) -> int:
    words_given, script_arguments = _cut(list(arguments))
    if wants_help(words_given):
        print(_help())
        return OK
    values, flags, rest = split_options(words_given, _OPTIONS, _FLAGS)
    configs, options = values.pop("--config", []), last(values)
    keys, logs = _keys_and_logs(rest)
    if len(logs) > 1:
        raise ConfigError(f"one log is explained at a time, got {len(logs)}: {', '.join(logs)}; configurations follow "
                          "--config")  # fmt: skip
    if script_arguments and "--script" not in options:
        raise ConfigError("-- comes before the arguments of a script; name it with --script")
    config = None
    if configs or keys:
        config = read_config(TrainConfig, [*configs, *keys], warn=lambda line: print(line, file=sys.stderr)).config
    if "--html" in options:
        from tightfit.report.html import check_folder

        check_folder(options["--html"])
    from tightfit.diagnosis.explanation import explain

    found = explain(
        _source(logs, optional="--script" in options),
        config=config,
        lang=chosen_language(options.get("--lang")),
        gpu=options.get("--gpu"),
        script=options.get("--script"),
        arguments=script_arguments,
        config_names=[*configs, *keys],
    )
    if "--html" in options:
        from tightfit.report.html import explanation_report, write

        write(explanation_report(found), options["--html"])
    if "--json" in flags:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        from tightfit.cli.explained import text_for_terminal

        print(text_for_terminal(found, verbose="--verbose" in flags))
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
    """Whether `--key` is followed by its value: all but the flags of yes and no, after which a log may stand."""
    kind = TrainConfig.__annotations__.get(name[2:].replace("-", "_"))
    return kind is not None and kind not in (bool, bool | str)


def _help() -> str:
    lines = "\n".join(f"  {name:<10} {text}" for name, text in {**_OPTIONS, **_FLAGS}.items())
    return (
        "usage: tightfit explain [LOG] [--config FILE] [--key=value ...] [--gpu NAME] [--lang en|ja] [--html FILE]\n\n"
        "What failed, which tensor it was, why, and what to do, each fix checked on a virtual GPU.\n"
        "LOG is a file, a PyTorch memory snapshot (.pickle), or standard input.\n\n"
        "example: tightfit explain oom.log --config configs/train_openwebtext.py\n"
        "         tightfit explain oom.log --script train.py -- --batch_size=64\n\n"
        f"{lines}\n\nKeys of the configuration are those of tightfit train."
    )
