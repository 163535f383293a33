"""Causes and fixes by the message's own figures: others' memory, the cache, limits. Decisive ones come first."""

from collections.abc import Iterator

from tightfit.diagnosis.cause_records import (
    LIKELY,
    MEASURED,
    Cache,
    Cause,
    Limit,
    MoreFree,
    OtherProcesses,
    OutsidePyTorch,
    OwnProcess,
    OwnRanks,
    PrivatePools,
    RanksInRow,
    Request,
    Spilled,
)
from tightfit.diagnosis.remedies import UNCHECKED, Figures, Remedy, to_paste
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.ownership import had_room, ownership, room_beside_own, shares_host
from tightfit.units import GIB

_LARGE_CACHE, _MOST_OF_CARD, _TIMES = 0.05, 0.4, 2.5
"""Share of the card above which the cache's fragments are taken for the cause if they are that many times the request,
and the share above which they are in any case. Where they are about the size of the request, it was mostly cured by
less in one pass."""
_LEAST_CACHE = 2**28
"""Bytes of pieces that any run on a small card has."""
_SMALL_REST = 2**29
"""Bytes up to which what is neither free nor allocated is no more than a CUDA context."""
DECISIVE = frozenset(
    {
        *("larger_than_card", "spills_to_host", "limit_decides", "own_ranks_decide", "others_decide", "ranks_in_row"),
        *(
            "host_shares_memory",
            "others_estimated_decide",
            "cache_decides",
            "block_limit",
            "room_beside_own",
            "outside_decides",
        ),
    }
)
"""Codes of causes that come before any tensor: without them the request would have fit, or no fix of a batch helps."""


_OTHERS = {
    False: {"decide": "others_decide", "too": "others_too", "open": "others_open"},
    True: {
        "decide": "others_estimated_decide",
        "too": "others_estimated_too",
        "open": "others_estimated_open",
    },
}
"""Codes of other programs' memory: as printed, or less a context of unknown size."""


def causes_of_figures(facts: Facts) -> Iterator[Cause]:
    """Yield the causes that the message's figures show, those of `DECISIVE` first."""
    rest = (*_of_others(facts), *_of_cache(facts)) if not is_oversized(facts) else _of_many_others(facts)
    found = [*_of_card(facts), *rest, *_of_own(facts)]
    yield from sorted(found, key=lambda cause: cause.code not in DECISIVE)


_MUCH_OF_CARD = 0.25
"""Least share of the card that others hold, if they matter beside a request larger than the card."""


def _of_many_others(facts: Facts) -> Iterator[Cause]:
    """Yield other programs' memory if it is much of a card that is too small without it, too."""
    others, total = ownership(facts).others, facts.total_bytes or 0
    if others is not None and others.low >= _MUCH_OF_CARD * total:
        yield from _of_others(facts)


def is_oversized(facts: Facts) -> bool:
    """Return True if the request alone is larger than the card."""
    requested, total = facts.figures.get("requested_bytes"), facts.figures.get("total_bytes")
    return requested is not None and requested.low > (_LARGEST_CARD if total is None else total.high)


def holds_little(facts: Facts) -> bool:
    """Return True if PyTorch's cache is most of what the process holds: what grows from outside is the cache."""
    held, reserved = facts.allocated_bytes, facts.reserved_bytes
    return held is not None and reserved is not None and held < reserved / 2


def is_most_of_card(facts: Facts) -> bool:
    """Return True if the request alone is most of the card."""
    requested, total = facts.figures.get("requested_bytes"), facts.total_bytes
    return requested is not None and total is not None and _MOST * total < requested.bytes and not is_oversized(facts)


_MOST = 0.6
"""Share of the card above which one request is most of it, whatever it is for."""
_LARGEST_CARD = 512 * GIB
"""Bytes that no card has: a larger request is larger than the user's card, too, where the message does not name it."""


_XPU_BLOCK = 4 * GIB
"""Bytes of one allocation above which Intel's runtime refuses it by default, however much is free."""


