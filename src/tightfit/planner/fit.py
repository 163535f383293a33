"""Plan of a training run, made in processes of their own before the run allocates anything."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tightfit.config import LOSSY_KEYS, Resolved, TrainConfig, batch_split
from tightfit.config.sizes import parse_bytes
from tightfit.data import open_dataset
from tightfit.errors import DeviceError, DoesNotFit
from tightfit.models.shape import parameter_count, staged_bytes, vocabulary_of
from tightfit.planner.candidates import KeyValue, Plan, is_open, may_recompute, with_values
from tightfit.planner.planned_fallback import PlannedFallback
from tightfit.planner.planning import (
    PlanResult,
    Where,
    allocator_settings,
    card_here,
    make_plan,
    this_host,
    with_shape,
)
from tightfit.planner.probe import is_wanted, timed
from tightfit.planner.sentences import nothing_fits, one_line
from tightfit.simulation.cache import one_at_a_time
from tightfit.system import host_memory
from tightfit.trainer.fallback import Fallback
from tightfit.units import GIB, MIB
from tightfit.wording import say

SOURCE = "plan"
"""Source of the keys that a plan sets."""
_PROCESS_BYTES = GIB
"""Bytes of Python, torch and its libraries, rounded up from 407 MiB measured."""
OBVIOUS_SHARE = 0.5
"""Share of the budget: a run with a rough bound below it is not traced."""


@dataclass(frozen=True)
class Fitted:
    """Run ready to start."""

    resolved: Resolved[TrainConfig]
    fallback: Fallback | None = None


def fit(resolved: Resolved[TrainConfig], *, log: Callable[[str], object]) -> Fitted:
    """Return the configuration with a plan's keys in it, and the fallback for when memory runs out.

    DoesNotFit where nothing fits; DataError and CheckpointError, before anything is traced, for a run that cannot
    start at all.
    """
    open_dataset(resolved.config.dataset, resolved.config.data_dir)
    if resolved.config.shard != "none":  # planned once its processes are connected (planner.fit_cards)
        _set_allocator(resolved.config)
        return Fitted(resolved)
    config = with_shape(resolved.config)
    if config.offloads("activations") and may_recompute(resolved):  # only recomputed blocks can be offloaded
        resolved = _with_keys(resolved, {"activation_checkpointing": config.n_layer})
        config = replace(config, activation_checkpointing=config.n_layer)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    bound = rough_bound(config, processes)
    if config.memory == "auto" and config.device == "cpu" and bound < OBVIOUS_SHARE * host_bytes():
        log(say("planner.fit.unchanged", bound=bound, room=host_bytes()))
        return Fitted(resolved)
    try:
        where = _where(config)
        if where is None:
            return Fitted(resolved)
        if bound < where.budget.bytes * OBVIOUS_SHARE:
            log(say("planner.fit.unchanged", bound=bound, room=where.budget.bytes))
            is_ours = where.gpu is not None and is_open(resolved, "loss")
            return Fitted(_with_keys(resolved, {"loss": "full"} if is_ours else {}))  # the faster one on a card
        with one_at_a_time():  # processes that ask for the same plan: the first traces it, the others recall it
            result = make_plan(resolved, where, processes=processes, log=log)
    except DeviceError as error:
        log(say("planner.fit.no_plan", error=error))
        return Fitted(resolved)
    return _fitted(resolved, config, result, log=log)


def _fitted(
    resolved: Resolved[TrainConfig], config: TrainConfig, result: PlanResult, *, log: Callable[[str], object]
) -> Fitted:
    """Return the run of a plan, the fastest one by measurement where the configuration wants that."""
    where, choice = result.where, result.choice
    if choice.best is None:
        raise DoesNotFit("\n  ".join(nothing_fits(result)))
    if len(choice.offered) > 1 and is_wanted(config, "cuda" if where.gpu else "cpu"):
        offered = timed(config, choice.offered, choice.share, where.gpu.name if where.gpu else "cpu", log=log)
        choice = replace(choice, best=offered[0], offered=offered)
    log(one_line(replace(result, choice=choice)))
    for name, value in result.environ.items():
        os.environ.setdefault(name, value)
    assert choice.best is not None
    fallback = PlannedFallback.of(choice, config.n_layer, where.budget, on_host=where.gpu is None)
    return Fitted(_with_keys(resolved, kept_keys(resolved, choice.best.plan)), fallback)


def kept_keys(resolved: Resolved[TrainConfig], plan: Plan) -> dict[str, KeyValue]:
    """Return the keys of a plan that the user left open, or allowed to change."""
    return {key: value for key, value in plan.keys().items() if key in LOSSY_KEYS or is_open(resolved, key)}


def _set_allocator(config: TrainConfig) -> None:
    """Set the allocator as plans are made, before torch is imported, which reads it once."""
    where = _where(config) if config.device != "cpu" else None
    for name, value in allocator_settings(where.gpu if where else None).items():
        os.environ.setdefault(name, value)


def _with_keys(resolved: Resolved[TrainConfig], keys: Mapping[str, KeyValue]) -> Resolved[TrainConfig]:
    sources = {**resolved.sources, **dict.fromkeys(keys, SOURCE)}
    return Resolved(with_values(resolved.config, keys), sources, resolved.warnings)


def host_bytes() -> int:
    """Bytes that a process started here could use for tensors, without measuring its other memory."""
    return max(0, host_memory().budget_bytes - _PROCESS_BYTES)


def _where(config: TrainConfig) -> Where | None:
    """Return the run's device with its free memory; None for a device that plans do not cover."""
    limit = None if config.memory == "auto" else parse_bytes(config.memory)
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if config.device.startswith("cuda:"):
        index = int(config.device.removeprefix("cuda:"))
    if config.device.startswith("cuda") or config.device == "auto":
        found = card_here(index, limit_bytes=limit)
        if found is not None or config.device != "auto":
            return found
    return this_host(limit) if config.device in ("cpu", "auto") and sys.platform == "linux" else None


def rough_bound(config: TrainConfig, processes: int) -> int:
    """Upper bound in bytes of the requested run: weights, gradients, moments, and every output of every layer.

    Activations of a layer by Korthikanti et al. 2022 (34 s b h + 5 a s^2 b bytes in two-byte numbers), here of four
    bytes, and the logits with their gradient and their float32 copies.
    """
    size = batch_split(config, processes).micro_batch
    vocabulary = vocabulary_of(config)
    width, tokens = config.n_embd, size * config.block_size
    layer = 2 * (34 * tokens * width + 5 * config.n_head * config.block_size * tokens)
    numbers = 20 + (staged_bytes(config) if config.async_save else 0)
    return numbers * parameter_count(config) + config.n_layer * layer + 20 * tokens * vocabulary + 256 * MIB
