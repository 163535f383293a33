"""Events of a run besides training: the lines of `metrics.jsonl` with the key "event"."""

import msgspec

from tightfit.trainer.fallback import Phase, Settings


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """A line's fields, without its step."""


class PlanEvent(Event, tag="plan", frozen=True, kw_only=True):
    """The plan that the run starts with."""

    predicted_peak_bytes: int
    micro_batch: int
    eval_micro_batch: int
    loss: str
    checkpointed_blocks: int


class ShardingEvent(Event, tag="sharding", frozen=True, kw_only=True):
    """The choice of how the model is spread over the processes."""

    shard: str
    reason: str


class RanksEvent(Event, tag="ranks", frozen=True, kw_only=True):
    """Processes of a run at a logged step, by rank."""

    own_ms: list[float]
    """Milliseconds of a step that each did not wait for the others."""
    peak_bytes: list[int]
    """Highest memory of each so far."""
    hosts: list[str]


class StragglerEvent(Event, tag="straggler", frozen=True, kw_only=True):
    """A process that all others have been waiting for."""

    rank: int
    host: str
    own_ms: float
    others_ms: float
    """Median of the others."""


class RecoveryEvent(Event, tag="recovery", frozen=True, kw_only=True):
    """A survived out-of-memory error."""

    phase: Phase
    kind: str = "recoverable"
    before: Settings | None
    """None before the run has settings."""
    after: Settings | None
    requested_bytes: int | None
    """Bytes of the refused allocation; None if the message does not name them."""
    seconds_lost: float


class GrowthEvent(Event, tag="growth", frozen=True, kw_only=True):
    """A step back towards the wanted settings."""

    before: Settings
    after: Settings


class PressureEvent(Event, tag="pressure", frozen=True, kw_only=True):
    """Smaller settings because other processes took memory."""

    before: Settings
    after: Settings
    free_bytes: int
