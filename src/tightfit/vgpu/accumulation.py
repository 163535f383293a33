"""Equal passes of gradient accumulation are left out: the first ones and the last one of an optimizer step play.

Passes are equal once an iteration of their loop makes the same requests and releases, in the same order, as the one
before, leaves nothing behind and finds the allocator as it was: from the same state, the same requests lead to the
same state again. A loop is passed over only where its source, or its earlier runs, show that the optimizer steps after
it, or in it under a condition that its counters decide.
"""

import ast
import operator
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType, ModuleType
from typing import Any

from torch import Tensor

from tightfit.allocator.blocks import SegmentRecord
from tightfit.vgpu.assign import assign
from tightfit.vgpu.frames import user_frames, users_line
from tightfit.vgpu.longest_batch import are_of_one_size, stacks_samples
from tightfit.vgpu.loop_items import iterator_of, left_of, within_enumerate
from tightfit.vgpu.loop_source import calls_of_loop, loop_node, optimizer_calls, steps_after
from tightfit.vgpu.on_import import after_import
from tightfit.vgpu.phases import Phases
from tightfit.vgpu.recorder import Recorder
from tightfit.vgpu.skipping import Aims, Skip, lines_in_reach
from tightfit.vgpu.unplayed import LineWatch
from tightfit.wording import say

_SECONDS = 2.0
"""Time for following the counters of one loop."""
_REPEATS = 2
"""Passes that must be like the one before where the allocator's blocks change places, as those of two losses do."""
_PASSES_TO_FOLLOW = 2
"""Backward passes without an optimizer step from which lines are followed."""


@dataclass(slots=True)
class _Repeated:
    """Iterations of one loop, or passes of a step, compared with those before."""

    mark: int = 0
    pattern: tuple[int, ...] = ()
    peak: int = 0
    layout: list[SegmentRecord] = field(default_factory=list)
    count: int = 0

    def follow(self, recorder: Recorder) -> bool:
        """Compare the allocations since the last call; return True if another pass would be equal."""
        pattern = tuple(recorder.sizes_since(self.mark))
        allocator = recorder.allocator
        same = bool(pattern) and not sum(pattern)
        same = same and (pattern, allocator.peak_reserved_bytes) == (self.pattern, self.peak)
        self.count = self.count + 1 if same else 0
        self.mark, self.pattern, self.peak = len(recorder.events), pattern, allocator.peak_reserved_bytes
        layout = allocator.segments() if pattern and not sum(pattern) else []
        unmoved, self.layout = layout == self.layout, layout
        return self.count >= _REPEATS or (self.count > 0 and unmoved)


@dataclass(slots=True)
class _Passes(_Repeated):
    """Iterations of a loop within one optimizer step."""

    step: int = 0
    passes: int = 0
    skip: "_SkipToStep | None" = None


class Accumulation:
    """Passes over equal iterations with backward passes, up to the last one before the optimizer step."""

    def __init__(self, recorder: Recorder, phases: Phases, lines: LineWatch, notes: list[str]) -> None:
        self._recorder, self._phases, self._lines, self._notes = recorder, phases, lines, notes
        self._seen: dict[tuple[CodeType, int], _Passes] = {}
        self._accumulating: set[tuple[CodeType, int]] = set()
        """Loops that ran to their end before an optimizer step, and began again after it."""
        self._step = _Passes()
        self._wants_last = False
        """True when accelerate shall take the next pass for the last one of its step."""

    def install(self) -> None:
        self._phases.after_pass = self._after_pass
        self._lines.at_head = self._at_head
        after_import("accelerate.accelerator", self._change_accelerate)

    def _after_pass(self) -> None:
        """Follow the lines around passes without a step, and compare the passes themselves for accelerate."""
        phases = self._phases
        if phases.steps != self._step.step:
            self._step, self._wants_last = _Passes(mark=self._step.mark, step=phases.steps), False
        self._wants_last = self._step.follow(self._recorder)
        if phases.passes >= _PASSES_TO_FOLLOW:
            frame = sys._getframe(1)
            self._lines.start(frame)
            self._lines.follow(frame)

    def _change_accelerate(self, module: ModuleType) -> None:
        """Let `accumulate` take the next pass for the last one of its step once passes repeat."""
        accelerator = module.__dict__["Accelerator"]
        usual: Callable[..., object] = accelerator._do_sync

        def to_last(self: Any, *args: object) -> object:  # the library's own object
            left = self.gradient_state.num_steps - self.step % self.gradient_state.num_steps
            if following._is_asking() and left > 1:
                self.step = -1  # counted up to 0, a multiple of every number of passes
                following._wants_last = False
                following._tell(sys._getframe(1))
            return usual(self, *args)

        following = self
        assign(accelerator, _do_sync=to_last)

    def _is_asking(self) -> bool:
        """Return True if the passes of the running step repeat."""
        return self._wants_last and self._phases.steps == self._step.step

    def _at_head(self, frame: FrameType, first: int) -> None:
        """Compare an iteration that ended with the one before; pass over those that would be equal."""
        phases, place = self._phases, (frame.f_code, first)
        seen = self._seen.get(place)
        if not phases.has_optimizer or (seen and (seen.step, seen.passes) == (phases.steps, phases.passes)):
            return
        if seen is None or seen.step != phases.steps:
            if seen and seen.count and seen.step == phases.steps - 1 and iterator_of(frame) is None:
                self._accumulating.add(place)
            self._seen[place] = _Passes(mark=len(self._recorder.events), step=phases.steps, passes=phases.passes)
            return
        seen.passes = phases.passes
        repeats = seen.follow(self._recorder)
        skip, seen.skip = seen.skip, None
        if not repeats:
            return
        if skip is None:
            seen.skip = skip = self._skip_of(frame, place)
        elif count := skip.pass_over(frame, iterator_of(frame)):
            self._lines.take_away(frame, first, count)
            self._tell(frame)
        if skip is not None:
            self._lines.forget_names(frame, skip.names)

    def _skip_of(self, frame: FrameType, place: tuple[CodeType, int]) -> "_SkipToStep | None":
        code, first = place
        node = loop_node(code.co_filename, code.co_firstlineno, code.co_name, first)
        if node is None:
            return None
        plain, behind = optimizer_calls(node)
        if plain or (
            not behind
            and place not in self._accumulating
            and not steps_after(node, code.co_filename, code.co_firstlineno, code.co_name)
        ):
            return None
        calls = calls_of_loop(code.co_filename, code.co_firstlineno, code.co_name, first)
        ran = self._lines.ran(code)
        missing = lines_in_reach(node, {abs(call.first) for call in calls if call.is_missed(ran)})
        return _SkipToStep(frame, node, missing, ran, lines_in_reach(node, behind))

    def _tell(self, frame: FrameType) -> None:
        line = users_line(user_frames(frame))
        if line is not None:
            note = say("vgpu.accumulation.left_out", file=line.file, line=line.line)
            if note not in self._notes:
                self._notes.append(note)


