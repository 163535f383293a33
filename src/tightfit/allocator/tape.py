"""The requests that one run makes of its allocator, and their replay on a device of another size."""

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.allocator.caching import AllocatorSettings, Block, CachingAllocator, OutOfMemory, PoolId

Call = tuple[Any, ...]
"""A call of the allocator: its name and its arguments; blocks and pools go by their number."""


class TapedAllocator(CachingAllocator):
    """An allocator that keeps every call in `tape`, in its order."""

    def __init__(self, **facts: Any) -> None:
        self.tape: list[Call] = []
        self.was_asked = False
        """True once the program has read how much memory is free: it may decide by that."""
        self._numbers: dict[int, int] = {}
        self._pools: dict[PoolId | None, int | None] = {None: None}
        self._requests = 0
        self.elsewhere: dict[int, Mapping[Hashable, int]] = {}
        """Bytes of a request, by its number, on other cards where it is larger or smaller."""
        super().__init__(**facts)
        self._first_settings = self.settings

    @property
    def is_replayable(self) -> bool:
        """True if nothing but the size of the device could change this run's calls."""
        return not (self.was_asked or self.free_memory_callbacks or self.settings is not self._first_settings)

    def next_elsewhere(self, sizes: Mapping[Hashable, int]) -> None:
        """Note the bytes of the next request on other cards."""
        self.elsewhere[self._requests] = sizes

    def sizes_on(self, card: Hashable) -> dict[int, int]:
        """Return the bytes of the requests that are of another size on that card, by their number."""
        return {number: sizes[card] for number, sizes in self.elsewhere.items() if card in sizes}

    def tape_on(self, card: Hashable) -> list[Call]:
        """Return the calls that this run would make on another card that answered alike."""
        sizes = self.sizes_on(card)
        if not sizes:
            return self.tape
        calls, number = [], 0
        for call in self.tape:
            if call[0] == "malloc":
                call = ("malloc", sizes.get(number, call[1]), *call[2:])
                number += 1
            calls.append(call)
        return calls

    @property
    def capturing(self) -> bool:
        return self._capturing

    @capturing.setter
    def capturing(self, value: bool) -> None:
        self._capturing = value
        if self.tape:  # not the one of the constructor
            self.tape.append(("capturing", value))

    def malloc(self, size: int, *, stream: int = 0, pool: PoolId | None = None) -> Block:
        if size:
            self.tape.append(("malloc", size, stream, self._pools[pool]))
            self._requests += 1
        block = super().malloc(size, stream=stream, pool=pool)
        self._numbers[id(block)] = self._requests - 1
        return block

    def free(self, block: Block) -> None:
        if block.size:
            self.tape.append(("free", self._numbers.pop(id(block))))
        super().free(block)

    def record_stream(self, block: Block, stream: int) -> None:
        if block.size:
            self.tape.append(("record_stream", self._numbers[id(block)], stream))
        super().record_stream(block, stream)

    def finish(self, waited: int) -> None:
        self.tape.append(("finish", waited))
        super().finish(waited)

    def empty_cache(self) -> None:
        self.tape.append(("empty_cache",))
        super().empty_cache()

    def set_memory_fraction(self, fraction: float) -> None:
        self.tape.append(("set_memory_fraction", fraction))
        super().set_memory_fraction(fraction)

    def create_pool(self) -> PoolId:
        self.tape.append(("create_pool",))
        made = super().create_pool()
        self._pools[made] = len(self._pools) - 1
        return made

    def retain_pool(self, pool_id: PoolId) -> None:
        self.tape.append(("retain_pool", self._pools[pool_id]))
        super().retain_pool(pool_id)

    def release_pool(self, pool_id: PoolId) -> None:
        self.tape.append(("release_pool", self._pools[pool_id]))
        super().release_pool(pool_id)

    def mem_get_info(self) -> tuple[int, int]:
        self.was_asked = True
        return super().mem_get_info()

    def _out_of_memory(self, size: int, requested: int) -> OutOfMemory:
        asked = self.was_asked
        error = super()._out_of_memory(size, requested)
        self.was_asked = asked
        return error


def digest_of(tape: Sequence[Call]) -> str:
    """Return a digest by which two runs made the same calls."""
    return hashlib.sha256(repr(tape).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Replayed:
    """Outcome of a tape on another device."""

    peak_reserved_bytes: int
    peak_allocated_bytes: int
    failed_request: int | None = None
    """Number of the request, from 0, that the device could not meet."""
    error: OutOfMemory | None = None


def replay(
    tape: Sequence[Call], *, total_bytes: int, used_by_others: int, context_bytes: int, settings: AllocatorSettings
) -> Replayed:
    """Make the calls of `tape` on a device of another size, up to the first request that it cannot meet.

    The result is exact if the program itself does not look at the device's size.
    """
    allocator = CachingAllocator(
        total_bytes=total_bytes, used_by_others=used_by_others, context_bytes=context_bytes, settings=settings
    )
    blocks: list[Block] = []
    pools: list[PoolId] = []
    for name, *words in tape:
        if name == "malloc":
            size, stream, pool = words
            try:
                blocks.append(allocator.malloc(size, stream=stream, pool=None if pool is None else pools[pool]))
            except OutOfMemory as error:
                return Replayed(allocator.peak_reserved_bytes, allocator.peak_allocated_bytes, len(blocks), error)
        elif name in ("free", "record_stream"):
            getattr(allocator, name)(blocks[words[0]], *words[1:])
        elif name == "create_pool":
            pools.append(allocator.create_pool())
        elif name in ("retain_pool", "release_pool"):
            getattr(allocator, name)(pools[words[0]])
        elif name == "capturing":
            allocator.capturing = words[0]
        else:
            getattr(allocator, name)(*words)
    return Replayed(allocator.peak_reserved_bytes, allocator.peak_allocated_bytes)
