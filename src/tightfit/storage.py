"""Files that survive a crash: written aside and renamed, locked, and where the cache is."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path | None:
    """Return XDG_CACHE_HOME/tightfit, or None where this user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tightfit"
    except RuntimeError:
        return None


def write_aside(path: Path, data: bytes) -> None:
    """Write a file beside `path` and rename it there, so that a reader finds the old file or the new one whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file; without a lock where it cannot be made."""
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
