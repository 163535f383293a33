"""PyTorch's caching allocator in plain Python: which block each request gets, and when memory runs out.

Follows c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.11 to 2.13 for one device, without torch. Bytes are only counted.
Unlike there, addresses are never used twice, and an event on another stream has happened at the next `synchronize`.
"""

from collections.abc import Callable
from typing import Literal

from tightfit.allocator.blocks import (
    Block,
    BlockPool,
    Frames,
    PrivatePool,
    Segment,
    SegmentRecord,
    cut,
    link,
    merge,
    segment_records,
)
from tightfit.allocator.settings import MIN_BLOCK, SMALL_SEGMENT, SMALL_SIZE, UNLIMITED, AllocatorSettings
from tightfit.allocator.stats import EXBIBYTE, AllocatorStats, OutOfMemory, PoolId, Stat
from tightfit.errors import ConfigError
from tightfit.units import MIB
from tightfit.wording import say

__all__ = ["AllocatorSettings", "Block", "CachingAllocator", "OutOfMemory", "PoolId"]

DEVICE_PAGE = 2 * MIB
"""Bytes; cudaMalloc takes a multiple of them from the device."""
FIRST_ADDRESS = 0x7000_0000_0000


class _Figure:
    """A read-only figure of all pools, like `allocated_bytes` or its peak since the last reset."""

    def __init__(self, name: str, field: Literal["current", "peak"]) -> None:
        self.name, self.field = name, field

    def __get__(self, allocator: "CachingAllocator", owner: type) -> int:
        value: int = getattr(getattr(allocator.stats.all, self.name), self.field)
        return value


