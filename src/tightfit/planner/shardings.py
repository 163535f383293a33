"""Choice of the sharding: how a model is spread over several cards.

The lines of each sharding promise a step's time. The most promising is played in full first, and another one only if it
promises a shorter time than was found.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tightfit.config import CUDA_GRAPH_MODES, Resolved, TrainConfig
from tightfit.links import Cards
from tightfit.planner.candidates import Relief, with_values
from tightfit.planner.lines import Estimate
from tightfit.planner.search import Choice, Search, Task, choose, least_bytes
from tightfit.wording import say

NOTHING = Relief(name="", keys={})
ALIKE = 0.02
"""Part of a step's time below which two promises are alike, and the sharding with the least exchange is taken."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """One way to spread the model, and how it does."""

    name: str
    """none, optimizer, full or hybrid."""
    peak_bytes: int
    """Peak of the fastest plan; where none fits, the least that a step needs."""
    step_s: float | None
    """None: nothing fits."""
    is_traced: bool = False
    """Played in full; False: read off the lines."""


def open_shardings(resolved: Resolved[TrainConfig], cards: Cards) -> list[str]:
    """List the shardings to compare, that with the least exchange first: one that the user named stands alone."""
    asked = resolved.config.shard
    if cards.count == 1:
        return ["none"]
    if asked != "auto" and resolved.sources["shard"] != "default":
        return [asked]
    config = resolved.config
    if config.offload != "none" or config.optimizer != "adamw" or config.mode in CUDA_GRAPH_MODES:
        return ["none"]
    return ["none", "optimizer", *(["hybrid"] if cards.nodes > 1 else []), "full"]


def choose_sharding(
    tasks: Sequence[Task], reliefs: Callable[[Task], list[Relief]], *, log: Callable[[str], object]
) -> tuple[Choice, list[Sharding]]:
    """Return the choice of the fastest sharding that fits, and how each of them does; the last needs least memory."""
    searches, found, promised = dict[str, Search](), dict[str, Sharding](), list[tuple[float, str, Task]]()
    for task in tasks:
        name = task.resolved.config.shard
        needs = least_bytes(task.resolved.config, NOTHING, cards=task.cards)
        found[name] = Sharding(name=name, peak_bytes=needs, step_s=None)
        if needs > task.budget.bytes:
            continue
        log(say("planner.shardings.trying", shard=name))
        searches[name] = Search(task, NOTHING, like=next(iter(searches.values()), None))
        if (estimate := searches[name].promise()) is not None:
            found[name] = _promised(name, estimate)
            assert estimate.step_s is not None, "read off a line"
            promised.append((estimate.step_s, name, task))
    best: Choice | None = None
    faster = 1.0
    for seconds, name, task in in_order(promised):
        least_s = (1 - ALIKE) * best.best.step_s(best.share) if best and best.best else math.inf
        if min(faster, 1.0) * seconds >= least_s:
            break
        choice = choose(task, [NOTHING], searches[name])
        found[name] = _traced(name, choice) or found[name]
        best = _better(best, choice)
        if (found_s := found[name].step_s) is not None:
            faster = found_s / seconds
    found = {name: each if each.is_traced else _sped_up(each, faster) for name, each in found.items()}
    if best is None or best.best is None:
        last = tasks[-1]
        name = last.resolved.config.shard
        best = choose(last, reliefs(last), searches.get(name))
        found[name] = _traced(name, best) or found[name]
    return best, list(found.values())


def in_order(promised: Sequence[tuple[float, str, Task]]) -> list[tuple[float, str, Task]]:
    """Sort by the promised time; those that are as good as the fastest stay in their order."""
    limit = (1 + ALIKE) * min((seconds for seconds, _, _ in promised), default=0.0)
    return sorted(promised, key=lambda each: max(limit, each[0]))


def _sped_up(sharding: Sharding, faster: float) -> Sharding:
    """Return an estimate with the time that compilation, which no line knows, saved in a traced plan."""
    return sharding if sharding.step_s is None else replace(sharding, step_s=faster * sharding.step_s)


def _promised(name: str, estimate: Estimate) -> Sharding:
    return Sharding(name=name, peak_bytes=estimate.peak_bytes, step_s=estimate.step_s)


def _traced(name: str, choice: Choice) -> Sharding | None:
    if choice.best is not None:
        seconds = choice.best.step_s(choice.share)
        return Sharding(name=name, peak_bytes=choice.best.peak_bytes, step_s=seconds, is_traced=True)
    if choice.least is not None:
        return Sharding(name=name, peak_bytes=choice.least.peak_bytes, step_s=None, is_traced=True)
    return None


def _better(one: Choice | None, other: Choice) -> Choice:
    """Return the faster choice, with the plans of both."""
    if one is None or one.best is None:
        return other
    if other.best is None:
        return replace(one, refused=[*one.refused, *other.refused])
    first, second = sorted((one, other), key=lambda each: each.best.step_s(each.share) if each.best else 0.0)
    offered = sorted([*first.offered, *second.offered], key=lambda each: each.step_s(first.share))
    assert first.best is not None
    return replace(
        first,
        offered=[first.best, *(each for each in offered if each is not first.best)],
        refused=[*first.refused, *second.refused],
    )


def with_sharding(resolved: Resolved[TrainConfig], shard: str) -> Resolved[TrainConfig]:
    """Return the configuration with a sharding."""
    return Resolved(with_values(resolved.config, {"shard": shard}), resolved.sources, resolved.warnings)
