"""`tightfit explain`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tightfit.cli.exits import FAILED, OK, as_json
from tightfit.cli.parser import Parser
from tightfit.cli.progress import shown
from tightfit.config import TrainConfig, read_config
from tightfit.errors import ConfigError
from tightfit.wording import chosen_language, say

if TYPE_CHECKING:
    from tightfit.diagnosis.explanation import Explanation


def parser() -> Parser:
    found = Parser(
        "explain",
        say("explain.cmd_explain.about"),
        usage="[LOG] [--config FILE] [--key=value ...] [--gpu NAME] [--lang en|ja] [--html FILE]",
        examples=[
            "tightfit explain oom.log --config configs/train_openwebtext.py",
            "tightfit explain oom.log --script train.py -- --batch_size=64",
            "tightfit explain oom.log --config llama3_sft.yaml --fix --write",
        ],
        takes_keys=TrainConfig,
    )
    found.add_argument("--config", action="append", default=[], help=say("explain.cmd_explain.config"))
    found.option("--model", say("explain.cmd_explain.model"))
    found.option("--gpu", say("explain.cmd_explain.gpu"))
    found.option("--script", say("explain.cmd_explain.script"))
    found.option("--html", say("explain.cmd_explain.html"))
    found.option("--code", say("explain.cmd_explain.code"))
    found.flag("--fix", say("explain.cmd_explain.fix"))
    found.flag("--write", say("explain.cmd_explain.write"))
    found.flag("--verbose", say("explain.cmd_explain.verbose"))
    found.flag("--json", say("explain.cmd_explain.json"))
    return found


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    if options.code:
        from tightfit.diagnosis.stable_codes import page_of

        print(page_of(options.code, chosen_language(options.lang)))
        return OK
    _check_fix(options)
    found = _explained(options, words)
    if options.html:
        from tightfit.report.html import explanation_report
        from tightfit.report.page import write

        write(explanation_report(found), options.html)
    if options.fix:
        return _fix(found, options.config, write=options.write)
    if options.json:
        print(as_json(found.to_json()))
    else:
        from tightfit.cli.explained import text_for_terminal

        print(text_for_terminal(found, verbose=options.verbose))
    return OK


def _check_fix(options: argparse.Namespace) -> None:
    if options.write and not options.fix:
        raise ConfigError(say("explain.cmd_explain.write_needs_fix"))
    if options.fix and not options.config:
        raise ConfigError(say("explain.cmd_explain.fix_needs_config"))
    if options.fix and options.json:
        raise ConfigError(say("explain.cmd_explain.fix_or_json"))


def _fix(found: "Explanation", paths: Sequence[str], *, write: bool) -> int:
    """Print the first fix that is a change of one file alone as a diff, and make it if `write`."""
    from tightfit.diagnosis.config_fix import config_fix
    from tightfit.storage import write_aside

    path = paths[-1]
    try:
        fix = config_fix(found, paths)
        if fix is None:
            print(say("explain.cmd_explain.no_fix", path=path), file=sys.stderr)
            return FAILED
        path = fix.path
        print(say("explain.cmd_explain.fixed_by", title=fix.title, effects=fix.effects), file=sys.stderr, flush=True)
        print(fix.diff, end="", flush=True)
        if write:
            write_aside(Path(path), fix.after)
            print(say("explain.cmd_explain.written", path=path), file=sys.stderr)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(say("explain.cmd_explain.not_changed", path=path, reason=reason)) from None
    return OK


def _explained(options: argparse.Namespace, words: Sequence[str]) -> "Explanation":
    rest, script_arguments = _cut(list(words))
    configs: list[str] = options.config
    keys, logs = _keys_and_logs(rest)
    if len(logs) > 1:
        raise ConfigError(say("explain.cmd_explain.one_log", count=len(logs), logs=", ".join(logs)))
    if script_arguments and not options.script:
        raise ConfigError(say("explain.cmd_explain.arguments_of_no_script"))
    config = None
    from tightfit.diagnosis.foreign_config import foreign_in, with_model

    foreign = foreign_in(configs, keys)
    if options.model:
        if foreign is None and (configs or keys):
            raise ConfigError(say("explain.cmd_explain.model_of_a_play", model=options.model))
        foreign = with_model(foreign, options.model)
    if foreign is None and (configs or keys):
        config = read_config(TrainConfig, [*configs, *keys], warn=lambda line: print(line, file=sys.stderr)).config
    if options.html:
        from tightfit.report.page import check_folder

        check_folder(options.html)
    source = _source(logs, optional=bool(options.script))
    with shown(say("cli.progress.explaining"), bar=not options.script) as progress:
        from tightfit.diagnosis.explaining import explain

        found = explain(
            source,
            config=config,
            lang=options.lang,
            gpu=options.gpu,
            script=options.script,
            arguments=script_arguments,
            config_names=[*configs, *keys],
            foreign=foreign,
            log=progress.stage,
            progress=progress.count,
        )
    if found.reading.kind_of_nothing == "nothing" and isinstance(source, Path) and _is_configuration(source):
        raise ConfigError(say("explain.cmd_explain.configuration", path=source))
    return found


_OF_CONFIGURATIONS = (".yaml", ".yml", ".json", ".toml", ".py")


def _is_configuration(path: Path) -> bool:
    """Return True if a file without a failure is a configuration that some program's keys tell."""
    from tightfit.diagnosis.foreign_config import foreign_in

    try:
        return path.suffix.lower() in _OF_CONFIGURATIONS and foreign_in([str(path)], []) is not None
    except ConfigError:
        return False


def _source(logs: list[str], *, optional: bool) -> Path | IO[bytes] | None:
    if logs and logs[0] != "-":
        return Path(logs[0])
    if sys.stdin is None or sys.stdin.isatty():
        if optional and not logs:
            return None
        raise ConfigError(say("explain.cmd_explain.no_log"))
    return sys.stdin.buffer


def _cut(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _keys_and_logs(words: list[str]) -> tuple[list[str], list[str]]:
    """Split words into the configuration's keys with their values, and logs."""
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
