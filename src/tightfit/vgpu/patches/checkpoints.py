"""Checkpoints of a dry run: no data is written, but a script can load its own checkpoints again."""

import contextlib
import copy
import functools
import os
import shutil
from collections.abc import Callable, Mapping
from typing import IO, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.patches import safetensors_files
from tightfit.vgpu.patches.files import FileGuard
from tightfit.wording import say

File = str | os.PathLike[str] | IO[bytes]
Load = Callable[..., object]

_STAND_IN = f"tightfit dryrun {os.getpid()}: no checkpoint, its number is ".encode()
_NUMBER_BYTES = 4
_FROM_CARD = "tightfit_was_on_card"
"""Attribute of a saved tensor that was on the card."""


def install(device: VirtualDevice, guard: FileGuard) -> None:
    """Keep the checkpoints that a script saves, so that it can load them again in the same run."""
    checkpoints = _Checkpoints(device, guard, torch.load)
    device.at_end.append(checkpoints.remove_stand_ins)
    assign(torch, save=checkpoints.save, load=checkpoints.load)
    safetensors_files.install(checkpoints)
    if not guard.is_needed:
        _copy_holes(checkpoints)


def _copy_holes(checkpoints: "_Checkpoints") -> None:
    """Copy a checkpoint as the hole that it is: Python would write its zeros."""
    usual: Callable[..., object] = shutil.copyfile

    @functools.wraps(usual)
    def copyfile(src: str, dst: str, *, follow_symlinks: bool = True) -> object:
        if not os.path.isfile(src) or not checkpoints.is_stand_in(src):
            return usual(src, dst, follow_symlinks=follow_symlinks)
        with open(src, "rb") as source, open(dst, "wb") as target:
            target.write(source.read(len(_STAND_IN) + _NUMBER_BYTES))
            target.truncate(os.path.getsize(src))
        return dst

    assign(shutil, copyfile=copyfile)


class _Checkpoints:
    """The checkpoints that a script saved, and where."""

    def __init__(self, device: VirtualDevice, guard: FileGuard, usual_load: Load) -> None:
        self._device, self._guard, self._usual_load = device, guard, usual_load
        self._saved: list[object] = []
        self._places: dict[str, int] = {}

    def save(self, obj: object, f: File, *args: object, **kwargs: object) -> None:
        """Keep an outline of the content, and write a stand-in into a buffer."""
        with self._device.phases.named("save"):
            name = _name(f)
            if not self._guard.is_discarded(name):  # else the guard has noted the old file already
                self._device.not_written.append(name)
            self._saved.append(_outline(obj, {}, self._device))
            if isinstance(f, (str, os.PathLike)):
                self._places[os.path.realpath(f)] = len(self._saved) - 1
                self._guard.checkpoints.add(os.path.realpath(f))
                if not self._guard.is_needed:
                    self._write_stand_in(f)
            else:
                f.write(_STAND_IN + len(self._saved).to_bytes(_NUMBER_BYTES))

    def _write_stand_in(self, file: str | os.PathLike[str]) -> None:
        """Write the file itself, as scripts look for it; nothing stays on the disk."""
        folder = os.path.dirname(os.fspath(file))
        if folder and not os.path.isdir(folder):
            raise RuntimeError(f"Parent directory {folder} does not exist.")
        with open(file, "wb") as opened:
            opened.write(_STAND_IN + len(self._saved).to_bytes(_NUMBER_BYTES))
            with contextlib.suppress(OSError):  # a file system without holes, or with a limit to a file's size
                opened.truncate(opened.tell() + _data_bytes(self._saved[-1], set()))  # a hole takes no disk

    def is_stand_in(self, file: str | os.PathLike[str]) -> bool:
        """Return True for a file that this run saved."""
        return os.path.realpath(file) in self._places or _number_in(file) is not None

    def load(self, f: File, map_location: object = None, *args: object, **kwargs: object) -> object:
        """Load a checkpoint of this run or a real file, and move its tensors to the device if asked to."""
        of_card = _OfCard()
        with self._device.phases.named("resume"):
            number = self._places.get(os.path.realpath(f)) if isinstance(f, (str, os.PathLike)) else None
            if number is None:
                number = _number_in(f)
            if number is None:
                content = self._usual_load(f, of_card.on_host, *args, **kwargs)
            else:
                content = _outline(self._saved[number], {}, self._device)
            return _moved(content, lambda tensor: _place(map_location, of_card.has(tensor)), {})

    def remove_stand_ins(self) -> None:
        """Remove the files of stand-ins that the script wrote from its buffers."""
        for file in self._guard.made_files:
            if os.path.isfile(file) and _number_in(file) is not None:
                os.remove(file)


