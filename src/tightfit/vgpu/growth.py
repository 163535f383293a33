"""Lines that run seldom are sought again: where they keep more each time, or change the steps, and at later stages.

A later stage is a further run of their loop, in an epoch, with other steps than before, or with more held.
"""

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import CodeType

from tightfit.vgpu.frames import Frame
from tightfit.vgpu.recorder import Recorder
from tightfit.vgpu.unplayed import LineWatch, Sought

_LEAST_BYTES = 1 << 16
"""A list of losses on the card grows, too, without making a difference."""
_SECONDS = 40.0
"""Seconds of the processor for playing such lines again."""
_MOST_STAGES = 4
"""Stages of one loop in which they are."""


@dataclass
class _Stages:
    """The stages of a loop in which its seldom lines ran."""

    sought: Sought
    run: int
    """Run of the loop, from its first iteration, in which they ran last."""
    patterns: set[Hashable] = field(default_factory=set)
    """Allocations of the steps there."""
    held: int = 0
    """Most bytes of tensors after one of them."""
    times: int = 0
    """Stages in which they were sought again."""


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
        self._stages: dict[tuple[CodeType, int], _Stages] = {}

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
        changed = self._at_later_stages(pattern)
        for sought in ran:
            self._note_stage(sought, pattern)
            held, allocations = self._before.pop(sought)
            if pattern != allocations or self._recorder.allocator.requested_bytes - held >= _LEAST_BYTES:
                changed.append(sought)
        for sought in changed:
            self._begun = self._begun or now
            if now - self._begun < _SECONDS:
                self._grown.append(sought)
                self._lines.note_reruns(sought)
        for sought in rare:
            self._again += self._lines.seek_again(sought) if sought.lines else []
        return [*self._again, *(each.head() for each in self._grown)]

    def _note_stage(self, sought: Sought, pattern: Hashable) -> None:
        place, run = (sought.code, sought.loop.first), self._lines.run_of(sought)
        stages = self._stages.setdefault(place, _Stages(sought, run))
        stages.sought = sought._replace(lines=stages.sought.lines | sought.lines)
        stages.run, stages.held = run, max(stages.held, self._recorder.allocator.requested_bytes)
        stages.patterns.add(pattern)

    def _at_later_stages(self, pattern: Hashable) -> list[Sought]:
        """List the lines of loops that run again, with steps or tensors that they did not have before."""
        held = self._recorder.allocator.requested_bytes
        found = [
            each
            for each in self._stages.values()
            if self._lines.run_of(each.sought) > each.run and each.times < _MOST_STAGES
            if pattern not in each.patterns or held - each.held >= _LEAST_BYTES
        ]
        for each in found:
            each.times += 1
            self._note_stage(each.sought, pattern)
        return [each.sought for each in found]

    def note(self, pattern: Hashable) -> None:
        """Remember the bytes of the steps that repeat if iterations begin to be passed over for lines."""
        sought, self._lines.sought = self._lines.sought, None
        if sought is not None and sought.lines:
            self._before[sought] = self._recorder.allocator.requested_bytes, pattern
            self._again = []
