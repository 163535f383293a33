"""When a script has shown enough: after the steps asked for, or when steps repeat and nothing is left to play."""

import itertools
import sys
import time
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from types import FrameType
from typing import NamedTuple

from tightfit.vgpu.accumulation import Accumulation
from tightfit.vgpu.chance import Draws
from tightfit.vgpu.evaluations import Evaluations
from tightfit.vgpu.frames import Frame, is_package, user_frames, users_line
from tightfit.vgpu.growth import Growth
from tightfit.vgpu.patches import trainers
from tightfit.vgpu.phases import EnoughSeen, Phases
from tightfit.vgpu.recorder import Recorder
from tightfit.vgpu.records import Settings
from tightfit.vgpu.running_loops import TrainingLoop, is_in_loop, own_frames
from tightfit.vgpu.unplayed import LineWatch
from tightfit.wording import say

_STABLE_ROUNDS = 2
"""Rounds that must have allocated exactly as the round before."""
_LONGEST_ROUND = 32
"""Steps in a round: a script with several optimizers has one for each, PPO one for each minibatch of a rollout."""
_STABLE_BACKWARDS = 10
"""Backward passes, without an optimizer of torch's, that must have: they may also be measurements of different things.
"""
_PLAY_ON_S = 20.0
"""Seconds of the processor that repeating steps play on for lines of the loop, or after it, that did not run yet."""
_WAIT_ON_S = 120.0
"""The same by the clock, for a script that waits, or a busy machine."""
_IN_VAIN_S = 40.0
"""Seconds of the processor that they do so altogether, however many iterations are passed over meanwhile, if no new
line runs and no peak rises."""
_KEPT_BYTES = 1 << 16
"""Bytes kept of a step for which it counts as unlike the one before."""
_LISTED_UNPLAYED = 10
_CALM_STEPS = 16
"""Steps without a higher peak from which a loop whose steps differ can be left."""
_CALM_STEPS_BEFORE_LONGEST = 4
"""The same where the batch with the longest sample is played before the loop ends."""
_MOST_EPOCHS = 16
"""Epochs of one loop that are shortened, until the script ends although nobody can leave the loop."""
_EPOCHS_OF_TRAINER = 2
"""Epochs of a library's trainer that are played up to their last batch."""


class _Step(NamedTuple):
    """The memory of one optimizer step."""

    allocations: tuple[int, ...]
    peak: int
    reserved: int
    """Highest reserved bytes."""
    held: int
    """Bytes of tensors that are there after it: blocks may be larger, wherever they lie."""

    def raises_none(self, before: "_Step") -> bool:
        """Return True if no peak is higher than after the step before."""
        return self[1:3] == before[1:3]

    def repeats(self, before: "_Step | None") -> bool:
        """Return True for a step like an earlier one. Tensors kept from each step may reach a peak again later."""
        return before is not None and self[:3] == before[:3] and self.held - before.held < _KEPT_BYTES


class _Round(NamedTuple):
    """How steps repeat."""

    patterns: frozenset[tuple[int, ...]]
    """Their allocations."""
    held: int
    """Bytes after one of them if all are alike."""


