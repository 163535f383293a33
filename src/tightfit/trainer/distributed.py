"""Connect the processes of one run: ranks, sums, agreements, the exchange of gradients."""

import gc
import importlib
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from tightfit.errors import ConfigError, DeviceError
from tightfit.storage import AGENTS
from tightfit.wording import say

T = TypeVar("T")
_ASKING_S = 0.01
"""Seconds between two looks at who has come."""


@dataclass(frozen=True)
class World:
    """This process among all of the run, as torchrun numbers them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: "dist.ProcessGroup | None" = None
    """Process group of its agreements; None: the run's."""

    @property
    def is_main(self) -> bool:
        """True in the process that prints and writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return this process's part of `count` sequences; parts differ by one at most.

        >>> [list(World(rank, 3).share(7)) for rank in range(3)]
        [[0, 1], [2, 3], [4, 5, 6]]
        """
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Add up each element over all processes, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.flag_device(device))
        dist.all_reduce(total, group=self.group)
        return [float(x) for x in total.tolist()]

    def flag_device(self, device: torch.device) -> torch.device:
        """Return the device for small sums over all processes: the host, unless NCCL is the only backend."""
        return device if device.type == "cuda" and dist.get_backend() == "nccl" else torch.device("cpu")

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return True if `flag` is True in any process, after all of them called this."""
        return flag if self.size == 1 else self.sum([float(flag)], device)[0] > 0

    def first(self, value: T | None) -> T | None:
        """Return the value of the lowest process that has one other than None."""
        if self.size == 1:
            return value
        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return next((each for each in found if each is not None), None)

    def all(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        found = [value] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def from_main(self, value: T) -> T:
        """Return the main process's `value` in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


class GradientExchange:
    """Sum complete gradients over all processes, in a fixed order and without allocating.

    DDP sums them during backward, which hides the time. But a process that fails there leaves the others waiting for
    sums that never come. Large gradients are summed in place. Small ones, for which latency costs more than bytes,
    share one buffer that exists from the start.
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
        """Exchange; all processes call this together, each with all of its gradients."""
        for part, parameter in zip(self._parts, self._small, strict=True):
            part.copy_(_gradient(parameter))
        sums = [self._buffer, *map(_gradient, self._large)]
        for waiting in [dist.all_reduce(each, async_op=True) for each in sums]:
            waiting.wait()
        for part, parameter in zip(self._parts, self._small, strict=True):
            _gradient(parameter).copy_(part)


def same_weights(parameters: Iterable[Tensor]) -> None:
    """Copy the main process's weights into every process: other processors may draw other last bits."""
    for parameter in parameters:
        dist.broadcast(parameter.detach(), src=0)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "every parameter has a gradient after backward"
    return parameter.grad


def world_of_environment() -> World:
    """Read torchrun's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; a single process without them."""
    if "RANK" not in os.environ:
        return World()
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except (KeyError, ValueError) as error:
        raise ConfigError(say("trainer.distributed.no_rank", reason=error)) from None
    return World(rank, size, *local)


class Agents(msgspec.Struct, frozen=True):
    """The torchrun processes that started the processes of a run."""

    names: list[str]


def agents(world: World) -> Agents:
    """Return the agents of all processes; none without torchrun. All processes call this together."""
    name = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = psutil.Process(os.getppid())
        name = f"{socket.gethostname()} {parent.pid} {parent.create_time()}"
    return Agents(sorted({each for each in world.all(name) if each}))


def was_started_by(folder: Path, now: Agents) -> bool:
    """Return True if one of these agents has started the run in `folder` before: it now restarts its processes."""
    try:
        before = msgspec.json.decode((folder / AGENTS).read_bytes(), type=Agents)
    except (OSError, msgspec.MsgspecError):
        return False
    return not set(before.names).isdisjoint(now.names)


def fresh_name(store: "dist.Store", rank: int, size: int) -> str:  # type: ignore[name-defined]
    """Agree on a name that no processes before these had; all processes call this together.

    torchrun's store outlives its processes, and holds what those before left there. Its count of restarts is no such
    name: an agent that joins later counts from zero. So each process asks with a new word, and the first answers.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"tightfit/asks/{rank}", own)
        name: str = store.get(f"tightfit/name/{own}").decode()
        store.set(f"tightfit/knows/{name}/{rank}", "1")
        return name
    end, waiting = time.monotonic() + store.timeout.total_seconds(), set(range(1, size))
    while waiting and time.monotonic() < end:
        for other in sorted(waiting):
            if store.check([asks := f"tightfit/asks/{other}"]):
                store.set(f"tightfit/name/{store.get(asks).decode()}", own)
        waiting = {other for other in waiting if not store.check([f"tightfit/knows/{own}/{other}"])}
        time.sleep(_ASKING_S if waiting else 0)
    if waiting:
        raise DeviceError(
            say("trainer.distributed.did_not_come", ranks=", ".join(map(str, sorted(waiting))), size=size)
        )
    return own


@contextmanager
def process_group(world: World, backend: str, device: torch.device) -> Iterator[str]:
    """Connect the processes for the time of the run, and yield the name of this start; do nothing for a single one.

    `backend` may be auto.
    """
    if world.size == 1:
        yield ""
        return
    # gloo beside nccl: agreements between processes then do not wait for the device
    chosen = ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo") if backend == "auto" else backend
    if chosen == "nccl" and device.type != "cuda":
        raise ConfigError(say("trainer.distributed.nccl_without_cuda", device=device))
    # At its import this module stores the default group in default arguments. Imported later, by DDP, it would keep the
    # group's threads until after the interpreter's end, where a thread that frees a tensor aborts.
    importlib.import_module("torch.distributed.nn.functional")
    store, rank, size = next(rendezvous("env://"))
    name = fresh_name(store, rank, size)
    prefixed = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    dist.init_process_group(chosen, store=prefixed, rank=rank, world_size=size)
    try:
        yield name
    finally:
        gc.collect()  # models and other holders of the group, so that destroying it ends its threads
        dist.destroy_process_group()
