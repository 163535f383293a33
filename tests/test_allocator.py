"""The simulated caching allocator: each rule of CUDACachingAllocator.cpp worked by hand, then laws on random traces."""

import itertools
import random

import pytest

from tightfit.allocator.caching import AllocatorSettings, Block, CachingAllocator, OutOfMemory
from tightfit.allocator.settings import UNLIMITED
from tightfit.config.sizes import parse_bytes
from tightfit.errors import ConfigError
from tightfit.units import GIB, KIB, MIB


def make(total=24 * GIB, conf="", **kwargs) -> CachingAllocator:
    return CachingAllocator(total_bytes=total, settings=AllocatorSettings.parse(conf), **kwargs)


def listen(allocator: CachingAllocator) -> list[tuple[str, int]]:
    heard: list[tuple[str, int]] = []
    allocator.listener = lambda action, address, size, stream: heard.append((action, size))
    return heard


def check(allocator: CachingAllocator, live: list[Block]) -> None:
    """What must hold after every request, whatever came before."""
    segments = allocator.segments()
    blocks = [block for segment in segments for block in segment["blocks"]]
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == address, "blocks tile their segment without a gap"
            assert block["size"] > 0
            assert block["size"] % 512 == 0
            address += block["size"]
        assert address == segment["address"] + segment["total_size"]
        states = [block["state"] for block in segment["blocks"]]
        assert ("inactive", "inactive") not in list(itertools.pairwise(states)), "free neighbours are merged"
    assert sum(s["total_size"] for s in segments) == allocator.reserved_bytes
    assert sum(s["allocated_size"] for s in segments) == allocator.allocated_bytes == sum(b.size for b in live)
    assert sum(s["active_size"] for s in segments) == allocator.active_bytes
    assert sum(s["requested_size"] for s in segments) == allocator.requested_bytes
    assert allocator.requested_bytes <= allocator.active_bytes
    assert allocator.allocated_bytes <= allocator.active_bytes <= allocator.reserved_bytes
    capacity = allocator.total_bytes - allocator.used_by_others - allocator.context_bytes
    assert allocator.reserved_bytes <= capacity
    assert allocator.mem_get_info()[0] == capacity - allocator.reserved_bytes
    plain = [s for s in segments if not s["is_expandable"]]
    split = [b for s in plain if len(s["blocks"]) > 1 for b in s["blocks"] if b["state"] == "inactive"]
    assert allocator.inactive_split_bytes == sum(b["size"] for b in split)
    stats = allocator.memory_stats()
    assert stats["inactive_split.all.current"] == len(split)
    assert stats["segment.all.current"] == len(plain)
    assert stats["allocation.all.current"] == len(live)
    assert stats["active.all.current"] == sum(b["state"] != "inactive" for b in blocks)
    for key, value in stats.items():
        if key.endswith(".all.current"):
            name = key.removesuffix(".all.current")
            assert value == stats[f"{name}.small_pool.current"] + stats[f"{name}.large_pool.current"]
        if key.endswith(".current"):
            name = key.removesuffix(".current")
            assert value <= stats[f"{name}.peak"]
            assert value == stats[f"{name}.allocated"] - stats[f"{name}.freed"]


# How a request is rounded and what it reserves


@pytest.mark.parametrize(
    ("size", "block", "reserved"),
    [
        (1, 512, 2 * MIB),  # every block is a multiple of 512 bytes; small ones share segments of 2 MiB
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # 1 MiB is the largest small request
        (MIB + 1, MIB + 512, 20 * MIB),  # up to 10 MiB a segment of 20 MiB is taken, and split
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),  # from 10 MiB on: the next multiple of 2 MiB
        (11 * MIB, 12 * MIB, 12 * MIB),  # the last 1 MiB is not more than 1 MiB, so it stays with the block
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # here it is more: split off
    ],
)
def test_sizes(size, block, reserved):
    allocator = make()
    got = allocator.malloc(size)
    assert (got.size, got.requested, allocator.reserved_bytes) == (block, size, reserved)
    check(allocator, [got])


def test_a_request_of_nothing_is_a_null_block():
    allocator = make()
    block = allocator.malloc(0)
    assert (block.size, block.allocated, allocator.reserved_bytes) == (0, False, 0)
    allocator.record_stream(block, 3)
    allocator.free(block)
    check(allocator, [])


def test_freeing_twice_is_a_bug():
    allocator = make()
    block = allocator.malloc(1)
    allocator.free(block)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(block)


