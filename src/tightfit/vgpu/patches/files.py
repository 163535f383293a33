"""Protection of the user's files from a dry run: one of them may be the best checkpoint of a week.

A file or link from before the run is not written over, moved or removed. The call that would do so succeeds and changes
nothing. Where a function of Python's cannot be replaced, an audit hook raises PermissionError instead. Extensions that
open files themselves, and other programs that the script starts, are not covered. New files are written. A folder that
the run made for a checkpoint is removed at the end, as it would look like one.
"""

import builtins
import contextlib
import ctypes
import functools
import io
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, ParamSpec, TypeVar

from tightfit.vgpu.assign import assign
from tightfit.wording import say

P = ParamSpec("P")
R = TypeVar("R")
Path = str | bytes | os.PathLike[str] | os.PathLike[bytes] | int

_FILE_CLOCK = 5
"""Linux's CLOCK_REALTIME_COARSE, which file systems read: it moves in steps of the kernel's timer, 1 to 10 ms."""
_ROUNDING_S = 0.0005
"""Less than a step of that clock, and more than a float of seconds since 1970 errs."""
_CLOCK_STEP_S = 0.05
"""Most seconds by which file times are late on systems without that clock."""

_LARGEST_LEFTOVER = 64 << 20
"""Bytes of a checkpoint's folder up to which it is removed: settings and vocabularies. More may be prepared data."""

_LARGEST_COPY = 64 << 20
"""Bytes of an old file up to which a script that reads and writes it gets a copy; a larger one reads as zeros."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND

_ENTRIES = {
    "remove": {"path": 0},
    "unlink": {"path": 0},
    "rmdir": {"path": 0},
    "removedirs": {"name": 0},
    "rename": {"src": 0, "dst": 1},
    "replace": {"src": 0, "dst": 1},
    "renames": {"old": 0, "new": 1},
    "link": {"dst": 1},
    "symlink": {"dst": 1},
}
"""Functions of `os` that change a folder's entries: the arguments that name these, and their places."""

_TARGETS = ("truncate", "chmod", "chown", "utime", "setxattr", "removexattr")
"""Functions of `os` that change the file that `path` leads to."""