class Stopping:
    """Compares each optimizer step with the one before, and ends the script by EnoughSeen."""

    def __init__(self, settings: Settings, recorder: Recorder, phases: Phases, draws: Draws, notes: list[str]) -> None:
        """`notes` gets what jumps and an early end leave open."""
        self._settings, self._recorder, self._draws, self._notes = settings, recorder, draws, notes
        self.reason = say("vgpu.stopping.ended")
        self.not_played: list[Frame] = []
        """Lines that an early stop left out, although they may allocate."""
        self._mark = 0
        self._last: deque[_Step] = deque(maxlen=_LONGEST_ROUND)
        """Latest steps, the last one first."""
        self._equal = [0] * _LONGEST_ROUND
        """For a round of 1, 2, ... steps: steps in a row that were equal to the one a round before."""
        self._repeated: set[tuple[int, ...]] = set()
        """Steps that repeated when a library's trainer was asked to go on: of these, one suffices from then on."""
        self._passes_after = deque([0], maxlen=_LONGEST_ROUND + 1)
        """Forward and backward passes after each of the latest steps, the last one first."""
        self._phases = phases
        self._lines = LineWatch(phases)
        self._evaluations = Evaluations(recorder, phases, self._lines, notes)
        self._growth = Growth(recorder, self._lines)
        self._ended_epoch = False
        self._epochs_ended: Counter[Frame] = Counter()
        """Epochs that were shortened, by the loop that went on."""
        self._has_jumped = self._has_skipped = False
        self._evaluated = 0
        """Forward passes without gradients before the first step ended."""
        self._calm = 0
        """Steps in a row that did not repeat and did not raise a peak."""
        self._differing: dict[Frame, int] = {}
        """Loops that were left although their steps differ, and how many of these did not raise the peak."""
        self._is_left = False
        """True if the script, or a library's trainer, was ended before its own end."""
        self._asked = 0
        """Times that a library's trainer was asked to go on to something else."""
        self._given_up: list[Frame] = []
        """Lines that may allocate, of loops that repeated for too long."""
        self._repeats_since: tuple[float, float] | None = None
        """Seconds of the processor and of the clock."""
        self._progress: tuple[tuple[int, ...], float] = ((), 0.0)
        """Peaks and the number of lines that ran, and the seconds of the processor when one of them last rose."""
        self._allocating: set[Frame] = set()
        self._read_allocations = 0
        self._unplayed: list[Frame] = []

    @property
    def is_shortened(self) -> bool:
        """True if iterations that repeat were passed over."""
        return self._lines.taken.has_passed

    def after_step(self, steps: int, *, has_optimizer: bool) -> None:
        """Decide if another step could differ."""
        if steps == 1:
            self._evaluated = self._phases.evaluated
        recorder = self._recorder
        allocator = recorder.allocator
        step = _Step(self._pattern(), recorder.peak_allocated, allocator.peak_reserved_bytes, allocator.requested_bytes)
        self._draws.after_step(sum(size for size in step.allocations if size > 0))
        self._calm = self._calm + 1 if self._last and step.raises_none(self._last[0]) else 0
        earlier = itertools.zip_longest(self._last, self._equal)
        self._equal = [count + 1 if step.repeats(before) else 0 for before, count in earlier]
        if self._repeats_again(step):
            self._equal[0] = max(self._equal[0], _STABLE_ROUNDS)
        self._last.appendleft(step)
        self._passes_after.appendleft(self._phases.all_passes())
        if self._settings.steps is not None:
            if steps >= self._settings.steps:
                self._end(say("vgpu.stopping.steps_done", steps=steps))
        elif self._settings.until_stable:
            self._end_if_stable(steps, has_optimizer=has_optimizer)

    def _repeats_again(self, step: _Step) -> bool:
        """Return True for a step that repeated before, raises no peak, and is not on the way to an epoch's end."""
        raises_none = bool(self._last) and step.raises_none(self._last[0])
        return step.allocations in self._repeated and raises_none and not self._evaluations.is_ending()

    def shorten_evaluations(self) -> None:
        """Shorten evaluations, too, from now on."""
        self._phases.after_evaluation = self._evaluations.after_forward
        self._evaluations.install()
        Accumulation(self._recorder, self._phases, self._lines, self._notes).install()

    def cut_short(self, frame: FrameType | None, *, interrupted: bool) -> None:
        """Note that the time limit has passed, or that somebody ended the play, while the script was at `frame`.

        The device ends the script at the next operator.
        """
        self._lines.taken.is_cut_short = self._is_left = True
        seconds = f"{self._settings.timeout_s:g}" if self._settings.timeout_s else ""
        reason = say("vgpu.stopping.out_of_time", seconds=seconds)
        self.reason = say("vgpu.stopping.interrupted") if interrupted else reason
        line = users_line(user_frames(frame))
        self.not_played = self._unplayed or ([line] if line else [])

    def end_unset(self, error: BaseException, lines: Sequence[Frame]) -> None:
        """Note that a script read a name that only these lines set."""
        self._is_left = True
        self.reason = say("vgpu.stopping.unset", error=error)
        self.not_played = [*self.not_played, *lines]

    def close(self) -> None:
        for line, (smallest, largest) in self._draws.deciding():
            place = {"file": line.file, "line": line.line}
            self._note(say("vgpu.stopping.drawn", smallest=str(smallest), largest=str(largest), **place))
        saw_longest = self._evaluations.saw_longest() and not self._lines.taken.is_cut_short
        for loop, steps in self._differing.items():
            place = {"file": loop.file, "line": loop.line, "steps": steps}
            self._note(say("vgpu.stopping.longest", **place) if saw_longest else say("vgpu.stopping.differ", **place))
        far = self._lines.far_lines(is_left=self._is_left)
        left = self._lines.unplayed_of([*self._given_up, *self._lines.unsure, *far]) + (
            [] if saw_longest else list(self._differing)
        )
        unplayed = [each for each in (*self.not_played, *left) if each not in self._lines.closed]
        self.not_played = list(dict.fromkeys((*unplayed, *self._lines.changing, *self._lines.left.unlike)))
        self._lines.stop()

    def _end_if_stable(self, steps: int, *, has_optimizer: bool) -> None:
        """End when steps repeat and every line that may allocate ran, or when playing on took too long."""
        frame = sys._getframe(1)  # a frame that holds itself would keep the script's tensors until Python collects
        self._lines.start(frame)
        self._lines.follow(frame)
        self._lines.after_step()
        self._lines.read_around(frame)
        unplayed = self._lines.unplayed(frame, self._allocating_lines())[:_LISTED_UNPLAYED]
        self._unplayed = [each for each in unplayed if each not in self._given_up]
        first = self._repeats_from(steps, has_optimizer=has_optimizer)
        if first is not None and self._draws.goes_on():
            return
        loop = self._lines.training_loop(frame)
        if first is not None:
            self._calm = 0
            self._end_as_asked(first, steps)
        elif has_optimizer and loop is not None and self._is_calm():
            self._ends_differing(frame, loop)
        if first is None or not (has_optimizer or any(map(is_in_loop, own_frames(frame)))):
            return
        if trainers.is_engine(frame) and self._asks_engine(first, steps):
            self._equal = [0] * _LONGEST_ROUND
            return
        if loop is not None and loop.place.file.endswith(trainers.FILES) and self._asks_trainer(frame, loop):
            if self._equal[0] >= _STABLE_ROUNDS and trainers.ends_when_asked(loop.place.file):
                self._repeated.add(self._last[0].allocations)
            self._equal = [0] * _LONGEST_ROUND
            return
        if loop is not None and is_package(loop.place) and loop.place not in self._given_up:
            self._unplayed.append(loop.place)  # nobody knows what a package does only in some of its iterations
        state = self._state(steps - first + 1)
        self._unplayed += [each for each in self._hidden(frame, state) if each not in self._given_up]
        if self._lines.skip_ahead(frame, self._unplayed, state):
            self._after_skip(frame, first, state.patterns)
        is_late = self._repeats_for_long() or self._comes_no_further() or self._waits_in_vain(loop)
        differing = self._lines.differing(frame, state)
        more = bool(self._unplayed or self._given_up or differing)
        if more and (self._leaves_loops(frame, loop, state) or (is_late and self._gives_up(frame, loop))):
            if not self._has_jumped:  # said once, although a script may leave many loops
                self._note(say("vgpu.stopping.jumped", first=first, last=steps))
            self._has_jumped = True
            self._equal = [0] * _LONGEST_ROUND
        elif is_late or not (self._unplayed or differing):
            self._end_repeating(frame, first, steps, self._unplayed or differing)

    def _hidden(self, frame: FrameType, state: _Round) -> list[Frame]:
        """List loops in which later iterations may do more, and lines to play again."""
        found = self._lines.hidden(frame)
        return [*found, *self._growth.again(state.patterns), *self._lines.again(frame, self._draws.seldom())]

    def _after_skip(self, frame: FrameType, first: int, patterns: Hashable) -> None:
        """Note that iterations begin to be passed over, and loops in which later ones may do more."""
        if not self._has_skipped:  # said once, although many loops, or one many times, may be passed over
            self._note(say("vgpu.stopping.skipped", first=first))
        self._has_skipped = True
        self._growth.note(patterns)
        self._unplayed += [each for each in self._lines.hidden(frame) if each not in self._unplayed]
        self._repeats_since = None

    def _end_repeating(self, frame: FrameType, first: int, steps: int, not_played: list[Frame]) -> None:
        """End steps that repeat, unless the longest sample of their DataLoader or generator has not come yet."""
        if self._evaluations.go_to_longest() or self._lines.go_to_largest(frame):
            self._equal = [0] * _LONGEST_ROUND
            return
        self.not_played, self._is_left = not_played, True
        if "eval" not in self._recorder.phase_peaks and not self._phases.has_evaluated:
            self._note(say("vgpu.stopping.no_evaluation"))
        self._end(say("vgpu.stopping.repeats", first=first, last=steps))

    def _end_as_asked(self, first: int, steps: int) -> None:
        """End steps that repeat where the user asked for no more than them, or than an evaluation after one."""
        until = self._settings.until
        if until == "steps" or (until == "eval" and self._phases.evaluated > self._evaluated):
            self.not_played = self._unplayed
            self._end(say("vgpu.stopping.repeats", first=first, last=steps))

    def _ends_differing(self, frame: FrameType, loop: TrainingLoop) -> None:
        """Leave a loop with steps that differ, as those of samples of several lengths do, once its peak is reached.

        If the longest sample cannot be found, it may still come: the loop counts as not played to its end.
        """
        is_trainer = loop.place.file.endswith(trainers.FILES)
        if not (is_trainer or self._repeats_for_long()):
            return
        steps = self._differing.setdefault(loop.place, self._calm)
        self._calm, self._repeats_since = 0, None
        if not (is_trainer and self._asks_trainer(frame, loop)) and not self._gives_up(frame, loop):
            self._end(say("vgpu.stopping.calm", steps=steps))

    def _is_calm(self) -> bool:
        """Return True when enough steps that differ have left the peak as it is."""
        return self._calm >= (_CALM_STEPS_BEFORE_LONGEST if self._evaluations.can_find_longest() else _CALM_STEPS)

    def _repeats_for_long(self) -> bool:
        """Return True when steps have repeated for as long as they may, since they did for the first time."""
        if self._settings.until == "end":
            return False
        now = time.process_time(), time.monotonic()
        begun = self._repeats_since = self._repeats_since or now
        return now[0] - begun[0] >= _PLAY_ON_S or now[1] - begun[1] >= _WAIT_ON_S

    def _comes_no_further(self) -> bool:
        """Return True when steps repeat and nothing has been new for long, as in epochs that are all alike."""
        if self._settings.until == "end":
            return False
        now, last = time.process_time(), self._last[0]
        reached = (last.peak, last.reserved, self._lines.count_ran())
        if reached != self._progress[0]:
            self._progress = reached, now
        return now - self._progress[1] >= _IN_VAIN_S

    def _waits_in_vain(self, loop: TrainingLoop | None) -> bool:
        """Return True if no iteration comes to the lines of a training loop that did not run."""
        return loop is not None and self._lines.waits_in_vain([each for each in self._unplayed if loop.has(each)])

    def _asks_trainer(self, frame: FrameType, loop: TrainingLoop) -> bool:
        """Ask a library's trainer for an evaluation, then for the last batch of two epochs, then for its end.

        Return False if the trainer goes on after all three.
        """
        if self._asked > _EPOCHS_OF_TRAINER + 1:  # it ended since then, and another training began
            self._asked = 0
        if "end" in self._phases.asked:
            return False
        self._asked += 1
        self._is_left = True
        if self._asked == 1:
            self._phases.asked.add("evaluation")
        elif self._asked <= _EPOCHS_OF_TRAINER + 1:
            self._evaluations.end_epoch()
        elif trainers.ends_when_asked(loop.place.file):
            self._phases.asked.add("end")
        elif not self._lines.give_up_loop(frame):
            return False
        self._note(say("vgpu.stopping.trainer", file=loop.place.file, line=loop.place.line))
        return True

    def _asks_engine(self, first: int, steps: int) -> bool:
        """Ask an engine for the end of two epochs, then for its own; False if steps go on to repeat after that."""
        if self._asked > _EPOCHS_OF_TRAINER:
            return False
        self._asked += 1
        self._is_left = True
        if self._asked > _EPOCHS_OF_TRAINER:
            self._phases.asked.add("end")
        elif not self._evaluations.end_epoch():
            self._phases.asked.add("epoch")
        self._note(say("vgpu.stopping.jumped", first=first, last=steps))
        return True

    def _state(self, size: int) -> _Round:
        """Describe the steps that repeat: their allocations, and the allocated bytes if a round is one step."""
        patterns = frozenset(step.allocations for step, _ in zip(self._last, range(size), strict=False))
        return _Round(patterns, self._recorder.allocator.requested_bytes if len(patterns) == 1 else 0)

    def _leaves_loops(self, frame: FrameType, loop: TrainingLoop | None, state: Hashable) -> bool:
        """Leave training loops in which all lines ran: by the last batch of their DataLoader, or by a jump."""
        if loop is None or is_package(loop.place) or any(map(loop.has, self._unplayed)):
            return False
        if self._lines.passes_to_end(frame, has_batches=self._evaluations.has_batches()):
            return True
        ends = self._evaluations.end_epoch(self._lines.pace(frame))
        is_ending = self._evaluations.is_ending()
        if not self._ended_epoch and ends:
            self._lines.note_state(frame, state)
        elif self._lines.leave_loops(frame, self._unplayed, state, epoch_ends=is_ending):
            ends = True
        elif ends:  # the loop may begin its data anew without an end
            self._epochs_ended[loop.place] += 1
            ends = self._epochs_ended[loop.place] < _MOST_EPOCHS
        self._ended_epoch = self._ended_epoch or is_ending
        return ends

    def _gives_up(self, frame: FrameType, loop: TrainingLoop | None) -> bool:
        """Leave a training loop although some of its lines did not run, for the sake of the lines that follow."""
        if loop is None:
            return False
        if not self._ended_epoch and self._evaluations.end_epoch(self._lines.pace(frame)):
            self._ended_epoch = True
        elif not self._lines.give_up_loop(frame):
            return False
        self._given_up += filter(loop.has, self._unplayed)
        if is_package(loop.place):
            self._note(say("vgpu.stopping.package_loop", file=loop.place.file, line=loop.place.line))
        return True

    def _note(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)

    def _repeats_from(self, steps: int, *, has_optimizer: bool) -> int | None:
        """Return the first of the steps that repeat now, in the shortest round; None if they do not."""
        if not has_optimizer:
            return steps - self._equal[0] if self._equal[0] >= _STABLE_BACKWARDS else None
        passes = self._passes_after
        for size, count in enumerate(self._equal, start=1):
            # Without a pass in it, it is the parameters of one step that are alike, each with an optimizer of its own.
            # A script without modules that calls torch.autograd.grad has no passes that are counted.
            if count >= _STABLE_ROUNDS * size and (passes[0] > passes[size] or not passes[0]):
                return steps - count - size + 1
        return None

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
