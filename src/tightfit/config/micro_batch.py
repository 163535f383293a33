"""Decides how a device runs its share of a step, where no plan does: the one place that reads `batch_size` for it."""

from dataclasses import dataclass

from tightfit.config.schema import TrainConfig
from tightfit.errors import ConfigError
from tightfit.wording import say


@dataclass(frozen=True, kw_only=True)
class BatchSplit:
    """Share of a step on one device, and the passes it is run in."""

    share: int
    """Sequences of a step on the device that has most of them."""
    micro_batch: int
    """Sequences per forward pass, at most the share."""
    accumulation: int
    """Passes per optimizer step."""
    eval_micro_batch: int
    """Sequences per forward pass of an evaluation."""
    eval_sequences: int
    """Sequences of one evaluation of one split, over all devices."""


def batch_split(config: TrainConfig, processes: int = 1, *, share: int | None = None) -> BatchSplit:
    """Return the split for one of `processes`, or of a `share` that is already known.

    `micro_batch` counts where it is set, else nanoGPT's `batch_size`. An evaluation follows its own key, then those.

    >>> config = TrainConfig(batch_size=12, gradient_accumulation_steps=40)
    >>> split = batch_split(config, 64)
    >>> split.share, split.micro_batch, split.accumulation, split.eval_micro_batch
    (8, 8, 1, 12)
    """
    share = -(-config.effective_batch // processes) if share is None else share
    micro_batch = min(config.micro_batch or config.batch_size, share)
    return BatchSplit(
        share=share,
        micro_batch=micro_batch,
        accumulation=-(-share // micro_batch),
        eval_micro_batch=config.eval_micro_batch or config.micro_batch or config.batch_size,
        eval_sequences=config.eval_iters * config.batch_size,
    )


def refuse_processes(config: TrainConfig, processes: int, per_node: int) -> None:
    """Raise ConfigError for a configuration that this many processes, `per_node` on each machine, cannot share."""
    if config.shard == "hybrid" and processes % (size := config.shard_size or per_node):
        raise ConfigError(say("trainer.loop.shard_size", size=size, processes=processes))
    if config.effective_batch < processes:
        raise ConfigError(say("trainer.loop.too_many_processes", batch=config.effective_batch, processes=processes))
    if config.offloads("optimizer") and processes > 1:
        raise ConfigError(say("trainer.loop.offload_alone", offload=config.offload, processes=processes))
