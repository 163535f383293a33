"""One parser for all commands: argparse for a command's own options, nanoGPT's `--key=value` on top.

A mistake is one sentence with exit code 2. Words that the parser does not know are the configuration's, for commands
that take one.
"""

import argparse
import ast
import difflib
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

from rich.cells import cell_len

from tightfit.config import defaults
from tightfit.config.schema import Schema
from tightfit.errors import ConfigError
from tightfit.wording import LANGUAGES, say

_EXAMPLES = {"--lang": "en or ja", "--html": "page.html", "--gpu": "'RTX 3060 12GB'", "--used": "2GiB"}


class Parser(argparse.ArgumentParser):
    """Parser of one command; it passes on the keys of the configuration `takes_keys`."""

    def __init__(
        self,
        command: str,
        does: str,
        *,
        usage: str = "",
        examples: Sequence[str],
        takes_keys: type[Schema] | None = None,
    ) -> None:
        label = say("cli.parser.example")
        lines = [(label if number == 0 else " " * cell_len(label)) + each for number, each in enumerate(examples)]
        super().__init__(
            prog=f"tightfit {command}",
            usage=f"tightfit {command} {usage}" if usage else None,
            description=does,
            epilog="\n".join(lines),
            formatter_class=_Help,
            allow_abbrev=False,
            add_help=False,
        )
        self._positionals.title = say("cli.parser.positionals")
        self._optionals.title = say("cli.parser.options")
        self.add_argument("-h", "--help", action="help", help=say("cli.parser.help"))
        self.takes_keys = takes_keys
        self.option("--lang", say("cli.parser.lang"))

    def option(self, name: str, text: str) -> None:
        """Add an option that takes a value, None where it is not given."""
        self.add_argument(name, help=text, type=_value, metavar=name.strip("-").upper().replace("-", "_"))

    def flag(self, name: str, text: str) -> None:
        """Add an option without a value."""
        self.add_argument(name, action="store_true", help=text)

    def read(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the options and, for commands that take a configuration, its words in their order.

        ConfigError for a mistake.
        """
        options, rest = self.parse_known_args(list(words))
        if rest and self.takes_keys is None:
            raise ConfigError(self._unknown(rest[0]))
        return options, rest

    def error(self, message: str) -> NoReturn:
        """Raise the mistake that argparse found as one sentence."""
        if missing := re.fullmatch(r"argument (?:\S+, )?(\S+): expected (?:one|at least one) argument", message):
            raise ConfigError(_needs_value(missing[1]))
        if absent := re.fullmatch(r"the following arguments are required: (.+)", message):
            raise ConfigError(say("cli.parser.missing", names=absent[1], command=self.prog))
        message = message.removeprefix("argument ")
        raise ConfigError(say("cli.parser.mistake", message=message, command=self.prog))

    def _unknown(self, word: str) -> str:
        name = word.partition("=")[0]
        near = difflib.get_close_matches(
            name, [each for action in self._actions for each in action.option_strings], n=1
        )
        if not word.startswith("-"):
            return say("cli.parser.one_too_many", word=word, command=self.prog)
        if near:
            return say("cli.parser.not_an_option_near", word=word, near=near[0])
        return say("cli.parser.not_an_option", word=word, command=self.prog)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that begins in this process's language."""

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[argparse._MutuallyExclusiveGroup],
        prefix: str | None = None,
    ) -> None:
        super().add_usage(usage, actions, groups, prefix or say("cli.parser.usage"))


def _value(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected one argument")
    return text


def _needs_value(name: str) -> str:
    return say("cli.parser.needs_value", name=name, example=_EXAMPLES.get(name, "VALUE"))


def keys_help(schema: type[Schema]) -> str:
    """Return a line for each key: `--key=default` and its meaning."""
    usual = defaults(schema)
    written = {key: f"--{key}={value!r}" for key, value in usual.items()}
    width = min(34, max(map(len, written.values())))
    return "\n".join(f"  {written[key]:<{width}}  {text}" for key, text in _sentences(schema) if key in usual)


def _sentences(schema: type[Schema]) -> Iterator[tuple[str, str]]:
    """Yield the fields of a dataclass with the string below each, which Python itself does not keep."""
    (definition,) = ast.parse(inspect.getsource(schema)).body
    assert isinstance(definition, ast.ClassDef)
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            yield field.target.id, inspect.cleandoc(ast.literal_eval(text.value)).replace("\n", " ")


def capability(text: str | None) -> tuple[int, int] | None:
    """Read --capability: a card's major and minor number, or None where it is not given."""
    if not text:
        return None
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise ConfigError(say("cli.parser.capability", text=text))
    return int(major), int(minor)


def leading_language(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the language given before the command, or None, and the other words."""
    if words and words[0].startswith("--lang="):
        return words[0].partition("=")[2], list(words[1:])
    if len(words) > 1 and words[0] == "--lang":
        return words[1], list(words[2:])
    return None, list(words)


def language_in(words: Sequence[str]) -> str | None:
    """Return the last known language that `--lang` gives before a lone `--`, without parsing the other words."""
    own = list(words)[: list(words).index("--") if "--" in words else None]
    given = [word.partition("=")[2] for word in own if word.startswith("--lang=")]
    given += [value for word, value in itertools.pairwise(own) if word == "--lang"]
    return next((each for each in reversed(given) if each in LANGUAGES), None)
