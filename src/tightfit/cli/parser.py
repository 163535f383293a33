"""One parser for all commands: argparse for a command's own options, nanoGPT's `--key=value` on top.

A mistake is one sentence with exit code 2. Words that the parser does not know are the configuration's, for commands
that take one.
"""

import argparse
import ast
import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

from tightfit.config import defaults
from tightfit.config.schema import Schema
from tightfit.errors import ConfigError

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
        lines = [("example: " if number == 0 else "         ") + each for number, each in enumerate(examples)]
        super().__init__(
            prog=f"tightfit {command}",
            usage=f"tightfit {command} {usage}" if usage else None,
            description=does,
            epilog="\n".join(lines),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.takes_keys = takes_keys

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
            raise ConfigError(f"{absent[1]} is missing; {self.prog} --help shows an example")
        message = message.removeprefix("argument ")
        raise ConfigError(f"{message}; {self.prog} --help explains the options")

    def _unknown(self, word: str) -> str:
        name = word.partition("=")[0]
        near = difflib.get_close_matches(
            name, [each for action in self._actions for each in action.option_strings], n=1
        )
        hint = f"did you mean {near[0]}?" if near else f"{self.prog} --help lists the options"
        return f"{word} is not an option; {hint}" if word.startswith("-") else f"{word} is one word too many; {hint}"


def _value(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected one argument")
    return text


def _needs_value(name: str) -> str:
    return f"{name} needs a value; write {name}={_EXAMPLES.get(name, 'VALUE')}"


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
        raise ConfigError(f"--capability={text} must be two numbers with a point between them, such as 8.6")
    return int(major), int(minor)
