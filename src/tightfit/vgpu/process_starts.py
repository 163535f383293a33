"""Functions to call before this process starts another one.

Python's audit hooks tell that, too, but also of every `id` and of every look at a frame's code. With a hook, these take
ten times as long, and a play of run_clm a sixth longer.
"""

import functools
import os
import subprocess
from collections.abc import Callable, Sequence
from multiprocessing import util

from tightfit.vgpu.assign import assign

Heard = Callable[[Sequence[object]], object]
"""Gets the words of a command: one word for a shell's line, none for a fork."""
_heard: list[Heard] = []


def before_start(heard: Heard) -> None:
    """Call a function before each process that this one starts, for good."""
    if not _heard:
        _install()
    _heard.append(heard)


def _tell(words: Sequence[object]) -> None:
    for heard in _heard:
        heard(words)


def _install() -> None:
    """Replace the functions that the others of Python's library end in."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=functools.partial(_tell, ()))
    _replace(os, "system", place=0)
    for name in ("posix_spawn", "posix_spawnp", "execv", "execve"):
        _replace(os, name)
    _replace(subprocess.Popen, "_execute_child")
    _replace(util, "spawnv_passfds")  # of multiprocessing


def _replace(owner: object, name: str, place: int = 1) -> None:
    """Tell the command, which is the argument at this place, before the function is called."""
    usual: Callable[..., object] | None = getattr(owner, name, None)
    if usual is None:  # another system's
        return

    @functools.wraps(usual)
    def start(*args: object, **kwargs: object) -> object:
        command = (*args, *kwargs.values())[place]
        _tell(command if isinstance(command, (list, tuple)) else (command,))
        return usual(*args, **kwargs)

    assign(owner, **{name: start})