@pytest.mark.parametrize(
    ("divisions", "size", "rounded"),
    [
        ("4", 1200, 1536),  # not more than 4 * 512 bytes: plain rounding to 512
        ("4", 5000, 5120),  # 4096, 5120, 6144, 7168, 8192
        ("4", 8192, 8192),
        ("8", 9 * MIB + 1, 10 * MIB),  # steps of 1 MiB from 8 MiB
        ("1", 3 * MIB + 1, 3 * MIB + 512),  # one division: none
        # Below 256 MiB the first entry counts, above the last one `>`; what lies between two boundaries has none.
        ("[256:2,1024:4,>:1]", 5 * MIB, 6 * MIB),
        ("[256:2,1024:4,>:1]", 300 * MIB, 384 * MIB),
        ("[256:2,1024:4,>:1]", 513 * MIB + 1, 513 * MIB + 512),
        ("[256:2,1024:4,>:1]", 1100 * MIB, 1280 * MIB),
        ("[256:2,1024:4,>:1]", 2049 * MIB, 2049 * MIB),
        ("[256:0,512:2]", 5 * MIB + 1, 5 * MIB + 512),
        ("[65536:2]", 5 * MIB, 6 * MIB),  # 64 GiB shares the last interval, and covers all below
    ],
)
def test_roundup_power2_divisions(divisions, size, rounded):
    assert AllocatorSettings.parse(f"roundup_power2_divisions:{divisions}").round_size(size) == rounded


def test_large_segment_size():
    """25 MiB instead of 20; the driver's pages are of 2 MiB, so that the device loses 26."""
    allocator = make(conf="large_segment_size_mb:25")
    allocator.malloc(3 * MIB)
    assert allocator.reserved_bytes == 25 * MIB
    assert allocator.mem_get_info() == (24 * GIB - 26 * MIB, 24 * GIB)


# Which cached block serves


def test_small_requests_fill_one_segment():
    """2 MiB hold 4096 blocks of 512 bytes, at rising addresses; the next opens a second segment."""
    allocator = make()
    blocks = [allocator.malloc(512) for _ in range(4097)]
    assert [b.address - blocks[0].address for b in blocks[:4096]] == list(range(0, 2 * MIB, 512))
    assert allocator.reserved_bytes == 4 * MIB
    check(allocator, blocks)


def test_best_fit_then_lowest_address():
    """Of cached 30, 14, 12 and 14 MiB a request of 13 gets the first 14: the smallest that fits, the lower address."""
    allocator = make()
    blocks = [allocator.malloc(size * MIB) for size in (30, 14, 12, 14)]
    addresses = [block.address for block in blocks]
    for block in blocks:
        allocator.free(block)
    served = [allocator.malloc(13 * MIB) for _ in range(3)]
    assert [block.address for block in served] == [addresses[1], addresses[3], addresses[0]]
    assert [block.size for block in served] == [14 * MIB, 14 * MIB, 13 * MIB]  # 1 MiB is not split off, 17 are
    assert allocator.inactive_split_bytes == 17 * MIB


def test_streams_and_kinds_do_not_share():
    allocator = make()
    allocator.free(allocator.malloc(20 * MIB, stream=1))
    other = allocator.malloc(20 * MIB, stream=2)
    small = allocator.malloc(512, stream=1)
    assert allocator.reserved_bytes == 42 * MIB
    allocator.malloc(20 * MIB, stream=1)
    assert allocator.reserved_bytes == 42 * MIB
    assert [(s["stream"], s["segment_type"]) for s in allocator.segments()] == [
        (1, "large"), (2, "large"), (1, "small"),
    ]  # fmt: skip
    assert (other.stream, small.stream) == (2, 1)


def test_freed_neighbours_merge():
    """Three blocks of 4 MiB in a segment of 20: freed first, last, middle, they are one free block of 20 MiB again."""
    allocator = make()
    first, middle, last = (allocator.malloc(4 * MIB) for _ in range(3))
    assert allocator.inactive_split_bytes == 8 * MIB
    allocator.free(first)
    assert allocator.inactive_split_bytes == 12 * MIB
    assert allocator.memory_stats()["inactive_split.all.current"] == 2
    allocator.free(last)  # merges with the 8 MiB behind it
    assert allocator.inactive_split_bytes == 16 * MIB
    check(allocator, [middle])
    allocator.free(middle)
    assert allocator.inactive_split_bytes == 0
    assert [b["size"] for b in allocator.segments()[0]["blocks"]] == [20 * MIB]
    assert allocator.malloc(20 * MIB).size == 20 * MIB
    assert allocator.memory_stats()["num_device_alloc"] == 1


def test_max_split_size():
    """With a limit of 100 MiB: small requests leave large blocks alone; large ones take blocks up to 20 MiB larger."""
    allocator = make(conf="max_split_size_mb:100")
    big = allocator.malloc(200 * MIB)
    assert allocator.memory_stats()["oversize_segments.current"] == 1
    assert allocator.memory_stats()["oversize_allocations.current"] == 1
    allocator.free(big)
    small = allocator.malloc(50 * MIB)  # 200 would do, but is not split
    assert allocator.reserved_bytes == 250 * MIB
    assert allocator.malloc(180 * MIB).address != big.address  # 200 is not less than 180 + 20
    assert allocator.malloc(181 * MIB).address == big.address
    assert allocator.memory_stats()["oversize_allocations.current"] == 2
    assert allocator.memory_stats()["oversize_allocations.allocated"] == 3
    assert allocator.memory_stats()["max_split_size"] == 100 * MIB
    assert small.size == 50 * MIB
    wider = make(conf="max_split_size_mb:100,max_non_split_rounding_mb:40")
    block = wider.malloc(200 * MIB)
    wider.free(block)
    assert wider.malloc(165 * MIB).address == block.address


