"""The first certain mistake in a YAML file: no parser, and silent where a line may be right."""

import re
from typing import NamedTuple

from msgspec import Struct, field

from tightfit.diagnosis.config_values import bare_line


class YamlError(NamedTuple):
    """A mistake, by its line and a key of the words' table `yaml`."""

    line: int
    reason: str


_KEY = re.compile(
    r"(?P<dashes>(?:- +)*)(?P<key>\"[^\"]*\"|'[^']*'|[^\s#&*!|>'\"%@`{\[\]},:?-][^#]*?)\s*:(?:\s+(?P<value>.*))?$"
)
_BLOCK = re.compile(r"(?:[&!]\S+ +)*[|>][+-]?\d?[+-]?$")
_BLOCK_ITEM = re.compile(r"(?:- +)+[|>][+-]?\d?[+-]?$")
_NO_VALUE = re.compile(r"(?:[&!]\S*\s*)*$")
"""Nothing, or an anchor or a tag, behind a key: its value stands on the lines below."""
_MARK = re.compile(r"(?:---|\.\.\.|%)")


class _Reader(Struct):
    """Keys, lists and quotes that are open at a line of a file."""

    levels: list[int] = field(default_factory=lambda: [-1])
    """Columns of the keys around it, the outermost first."""
    has_value: bool = False
    """True if the last key has a plain value on its own line."""
    block: int | None = None
    """Column of a key with its text on the lines below, behind | or >."""
    opened: int = 0
    """The line of a bracket or a quotation mark that is not closed yet."""
    depth: int = 0
    quote: str = ""
    gives_up: bool = False
    """True behind a key that is more than words."""

    def read(self, number: int, line: str) -> str | None:
        """Take a line in; return the reason why it is wrong."""
        body = line.strip()
        indent = len(line) - len(line.lstrip(" "))
        if self.gives_up or (self.block is not None and (not body or indent > self.block)):
            return None
        self.block = None
        if self.quote or self.depth:
            self._scan(body, number)
            return None
        body = bare_line(body).strip()
        if not body or _MARK.match(body):
            if body:
                self.levels, self.has_value = [-1], False
            return None
        if line[indent : indent + 1] == "\t":
            return "tab"
        match = _KEY.match(body)
        if match is None:
            return self._plain(number, body, indent)
        return self._key(number, match, indent + len(match["dashes"]))

    def _plain(self, number: int, body: str, indent: int) -> str | None:
        """Take in a line without a key: an item of a list, or the rest of a value."""
        if body.startswith(("? ", ": ")):
            self.gives_up = True
            return None
        if _BLOCK_ITEM.match(body):
            self.block, self.has_value = indent, False
            return None
        if body.startswith(("- ", "[", "{", "'", '"')) or body == "-":
            self.has_value = False
            self._scan(body.lstrip("- "), number)
            return None
        is_rest = indent > self.levels[-1] or self.levels == [-1]
        return None if is_rest or body[0] in "?&*!|>:" else "no_colon"

    def _key(self, number: int, match: re.Match[str], column: int) -> str | None:
        value = (match["value"] or "").strip()
        if column > self.levels[-1]:
            if self.has_value and not match["dashes"]:
                return "deeper"
            self.levels.append(column)
        else:
            while self.levels[-1] > column:
                self.levels.pop()
            if self.levels[-1] < column:
                if not match["dashes"]:
                    return "between"
                self.levels.append(column)
        self.has_value = not (_NO_VALUE.match(value) or _BLOCK.match(value))
        if _BLOCK.match(value):
            self.block = column
        elif value[:1] in ("[", "{", "'", '"'):
            self._scan(value, number)
        elif self.has_value and re.search(r"[^\s]: ", value) and value[:1] not in "&*!":
            return "two_values"
        return None

    def _scan(self, text: str, number: int) -> None:
        """Count the brackets and quotation marks that a value opens and closes."""
        at_start = not (self.depth or self.quote)
        for place, each in enumerate(text):
            if self.quote:
                self.quote = "" if each == self.quote and text[place - 1 : place] != "\\" else self.quote
            elif each in "'\"" and (self.depth or (at_start and place == 0)):
                self.quote = each
            elif each in "[{" and (self.depth or (at_start and place == 0)):
                self.depth += 1
            elif each in "]}" and self.depth:
                self.depth -= 1
        if at_start and (self.depth or self.quote):
            self.opened = number


def first_error(text: str) -> YamlError | None:
    """Return the first certain mistake of a YAML file.

    >>> first_error("model: x\\n  batch: 4\\n"), first_error("a:\\n  - b: 1\\n    c: 2\\n")
    (YamlError(line=2, reason='deeper'), None)
    """
    reader = _Reader()
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        if (reason := reader.read(number, line)) is not None:
            return YamlError(number, reason)
    return YamlError(reader.opened, "open") if reader.depth or reader.quote else None
