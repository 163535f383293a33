"""When a script has shown enough: after the steps asked for, or when steps repeat and nothing is left to play."""

import sys
import time
from types import FrameType

from tightfit.vgpu.evaluations import Evaluations
from tightfit.vgpu.frames import Frame, user_frames, users_line
from tightfit.vgpu.phases import EnoughSeen, Phases
from tightfit.vgpu.recorder import Recorder
from tightfit.vgpu.records import Settings
from tightfit.vgpu.unplayed import LineWatch, is_in_loop, own_frames
from tightfit.wording import say

_STABLE_STEPS = 2
"""Steps in a row that must have allocated exactly as the step before."""
_STABLE_BACKWARDS = 10
"""The same of backward passes without an optimizer of torch's, which may also be measurements of different things."""
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
        self._last_pattern: tuple[int, ...] = ()
        self._peak_before = (0, 0)
        self._stable = 0
        self._lines = LineWatch()
        self._repeats_since: tuple[float, float] | None = None
        """Seconds of the processor and of the clock."""
        self._allocating: set[Frame] = set()
        self._read_allocations = 0
        self._unplayed: list[Frame] = []

    def after_step(self, steps: int, notes: list[str], *, has_optimizer: bool) -> None:
        """Decide if another step could differ; add to `notes` what an early end leaves open."""
        recorder = self._recorder
        pattern = self._pattern()
        peak = (recorder.peak_allocated, recorder.allocator.peak_reserved_bytes)
        self._stable = self._stable + 1 if (pattern, peak) == (self._last_pattern, self._peak_before) else 0
        self._last_pattern, self._peak_before = pattern, peak
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
        if self._stable < (_STABLE_STEPS if has_optimizer else _STABLE_BACKWARDS):
            return
        if not has_optimizer and not any(map(is_in_loop, own_frames(frame))):
            return
        if self._unplayed and self._lines.leave_loops(frame, self._unplayed):
            note = say("vgpu.stopping.jumped", first=steps - self._stable, last=steps)
            if note not in notes:
                notes.append(note)
            self._stable = 0
            return
        now = time.process_time(), time.monotonic()
        begun = self._repeats_since = self._repeats_since or now
        if self._unplayed and now[0] - begun[0] < _PLAY_ON_S and now[1] - begun[1] < _WAIT_ON_S:
            return
        self.not_played = self._unplayed
        if "eval" not in self._recorder.phase_peaks:
            notes.append(say("vgpu.stopping.no_evaluation"))
        self._end(say("vgpu.stopping.repeats", first=steps - self._stable, last=steps))

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