# When the device is full


def test_others_and_context_count():
    allocator = make(100 * MIB, used_by_others=30 * MIB, context_bytes=10 * MIB)
    assert allocator.mem_get_info() == (60 * MIB, 100 * MIB)
    allocator.malloc(60 * MIB)
    assert allocator.mem_get_info() == (0, 100 * MIB)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(1)
    error = caught.value
    assert (error.requested_bytes, error.tensor_bytes, error.process_bytes) == (2 * MIB, 1, 70 * MIB)
    assert str(error) == "no room for 2097152 bytes: 0 of 104857600 are free"
    allocator.used_by_others = 0
    assert allocator.malloc(1).size == 512


def test_cached_memory_is_returned_before_giving_up():
    """100 MiB: 40 + 40 are cached, 60 do not fit until both went back; a split segment cannot go."""
    allocator = make(100 * MIB)
    for block in [allocator.malloc(40 * MIB) for _ in range(2)]:
        allocator.free(block)
    heard = listen(allocator)
    block = allocator.malloc(60 * MIB)
    assert [action for action, _ in heard] == ["segment_free", "segment_free", "segment_alloc", "alloc"]
    stats = allocator.memory_stats()
    assert (stats["num_alloc_retries"], stats["num_ooms"], stats["num_device_free"]) == (1, 0, 2)
    assert stats["num_sync_all_streams"] == 1
    allocator.free(block)
    kept = allocator.malloc(10 * MIB)  # splits the 60
    heard.clear()
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(55 * MIB)
    assert heard == [("oom", 55 * MIB)]  # the size of the block that was wanted
    assert caught.value.requested_bytes == 56 * MIB
    assert caught.value.free_bytes == 40 * MIB
    assert (caught.value.allocated_bytes, caught.value.reserved_bytes) == (10 * MIB, 60 * MIB)
    assert allocator.memory_stats()["num_ooms"] == 1
    check(allocator, [kept])


def test_only_enough_oversize_blocks_are_returned_first():
    """With a limit of 20 MiB, 30 of cached 30 + 40 + 26 go for a request of 28, without a flush of everything."""
    allocator = make(100 * MIB, "max_split_size_mb:20")
    for block in [allocator.malloc(size * MIB) for size in (30, 40, 26)]:
        allocator.free(block)
    allocator.malloc(52 * MIB)  # none alone is enough: 40, then 30, the largest first
    assert allocator.reserved_bytes == (26 + 52) * MIB
    assert allocator.memory_stats()["num_alloc_retries"] == 0
    assert allocator.memory_stats()["num_device_free"] == 2
    other = make(100 * MIB, "max_split_size_mb:20")
    for block in [other.malloc(size * MIB) for size in (60, 36)]:
        other.free(block)
    assert other.malloc(16 * MIB).size == 16 * MIB  # not from the 36, which are too large to be split
    assert other.reserved_bytes == (60 + 16) * MIB  # the smallest of at least 20 MiB went
    assert other.memory_stats()["num_alloc_retries"] == 0


def test_callbacks_are_asked_first():
    allocator = make(100 * MIB)
    held = [allocator.malloc(60 * MIB)]
    asked = []

    def give_up() -> bool:
        asked.append(True)
        if held:
            allocator.free(held.pop())
            return True
        return False

    allocator.free_memory_callbacks.append(give_up)
    assert allocator.malloc(60 * MIB).size == 60 * MIB
    assert allocator.memory_stats()["num_device_alloc"] == 1
    with pytest.raises(OutOfMemory):
        allocator.malloc(60 * MIB)
    assert len(asked) == 2


def test_memory_fraction():
    """Half of 100 MiB: what is asked of the device counts, so 31 MiB (32) do not fit beside 20."""
    allocator = make(100 * MIB)
    allocator.set_memory_fraction(0.5)
    allocator.malloc(2 * MIB)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(31 * MIB)
    assert caught.value.allowed_bytes == 50 * MIB
    assert caught.value.free_bytes == 80 * MIB
    assert " in use. 50.00 MiB allowed; Of the allocated memory 2.00 MiB is allocated" in caught.value.message((2, 13))
    assert allocator.malloc(30 * MIB).size == 30 * MIB
    assert allocator.memory_fraction == 0.5
    allocator.set_memory_fraction(1)
    assert allocator.memory_fraction == 1
    assert allocator.malloc(31 * MIB).size == 32 * MIB
    with pytest.raises(ConfigError, match=r"^a memory fraction must be from 0 to 1, got 1.5$"):
        allocator.set_memory_fraction(1.5)
    assert make(100, "per_process_memory_fraction:0.125").memory_fraction == 0.13  # 12.5 bytes, as std::round rounds


