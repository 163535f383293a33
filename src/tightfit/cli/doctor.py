"""`tightfit doctor`."""

import json
import sys
from collections.abc import Sequence

from rich.console import Console

from tightfit.cli.main import FAILED, OK, wants_help
from tightfit.cli.train import PREPARED_WHEN_MISSING
from tightfit.config import TrainConfig, read_config
from tightfit.errors import ConfigError
from tightfit.wording import locale_language


def run(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        print(
            "usage: tightfit doctor [config.py ...] [--key=value ...] [--json] [--lang en|ja]\n\n"
            "Checks this machine, and the run if keys are given: cards, driver, torch, memory, limits, compilers,\n"
            "allocator settings, disk, dataset. It stops no program and changes no setting.\n"
            "Exit code 1 if something would make a run fail.\n\n"
            "example: tightfit doctor configs/train_shakespeare_char.py --device=cuda"
        )
        return OK
    as_json_asked, language, rest = split_options(arguments)
    from tightfit.system.doctor import as_json, diagnose, has_problem, print_table
    from tightfit.system.machine import read_machine
    from tightfit.system.words import words

    said = words(language)
    config = read_config(TrainConfig, rest, warn=lambda line: print(line, file=sys.stderr)).config if rest else None
    checks = diagnose(read_machine(), config, prepares_itself=PREPARED_WHEN_MISSING)
    if as_json_asked:
        print(json.dumps(as_json(checks, said), indent=2, ensure_ascii=False))
    else:
        print_table(checks, said, Console(highlight=False, emoji=False))
    return FAILED if has_problem(checks) else OK


def split_options(arguments: Sequence[str]) -> tuple[bool, str, list[str]]:
    """Whether --json is asked for, the language, and everything else, which are keys of the run.

    >>> split_options(["--lang", "ja", "--batch_size=8", "--json"])
    (True, 'ja', ['--batch_size=8'])
    """
    rest, language, json_asked = [], locale_language(), False
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if word == "--json":
            json_asked = True
        elif option == "--lang":
            language = value if equals else next(words, "")
            if not language:
                raise ConfigError("--lang needs a value: en or ja")
        else:
            rest.append(word)
    return json_asked, language, rest
