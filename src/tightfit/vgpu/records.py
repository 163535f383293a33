"""Records of a dry run: its settings, its findings and its timeline. Sizes in bytes; no torch.

`tightfit dryrun --json` prints `Findings`; `tightfit schema dryrun` prints the JSON schema.
"""

import signal
from bisect import bisect_right
from pathlib import Path
from typing import Literal, TypedDict, get_args

import msgspec

from tightfit.display import Displayed
from tightfit.errors import ConfigError, DataError
from tightfit.vgpu.card_arguments import check_bytes, check_capability, check_torch, is_whole
from tightfit.wording import say

Phase = Literal["setup", "eval", "forward", "loss", "backward", "optimizer", "save", "resume", "sample", "compile"]
Category = Literal[
    "parameters",
    "gradients",
    "optimizer state",
    "activations",
    "logits",
    "cast copies",
    "inputs",
    "workspace",
    "other",
]
END_SIGNAL = getattr(signal, "SIGRTMAX", signal.SIGTERM)
"""Signal to a process that plays: it answers with what it saw so far. Scripts use others for themselves."""
CATEGORIES: tuple[Category, ...] = get_args(Category)


class NeededLength(msgspec.Struct, frozen=True, kw_only=True):
    """Length of a line's result that depends on data, with which alone a later line works."""

    file: str
    line: int
    largest: int
    """Bound of the length where the line ran."""
    length: int


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The card, its free memory, and the condition to stop at."""

    gpu: str
    memory_bytes: int | None = None
    """Total memory as the driver reports it, instead of the table's."""
    used_bytes: int = 0
    """Bytes that other processes hold."""
    context_bytes: int | None = None
    """Bytes of this process outside PyTorch's allocator, instead of the table's estimate."""
    capability: tuple[int, int] | None = None
    """Compute capability of a card that the table lacks."""
    steps: int | None = None
    """Stop after so many optimizer steps, whatever they allocate."""
    until_stable: bool = True
    """Stop when steps repeat."""
    until: Literal["end", "eval", "steps"] | None = None
    """Go on to the script's end however long that takes, to an evaluation after a step, or only until steps repeat;
    None goes on after that for a while only."""
    assumed: tuple[tuple[str, float], ...] = ()
    """Expressions, or FILE:LINE, and the values or lengths that only the card's data decide there."""
    needed: tuple[NeededLength, ...] = ()
    """Lengths that an earlier play of the script found out."""
    timeout_s: float | None = None
    """Stop at the first operator after so many seconds."""
    snapshot: str | None = None
    """File for PyTorch's memory snapshot of the end."""
    timeline: bool = False
    """Add the data of a timeline picture to the findings."""
    network: bool = False
    """Give the script a network; without namespaces it has one anyway."""
    rank: int = 0
    """Process of a distributed run that is played."""
    torch: str | None = None
    """Version of torch on the card, such as 2.8 or 2.6.0+cu124, where it differs from the installed one."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "used_bytes", "context_bytes"):
            check_bytes(name, getattr(self, name))
        check_capability(self.capability)
        check_torch(self.torch)
        if self.steps is not None and (not is_whole(self.steps) or self.steps < 1):
            raise ConfigError(say("vgpu.records.steps", steps=self.steps))
        if self.until not in (None, "end", "eval", "steps"):
            raise ConfigError(say("vgpu.records.until", until=self.until))
        if not is_whole(self.rank) or self.rank < 0:
            raise ConfigError(say("vgpu.records.rank", rank=self.rank))
        if self.timeout_s is not None and not (isinstance(self.timeout_s, int | float) and self.timeout_s > 0):
            raise ConfigError(say("vgpu.records.timeout", seconds=self.timeout_s))
        if self.snapshot is not None and not isinstance(self.snapshot, str):
            raise ConfigError(say("vgpu.records.snapshot", value=self.snapshot))


def read_assumption(text: str) -> tuple[str, float]:
    """Read EXPR=VALUE. ConfigError for anything else.

    >>> read_assumption("mask.nonzero()=512")
    ('mask.nonzero()', 512.0)
    """
    expression, _, value = text.rpartition("=")
    try:
        number = float({"True": "1", "False": "0"}.get(value.strip(), value))
    except ValueError:
        number = float("nan")
    if not expression.strip() or number != number:
        raise ConfigError(say("vgpu.records.assumption", text=text))
    return expression.strip(), number


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the user's code; an empty file where none is known."""

    file: str
    line: int


class OriginFields(TypedDict):
    """The fields of `Origin`, to build its kinds from."""

    file: str
    line: int
    function: str
    shape: tuple[int, ...]
    dtype: str
    operator: str
    category: str


class Origin(Place, frozen=True, kw_only=True):
    """A piece of memory: the tensor it is for, the operator and the user's line that asked for it."""

    function: str
    shape: tuple[int, ...]
    """Empty for a kernel's own memory."""
    dtype: str
    operator: str
    category: str


class LargeTensor(Origin, frozen=True, kw_only=True):
    """One of the largest tensors at the peak."""

    bytes: int
    phase: str


class Failure(Origin, frozen=True, kw_only=True):
    """The request that the card could not meet, with the figures of PyTorch's message."""

    phase: str
    requested_bytes: int
    tensor_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    total_bytes: int
    free_bytes: int
    process_bytes: int
    message: str
    """The message, in the words of this version of PyTorch."""
    source: str | None = None
    """Text of the line where its file is not on disk."""