def is_of_one_block(facts: Facts) -> bool:
    """Return True if an Intel GPU had room for a request that is larger than its runtime allows for one allocation."""
    requested, total = facts.figures.get("requested_bytes"), facts.total_bytes
    if facts.kind != "xpu_out_of_memory" or requested is None or total is None:
        return False
    held = (facts.allocated_bytes or 0) + (facts.cache_bytes or 0)
    free = facts.free_bytes if facts.free_bytes is not None else total - held
    return requested.high >= _XPU_BLOCK and requested.low <= free


def _of_card(facts: Facts) -> Iterator[Cause]:
    requested, free = facts.figures.get("requested_bytes"), facts.figures.get("free_bytes")
    if is_oversized(facts):
        yield Request(code="larger_than_card", requested_bytes=facts.requested_bytes)
    if "spills_to_host" in facts.notes and facts.total_bytes:
        held = max(facts.reserved_bytes or 0, facts.allocated_bytes or 0, facts.process_bytes or 0)
        yield Spilled(
            code="spills_to_host",
            held_bytes=held,
            total_bytes=facts.total_bytes,
            spilled_bytes=held - facts.total_bytes,
        )
    if facts.allowed_bytes is not None and "no_limit_set" not in facts.notes:
        is_cause = requested is not None and free is not None and free.low >= requested.high
        usual = "limited_by_ratio" if facts.kind == "mps_out_of_memory" else "limited"
        if "ratio_not_in_effect" in facts.details:
            usual = "ratio_not_in_effect"
        yield Limit(
            code="limit_decides" if is_cause else usual,
            allowed_bytes=facts.allowed_bytes,
            free_bytes=facts.free_bytes,
        )
    elif is_of_one_block(facts):
        yield Request(code="block_limit", label=LIKELY, requested_bytes=facts.requested_bytes)
    elif had_room(facts) and (room := room_beside_own(facts)) is not None:
        yield MoreFree(code="room_beside_own", free_bytes=room)
    elif "more_free_than_requested" in facts.notes and not ownership(facts).decides:
        hardly = (facts.free_bytes or 0) < _HARDLY * (facts.requested_bytes or 0)
        code = "hardly_more_free" if hardly else "little_free"
        if had_room(facts):
            code = "takes_most_of_free" if hardly else "more_free_than_requested"
        yield MoreFree(code=code, label=LIKELY if code == "little_free" else MEASURED, free_bytes=facts.free_bytes)


_HARDLY = 1.5
"""Times the request that hardly more than it is below."""


def _of_shared_memory(facts: Facts) -> Iterator[Cause]:
    """Yield the machine's own use of a memory that GPU and host share, where it is much."""
    outside, total = facts.figures.get("not_reserved_bytes"), facts.total_bytes or 0
    if outside is not None and outside.low >= _MUCH_OF_CARD * total:
        yield OutsidePyTorch(
            code="host_shares_memory",
            label=LIKELY,
            outside_bytes=outside.bytes,
            low_bytes=outside.low,
            high_bytes=total,
        )


def _of_others(facts: Facts) -> Iterator[Cause]:
    if shares_host(facts):
        yield from _of_shared_memory(facts)
    found, total, need = ownership(facts), facts.total_bytes or 0, facts.figures.get("requested_bytes")
    if found.ranks and not found.ranks_bytes:  # their sizes are unknown in a container
        yield RanksInRow(code="ranks_in_row", label=LIKELY, count=len(found.ranks))
        return
    if found.ranks:
        yield OwnRanks(
            code="own_ranks_decide" if found.decides else "own_ranks",
            label=LIKELY,
            count=len(found.ranks),
            each_bytes=found.ranks[0].bytes,
            all_bytes=found.ranks_bytes,
        )
        return
    if found.row:
        yield RanksInRow(code="ranks_in_row", label=LIKELY, count=len(found.row))
        return
    if found.others is None:
        return
    free = facts.figures.get("free_bytes")
    hopeless = free is not None and need is not None and free.high + found.others.high < need.low
    code = _OTHERS[found.is_estimated]["decide" if found.decides else "too" if hopeless else "open"]
    yield OtherProcesses(
        code=code,
        label=LIKELY if found.is_estimated else MEASURED,
        others_bytes=found.others.low if found.is_estimated else found.others.bytes,
        total_bytes=total,
        outside_bytes=facts.not_reserved_bytes,
        need_bytes=(facts.process_bytes or facts.reserved_bytes or 0) + (facts.requested_bytes or 0),
    )


