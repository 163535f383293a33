"""What may change so that a run fits: first what leaves its result as it was, then, only if allowed, what does not.

A plan says how the step that the user asked for is run. The effective batch, the data order and the result are the
user's.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tightfit.config import CUDA_GRAPH_MODES, Resolved, TrainConfig

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
    activation_memory_budget: float = 1.0
    """Of a compiled step: the share of what it would keep for backward that it keeps."""
    offload: str = "none"
    """What is in host memory, as the key of that name."""
    optimizer: str = "adamw"
    """adamw, or adamw_8bit, which is lossy."""
    param_dtype: str = "float32"
    """Of the weights, their gradients and moments; bfloat16 is lossy."""
    block_size: int = 0
    """Tokens of a sequence; 0: as asked. Fewer are lossy."""
    effective_batch: int = 0
    """Sequences of a step over all devices, in one pass; 0: as asked, in as many as it takes. Fewer are lossy."""

    @property
    def is_exact(self) -> bool:
        """Whether the mathematics of the step is what was asked for, up to rounding."""
        is_whole = not self.block_size and not self.effective_batch
        return is_whole and self.optimizer == "adamw" and self.param_dtype == "float32"

    def keys(self) -> dict[str, Any]:
        """The configuration's keys that it sets."""
        usual = {each.name: each.default for each in fields(self)}  # none where a plan always has to say
        keys = {key: value for key, value in asdict(self).items() if value != usual[key]}
        if effective_batch := keys.pop("effective_batch", 0):
            keys |= {"batch_size": effective_batch, "gradient_accumulation_steps": 1}
        return keys

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """The configuration of this plan."""
        return replace(config, **{"activation_memory_budget": self.activation_memory_budget, **self.keys()})

    def passes(self, share: int) -> int:
        """Forward passes for a device's `share` of the effective batch."""
        if self.effective_batch:
            return 1
        return -(-share // self.micro_batch)


def is_open(resolved: Resolved[TrainConfig], key: str) -> bool:
    """Whether a key's value was left to us: by "auto" or 0, or, where no value says so, by not being given."""
    if key in OPEN:
        return bool(OPEN[key](resolved.config))
    return resolved.sources[key] == "default"


@dataclass(frozen=True, kw_only=True)
class Relief:
    """A change that makes room where smaller passes do not, with what it costs the user."""

    name: str
    """As --allow takes it, if it is lossy; else for people."""
    keys: dict[str, Any]
    exact: bool = True
    costs: str = ""


INPUTS = Relief(
    name="offloaded activations",
    keys={"offload": "activations"},
    costs="what goes from block to block goes to the host and back in every pass",
)
OFFLOAD = Relief(name="offload", keys={"offload": "optimizer"}, costs="gradients go to the host in every pass")
BOTH = Relief(
    name="offload of both", keys={"offload": "optimizer,activations"}, costs=f"{OFFLOAD.costs}; {INPUTS.costs}"
)
EIGHT_BIT = Relief(
    name="8bit_optimizer",
    keys={"optimizer": "adamw_8bit"},
    exact=False,
    costs="moments are rounded to 8 bits in blocks of 256, which changes every update a little",
)
ONE_PASS = Relief(
    name="effective_batch",
    keys={},
    exact=False,
    costs="a step averages over as many sequences as fit at once, so that gradients are noisier and the learning rate "
    "has to be lower",
)
"""In a second pass the gradients of the first are held beside its activations; with one pass they never are."""
BF16 = Relief(
    name="bf16_parameters",
    keys={"param_dtype": "bfloat16"},
    exact=False,
    costs="updates smaller than 1/256 of a weight are lost: training learns more slowly, or stops",
)
_SHORTEST = 128
"""Tokens; a shorter context is another task."""


def may_recompute(resolved: Resolved[TrainConfig]) -> bool:
    """Whether it is for us to say what is recomputed in backward."""
    return all(is_open(resolved, key) for key in ("activation_checkpointing", "activation_memory_budget"))


def reliefs(resolved: Resolved[TrainConfig], *, offloads: Sequence[Relief], may_use_8bit: bool = False) -> list[Relief]:
    """In order of what they cost the user, the first of them nothing at all; `offloads` are those that can be had."""
    config = resolved.config
    found = [Relief(name="", keys={})]
    if is_open(resolved, "offload"):
        found += [each for each in offloads if _can_be_had(each, resolved)]
    if may_use_8bit and config.optimizer == "adamw" and not config.offloads("optimizer"):
        found.append(EIGHT_BIT)
    if config.effective_batch > 1:
        found.append(ONE_PASS)
    if config.param_dtype == "float32":
        found.append(BF16)
    best = OFFLOAD.keys if OFFLOAD in found else {}
    shorter = config.block_size // 2
    while shorter >= _SHORTEST:
        costs = f"the model learns from {shorter} tokens of context instead of {config.block_size}"
        found.append(Relief(name="block_size", keys={**best, "block_size": shorter}, exact=False, costs=costs))
        shorter //= 2
    return found


def _can_be_had(offload: Relief, resolved: Resolved[TrainConfig]) -> bool:
    """Whether the other keys go with it, as the configuration's own checks have it."""
    config, what = resolved.config, offload.keys["offload"]
    if "optimizer" in what and config.optimizer != "adamw":
        return False
    recomputes = may_recompute(resolved) or config.activation_checkpointing > 0
    return "activations" not in what or (recomputes and config.mode not in CUDA_GRAPH_MODES)


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
