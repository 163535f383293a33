"""PyYAML's error in a YAML file, in words that say what to correct."""

import re
from typing import Any, NamedTuple

from tightfit.diagnosis.config_values import Yaml, bare_line, yaml_in


class YamlError(NamedTuple):
    """A mistake, by its line and a key of the words' table `yaml`."""

    line: int
    reason: str


_OPEN = ("found unexpected end of stream", "found unexpected document separator")
_RESERVED = ("that cannot start any token", "found undefined alias")
_KEY_END = re.compile(r":(?:\s|$)")
_NO_SPACE = re.compile(r"\s*(?:- +)*[\w.-]+:\S")


def first_error(text: str) -> YamlError | None:
    """Return the first mistake of a YAML file.

    >>> first_error("model: x\\n  batch: 4\\n"), first_error("a:\\n  - b: 1\\n    c: 2\\n")
    (YamlError(line=2, reason='deeper'), None)
    """
    text = text.removeprefix("\ufeff")
    found = yaml_in(text)
    if found.error is None:
        return None
    if not hasattr(found.error, "problem_mark"):  # a character that YAML does not allow
        return YamlError(text.count("\n", 0, found.error.position) + 1, "other")
    lines = text.splitlines()
    number, reason = _mistake(found, text, [*lines, ""])
    return YamlError(min(number + 1, len(lines)), reason)


def _mistake(found: Yaml, text: str, lines: list[str]) -> tuple[int, str]:
    """Return the line of a mistake, from 0, and its reason."""
    error: Any = found.error
    problem, mark, opened = error.problem, error.problem_mark, error.context_mark
    before = lines[mark.line][: mark.column]
    if "'\\t'" in problem:
        return mark.line, "other" if before.strip() else "tab"
    if any(each in problem for each in _RESERVED):
        return mark.line, "reserved"
    if problem in _OPEN:
        return opened.line, "open"
    if problem.startswith("expected the node content, but found '<") and found.loader.flow_level:
        return found.loader.marks[-1].line, "open"
    if (bracket := re.match(r"expected ',' or '(.)'", problem)) is not None:
        return (mark.line, "comma") if bracket[1] in text[mark.index :] else (opened.line, "open")
    if problem == "could not find expected ':'":
        return opened.line, _without_colon(lines[opened.line])
    if problem == "mapping values are not allowed here" and _KEY_END.search(before):
        return mark.line, "two_values"
    is_pair = problem == "mapping values are not allowed here"
    if not is_pair and (before.strip() or "but found" not in problem):
        return mark.line, "other"
    return _indented(lines, mark.line, is_pair=is_pair)


def _indented(lines: list[str], number: int, *, is_pair: bool) -> tuple[int, str]:
    """Return what is wrong with a line below others, or with the one above it, which has to be a key."""
    above = [each for each in range(number) if bare_line(lines[each])]
    indents = [_indent(lines[each]) for each in above]
    indent = _indent(lines[number])
    if indents and indent > indents[-1]:
        return number, "deeper"
    if is_pair and above and not _KEY_END.search(lines[above[-1]]):
        return above[-1], _without_colon(lines[above[-1]])
    return number, "other" if indent in indents else "between"


def _without_colon(line: str) -> str:
    return "no_space" if _NO_SPACE.match(line) else "no_colon"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
