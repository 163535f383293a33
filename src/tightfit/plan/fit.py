"""A training run's plan, made in processes of their own before the run takes anything."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tightfit.config import Resolved, TrainConfig
from tightfit.errors import DeviceError, DoesNotFit
from tightfit.plan.candidates import is_open, parameters_of
from tightfit.plan.make import Where, card_here, make_plan, this_host
from tightfit.plan.predict import cache_folder
from tightfit.train.fallback import Fallback
from tightfit.units import MIB, format_bytes, parse_bytes

SOURCE = "plan"
"""Where the keys that a plan sets come from."""
_OBVIOUS_SHARE = 0.5
"""Of the budget: a run whose rough bound is below it is not traced."""


@dataclass(frozen=True)
class Fitted:
    """A run as it is to be started."""

    resolved: Resolved[TrainConfig]
    fallback: Fallback | None = None


def fit(resolved: Resolved[TrainConfig], *, say: Callable[[str], object]) -> Fitted:
    """The configuration with a plan's keys in it, and what to do when that fails. DoesNotFit where nothing fits."""
    config = resolved.config
    try:
        where = _where(config)
    except (DeviceError, DoesNotFit) as error:
        say(f"plan: none is made, because {error}; out of memory, the run goes on with halves")
        return Fitted(resolved)
    if where is None:
        return Fitted(resolved)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    bound = _rough_bound(config, -(-config.effective_batch // processes))
    if bound < where.budget.bytes * _OBVIOUS_SHARE:
        say(f"plan: as asked, surely below {format_bytes(bound)} of {format_bytes(where.budget.bytes)}")
        return Fitted(resolved)
    from tightfit.plan.fallback import PlannedFallback
    from tightfit.plan.text import nothing_fits, one_line

    try:
        with _one_at_a_time():
            result = make_plan(resolved, where, processes=processes, say=say)
    except DeviceError as error:
        say(f"plan: none is made, because {error}; out of memory, the run goes on with halves")
        return Fitted(resolved)
    best = result.choice.best
    if best is None:
        raise DoesNotFit(nothing_fits(result))
    say(one_line(result))
    for name, value in result.environ.items():
        os.environ.setdefault(name, value)
    lossy = set() if best.plan.is_exact else {"param_dtype", "block_size"}
    kept = {key: value for key, value in best.plan.keys().items() if key in lossy or is_open(resolved, key)}
    sources = {**resolved.sources, **dict.fromkeys(kept, SOURCE)}
    planned = Resolved(replace(config, **kept), sources, resolved.warnings)
    fallback = PlannedFallback.of(result.choice, config.n_layer, where.budget, on_host=where.gpu is None)
    return Fitted(planned, fallback)


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
    vocabulary = config.vocab_size or 50_304
    width, tokens = config.n_embd, size * config.block_size
    layer = 2 * (34 * tokens * width + 5 * config.n_head * config.block_size * tokens)
    return 20 * parameters_of(config) + config.n_layer * layer + 20 * tokens * vocabulary + 256 * MIB


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Processes of one machine that ask for the same plan: the first traces it, the others find it remembered."""
    try:
        import fcntl

        cache_folder().mkdir(parents=True, exist_ok=True)
        file = (cache_folder() / "lock").open("w")
    except (ImportError, OSError):
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