@pytest.mark.parametrize(("c_mib", "freed_mib"), [(150, [200]), (200, [200, 200])])
def test_garbage_collection(c_mib, freed_mib):
    """1000 MiB are allowed, above 600 old whole segments go: A and B of 200 MiB are cached, A for longer.

    D of 210 comes when at most 600 are reserved: nothing goes. E of 230 finds 760 (810): 160 (210) are to be reclaimed.
    Since they came back the pool was searched twice for A, once for B; A is above the mean of 1.5 and goes. If its 200
    are not enough, B, alone now and so as old as the mean, follows.
    """
    allocator = make(10_000 * MIB, "garbage_collection_threshold:0.6")
    allocator.set_memory_fraction(0.1)
    a, b, _ = (allocator.malloc(size * MIB) for size in (200, 200, c_mib))
    allocator.free(a)
    heard = listen(allocator)
    allocator.malloc(210 * MIB)
    assert [size for action, size in heard if action == "segment_free"] == []
    allocator.free(b)
    allocator.malloc(230 * MIB)
    assert [size for action, size in heard if action == "segment_free"] == [size * MIB for size in freed_mib]
    assert allocator.reserved_bytes == (400 + c_mib + 210 + 230 - sum(freed_mib)) * MIB
    assert allocator.memory_stats()["num_sync_all_streams"] == 0


# Expandable segments


def test_expandable_segments_grow_by_pages():
    """Large requests map pages of 20 MiB, small ones of 2 MiB, one behind the other: 30 + 25 MiB take 3, not 4."""
    allocator = make(conf="expandable_segments:True")
    heard = listen(allocator)
    first = allocator.malloc(30 * MIB)
    second = allocator.malloc(25 * MIB)
    assert second.address == first.address + 30 * MIB
    assert [h for h in heard if h[0] == "segment_map"] == [("segment_map", 40 * MIB), ("segment_map", 20 * MIB)]
    small = allocator.malloc(100)
    assert allocator.reserved_bytes == 62 * MIB
    record = allocator.segments()[0]
    assert (record["is_expandable"], record["total_size"]) == (True, 60 * MIB)
    assert [(b["size"], b["state"]) for b in record["blocks"]] == [
        (30 * MIB, "active_allocated"), (25 * MIB, "active_allocated"), (5 * MIB, "inactive"),
    ]  # fmt: skip
    assert allocator.inactive_split_bytes == 0  # not counted for expandable segments
    check(allocator, [first, second, small])


def test_expandable_segments_give_whole_pages_back():
    """30 of 30 + 25 MiB are freed: one page of 20 lies wholly in them; it goes, and is the first to be mapped again."""
    allocator = make(conf="expandable_segments:True")
    first, second = allocator.malloc(30 * MIB), allocator.malloc(25 * MIB)
    address = first.address
    allocator.free(first)
    heard = listen(allocator)
    allocator.empty_cache()
    assert heard == [("segment_unmap", 20 * MIB)]
    assert allocator.reserved_bytes == 40 * MIB
    assert [s["total_size"] for s in allocator.segments()] == [40 * MIB]
    check(allocator, [second])
    again = allocator.malloc(28 * MIB)
    assert again.address == address
    check(allocator, [second, again])
    allocator.free(second)
    allocator.free(again)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments()) == (0, [])


def test_expandable_segments_join_what_plain_ones_cannot():
    """50 MiB after 20 + 30 were freed: one stretch of an expandable segment, but two plain ones, which have to go."""
    allocator = make(80 * MIB, "expandable_segments:True")
    pieces = [allocator.malloc(size * MIB) for size in (20, 30, 2)]
    address = pieces[0].address
    for piece in pieces[:2]:
        allocator.free(piece)
    joined = allocator.malloc(50 * MIB)
    assert joined.address == address
    assert allocator.memory_stats()["num_device_alloc"] == 2  # 20, then 40 MiB with room for the 2
    check(allocator, [pieces[2], joined])
    plain = make(80 * MIB)
    for piece in [plain.malloc(size * MIB) for size in (20, 30)]:
        plain.free(piece)
    plain.malloc(50 * MIB)
    assert plain.memory_stats()["num_alloc_retries"] == 1


def test_expandable_best_fit_counts_the_room_behind():
    """Free are 20 MiB at the start and 10 at the end: 8 go to the start, as the end can grow to all that is left."""
    allocator = make(conf="expandable_segments:True")
    start, _, end = (allocator.malloc(size * MIB) for size in (20, 38, 12))  # four pages: 10 MiB remain at the end
    address = start.address
    allocator.free(start)
    assert allocator.malloc(8 * MIB).address == address
    allocator.free(end)
    assert allocator.malloc(11 * MIB).address == address + 8 * MIB


def test_expandable_segments_out_of_memory():
    """50 MiB hold two pages of 20 MiB; a third does not fit, although 2 MiB of it would do."""
    allocator = make(50 * MIB, "expandable_segments:True")
    first = allocator.malloc(25 * MIB)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(17 * MIB)
    assert caught.value.requested_bytes == 18 * MIB
    assert caught.value.reserved_bytes == 40 * MIB
    check(allocator, [first])
    with pytest.raises(OutOfMemory):
        allocator.malloc(70 * MIB)  # more than 9/8 of the device: no segment can ever hold it
    assert allocator.malloc(15 * MIB).address == first.address + 25 * MIB


