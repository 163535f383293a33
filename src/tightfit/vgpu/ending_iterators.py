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


class _Count(NamedTuple):
    """Items of one iterator, or of the one that it is begun anew by."""

    left: int | None
    """None if that cannot be seen."""
    taken: int = 0
    anew: _Anew | None = None


class _Counted:
    """One iterator, and the items that are taken from it in iterations passed over."""

    def __init__(self, iterator: Iterator[object]) -> None:
        self.iterator = iterator
        self.now = self.kept = _Count(left_of(iterator))
        """The count in the iteration that is followed, and in those that are certainly passed over."""
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
        if found.now.left is not None:
            return found.now.left <= 0
        if self.is_passing and text and len(found.seen) == found.now.taken:
            found.text = text
            try:
                found.seen.append(next(found.iterator))
            except (StopIteration, *FAILURES):  # the script's own, which it raises again where it goes on
                return True
        return False

    def take(self, iterator: object) -> None:
        """Count an item as taken."""
        found = self._of(iterator)
        if found is not None and found.now.left != 0:
            left = found.now.left
            found.now = found.now._replace(left=None if left is None else left - 1, taken=found.now.taken + 1)

    def begin_anew(self, text: str, iterator: object, items: object) -> None:
        """Count the iterator that the expression `text` holds as begun anew over `items`."""
        found = self._of(iterator)
        if found is not None:
            found.now = _Count(len(cast("Sized", items)), 0, _Anew(text, items))

    def _of(self, iterator: object) -> _Counted | None:
        if id(iterator) not in self._counted:
            if not hasattr(iterator, "__next__"):
                return None
            self._counted[id(iterator)] = _Counted(cast("Iterator[object]", iterator))
        return self._counted[id(iterator)]

    def counted(self) -> list[tuple[object, int]]:
        """List the iterators with the items that were counted, unless they are begun anew."""
        each_count = ((each.iterator, each.now) for each in self._counted.values())
        return [(iterator, now.taken) for iterator, now in each_count if now.taken and now.anew is None]

    def back(self) -> None:
        """Forget the counts of the iteration that is followed."""
        for each in self._counted.values():
            each.now = each.kept

    def forget(self) -> None:
        """Look at the iterators anew, after an iteration that runs."""
        self._counted.clear()

    def keep(self) -> None:
        """Pass over the iteration that was followed."""
        for each in self._counted.values():
            if each.seen:
                for _ in range(each.now.taken):
                    each.seen.popleft()
                each.now = each.now._replace(taken=0)
            each.kept = each.now

    def end(self, assign: Assign) -> None:
        """Take the items of all iterations passed over, and begin iterators anew, by way of `assign`."""
        for each in self._counted.values():
            iterator = each.iterator
            if each.kept.anew is not None:
                iterator = iter(each.kept.anew.items)  # type: ignore[call-overload]
                assign(each.kept.anew.text, iterator)
            with contextlib.suppress(StopIteration, *FAILURES):  # as above
                for _ in range(each.kept.taken):
                    next(iterator)
            if each.seen:  # they come first where the loop goes on
                assign(each.text, itertools.chain(each.seen, iterator))
        self._counted.clear()


def begins_alike(items: object) -> bool:
    """Return True if `iter(items)` does nothing else in the script, and the number of items is known."""
    try:
        return isinstance(items, (DataLoader, list, tuple, range)) and len(items) > 0
    except FAILURES:  # of a dataset without a length
        return False
