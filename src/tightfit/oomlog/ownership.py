"""Owners of the card's memory: this process, other ranks of the same job, or other programs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec

from tightfit.oomlog.facts import Facts, Figure, OtherProcess
from tightfit.units import GIB, MIB

LEAST_CONTEXT, MOST_CONTEXT = 100 * MIB, GIB // 2
"""Bytes of a process outside of PyTorch's allocator, its CUDA context: 0.3 to 0.5 GiB on the cards measured, and less
on old ones. Libraries with buffers of their own (NCCL, TensorRT) add to it."""
_SURELY_OTHERS, _SURE_SHARE = GIB, 0.08
"""Bytes that are neither free nor PyTorch's from which on not all of them can be this process's context; with fewer,
libraries of this process explain them as well as other programs do. On large cards, that share of them, up to twice."""
_DECIDES, _SHARE = GIB, 12
"""Bytes of an estimate from which on others may be the cause, and the part of the card: NCCL's buffers and graphs of
a job on several cards take up to a sixteenth."""
_FARTHEST = 3 * GIB
"""Bytes outside of PyTorch's allocator above which a listed process is not taken for this one."""
_NEIGHBOURS = 64
"""Distance between the numbers of processes that one launcher started one after another."""
_ALIKE = 0.02
"""Share by which the sizes of equal ranks differ."""


def own_process(processes: Sequence[OtherProcess], figures: Mapping[str, Figure]) -> OtherProcess | None:
    """Return the listed process that is this one, in a container where the message cannot tell; None if two may be.

    It holds what PyTorch reserved, and a context. A listed process that leaves this one no room on the card is this
    one, too, however much libraries and NCCL add to it.
    """
    allocated = figures.get("allocated_bytes")
    if "process_bytes" in figures:
        return None
    if allocated is None:
        return _only_process(processes, figures)
    cache = figures.get("unallocated_bytes")
    reserved = figures.get("reserved_bytes") or (allocated + cache if cache else allocated)
    total = figures.get("total_bytes")

    def holds_it(each: OtherProcess) -> bool:
        is_alone = total is not None and each.bytes - _rounding(each) + reserved.low > total.high >= each.bytes
        return reserved.low + LEAST_CONTEXT <= each.bytes + _rounding(each) and (
            is_alone or each.bytes <= reserved.high + _FARTHEST
        )

    fitting = list(filter(holds_it, processes))
    return fitting[0] if len(fitting) == 1 else None


def _only_process(processes: Sequence[OtherProcess], figures: Mapping[str, Figure]) -> OtherProcess | None:
    """Return the one listed process if it leaves no room on the card for another one's context."""
    total, free = figures.get("total_bytes"), figures.get("free_bytes")
    if len(processes) != 1 or total is None or free is None:
        return None
    rest = total.high - free.low - processes[0].bytes + _rounding(processes[0])
    return processes[0] if rest < LEAST_CONTEXT else None


def _rounding(process: OtherProcess) -> int:
    return 50 * MIB if process.bytes >= GIB else MIB // 100


