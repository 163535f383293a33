"""When a script has shown enough: after the steps asked for, or when steps repeat and nothing is left to play."""

import itertools
import sys
import time
from collections import deque
from types import FrameType

from tightfit.vgpu.evaluations import Evaluations
from tightfit.vgpu.frames import Frame, user_frames, users_line
from tightfit.vgpu.phases import EnoughSeen, Phases
from tightfit.vgpu.recorder import Recorder
from tightfit.vgpu.records import Settings
from tightfit.vgpu.unplayed import LineWatch, is_in_loop, own_frames
from tightfit.wording import say

_STABLE_ROUNDS = 2
"""Rounds that must have allocated exactly as the round before."""
_LONGEST_ROUND = 8
"""Steps in a round: a script with several optimizers has one for each of them."""
_STABLE_BACKWARDS = 10
"""Backward passes, without an optimizer of torch's, that must have: they may also be measurements of different things.
"""
_PLAY_ON_S = 20.0
"""Seconds of the processor that repeating steps play on for lines of the loop, or after it, that did not run yet."""
_WAIT_ON_S = 120.0
"""The same by the clock, for a script that waits, or a busy machine."""
_LISTED_UNPLAYED = 10


class Stopping:
    """Compares each optimizer step with the one before, and ends the script by EnoughSeen."""

    def __init__(self, settings: Settings, recorder: Recorder) -> None:
        self._settings, self._recorder = settings, recorder
        self.reason = say("vgpu.stopping.ended")
        self.not_played: list[Frame] = []
        """Lines that an early stop left out, although they may allocate."""
        self._mark = 0
        self._last: deque[tuple[tuple[int, ...], int, int]] = deque(maxlen=_LONGEST_ROUND)
        """Latest steps, the last one first: their allocations and the peaks after them."""
        self._equal = [0] * _LONGEST_ROUND
        """For a round of 1, 2, ... steps: steps in a row that were equal to the one a round before."""
        self._lines = LineWatch()
        self._repeats_since: tuple[float, float] | None = None
        """Seconds of the processor and of the clock."""
        self._allocating: set[Frame] = set()
        self._read_allocations = 0
        self._unplayed: list[Frame] = []

    def after_step(self, steps: int, notes: list[str], *, has_optimizer: bool) -> None:
        """Decide if another step could differ; add to `notes` what an early end leaves open."""
        recorder = self._recorder
        step = (self._pattern(), recorder.peak_allocated, recorder.allocator.peak_reserved_bytes)
        earlier = itertools.zip_longest(self._last, self._equal)
        self._equal = [count + 1 if step == before else 0 for before, count in earlier]
        self._last.appendleft(step)
        if self._settings.steps is not None:
            if steps >= self._settings.steps:
                self._end(say("vgpu.stopping.steps_done", steps=steps))
        elif self._settings.until_stable:
            self._end_if_stable(steps, notes, has_optimizer=has_optimizer)

    def evaluations(self, phases: Phases, notes: list[str]) -> None:
        """Shorten evaluations, too, from now on."""
        found = Evaluations(self._recorder, phases, self._lines, notes)
        phases.after_evaluation = found.after_forward
        found.install()

    def cut_short(self, frame: FrameType | None, *, interrupted: bool) -> None:
        """Note that the time limit has passed, or that somebody ended the play, while the script was at `frame`.

        The device ends the script at the next operator.
        """
        seconds = f"{self._settings.timeout_s:g}" if self._settings.timeout_s else ""
        reason = say("vgpu.stopping.out_of_time", seconds=seconds)
        self.reason = say("vgpu.stopping.interrupted") if interrupted else reason
        line = users_line(user_frames(frame))
        self.not_played = self._unplayed or ([line] if line else [])

    def close(self) -> None:
        self._lines.stop()

    def _end_if_stable(self, steps: int, notes: list[str], *, has_optimizer: bool) -> None:
        """End when steps repeat and every line that may allocate ran, or when playing on took too long."""
        frame = sys._getframe(1)  # a frame that holds itself would keep the script's tensors until Python collects
        self._lines.start(frame)
        self._lines.follow(frame)
        self._unplayed = self._lines.unplayed(frame, self._allocating_lines())[:_LISTED_UNPLAYED]
        first = self._repeats_from(steps, has_optimizer=has_optimizer)
        if first is None:
            return
        if not has_optimizer and not any(map(is_in_loop, own_frames(frame))):
            return
        if self._unplayed and self._lines.leave_loops(frame, self._unplayed):
            note = say("vgpu.stopping.jumped", first=first, last=steps)
            if note not in notes:
                notes.append(note)
            self._equal = [0] * _LONGEST_ROUND
            return
        now = time.process_time(), time.monotonic()
        begun = self._repeats_since = self._repeats_since or now
        if self._unplayed and now[0] - begun[0] < _PLAY_ON_S and now[1] - begun[1] < _WAIT_ON_S:
            return
        self.not_played = self._unplayed
        if "eval" not in self._recorder.phase_peaks:
            notes.append(say("vgpu.stopping.no_evaluation"))
        self._end(say("vgpu.stopping.repeats", first=first, last=steps))

    def _repeats_from(self, steps: int, *, has_optimizer: bool) -> int | None:
        """Return the first of the steps that repeat now, in the shortest round; None if they do not."""
        if not has_optimizer:
            return steps - self._equal[0] if self._equal[0] >= _STABLE_BACKWARDS else None
        rounds = enumerate(self._equal, start=1)
        return next((steps - count - size + 1 for size, count in rounds if count >= _STABLE_ROUNDS * size), None)

    def _allocating_lines(self) -> set[Frame]:
        """Return the user's lines that allocated so far; each call reads only the allocations made since the last."""
        allocations = self._recorder.allocations
        self._allocating.update(place for each in allocations[self._read_allocations :] for place in each.frames)
        self._read_allocations = len(allocations)
        return self._allocating

    def _end(self, reason: str) -> None:
        self.reason = reason
        raise EnoughSeen(reason)

    def _pattern(self) -> tuple[int, ...]:
        """Return the step's allocations and releases by size; which tensors they were does not matter."""
        pattern = tuple(self._recorder.sizes_since(self._mark))
        self._mark = len(self._recorder.events)
        return pattern