class CachingAllocator:
    """The allocator of one device of `total_bytes`; other processes and this one's context use some of them.

    `listener(action, address, size, stream)` gets the entries of PyTorch's device traces: alloc, free_requested,
    free_completed, segment_alloc, segment_free, segment_map, segment_unmap, and oom with the free bytes as address.
    `settings`, `used_by_others` and `context_bytes` may be changed at any time. `capturing` is true during the capture
    of a CUDA graph: the cache then keeps its memory, and no event completes.
    """

    allocated_bytes = _Figure("allocated_bytes", "current")
    reserved_bytes = _Figure("reserved_bytes", "current")
    requested_bytes = _Figure("requested_bytes", "current")
    active_bytes = _Figure("active_bytes", "current")
    inactive_split_bytes = _Figure("inactive_split_bytes", "current")
    peak_allocated_bytes = _Figure("allocated_bytes", "peak")
    peak_reserved_bytes = _Figure("reserved_bytes", "peak")
    peak_requested_bytes = _Figure("requested_bytes", "peak")
    peak_active_bytes = _Figure("active_bytes", "peak")
    peak_inactive_split_bytes = _Figure("inactive_split_bytes", "peak")

    def __init__(
        self,
        *,
        total_bytes: int,
        used_by_others: int = 0,
        context_bytes: int = 0,
        settings: AllocatorSettings | None = None,
    ) -> None:
        self.total_bytes = total_bytes
        self.used_by_others = used_by_others
        self.context_bytes = context_bytes
        self.settings = settings or AllocatorSettings()
        self.listener: Callable[[str, int, int, int], None] | None = None
        self.free_memory_callbacks: list[Callable[[], bool]] = []
        """Called before the device is asked; each returns True if it freed memory (FreeMemoryCallback there)."""
        self.capturing = False
        self.stats = AllocatorStats()
        self._small = BlockPool(True, (self.stats.all, self.stats.small))
        self._large = BlockPool(False, (self.stats.all, self.stats.large))
        self._private: dict[PoolId, PrivatePool] = {}
        self._max_split_size_at_start = self.settings.max_split_size
        self._segments: dict[int, Segment] = {}  # by address
        self._next_address = FIRST_ADDRESS
        self._device_bytes = 0  # reserved, in whole device pages
        self._pending: list[Block] = []  # freed while other streams used them
        self._finished: list[Block] = []  # those whose events have happened
        self.waited = 0  # blocks so far that were freed while other streams used them
        self._allowed_bytes: int | None = None
        self.set_memory_fraction(self.settings.per_process_memory_fraction)

    def configure(self, settings: AllocatorSettings) -> None:
        """Take other settings before the first request; a memory fraction that was set stays."""
        self.settings = settings
        self._max_split_size_at_start = settings.max_split_size
        if self._allowed_bytes is None:
            self.set_memory_fraction(settings.per_process_memory_fraction)

    # Requests

    def malloc(self, size: int, *, stream: int = 0, pool: PoolId | None = None) -> Block:
        """Return a block of at least `size` bytes; for 0 bytes a null block of size 0. Raises OutOfMemory."""
        if size == 0:
            return Block(0, 0, stream, self._small, Segment(0, 0))
        assert size > 0, size
        if self._finished:
            self.process_events()
        rounded = self.settings.round_size(size)
        if pool is None:
            block_pool = self._small if rounded <= SMALL_SIZE else self._large
        else:
            block_pool = self._private[pool].small if rounded <= SMALL_SIZE else self._private[pool].large
        block = self._find_free(block_pool, rounded, stream) or self._obtain(block_pool, rounded, stream, size)
        return self._hand_out(block, rounded, size)

    def free(self, block: Block) -> None:
        """Give a block back to the cache, or after the next `synchronize` if other streams use it."""
        if not block.size:
            return
        assert block.allocated, f"block at {block.address:#x} was freed twice"
        block.allocated = False
        for stats in block.pool.stats:
            stats.allocation.current -= 1
            stats.allocated_bytes.current -= block.size
        if self.listener:
            self.listener("free_requested", block.address, block.requested, block.stream)
        if block.size >= self.settings.max_split_size:
            self.stats.oversize_allocations.current -= 1
        if block.used_by:
            block.pending = True
            self._pending.append(block)
            self.waited += 1
        else:
            self._recycle(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Note that `stream` uses the block too: once freed, its memory waits for that stream."""
        if block.size and stream != block.stream:
            block.used_by = (block.used_by or set()) | {stream}

    def synchronize(self) -> None:
        """Finish all streams. As in PyTorch, blocks that waited for them come back at the next request."""
        self.finish(self.waited)

    def finish(self, waited: int) -> None:
        """Finish what other streams did with blocks that were freed when `waited` had this value, or before."""
        count = max(0, len(self._pending) - (self.waited - waited))
        self._finished += self._pending[:count]
        del self._pending[:count]

    def process_events(self) -> None:
        """Take back blocks for which other streams have finished; not during a capture."""
        if not self.capturing:
            finished, self._finished = self._finished, []
            for block in finished:
                block.pending, block.used_by = False, None
                self._recycle(block)

    def empty_cache(self) -> None:
        """Return every unused cached segment, or page of an expandable one, to the device."""
        self._release_cached()

    def set_memory_fraction(self, fraction: float) -> None:
        """Let the allocator reserve at most this share of the device; 1 lifts the limit. Raises ConfigError."""
        if not 0 <= fraction <= 1:
            raise ConfigError(say("allocator.caching.fraction", fraction=fraction))
        # std::round, halves upward.
        self._allowed_bytes = None if fraction == 1 else int(fraction * self.total_bytes + 0.5)

    @property
    def memory_fraction(self) -> float:
        """Share of the device that may be reserved, after rounding to bytes; 1 without a limit."""
        return 1.0 if self._allowed_bytes is None else self._allowed_bytes / self.total_bytes

    def create_pool(self) -> PoolId:
        """Make a private pool, as for CUDA graphs: while in use, it shares its memory with nobody."""
        stats = self.stats
        pool_id = (0, len(stats.private_reserved) + 1)
        every, small, large = stats.private_reserved[pool_id] = (Stat(), Stat(), Stat())
        pools = PrivatePool(
            BlockPool(True, (stats.all, stats.small), pool_id, (every, small)),
            BlockPool(False, (stats.all, stats.large), pool_id, (every, large)),
        )
        self._private[pool_id] = pools
        return pool_id

    def retain_pool(self, pool_id: PoolId) -> None:
        """Add a user of a private pool."""
        self._private[pool_id].use_count += 1

    def release_pool(self, pool_id: PoolId) -> None:
        """Remove a user. After the last one, the pool's cached memory may go back to the device."""
        pool = self._private[pool_id]
        assert pool.use_count > 0, pool_id
        pool.use_count -= 1

    # Finding and handing out

    def _find_free(self, pool: BlockPool, size: int, stream: int) -> Block | None:
        """Take the best fitting cached block out of the pool (get_free_block in PyTorch)."""
        settings = self.settings
        if self._allowed_bytes is not None and settings.garbage_collection_threshold:
            pool.searches += 1
        block = pool.best_fit(size, stream, settings.expandable_segments)
        if not block:
            return None
        limit = settings.max_split_size
        if size < limit:
            if block.size >= limit:
                return None
        elif block.size >= size + (settings.max_non_split_rounding or settings.large_segment_size):
            return None
        pool.remove(block)
        return block

    def _obtain(self, pool: BlockPool, size: int, stream: int, requested: int) -> Block:
        """Get a block from the device, by all of PyTorch's attempts in their order."""
        if requested >= EXBIBYTE:
            raise self._out_of_memory(size, requested)
        called = [callback() for callback in self.free_memory_callbacks]
        block = self._find_free(pool, size, stream) if any(called) else None
        if block:
            return block
        if self._allowed_bytes is not None and self.settings.garbage_collection_threshold:
            self._collect_garbage(self._allowed_bytes)
        block = self._allocate(pool, size, stream)
        if not block and self._release_available(pool, size, stream):
            block = self._allocate(pool, size, stream)
        if not block and not self.capturing:
            self._release_cached()
            self.stats.counts["num_alloc_retries"] += 1
            block = self._allocate(pool, size, stream)
        if not block:
            error = self._out_of_memory(size, requested)
            self.stats.counts["num_ooms"] += 1
            if self.listener:
                self.listener("oom", error.free_bytes, size, stream)
            raise error
        return block

    def _out_of_memory(self, size: int, requested: int) -> OutOfMemory:
        pools = [pool for private in self._private.values() for pool in (private.small, private.large)]
        return OutOfMemory(
            requested_bytes=self.settings.segment_size(size),
            tensor_bytes=requested,
            allocated_bytes=self.allocated_bytes,
            reserved_bytes=self.reserved_bytes,
            private_pool_bytes=sum(block.size for pool in pools for block in pool.blocks()),
            total_bytes=self.total_bytes,
            free_bytes=self.mem_get_info()[0],
            process_bytes=self.context_bytes + self._device_bytes,
            allowed_bytes=self._allowed_bytes,
            expandable_segments=self.settings.expandable_segments,
        )

    def _hand_out(self, block: Block, size: int, requested: int) -> Block:
        """Split the unneeded end off a block that is in no pool, and mark it as allocated (alloc_found_block)."""
        pool, settings = block.pool, self.settings
        plain = not block.segment.page_bytes
        was_split = block.prev is not None or block.next is not None
        rest_size = block.size - size
        if rest_size >= MIN_BLOCK and (
            pool.is_small or settings.expandable_segments or (rest_size > SMALL_SIZE and size < settings.max_split_size)
        ):
            rest = block
            block = Block(rest.address, size, rest.stream, pool, rest.segment)
            link(rest.prev, block)
            rest.address += size
            rest.size = rest_size
            link(block, rest)
            pool.insert(rest)
            if plain:
                for stats in pool.stats:
                    if was_split:
                        stats.inactive_split_bytes.current -= size
                    else:
                        stats.inactive_split_bytes.increase(rest_size)
                        stats.inactive_split.increase(1)
        elif was_split and plain:
            for stats in pool.stats:
                stats.inactive_split_bytes.current -= block.size
                stats.inactive_split.current -= 1
        block.allocated = True
        block.requested = requested
        if self.listener:
            self.listener("alloc", block.address, requested, block.stream)
        for stats in pool.stats:
            stats.hand_out(block.size, requested)
        if block.size >= settings.max_split_size:
            self.stats.oversize_allocations.increase(1)
        return block

    def _recycle(self, block: Block) -> None:
        """Put a freed block into its pool, merged with its free neighbours (free_block in PyTorch)."""
        pool, size = block.pool, block.size
        if self.listener:
            self.listener("free_completed", block.address, block.requested, block.stream)
        merged_count = merged_bytes = 0
        for neighbour in (block.prev, block.next):
            if neighbour and (absorbed := merge(block, neighbour)):
                merged_count += 1
                merged_bytes += absorbed
        pool.insert(block)
        for stats in pool.stats:
            stats.active.current -= 1
            stats.active_bytes.current -= size
            stats.requested_bytes.current -= block.requested
        if not block.segment.page_bytes:
            is_split = block.prev is not None or block.next is not None
            if is_split or merged_count:
                for stats in pool.stats:
                    stats.inactive_split.change(is_split - merged_count)
                    stats.inactive_split_bytes.change(is_split * block.size - merged_bytes)

    # The device

    def _take(self, size: int) -> bool:
        """Take the bytes from the device; False if it has no room."""
        size = -(-size // DEVICE_PAGE) * DEVICE_PAGE
        if self._device_bytes + size > self.total_bytes - self.used_by_others - self.context_bytes:
            return False
        self._device_bytes += size
        return True

    def _address_range(self, size: int, page_bytes: int = 0) -> Segment:
        segment = Segment(self._next_address, size, page_bytes)
        self._next_address += -(-size // DEVICE_PAGE) * DEVICE_PAGE
        self._segments[segment.address] = segment
        return segment

    def _change_reserved(self, pool: BlockPool, amount: int) -> None:
        for stats in pool.stats:
            stats.reserved_bytes.change(amount)
        for stat in pool.reserved:
            stat.change(amount)

    def _allocate(self, pool: BlockPool, size: int, stream: int) -> Block | None:
        """Reserve new memory for a block in no pool; None if there is none (alloc_block in PyTorch)."""
        amount = self.settings.segment_size(size)
        if self._allowed_bytes is not None and self.reserved_bytes + amount > self._allowed_bytes:
            return None
        if self.settings.expandable_segments:
            return self._grow(pool, size, stream)
        if not self._take(amount):
            return None
        segment = self._address_range(amount)
        block = segment.head = Block(segment.address, amount, stream, pool, segment)
        self._change_reserved(pool, amount)
        for stats in pool.stats:
            stats.segment.increase(1)
        if amount >= self.settings.max_split_size:
            self.stats.oversize_segments.increase(1)
        self.stats.counts["num_device_alloc"] += 1
        if self.listener:
            self.listener("segment_alloc", block.address, amount, stream)
        return block

    def _grow(self, pool: BlockPool, size: int, stream: int) -> Block | None:
        """Map a block in no pool at the lowest address of an expandable segment with room for `size` bytes."""
        block = pool.find_room(size, stream) or self._new_room(pool, size, stream)
        if not block or (not block.mapped and not self._map(block, min(block.size, size))):
            return None
        while block.size < size:
            behind = block.next
            assert behind  # room was found there
            if not self._map(behind, min(size - block.size, behind.size)):
                return None
            block = behind  # merged with what was before it
        pool.remove(block)
        return block

    def _new_room(self, pool: BlockPool, size: int, stream: int) -> Block | None:
        """Make a new expandable segment and return its unmapped block; None if even that is too small."""
        page = SMALL_SEGMENT if pool.is_small else self.settings.large_segment_size
        # Address space for 9/8 of the device, so that pages unmapped in the middle can be mapped again at the end.
        space = -(-(self.total_bytes + self.total_bytes // 8) // page) * page
        if space < size:
            return None
        segment = self._address_range(space, page)
        segment.head = Block(segment.address, space, stream, pool, segment)
        segment.head.mapped = False
        pool.insert_unmapped(segment.head)
        return segment.head

    def _map(self, block: Block, size: int) -> bool:
        """Map pages for the first `size` bytes of an unmapped block, and put them into the pool (map_block)."""
        pool, page = block.pool, block.segment.page_bytes
        size = -(-size // page) * page
        if not self._take(size):
            return False
        pool.remove_unmapped(block)
        address = block.address
        if size < block.size:
            rest = cut(block, size)
            rest.mapped = False
            pool.insert_unmapped(rest)
        block.mapped = True
        for neighbour in (block.prev, block.next):
            if neighbour:
                merge(block, neighbour)
        pool.insert(block)
        self._change_reserved(pool, size)
        self.stats.counts["num_device_alloc"] += 1
        if self.listener:
            self.listener("segment_map", address, size, block.stream)
        return True

    # Giving memory back

    def _collect_garbage(self, allowed_bytes: int) -> None:
        """Release the least recently used of the cached whole segments when much is reserved."""
        threshold = int(self.settings.garbage_collection_threshold * allowed_bytes)
        target, reclaimed = self.reserved_bytes - threshold, 0
        if target <= 0:
            return
        pool = self._large
        whole = [block for block in pool.blocks() if block.is_whole]
        while whole and reclaimed < target:
            mean_age = sum(pool.searches - block.gc_base for block in whole) / len(whole)
            old = [block for block in whole if pool.searches - block.gc_base >= mean_age]
            # All of them, even beyond the target: PyTorch wants to collect seldom.
            for block in old:
                reclaimed += block.size
                whole.remove(block)
                self._release(block)

    def _release_available(self, pool: BlockPool, size: int, stream: int) -> bool:
        """Release just enough of the blocks that max_split_size kept whole; False if they do not suffice."""
        limit = self.settings.max_split_size
        if limit == UNLIMITED:
            return False
        target = max(size, limit)
        # PyTorch does not look whether they are whole: split ones of this size exist only if the limit was changed.
        whole = [block for _, _, block in pool.free[stream] if block.size >= limit and block.is_whole]
        large_enough = [block for block in whole if block.size >= target]
        if large_enough:
            self._release(large_enough[0])
            return True
        released = 0
        for block in reversed(whole):
            released += block.size
            self._release(block)
            if released >= target:
                return True
        return False

    def _release_cached(self) -> None:
        """Give every unused segment or page back; those of private pools only after the last user left."""
        if not self.capturing:
            self.stats.counts["num_sync_all_streams"] += 1
            self.synchronize()
            self.process_events()
            self._release_pool_blocks(self._large)
            self._release_pool_blocks(self._small)
        for pool_id, private in list(self._private.items()):
            if private.use_count == 0:
                self._release_pool_blocks(private.small)
                self._release_pool_blocks(private.large)
                if self.stats.private_reserved[pool_id][0].current == 0:
                    del self._private[pool_id]

    def _release_pool_blocks(self, pool: BlockPool) -> None:
        for block in pool.blocks():
            if block.segment.page_bytes:
                self._unmap(block)
            elif block.is_whole:
                self._release(block)

    def _release(self, block: Block) -> None:
        """Free a cached block that is a whole segment with cudaFree (release_block in PyTorch)."""
        self.stats.counts["num_device_free"] += 1
        if self.listener:
            self.listener("segment_free", block.address, block.size, block.stream)
        block.pool.remove(block)
        del self._segments[block.segment.address]
        self._device_bytes -= -(-block.size // DEVICE_PAGE) * DEVICE_PAGE
        self._change_reserved(block.pool, -block.size)
        for stats in block.pool.stats:
            stats.segment.current -= 1
        if block.size >= self.settings.max_split_size:
            self.stats.oversize_segments.current -= 1

    def _unmap(self, block: Block) -> None:
        """Give back the whole pages of a cached block of an expandable segment (unmap_block in PyTorch)."""
        pool, segment, page = block.pool, block.segment, block.segment.page_bytes
        begin = segment.address + -(-(block.address - segment.address) // page) * page
        end = segment.address + (block.address + block.size - segment.address) // page * page
        if begin >= end:
            return
        pool.remove(block)
        if end < block.address + block.size:
            pool.insert(cut(block, end - block.address))
        if begin > block.address:
            before, block = block, cut(block, begin - block.address)
            pool.insert(before)
        size = block.size
        block.mapped = False
        for neighbour in (block.prev, block.next):
            if neighbour:
                merge(block, neighbour)
        pool.insert_unmapped(block)
        self._device_bytes -= size
        self._change_reserved(pool, -size)
        self.stats.counts["num_device_free"] += 1
        if self.listener:
            self.listener("segment_unmap", begin, size, block.stream)
        if block.size == segment.size:
            pool.remove_unmapped(block)
            del self._segments[segment.address]

    # Figures

    def mem_get_info(self) -> tuple[int, int]:
        """Return (free, total) bytes, as torch.cuda.mem_get_info does."""
        free = self.total_bytes - self.used_by_others - self.context_bytes - self._device_bytes
        return max(free, 0), self.total_bytes

    def reset_peak_stats(self) -> None:
        """Reset all peaks to the present values."""
        self.stats.reset_peak()

    def reset_accumulated_stats(self) -> None:
        """Reset all sums and counts to 0."""
        self.stats.reset_accumulated()

    def memory_stats(self) -> dict[str, int]:
        """Return the flat dictionary of torch.cuda.memory_stats, sorted by key."""
        # PyTorch keeps the limit of the start, as a signed number: -1 for none.
        limit = self._max_split_size_at_start
        figures = self.stats.flat() | {"max_split_size": -1 if limit == UNLIMITED else limit}
        return dict(sorted(figures.items()))

    def segments(self, frames: Frames | None = None) -> list[SegmentRecord]:
        """Return the "segments" of torch.cuda.memory._snapshot(): one for each contiguous mapped range, by address.

        `frames` gives the stack of a block in use; without it stacks are empty.
        """
        # Addresses only grow, so the segments are in their order.
        return [record for segment in self._segments.values() for record in segment_records(segment, frames)]