def test_expandable_segments_may_be_switched_off_and_on():
    """Blocks of expandable segments serve only while the setting is on."""
    allocator = make(conf="expandable_segments:True")
    block = allocator.malloc(20 * MIB)
    allocator.free(block)
    allocator.settings = AllocatorSettings()
    plain = allocator.malloc(20 * MIB)
    assert plain.address != block.address
    allocator.settings = AllocatorSettings(expandable_segments=True)
    assert allocator.malloc(20 * MIB).address == block.address


# Streams, captures and private pools


def test_record_stream_delays_reuse():
    """A block that stream 7 uses stays active after its release until the device is synchronized."""
    allocator = make()
    heard = listen(allocator)
    block = allocator.malloc(20 * MIB)
    allocator.record_stream(block, 0)  # its own stream: no effect
    allocator.record_stream(block, 7)
    allocator.free(block)
    assert heard[-1] == ("free_requested", 20 * MIB)
    assert (allocator.allocated_bytes, allocator.active_bytes) == (0, 20 * MIB)
    assert allocator.segments()[0]["blocks"][0]["state"] == "active_pending_free"
    check(allocator, [])
    second = allocator.malloc(20 * MIB)
    assert second.address != block.address
    allocator.synchronize()
    assert allocator.malloc(20 * MIB).address == block.address  # taken back at this request
    assert heard[-2:] == [("free_completed", 20 * MIB), ("alloc", 20 * MIB)]


def test_an_event_brings_back_what_was_freed_before_it():
    allocator = make()
    blocks = [allocator.malloc(20 * MIB) for _ in range(3)]
    for block in blocks:
        allocator.record_stream(block, 7)
    allocator.free(blocks[0])
    event = allocator.waited
    allocator.free(blocks[1])
    allocator.finish(event)
    assert allocator.malloc(20 * MIB).address == blocks[0].address
    assert allocator.malloc(20 * MIB).address != blocks[1].address
    allocator.finish(event)
    assert blocks[1].pending
    allocator.synchronize()
    assert allocator.malloc(20 * MIB).address == blocks[1].address


def test_the_last_resort_waits_for_streams():
    allocator = make(30 * MIB)
    block = allocator.malloc(20 * MIB)
    allocator.record_stream(block, 7)
    allocator.free(block)
    assert allocator.malloc(20 * MIB).size == 20 * MIB
    assert allocator.memory_stats()["num_alloc_retries"] == 1


def test_private_pools_keep_their_memory():
    """What a pool reserved serves nobody else until its last user is gone; then it goes back when memory is short."""
    allocator = make(100 * MIB)
    pool = allocator.create_pool()
    allocator.retain_pool(pool)
    block = allocator.malloc(60 * MIB, pool=pool)
    small = allocator.malloc(512, pool=pool)
    assert [s["segment_pool_id"] for s in allocator.segments()] == [pool, pool] == [(0, 1), (0, 1)]
    allocator.free(block)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(50 * MIB)
    # The 60 MiB and the rest of the small segment: PyTorch counts what is cached in private pools as allocated.
    assert caught.value.private_pool_bytes == 62 * MIB - 512
    assert (
        "Of the allocated memory 62.00 MiB is allocated by PyTorch, with 62.00 MiB allocated in private pools "
        "(e.g., CUDA Graphs), and 0 bytes is reserved by PyTorch but unallocated."
    ) in caught.value.message((2, 13))
    assert allocator.malloc(60 * MIB, pool=pool).address == block.address
    allocator.release_pool(pool)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 62 * MIB
    stats = allocator.memory_stats()
    assert stats["reserved_bytes_by_private_pools.0_1.all.current"] == 62 * MIB
    assert stats["reserved_bytes_by_private_pools.0_1.small_pool.current"] == 2 * MIB
    allocator.free(small)
    allocator.release_pool(pool)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 60 * MIB
    assert allocator.create_pool() == (0, 2)


def test_a_capture_gives_nothing_back():
    allocator = make(100 * MIB)
    waiting = allocator.malloc(20 * MIB)
    allocator.free(allocator.malloc(60 * MIB))
    allocator.record_stream(waiting, 7)
    pool = allocator.create_pool()
    allocator.capturing = True
    allocator.free(waiting)
    allocator.synchronize()
    with pytest.raises(OutOfMemory):
        allocator.malloc(40 * MIB, pool=pool)
    assert allocator.active_bytes == 20 * MIB
    assert allocator.memory_stats()["num_alloc_retries"] == 0
    allocator.capturing = False
    assert allocator.malloc(40 * MIB, pool=pool).size == 40 * MIB


# The figures


def test_memory_stats_has_pytorchs_keys():
    """Nine figures of three kinds with four fields each, two more with four fields, and seven plain numbers."""
    stats = make().memory_stats()
    assert len(stats) == 9 * 3 * 4 + 2 * 4 + 7
    assert list(stats) == sorted(stats)
    assert stats["max_split_size"] == -1  # the largest size_t as a signed number
    for key in (
        "allocation.all.current", "allocated_bytes.small_pool.peak", "requested_bytes.large_pool.freed",
        "segment.all.peak", "inactive_split_bytes.all.allocated", "oversize_allocations.current", "num_ooms",
        "oversize_segments.freed", "num_sync_all_streams", "num_device_alloc", "num_oom_rejections",
    ):  # fmt: skip
        assert stats[key] == 0


