"""Items that are taken away from a loop's iterator, so that the loop does not get them."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

from tightfit.vgpu.loop_items import FAILURES


class TakenItems:
    """Takes such items, and tells who asks that iterations are passed over now, or were before."""

    def __init__(self) -> None:
        self.is_passing = False
        """True while iterations are passed over."""
        self.has_passed = False
        """True once iterations were passed over."""
        self.is_cut_short = False
        """True once the play's time is over: nothing more is passed over."""
        self.latest: deque[object] = deque(maxlen=0)
        """As many of the items taken last as may have to be put back."""
        self.took: Callable[[object], None] = lambda item: None
        """Called with each item that a loop does not get."""
        self.after_passing: Callable[[], None] = lambda: None
        """Called when no more items are taken away for now."""

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Pass over iterations within."""
        self.is_passing = self.has_passed = True
        try:
            yield
        finally:
            self.is_passing = False
            self.after_passing()

    def take(self, items: object) -> bool:
        """Take one item of an iterator away; False if there is none."""
        try:
            item = next(items, self)  # type: ignore[call-overload]
        except FAILURES:  # the script's own, which it raises again where the loop goes on
            return False
        self.took(item)
        if item is not self:
            self.latest.append(item)
        return item is not self
