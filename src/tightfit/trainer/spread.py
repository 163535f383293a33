"""Agree on how a run is spread over its processes: the main process plans, and all of them do as its plan says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from tightfit.config import Resolved, TrainConfig
from tightfit.config.schema import Setting
from tightfit.errors import DeviceError, TightfitError
from tightfit.models.model import GPTConfig
from tightfit.models.shape import parameter_count, state_bytes
from tightfit.trainer.distributed import World
from tightfit.trainer.events import ShardingEvent
from tightfit.trainer.fallback import Fallback
from tightfit.trainer.out_of_memory import free_bytes
from tightfit.wording import say

_SOURCE = "plan"
"""Source of the keys that a plan sets."""


@dataclass(frozen=True, kw_only=True)
class SpreadPlan:
    """A plan as the main process sends it to the others."""

    shard: str
    """none, optimizer, full or hybrid; auto: the plan could not be made."""
    reason: str
    """Reason for this sharding."""
    line: str = ""
    """The plan in one line; empty where nothing had to be traced."""
    keys: Mapping[str, Setting] = field(default_factory=dict)
    """Keys of the configuration that the plan sets."""
    fallback: Fallback | None = None


class MakePlan(Protocol):
    """Make the plan, in the main process only. DoesNotFit where nothing fits, DeviceError where none can be made."""

    def __call__(
        self,
        resolved: Resolved[TrainConfig],
        world: World,
        free_bytes: Sequence[int | None],
        *,
        log: Callable[[str], object],
    ) -> SpreadPlan: ...


def agreed_plan(
    resolved: Resolved[TrainConfig],
    make: MakePlan | None,
    world: World,
    device: torch.device,
    *,
    log: Callable[[str], object],
) -> SpreadPlan | None:
    """Return the main process's plan in all processes, or raise its error in all; None for a run that needs none.

    All processes call this together.
    """
    if resolved.config.shard == "none" or world.size == 1 or make is None:
        return None
    free = world.all(free_bytes(device))
    plan = world.from_main(_made(make, resolved, world, free, log) if world.is_main else None)
    if isinstance(plan, TightfitError):
        raise plan
    return plan


def _made(
    make: MakePlan,
    resolved: Resolved[TrainConfig],
    world: World,
    free: Sequence[int | None],
    log: Callable[[str], object],
) -> SpreadPlan | TightfitError:
    """Make the plan; return an error instead of raising it, for the other processes wait for an answer."""
    try:
        return make(resolved, world, free, log=log)
    except DeviceError as error:  # the run can do without a plan
        return SpreadPlan(shard=resolved.config.shard, reason=say("planner.fit.no_plan", error=error))
    except TightfitError as error:
        return error


def as_planned(resolved: Resolved[TrainConfig], plan: SpreadPlan) -> Resolved[TrainConfig]:
    """Return the configuration with a plan's keys in it."""
    config = TrainConfig(**{**vars(resolved.config), **plan.keys, "shard": plan.shard})
    changed = {*plan.keys, *(("shard",) if config.shard != resolved.config.shard else ())}
    return Resolved(config, {**resolved.sources, **dict.fromkeys(changed, _SOURCE)}, resolved.warnings)


def with_sharding(
    config: TrainConfig, plan: SpreadPlan | None, shape: GPTConfig, world: World, device: torch.device
) -> tuple[TrainConfig, ShardingEvent | None]:
    """Choose the sharding by a rule of thumb if no plan did; return the reason too, None where the user chose.

    All processes call this together.
    """
    if config.shard != "auto":
        return config, ShardingEvent(shard=config.shard, reason=plan.reason) if plan else None
    need = parameter_count(shape) * state_bytes(config)
    free = min((each for each in world.all(free_bytes(device)) if each is not None), default=None)
    if free is not None and device.type == "cpu":
        free //= world.local_size  # the processes of a machine share its memory
    shard = sharding_that_fits(need, free, world) if world.size > 1 else "none"
    room = say("trainer.spread.room", free=free) if free is not None else ""
    why = f"{plan.reason} " if plan else ""
    reason = why + say("trainer.spread.by_rule", need=need, room=room)
    return replace(config, shard=shard), ShardingEvent(shard=shard, reason=reason)


def sharding_that_fits(state: int, free: int | None, world: World) -> str:
    """Return the sharding with the least exchange that leaves half of `free` bytes to activations, beside its `state`.

    >>> two_machines = World(rank=0, size=16, local_rank=0, local_size=8)
    >>> [sharding_that_fits(gib, 20, two_machines) for gib in (8, 60, 100)]
    ['none', 'hybrid', 'full']
    """
    if free is None or 2 * state <= free:
        return "none"
    fits_in_machine = 2 * state <= free * world.local_size
    return "hybrid" if fits_in_machine and world.local_size < world.size else "full"
