"""Causes as records: each adds the figures that its sentence names, in bytes, to the code and the label."""

import msgspec

MEASURED, SIMULATED, LIKELY, COMPUTED = "measured", "simulated", "likely", "computed"
"""Evidence of a cause: the log, a play, the sizes of the named model, or arithmetic from what the log names."""


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """One cause, without figures."""

    code: str
    """A key of the words' table `causes`."""
    stable_code: str = ""
    """TF-101, ...; empty until it is printed."""
    label: str = MEASURED
    """measured (from the log), simulated or likely."""
    sentence: str = ""
    """The sentence in the explanation's language; empty until it is printed."""


class OtherKind(Cause, frozen=True, kw_only=True):
    """A failure that no tensor on a device caused."""

    pid: int | None
    """The process that was killed, where the log names it."""


class LineRequest(Cause, frozen=True, kw_only=True):
    """A request that the innermost line of a traceback, or a quoted line, made."""

    place: str
    """`file:line`; empty for a line that is quoted alone."""
    source: str


class FixedPart(Cause, frozen=True, kw_only=True):
    """A quantity has no effect: weights and optimizer state fill the card."""

    quantity: str
    """The code of its remedy."""


class MigSlice(Cause, frozen=True, kw_only=True):
    """The card is a slice of a larger one."""

    profile: str
    """Its name, 2g.10gb."""


class WorksWith(Cause, frozen=True, kw_only=True):
    """The report says that it works with a setting."""

    setting: str
    """`name=value`, as the report has it."""


class FillsCard(Cause, frozen=True, kw_only=True):
    held_bytes: int
    total_bytes: int


class LargeRequest(Cause, frozen=True, kw_only=True):
    """A request that is most of the card."""

    requested_bytes: int | None
    total_bytes: int | None


class OtherCard(Cause, frozen=True, kw_only=True):
    """A card that is much smaller than any that the report names."""

    total_bytes: int
    named_bytes: int
    """The least memory of the named ones."""


class ModelStep(Cause, frozen=True, kw_only=True):
    """A simulated training step of the model that a configuration names."""

    of: str
    phase: str
    device_bytes: int
    room_bytes: int


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


class SizedWeight(msgspec.Struct, frozen=True, kw_only=True):
    """A weight that makes the request, and the models that have one."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    models: str


class SizedWeights(Request, frozen=True, kw_only=True):
    weights: tuple[SizedWeight, ...]


class LogitTokens(Request, frozen=True, kw_only=True):
    """Tokens with logits as large as the request."""

    vocab_size: int
    of: str
    """The model or the program that has this vocabulary."""
    float_tokens: int
    half_tokens: int


class FirstAxis(Cause, frozen=True, kw_only=True):
    """The first axis of a printed shape, which is usually the batch."""

    axis: int
    one_bytes: int


class ToldShape(Cause, frozen=True, kw_only=True):
    """The largest shape that a report names, as a tensor of float32."""

    shape: tuple[int, ...]
    bytes: int


class ToldInput(Cause, frozen=True, kw_only=True):
    """The input that a report tells of, in its words."""

    told: str


class ShardShare(msgspec.Struct, frozen=True, kw_only=True):
    ranks: int
    dtype: str
    bytes: int


class Shard(Request, frozen=True, kw_only=True):
    """A flat share of all parameters."""

    parameters: int
    of: str
    shares: tuple[ShardShare, ...]


class ModelBudget(Cause, frozen=True, kw_only=True):
    """Memory that the model takes before any batch."""

    of: str
    parameters: int
    low_bytes: int
    high_bytes: int
    low_each: float
    high_each: float
    total_bytes: int | None
    ranks: int
    trained: int | None = None
    """Parameters that are trained, where they are a part."""


class PrintedBatch(Cause, frozen=True, kw_only=True):
    batch_size: int | None


class ServerShare(Cause, frozen=True, kw_only=True):
    """A server in the training's own process."""

    share: float
    """Part of the card that it takes."""
    share_bytes: int


class Limit(Cause, frozen=True, kw_only=True):
    allowed_bytes: int
    free_bytes: int | None = None


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


class RanksInRow(Cause, frozen=True, kw_only=True):
    """Processes on this card with consecutive numbers."""

    count: int


class OwnProcess(Cause, frozen=True, kw_only=True):
    """The listed process that is this one."""

    pid: int
    process_bytes: int


class OtherProcesses(Cause, frozen=True, kw_only=True):
    others_bytes: int
    total_bytes: int
    outside_bytes: int | None = None
    """Bytes that are neither free nor PyTorch's."""
    need_bytes: int | None = None
    """This process with the request."""


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
