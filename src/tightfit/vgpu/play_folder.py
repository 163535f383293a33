"""The folder by which the processes of one play know of each other. No torch."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tightfit.vgpu.process_starts import before_start
from tightfit.vgpu.records import Settings

if TYPE_CHECKING:
    from tightfit.allocator.caching import CachingAllocator

VARIABLE = "TIGHTFIT_PLAY"
"""Environment variable with the folder's path."""


card_of_this_process: Callable[[], Any] | None = None
"""Starts the virtual device of a process of `multiprocessing` which is given tensors of the card before it runs."""


class ChildSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a play for the processes that it starts."""

    settings: Settings
    guards_files: bool
    ends_at: float | None = None
    """Time of day at which the play's time limit has passed."""


def watch(allocator: "CachingAllocator", folder: Path) -> None:
    """Note the bytes that this process holds whenever it starts another one."""

    def note(command: Sequence[object]) -> None:
        if not folder.is_dir():
            return
        if allocator.reserved_bytes:
            held = allocator.reserved_bytes + allocator.context_bytes
            (folder / f"{os.getpid()}.bytes").write_text(str(held))
        if line := _ignores_variables(command):
            (folder / f"{os.getpid()}-{abs(hash(line))}.unplayed").write_text(line)

    before_start(note)


def _ignores_variables(command: Sequence[object]) -> str:
    """Return a Python command with options that keep our hook out, or nothing."""
    texts = [os.fsdecode(word) for word in command if isinstance(word, (str, bytes, os.PathLike))]
    if not texts or not os.path.basename(texts[0]).startswith("python"):
        return ""
    for word in texts[1:]:
        if not word.startswith("-") or word.startswith("--") or word[1:2] in ("m", "c"):
            return ""
        if set("IES") & set(word[1:]):
            return " ".join(texts)
    return ""


def held_by_others(folder: Path) -> int:
    """Bytes of the card that the other processes of the play held when they last started one."""
    held = 0
    for file in folder.glob("*.bytes"):
        number = int(file.stem)
        if number != os.getpid() and os.path.exists(f"/proc/{number}"):
            held += int(file.read_text())
    return held
