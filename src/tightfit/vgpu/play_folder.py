"""The folder by which the processes of one play know of each other. No torch."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tightfit.vgpu.assign import assign
from tightfit.vgpu.records import Settings

if TYPE_CHECKING:
    from tightfit.allocator.caching import CachingAllocator

VARIABLE = "TIGHTFIT_PLAY"
"""Environment variable with the folder's path."""
_STARTS = frozenset({"subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "os.exec", "os.spawn"})


class ChildSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a play for the processes that it starts."""

    settings: Settings
    guards_files: bool
    ends_at: float | None = None
    """Time of day at which the play's time limit has passed."""


def watch(allocator: "CachingAllocator", folder: Path) -> None:
    """Note the bytes that this process holds whenever it starts another one."""

    def note_held() -> None:
        if allocator.reserved_bytes and folder.is_dir():
            held = allocator.reserved_bytes + allocator.context_bytes
            (folder / f"{os.getpid()}.bytes").write_text(str(held))

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _STARTS or not folder.is_dir():
            return
        note_held()
        if event == "subprocess.Popen" and (command := _ignores_variables(arguments)):
            (folder / f"{os.getpid()}-{abs(hash(command))}.unplayed").write_text(command)

    sys.addaudithook(audit)
    _hear_of_spawned(note_held)


def _hear_of_spawned(note_held: Callable[[], None]) -> None:
    """Call a function before `multiprocessing` spawns a process, of which Python tells no audit hook."""
    from multiprocessing import util

    usual: Callable[..., int] = util.spawnv_passfds

    @functools.wraps(usual)
    def spawn(*args: object) -> int:
        note_held()
        return usual(*args)

    assign(util, spawnv_passfds=spawn)


def _ignores_variables(arguments: Sequence[object]) -> str:
    """Return a Python command with options that keep our hook out, or nothing."""
    words = arguments[1]
    if not isinstance(words, (list, tuple)) or not words:
        return ""
    texts = [os.fsdecode(word) for word in words if isinstance(word, (str, bytes, os.PathLike))]
    if not os.path.basename(texts[0]).startswith("python"):
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