def test_peaks_and_sums_are_reset():
    allocator = make()
    first, second = allocator.malloc(1000), allocator.malloc(30 * MIB)
    allocator.free(second)
    assert allocator.peak_allocated_bytes == 30 * MIB + 1024
    assert allocator.peak_requested_bytes == 30 * MIB + 1000
    assert allocator.peak_active_bytes == 30 * MIB + 1024
    assert allocator.peak_inactive_split_bytes == 2 * MIB - 1024
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (2 * MIB, 32 * MIB)
    allocator.reset_peak_stats()
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (1024, 2 * MIB)
    assert allocator.memory_stats()["allocated_bytes.all.allocated"] == 30 * MIB + 1024
    assert allocator.memory_stats()["allocated_bytes.all.freed"] == 30 * MIB
    allocator.reset_accumulated_stats()
    allocator.free(first)
    stats = allocator.memory_stats()
    assert (stats["allocated_bytes.all.allocated"], stats["allocated_bytes.all.freed"]) == (0, 1024)
    assert (stats["num_device_alloc"], stats["num_sync_all_streams"]) == (0, 0)


def test_segments_look_like_a_snapshot():
    allocator = make()
    block = allocator.malloc(700, stream=5)
    block.tag = "train.py:12"
    assert allocator.segments(frames=lambda b: [{"filename": b.tag}]) == [
        {
            "device": 0,
            "address": block.address,
            "total_size": 2 * MIB,
            "allocated_size": 1024,
            "active_size": 1024,
            "requested_size": 700,
            "stream": 5,
            "segment_type": "small",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": [],
            "blocks": [
                {
                    "address": block.address,
                    "size": 1024,
                    "requested_size": 700,
                    "state": "active_allocated",
                    "frames": [{"filename": "train.py:12"}],
                },
                {
                    "address": block.address + 1024,
                    "size": 2 * MIB - 1024,
                    "requested_size": 0,
                    "state": "inactive",
                    "frames": [],
                },
            ],
        }
    ]
    assert allocator.segments()[0]["blocks"][0]["frames"] == []


def test_the_listener_hears_what_traces_record():
    allocator = make()
    heard = []
    allocator.listener = lambda *event: heard.append(event)
    block = allocator.malloc(700, stream=5)
    allocator.free(block)
    allocator.empty_cache()
    address = block.address
    assert heard == [
        ("segment_alloc", address, 2 * MIB, 5),
        ("alloc", address, 700, 5),
        ("free_requested", address, 700, 5),
        ("free_completed", address, 700, 5),
        ("segment_free", address, 2 * MIB, 5),
    ]


# The message

STORY = (
    "CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity of 11.69 GiB of which 2.68 GiB is free."
    " Including non-PyTorch memory, this process has 7.04 GiB memory in use. Of the allocated memory 6.78 GiB is"
    " allocated by PyTorch, and 224.90 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory"
    " is large try setting "
)
ADVICE = {
    (2, 8): "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory "
    "Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)",
    (2, 10): "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory "
    "Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)",
    (2, 13): "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory "
    "Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html"
    "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)",
}


def story() -> OutOfMemory:
    """nanoGPT on an RTX 3060: the second evaluation's logits, while those of the first are still there.

    Logits are (64 * 1024, 50304) bfloat16: 6.14 GiB. Beside them 0.64 GiB are allocated, in a segment of which the last
    224.90 MiB are cached but cannot go back.
    """
    allocator = make(parse_bytes("11.69GiB"), used_by_others=parse_bytes("1.97GiB"), context_bytes=40 * MIB)
    logits_bytes = 64 * 1024 * 50304 * 2
    cached_bytes = parse_bytes("224.90MiB") // 512 * 512
    weights_bytes = 880 * MIB - cached_bytes
    allocator.malloc(logits_bytes)
    allocator.free(allocator.malloc(880 * MIB))
    allocator.malloc(weights_bytes)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(logits_bytes)
    return caught.value


@pytest.mark.parametrize("version", [(2, 8), (2, 10), (2, 13)])
def test_message(version):
    assert story().message(version) == STORY + ADVICE[version]


def test_message_of_neighbouring_versions():
    error = story()
    assert error.message((2, 9)) == error.message((2, 10))
    assert error.message((2, 11)) == error.message((2, 13))
    assert error.message((2, 4)) == error.message((2, 8))


def test_message_with_expandable_segments():
    """From 2.14 on the advice is left out when it is followed already."""
    allocator = make(100 * MIB, "expandable_segments:True")
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(100 * MIB + 1)
    assert caught.value.message((2, 13)).endswith("-alloc-conf)")
    assert caught.value.message((2, 14)).endswith("and 0 bytes is reserved by PyTorch but unallocated.")


