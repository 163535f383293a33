"""The processes of one run: who they are and what they tell each other."""

import gc
import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from tightfit.errors import ConfigError

T = TypeVar("T")


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
        total = torch.tensor(values, dtype=torch.float64, device=self.flag_device(device))
        dist.all_reduce(total)
        return [float(x) for x in total.tolist()]

    def flag_device(self, device: torch.device) -> torch.device:
        """Where a few numbers for all processes are: the host, unless only CUDA's backend is there."""
        return device if device.type == "cuda" and dist.get_backend() == "nccl" else torch.device("cpu")

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any process says so; a wait for all of them."""
        return flag if self.size == 1 else self.sum([float(flag)], device)[0] > 0

    def first(self, value: T | None) -> T | None:
        """Return the value of the lowest process that has one other than None."""
        if self.size == 1:
            return value
        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, value)
        return next((each for each in found if each is not None), None)

    def from_main(self, value: T) -> T:
        """Return the main process's `value` in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


class GradientExchange:
    """Sums gradients over all processes once they are complete, in a fixed order and without allocating.

    DDP sums them during backward, which hides the time; but a process that fails there leaves the others waiting for
    sums that never come. Large gradients are summed in place; small ones, whose latency would cost more than their
    bytes, together in one buffer that exists from the start.
    """

    SMALL_BYTES = 1 << 20

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._large = [p for p in parameters if p.nbytes >= self.SMALL_BYTES]
        self._small = [p for p in parameters if p.nbytes < self.SMALL_BYTES]
        self._buffer = torch.cat([p.detach().flatten() for p in self._small])
        sizes = [parameter.numel() for parameter in self._small]
        parts = torch.split_with_sizes(self._buffer, sizes)
        self._parts = [part.view(parameter.shape) for part, parameter in zip(parts, self._small, strict=True)]

    def run(self) -> None:
        """All processes call this together, each with all of its gradients."""
        for part, parameter in zip(self._parts, self._small, strict=True):
            part.copy_(_gradient(parameter))
        sums = [self._buffer, *map(_gradient, self._large)]
        for waiting in [dist.all_reduce(each, async_op=True) for each in sums]:
            waiting.wait()
        for part, parameter in zip(self._parts, self._small, strict=True):
            _gradient(parameter).copy_(part)


def same_weights(parameters: Iterable[Tensor]) -> None:
    """Every process takes the main one's, which other processors may have drawn otherwise in the last bit."""
    for parameter in parameters:
        dist.broadcast(parameter.detach(), src=0)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "every parameter has a gradient after backward"
    return parameter.grad


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
    # gloo beside nccl: what processes agree on then does not wait for the device
    chosen = ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo") if backend == "auto" else backend
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
