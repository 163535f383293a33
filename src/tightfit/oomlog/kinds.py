"""Kinds of failure: the memory that ran out, and the status of a log with such a failure."""

import functools

import msgspec

from tightfit.tables import read_table


class _Codes(msgspec.Struct, frozen=True):
    """Tables of `codes.toml`."""

    memory: dict[str, list[str]]
    order: dict[str, list[str]]


@functools.cache
def _codes() -> _Codes:
    return read_table("tightfit.oomlog", "codes.toml", _Codes)


@functools.cache
def _memory() -> dict[str, str]:
    return {kind: memory for memory, kinds in _codes().memory.items() for kind in kinds}


def memory_of(kind: str) -> str:
    """Return the memory that ran out: device, host, none, unshown (the log does not say), or harmless."""
    return _memory().get(kind, "device")


def is_of_allocator(kind: str) -> bool:
    """Return True for memory of a device that ran out in PyTorch's own allocator."""
    return kind not in _memory()


@functools.cache
def consequences() -> tuple[str, ...]:
    """Return the kinds that often follow another failure, the most telling first."""
    return tuple(_codes().order["consequences"])


def goes_on_after(kind: str) -> bool:
    """Return True for a kind after which a program goes on as it was, only slower."""
    return kind in _codes().order["notices"]


_OF_MEMORY = {"none": "other_error", "unshown": "cause_not_shown", "harmless": "harmless"}
_OF_NOTHING = {
    "empty": "empty",
    "binary": "empty",
    "told": "cause_not_shown",
    "cut_error": "incomplete",
    "caught": "survived",
    "warning": "mention",
    "document": "mention",
    "code": "mention",
    "notice": "mention",
    "harmless": "harmless",
    "other_error": "other_error",
}


def status_of(kind: str | None, nothing: str | None) -> str:
    """Return the status of a log by its failure's kind, or by the reason why it has none; keys of `codes.toml`.

    >>> status_of("host_killed", None), status_of("device_assert", None), status_of(None, "caught")
    ('out_of_memory', 'other_error', 'survived')
    """
    if kind is None:
        return _OF_NOTHING.get(nothing or "", "no_failure")
    if goes_on_after(kind):
        return "survived"
    if kind == "memory_words":  # the log says that it was memory, and not whose
        return "out_of_memory"
    return "incomplete" if kind == "incomplete" else _OF_MEMORY.get(memory_of(kind), "out_of_memory")