class _SkipToStep(Skip):
    """Passes over the iterations of one loop up to the one that steps the optimizer, or up to the last."""

    def __init__(
        self,
        frame: FrameType,
        node: ast.For | ast.While,
        missing: Collection[int],
        ran: Collection[int],
        steps: Collection[int],
    ) -> None:
        """`steps` are lines of optimizer steps in the loop; one iteration runs before any can be passed over."""
        super().__init__(Aims(node, missing, ran))
        self._to_play, self._step_lines = {*missing, *steps}, steps
        self._missing = self._to_play
        self.names = frame.f_locals
        self._before = self._expected(frame, self.names, frame.f_globals)

    def pass_over(self, frame: FrameType, items: object) -> int:
        """Move the loop's counters over the iterations that can be left out; return their number."""
        self.names = frame.f_locals  # read once, as in `Skip.at_head`
        assert self._before is not None
        self._compare(*self._before, self.names, frame.f_globals)
        is_for = isinstance(self._node, ast.For)
        left = _items_left(items) if is_for else None
        if is_for and (items is None or (left is None and not self._step_lines)):
            return 0
        most = sys.maxsize if left is None else left - 1
        if self._step_lines:
            reached, found = self._followed(frame, self._step_lines, most)
            if not found and (left is None or reached < most):  # else the last item has the step
                return 0
            most = reached
        elif not is_for:
            most = self._followed(frame, (), most)[0] - 1
        count, _ = self._followed(frame, self._to_play, most, keep=True)
        return count

    def _followed(self, frame: FrameType, lines: Collection[int], most: int, *, keep: bool = False) -> tuple[int, bool]:
        """Count iterations before one that runs some of the lines, and if there is one; `keep` the counters there."""
        self._missing = set(lines)
        each, _ = self._code(frame, self.names, frame.f_globals)
        if lines and set(lines) <= each.reduced.unknown:
            return (most, False) if keep and most < sys.maxsize else (0, False)
        start = before = each.values()
        count, until = 0, time.monotonic() + _SECONDS
        found = False
        while count < most and not found and time.monotonic() < until:
            before = each.values()
            found = not self._runs(each, self.steps)
            count += not found
        if found or not keep:
            self._restore(before if keep else start, each)
        return count, found


def _items_left(items: object) -> int | None:
    """Return the number of items that an iterator still has; None where it does not show, or items of a list differ.

    Batches that are filled up to their longest sample count as none: each has to be played.
    """
    items = within_enumerate(items)
    if type(items) in _RANGES:
        return operator.length_hint(items)
    if type(items) in _SEQUENCES:
        parts: Any = items.__reduce__()  # the sequence, and the place in it
        left = parts[1][0][parts[2] - 1 if len(parts) > 2 else 0 :]
        return max(0, len(left) - 1) if all(_kind(each) == _kind(left[0]) for each in left) else None
    from torch.utils.data import dataloader

    if isinstance(items, dataloader._BaseDataLoaderIter):
        try:
            count = len(items._dataset)  # type: ignore[arg-type]
        except TypeError:
            return None
        return left_of(items) if stacks_samples(items._collate_fn) or are_of_one_size(items._dataset, count) else 0
    return None


_RANGES = (type(iter(range(0))), type(iter(range(1 << 70))))
_SEQUENCES = (type(iter([0])), type(iter((0,))))


def _kind(item: object) -> object:
    """Describe an item by the types and shapes within it."""
    match item:
        case Tensor():
            return item.shape, item.dtype, item.device
        case Mapping():
            return [(key, _kind(value)) for key, value in item.items()]
        case list() | tuple():
            return [_kind(each) for each in item]
    return type(item)
