"""Blocks of device memory: how they are chained in segments, cut, merged, and kept for reuse."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from tightfit.allocator.stats import PoolId, PoolStats, Stat


class Segment:
    """One cudaMalloc, or one expandable segment: a range of addresses of which pages are mapped as needed."""

    __slots__ = ("address", "head", "page_bytes", "size")

    def __init__(self, address: int, size: int, page_bytes: int = 0) -> None:
        self.address = address
        self.size = size
        self.page_bytes = page_bytes  # 0: not expandable
        self.head: Block | None = None  # the block at the lowest address


class Block:
    """A piece of a segment, handed out or cached; `tag` is the caller's."""

    __slots__ = (
        "address", "allocated", "gc_base", "mapped", "next", "pending", "pool", "prev", "requested", "segment", "size",
        "stream", "tag", "used_by",
    )  # fmt: skip

    def __init__(self, address: int, size: int, stream: int, pool: "BlockPool", segment: Segment) -> None:
        self.address = address
        self.size = size
        self.requested = 0
        self.stream = stream
        self.pool = pool
        self.segment = segment
        self.prev: Block | None = None
        self.next: Block | None = None
        self.allocated = False
        self.mapped = True
        self.pending = False  # freed, but another stream may still use it
        self.used_by: set[int] | None = None  # other streams
        self.gc_base = 0  # searches of the pool when the block came into it
        self.tag: Any = None

    @property
    def is_whole(self) -> bool:
        """True if the block is all of one cudaMalloc, so that it can be freed."""
        return self.prev is None and self.next is None and not self.segment.page_bytes


class BlockPool:
    """Cached blocks of one kind by stream: best fit is the first of (size, address); unmapped ones by address."""

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
        """Cached blocks, ordered by stream, size, address; a copy, so that they may be released meanwhile."""
        return [block for stream in sorted(self.free) for _, _, block in self.free[stream]]

    def best_fit(self, size: int, stream: int, expandable: bool) -> Block | None:
        """The smallest cached block of at least `size` bytes.

        A block of an expandable segment counts with the unmapped room behind it; when the setting `expandable` is off
        again, such blocks are passed over.
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
        """The block at the lowest address from which free and unmapped blocks give `size` bytes."""
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


class PrivatePool:
    __slots__ = ("large", "small", "use_count")

    def __init__(self, small: BlockPool, large: BlockPool) -> None:
        self.small = small
        self.large = large
        self.use_count = 1  # graphs that were captured with it


def link(before: Block | None, block: Block) -> None:
    """Make `block` the one after `before`, or the first of its segment."""
    block.prev = before
    if before:
        before.next = block
    else:
        block.segment.head = block


def cut(block: Block, size: int) -> Block:
    """Shorten a block that is in no pool to `size` bytes; the rest, in no pool either, is returned."""
    rest = Block(block.address + size, block.size - size, block.stream, block.pool, block.segment)
    rest.next = block.next
    if rest.next:
        rest.next.prev = rest
    link(block, rest)
    block.size = size
    return rest


def merge(block: Block, neighbour: Block) -> int:
    """Let a block that is in no pool absorb a free neighbour of its state; the bytes gained (try_merge_blocks)."""
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


def segment_records(segment: Segment, frames: Callable[[Block], list[Any]] | None) -> Iterator[dict[str, Any]]:
    """Records of a segment in a memory snapshot: one for each contiguous mapped range."""
    run: list[Block] = []
    block = segment.head
    while block:
        if block.mapped:
            run.append(block)
        if run and not (block.next and block.next.mapped):
            yield _record(run, frames)
            run = []
        block = block.next


def _record(run: list[Block], frames: Callable[[Block], list[Any]] | None) -> dict[str, Any]:
    """One contiguous mapped range as torch/csrc/cuda/Module.cpp puts it into a snapshot."""
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
