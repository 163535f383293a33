"""Causes as records: each adds the figures that its sentence names, in bytes, to the code and the label."""

import msgspec

MEASURED, SIMULATED, LIKELY = "measured", "simulated", "likely"
"""Evidence of a cause: the log, a play, or the sizes of usual models."""


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """One cause, without figures."""

    code: str
    """A key of the words' table `causes`."""
    label: str = MEASURED
    """measured (from the log), simulated or likely."""
    sentence: str = ""
    """The sentence in the explanation's language; empty until it is printed."""


class OtherKind(Cause, frozen=True, kw_only=True):
    """A failure that no tensor on a device caused."""

    pid: int | None
    """The process that was killed, where the log names it."""


class PlayFits(Cause, frozen=True, kw_only=True):
    device_bytes: int


class LogitsCopies(Cause, frozen=True, kw_only=True):
    copies: int
    each_bytes: int
    all_bytes: int


class LogitsBound(LogitsCopies, frozen=True, kw_only=True):
    """Logits of the iteration before that are still bound to a name."""

    iteration: int
    before: int


class FullLogits(Cause, frozen=True, kw_only=True):
    tokens: int
    vocab_size: int
    dtype: str | None
    batch_size: int
    block_size: int
    element_bytes: int
    each_bytes: int


class CategoryBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one category of tensors."""

    category: str
    held_bytes: int


class Held(Cause, frozen=True, kw_only=True):
    held: tuple[CategoryBytes, ...]


class TrainingToo(Cause, frozen=True, kw_only=True):
    phase: str
    device_bytes: int
    batch_size: int


class StateToCome(Cause, frozen=True, kw_only=True):
    """Gradients and optimizer state that do not exist yet."""

    state_bytes: int
    parameters: int


class Request(Cause, frozen=True, kw_only=True):
    requested_bytes: int | None


class SmallRequest(Request, frozen=True, kw_only=True):
    tensor_high: int


class GuessedTensor(Cause, frozen=True, kw_only=True):
    tensor: str
    shape: tuple[int, ...]
    dtype: str | None
    batch_size: int
    block_size: int
    share: float
    others: int
    """Other tensors of usual models that make the same request."""


class Limit(Cause, frozen=True, kw_only=True):
    allowed_bytes: int
    free_bytes: int | None


class Spilled(Cause, frozen=True, kw_only=True):
    """More than the card has."""

    held_bytes: int
    total_bytes: int
    spilled_bytes: int


class OwnRanks(Cause, frozen=True, kw_only=True):
    """Other ranks of the same job on this card."""

    count: int
    each_bytes: int
    all_bytes: int


class OwnProcess(Cause, frozen=True, kw_only=True):
    """The listed process that is this one."""

    pid: int
    process_bytes: int


class OtherProcesses(Cause, frozen=True, kw_only=True):
    others_bytes: int
    total_bytes: int
    outside_bytes: int | None = None
    """Bytes that are neither free nor PyTorch's."""


class Cache(Cause, frozen=True, kw_only=True):
    cache_bytes: int
    short_by_bytes: int | None
    requested_bytes: int | None


class PrivatePools(Cause, frozen=True, kw_only=True):
    pool_bytes: int


class OutsidePyTorch(Cause, frozen=True, kw_only=True):
    outside_bytes: int
    low_bytes: int
    high_bytes: int


class MoreFree(Cause, frozen=True, kw_only=True):
    free_bytes: int | None