def _of_cache(facts: Facts) -> Iterator[Cause]:
    """Yield the cache, unless other memory than the cache's pieces stopped the request."""
    cache_bytes, would_do = facts.cache_bytes, facts.cache_would_do
    if not cache_bytes or {"spills_to_host", "more_free_than_requested"} & set(facts.notes):
        return
    large = "cache_decides" if cache_is_large(facts) else "cache_fragmented"
    yield Cache(
        code="cache_small"
        if would_do and cache_is_small(facts)
        else large
        if would_do
        else "cache_little"
        if would_do is False
        else "cache_open",
        cache_bytes=cache_bytes,
        short_by_bytes=facts.short_by_bytes,
        requested_bytes=facts.requested_bytes,
    )


def cache_is_large(facts: Facts) -> bool:
    """Return True if the cache's fragments are more than any run has: they are taken for the first cause."""
    cache_bytes, requested = facts.cache_bytes or 0, facts.requested_bytes or 0
    total = facts.total_bytes or cache_bytes
    is_far_more = cache_bytes > max(_LARGE_CACHE * total, _LEAST_CACHE) and cache_bytes > _TIMES * requested
    return is_far_more or cache_bytes > _MOST_OF_CARD * total


def cache_holds_request(facts: Facts) -> bool:
    """Return True if the cache alone holds clearly more than the request, in pieces, and neither is small."""
    cache_bytes, total, requested = facts.cache_bytes or 0, facts.total_bytes or 0, facts.requested_bytes or 0
    is_large = cache_bytes > _MUCH_CACHED * total or (cache_bytes > GIB and requested > _TELLING * total)
    return is_large and cache_bytes > _CLEARLY * requested and facts.cache_would_do is True


def cache_is_small(facts: Facts) -> bool:
    """Return True if the cache is what any run has, and less than the request: its pieces are not the cause."""
    cache_bytes, total = facts.cache_bytes or 0, facts.total_bytes or 0
    small = _USUAL_CACHE if (facts.requested_bytes or 0) <= _OWN_SEGMENT else _SMALL_CACHE
    return cache_bytes < small * total and not (cache_holds_request(facts) or _is_many_requests(facts))


def _is_many_requests(facts: Facts) -> bool:
    """Return True if the cache holds many times a request that has a segment of its own."""
    cache_bytes, requested = facts.cache_bytes or 0, facts.requested_bytes or 0
    return cache_bytes > GIB and requested > _OWN_SEGMENT and cache_bytes > _MANY * requested


_MANY, _OWN_SEGMENT = 8, 20 * 2**20
"""Times the request, and bytes above which a request has a segment of its own."""


_SMALL_CACHE, _USUAL_CACHE, _TELLING = 0.05, 0.08, 0.01
"""Shares of the card: a small cache, one beside a small request, and a request with which a cache's pieces tell."""
_MUCH_CACHED, _CLEARLY = 0.1, 1.5
"""Share of the card, and times the request."""


