"""A dry run leaves the user's files as they are: what it would save is made up, and what is there may be the best run.

Checkpoints are not written at all. A file that was there before the run is not written over, moved or removed either,
by whatever function of Python's own a script or a library does that: the call succeeds, and changes nothing. New files
are written; but a folder that the run made for a checkpoint goes at the end, as it would look like one.
"""

import builtins
import copy
import io
import os
import shutil
import stat
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.vgpu.device import VirtualDevice

_CLOCK_STEP_S = 0.05
"""By how much the clock of file times may be behind, which moves in steps of the kernel's timer (10 ms at most)."""

_STAND_IN = f"tightfit dryrun {os.getpid()}: no checkpoint, its number is ".encode()
_NUMBER_BYTES = 4

_LARGEST_LEFTOVER = 64 << 20
"""Bytes of a checkpoint's folder up to which it is removed: settings and vocabularies. More may be prepared data."""


def install(device: VirtualDevice) -> Callable[[], None]:
    """Patch this process for good; what is returned is to be called when the script has ended."""
    guard = _Guard(device)
    _install_checkpoints(device, guard)
    place: Any
    for place in (builtins, io):
        place.open = guard.open
    for name in ("remove", "unlink", "rmdir", "removedirs"):
        setattr(os, name, guard.unless_old(getattr(os, name), paths=1))
    for name in ("rename", "replace", "renames"):
        setattr(os, name, guard.unless_old(getattr(os, name), paths=2))
    shutil.rmtree = guard.unless_old(shutil.rmtree, paths=1)  # type: ignore[assignment]
    os.mkdir = guard.mkdir
    return guard.remove_leftovers


