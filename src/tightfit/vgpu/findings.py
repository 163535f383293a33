"""What a dry run found, as plain data: the same facts for people and for machines."""

from collections import defaultdict
from typing import Any

from tightfit.kernels.operators import NOT_MODELLED
from tightfit.vgpu.frames import Frame, users_line
from tightfit.vgpu.recorder import CATEGORIES, Allocation
from tightfit.vgpu.session import VirtualSession
from tightfit.vgpu.timeline import timeline_data

_LARGEST = 10
_LISTED_MADE_UP = 20


def findings_of(session: VirtualSession, error: BaseException | None = None) -> dict[str, Any]:
    """`outcome`, `peak`, `categories`, `phases`, `largest`, `failure` and what was assumed; bytes throughout.

    `error` is what ended the script, if it was not meant to end there.
    """
    recorder, allocator = session.device.recorder, session.allocator
    failure = _failure(session) if isinstance(error, _out_of_memory()) else None
    at = len(recorder.events) if failure else recorder.peak_event
    alive = recorder.alive_at(at)
    peaks = session.device.peaks()
    found = {
        "outcome": "out_of_memory" if failure else ("fits" if error is None else "error"),
        "gpu": {
            "name": session.gpu.name,
            "capability": ".".join(map(str, session.gpu.capability)),
            "total_bytes": allocator.total_bytes,
            "used_by_others_bytes": allocator.used_by_others,
            "context_bytes": allocator.context_bytes,
        },
        "torch": ".".join(map(str, session.device.card.torch_version)),
        "peak": {
            "requested_bytes": peaks["requested"],
            "allocated_bytes": peaks["allocated"],
            "reserved_bytes": peaks["reserved"],
            "device_bytes": allocator.context_bytes + peaks["reserved"],
            "phase": recorder.peak_phase,
        },
        "categories": by_category(alive),
        "categories_by_phase": _by_category_and_phase(alive),
        "phases": {name: recorder.phase_peaks[name] for name in recorder.phase_peaks},
        "largest": [
            {"bytes": each.nbytes, **_what_and_where(each)}
            for each in sorted(alive, key=lambda each: -each.nbytes)[:_LARGEST]
        ],
        "failure": failure,
        "caught_failures": session.device.caught_failures - (1 if failure else 0),
        "steps": session.phases.steps,
        "stopped_because": _why_it_ended(session, error, failure),
        "not_played": [{"file": line.file, "line": line.line} for line in session.not_played],
        "made_up_values": _made_up(session),
        "not_written": session.device.not_written,
        "not_modelled": session.device.not_modelled,
        "never_modelled": list(NOT_MODELLED),
        "notes": session.notes,
    }
    if session.request.timeline:
        found["timeline"] = timeline_data(recorder)
    return found


def _out_of_memory() -> type[BaseException]:
    import torch

    return torch.OutOfMemoryError


def _why_it_ended(session: VirtualSession, error: BaseException | None, failure: object) -> str:
    if failure:
        return "the device ran out of memory"
    if error is not None:
        return f"the script failed: {type(error).__name__}: {error!s:.500}"
    return session.stopped_because


def _failure(session: VirtualSession) -> dict[str, Any] | None:
    if session.device.failure is None:
        return None
    allocation, error = session.device.failure
    return {
        "requested_bytes": error.requested_bytes,
        "tensor_bytes": error.tensor_bytes,
        "allocated_bytes": error.allocated_bytes,
        "reserved_bytes": error.reserved_bytes,
        "total_bytes": error.total_bytes,
        "free_bytes": error.free_bytes,
        "process_bytes": error.process_bytes,
        **_what_and_where(allocation),
        "message": error.message(session.device.card.torch_version),
    }


def _what_and_where(allocation: Allocation) -> dict[str, Any]:
    line = users_line(allocation.frames) or Frame("", 0, "")
    return {
        "shape": list(allocation.shape),
        "dtype": allocation.dtype,
        "operator": allocation.operator,
        "phase": allocation.phase,
        "category": allocation.category,
        "file": line.file,
        "line": line.line,
        "function": line.function,
    }


def by_category(alive: list[Allocation]) -> dict[str, int]:
    sums = dict.fromkeys(CATEGORIES, 0)
    for allocation in alive:
        sums[allocation.category] += allocation.nbytes
    return {name: nbytes for name, nbytes in sums.items() if nbytes}


def _by_category_and_phase(alive: list[Allocation]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for allocation in alive:
        table[allocation.category][allocation.phase] += allocation.nbytes
    return {category: dict(row) for category, row in table.items()}


def _made_up(session: VirtualSession) -> list[dict[str, Any]]:
    counts = session.device.values.made_up
    return [
        {"what": what, "times": times, "file": line.file if line else "", "line": line.line if line else 0}
        for (line, what), times in counts.most_common(_LISTED_MADE_UP)
    ]
