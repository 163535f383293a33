"""The lines to paste for a remedy, in the words of the program that the user runs (frameworks.toml)."""

import functools
import re
import string
from collections.abc import Mapping, Sequence

import msgspec

from tightfit.tables import read_table

_LAST = "pytorch"


class Pasted(msgspec.Struct, frozen=True, kw_only=True):
    """Lines to paste, and the page of documentation that they stand on."""

    lines: tuple[str, ...]
    page: str = ""


_Words = dict[str, dict[str, str | list[str]] | list[str]]
"""Words of one program: of each remedy its `lines` and `page`, and `like`, the programs to look in next.

A remedy may have `unless`: a regular expression of reports in which the program is used in another way.
"""


@functools.cache
def _tables() -> dict[str, _Words]:
    return read_table("tightfit.diagnosis", "frameworks.toml", dict[str, _Words])


def frameworks() -> tuple[str, ...]:
    """Return the programs that have words of their own."""
    return tuple(_tables())


@functools.cache
def _groups() -> dict[str, frozenset[str]]:
    return read_table("tightfit.diagnosis", "program_groups.toml", dict[str, frozenset[str]])


def programs(group: str) -> frozenset[str]:
    """Return the programs of a group that the diagnosis treats alike, such as `servers` (program_groups.toml)."""
    return _groups()[group]


def has_own(code: str, program: str) -> bool:
    """Return True if a program has words of its own for a remedy."""
    return code in _tables().get(program, {})


def has_words(code: str, program: str) -> bool:
    """Return True if a program, or one that it is like, has words for a remedy; PyTorch's own do not count."""
    return program in _tables() and any(has_own(code, each) for each in _chain([program]) if each != _LAST)


def has_fixed_lines(code: str, program: str) -> bool:
    """Return True if a program's words for a remedy hold no value of the user's run."""
    entry = _tables().get(program, {}).get(code)
    return isinstance(entry, dict) and not any("{" in line for line in entry["lines"])


def pasted(code: str, program: Sequence[str], values: Mapping[str, int | str], text: str = "") -> Pasted | None:
    """Return a remedy's lines in the words of the first of the programs that has some, with `values` filled in.

    `text` is the report; lines that do not hold for its way of using the program are left out.

    >>> pasted("split_general", ["transformers_trainer"], {"size": 1, "passes": 400}).lines
    ('per_device_train_batch_size=1', 'gradient_accumulation_steps=400')
    """
    for name in _chain(program):
        entry = _tables()[name].get(code)
        if isinstance(entry, dict) and not _is_used_otherwise(entry, text):
            lines = tuple(string.Formatter().vformat(line, (), values) for line in entry["lines"])
            return Pasted(lines=lines, page=str(entry["page"]))
    return None


def _is_used_otherwise(entry: Mapping[str, str | list[str]], text: str) -> bool:
    unless = entry.get("unless")
    return isinstance(unless, str) and re.search(unless, text) is not None


def _chain(program: Sequence[str]) -> list[str]:
    """Return the tables to look in: the outermost program's, and those that it is like.

    A program without PyTorch's words, JAX or TensorFlow, ends at its own.
    """
    tables = _tables()
    first = next((name for name in program if name in tables), _LAST)
    like = tables[first].get("like", [])
    return [first, *(like if isinstance(like, list) else [])]
