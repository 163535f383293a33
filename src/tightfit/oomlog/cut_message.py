"""A log that ends within the name or the words of an error: the missing end, where only one message begins so."""

import functools
import re

from tightfit.oomlog.log_text import lines_of, part
from tightfit.tables import read_table

_DOTS = re.compile(r"\s*(?:\.{3}|…)\s*$")
"""Marks of a program that shortened a line."""
_COMPLETE, _CLASS = re.compile(r"out of memory\.?$"), re.compile(r"Error\b")
"""Ends of messages that programs also print whole."""
_ENDING = 400
"""Characters of a log's end in which its last line is looked for."""


@functools.cache
def _heads() -> list[tuple[int, str]]:
    """Return each message up to its first figure, and the number of characters that tell it from all others."""
    table = read_table("tightfit.oomlog", "cut_messages.toml", dict[str, list[str]])
    return [(head.index("|"), head.replace("|", "")) for head in table["heads"]]


def _rest(printed: str, head: str) -> str | None:
    """Return what follows in `head` behind `printed`; None if it does not begin so. `#` takes digits, or none."""
    at = 0
    for begin, each in enumerate(head):
        if at == len(printed):
            return head[begin:].replace("#", "0")
        if each == "#":
            while at < len(printed) and printed[at].isdigit():
                at += 1
        elif printed[at] == each:
            at += 1
        else:
            return None
    return "" if at == len(printed) else None


def last_line(text: str) -> str:
    """Return the last line of a log without its prefix, and without marks of a program that shortened it.

    >>> last_line("[rank0]: torch.OutOfMemoryError: CU...")
    'torch.OutOfMemoryError: CU'
    """
    lines = lines_of(_DOTS.sub("", text[-_ENDING:]).rstrip())
    return part(lines[-1]).body.strip() if lines else ""


def missing_end(text: str) -> str:
    """Return the missing end of a log's last message, up to its first figure; empty if it is complete or not sure.

    >>> missing_end("torch.OutOfMemoryError: CU"), missing_end("RuntimeError: CUDA ")
    ('DA out of memory. Tried to allocate', '')
    """
    printed = last_line(text)
    is_name = printed.endswith("Error") and not _DOTS.search(text)
    if not printed or is_name or _COMPLETE.search(printed):
        return ""
    found = (_rest(printed, head) for sure, head in _heads() if len(printed) >= sure)
    return next((rest for rest in found if rest), "")


def completed(text: str) -> tuple[str, str]:
    """Return a log with what its last message lacks, and that missing part.

    >>> completed("torch.OutOfMemoryError: CUDA o...")
    ('torch.OutOfMemoryError: CUDA out of memory. Tried to allocate', 'ut of memory. Tried to allocate')
    """
    missing = missing_end(text)
    return (_DOTS.sub("", text).rstrip() + missing, missing) if missing else (text, "")


def begun_message(text: str) -> str | None:
    """Return the last line of a log that ends within an error, if it begins like one of memory, and like others.

    The name of a class alone counts only where not even the end of its line is there.

    >>> begun_message("RuntimeError: CUDA "), begun_message("RuntimeError"), begun_message("RuntimeError\\n")
    ('RuntimeError: CUDA', 'RuntimeError', None)
    """
    printed = last_line(text)
    if not (_CLASS.search(printed) and (":" in printed or not text.endswith("\n"))):
        return None
    return printed if any(_rest(printed, head) for _, head in _heads()) else None
