"""`tightfit cache`."""

import argparse
from collections.abc import Sequence

from tightfit.cli.exits import OK, as_json
from tightfit.cli.parser import Parser
from tightfit.wording import say


def parser() -> Parser:
    found = Parser(
        "cache",
        say("cli.cache.about"),
        usage="[clear] [--json] [--lang en|ja]",
        examples=["tightfit cache clear"],
    )
    found.add_argument("action", nargs="?", choices=["clear"], metavar="clear", help=say("cli.cache.clear"))
    found.flag("--json", say("cli.option.json"))
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tightfit.simulation.cache import clear_cache, read_cache

    state = clear_cache() if options.action else read_cache()
    if options.json:
        print(as_json(state))
    elif state.folder is None:
        print(say("cli.cache.no_home"))
    elif options.action:
        print(say("cli.cache.cleared", state=state))
    else:
        print(say("cli.cache.state", state=state))
    return OK
