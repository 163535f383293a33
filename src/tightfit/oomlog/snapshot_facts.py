"""The failure that a memory snapshot of PyTorch recorded, as facts."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from tightfit.oomlog.facts import Facts, Figure, with_arithmetic
from tightfit.oomlog.log_text import clean
from tightfit.oomlog.snapshot_reader import read_snapshot
from tightfit.oomlog.tracebacks import TraceFrame, phase_of


def read_snapshot_failure(path: str | os.PathLike[str]) -> Facts | None:
    """The last out of memory of a snapshot file, or None if it recorded none; DataError if it is no snapshot."""
    return facts_of_snapshot(read_snapshot(path))


def facts_of_snapshot(snapshot: Mapping[str, Any]) -> Facts | None:
    """The last entry `oom` of any device's trace, with what the segments hold now; whatever is not as it should be
    is left out."""
    traces = snapshot.get("device_traces")
    found: tuple[int, Mapping[str, Any]] | None = None
    for device, trace in enumerate(traces if isinstance(traces, list) else ()):
        for entry in reversed(trace) if isinstance(trace, list) else ():
            if isinstance(entry, dict) and entry.get("action") == "oom" and _count(entry.get("size")) is not None:
                if found is None or (_count(entry.get("time_us")) or 0) > (_count(found[1].get("time_us")) or 0):
                    found = device, entry
                break
    if found is None:
        return None
    device, entry = found
    stated = {"requested_bytes": entry.get("size"), "free_bytes": entry.get("device_free")}
    stated |= _held(snapshot.get("segments"), device)
    figures, notes = with_arithmetic(
        {name: _exact(value) for name, value in stated.items() if _count(value) is not None}
    )
    frames = _frames(entry.get("frames"))
    return Facts(
        kind="cuda_out_of_memory",
        figures=figures,
        device_index=device,
        frames=frames,
        phase=phase_of(frames),
        notes=tuple(notes),
    )


def _held(segments: object, device: int) -> dict[str, int]:
    """Bytes reserved, allocated and in private pools on a device."""
    held = {"reserved_bytes": 0, "allocated_bytes": 0, "private_pool_bytes": 0}
    for segment in segments if isinstance(segments, list) else ():
        if not isinstance(segment, dict) or segment.get("device", 0) != device:
            continue
        reserved = _count(segment.get("total_size")) or 0
        held["reserved_bytes"] += reserved
        held["allocated_bytes"] += _count(segment.get("allocated_size")) or 0
        if segment.get("segment_pool_id", (0, 0)) not in ((0, 0), [0, 0]):
            held["private_pool_bytes"] += reserved
    if not held["private_pool_bytes"]:
        del held["private_pool_bytes"]
    return held


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _exact(value: Any) -> Figure:
    return Figure(bytes=value, low=value, high=value)


def _word(value: object) -> str:
    return " ".join(clean(str(value or "")[:1000]).split())


def _frames(frames: object) -> tuple[TraceFrame, ...]:
    """Outermost first; a snapshot has them the other way round, and has no source lines."""
    plain: Iterable[object] = reversed(frames) if isinstance(frames, list) else ()
    return tuple(
        TraceFrame(
            file=_word(frame.get("filename")),
            line=_count(frame.get("line")),
            function=_word(frame.get("name")),
        )
        for frame in plain
        if isinstance(frame, dict)
    )