class _OfCard:
    """Storages of a real file that were on a card when it was saved."""

    def __init__(self) -> None:
        self._storages: set[int] = set()

    def on_host(self, storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        """Load a storage to the host: a `map_location` of `torch.load`."""
        if location.startswith("cuda"):
            self._storages.add(storage._cdata)
        return storage

    def has(self, tensor: Tensor) -> bool:
        return hasattr(tensor, _FROM_CARD) or tensor.untyped_storage()._cdata in self._storages


def _number_in(file: File) -> int | None:
    """Number of the saved checkpoint that a file or buffer stands for; None if it is a real one."""
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


def _outline(content: object, memo: dict[int, Tensor], device: VirtualDevice) -> object:
    """Copy a checkpoint, with tensors on the host; tensors of the device have no data there either."""
    if isinstance(content, Tensor):
        key = content.untyped_storage()._cdata
        if key not in memo:
            memo[key] = _on_host(content, device)
        return memo[key]
    if isinstance(content, dict):
        copied = copy.copy(content)
        for name, value in content.items():
            copied[name] = _outline(value, memo, device)
        return copied
    if type(content) is list:
        return [_outline(value, memo, device) for value in content]
    if type(content) is tuple:
        return tuple(_outline(value, memo, device) for value in content)
    return content


def _data_bytes(content: object, counted: set[int]) -> int:
    """Return the bytes that a checkpoint's tensors have, shared ones counted once."""
    if isinstance(content, Tensor):
        key = id(content)
        is_new = key not in counted
        counted.add(key)
        return content.numel() * content.element_size() if is_new else 0
    if isinstance(content, dict):
        return sum(_data_bytes(value, counted) for value in content.values())
    if type(content) in (list, tuple):
        return sum(_data_bytes(value, counted) for value in cast("list[object]", content))
    return 0


def _on_host(tensor: Tensor, device: VirtualDevice) -> Tensor:
    if not isinstance(tensor, FakeTensor):
        return tensor.detach().clone()
    with device.fake:
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if tensor.device.type == "cuda" or hasattr(tensor, _FROM_CARD):
        setattr(made, _FROM_CARD, True)
    return made


def _name(file: object) -> str:
    if isinstance(file, (str, os.PathLike)):
        return os.fspath(file)
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else say("vgpu.checkpoints.buffer")


def _place(map_location: object, saved_on_card: bool) -> bool:
    """Return True if `torch.load` puts a tensor on the card: where it was, if the caller does not say."""
    where = "cuda:0" if saved_on_card else "cpu"
    match map_location:
        case str() | torch.device():
            return torch.device(map_location).type == "cuda"
        case Mapping():
            return torch.device(map_location.get(where, where)).type == "cuda"
    if callable(map_location):
        found = map_location(torch.zeros(1, device="cpu").untyped_storage(), where)
        return saved_on_card if found is None else bool(found.device.type == "cuda")
    return saved_on_card


def _moved(content: object, is_for_card: Callable[[Tensor], bool], memo: dict[int, Tensor]) -> object:
    """Move the tensors of a loaded checkpoint to the device, shared ones once."""
    if isinstance(content, Tensor):
        key = content.untyped_storage()._cdata
        if key not in memo:
            memo[key] = content.to("cuda") if is_for_card(content) else content
        return memo[key]
    if isinstance(content, dict):
        for key, value in content.items():
            content[key] = _moved(value, is_for_card, memo)
        return content
    if isinstance(content, list):
        content[:] = [_moved(value, is_for_card, memo) for value in content]
        return content
    if type(content) is tuple:
        return tuple(_moved(value, is_for_card, memo) for value in content)
    return content
