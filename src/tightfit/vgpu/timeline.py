"""Memory over a dry run: the bytes of each category at each moment."""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from tightfit.vgpu.recorder import Allocation, Recorder
from tightfit.vgpu.records import CATEGORIES, FailedRequest, LivingTensor, PhaseStart, Timeline, TimelinePeak
from tightfit.vgpu.snapshot import TraceLog

MAX_POINTS = 2000
_NAMED = 3
"""Tensors of each category that are named at a moment."""
_LONGEST_LISTS = 400
"""Phases shorter than a 400th of the run are drawn as part of the one before; as many failures are kept."""


def timeline_of(recorder: Recorder) -> Timeline:
    """Return memory over the run so far. Without a TraceLog, reserved bytes and failed requests are unknown."""
    log = TraceLog.of(recorder)
    peak = max(recorder.peak_event - 1, 0)
    totals = _totals(recorder, log)
    kept = _kept(totals, peak)
    allocator = recorder.allocator
    return Timeline(
        event_count=len(totals),
        events=kept,
        category_bytes=_categories_at(recorder, log, kept),
        reserved_bytes=None if log is None else _reserved_at(log, kept),
        phases=_phases(recorder),
        peak=TimelinePeak(event=peak, phase=recorder.peak_phase, allocated_bytes=recorder.peak_allocated),
        failures=[] if log is None else _failures(log),
        tensors=_tensors(recorder, kept),
        total_bytes=allocator.total_bytes,
        used_by_others_bytes=allocator.used_by_others,
        context_bytes=allocator.context_bytes,
    )


def _changes(recorder: Recorder, log: TraceLog | None) -> Iterator[list[tuple[str, int]]]:
    """Yield the bytes that each event adds to each category.

    A block that passes from one allocation to another is neither allocated nor freed: its two events count as one.
    """
    round_size = recorder.allocator.settings.round_size
    rounded: dict[int, int] = {}
    passes = _hand_overs(recorder, log)
    waiting: list[tuple[str, int]] = []
    for position, number in enumerate(recorder.events):
        allocation = recorder.allocations[abs(number) - 1]
        size = rounded.get(allocation.nbytes)
        if size is None:
            size = rounded[allocation.nbytes] = round_size(allocation.nbytes)
        change = (allocation.category, size if number > 0 else -size)
        if position in passes:
            waiting = [change]
            yield []
        else:
            yield [*waiting, change]
            waiting = []


def _hand_overs(recorder: Recorder, log: TraceLog | None) -> set[int]:
    """Find the events that gave an allocation the block which the next event ends."""
    if log is None:
        return set()
    events = recorder.events
    heard = bytearray(len(events))
    for entry in log:
        if entry.action in ("alloc", "free_requested") and entry.event < len(events):
            heard[entry.event] = 1
    return {
        position
        for position, (number, following) in enumerate(pairwise(events))
        if number > 0 > following and not heard[position] and not heard[position + 1]
    }


def _totals(recorder: Recorder, log: TraceLog | None) -> list[int]:
    """Return the bytes after each event."""
    totals, total = [], 0
    for changes in _changes(recorder, log):
        total += sum(nbytes for _, nbytes in changes)
        totals.append(total)
    return totals


def _kept(totals: Sequence[int], peak: int) -> list[int]:
    """Choose about MAX_POINTS events: the highest and lowest of each stretch, the peak and the last."""
    if not totals:
        return []
    stretch = -(-2 * len(totals) // MAX_POINTS)
    kept = {peak, len(totals) - 1}
    for start in range(0, len(totals), stretch):
        positions = range(start, min(start + stretch, len(totals)))
        kept |= {max(positions, key=totals.__getitem__), min(positions, key=totals.__getitem__)}
    return sorted(kept)


def _categories_at(recorder: Recorder, log: TraceLog | None, kept: list[int]) -> dict[str, list[int]]:
    """Return the bytes of each category that occurs, after each of the kept events."""
    wanted = set(kept)
    now: dict[str, int] = defaultdict(int)
    moments: list[dict[str, int]] = []
    for position, changes in enumerate(_changes(recorder, log)):
        for category, nbytes in changes:
            now[category] += nbytes
        if position in wanted:
            moments.append(dict(now))
    names = [name for name in CATEGORIES if any(moment.get(name) for moment in moments)]
    return {name: [moment.get(name, 0) for moment in moments] for name in names}


def _tensors(recorder: Recorder, kept: list[int]) -> list[LivingTensor]:
    """List the largest tensors of each category at any of the kept events, in the order of their allocation."""
    events = recorder.events
    ended = {-number: position for position, number in enumerate(events) if number < 0}
    alive: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    wanted: dict[int, int] = {}
    following = 0
    for moment in kept:
        for position in range(following, moment + 1):
            if (number := events[position]) > 0:
                allocation = recorder.allocations[number - 1]
                heapq.heappush(alive[allocation.category], (-allocation.nbytes, position, number))
        following = moment + 1
        for heap in alive.values():
            top: list[tuple[int, int, int]] = []
            while heap and len(top) < _NAMED:
                entry = heapq.heappop(heap)
                if ended.get(entry[2], moment + 1) > moment:
                    top.append(entry)
            for entry in top:
                heapq.heappush(heap, entry)
                wanted[entry[2]] = entry[1]
    born = sorted(wanted.items(), key=lambda item: item[1])
    return [_tensor(recorder.allocations[number - 1], start, ended.get(number)) for number, start in born]


def _tensor(allocation: Allocation, start: int, end: int | None) -> LivingTensor:
    return LivingTensor(**allocation.origin(), bytes=allocation.nbytes, from_event=start, to_event=end)


def _reserved_at(log: TraceLog, kept: list[int]) -> list[int]:
    """Return the most that was reserved since the kept event before."""
    signs = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
    changes = [(entry.event, signs[entry.action] * entry.size) for entry in log if entry.action in signs]
    reserved, now, index = [], 0, 0
    for position in kept:
        last = position == kept[-1]
        highest = None
        while index < len(changes) and (last or changes[index][0] <= position):
            now += changes[index][1]
            highest = now if highest is None else max(highest, now)
            index += 1
        reserved.append(now if highest is None else highest)
    return reserved


def _phases(recorder: Recorder) -> list[PhaseStart]:
    """List the starts of the phases, without those too short to draw."""
    starts: list[tuple[int, str]] = []
    for position, number in enumerate(recorder.events):
        if number > 0:
            begun = recorder.allocations[number - 1].phase
            if not starts or starts[-1][1] != begun:
                starts.append((position, begun))
    shortest = len(recorder.events) / _LONGEST_LISTS
    long: list[tuple[int, str]] = []
    for (position, phase), (end, _) in pairwise([*starts, (len(recorder.events), "")]):
        if (not long or end - position >= shortest) and not (long and long[-1][1] == phase):
            long.append((position, phase))
    return [PhaseStart(event=position, phase=phase) for position, phase in long]


def _failures(log: TraceLog) -> list[FailedRequest]:
    """List requests that could not be met, also those that the script caught; the last ones of very many."""
    found = [
        FailedRequest(event=entry.event, requested_bytes=entry.size, free_bytes=entry.address)
        for entry in log
        if entry.action == "oom"
    ]
    return found[-_LONGEST_LISTS:]
