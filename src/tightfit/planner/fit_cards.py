"""Plan of a run that may spread its model over its processes: the first process makes it for all.

On cards the plan compares the shardings as `tightfit plan` does. On the processor the processes share the machine's
memory, and exchanges take the time of copies within it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from tightfit.config import Resolved, TrainConfig
from tightfit.config.sizes import parse_bytes
from tightfit.errors import DeviceError, DoesNotFit
from tightfit.links import Cards
from tightfit.planner.fit import OBVIOUS_SHARE, host_bytes, kept_keys, rough_bound
from tightfit.planner.planned_fallback import PlannedFallback
from tightfit.planner.planning import PlanResult, Where, card_here, make_plan, this_host, with_cards, with_shape
from tightfit.planner.sentences import nothing_fits, one_line
from tightfit.planner.shardings import ALIKE, Sharding
from tightfit.trainer.distributed import World
from tightfit.trainer.spread import SpreadPlan
from tightfit.wording import say


def plan_spread(
    resolved: Resolved[TrainConfig],
    world: World,
    free_bytes: Sequence[int | None],
    *,
    log: Callable[[str], object],
) -> SpreadPlan:
    """Return the plan for all processes; `free_bytes` is what each has on its device, the main process first.

    DoesNotFit where no sharding fits, DeviceError where no plan can be made.
    """
    config = with_shape(resolved.config)
    if config.device == "cpu" and config.memory == "auto":
        bound, room = rough_bound(config, world.size), host_bytes() // world.local_size
        if bound < OBVIOUS_SHARE * room:
            shard = "none" if config.shard == "auto" else config.shard
            why = say("planner.fit_cards.obvious", bound=bound, room=room)
            return SpreadPlan(shard=shard, reason=why if config.shard == "auto" else say("planner.fit_cards.asked"))
    result = make_plan(resolved, _where(config, world, free_bytes), log=log)
    if result.choice.best is None:
        raise DoesNotFit("\n  ".join(nothing_fits(result)))
    plan, where = result.choice.best.plan, result.where
    return SpreadPlan(
        shard=plan.shard,
        reason=_reason(result),
        line=one_line(result),
        keys=kept_keys(resolved, plan),
        fallback=PlannedFallback.of(result.choice, config.n_layer, where.budget, on_host=where.gpu is None),
    )


def _where(config: TrainConfig, world: World, free_bytes: Sequence[int | None]) -> Where:
    """Return the devices of a run as several of the main process's, with the memory of the fullest one."""
    nodes, per_node = divmod(world.size, world.local_size)[0], world.local_size
    if nodes * per_node != world.size:  # machines with different numbers of processes
        nodes, per_node = world.size, 1
    limit = None if config.memory == "auto" else parse_bytes(config.memory)
    found = None if config.device == "cpu" else card_here(world.local_rank, limit_bytes=limit)
    if found is None and config.device in ("cpu", "auto"):
        return replace(this_host(limit, processes=world.local_size), cards=Cards(nodes=nodes, per_node=per_node))
    if found is None:
        raise DeviceError(say("planner.fit_cards.no_device", device=config.device))
    where = with_cards(found, nodes, per_node)
    known = [each for each in free_bytes if each is not None]
    less = max(0, known[0] - min(known)) if known and free_bytes[0] is not None else 0
    return replace(where, budget=replace(where.budget, total_bytes=where.budget.total_bytes - less))


def _reason(result: PlanResult) -> str:
    """Explain the choice by the peak and the time of each sharding."""
    assert result.choice.best is not None
    chosen = result.choice.best.plan.shard
    fitting = [each for each in result.shardings if each.step_s is not None]
    fastest = min(fitting, key=lambda each: each.step_s or 0.0, default=None)
    if len(result.shardings) == 1:
        why = say("planner.fit_cards.asked")
    elif len(fitting) < 2:
        why = say("planner.fit_cards.only")
    elif fastest is None or fastest.name == chosen:
        why = say("planner.fit_cards.fastest")
    else:
        why = say("planner.fit_cards.alike", share=ALIKE)
    rows = say("planner.fit_cards.separator").join(map(_row, result.shardings))
    return say("planner.fit_cards.reason", why=why, rows=rows, room=result.where.budget.bytes)


def _row(sharding: Sharding) -> str:
    if sharding.step_s is None:
        return say("planner.fit_cards.too_large", shard=sharding.name, peak=sharding.peak_bytes)
    return say("planner.fit_cards.fits", shard=sharding.name, peak=sharding.peak_bytes, seconds=sharding.step_s)
