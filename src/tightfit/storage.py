"""Files that outlive a process: whole or absent, under known names, in known folders. Imports no torch and no room."""

import contextlib
import difflib
import errno
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

METRICS, PLAN, CONFIG = "metrics.jsonl", "plan.json", "config.json"
"""Files in a run's folder: its metrics, the plan made for it, its configuration."""
EXPLANATION = "explanation.txt"
"""Written where a run ran out of memory."""
BEST, LAST = "ckpt.pt", "last.pt"
"""Checkpoints by nanoGPT's rule (after an evaluation), and at any other step."""
LOCK, OWNER = ".lock", ".owner.json"
"""In a run's folder while a run writes there: the lock, and who holds it."""
AGENTS = ".agents.json"
"""In the folder of a run that torchrun started: its agents, by which a restarted process knows the run as its own."""
PREVIOUS = "previous"
"""Folder in a run's folder for the files of the run that a new one replaced."""


def previous(name: str) -> str:
    """Name of the checkpoint before `name`.

    >>> previous(BEST)
    'ckpt.prev.pt'
    """
    return name.removesuffix(".pt") + ".prev.pt"


def folder_of(name: str) -> str:
    """Name of the folder that stands for the checkpoint `name` of a run of several processes.

    >>> folder_of(BEST)
    'ckpt.dcp'
    """
    return name.removesuffix(".pt") + ".dcp"


CHECKPOINTS = (BEST, LAST, previous(BEST), previous(LAST))
"""All checkpoints that a run may leave in its folder."""
MARKER = "tightfit.json"
"""File in such a folder, written last."""
DAMAGED = ".damaged"
"""What the name of a damaged checkpoint ends with, from the resume that found it."""

_NO_FOLDER_SYNC = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems and folders that cannot be synced; the files in them can."""


@contextlib.contextmanager
def writing(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yield a file beside `path` to write, and rename it to `path` at the end; on an error only delete it.

    `durable`: the file and its name are on disk when this returns.
    `shared`: several writers may write `path` at once, so each part has a name of its own. Otherwise a part that a
    killed process left is overwritten by the next.
    """
    own = f".{os.getpid()}.{threading.get_ident()}" if shared else ""
    part = path.with_name(f".{path.name}{own}.writing")
    with contextlib.ExitStack() as failed:
        failed.callback(_unlink, part)
        yield part
        if durable:
            sync_file(part)
        os.replace(part, path)
        failed.pop_all()
    if durable:
        sync_folder(path.parent)


def _unlink(part: Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here is the one to report
        part.unlink()


def write_aside(path: Path, data: bytes | str, *, durable: bool = False) -> None:
    """Write the whole file, text as UTF-8: a reader finds the old content or the new, and several may write at once."""
    with writing(path, durable=durable, shared=True) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def delete_checkpoint(path: Path) -> None:
    """Delete a file or a folder. The marker goes first, so that a folder half deleted is no checkpoint."""
    with contextlib.suppress(OSError):
        (path / MARKER if path.is_dir() else path).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def make_room(folder: Path, predecessors: Sequence[Path], size: int, *, anyway: bool) -> bool:
    """Delete damaged checkpoints and the predecessors of good ones; return True if there was anything to delete.

    The predecessors stay where that would not be enough for `size` bytes, unless `anyway`.
    """
    stale = list(folder.glob(f"*{DAMAGED}"))
    try:
        free = shutil.disk_usage(folder).free + sum(map(bytes_of, [*stale, *predecessors]))
    except OSError:
        return False
    if anyway or free >= size:
        stale += predecessors
    for path in stale:
        delete_checkpoint(path)
    return bool(stale)


def bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of the files of a folder. OSError if it is not there."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def as_diff(path: str, before: str, after: str) -> str:
    """Return the change of a text file as a unified diff, which `patch` takes."""
    lines = difflib.unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), path, path)
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


def sync_file(path: Path) -> None:
    """Wait until the file's content is on disk, so that a rename after it never publishes an empty file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until renames in the folder are on disk; Windows has no such call and needs none."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def cache_folder() -> Path | None:
    """Folder for files that can be made again: XDG_CACHE_HOME/tightfit on Linux, the system's own place elsewhere.

    None where this user has no home.
    """
    import platformdirs

    try:
        folder = platformdirs.user_cache_path("tightfit", appauthor=False)
    except RuntimeError:  # of newer versions; older ones leave "~"
        return None
    return None if folder.parts[0] == "~" else folder


def has_temporary_folder() -> bool:
    """Return False on a machine where nothing at all can be written."""
    import tempfile

    try:
        return bool(tempfile.gettempdir())
    except FileNotFoundError:
        return False


def without_temporary_folder() -> dict[str, str]:
    """Return the variables that let torch be imported where nothing can be written; none where something can."""
    # torch._dynamo makes this folder at import: an existing one is left as it is
    return {} if has_temporary_folder() else {"TORCHINDUCTOR_CACHE_DIR": os.sep}


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The process that holds a folder."""

    process: int
    user: str
    host: str
    since: str


def owner_of(folder: Path) -> Owner | None:
    """Return the process that holds `folder`, as it wrote itself down; None if that cannot be read."""
    try:
        return msgspec.json.decode((folder / OWNER).read_bytes(), type=Owner)
    except (OSError, msgspec.MsgspecError, RecursionError):
        return None


@contextlib.contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; BlockingIOError if another has it. A process that died holds nothing."""
    import datetime
    import getpass
    import socket

    with locked(folder / LOCK, wait=False):
        try:
            user = getpass.getuser()
        except (KeyError, OSError, ModuleNotFoundError):  # a container's number without a name
            user = str(os.getuid()) if hasattr(os, "getuid") else "?"
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        own = Owner(process=os.getpid(), user=user, host=socket.gethostname(), since=now)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            write_aside(folder / OWNER, msgspec.json.encode(own))
        try:
            yield
        finally:
            _unlink(folder / OWNER)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`; without a lock where it cannot be made. The lock ends with the process.

    Without `wait`, BlockingIOError if another process holds it.
    """
    from filelock import FileLock, Timeout  # imports asyncio: only for those who lock

    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path).acquire(timeout=-1 if wait else 0))
        except Timeout:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock", str(path)) from None
        except (OSError, NotImplementedError):
            pass  # a read-only folder, or a file system without locks
        yield
