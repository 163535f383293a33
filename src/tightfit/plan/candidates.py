"""What may change so that a run fits, and leaves its result as it was.

A plan says how the step that the user asked for is run. The effective batch, the data order and the result are the
user's.
"""

from dataclasses import dataclass, replace
from typing import Any

from tightfit.config import Resolved, TrainConfig

OPEN = {
    "micro_batch": lambda config: config.micro_batch == 0,
    "eval_micro_batch": lambda config: config.eval_micro_batch == 0,
    "loss": lambda config: config.loss == "auto",
    "compile": lambda config: config.compile == "auto",
}
"""Keys whose value says that the choice is ours."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run's step is executed on one device."""

    micro_batch: int
    """Sequences in one forward pass."""
    eval_micro_batch: int
    """The same in an evaluation."""
    loss: str
    """full, chunked or liger."""
    activation_checkpointing: int
    """Transformer blocks that are recomputed in backward."""
    compile: bool

    def keys(self) -> dict[str, Any]:
        """The configuration's keys that it sets."""
        return {
            "micro_batch": self.micro_batch,
            "eval_micro_batch": self.eval_micro_batch,
            "loss": self.loss,
            "activation_checkpointing": self.activation_checkpointing,
            "compile": self.compile,
        }

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """The configuration of this plan."""
        return replace(config, **self.keys())

    def passes(self, share: int) -> int:
        """Forward passes for a device's `share` of the effective batch."""
        return -(-share // self.micro_batch)


def is_open(resolved: Resolved[TrainConfig], key: str) -> bool:
    """Whether a key's value was left to us: by "auto" or 0, or, where no value says so, by not being given."""
    if key in OPEN:
        return bool(OPEN[key](resolved.config))
    return resolved.sources[key] == "default"


def balanced(micro_batch: int, share: int) -> int:
    """The least micro-batch that needs no more passes than `micro_batch` does.

    >>> balanced(22, 64), balanced(15, 64), balanced(64, 64)
    (22, 13, 64)
    """
    passes = -(-share // micro_batch)
    return -(-share // passes)


def even(micro_batch: int, share: int) -> int:
    """The largest micro-batch up to `micro_batch` that divides `share`, if that is at least half of it.

    A compiled step is compiled anew for a last pass of another size.

    >>> even(11, 64), even(7, 10), even(40, 41)
    (8, 5, 40)
    """
    found = next(size for size in range(micro_batch, 0, -1) if share % size == 0)
    return found if 2 * found >= micro_batch else micro_batch


def checkpointing_levels(n_layer: int) -> list[int]:
    """Blocks to recompute: none, a quarter, half, three quarters, all.

    >>> checkpointing_levels(12), checkpointing_levels(1)
    ([0, 3, 6, 9, 12], [0, 1])
    """
    return sorted({round(n_layer * quarter / 4) for quarter in range(5)})
