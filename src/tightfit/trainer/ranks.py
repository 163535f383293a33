"""Compare the processes of a run: the time of a step that is each one's own, and its peak of memory.

All processes take the same time for a step, for the fast ones wait. A process's own time is that without its waiting
for agreement, which comes before each exchange. It is the host's time: a card that is slow while its host runs ahead of
it is not noticed.
"""

import socket
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

from tightfit.trainer.distributed import World
from tightfit.trainer.events import Event, RanksEvent, StragglerEvent
from tightfit.wording import say

SLOWER = 1.5
"""Ratio of a process's own time to the median of the others from which it is named."""
_REMEMBERED = 10
"""Logged steps that are compared; one that is slow in some of them is no straggler."""


class Ranks:
    """Own times and peaks of all processes, as the main one hears of them."""

    def __init__(self, world: World, log: Callable[[str], object], event: Callable[[int, Event], object]) -> None:
        """Exchange the names of the processes' machines; all processes call this together."""
        self._world, self._log, self._event = world, log, event
        self._hosts = world.all(socket.gethostname())
        self._own_ms: deque[Sequence[float]] = deque(maxlen=_REMEMBERED)
        self._named: set[int] = set()

    def parts(self, own_ms: float, peak_bytes: int) -> list[float]:
        """Return this process's numbers as its part of a sum over all processes; nothing for a single one."""
        size, rank = self._world.size, self._world.rank
        if size == 1:
            return []
        found = [0.0] * (2 * size)
        found[rank], found[size + rank] = own_ms, float(peak_bytes)
        return found

    def note(self, step: int, numbers: Sequence[float]) -> None:
        """Record the sum of all `parts`, and name a process that has been slow for a while."""
        size = self._world.size
        if size == 1:
            return
        own_ms = [round(each, 3) for each in numbers[:size]]
        peaks = [int(each) for each in numbers[size:]]
        self._event(step, RanksEvent(own_ms=own_ms, peak_bytes=peaks, hosts=self._hosts))
        self._own_ms.append(own_ms)
        if len(self._own_ms) == _REMEMBERED:
            for rank in stragglers(list(self._own_ms)):
                if rank not in self._named:
                    self._name(step, rank)

    def _name(self, step: int, rank: int) -> None:
        self._named.add(rank)
        own = median(each[rank] for each in self._own_ms)
        others = median(ms for each in self._own_ms for other, ms in enumerate(each) if other != rank)
        host = self._hosts[rank]
        self._log(say("trainer.ranks.straggler", rank=rank, host=host, own=own, others=others))
        self._event(step, StragglerEvent(rank=rank, host=host, own_ms=own, others_ms=others))


def stragglers(own_ms: Sequence[Sequence[float]]) -> list[int]:
    """Return the ranks that were slower than the median of the others in nearly all of these steps.

    >>> stragglers([[10.0, 11.0, 18.0], [10.0, 12.0, 17.0], [11.0, 10.0, 19.0]])
    [2]
    """
    found = []
    for rank in range(len(own_ms[0])):
        slow = [each[rank] >= SLOWER * median(ms for other, ms in enumerate(each) if other != rank) for each in own_ms]
        if sum(slow) >= 0.8 * len(slow):
            found.append(rank)
    return found
