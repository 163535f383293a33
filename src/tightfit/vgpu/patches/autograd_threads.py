"""Lets autograd's threads come to rest before the interpreter ends."""

import atexit
import sys
import time
from pathlib import Path

_THREADS = Path("/proc/self/task")
_NAME = "pt_autograd"
"""How torch names the threads that run the backward pass of a device."""
_LOOK_EVERY_S, _LOOKS_AT_REST, _LONGEST_WAIT_S = 0.001, 5, 2.0


def rest_before_exit() -> None:
    """Wait, when the interpreter is about to end, until autograd's threads sleep.

    A backward pass returns before its thread has let go of its objects, among them the dispatch modes of the
    virtual GPU. For these it needs the interpreter's lock, and a thread that asks for the lock of an
    interpreter that is ending is taken down by it (until Python 3.13) in the middle of a C++ destructor: "terminate
    called without an active exception", signal 6.
    """
    if sys.platform == "linux":
        atexit.register(_rest)


def _rest() -> None:
    deadline = time.monotonic() + _LONGEST_WAIT_S
    looks = 0
    while looks < _LOOKS_AT_REST and time.monotonic() < deadline:
        looks = 0 if any(map(_is_at_work, _THREADS.iterdir())) else looks + 1
        time.sleep(_LOOK_EVERY_S)  # releases the interpreter's lock, for a thread that waits for it


def _is_at_work(thread: Path) -> bool:
    """Return True for a thread of autograd's that does not sleep."""
    try:
        name, _, rest = (thread / "stat").read_text(errors="replace").partition("(")[2].rpartition(")")
    except OSError:  # it has ended
        return False
    return name.startswith(_NAME) and rest.split()[0] != "S"
