"""Parameters, bytes of training state and FLOPs of a GPT, from its shape alone: no torch, no planning."""

from typing import Protocol

from tightfit.config import TrainConfig

PADDED_VOCAB = 50_304
"""GPT-2's vocabulary of 50257, rounded up to a multiple of 64 for faster matrix products: nanoGPT's default."""
OFFLOADED_BYTES = 16
"""Host memory for a parameter whose optimizer is there: float32 weight, gradient and two moments."""
OFFLOADED_DEVICE_BYTES = 2
"""Device memory for such a parameter, at least: its weight in autocast's format."""
CHECKPOINT_BYTES = 12
"""Bytes of a parameter in a checkpoint: float32 weight and AdamW's two moments."""


class Shape(Protocol):
    """The fields of a configuration that decide a GPT's size."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bias(self) -> bool: ...


def vocabulary_of(shape: Shape) -> int:
    """Columns of the logits; GPT-2's padded vocabulary where neither the configuration nor a dataset has one."""
    return shape.vocab_size or PADDED_VOCAB


def parameter_count(shape: Shape, *, positions: bool = True) -> int:
    """Trained numbers; `positions=False` leaves the position embedding out, as nanoGPT counts.

    A block has 12 n_embd^2 in its four matrices and 2 n_embd in its norms; biases add 11 n_embd. The last norm has one
    n_embd, two with a bias.

    >>> parameter_count(TrainConfig(n_layer=12, n_embd=768, vocab_size=50304, block_size=1024))
    124373760
    """
    width, bias = shape.n_embd, shape.bias
    block = 12 * width**2 + 2 * width + (11 * width if bias else 0)
    rows = vocabulary_of(shape) + (shape.block_size if positions else 0)
    return rows * width + shape.n_layer * block + width * (2 if bias else 1)


def flops_per_token(shape: Shape, tokens: int) -> int:
    """FLOPs of forward and backward for one token in sequences of T `tokens`: 6 N + 12 L C T.

    N leaves the positions out. PaLM's appendix B and nanoGPT's `estimate_mfu` count so.

    >>> flops_per_token(TrainConfig(vocab_size=50304), 1024) == 6 * 123_587_328 + 12 * 12 * 768 * 1024
    True
    """
    return 6 * parameter_count(shape, positions=False) + 12 * shape.n_layer * shape.n_embd * tokens


def staged_bytes(config: TrainConfig) -> int:
    """Host memory for each parameter of the copy that `async_save` writes: its weight and AdamW's two moments.

    >>> staged_bytes(TrainConfig()), staged_bytes(TrainConfig(optimizer="adamw_8bit"))
    (12, 6)
    """
    number = 2 if config.param_dtype == "bfloat16" else 4
    return number + (2 if config.optimizer == "adamw_8bit" else 2 * number)


def state_bytes(config: TrainConfig) -> int:
    """Device memory for a parameter that is trained there: its weight, its gradient and AdamW's two moments.

    >>> state_bytes(TrainConfig()), state_bytes(TrainConfig(optimizer="adamw_8bit"))
    (16, 10)
    """
    if config.offloads("optimizer"):
        return OFFLOADED_DEVICE_BYTES
    number = 2 if config.param_dtype == "bfloat16" else 4
    return 2 * number + (2 if config.optimizer == "adamw_8bit" else 2 * number)
