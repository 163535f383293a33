"""A run's configuration: nanoGPT's keys with their names, types, defaults and meaning, and tightfit's own.

The object checks itself when it is made, so the rest of the code trusts it. Choices that depend on the machine are
"auto" here, and other rooms make them. Training keys: karpathy/nanoGPT train.py; sampling keys: its sample.py.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import Any, TypeAlias, TypeVar

from tightfit.config.sizes import parse_bytes
from tightfit.errors import ConfigError
from tightfit.wording import say, term

LOSSY = ("8bit_optimizer", "effective_batch", "bf16_parameters", "block_size")
"""Changes of the result that a plan makes only if `allow` names them."""
LOSSY_KEYS = ("optimizer", "param_dtype", "block_size", "batch_size", "gradient_accumulation_steps")
"""Keys that such a change sets, also where they were given."""
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""torch.compile's modes that record CUDA graphs."""
SHARDINGS = ("none", "optimizer", "full", "hybrid", "auto")
"""Ways to spread a model over the processes of a run."""
Setting: TypeAlias = bool | int | float | str
"""A key's value."""


@dataclass(frozen=True, kw_only=True)
class PretrainedShape:
    """Shape of one of OpenAI's GPT-2s, as its hparams.json has it."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int = 50_257
    block_size: int = 1024
    bias: bool = True


PRETRAINED = {
    "gpt2": PretrainedShape(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": PretrainedShape(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": PretrainedShape(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": PretrainedShape(n_layer=48, n_head=25, n_embd=1600),
}
"""OpenAI's GPT-2s by the names that `init_from` takes."""


@dataclass(frozen=True)
class _Rule:
    holds: Callable[[Any], bool]
    name: str
    """Its sentence in the table `config.rule`."""
    choices: tuple[str, ...] = ()


def _one_of(*choices: str) -> _Rule:
    return _Rule(lambda value: value in choices, "one_of", choices)


def _is_source_of_weights(value: str) -> bool:
    """Judged by the text alone: a configuration stored in a checkpoint must load on another machine."""
    return value in ("scratch", "resume", *PRETRAINED) or bool(re.search(r"[./\\]", value))


def _is_device(value: str) -> bool:
    return bool(re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", value))


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]