class _Guard:
    """Tells the user's files from those that the run made: by the time of their last change."""

    def __init__(self, device: VirtualDevice) -> None:
        self._not_written = device.not_written
        self._started = time.time() - _CLOCK_STEP_S
        self._open = builtins.open
        self._lstat, self._walk = os.lstat, os.walk
        self._mkdir, self._remove, self._remove_tree = os.mkdir, os.remove, shutil.rmtree
        self._made_folders: set[str] = set()
        self._made_files: set[str] = set()
        self.checkpoints: set[str] = set()
        """Where the script wanted to save."""

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """`builtins.open`; what is written to an old file goes nowhere."""
        if not isinstance(file, int) and set("wa+") & set(str(mode)) and self._is_old(file):
            self._note(file)
            file = os.devnull
        if isinstance(file, (str, os.PathLike)) and "b" in mode and set("wx") & set(mode):
            self._made_files.add(os.path.realpath(file))
        return self._open(file, mode, *args, **kwargs)

    def mkdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._mkdir(path, *args, **kwargs)
        if kwargs.get("dir_fd") is None:
            self._made_folders.add(os.path.realpath(os.fsdecode(path)))

    def remove_leftovers(self) -> None:
        """Remove what would pass for a checkpoint of this run."""
        for folder in {os.path.dirname(path) for path in self.checkpoints} & self._made_folders:
            if self._bytes_in(folder) <= _LARGEST_LEFTOVER:
                self._remove_tree(folder, ignore_errors=True)
        for file in self._made_files:
            if os.path.isfile(file) and _number_in(file) is not None:
                self._remove(file)

    def _bytes_in(self, folder: str) -> int:
        files = (os.path.join(where, name) for where, _, names in self._walk(folder) for name in names)
        return sum(self._lstat(file).st_size for file in files)

    def unless_old(self, function: Callable[..., Any], paths: int) -> Callable[..., Any]:
        """`function`, whose first arguments are paths, or nothing if one of them is or holds an old file."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            old = [path for path in args[:paths] if self._is_old(path, kwargs.get("dir_fd"))]
            if not old:
                if paths == 2:
                    self._made_files.add(os.path.realpath(os.fsdecode(args[1])))
                return function(*args, **kwargs)
            self._note(old[0])
            return None

        return guarded

    def _note(self, path: Any) -> None:
        text = os.fsdecode(path)
        if text not in self._not_written:
            self._not_written.append(text)

    def _is_old(self, path: Any, folder: int | None = None) -> bool:
        """Whether a path is a file from before the run, or a folder that holds one; asked while the script runs."""
        if not torch._C._len_torch_dispatch_stack():  # our own files are written when the device is off
            return False
        try:
            found = self._lstat(path, dir_fd=folder)
        except (OSError, ValueError):
            return False
        if stat.S_ISREG(found.st_mode):
            return found.st_ctime < self._started
        if folder is not None or not stat.S_ISDIR(found.st_mode):
            return False
        return any(self._is_old(os.path.join(where, name)) for where, _, names in self._walk(path) for name in names)


def _install_checkpoints(device: VirtualDevice, guard: _Guard) -> None:
    """What a script saves it can load again in the same run: its best weights, or a copy by way of a buffer."""
    usual_load = torch.load
    saved: list[Any] = []
    places: dict[str, int] = {}

    def save(content: object, file: Any, *args: Any, **kwargs: Any) -> None:
        with device.phases.named("save"):
            name = _name(file)
            if name != os.devnull:  # an old file, which the guard has told of
                device.not_written.append(name)
            saved.append(_outline(content, {}, device))
            if isinstance(file, (str, os.PathLike)):
                places[os.path.realpath(file)] = len(saved) - 1
                guard.checkpoints.add(os.path.realpath(file))
            else:
                file.write(_STAND_IN + len(saved).to_bytes(_NUMBER_BYTES))

    def load(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        with device.phases.named("resume"):
            number = places.get(os.path.realpath(file)) if isinstance(file, (str, os.PathLike)) else None
            if number is None:
                number = _number_in(file)
            content = (
                usual_load(file, "cpu", *args, **kwargs) if number is None else _outline(saved[number], {}, device)
            )
            target = map_location if isinstance(map_location, (str, torch.device)) else None
            if target is not None and torch.device(target).type == "cuda":
                return _moved(content, torch.device(target), {})
            return content

    library: Any = torch
    library.save, library.load = save, load
    try:
        import safetensors.torch as safetensors
    except ImportError:
        return
    safetensors.save_file = lambda tensors, filename, metadata=None: save(tensors, filename)


def _number_in(file: Any) -> int | None:
    """Which of the saved checkpoints a file or buffer stands for; None if it is a real one."""
    if isinstance(file, (str, os.PathLike)):
        try:
            with open(file, "rb") as opened:
                return _number_in(opened)
        except OSError:
            return None
    if not (hasattr(file, "read") and hasattr(file, "seek")):
        return None
    start = file.tell()
    head = file.read(len(_STAND_IN) + _NUMBER_BYTES)
    file.seek(start)
    return int.from_bytes(head[len(_STAND_IN) :]) - 1 if head.startswith(_STAND_IN) else None


def _outline(content: Any, memo: dict[int, Any], device: VirtualDevice) -> Any:
    """A copy of what is saved, with tensors on the host; those of the device have no data there either."""
    if isinstance(content, Tensor):
        key = content.untyped_storage()._cdata
        if key not in memo:
            if isinstance(content, FakeTensor):
                with device.fake:
                    memo[key] = torch.empty(content.shape, dtype=content.dtype, device="cpu")
            else:
                memo[key] = content.detach().clone()
        return memo[key]
    if isinstance(content, dict):
        copied = copy.copy(content)
        for name, value in content.items():
            copied[name] = _outline(value, memo, device)
        return copied
    if type(content) in (list, tuple):
        return type(content)(_outline(value, memo, device) for value in content)
    return content


def _name(file: object) -> str:
    if isinstance(file, (str, os.PathLike)):
        return os.fspath(file)
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else "a buffer in memory"


def _moved(content: Any, where: torch.device, memo: dict[int, Any]) -> Any:
    """A loaded checkpoint with its tensors on the device, shared ones once."""
    if isinstance(content, Tensor):
        key = content.untyped_storage()._cdata
        if key not in memo:
            memo[key] = content.to(where)
        return memo[key]
    if isinstance(content, dict):
        for key, value in content.items():
            content[key] = _moved(value, where, memo)
        return content
    if isinstance(content, list):
        content[:] = [_moved(value, where, memo) for value in content]
        return content
    if type(content) is tuple:
        return tuple(_moved(value, where, memo) for value in content)
    return content
