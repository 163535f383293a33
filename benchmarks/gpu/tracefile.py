"""PyTorch's allocator traces made small: what was asked for, in order, and where it was put.

A trace is a dictionary of columns, a number for each entry: `kind` (index into KINDS), `size` (bytes), `stream` (0 is
the first one seen), `number` (an allocation's, by the order of allocations, or a segment's, likewise), and for
allocations `segment` and `offset`, where they were put. Many traces lie in one zip file, as JSON.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tightfit.errors import DataError

KINDS = ("alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "oom")
COLUMNS = ("kind", "size", "stream", "number", "segment", "offset")
Trace = dict[str, list[int]]


def compact(snapshot: dict[str, Any]) -> Trace:
    """The columns of a `torch.cuda.memory._snapshot()` of one device, recorded from its first allocation on."""
    entries = max(snapshot["device_traces"], key=len)
    trace: Trace = {name: [] for name in COLUMNS}
    streams: dict[int, int] = {}
    segments: dict[int, tuple[int, int]] = {}  # by address: number and size
    allocations: dict[int, int] = {}  # by address: number
    segment_count = allocation_count = 0
    for entry in entries:
        action, size, address = entry["action"], entry["size"], entry.get("addr", 0)
        segment = offset = number = 0
        match action:
            case "segment_alloc":
                number, segments[address] = segment_count, (segment_count, size)
                segment_count += 1
            case "segment_free":
                number = segments.pop(address)[0]
            case "alloc":
                number = allocations[address] = allocation_count
                allocation_count += 1
                segment, offset = _place(segments, address)
            case "free_requested":
                number = allocations[address]
            case "free_completed":
                number = allocations.pop(address)
            case "oom":
                pass
            case "snapshot":
                continue
            case _:
                raise DataError(f"the trace has {action!r}, which is not followed; record without expandable segments")
        row = (KINDS.index(action), size, streams.setdefault(entry["stream"], len(streams)), number, segment, offset)
        for name, value in zip(COLUMNS, row, strict=True):
            trace[name].append(value)
    return trace


def _place(segments: dict[int, tuple[int, int]], address: int) -> tuple[int, int]:
    """Segment and offset of an address."""
    for start in reversed(segments):  # what was reserved last is used first
        number, size = segments[start]
        if start <= address < start + size:
            return number, address - start
    raise DataError("an allocation lies in no segment of the trace; record from the process's first allocation on")


def rows(trace: Trace) -> Iterator[tuple[int, ...]]:
    """Entry for entry, in the order of COLUMNS."""
    return zip(*(trace[name] for name in COLUMNS), strict=True)


def add(path: Path, name: str, facts: dict[str, Any], trace: Trace) -> None:
    """Put a trace, with the facts of its run, into a zip file that may hold others."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr(f"{name}.json", json.dumps({"facts": facts, "trace": trace}, separators=(",", ":")))


def names(path: Path) -> list[str]:
    """The traces in a file, in the order they were added; none if it does not exist."""
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".json") for name in archive.namelist()]


def read(path: Path, name: str) -> tuple[dict[str, Any], Trace]:
    """The facts and the columns of one trace."""
    with zipfile.ZipFile(path) as archive:
        found = json.loads(archive.read(f"{name}.json"))
    return found["facts"], found["trace"]
