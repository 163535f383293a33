"""Memory of the virtual GPU as a snapshot, in the format of torch.cuda.memory._snapshot().

The structure is that which torch/csrc/cuda/Module.cpp builds in PyTorch 2.11 to 2.13, so that PyTorch's own tools
open it: `python -m torch.cuda._memory_viz` and https://pytorch.org/memory_viz.
"""

import os
import pickle
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

from tightfit.allocator.blocks import SegmentRecord
from tightfit.allocator.caching import AllocatorSettings, Block
from tightfit.allocator.settings import UNLIMITED, VARIABLES
from tightfit.errors import DataError
from tightfit.storage import writing
from tightfit.vgpu.frames import Frame, user_frames
from tightfit.vgpu.recorder import Allocation, Recorder
from tightfit.wording import say

ACTIONS = (
    *("alloc", "free_requested", "free_completed"),
    *("segment_alloc", "segment_free", "segment_map", "segment_unmap", "oom"),
)
_CODES = {action: code for code, action in enumerate(ACTIONS)}
_KEEPS_STACK = frozenset({"segment_free", "segment_unmap", "oom"})
"""Actions that belong to no allocation, so that they keep the lines that were running; they are rare."""

PROTOCOL = 4
"""Pickle protocol: PyTorch's viewer in the browser (torch/utils/viz/MemoryViz.js) refuses 5 and everything below 2."""


class TraceEntry(NamedTuple):
    """One action of the allocator."""

    action: str
    address: int
    """Address of the block or segment; for oom the device's free bytes."""
    size: int
    stream: int
    time_us: int
    """Time of the dry run since the epoch, not of a real device."""
    event: int
    """Index of the recorder's event that an alloc or a free becomes."""


class FrameRecord(TypedDict):
    """A line of a stack in a snapshot."""

    filename: str
    line: int
    name: str


class TraceRecord(TypedDict):
    """An action in a snapshot; `addr` of the block, or `device_free` bytes for an oom."""

    frames: list[FrameRecord]
    action: str
    addr: NotRequired[int]
    device_free: NotRequired[int]
    size: int
    stream: int
    time_us: int
    compile_context: str
    user_metadata: str
    pool_id: tuple[int, int]


Setting = str | int | float | bool | dict[str, int]


class Snapshot(TypedDict):
    """The whole of a snapshot."""

    segments: list[SegmentRecord]
    device_traces: list[list[TraceRecord]]
    allocator_settings: dict[str, Setting]
    external_annotations: list[str]


