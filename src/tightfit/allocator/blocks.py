"""Blocks of device memory: how they are chained in segments, cut, merged, and kept for reuse."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from tightfit.allocator.stats import PoolId, PoolStats, Stat

Frames = Callable[["Block"], Sequence[Mapping[str, object]]]
"""Returns the stack of a block, a record for each frame."""


class BlockRecord(TypedDict):
    """A block in a memory snapshot."""

    address: int
    size: int
    requested_size: int
    state: str
    frames: Sequence[Mapping[str, object]]


class SegmentRecord(TypedDict):
    """A contiguous mapped range in a memory snapshot."""

    device: int
    address: int
    total_size: int
    allocated_size: int
    active_size: int
    requested_size: int
    stream: int
    segment_type: str
    segment_pool_id: PoolId
    is_expandable: bool
    frames: Sequence[Mapping[str, object]]
    blocks: list[BlockRecord]


@dataclass(slots=True, eq=False)
class Segment:
    """One cudaMalloc, or one expandable segment: a range of addresses with pages that are mapped as needed."""

    address: int
    size: int
    page_bytes: int = 0
    """0 if not expandable."""
    head: "Block | None" = None
    """The block at the lowest address."""


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment, handed out or cached."""

    address: int
    size: int
    stream: int
    pool: "BlockPool"
    segment: Segment
    requested: int = 0
    prev: "Block | None" = None
    next: "Block | None" = None
    allocated: bool = False
    mapped: bool = True
    pending: bool = False
    """True for a freed block that another stream may still use."""
    used_by: set[int] | None = None
    """Other streams."""
    gc_base: int = 0
    """Searches of the pool when the block came into it."""
    tag: Any = None
    """The caller's own mark, of any type."""

    @property
    def is_whole(self) -> bool:
        """True if the block is all of one cudaMalloc, so that it can be freed."""
        return self.prev is None and self.next is None and not self.segment.page_bytes


class BlockPool:
    """Cached blocks of one kind by stream, ordered by size and address; unmapped ones by address."""

    __slots__ = ("free", "is_small", "owner", "reserved", "searches", "stats", "unmapped")

    def __init__(
        self,
        is_small: bool,
        stats: tuple[PoolStats, PoolStats],
        owner: PoolId = (0, 0),
        reserved: tuple[Stat, ...] = (),
    ) -> None:
        self.is_small = is_small
        self.owner = owner
        self.stats = stats  # of all pools, and of pools of this kind
        self.reserved = reserved  # likewise the reserved bytes of a private pool
        self.free: defaultdict[int, list[tuple[int, int, Block]]] = defaultdict(list)
        self.unmapped: defaultdict[int, list[tuple[int, Block]]] = defaultdict(list)
        self.searches = 0  # counted only for garbage collection

    def insert(self, block: Block) -> None:
        block.gc_base = self.searches
        insort(self.free[block.stream], (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        blocks = self.free[block.stream]
        del blocks[bisect_left(blocks, (block.size, block.address))]

    def insert_unmapped(self, block: Block) -> None:
        insort(self.unmapped[block.stream], (block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        blocks = self.unmapped[block.stream]
        del blocks[bisect_left(blocks, (block.address,))]

    def blocks(self) -> list[Block]:
        """Return a copy of the cached blocks, ordered by stream, size and address: callers release them meanwhile."""
        return [block for stream in sorted(self.free) for _, _, block in self.free[stream]]

    def best_fit(self, size: int, stream: int, expandable: bool) -> Block | None:
        """Return the smallest cached block of at least `size` bytes.

        A block of an expandable segment counts with the unmapped room behind it. Without `expandable`, such blocks are
        passed over.
        """
        blocks = self.free.get(stream)
        if not blocks:
            return None
        index, end = bisect_left(blocks, (size,)), len(blocks)
        if not expandable:
            while index < end and blocks[index][2].segment.page_bytes:
                index += 1
        else:
            while (
                index + 1 < end
                and blocks[index][2].segment.page_bytes
                and _growable_size(blocks[index + 1][2]) < _growable_size(blocks[index][2])
            ):
                index += 1
        return blocks[index][2] if index < end else None

    def find_room(self, size: int, stream: int) -> Block | None:
        """Return the block at the lowest address from which free and unmapped blocks give `size` bytes."""
        for _, unmapped in self.unmapped[stream]:
            first = unmapped.prev if unmapped.prev and _unused(unmapped.prev) else unmapped
            room, block = 0, first
            while room < size and _unused(block):
                room += block.size
                if not block.next:
                    break
                block = block.next
            if room >= size:
                return first
        return None


def _unused(block: Block) -> bool:
    return not block.allocated and not block.pending


def _growable_size(block: Block) -> int:
    behind = block.next
    return block.size + (behind.size if behind and not behind.mapped else 0)


@dataclass(slots=True, eq=False)
class PrivatePool:
    """The two pools of CUDA graphs."""

    small: BlockPool
    large: BlockPool
    use_count: int = 1
    """Graphs that were captured with it."""


def link(before: Block | None, block: Block) -> None:
    """Put `block` after `before`, or first in its segment."""
    block.prev = before
    if before:
        before.next = block
    else:
        block.segment.head = block


def cut(block: Block, size: int) -> Block:
    """Shorten a block that is in no pool to `size` bytes; return the rest, which is in no pool either."""
    rest = Block(block.address + size, block.size - size, block.stream, block.pool, block.segment)
    rest.next = block.next
    if rest.next:
        rest.next.prev = rest
    link(block, rest)
    block.size = size
    return rest


def merge(block: Block, neighbour: Block) -> int:
    """Let a block in no pool absorb a free neighbour of its state; return the bytes gained (try_merge_blocks)."""
    if neighbour.allocated or neighbour.pending or neighbour.mapped != block.mapped:
        return 0
    if neighbour.mapped:
        neighbour.pool.remove(neighbour)
    else:
        neighbour.pool.remove_unmapped(neighbour)
    if block.prev is neighbour:
        block.address = neighbour.address
        link(neighbour.prev, block)
    else:
        block.next = neighbour.next
        if block.next:
            block.next.prev = block
    block.size += neighbour.size
    return neighbour.size


def segment_records(segment: Segment, frames: Frames | None) -> Iterator[SegmentRecord]:
    """Yield the records of a segment in a memory snapshot, one for each contiguous mapped range."""
    run: list[Block] = []
    block = segment.head
    while block:
        if block.mapped:
            run.append(block)
        if run and not (block.next and block.next.mapped):
            yield _record(run, frames)
            run = []
        block = block.next


def _record(run: list[Block], frames: Frames | None) -> SegmentRecord:
    """Describe one contiguous mapped range as torch/csrc/cuda/Module.cpp does."""
    first = run[0]
    active = [block for block in run if block.allocated or block.pending]
    return {
        "device": 0,
        "address": first.address,
        "total_size": sum(block.size for block in run),
        "allocated_size": sum(block.size for block in run if block.allocated),
        "active_size": sum(block.size for block in active),
        "requested_size": sum(block.requested for block in active),
        "stream": first.stream,
        "segment_type": "small" if first.pool.is_small else "large",
        "segment_pool_id": first.pool.owner,
        "is_expandable": first.segment.page_bytes > 0,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested,
                "state": _state(block),
                "frames": frames(block) if frames and _state(block) != "inactive" else [],
            }
            for block in run
        ],
    }


def _state(block: Block) -> str:
    if block.allocated:
        return "active_allocated"
    return "active_pending_free" if block.pending else "inactive"
