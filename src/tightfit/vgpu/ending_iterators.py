"""Iterators that a loop takes items of by `next`, and begins anew at their end, while its iterations are passed over.

Items are counted first, and taken when it is certain that their iterations are passed over.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sized
from typing import NamedTuple, cast

from torch.utils.data import DataLoader

from tightfit.vgpu.loop_items import FAILURES, left_of

Assign = Callable[[str, object], None]
"""Assigns to an expression of the running function."""


class _Anew(NamedTuple):
    """An iterator that was begun anew in iterations passed over."""

    text: str
    """Expression that holds it."""
    items: object
    """Its list, DataLoader or the like."""


class _Counted:
    """One iterator, and the items that are taken from it in iterations passed over."""

    def __init__(self, iterator: Iterator[object]) -> None:
        self.iterator = iterator
        self.left = left_of(iterator)
        """Items that it still has; None if that cannot be seen."""
        self.taken = 0
        """Items counted as taken: from it, or from the iterator that is begun anew."""
        self.anew: _Anew | None = None
        self.text = ""
        """Expression that holds it."""
        self.seen: deque[object] = deque()
        """Items that were really taken, to see that there are any."""


class EndingIterators:
    """The iterators of one loop."""

    def __init__(self) -> None:
        self._counted: dict[int, _Counted] = {}
        self.is_passing = False
        """True while iterations are passed over, rather than looked at."""

    def is_at_end(self, iterator: object, text: str = "") -> bool:
        """Return True if the iterator that the expression `text` holds has no item left.

        One that hides that is asked for an item.
        """
        found = self._of(iterator)
        if found is None:
            return False
        if found.left is not None:
            return found.left <= 0
        if self.is_passing and text and len(found.seen) == found.taken:
            found.text = text
            try:
                found.seen.append(next(found.iterator))
            except (StopIteration, *FAILURES):  # the script's own, which it raises again where it goes on
                found.left = 0
                return True
        return False

    def take(self, iterator: object) -> None:
        """Count an item as taken."""
        found = self._of(iterator)
        if found is None or found.left == 0:
            return
        found.taken += 1
        if found.left is not None:
            found.left -= 1

    def begin_anew(self, text: str, iterator: object, items: object) -> None:
        """Count the iterator that the expression `text` holds as begun anew over `items`."""
        found = self._of(iterator)
        if found is not None:
            found.anew, found.taken, found.left = _Anew(text, items), 0, len(cast("Sized", items))

    def _of(self, iterator: object) -> _Counted | None:
        if id(iterator) not in self._counted:
            if not hasattr(iterator, "__next__"):
                return None
            self._counted[id(iterator)] = _Counted(cast("Iterator[object]", iterator))
        return self._counted[id(iterator)]

    def counted(self) -> list[tuple[object, int]]:
        """List the iterators with the items that were counted since items were taken last."""
        return [(each.iterator, each.taken) for each in self._counted.values() if each.taken and each.anew is None]

    def back(self) -> None:
        """Forget all counts since items were taken last."""
        self._counted = {key: each for key, each in self._counted.items() if each.seen}
        for each in self._counted.values():
            each.taken, each.left = 0, None

    def keep(self, assign: Assign) -> None:
        """Take the items that were counted, and begin iterators anew by way of `assign`."""
        for key, each in [*self._counted.items()]:
            iterator = each.iterator
            if each.anew is not None:
                iterator = iter(each.anew.items)  # type: ignore[call-overload]
                assign(each.anew.text, iterator)
            while each.seen and each.taken:
                each.seen.popleft()
                each.taken -= 1
            with contextlib.suppress(StopIteration, *FAILURES):  # as above
                for _ in range(each.taken):
                    next(iterator)
            each.taken = 0
            if not each.seen:
                del self._counted[key]

    def put_back(self, assign: Assign) -> None:
        """Let items that were only seen come first in the iterations that run."""
        for each in self._counted.values():
            if each.seen:
                assign(each.text, itertools.chain(each.seen, each.iterator))
        self._counted.clear()


def begins_alike(items: object) -> bool:
    """Return True if `iter(items)` does nothing else in the script, and the number of items is known."""
    return isinstance(items, (DataLoader, list, tuple, range)) and hasattr(items, "__len__")