class FileGuard:
    """Tells the user's files from those that the run made, by their time of birth, and keeps the former."""

    def __init__(self, not_written: list[str], *, is_needed: bool = True) -> None:
        self._not_written = not_written
        self.is_needed = is_needed
        self._started = _time_after_all_files() if is_needed else 0.0
        self._active = False
        self._open: Callable[..., IO[str] | IO[bytes]] = builtins.open
        self._os_open: Callable[..., int] = os.open
        self._mkdir: Callable[..., None] = os.mkdir
        self._copy: Callable[..., object] = shutil.copyfile
        self._stat, self._walk, self._truncate, self._remove_tree = os.stat, os.walk, os.truncate, shutil.rmtree
        self._old: set[tuple[int, int]] = set()
        """Device and inode of old files met so far: a link or another program can change their times later."""
        self._stand_ins: str | None = None
        self._made_folders: set[str] = set()
        self.made_files: set[str] = set()
        self.checkpoints: set[str] = set()
        """Where the script wanted to save."""

    def install(self) -> None:
        """Patch Python's functions of this process for good, if they need to be."""
        if not self.is_needed:
            return
        assign(builtins, io, open=self.open)
        assign(os, open=self.os_open, mkdir=self.mkdir)
        for name in _ENTRIES.keys() | _TARGETS:
            usual = getattr(os, name, None)
            if usual is None:  # another system's
                continue
            guarded = self._unless_old(usual, _ENTRIES.get(name, {"path": 0}), follow=name in _TARGETS)
            assign(os, **{name: guarded})
            for able in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
                if usual in able:
                    able.add(guarded)
        assign(shutil, rmtree=self._unless_old(shutil.rmtree, {"path": 0}, follow=False))
        sys.addaudithook(self._audit)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Guard the old files, in all threads, while the lines within run."""
        self._active = self.is_needed
        try:
            yield
        finally:
            self._active = False
            if self.is_needed:
                self._remove_leftovers()

    def open(self, file: Path, mode: str = "r", *args: object, **kwargs: object) -> IO[str] | IO[bytes]:
        """Open as `builtins.open` does; writes to an old file go elsewhere."""
        # Mode "x" fails by itself where a file is there.
        if not isinstance(file, int) and set("wa+") & set(str(mode)) and self._is_old(file):
            self._note(file)
            file = self._stand_in(file, keep="w" not in mode) if "+" in mode else os.devnull
        elif isinstance(file, (str, os.PathLike)) and "b" in mode and set("wx") & set(mode):
            self.made_files.add(os.path.realpath(_text(file)))
        return self._open(file, mode, *args, **kwargs)

    def os_open(self, path: Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """Open as `os.open` does; writes to an old file go elsewhere."""
        exclusive = flags & os.O_CREAT and flags & os.O_EXCL
        if flags & _WRITING and not exclusive and self._is_old(path, dir_fd):
            self._note(path)
            # A file of its own, and not the null device: locks on two files must not be one lock.
            path, dir_fd = self._stand_in(path, keep=not flags & os.O_TRUNC, folder=dir_fd), None
        return self._os_open(path, flags, mode, dir_fd=dir_fd)

    def is_discarded(self, name: str) -> bool:
        """Return True if writes to the open file of this name are discarded, as its path was an old file."""
        return name == os.devnull or (self._stand_ins is not None and name.startswith(self._stand_ins))

    def mkdir(self, path: Path, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        """Make a folder as `os.mkdir` does, and remember it."""
        self._mkdir(path, mode, dir_fd=dir_fd)
        if dir_fd is None:
            self._made_folders.add(os.path.realpath(_text(path)))

    def _stand_in(self, path: Path, *, keep: bool, folder: int | None = None) -> str:
        """Return the path of a new file with an old one's content, where `keep`, or with none."""
        if self._stand_ins is None:
            self._stand_ins = tempfile.mkdtemp(prefix="tightfit-")
        handle, name = tempfile.mkstemp(dir=self._stand_ins)
        os.close(handle)
        if keep:
            size = self._stat(path, dir_fd=folder).st_size
            if size <= _LARGEST_COPY and folder is None:
                self._copy(path, name)
            else:
                self._truncate(name, size)
        return name

    def _remove_leftovers(self) -> None:
        """Remove stand-ins, and folders that would pass for a checkpoint of this run."""
        for folder in {os.path.dirname(path) for path in self.checkpoints} & self._made_folders:
            if self._bytes_in(folder) <= _LARGEST_LEFTOVER:
                self._remove_tree(folder, ignore_errors=True)
        if self._stand_ins is not None:
            self._remove_tree(self._stand_ins, ignore_errors=True)
            self._stand_ins = None

    def _bytes_in(self, folder: str) -> int:
        files = (os.path.join(where, name) for where, _, names in self._walk(folder) for name in names)
        return sum(self._stat(file, follow_symlinks=False).st_size for file in files)

    def _unless_old(
        self, function: Callable[P, R], arguments: dict[str, int], *, follow: bool
    ) -> Callable[P, R | None]:
        """Return `function`, which does nothing if one of these arguments names or holds an old file."""

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
            if not self._active:
                return function(*args, **kwargs)
            followed = follow and kwargs.get("follow_symlinks") is not False
            for name, place in arguments.items():
                path = _path(kwargs[name] if name in kwargs else args[place] if place < len(args) else None)
                folder = kwargs.get(f"{name}_dir_fd", kwargs.get("dir_fd"))
                if self._is_old(path, folder if isinstance(folder, int) else None, follow=followed):
                    self._note(path)
                    return None
            if len(arguments) == 2:
                self.made_files.add(os.path.realpath(_text(path)))
            return function(*args, **kwargs)

        return guarded

    def _note(self, path: Path) -> None:
        text = _text(path)
        if text not in self._not_written:
            self._not_written.append(text)

    def _is_old(self, path: Path, folder: int | None = None, *, follow: bool = True) -> bool:
        """Return True if a path is a file or link from before the run, or a folder that holds one."""
        if not self._active:  # our own files are written when the script does not run
            return False
        try:
            found = (
                self._stat(path) if isinstance(path, int) else self._stat(path, dir_fd=folder, follow_symlinks=follow)
            )
        except (OSError, ValueError, TypeError):  # it is not there, or no path: the function itself reports that
            return False
        if stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
            return self._is_from_before(path, folder, found, follow)
        if folder is not None or isinstance(path, int) or not stat.S_ISDIR(found.st_mode):
            return False
        inside = (os.path.join(where, name) for where, _, names in self._walk(os.fsdecode(path)) for name in names)
        return any(self._is_old(file, follow=False) for file in inside)

    def _is_from_before(self, path: Path, folder: int | None, found: os.stat_result, follow: bool) -> bool:
        key = (found.st_dev, found.st_ino)
        if key in self._old:
            return True
        born = _born_s(path, folder, follow=follow)
        if (found.st_ctime if born is None else born) >= self._started:
            return False
        self._old.add(key)
        return True

    def _audit(self, event: str, args: tuple[object, ...]) -> None:
        """Refuse changes that reached Python's own functions past the replaced ones."""
        if not self._active or event not in ("open", "os.remove", "os.rename", "os.truncate"):
            return
        paths: list[tuple[object, object, bool]]
        if event == "open":
            flags = args[2]
            exclusive = isinstance(flags, int) and flags & os.O_CREAT and flags & os.O_EXCL
            paths = [(args[0], None, True)] if isinstance(flags, int) and flags & _WRITING and not exclusive else []
        elif event == "os.rename":
            paths = [(args[0], args[2], False), (args[1], args[3], False)]
        else:
            paths = [(args[0], args[1] if event == "os.remove" else None, event == "os.truncate")]
        for path, folder, follow in paths:
            given = folder if isinstance(folder, int) and folder >= 0 else None
            if isinstance(path, (str, bytes)) and self._is_old(path, given, follow=follow):
                self._note(path)
                raise PermissionError(say("vgpu.files.old_file", file=os.fsdecode(path)))


