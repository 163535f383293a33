"""A training run's plan, made in processes of their own before the run takes anything."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tightfit.config import LOSSY_KEYS, Resolved, TrainConfig
from tightfit.data import open_dataset
from tightfit.errors import DeviceError, DoesNotFit
from tightfit.models.shape import parameter_count, vocabulary_of
from tightfit.planner.candidates import is_open, may_recompute
from tightfit.planner.planning import Where, card_here, make_plan, this_host, with_shape
from tightfit.simulation.cache import one_at_a_time
from tightfit.system import host_memory
from tightfit.trainer.fallback import Fallback
from tightfit.units import GIB, MIB, format_bytes, parse_bytes

SOURCE = "plan"
"""Where the keys that a plan sets come from."""
_PROCESS_BYTES = GIB
"""More than Python, torch and its libraries take: 407 MiB here."""
_OBVIOUS_SHARE = 0.5
"""Of the budget: a run whose rough bound is below it is not traced."""


@dataclass(frozen=True)
class Fitted:
    """A run as it is to be started."""

    resolved: Resolved[TrainConfig]
    fallback: Fallback | None = None


def fit(resolved: Resolved[TrainConfig], *, say: Callable[[str], object]) -> Fitted:
    """The configuration with a plan's keys in it, and what to do when that fails.

    DoesNotFit where nothing fits; DataError and CheckpointError, before anything is traced, where the run could not
    start at all.
    """
    open_dataset(resolved.config.dataset, resolved.config.data_dir)
    config = with_shape(resolved.config)
    if config.offloads("activations") and may_recompute(resolved):  # it is of recomputed blocks
        resolved = _with_keys(resolved, {"activation_checkpointing": config.n_layer})
        config = replace(config, activation_checkpointing=config.n_layer)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    bound = _rough_bound(config, -(-config.effective_batch // processes))
    if config.memory == "auto" and config.device == "cpu" and bound < _OBVIOUS_SHARE * _host_bytes():
        say(f"plan: as asked, surely below {format_bytes(bound)} of {format_bytes(_host_bytes())}")
        return Fitted(resolved)
    try:
        where = _where(config)
    except (DeviceError, DoesNotFit) as error:
        say(f"plan: none is made, because {error}; out of memory, the run goes on with halves")
        return Fitted(resolved)
    if where is None:
        return Fitted(resolved)
    if bound < where.budget.bytes * _OBVIOUS_SHARE:
        say(f"plan: as asked, surely below {format_bytes(bound)} of {format_bytes(where.budget.bytes)}")
        kept = {"loss": "full"} if where.gpu and is_open(resolved, "loss") else {}  # with room the faster one there
        return Fitted(_with_keys(resolved, kept))
    from tightfit.planner.planned_fallback import PlannedFallback
    from tightfit.planner.probe import is_wanted, timed
    from tightfit.planner.sentences import nothing_fits, one_line

    try:
        with one_at_a_time():  # processes that ask for the same plan: the first traces it, the others recall it
            result = make_plan(resolved, where, processes=processes, say=say)
    except DeviceError as error:
        say(f"plan: none is made, because {error}; out of memory, the run goes on with halves")
        return Fitted(resolved)
    if result.choice.best is None:
        raise DoesNotFit(nothing_fits(result))
    name = where.gpu.name if where.gpu else "cpu"
    if len(result.choice.offered) > 1 and is_wanted(config, "cuda" if where.gpu else "cpu"):
        offered = timed(config, result.choice.offered, result.choice.share, name, say=say)
        result = replace(result, choice=replace(result.choice, best=offered[0], offered=offered))
    best = result.choice.best
    assert best is not None, "one of those that were offered"
    say(one_line(result))
    for name, value in result.environ.items():
        os.environ.setdefault(name, value)
    kept = {key: value for key, value in best.plan.keys().items() if key in LOSSY_KEYS or is_open(resolved, key)}
    fallback = PlannedFallback.of(result.choice, config.n_layer, where.budget, on_host=where.gpu is None)
    return Fitted(_with_keys(resolved, kept), fallback)


def _with_keys(resolved: Resolved[TrainConfig], keys: dict[str, Any]) -> Resolved[TrainConfig]:
    sources = {**resolved.sources, **dict.fromkeys(keys, SOURCE)}
    return Resolved(replace(resolved.config, **keys), sources, resolved.warnings)


def _host_bytes() -> int:
    """What a process started here could use for its tensors, without measuring what it takes besides them."""
    return max(0, host_memory().budget_bytes - _PROCESS_BYTES)


def _where(config: TrainConfig) -> Where | None:
    """The device that the run will be on, with what is free of it; None for one that is not planned for."""
    limit = None if config.memory == "auto" else parse_bytes(config.memory)
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if config.device.startswith("cuda:"):
        index = int(config.device.removeprefix("cuda:"))
    if config.device.startswith("cuda") or config.device == "auto":
        found = card_here(index, limit_bytes=limit)
        if found is not None or config.device != "auto":
            return found
    return this_host(limit) if config.device in ("cpu", "auto") and sys.platform == "linux" else None


def _rough_bound(config: TrainConfig, share: int) -> int:
    """Bytes that the run as asked surely stays below: weights, gradients and moments, and all that a layer makes.

    Activations of a layer by Korthikanti et al. 2022 (34 s b h + 5 a s^2 b bytes in two-byte numbers), here of four
    bytes, and the logits with their gradient and their float32 copies.
    """
    size = min(config.micro_batch or config.batch_size, share)
    vocabulary = vocabulary_of(config)
    width, tokens = config.n_embd, size * config.block_size
    layer = 2 * (34 * tokens * width + 5 * config.n_head * config.block_size * tokens)
    return 20 * parameter_count(config) + config.n_layer * layer + 20 * tokens * vocabulary + 256 * MIB
