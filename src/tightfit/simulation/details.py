"""Details of a play, from which questions about a script are answered. Sizes in bytes; no torch."""

import os
from collections.abc import Callable

import msgspec

from tightfit.vgpu.records import Findings, Origin


class CardSize(msgspec.Struct, frozen=True, kw_only=True):
    """A card to replay a run's requests on."""

    name: str
    total_bytes: int
    context_bytes: int
    used_bytes: int = 0

    @property
    def room_bytes(self) -> int:
        """Bytes that PyTorch's allocator may reserve."""
        return self.total_bytes - self.context_bytes - self.used_bytes


class FailedAt(Origin, frozen=True, kw_only=True):
    """The request that a card could not meet."""

    phase: str
    requested_bytes: int
    free_bytes: int


class CardOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of the same run on one card."""

    name: str
    total_bytes: int
    fits: bool
    device_bytes: int
    """Peak of the process on the card; where it fails, up to the failure and with the request that failed."""
    failure: FailedAt | None = None


class Held(Origin, frozen=True, kw_only=True):
    """Tensors of one kind that one line holds at the peak."""

    phase: str
    count: int
    bytes: int
    """Of all of them."""


class FileState(msgspec.Struct, frozen=True, array_like=True):
    """State of a file that a play read, or of a folder that it listed, by which a change is noticed."""

    path: str
    size: int
    """-1 for a file that was not there."""
    mtime_ns: int


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """Estimate of an optimizer step's time on the card."""

    seconds: float
    kernels: int
    """Kernels launched in the step."""
    compiled: bool


class Detail(msgspec.Struct, frozen=True, kw_only=True):
    """A play with its details."""

    findings: Findings
    held: list[Held]
    """The largest first; empty where another process than the script's own decides."""
    files: list[FileState]
    cards: list[CardOutcome]
    """Outcomes on those of the cards that were asked for which follow from this play."""
    tape: str
    """Digest of all requests to the allocator; empty if they may depend on the card's size."""
    tapes: dict[str, str] = {}
    """The same for each of `cards`, where the program has read the number of multiprocessors."""
    parted: list[list[str]] = []
    """Names of the cards that were asked for and answered otherwise; those of a group did so at the same place."""
    step: StepTime | None = None
    is_chip_known: bool = False
    """True if the program has read the number of multiprocessors, by which it may decide anything."""
    is_cut_short: bool = False
    """True if the time limit ended the play, which on another day may come further."""


def state_of(path: str, stat: Callable[[str], os.stat_result] = os.stat) -> FileState:
    """Return the size and time of change of a file or folder now."""
    try:
        now = stat(path)
    except (OSError, ValueError):
        return FileState(path, -1, 0)
    return FileState(path, now.st_size, now.st_mtime_ns)


def are_unchanged(files: list[FileState]) -> bool:
    """Return True if every file is as it was."""
    return all(state_of(each.path) == each for each in files)