def _of_own(facts: Facts) -> Iterator[Cause]:
    """Yield this process's own memory: its number, its pools, its context."""
    printed = facts.figures.get("process_bytes")
    if printed is not None and printed.bytes >= 2**63:
        yield Cause(code="process_unknown")
    if facts.own_pid is not None and facts.process_bytes is not None and ownership(facts).others is None:
        yield OwnProcess(code="own_process_alone", pid=facts.own_pid, process_bytes=facts.process_bytes)
    total, free, allocated = facts.total_bytes, facts.free_bytes, facts.allocated_bytes
    if facts.kind == "cuda_async" and total and free is not None and allocated:
        rest = total - free - allocated
        if rest > _SMALL_REST:
            yield OutsidePyTorch(code="async_rest", outside_bytes=rest, low_bytes=rest, high_bytes=rest)
    if facts.private_pool_bytes:
        yield PrivatePools(code="private_pools", pool_bytes=facts.private_pool_bytes)
    outside = facts.figures.get("outside_pytorch_bytes")
    is_mps = facts.kind == "mps_out_of_memory"
    is_usual = outside is not None and outside.high < _USUAL_CONTEXT and facts.kind == "cuda_out_of_memory"
    if outside is not None and outside.high > 0 and facts.own_pid is None and not is_usual:
        yield OutsidePyTorch(
            code="metal_decides"
            if fills_by_metal(facts)
            else "outside_on_mps"
            if is_mps
            else "outside_decides"
            if is_filled_by_library(facts)
            else "outside",
            outside_bytes=outside.bytes,
            low_bytes=outside.low,
            high_bytes=outside.high,
        )


_USUAL_CONTEXT = 600 * 2**20
"""Bytes of a CUDA context and its libraries in a usual run, which are worth no word."""


def has_no_gpu(facts: Facts) -> bool:
    """Return True on a Mac where nothing is held, and yet a request fails: its GPU cannot be used."""
    outside = facts.figures.get("outside_pytorch_bytes")
    is_empty = outside is not None and outside.high == 0 and facts.allocated_bytes == 0
    return facts.kind == "mps_out_of_memory" and is_empty


def fills_by_metal(facts: Facts) -> bool:
    """Return True on a Mac where more memory is outside of PyTorch's heaps than in them."""
    outside, own = facts.figures.get("outside_pytorch_bytes"), facts.allocated_bytes
    return facts.kind == "mps_out_of_memory" and outside is not None and own is not None and outside.low > own


_OF_LIBRARY = 0.2
"""Share of the card from which on memory outside PyTorch is no GPU context and no workspace, but a library's."""


def is_filled_by_library(facts: Facts) -> bool:
    """Return True if much of this process's memory on the card is another library's: a simulator's, or JAX's."""
    outside, total = facts.figures.get("outside_pytorch_bytes"), facts.total_bytes
    if outside is None or not total or facts.kind == "mps_out_of_memory" or "spills_to_host" in facts.notes:
        return False
    return outside.low > max(_OF_LIBRARY * total, 2 * GIB)


_LARGE_POOLS = 0.1
"""Share of the card from which on the pools of CUDA graphs come before other causes."""


def fixes_of_figures(facts: Facts) -> Iterator[Remedy]:
    """Yield fixes of the decisive causes that are neither about other programs nor about the cache."""
    codes = {cause.code for cause in causes_of_figures(facts)}
    if "limit_decides" in codes:
        yield Remedy(
            code="raise_fraction",
            verdict=UNCHECKED,
            reason="limit_is_cause",
            label=MEASURED,
            paste=to_paste("raise_fraction"),
            figures=Figures(free_bytes=facts.free_bytes, requested_bytes=facts.requested_bytes),
        )
    if "private_pools" in codes and (facts.private_pool_bytes or 0) > _LARGE_POOLS * (facts.total_bytes or 0):
        for code in ("fewer_graphs", "no_cuda_graphs"):
            yield Remedy(code=code, verdict=UNCHECKED, reason=code, label=LIKELY, paste=to_paste(code))
    if codes & {"own_ranks", "own_ranks_decide", "ranks_in_row"}:
        yield Remedy(
            code="set_device", verdict=UNCHECKED, reason="ranks_share_card", label=LIKELY, paste=to_paste("set_device")
        )
        if (ranks := ownership(facts).ranks) and ranks[0].bytes > _MORE_THAN_CONTEXT:
            yield Remedy(
                code="load_on_host",
                verdict=UNCHECKED,
                reason="load_on_host",
                label=LIKELY,
                paste=('torch.load(path, map_location="cpu")',),
            )


_MORE_THAN_CONTEXT = GIB
"""Bytes of a rank on another one's card from which on it holds tensors there, such as a checkpoint."""