class TraceLog:
    """Listener of an allocator that keeps every action, at 48 bytes each."""

    def __init__(self, recorder: Recorder) -> None:
        self._events = recorder.events
        self._rows = array("q")
        self.stacks: dict[int, tuple[Frame, ...]] = {}
        """The user's lines by the number of the entry, for entries that belong to no allocation."""

    @classmethod
    def attach(cls, recorder: Recorder) -> "TraceLog":
        """Let a new log listen to the recorder's allocator."""
        log = recorder.allocator.listener = cls(recorder)
        return log

    @classmethod
    def of(cls, recorder: Recorder) -> "TraceLog | None":
        """Return the log that was attached to a recorder."""
        listener = recorder.allocator.listener
        return listener if isinstance(listener, cls) else None

    def __call__(self, action: str, address: int, size: int, stream: int) -> None:
        if action in _KEEPS_STACK:
            self.stacks[self.entry_count] = user_frames(sys._getframe(1))
        row = (_CODES[action], address, size, stream, time.time_ns() // 1000, len(self._events))
        self._rows.extend(row)

    @property
    def entry_count(self) -> int:
        # Not __len__: the allocator asks whether its listener is true, and an empty log would be false.
        return len(self._rows) // len(TraceEntry._fields)

    def __iter__(self) -> Iterator[TraceEntry]:
        rows = iter(self._rows)
        for code, *rest in zip(*[rows] * len(TraceEntry._fields), strict=True):
            yield TraceEntry(ACTIONS[code], *rest)


def snapshot_of(recorder: Recorder) -> Snapshot:
    """Return the result of torch.cuda.memory._snapshot() now; the trace is empty if no TraceLog was attached.

    The `user_metadata` of an alloc has the category, operator, shape and phase; newer viewers show it.
    """
    stacks = _Stacks()
    log = TraceLog.of(recorder)
    trace = [] if log is None else _trace(recorder, log, stacks)

    def frames(block: Block) -> list[FrameRecord]:
        return stacks.plain(block.tag.frames) if block.tag is not None else []

    segments = recorder.allocator.segments(frames)
    asked_by = {entry["addr"]: entry["frames"] for entry in trace if entry["action"] == "segment_alloc"}
    for segment in segments:
        segment["frames"] = asked_by.get(segment["address"], [])
    return {
        "segments": segments,
        "device_traces": [trace],
        "allocator_settings": _settings(recorder.allocator.settings, os.environ),
        "external_annotations": [],
    }


def write_snapshot(recorder: Recorder, path: str | os.PathLike[str]) -> None:
    """Pickle the snapshot into a file, which appears whole or not at all. DataError if it cannot be written."""
    target = Path(path)
    try:
        with writing(target, shared=True) as part, part.open("wb") as file:
            pickle.dump(snapshot_of(recorder), file, protocol=PROTOCOL)
    except OSError as error:
        raise DataError(say("vgpu.snapshot.not_written", path=target, reason=error.strerror)) from None


class _Stacks:
    """Stacks in the form of a snapshot. Each is made once, so that a pickle has it once, too."""

    def __init__(self) -> None:
        self._lists: dict[tuple[Frame, ...], list[FrameRecord]] = {}
        self._frames: dict[Frame, FrameRecord] = {}

    def plain(self, frames: tuple[Frame, ...]) -> list[FrameRecord]:
        known = self._lists.get(frames)
        if known is None:
            known = self._lists[frames] = [self._frame(frame) for frame in frames]
        return known

    def _frame(self, frame: Frame) -> FrameRecord:
        plain: FrameRecord = {"filename": frame.file, "line": frame.line, "name": frame.function}
        return self._frames.setdefault(frame, plain)


def _trace(recorder: Recorder, log: TraceLog, stacks: _Stacks) -> list[TraceRecord]:
    """Return the log as a device trace. As in PyTorch, a free has the stack of its alloc, and so has its segment."""
    trace: list[TraceRecord] = []
    caused: list[TraceRecord] = []  # requests to the device by an alloc or oom that is still to come
    held: dict[int, list[FrameRecord]] = {}  # by address
    metadata: dict[str, str] = {}  # each text once
    for number, entry in enumerate(log):
        frames: list[FrameRecord] = []
        words = ""
        if entry.action == "alloc":
            allocation = _allocation(recorder, entry.event)
            if allocation is not None:
                frames, words = stacks.plain(allocation.frames), _words(allocation)
            held[entry.address] = frames
        elif entry.action == "free_requested":
            frames = held.get(entry.address, frames)
        elif entry.action == "free_completed":
            frames = held.pop(entry.address, frames)
        elif entry.action in _KEEPS_STACK:
            frames = stacks.plain(log.stacks[number])
        record = _record(entry, frames, metadata.setdefault(words, words))
        trace.append(record)
        if entry.action in ("segment_alloc", "segment_map"):
            caused.append(record)
        elif entry.action in ("alloc", "oom"):
            for each in caused:
                each["frames"] = frames
            caused = []
    return trace


def _record(entry: TraceEntry, frames: list[FrameRecord], metadata: str) -> TraceRecord:
    record: TraceRecord = {
        "frames": frames,
        "action": entry.action,
        "size": entry.size,
        "stream": entry.stream,
        "time_us": entry.time_us,
        "compile_context": "N/A",
        "user_metadata": metadata,
        "pool_id": (0, 0),  # a recorder takes nothing from private pools
    }
    if entry.action == "oom":
        record["device_free"] = entry.address
    else:
        record["addr"] = entry.address
    return record


def _allocation(recorder: Recorder, event: int) -> Allocation | None:
    """Return the allocation of an alloc; None for a block that was taken from the allocator directly."""
    number = recorder.events[event] if event < len(recorder.events) else 0
    return recorder.allocations[number - 1] if number > 0 else None


def _words(allocation: Allocation) -> str:
    shape = " x ".join(map(str, allocation.shape))
    tensor = f"{shape} {allocation.dtype}" if shape else ""
    return ", ".join(filter(None, (allocation.category, tensor, allocation.operator, f"in {allocation.phase}")))


def _settings(settings: AllocatorSettings, environ: Mapping[str, str]) -> dict[str, Setting]:
    """Return the allocator_settings; those that the virtual GPU does not follow have PyTorch's defaults."""
    divisions = settings.roundup_power2_divisions or (0,) * 16
    return {
        "PYTORCH_CUDA_ALLOC_CONF": next((environ[name] for name in VARIABLES if name in environ), ""),
        "max_split_size": -1 if settings.max_split_size == UNLIMITED else settings.max_split_size,
        "garbage_collection_threshold": settings.garbage_collection_threshold,
        "expandable_segments": settings.expandable_segments,
        "pinned_num_register_threads": 1,
        "release_lock_on_cudamalloc": False,
        "pinned_use_cuda_host_register": False,
        "graph_capture_record_stream_reuse": False,
        "roundup_power2_divisions": {str(2**power): count for power, count in enumerate(divisions)},
    }
