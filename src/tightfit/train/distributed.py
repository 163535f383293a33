"""The processes of one run: who they are and what they tell each other."""

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from tightfit.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all of the run, as torchrun numbers them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The part of `count` sequences that is this process's; parts differ by one at most.

        >>> [list(World(rank, 3).share(7)) for rank in range(3)]
        [[0, 1], [2, 3], [4, 5, 6]]
        """
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Element-wise sum over all processes, in float64."""
        if self.size == 1:
            return values
        where = device if device.type == "cuda" and dist.get_backend() == "nccl" else torch.device("cpu")
        total = torch.tensor(values, dtype=torch.float64, device=where)
        dist.all_reduce(total)
        return [float(x) for x in total.tolist()]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any process says so; a wait for all of them."""
        return flag if self.size == 1 else self.sum([float(flag)], device)[0] > 0

    def from_main(self, value: Any) -> Any:
        """The main process's `value` in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def world_of_environment() -> World:
    """From torchrun's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; alone without them."""
    if "RANK" not in os.environ:
        return World()
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"RANK is set, but {error} is not a number beside it; start with torchrun") from None
    return World(rank, size, *local)


@contextmanager
def process_group(world: World, backend: str, device: torch.device) -> Iterator[None]:
    """Connects the processes for the time of the run; nothing for a single one. `backend` may be auto."""
    if world.size == 1:
        yield
        return
    chosen = ("nccl" if device.type == "cuda" else "gloo") if backend == "auto" else backend
    if chosen == "nccl" and device.type != "cuda":
        raise ConfigError(f"backend=nccl needs CUDA, and this run is on {device}; use backend=gloo")
    # Its functions have the default group as a default argument, taken at import: imported by DDP later than now, it
    # would keep the group's threads until after the interpreter's end, where one that frees a tensor aborts.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(chosen)
    try:
        yield
    finally:
        gc.collect()  # models and other holders of the group, so that destroying it ends its threads
        dist.destroy_process_group()
