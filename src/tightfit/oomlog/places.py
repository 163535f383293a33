"""The rank and the card of a failure, by the lines of a launcher and of NCCL that name them."""

import re
from collections.abc import Sequence

from msgspec.structs import replace

from tightfit.oomlog.facts import Facts
from tightfit.oomlog.kinds import memory_of
from tightfit.oomlog.log_text import Line

_NCCL = re.compile(r"\S:\d{1,9}:\d{1,9} \[(\d{1,3})\] ")
"""The host, the process, the thread and the card before each line of NCCL's."""
_ROOT_CAUSE = re.compile(r"^Root Cause\b")
_RANK = re.compile(r"^\s*rank\s*: (\d{1,7}) \(local_rank: (\d{1,4})\)")
_LINES_OF_BLOCK = 8
"""Lines of torchrun's report on the first rank that failed, up to its exit code."""


def with_card(facts: Facts, line: Line) -> Facts:
    """Return a failure of NCCL's with the card that its line names."""
    found = _NCCL.search(line.prefix + line.body) if facts.kind == "nccl" and facts.device_index is None else None
    return replace(facts, device_index=int(found[1])) if found else facts


def with_rank(facts: Facts, ending: Sequence[str]) -> Facts:
    """Return a failure with the rank that torchrun names as the first one that failed.

    A process that was ended is that rank; memory of a card ran out there if the rank's number on its machine is the
    card's.
    """
    found = _first_failed(ending) if facts.rank is None else None
    if found is None:
        return facts
    is_ended = facts.kind in _OF_EXIT_CODE and facts.line > 0
    is_of_card = memory_of(facts.kind) == "device" and facts.device_index == found[1]
    return replace(facts, rank=found[0]) if is_ended or is_of_card else facts


_OF_EXIT_CODE = ("host_killed", "aborted", "crashed", "terminated", "rank_failed")


def _first_failed(lines: Sequence[str]) -> tuple[int, int] | None:
    """Return the rank, and its number on its machine, below torchrun's words for the first failure.

    >>> _first_failed(["Root Cause (first observed failure):", "[0]:", "  rank      : 11 (local_rank: 3)"])
    (11, 3)
    """
    roots = [at for at, line in enumerate(lines) if _ROOT_CAUSE.match(line)]
    below = lines[roots[-1] : roots[-1] + _LINES_OF_BLOCK] if roots else []
    found = next(filter(None, map(_RANK.match, below)), None)
    return (int(found[1]), int(found[2])) if found else None