def test_message_prints_exact_powers_in_the_smaller_unit():
    """c10's format_size uses <=: a request of exactly 1 GiB is one of 1024.00 MiB."""
    allocator = make(GIB)
    allocator.malloc(512)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(GIB)
    assert caught.value.message((2, 13)).startswith(
        "CUDA out of memory. Tried to allocate 1024.00 MiB. GPU 0 has a total capacity of 1024.00 MiB of which 1022.00"
    )
    error = story()
    error.requested_bytes, error.free_bytes, error.process_bytes = KIB, MIB, KIB + 1
    assert "allocate 1024 bytes. GPU" in error.message((2, 13))
    assert "of which 1024.00 KiB is free" in error.message((2, 13))
    assert "process has 1.00 KiB memory" in error.message((2, 13))


def test_message_beyond_an_exbibyte():
    allocator = make()
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(2**60)
    assert caught.value.message((2, 13)) == "CUDA out of memory. Tried to allocate more than 1EB memory."


# Settings


def test_settings_are_read():
    settings = AllocatorSettings.parse(
        " max_split_size_mb : 128, garbage_collection_threshold:0.8,expandable_segments:True,"
        "pinned_use_background_threads:True,release_lock_on_cudamalloc:False,backend:native,"
    )
    assert settings == AllocatorSettings(
        max_split_size=128 * MIB, garbage_collection_threshold=0.8, expandable_segments=True
    )
    assert settings.ignored == ("pinned_use_background_threads:True", "release_lock_on_cudamalloc:False")
    assert AllocatorSettings.parse("") == AllocatorSettings()
    assert AllocatorSettings.parse("max_split_size_mb:-1").max_split_size == UNLIMITED  # as std::stoull wraps
    assert AllocatorSettings.parse("max_split_size_mb:30,max_split_size_mb:40").max_split_size == 40 * MIB


def test_the_environment_is_read_in_pytorchs_order():
    old, new = "expandable_segments:True", "max_split_size_mb:64"
    both = {"PYTORCH_ALLOC_CONF": new, "PYTORCH_CUDA_ALLOC_CONF": old}
    assert AllocatorSettings.from_environment(both) == AllocatorSettings(expandable_segments=True)
    assert AllocatorSettings.from_environment({"PYTORCH_ALLOC_CONF": new}) == AllocatorSettings(max_split_size=64 * MIB)
    assert AllocatorSettings.from_environment({}) == AllocatorSettings()
    with pytest.raises(
        ConfigError, match=r"^PYTORCH_ALLOC_CONF: expandable_segments must be True or False, got 'yes'$"
    ):
        AllocatorSettings.from_environment({"PYTORCH_ALLOC_CONF": "expandable_segments:yes"})


BAD = {
    "max_split_size_mb:10": "max_split_size_mb must be 20 or more, got 10",
    "large_segment_size_mb:32,max_split_size_mb:20": "max_split_size_mb must be 32 or more, got 20",
    "max_split_size_mb:many": "max_split_size_mb must be a whole number of MiB, got 'many'",
    "max_non_split_rounding_mb:19": "max_non_split_rounding_mb must be 20 or more, got 19",
    "large_segment_size_mb:10": "large_segment_size_mb must be more than 10, got 10",
    "garbage_collection_threshold:1.0": "garbage_collection_threshold must be a number above 0 and below 1, got '1.0'",
    "garbage_collection_threshold:0": "garbage_collection_threshold must be a number above 0 and below 1, got '0'",
    "roundup_power2_divisions:3": "roundup_power2_divisions must be a power of two, or a list like "
    "[256:1,512:2,>:4] of powers of two, got '3'",
    "roundup_power2_divisions:[3:2]": "roundup_power2_divisions must be a power of two, or a list like "
    "[256:1,512:2,>:4] of powers of two, got '[3:2]'",
    "expandable_segments:true": "expandable_segments must be True or False, got 'true'",
    "max_split_size_mb": "cannot read 'max_split_size_mb'; write key:value pairs with commas between them",
}
BAD_FOR_CUDA = {
    "per_process_memory_fraction:1.5": "per_process_memory_fraction must be from 0 to 1, got 1.5",
    "backend:cudaMallocAsync": "backend:cudaMallocAsync leaves memory to the driver, which the virtual GPU cannot "
    "follow; use backend:native or remove the key",
    "backend:other": "backend must be native, got 'other'",
    "expandable_segments:True,large_segment_size_mb:25": "large_segment_size_mb must be even when expandable_segments "
    "is True, got 25",
    "throw_on_cudamalloc_oom:True": "throw_on_cudamalloc_oom must be False here, got 'True': the virtual GPU does not "
    "follow PyTorch's early rejection; remove the key",
    "max_split:1": "'max_split' with value '1' is not a key of PyTorch; known: backend, expandable_segments, "
    "garbage_collection_threshold, large_segment_size_mb, max_non_split_rounding_mb, max_split_size_mb, "
    "per_process_memory_fraction, roundup_power2_divisions",
}


@pytest.mark.parametrize(("text", "reason"), [*BAD.items(), *BAD_FOR_CUDA.items()])
def test_bad_settings(text, reason):
    with pytest.raises(ConfigError) as caught:
        AllocatorSettings.parse(text)
    assert str(caught.value) == f"PYTORCH_CUDA_ALLOC_CONF: {reason}"


