"""Lines that keep more memory each time they run, or change the steps: they are sought again, up to some end."""

import time
from collections.abc import Hashable

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
        self._before: dict[Sought, tuple[int, Hashable]] = {}
        """Lines that iterations were passed over for, and the bytes that repeating steps held and allocated before."""
        self._grown: list[Sought] = []
        """Those of them after which more was held, until some steps tell which of the lines run in each."""
        self._begun: float | None = None
        self._again: list[Frame] = []
        """Lines to play again, for which no iterations could be passed over yet: the steps differ from those before."""

    def again(self, pattern: Hashable) -> list[Frame]:
        """List the lines to play again: they ran, do not run in each step, and left more held, or steps of other sizes.

        And loops in which some may be. `pattern`: the allocations of the steps that repeat now.
        """
        now = time.process_time()
        rare = [self._lines.rare_of(each) for each in self._grown] if self._lines.knows_reruns() else []
        self._grown = [] if rare else self._grown
        ran = [each for each in self._before if not self._lines.is_seeking(each)]
        if ran:
            self._again = []
        for sought in ran:
            held, allocations = self._before.pop(sought)
            if pattern != allocations or self._recorder.allocator.requested_bytes - held >= _LEAST_BYTES:
                self._begun = self._begun or now
                if now - self._begun < _SECONDS:
                    self._grown.append(sought)
                    self._lines.note_reruns(sought)
        for sought in rare:
            self._again += self._lines.seek_again(sought) if sought.lines else []
        return [*self._again, *(each.head() for each in self._grown)]

    def note(self, pattern: Hashable) -> None:
        """Remember the bytes of the steps that repeat if iterations begin to be passed over for lines."""
        sought, self._lines.sought = self._lines.sought, None
        if sought is not None and sought.lines:
            self._before[sought] = self._recorder.allocator.requested_bytes, pattern
            self._again = []