_COUNT = _Rule(lambda value: value >= 1, "at_least_1")
_NOT_NEGATIVE = _Rule(lambda value: value >= 0, "not_negative")
_ABOVE_ZERO = _Rule(lambda value: value > 0, "above_0")
_FRACTION = _Rule(lambda value: 0 <= value < 1, "fraction")
_FLAG_OR_AUTO = _Rule(lambda value: isinstance(value, bool) or value == "auto", "flag_or_auto")
_NOT_EMPTY = _Rule(bool, "not_empty")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("eval_interval", "log_interval", "eval_iters"), _COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "batch_size", "block_size"), _COUNT),
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "num_samples", "max_new_tokens", "top_k"), _COUNT),
    **dict.fromkeys(("max_iters", "warmup_iters", "lr_decay_iters", "save_interval"), _NOT_NEGATIVE),
    **dict.fromkeys(("seed", "vocab_size", "sample_at_end", "prefetch"), _NOT_NEGATIVE),
    **dict.fromkeys(("micro_batch", "eval_micro_batch", "activation_checkpointing"), _NOT_NEGATIVE),
    **dict.fromkeys(("weight_decay", "grad_clip", "min_lr", "shard_size"), _NOT_NEGATIVE),
    **dict.fromkeys(("dropout", "beta1", "beta2"), _FRACTION),
    "activation_memory_budget": _Rule(lambda value: 0 <= value <= 1, "share"),
    **dict.fromkeys(("out_dir", "data_dir", "dataset", "start"), _NOT_EMPTY),
    "learning_rate": _ABOVE_ZERO,
    "temperature": _Rule(_ABOVE_ZERO.holds, "temperature"),
    "compile": _FLAG_OR_AUTO,
    "device": _Rule(_is_device, "device"),
    "dtype": _one_of("auto", "float32", "bfloat16", "float16"),
    "backend": _one_of("auto", "nccl", "gloo", "mpi", "ucc", "cpu:gloo,cuda:nccl"),
    "loss": _one_of("auto", "chunked", "full", "liger"),
    "fit": _one_of("auto", "off"),
    "on_nan": _one_of("stop", "skip", "warn"),
    "probe": _one_of("auto", "on", "off"),
    "optimizer": _one_of("adamw", "adamw_8bit"),
    "shard": _one_of(*SHARDINGS),
    "offload": _one_of("none", "optimizer", "activations", "optimizer,activations"),
    "param_dtype": _one_of("float32", "bfloat16"),
    "allow": _Rule(lambda value: set(_words(value)) <= set(LOSSY), "lossy", LOSSY),
    "supervise": _FLAG_OR_AUTO,
    "memory": _Rule(lambda value: value == "auto" or bool(parse_bytes(value)), "memory"),
    "mode": _one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "init_from": _Rule(_is_source_of_weights, "weights", ("scratch", "resume", *PRETRAINED)),
}


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return say("config.schema.long_number", bits=value.bit_length())  # Python refuses to print very long ones
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _typed(key: str, kind: type | UnionType, value: object) -> Setting:
    """Convert to the key's type: 1e5 is a whole number, 3 a number, 0 and 1 booleans; True is no number."""
    is_flag = kind in (bool, bool | str)
    match value:
        case bool() if is_flag:
            return value
        case int() if is_flag and value in (0, 1):
            return bool(value)
        case bool():
            pass
        case int() if kind is int:
            return value
        case float() if kind is int and value.is_integer():
            return int(value)
        case int() | float() if kind is float and abs(value) <= sys.float_info.max:
            return float(value)
        case str() if kind in (str, bool | str):
            return value
    wanted = term("config.type", "flag" if kind == bool | str else getattr(kind, "__name__", ""))
    raise ConfigError(say("config.schema.wrong_type", key=key, wanted=wanted, value=_shown(value)))


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Base of the configurations: every field is brought to its type and checked by itself."""

    def __post_init__(self) -> None:
        for key in defaults(type(self)):
            object.__setattr__(self, key, checked(type(self), key, getattr(self, key)))


C = TypeVar("C", bound=Schema)


def defaults(schema: type[Schema]) -> dict[str, Setting]:
    """Every key of `schema` with its default, in the order of the schema."""
    return {field.name: getattr(schema, field.name) for field in fields(schema)}


def checked(schema: type[Schema], key: str, value: object) -> Setting:
    """The value that `key` of `schema` holds for `value`; ConfigError if its type or range is wrong."""
    setting, rule = _typed(key, schema.__annotations__[key], value), _RULES.get(key)
    if isinstance(setting, int) and abs(setting) >= 2**63:
        raise ConfigError(say("config.schema.too_large", key=key, value=_shown(setting)))
    if isinstance(setting, str) and re.search("[\0\ud800-\udfff]", setting):
        raise ConfigError(say("config.schema.not_text", key=key, value=_shown(setting)))
    if rule and not rule.holds(setting):
        wanted = term("config.rule", rule.name, choices=", ".join(rule.choices))
        hint = term("config.rule_hint", rule.name, default=_shown(defaults(schema)[key]))
        raise ConfigError(say("config.schema.wrong_value", key=key, rule=wanted, value=_shown(setting), hint=hint))
    return setting


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Schema):
    """A training run. The effective batch is the user's; `micro_batch` is only how it is run."""

    out_dir: str = "out"
    """Folder for checkpoints and metrics."""
    eval_interval: int = 2000
    """Steps between evaluations."""
    log_interval: int = 1
    """Steps between printed training losses."""
    eval_iters: int = 200
    """Batches of `batch_size` sequences averaged in one evaluation, for each split."""
    eval_only: bool = False
    """Ends the run after the first evaluation."""
    always_save_checkpoint: bool = True
    """Saves after every evaluation; False: only when the validation loss is the best so far."""
    init_from: str = "scratch"
    """Source of the weights: scratch, resume (from `out_dir`), a GPT-2 by name, or a path."""
    save_interval: int = 0
    """Steps between extra resume points; 0: at evaluations only."""
    async_save: bool = False
    """Saves while training goes on, from a copy of weights and moments in host memory."""

    wandb_log: bool = False
    """Logs to Weights & Biases."""
    wandb_project: str = "owt"
    """Its project."""
    wandb_run_name: str = "gpt2"
    """Its name for the run."""
    tensorboard_log: bool = False
    """Writes TensorBoard event files into `out_dir`."""

    data_dir: str = "data"
    """Folder that holds the dataset folders."""
    dataset: str = "openwebtext"
    """Name of the dataset's folder in `data_dir`."""
    prefetch: int = 2
    """Batches read ahead of the step that uses them; on the CPU they are read when needed."""
    gradient_accumulation_steps: int = 5 * 8
    """nanoGPT's passes per step, over all devices; here only its product with `batch_size` counts."""
    batch_size: int = 12
    """nanoGPT's sequences per pass."""
    block_size: int = 1024
    """Tokens in one sequence."""
    micro_batch: int = 0
    """Sequences per forward pass on one device; 0: `batch_size`."""
    eval_micro_batch: int = 0
    """Sequences per forward pass of an evaluation on one device; 0: `micro_batch`."""

    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads per block."""
    n_embd: int = 768
    """Width of the residual stream, in numbers per token."""
    dropout: float = 0.0
    """Probability of dropping an activation; 0 for pretraining, 0.1 and up for finetuning."""
    bias: bool = False
    """Gives linear layers and LayerNorms biases."""
    vocab_size: int = 0
    """Tokens in the vocabulary; 0: the dataset's, or 50304 if it names none."""

    learning_rate: float = 6e-4
    """Highest learning rate of AdamW."""
    max_iters: int = 600_000
    """Optimizer steps of the whole run."""
    weight_decay: float = 1e-1
    """AdamW's decay of the weight matrices and embeddings."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients, per step."""
    beta2: float = 0.95
    """AdamW's decay of the mean of squared gradients, per step."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""

    decay_lr: bool = True
    """Uses warmup and cosine decay; False: the learning rate stays at `learning_rate`."""
    warmup_iters: int = 2000
    """Steps over which the learning rate rises from near 0."""
    lr_decay_iters: int = 600_000
    """Step at which the learning rate reaches `min_lr`; usually `max_iters`."""
    min_lr: float = 6e-5
    """Learning rate after the decay; usually `learning_rate / 10`."""

    backend: str = "auto"
    """torch.distributed's backend."""
    device: str = "auto"
    """Device that computes: auto, cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """Number format of the matrix products: auto, float32, bfloat16 or float16."""
    compile: bool | str = "auto"
    """Uses torch.compile; auto: on hardware that gains by it."""
    mode: str = "default"
    """torch.compile's mode."""
    loss: str = "auto"
    """Computation of the loss: full (all logits at once), chunked, liger, or auto."""
    activation_checkpointing: int = 0
    """Transformer blocks, from the first, that are recomputed in backward instead of kept."""
    activation_memory_budget: float = 1.0
    """Share of a compiled step's saved activations that it may keep for backward; it recomputes the rest."""
    optimizer: str = "adamw"
    """adamw, or adamw_8bit: torchao's, with moments in a quarter of the memory, which is lossy."""
    offload: str = "none"
    """State kept in host memory: none, optimizer (its state, gradients and full weights), activations (the inputs of
    recomputed blocks), or both as optimizer,activations."""
    param_dtype: str = "float32"
    """Number format of weights, gradients and moments: float32, or bfloat16, which is lossy."""
    shard: str = "none"
    """Spreads the model over torchrun's processes with FSDP2: none (each has a copy), optimizer (each has a part of the
    moments and of summed gradients, and during a step all weights), full (a part of the weights, too), hybrid (full
    among `shard_size` processes, and copies of that), or auto (the fastest that fits, by a plan)."""
    shard_size: int = 0
    """Processes that share a copy of the model with shard=hybrid; 0: those of one machine."""
    seed: int = 1337
    """Seed of initialization, data order and dropout."""

    fit: str = "auto"
    """Choice of the keys left open above: auto fits the device, off is nanoGPT's literal behaviour."""
    probe: str = "auto"
    """Times the best plans on the device before the run: on, off, or auto for long runs on CUDA."""
    allow: str = ""
    """Lossy changes that a plan may make if nothing else fits: 8bit_optimizer, effective_batch, bf16_parameters,
    block_size."""
    memory: str = "auto"
    """Memory that the run may use: auto for all that is free, or a size such as 8GiB."""
    recover: bool = True
    """Continues with a smaller plan after an out-of-memory error."""
    on_nan: str = "warn"
    """Reaction to a loss of nan or inf: warn (train on, as nanoGPT), skip (drop that step's update) or stop."""
    supervise: bool | str = "auto"
    """Has another process restart the run if the system kills it; auto: from 1000 steps on."""

    sample_at_end: int = 0
    """Tokens to sample after training; 0: none."""
    start: str = "\n"
    """Prompt of that sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for problem in self._contradictions():
            raise ConfigError(problem)

    def _contradictions(self) -> Iterator[str]:
        """Yield a sentence for each pair of keys with values that exclude each other."""
        if self.n_embd % self.n_head:
            near = self.n_head * max(1, round(self.n_embd / self.n_head))
            yield say("config.schema.width", width=self.n_embd, heads=self.n_head, near=near)
        if self.micro_batch > self.effective_batch:
            yield say("config.schema.micro_batch", micro_batch=self.micro_batch, batch=self.effective_batch)
        # any other source of weights brings its own number of blocks
        if self.init_from == "scratch" and self.activation_checkpointing > self.n_layer:
            yield say("config.schema.recomputed", blocks=self.activation_checkpointing, n_layer=self.n_layer)
        if self.activation_memory_budget < 1 and (self.dropout > 0 or self.compile is False):
            yield say("config.schema.memory_budget", budget=self.activation_memory_budget)
        if self.offloads("optimizer") and self.optimizer != "adamw":
            yield say("config.schema.offload_8bit", optimizer=self.optimizer)
        if self.shard != "none" and self.offload != "none":
            yield say("config.schema.shard_offload", shard=self.shard, offload=self.offload)
        if self.shard != "none" and self.optimizer != "adamw":
            yield say("config.schema.shard_8bit", shard=self.shard, optimizer=self.optimizer)
        if self.shard_size and self.shard != "hybrid":
            yield say("config.schema.shard_size", size=self.shard_size, shard=self.shard)
        if self.shard != "none" and self.mode in CUDA_GRAPH_MODES:
            yield say("config.schema.shard_in_graphs", shard=self.shard, mode=self.mode)
        # CUDA graphs record all blocks as one, which copies to the host would break
        if self.offloads("activations") and self.mode in CUDA_GRAPH_MODES:
            yield say("config.schema.offload_in_graphs", mode=self.mode)
        # the cosine divides by their difference; below warmup_iters it is never used
        if self.decay_lr and self.warmup_iters == self.lr_decay_iters <= self.max_iters:
            yield say("config.schema.no_decay", steps=self.warmup_iters)

    @property
    def allowed(self) -> list[str]:
        """The words of `allow`."""
        return _words(self.allow)

    def offloads(self, what: str) -> bool:
        """Return True if `what`, "optimizer" or "activations", is in host memory."""
        return what in _words(self.offload)

    @property
    def effective_batch(self) -> int:
        """Sequences per optimizer step, over all devices."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all devices."""
        return self.effective_batch * self.block_size


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Schema):
    """Text drawn from a trained model."""

    init_from: str = "resume"
    """Source of the weights: resume (from `out_dir`), a GPT-2 by name, or a path."""
    out_dir: str = "out"
    """Folder of the checkpoint; used by resume only."""
    data_dir: str = "data"
    """Folder that holds the dataset folders, for the vocabulary."""
    start: str = "\n"
    """The prompt, or FILE:name to read it from a file."""
    num_samples: int = 10
    """Samples to draw."""
    max_new_tokens: int = 500
    """Tokens per sample, after the prompt."""
    temperature: float = 0.8
    """Divides the logits: below 1 less random, above 1 more."""
    top_k: int = 200
    """Number of the likeliest tokens that may be drawn."""
    seed: int = 1337
    """Seed of the draws."""
    device: str = "auto"
    """Device that computes: auto, cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """Number format of the matrix products: auto, float32, bfloat16 or float16."""
    compile: bool | str = False
    """Uses torch.compile; auto: on hardware that gains by it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from == "scratch":
            raise ConfigError(say("config.schema.no_weights"))


def to_dict(config: Schema) -> dict[str, bool | int | float | str]:
    """Plain values, as a checkpoint stores them."""
    return asdict(config)


def from_dict(schema: type[C], mapping: Mapping[str, object]) -> tuple[C, tuple[str, ...]]:
    """The configuration in a checkpoint of tightfit or nanoGPT, and the names of entries that are no keys."""
    known = {key: value for key, value in mapping.items() if key in defaults(schema)}
    return schema(**known), tuple(str(key) for key in mapping if key not in known)
