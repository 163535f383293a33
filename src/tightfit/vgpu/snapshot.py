"""PyTorch's memory snapshots: what the virtual GPU did, in the format of torch.cuda.memory._snapshot(), out and in.

The structure is the one that torch/csrc/cuda/Module.cpp builds in PyTorch 2.11 to 2.13, so that PyTorch's own tools
open it: `python -m torch.cuda._memory_viz` and https://pytorch.org/memory_viz.
"""

import os
import pickle
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from tightfit.allocator.caching import AllocatorSettings, Block
from tightfit.allocator.settings import UNLIMITED, VARIABLES
from tightfit.errors import DataError
from tightfit.storage import writing
from tightfit.vgpu.frames import Frame, user_frames
from tightfit.vgpu.recorder import Allocation, Recorder

ACTIONS = (
    "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap", "oom",
)  # fmt: skip
_CODES = {action: code for code, action in enumerate(ACTIONS)}
_KEEPS_STACK = frozenset({"segment_free", "segment_unmap", "oom"})
"""Actions that belong to no allocation, so that they keep the lines that were running; they are rare."""

PROTOCOL = 4
"""Of pickle: PyTorch's viewer in the browser (torch/utils/viz/MemoryViz.js) refuses 5 and everything below 2."""
_NOT_PLAIN_PICKLE = (
    pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, MemoryError, OverflowError, TypeError,
    ValueError,
)  # fmt: skip
"""What the unpickler raises for bytes that no pickler wrote."""


class TraceEntry(NamedTuple):
    """One thing that the allocator did."""

    action: str
    address: int
    """Of the block or segment; for oom the device's free bytes."""
    size: int
    stream: int
    time_us: int
    """Since the epoch, of the dry run: not of a real device."""
    event: int
    """Events that the recorder had then: the one that an alloc or a free becomes has this index."""


class TraceLog:
    """Keeps all that an allocator does, at 48 bytes an entry; it is the allocator's `listener`."""

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
        """The log that was attached to a recorder."""
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


# Out


def snapshot_of(recorder: Recorder) -> dict[str, Any]:
    """What torch.cuda.memory._snapshot() would return now; the trace is empty if no TraceLog was attached.

    The `user_metadata` of an alloc says the category, operator, shape and phase, which newer viewers show.
    """
    stacks = _Stacks()
    log = TraceLog.of(recorder)
    trace = [] if log is None else _trace(recorder, log, stacks)

    def frames(block: Block) -> list[dict[str, Any]]:
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
    """Pickle the snapshot, written beside and renamed; DataError if that cannot be."""
    target = Path(path)
    try:
        with writing(target, shared=True) as part, part.open("wb") as file:
            pickle.dump(snapshot_of(recorder), file, protocol=PROTOCOL)
    except OSError as error:
        raise DataError(
            f"cannot write the snapshot {target}: {error.strerror}; give a path in an existing folder"
        ) from None


class _Stacks:
    """Stacks as the lists of dictionaries that a snapshot has, each made once, so that a pickle has it once too."""

    def __init__(self) -> None:
        self._lists: dict[tuple[Frame, ...], list[dict[str, Any]]] = {}
        self._frames: dict[Frame, dict[str, Any]] = {}

    def plain(self, frames: tuple[Frame, ...]) -> list[dict[str, Any]]:
        known = self._lists.get(frames)
        if known is None:
            known = self._lists[frames] = [self._frame(frame) for frame in frames]
        return known

    def _frame(self, frame: Frame) -> dict[str, Any]:
        plain = {"filename": frame.file, "line": frame.line, "name": frame.function}
        return self._frames.setdefault(frame, plain)


def _trace(recorder: Recorder, log: TraceLog, stacks: _Stacks) -> list[dict[str, Any]]:
    """The log as a device trace. As in PyTorch, a free has the stack of its alloc, and so has what an alloc caused."""
    trace: list[dict[str, Any]] = []
    caused: list[dict[str, Any]] = []  # what the device was asked for by an alloc or oom that is still to come
    held: dict[int, list[dict[str, Any]]] = {}  # by address
    metadata: dict[str, str] = {}  # each text once
    for number, entry in enumerate(log):
        frames: list[dict[str, Any]] = []
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
        plain = {
            "frames": frames,
            "action": entry.action,
            "device_free" if entry.action == "oom" else "addr": entry.address,
            "size": entry.size,
            "stream": entry.stream,
            "time_us": entry.time_us,
            "compile_context": "N/A",
            "user_metadata": metadata.setdefault(words, words),
            "pool_id": (0, 0),  # a recorder takes nothing from private pools
        }
        trace.append(plain)
        if entry.action in ("segment_alloc", "segment_map"):
            caused.append(plain)
        elif entry.action in ("alloc", "oom"):
            for each in caused:
                each["frames"] = frames
            caused = []
    return trace


def _allocation(recorder: Recorder, event: int) -> Allocation | None:
    """The allocation that an alloc became; None for a block that was taken from the allocator directly."""
    number = recorder.events[event] if event < len(recorder.events) else 0
    return recorder.allocations[number - 1] if number > 0 else None


def _words(allocation: Allocation) -> str:
    shape = " x ".join(map(str, allocation.shape))
    tensor = f"{shape} {allocation.dtype}" if shape else ""
    return ", ".join(filter(None, (allocation.category, tensor, allocation.operator, f"in {allocation.phase}")))


def _settings(settings: AllocatorSettings, environ: Mapping[str, str]) -> dict[str, Any]:
    """The allocator_settings; those that the virtual GPU does not follow have PyTorch's defaults."""
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


# In


class _PlainUnpickler(pickle.Unpickler):
    """Knows no class and no function, and so can call none: containers, numbers, text, bytes, True, False, None."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        raise DataError(
            f"{self._path} was not read: it asks for {module}.{name}, and a memory snapshot has only plain containers, "
            "numbers and text; do not open this file with pickle, which would run it"
        )


def read_snapshot(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A snapshot that PyTorch or tightfit wrote, read without executing anything; DataError for anything else."""
    source = Path(path)
    try:
        with open(source, "rb") as file:
            found = _PlainUnpickler(file, source).load()
    except OSError as error:
        raise DataError(f"cannot read the snapshot {source}: {error.strerror}") from None
    except _NOT_PLAIN_PICKLE as error:
        raise DataError(
            f"{source} is not a whole snapshot pickle ({type(error).__name__}: {error}); "
            "write it anew with torch.cuda.memory._dump_snapshot or `tightfit dryrun --snapshot`"
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("segments"), list):
        raise DataError(
            f"{source} holds a {type(found).__name__} without a list of segments, so it is no memory snapshot; "
            "give what torch.cuda.memory._dump_snapshot or `tightfit dryrun --snapshot` wrote"
        )
    return cast(dict[str, Any], found)
