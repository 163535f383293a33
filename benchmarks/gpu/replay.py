"""A recorded trace once more through tightfit's allocator: the same requests must make the same segments."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.tracefile import KINDS, Trace, rows
from tightfit.allocator.caching import Block, CachingAllocator, OutOfMemory

Event = tuple[str, int, int]
"""Kind, bytes, stream."""
_SEGMENT_KINDS = ("segment_alloc", "segment_free", "oom")
_OTHER_STREAM = -1


@dataclass(frozen=True)
class Comparison:
    """Two sequences of events."""

    expected: int
    """Events of the card."""
    got: int
    same: int
    """Events before the first that differs."""
    difference: str
    """The first that differs, in words; empty if all are equal."""

    @property
    def equal(self) -> bool:
        return not self.difference


def compare(expected: list[Any], got: list[Any]) -> Comparison:
    """Where two sequences part."""
    shorter = min(len(expected), len(got))
    same = next((i for i in range(shorter) if expected[i] != got[i]), shorter)
    difference = ""
    if same < max(len(expected), len(got)):
        shown = [repr(events[same]) if same < len(events) else "nothing" for events in (expected, got)]
        difference = f"event {same}: {shown[0]} on the card, {shown[1]} here"
    return Comparison(len(expected), len(got), same, difference)


@dataclass(frozen=True)
class Replayed:
    """What the allocator simulation made of a card's requests."""

    segments: Comparison
    """Segments taken, returned and refused, by size, in order."""
    places: Comparison
    """Where each allocation was put: number of the segment, and offset."""
    peak_reserved_bytes: int


def replay(trace: Trace, *, total_bytes: int, allowed_bytes: int = 0, context_bytes: int = 0) -> Replayed:
    """Send a trace's requests to a new allocator. `allowed_bytes` is the limit of a memory fraction, 0 for none."""
    allocator = CachingAllocator(total_bytes=total_bytes, context_bytes=context_bytes)
    if allowed_bytes:
        allocator.set_memory_fraction(allowed_bytes / total_bytes)
    heard: list[Event] = []
    numbers: dict[int, int] = {}  # of segments, by address

    def listener(action: str, address: int, size: int, stream: int) -> None:
        if action == "segment_alloc":
            numbers[address] = len(numbers)
        if action in _SEGMENT_KINDS:
            heard.append((action, size, stream))

    allocator.listener = listener
    entries = list(rows(trace))
    blocks: dict[int, Block] = {}
    places: list[tuple[int, int]] = []
    for index, (kind, size, stream, number, *_) in enumerate(entries):
        match KINDS[kind]:
            case "alloc":
                try:
                    blocks[number] = allocator.malloc(size, stream=stream)
                    segment = blocks[number].segment.address
                    places.append((numbers[segment], blocks[number].address - segment))
                except OutOfMemory:  # told by the listener; the card went on
                    places.append((-1, -1))
            case "oom":
                with suppress(OutOfMemory):
                    allocator.free(allocator.malloc(size, stream=stream))
            case "free_requested" if number in blocks:
                if not _completes_at_once(entries, index):
                    allocator.record_stream(blocks[number], _OTHER_STREAM)
                allocator.free(blocks.pop(number))
            case "free_completed":
                allocator.synchronize()
                allocator.process_events()
            case "segment_free" if _is_asked_for(entries, index):
                allocator.empty_cache()
    expected = [(KINDS[kind], size, stream) for kind, size, stream, *_ in entries if KINDS[kind] in _SEGMENT_KINDS]
    placed = [(segment, offset) for kind, _, _, _, segment, offset in entries if KINDS[kind] == "alloc"]
    return Replayed(_returns_sorted(expected, heard), compare(placed, places), allocator.peak_reserved_bytes)


def _returns_sorted(expected: list[Event], got: list[Event]) -> Comparison:
    """Segments that go back together have no order of their own: it follows addresses, which the driver chooses."""
    return compare(_sort_returns(expected), _sort_returns(got))


def _sort_returns(events: list[Event]) -> list[Event]:
    out: list[Event] = []
    returned: list[Event] = []
    for event in [*events, None]:
        if event is not None and event[0] == "segment_free":
            returned.append(event)
            continue
        out += sorted(returned)
        returned = []
        if event is not None:
            out.append(event)
    return out


def _completes_at_once(entries: list[tuple[int, ...]], index: int) -> bool:
    """Whether the freed block comes back with the next entry: no other stream used it."""
    if index + 1 == len(entries):
        return True
    kind, number = entries[index + 1][0], entries[index + 1][3]
    return KINDS[kind] == "free_completed" and number == entries[index][3]


def _is_asked_for(entries: list[tuple[int, ...]], index: int) -> bool:
    """Whether the script emptied the cache: what the allocator returns by itself, it returns for a request."""
    following = (KINDS[entry[0]] for entry in entries[index + 1 :])
    return next((kind for kind in following if kind != "segment_free"), "") not in ("segment_alloc", "oom")


def requests(trace: Trace) -> list[Event]:
    """What was allocated and freed, in order; a free is told by the size of what it frees."""
    return [
        (KINDS[kind], size, stream)
        for kind, size, stream, *_ in rows(trace)
        if KINDS[kind] in ("alloc", "free_requested")
    ]


def compare_requests(card: Trace, recorder: Trace) -> tuple[Comparison, str]:
    """Whether the recorder saw the card's requests, in their order; and what only one of them has, most first."""
    mine, theirs = (Counter(size for kind, size, _ in requests(each) if kind == "alloc") for each in (recorder, card))
    only = [
        f"{count} x {size} only {where}"
        for where, counts in (("on the card", theirs - mine), ("here", mine - theirs))
        for size, count in sorted(counts.items(), key=lambda item: -item[0] * item[1])[:5]
    ]
    return compare(requests(card), requests(recorder)), "; ".join(only)
