"""Save while training goes on: copy the state to host memory, and write the copy in a thread.

The copy is torch.distributed.checkpoint's own, as its asynchronous save makes it, into memory that is kept from one
save to the next. The thread writes what a save without it would write, by the same steps and with the same promises.
Its agreements with other processes have a process group of their own: they never meet those of training.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.tensor import DTensor

from tightfit.errors import CannotSave
from tightfit.trainer import checkpoint as ckpt
from tightfit.trainer.checkpoint import Checkpoint
from tightfit.trainer.distributed import World
from tightfit.trainer.out_of_memory import is_out_of_memory
from tightfit.wording import say


class BackgroundSaves:
    """Writes one state at a time. All processes that save together make it together."""

    def __init__(self, world: World, *, in_parts: bool) -> None:
        self._in_parts = in_parts
        if in_parts and world.size > 1:
            world = replace(world, group=distributed.new_group(backend="gloo"))
        self._world = world
        self._thread = ThreadPoolExecutor(1, "save")
        self._held: dict[str, Tensor] | None = None

    def staged(self, content: Checkpoint) -> Checkpoint:
        """Return a copy of the state in host memory, which the next copy overwrites."""
        tensors = _tensors(content)
        if self._held is None:
            self._held = _create_cpu_state_dict(dict(tensors), pin_memory=torch.cuda.is_available())
        copies = _copy_state_dict(dict(tensors), self._held, type_check=False)
        by_place = {_place(tensor): copies[name] for name, tensor in tensors.items()}
        return _replaced(content, lambda tensor: by_place[_place(tensor)])

    def begin(self, folder: Path, content: Checkpoint, name: str) -> "Future[None]":
        """Write a staged state in the thread; its errors are those of a save, and CannotSave for lack of memory."""
        return self._thread.submit(self._write, folder, content, name)

    def _write(self, folder: Path, content: Checkpoint, name: str) -> None:
        try:
            self._save(folder, content, name)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise CannotSave(say("trainer.staging.no_memory", folder=folder, reason=error)) from None

    def _save(self, folder: Path, content: Checkpoint, name: str) -> None:
        if not self._in_parts:
            ckpt.save(folder, content, name=name)
            return
        from tightfit.trainer.parts import save_parts  # DCP takes a second to import

        save_parts(folder, content, self._world, name=name, is_last=False)


def _tensors(content: Checkpoint) -> dict[str, Tensor]:
    """Return each tensor once: tied weights have two names."""
    found: dict[object, Tensor] = {}
    _replaced(content, partial(_noted, found))
    return {str(number): tensor for number, tensor in enumerate(found.values())}


def _noted(found: dict[object, Tensor], tensor: Tensor) -> Tensor:
    found.setdefault(_place(tensor), tensor)
    return tensor


def _place(tensor: Tensor) -> object:
    """Return the same for two views of one tensor, as tied weights are."""
    if isinstance(tensor, DTensor) or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.dtype


def _replaced(content: Checkpoint, change: Callable[[Tensor], Tensor]) -> Checkpoint:
    """Return the state with each tensor of model and optimizer changed; its other values are copies."""
    model = {name: change(tensor) for name, tensor in content.model.items()}
    optimizer = _walked(content.optimizer, change)
    assert isinstance(optimizer, Mapping)
    return replace(content, model=model, optimizer=optimizer)


def _walked(value: object, change: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _walked(each, change) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_walked(each, change) for each in value)
    return value
