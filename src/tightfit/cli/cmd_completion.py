"""`tightfit completion`."""

import argparse
from collections.abc import Sequence

import shtab

from tightfit.cli.exits import OK
from tightfit.cli.main import command_module, commands
from tightfit.cli.parser import Parser
from tightfit.config import defaults
from tightfit.wording import say


def parser() -> Parser:
    found = Parser(
        "completion",
        say("cli.completion.about"),
        examples=["tightfit completion bash > ~/.local/share/bash-completion/completions/tightfit"],
    )
    found.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help=say("cli.completion.shell"))
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    whole = argparse.ArgumentParser(prog="tightfit")
    whole.add_argument("--version", action="store_true", help=say("cli.completion.version"))
    added = whole.add_subparsers()
    for name, does in commands().items():
        own: Parser = command_module(name).parser()
        if own.takes_keys is not None:
            taken = {option for action in own._actions for option in action.option_strings}
            for key in defaults(own.takes_keys):
                if f"--{key}" not in taken:
                    own.add_argument(f"--{key}", help=say("cli.completion.key"))
        added.add_parser(name, help=does, parents=[own], add_help=False)
    print(shtab.complete(whole, options.shell))
    return OK
