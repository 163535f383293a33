"""The failure that a memory snapshot of PyTorch recorded, as facts."""

import contextlib
import os
from collections.abc import Mapping
from typing import Annotated, TypeVar

import msgspec

from tightfit.oomlog.facts import Facts, Figure, with_arithmetic
from tightfit.oomlog.log_text import clean
from tightfit.oomlog.snapshot_reader import read_snapshot
from tightfit.oomlog.tracebacks import TraceFrame, phase_of

R = TypeVar("R")
_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Frame(msgspec.Struct):
    filename: str = ""
    line: _Count | None = None
    name: str = ""


class _OutOfMemory(msgspec.Struct):
    """An entry `oom` of a device's trace."""

    size: _Count
    device_free: _Count | None = None
    time_us: _Count = 0
    frames: list[_Frame] = []
    """Innermost first."""


class _Segment(msgspec.Struct):
    device: int = 0
    total_size: _Count = 0
    allocated_size: _Count = 0
    segment_pool_id: tuple[int, int] = (0, 0)
    """Other than (0, 0): a private pool."""


def read_snapshot_failure(path: str | os.PathLike[str]) -> Facts | None:
    """Return the last out of memory of a snapshot file, or None if it recorded none. DataError if it is no snapshot."""
    return facts_of_snapshot(read_snapshot(path))


def facts_of_snapshot(snapshot: Mapping[str, object]) -> Facts | None:
    """Return the last out of memory of any device; records of another shape than PyTorch's are left out."""
    traces = snapshot.get("device_traces")
    last = {device: ooms[-1] for device, trace in enumerate(_list(traces)) if (ooms := _out_of_memories(trace))}
    if not last:
        return None
    device, entry = max(last.items(), key=lambda item: item[1].time_us)
    stated = {"requested_bytes": entry.size, **_held(_records(snapshot.get("segments"), _Segment), device)}
    if entry.device_free is not None:
        stated["free_bytes"] = entry.device_free
    figures, notes = with_arithmetic(
        {name: Figure(bytes=value, low=value, high=value) for name, value in stated.items()}
    )
    frames = tuple(
        TraceFrame(file=_word(frame.filename), line=frame.line, function=_word(frame.name))
        for frame in reversed(entry.frames)
    )
    return Facts(
        kind="cuda_out_of_memory",
        figures=figures,
        device_index=device,
        frames=frames,
        phase=phase_of(frames),
        notes=tuple(notes),
    )


def _out_of_memories(trace: object) -> list[_OutOfMemory]:
    entries = [each for each in _list(trace) if isinstance(each, dict) and each.get("action") == "oom"]
    return _records(entries, _OutOfMemory)


def _held(segments: list[_Segment], device: int) -> dict[str, int]:
    """Return the bytes reserved, allocated and in private pools on a device."""
    own = [each for each in segments if each.device == device]
    private = sum(each.total_size for each in own if each.segment_pool_id != (0, 0))
    held = {
        "reserved_bytes": sum(each.total_size for each in own),
        "allocated_bytes": sum(each.allocated_size for each in own),
    }
    return held | ({"private_pool_bytes": private} if private else {})


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _records(values: object, kind: type[R]) -> list[R]:
    """Return the records in a list, without those of another shape."""
    found = []
    for each in _list(values):
        with contextlib.suppress(msgspec.ValidationError):
            found.append(msgspec.convert(each, kind))
    return found


def _word(text: str) -> str:
    return " ".join(clean(text[:1000]).split())
