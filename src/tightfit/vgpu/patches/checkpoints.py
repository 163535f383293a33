"""Checkpoints of a dry run are not written: there is no data to write. What a script saved, it can load again."""

import copy
import os
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.patches.files import FileGuard

_STAND_IN = f"tightfit dryrun {os.getpid()}: no checkpoint, its number is ".encode()
_NUMBER_BYTES = 4


def install(device: VirtualDevice, guard: FileGuard) -> None:
    """Keep what a script saves, so that it can load it again in the same run: its best weights, or a buffer's copy."""
    usual_load = torch.load
    saved: list[Any] = []
    places: dict[str, int] = {}

    def save(content: object, file: Any, *args: Any, **kwargs: Any) -> None:
        with device.phases.named("save"):
            name = _name(file)
            if not guard.is_discarded(name):  # else the guard has noted the old file already
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

    def remove_stand_ins() -> None:
        for file in guard.made_files:
            if os.path.isfile(file) and _number_in(file) is not None:
                os.remove(file)

    device.at_end.append(remove_stand_ins)
    library: Any = torch
    library.save, library.load = save, load
    try:
        import safetensors.torch as safetensors
    except ImportError:
        return
    safetensors.save_file = lambda tensors, filename, metadata=None: save(tensors, filename)


def _number_in(file: Any) -> int | None:
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