def test_settings_made_in_python_are_checked():
    with pytest.raises(ConfigError, match=r"^roundup_power2_divisions must be 16 numbers or none, got \(2, 4\)$"):
        AllocatorSettings(roundup_power2_divisions=(2, 4))
    with pytest.raises(
        ConfigError, match=r"^roundup_power2_divisions must be powers of two, or 0 for none, got \[3\]$"
    ):
        AllocatorSettings(roundup_power2_divisions=(3,) + (1,) * 15)


def test_pytorch_itself_agrees_on_what_is_bad():
    """torch reads these keys without a GPU too: what it refuses is refused here, what it takes is taken."""
    import torch

    read = torch._C._accelerator_setAllocatorSettings
    try:
        for text in BAD:
            with pytest.raises((ValueError, RuntimeError)):
                read(text)
        for text in (
            "max_split_size_mb:20", "max_split_size_mb:-1", "max_split_size_mb:64,", "large_segment_size_mb:11",
            "roundup_power2_divisions:[256:1,512:2,1024:0,>:8]", "garbage_collection_threshold:0.01",
            "max_non_split_rounding_mb:20", " expandable_segments : False ",
        ):  # fmt: skip
            read("large_segment_size_mb:20")
            read(text)
            AllocatorSettings.parse(text)
    finally:
        read("large_segment_size_mb:20,expandable_segments:False")


# Laws

CONFS = [
    "",
    "expandable_segments:True",
    "max_split_size_mb:32",
    "roundup_power2_divisions:[1:4,4:8,>:2]",
    "garbage_collection_threshold:0.5,per_process_memory_fraction:0.75",
    "expandable_segments:True,large_segment_size_mb:12",
    "large_segment_size_mb:32,max_non_split_rounding_mb:64,max_split_size_mb:40",
]
SIZES = [1, 512, 4000, 70_000, 900_000, MIB, 3 * MIB, 9_999_999, 11 * MIB, 33 * MIB, 50_000_000, 100 * MIB]


def run_trace(allocator: CachingAllocator, seed: int, *, steps: int = 150, checked: bool = False) -> list[Block] | None:
    """Random requests and releases on three streams and a private pool; None if the allocator runs out of memory."""
    rng = random.Random(seed)
    pools = [None, None, None, allocator.create_pool()]
    live: list[Block] = []
    out_of_memory = False
    peak = 0
    for step in range(steps):
        choice = rng.random()
        size = rng.randrange(1, 2 * rng.choice(SIZES))
        stream, pool, index = rng.choice((0, 0, 0, 1, 2)), rng.choice(pools), rng.random()
        if choice < 0.55 or not live:
            try:
                live.append(allocator.malloc(size, stream=stream, pool=pool))
            except OutOfMemory:
                out_of_memory = True
                if not checked:
                    return None
        elif choice < 0.9:
            block = live.pop(int(index * len(live)))
            if choice < 0.6:
                allocator.record_stream(block, 9)
            allocator.free(block)
        elif choice < 0.95:
            allocator.synchronize()
        elif choice < 0.96:
            allocator.empty_cache()
        if checked and (step % 20 == 19 or step == steps - 1):
            check(allocator, live)
            assert peak <= allocator.peak_reserved_bytes
            peak = allocator.peak_reserved_bytes
            assert peak >= allocator.reserved_bytes
    if checked:
        for block in live:
            allocator.free(block)
        allocator.release_pool(pools[-1])
        allocator.empty_cache()
        assert (allocator.reserved_bytes, allocator.active_bytes, allocator.segments()) == (0, 0, [])
        check(allocator, [])
    return None if out_of_memory else live


@pytest.mark.parametrize("seeds", [range(30), pytest.param(range(30, 143), marks=pytest.mark.slow)])
@pytest.mark.parametrize("conf", CONFS)
def test_invariants_on_random_traces(conf, seeds):
    """1,001 traces in all, on devices from 120 MiB, where nearly all runs out, to 8 GiB."""
    for seed in seeds:
        total = random.Random(seed).choice((120, 300, 700, 8000)) * MIB
        run_trace(make(total, conf, used_by_others=6 * MIB, context_bytes=14 * MIB), seed, checked=True)


@pytest.mark.parametrize("conf", CONFS[:4])
def test_what_fits_fits_every_larger_device(conf):
    """A trace never asks the device for more than its peak on an endless one, and there goes exactly the same way."""
    for seed in range(40):
        endless = make(1000 * GIB, conf)
        run_trace(endless, seed)
        for extra in (0, 2 * MIB, GIB):
            device = make(endless.peak_reserved_bytes + extra, conf)
            assert run_trace(device, seed) is not None
            assert device.memory_stats() == endless.memory_stats()


@pytest.mark.parametrize("conf", CONFS[:4])
def test_what_fits_after_a_flush_fits_a_larger_device(conf):
    """Best fit gives no guarantee once the cache was flushed on the smaller device; these traces hold all the same."""
    fitted = 0
    for seed in range(40):
        fits = [run_trace(make(size * MIB, conf), seed) is not None for size in (600, 800, 1000, 1500, 3000, 8000)]
        assert fits == sorted(fits), f"seed {seed} fits a device but not a larger one"
        fitted += any(fits[:-1])
    assert fitted > 10