class VirtualCard(msgspec.Struct, frozen=True, kw_only=True):
    """The card of a dry run."""

    name: str
    capability: str
    total_bytes: int
    used_by_others_bytes: int
    context_bytes: int


class Peak(msgspec.Struct, frozen=True, kw_only=True):
    """The highest figures of the run."""

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    """Reserved bytes and the context."""
    phase: str


def is_fragmented(reserved_bytes: int, allocated_bytes: int) -> bool:
    """Return True if the cache's free blocks take more than a quarter of the allocated bytes."""
    return reserved_bytes - allocated_bytes > allocated_bytes / 4


class MadeUp(Place, frozen=True, kw_only=True):
    """A value that the script read although nothing computed it."""

    what: str
    times: int


class PhaseStart(msgspec.Struct, frozen=True, kw_only=True):
    """The event at which a phase begins; it lasts until the next begins."""

    event: int
    phase: str


class FailedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that the card could not meet, even if the script caught its error."""

    event: int
    requested_bytes: int
    free_bytes: int


class LivingTensor(Origin, frozen=True, kw_only=True):
    """A tensor of the timeline."""

    from_event: int
    to_event: int | None
    """First event without it; None if it lives until the end."""
    bytes: int


class TimelinePeak(msgspec.Struct, frozen=True, kw_only=True):
    """The event with the most allocated bytes."""

    event: int
    phase: str
    allocated_bytes: int


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Memory after `events`, about 2,000 of them with every maximum.

    A tensor counts as the allocator rounds it.
    """

    event_count: int
    events: list[int]
    category_bytes: dict[str, list[int]]
    """Bytes of each category after each of `events`."""
    reserved_bytes: list[int] | None
    """The most that was reserved since the event before; None if nothing listened to the allocator."""
    phases: list[PhaseStart]
    peak: TimelinePeak
    failures: list[FailedRequest]
    tensors: list[LivingTensor]
    """The largest of each category at any of `events`."""
    total_bytes: int
    used_by_others_bytes: int
    context_bytes: int

    @property
    def capacity_bytes(self) -> int:
        """Bytes that PyTorch's allocator may reserve."""
        return self.total_bytes - self.used_by_others_bytes - self.context_bytes

    def at(self, event: int) -> int:
        """Return the position in `events` of the state that held after `event`."""
        return max(0, bisect_right(self.events, event) - 1)

    def allocated_bytes(self, event: int) -> int:
        """Return the bytes of all categories after `event`."""
        index = bisect_right(self.events, event) - 1
        return sum(row[index] for row in self.category_bytes.values()) if index >= 0 else 0

    def phase_at(self, event: int) -> str:
        return next((each.phase for each in reversed(self.phases) if each.event <= event), "")


class Findings(Displayed, msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of a dry run."""

    outcome: Literal["fits", "out_of_memory", "error"]
    gpu: VirtualCard
    torch: str
    """Version that gave the played allocator and messages."""
    peak: Peak
    categories: dict[str, int]
    """Bytes of each category at the peak, or at the failure."""
    categories_by_phase: dict[str, dict[str, int]]
    """The same bytes by the phase in which they were allocated."""
    phases: dict[str, int]
    """Highest allocated bytes of each phase."""
    largest: list[LargeTensor]
    failure: Failure | None
    caught_failures: int
    """Out-of-memory errors that the script caught."""
    steps: int
    stopped_because: str
    not_played: list[Place]
    """Lines that an early stop left out although they may allocate."""
    made_up_values: list[MadeUp]
    not_written: list[str]
    """Files that the script would have changed."""
    not_modelled: list[str]
    never_modelled: list[str]
    notes: list[str]
    protection: Literal["view", "landlock", "patches"] = "patches"
    """Guard of the user's files: a private view of the file system, or patches of Python's own functions, with
    Landlock's refusal of writes elsewhere or without."""
    is_shortened: bool = False
    """True if iterations that repeat were passed over."""
    needed: NeededLength | None = None
    """Length without which the script fails; a play with it may go on."""
    seconds: float = 0.0
    timeline: Timeline | None = None

    @property
    def free_bytes(self) -> int:
        """Bytes of the card that are left at the peak."""
        return self.gpu.total_bytes - self.gpu.used_by_others_bytes - self.peak.device_bytes

    @property
    def has_other_error(self) -> bool:
        """True if the script failed for a reason other than memory, and had caught no out-of-memory error before."""
        return self.outcome == "error" and not self.caught_failures

    @property
    def needed_bytes(self) -> int:
        """Bytes of this process at the peak; where it failed, with the request that failed."""
        if self.failure is None:
            return self.peak.device_bytes
        return self.failure.process_bytes + self.failure.requested_bytes

    @property
    def left_bytes(self) -> int:
        """Bytes of the card that `needed_bytes` leave; negative where they are too many."""
        return self.gpu.total_bytes - self.gpu.used_by_others_bytes - self.needed_bytes


def read_findings(path: Path) -> Findings:
    """Read a file that `tightfit dryrun --json` printed. DataError for any other."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Findings)
    except OSError as error:
        raise DataError(say("vgpu.records.unreadable", path=path, reason=error.strerror)) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(say("vgpu.records.no_findings", path=path, error=error)) from None