class Ownership(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of the card that is not this process's."""

    others: Figure | None = None
    """Bytes of others; None if the message does not tell, or they are within its rounding."""
    is_estimated: bool = False
    """True if this process's context, of unknown size, was taken off."""
    ranks: tuple[OtherProcess, ...] = ()
    """Others that look like ranks of the same job: equal sizes, neighbouring numbers."""
    row: tuple[OtherProcess, ...] = ()
    """Processes of any size with consecutive numbers, three or more: ranks of one job, this one among them."""
    decides: bool = False
    """True if the request fits without the others."""

    @property
    def ranks_bytes(self) -> int:
        return sum(each.bytes for each in self.ranks)


def shares_host(facts: Facts) -> bool:
    """Return True for a GPU that uses the machine's own memory: files that are read count there, too."""
    return "shares_host" in facts.details


def ownership(facts: Facts) -> Ownership:
    """Return the owners of the card's memory, as far as the figures tell."""
    if shares_host(facts):
        return Ownership(ranks=_ranks(facts))
    others, is_estimated = facts.figures.get("others_bytes"), False
    if others is None and facts.kind in ("cuda_out_of_memory", "hip_out_of_memory"):
        outside = facts.figures.get("not_reserved_bytes")
        outside = outside if outside is not None and outside.low >= _least_of_others(facts) else None
        is_estimated = outside is not None
        others = outside and Figure(
            bytes=max(outside.bytes - MOST_CONTEXT, 0),
            low=max(outside.low - MOST_CONTEXT, 0),
            high=max(outside.high - LEAST_CONTEXT, 0),
            stated=False,
        )
    if others is None or not others.low or facts.total_bytes is None or others.low < 0.01 * facts.total_bytes:
        return Ownership(ranks=_ranks(facts) if others is None else ())
    free, need = facts.figures.get("free_bytes"), facts.figures.get("requested_bytes")
    decides = free is not None and need is not None and free.low + others.low >= need.high
    if "more_free_than_requested" in facts.notes:
        decides = decides and not had_room(facts) and others.low >= _MOST_OF_IT * facts.total_bytes
    # Libraries and NCCL of this process itself are in an estimate: a small one decides nothing.
    decides = decides and (not is_estimated or others.low >= max(_DECIDES, facts.total_bytes // _SHARE))
    return Ownership(others=others, is_estimated=is_estimated, ranks=_ranks(facts), row=_row(facts), decides=decides)


def most_of_others(facts: Facts) -> int | None:
    """Return the bytes that other programs hold at most; None if the message does not tell."""
    others, outside = facts.figures.get("others_bytes"), facts.figures.get("not_reserved_bytes")
    if others is not None:
        return max(others.high, 0)
    return None if outside is None else max(outside.high - LEAST_CONTEXT, 0)


def others_might_do(facts: Facts) -> bool:
    """Return True unless the request would fail for certain after all other programs are closed."""
    free, need, most = facts.figures.get("free_bytes"), facts.figures.get("requested_bytes"), most_of_others(facts)
    return free is None or need is None or most is None or free.high + most >= need.low


def _least_of_others(facts: Facts) -> int:
    """Return the bytes from which on not all of them are this process's: on small cards, a third of the card."""
    total = facts.total_bytes or 0
    if total < 3 * _SURELY_OTHERS:
        return max(total // 3, _SMALLEST_OTHERS)
    return max(_SURELY_OTHERS, min(int(_SURE_SHARE * total), 2 * _SURELY_OTHERS))


_SMALLEST_OTHERS = 560 * MIB
"""Bytes above any context."""
_MOST_OF_IT = 0.25
"""Share of the card that others hold at least, if they are to be the cause of a request that had room."""
_FULL = 0.1
"""Share of the card below which what is free may have been freed while the message was written."""

_NEARLY_ALL = 0.9
"""Share of the free memory from which on a request is too large for it."""


def room_beside_own(facts: Facts) -> int | None:
    """Return an Intel GPU's bytes beside this process's own; its messages state no free memory."""
    total, held = facts.total_bytes, facts.reserved_bytes
    if facts.kind != "xpu_out_of_memory" or facts.free_bytes is not None or total is None or held is None:
        return None
    return max(total - held, 0)


def had_room(facts: Facts) -> bool:
    """Return True if the card had room for the request, so that neither others nor its size stopped it.

    Free memory is not one piece, and requests are rounded up: one for nearly all had no room.
    """
    free, total, requested = facts.figures.get("free_bytes"), facts.total_bytes or 0, facts.requested_bytes or 0
    if (room := room_beside_own(facts)) is not None:
        return room > requested + _FULL * total
    if "more_free_than_requested" not in facts.notes or free is None:
        return False
    return free.low > _FULL * total and requested < _NEARLY_ALL * free.low


def _near(own_pid: int, strangers: Sequence[OtherProcess]) -> list[OtherProcess]:
    """Return the processes whose numbers follow each other around this process's number; other ones are no ranks."""
    near: list[OtherProcess] = []
    numbers = {own_pid}
    for each in sorted(strangers, key=lambda one: abs(one.pid - own_pid)):
        if min(abs(each.pid - number) for number in numbers) <= _NEIGHBOURS:
            near.append(each)
            numbers.add(each.pid)
    return near


def _ranks(facts: Facts) -> tuple[OtherProcess, ...]:
    """Return the other processes that look like ranks of this process's job."""
    strangers = [each for each in facts.other_processes if each.pid != facts.own_pid and each.bytes < 2**63]
    if facts.own_pid is not None and (near := _near(facts.own_pid, strangers)):
        strangers = near
    numbers = sorted([*(each.pid for each in strangers), *([facts.own_pid] if facts.own_pid else [])])
    if len(numbers) < 3 or any(two - one > _NEIGHBOURS for one, two in pairwise(numbers)):
        return ()
    least, most = (choose(each.bytes for each in strangers) for choose in (min, max))
    return tuple(strangers) if most - least <= _ALIKE * most + MIB else ()


_GAP = 2
"""Numbers by which a row of processes that were started at once may be longer than the row is."""


def _row(facts: Facts) -> tuple[OtherProcess, ...]:
    """Return the listed processes if their numbers follow each other: a launcher started them on one card."""
    listed = [each for each in facts.other_processes if each.bytes < 2**63]
    numbers = sorted(each.pid for each in listed)
    if len(numbers) < 3 or numbers[-1] - numbers[0] > len(numbers) + _GAP:
        return ()
    return tuple(listed)