def _path(argument: object) -> Path:
    """Return a script's argument as a path; the empty path, which is no file, for other types."""
    return argument if isinstance(argument, (str, bytes, os.PathLike, int)) else ""


def _text(path: Path) -> str:
    return str(path) if isinstance(path, int) else os.fsdecode(path)


def _time_after_all_files() -> float:
    """Wait for a time that no file so far can have, and return it, in seconds since 1970.

    A play by a warm process starts a millisecond after the user saved a file.
    """
    if sys.platform != "linux":
        return time.time() - _CLOCK_STEP_S
    now = time.clock_gettime(_FILE_CLOCK)
    while (later := time.clock_gettime(_FILE_CLOCK)) <= now:
        time.sleep(0.0005)
    return later - _ROUNDING_S


class _Statx(ctypes.Structure):
    """Linux's `struct statx`, as far as the time of birth."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("before", ctypes.c_uint8 * 76),
        ("born_s", ctypes.c_int64),
        ("born_ns", ctypes.c_uint32),
        ("after", ctypes.c_uint8 * 164),
    )


_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH = -100, 0x100, 0x1000
_STATX_BTIME = 0x800
_statx = getattr(ctypes.CDLL(None), "statx", None)


def _born_s(path: Path, folder: int | None, *, follow: bool) -> float | None:
    """Return when a file was made, in seconds since 1970; None where the file system does not keep that.

    Unlike the times that `os.stat` returns, no later change of the file, its rights or its links moves it.
    """
    if _statx is None:
        return None
    if isinstance(path, int):
        place, name, flags = path, b"", _AT_EMPTY_PATH
    else:
        place = _AT_FDCWD if folder is None else folder
        name, flags = os.fsencode(path), 0 if follow else _AT_SYMLINK_NOFOLLOW
    found = _Statx()
    if _statx(place, name, flags, _STATX_BTIME, ctypes.byref(found)) or not found.mask & _STATX_BTIME:
        return None
    return float(found.born_s + found.born_ns / 1e9)
