"""Stable codes of causes, like a compiler's: TF-101 means the same in every version (stable_codes.toml)."""

import functools

import msgspec

from tightfit.errors import ConfigError
from tightfit.oomlog.kinds import memory_of
from tightfit.tables import read_table
from tightfit.wording import say
from tightfit.wording.diagnosis import words

_KIND = "kind_"


class _Table(msgspec.Struct, frozen=True):
    causes: dict[str, list[str]]
    kinds: dict[str, str]


@functools.cache
def _table() -> _Table:
    return read_table("tightfit.diagnosis", "stable_codes.toml", _Table)


@functools.cache
def _of_causes() -> dict[str, str]:
    return {cause: code for code, causes in _table().causes.items() for cause in causes}


def stable_codes() -> tuple[str, ...]:
    """Return all codes, in order."""
    return (*_table().causes, *_table().kinds)


def stable_code(cause: str) -> str:
    """Return the code of a cause.

    >>> stable_code("grows_outputs"), stable_code("kind_host_killed")
    ('TF-105', 'TF-502')
    """
    if cause.startswith(_KIND):
        memory = memory_of(cause.removeprefix(_KIND))
        return next(code for code, each in _table().kinds.items() if each == memory)
    return _of_causes()[cause]


def page_of(code: str, language: str) -> str:
    """Return the page of a code: title, meaning and advice. ConfigError for an unknown code."""
    name, said = code.upper(), words(language)
    if name not in stable_codes():
        raise ConfigError(say("explain.stable_codes.unknown", code=code, first=stable_codes()[0]))
    return f"{name}: {said('code_titles', name)}\n\n{said('code_pages', name)}"
