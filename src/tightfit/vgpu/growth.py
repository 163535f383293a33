"""Lines that keep more memory each time they run: they are sought again, up to the loop's end or the card's."""

import time

from tightfit.vgpu.frames import Frame
from tightfit.vgpu.recorder import Recorder
from tightfit.vgpu.unplayed import LineWatch, Sought

_LEAST_BYTES = 1 << 16
"""A list of losses on the card grows, too, without making a difference."""
_SECONDS = 40.0
"""Seconds of the processor for playing such lines again."""


class Growth:
    """Compares the allocations of repeating steps before and after lines that iterations were passed over for."""

    def __init__(self, recorder: Recorder, lines: LineWatch) -> None:
        self._recorder, self._lines = recorder, lines
        self._before: dict[Sought, int] = {}
        """Lines that iterations were passed over for, and the bytes that repeating steps held before them."""
        self._grown: list[Sought] = []
        """Those of them after which more was held, until some steps tell which of the lines run in each."""
        self._begun: float | None = None
        self._again: list[Frame] = []
        """Lines to play again, for which no iterations could be passed over yet: the steps differ from those before."""

    def again(self) -> list[Frame]:
        """List the lines to play again, because they ran, do not run in each step, and left more allocated.

        And loops in which some may be.
        """
        now = time.process_time()
        rare = [self._lines.rare_of(each) for each in self._grown] if self._lines.knows_reruns() else []
        self._grown = [] if rare else self._grown
        ran = [each for each in self._before if not self._lines.is_seeking(each)]
        if ran:
            self._again = []
        for sought in ran:
            if self._recorder.allocator.requested_bytes - self._before.pop(sought) >= _LEAST_BYTES:
                self._begun = self._begun or now
                if now - self._begun < _SECONDS:
                    self._grown.append(sought)
                    self._lines.note_reruns(sought)
        for sought in rare:
            self._again += self._lines.seek_again(sought) if sought.lines else []
        return [*self._again, *(each.head() for each in self._grown)]

    def note(self) -> None:
        """Remember the allocated bytes if iterations begin to be passed over for lines."""
        sought, self._lines.sought = self._lines.sought, None
        if sought is not None and sought.lines:
            self._before[sought] = self._recorder.allocator.requested_bytes
            self._again = []
