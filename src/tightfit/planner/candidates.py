"""Changes that make a run fit: first those that keep its result, then, only if allowed, lossy ones.

A plan decides how a step runs. The effective batch, the data order and the result are the user's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from tightfit.config import CUDA_GRAPH_MODES, Resolved, TrainConfig

OPEN = {
    "micro_batch": lambda config: config.micro_batch == 0,
    "eval_micro_batch": lambda config: config.eval_micro_batch == 0,
    "loss": lambda config: config.loss == "auto",
    "compile": lambda config: config.compile == "auto",
    "shard": lambda config: config.shard == "auto",
}
"""Keys with a value that leaves the choice to the planner."""
KeyValue = bool | int | float | str
"""Value of a configuration key."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Execution of a run's step on one device."""

    micro_batch: int
    """Sequences in one forward pass."""
    eval_micro_batch: int
    """Sequences in one forward pass of an evaluation."""
    loss: str
    """full, chunked or liger."""
    activation_checkpointing: int
    """Transformer blocks recomputed in backward."""
    compile: bool
    activation_memory_budget: float = 1.0
    """Share of its activations that a compiled step keeps for backward; it recomputes the rest."""
    offload: str = "none"
    """State in host memory, written as the configuration key `offload`."""
    optimizer: str = "adamw"
    """adamw, or adamw_8bit, which is lossy."""
    param_dtype: str = "float32"
    """Dtype of weights, gradients and moments; bfloat16 is lossy."""
    block_size: int = 0
    """Tokens in a sequence; 0: as requested. Fewer are lossy."""
    effective_batch: int = 0
    """Sequences per step over all devices, in one pass; 0: as requested, in several passes. Fewer are lossy."""
    shard: str = "none"
    """Spread of the model over several cards, as the configuration key `shard`."""

    @property
    def is_exact(self) -> bool:
        """True if the step keeps the requested mathematics, up to rounding."""
        is_whole = not self.block_size and not self.effective_batch
        return is_whole and self.optimizer == "adamw" and self.param_dtype == "float32"

    def keys(self) -> dict[str, KeyValue]:
        """Return the configuration keys that this plan sets."""
        usual = {each.name: each.default for each in fields(self)}  # none where a plan always has to say
        keys: dict[str, KeyValue] = {key: value for key, value in asdict(self).items() if value != usual[key]}
        if keys.pop("effective_batch", 0):
            keys |= {"batch_size": self.effective_batch, "gradient_accumulation_steps": 1}
        return keys

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """Return `config` with this plan's keys."""
        return with_values(config, {"activation_memory_budget": self.activation_memory_budget, **self.keys()})

    def passes(self, share: int) -> int:
        """Return the forward passes for a device's `share` of the effective batch."""
        if self.effective_batch:
            return 1
        return -(-share // self.micro_batch)


def with_values(config: TrainConfig, keys: Mapping[str, KeyValue]) -> TrainConfig:
    """Return `config` with these keys set and checked. ConfigError for a value that a key cannot have."""
    return TrainConfig(**{**vars(config), **keys})


def is_open(resolved: Resolved[TrainConfig], key: str) -> bool:
    """Return True if the user left this key to the planner: by "auto" or 0, or else by not giving it."""
    if key in OPEN:
        return bool(OPEN[key](resolved.config))
    return resolved.sources[key] == "default"


@dataclass(frozen=True, kw_only=True)
class Relief:
    """Change that makes room where smaller passes do not."""

    name: str
    """Word for --allow if the change is lossy; else a name for people."""
    keys: dict[str, KeyValue]
    exact: bool = True
    """Keeps the step's mathematics, up to rounding."""

    @property
    def offloads(self) -> str:
        """State that it moves to host memory, written as the configuration key `offload`."""
        return str(self.keys.get("offload", ""))


INPUTS = Relief(name="offloaded activations", keys={"offload": "activations"})
"""Moves each block's input to the host and back in every pass."""
OFFLOAD = Relief(name="offload", keys={"offload": "optimizer"})
"""Moves gradients to the host in every pass."""
BOTH = Relief(name="offload of both", keys={"offload": "optimizer,activations"})
EIGHT_BIT = Relief(name="8bit_optimizer", keys={"optimizer": "adamw_8bit"}, exact=False)
ONE_PASS = Relief(name="effective_batch", keys={}, exact=False)
"""A second pass holds the first one's gradients beside its activations; a single pass never does."""
BF16 = Relief(name="bf16_parameters", keys={"param_dtype": "bfloat16"}, exact=False)
_SHORTEST = 128
"""Tokens of the shortest context offered; less is another task."""


def may_recompute(resolved: Resolved[TrainConfig]) -> bool:
    """Return True if the planner may choose the activations to recompute in backward."""
    return all(is_open(resolved, key) for key in ("activation_checkpointing", "activation_memory_budget"))


def reliefs(resolved: Resolved[TrainConfig], *, offloads: Sequence[Relief], may_use_8bit: bool = False) -> list[Relief]:
    """List changes, cheapest for the user first; the first changes nothing. `offloads` are those the host allows."""
    config = resolved.config
    found = [Relief(name="", keys={})]
    if is_open(resolved, "offload"):
        found += [each for each in offloads if _can_be_had(each, resolved)]
    if may_use_8bit and config.shard == "none" and config.optimizer == "adamw" and not config.offloads("optimizer"):
        found.append(EIGHT_BIT)
    if config.effective_batch > 1:
        found.append(ONE_PASS)
    if config.param_dtype == "float32":
        found.append(BF16)
    best = OFFLOAD.keys if OFFLOAD in found else {}
    shorter = config.block_size // 2
    while shorter >= _SHORTEST:
        found.append(Relief(name="block_size", keys={**best, "block_size": shorter}, exact=False))
        shorter //= 2
    return found


def _can_be_had(offload: Relief, resolved: Resolved[TrainConfig]) -> bool:
    """Return True if the configuration's other keys allow this offload."""
    config, what = resolved.config, offload.offloads
    if config.shard != "none":
        return False
    if "optimizer" in what and config.optimizer != "adamw":
        return False
    recomputes = may_recompute(resolved) or config.activation_checkpointing > 0
    return "activations" not in what or (recomputes and config.mode not in CUDA_GRAPH_MODES)


def balanced(micro_batch: int, share: int) -> int:
    """Return the least micro-batch that needs no more passes than `micro_batch` does.

    >>> balanced(22, 64), balanced(15, 64), balanced(64, 64)
    (22, 13, 64)
    """
    passes = -(-share // micro_batch)
    return -(-share // passes)


def even(micro_batch: int, share: int) -> int:
    """Return the largest divisor of `share` up to `micro_batch`, but `micro_batch` if that is less than half.

    A last pass of another size would be compiled anew.

    >>> even(11, 64), even(7, 10), even(40, 41)
    (8, 5, 40)
    """
    found = next(size for size in range(micro_batch, 0, -1) if share % size == 0)
    return found if 2 * found >= micro_batch else micro_batch


def checkpointing_levels(n_layer: int) -> list[int]:
    """List numbers of blocks to recompute: none, a quarter, half, three quarters, all.

    >>> checkpointing_levels(12), checkpointing_levels(1)
    ([0, 3, 6, 9, 12], [0, 1])
    """
    return sorted({round(n_layer * quarter / 4) for quarter in range(5)})
