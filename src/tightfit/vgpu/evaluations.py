"""Long loops without gradients: iterations that repeat are left out, and the last batch still comes."""

import contextlib
import ctypes
import inspect
import itertools
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from types import CodeType, FrameType, GeneratorType
from typing import TYPE_CHECKING, TypeGuard

from tightfit.vgpu.assign import assign
from tightfit.vgpu.frames import Frame
from tightfit.vgpu.longest_batch import longest, stacks_samples
from tightfit.vgpu.loop_items import FAILURES, length_of, within_enumerate
from tightfit.vgpu.loop_source import calls_of_loop
from tightfit.vgpu.phases import Phases
from tightfit.vgpu.recorder import Recorder
from tightfit.vgpu.running_loops import counted_frames, innermost_loop, own_frames
from tightfit.vgpu.unplayed import LineWatch
from tightfit.wording import say

if TYPE_CHECKING:
    from torch.utils.data import dataloader

_REPEATS = 3
"""Iterations in a row that must have allocated as the one before, and left nothing."""
_CALM_PASSES = 64
"""Forward passes in a row, of one place of a loop, that differ and raise no peak: then the loop goes on to its largest
item.
"""
_CALM_PASSES_AGAIN = 16
"""The same for a loop that was left so before."""
_PASSES_OF_A_BATCH = 8
"""Forward passes without gradients that one batch may have: a model in parts has one for each."""
_CALM_SECONDS = 5.0
"""Seconds of the processor that such a loop plays at least, when it runs for the first time."""
_BLOCK = 512
_MOST_LOOKED_AT = 100_000
"""Batches of an epoch among which the longest sample is looked for."""
_SECONDS = 5.0
"""Time for drawing the numbers of an epoch's samples: some epochs have 10 ** 10 of them."""
_MOST_AHEAD = 10_000
"""Batches ahead of a loop that are looked at before some are passed over."""
_DRAWN_AT_ONCE = 256


class Repetition:
    """Follows one place of a loop: True from `repeats` when its iterations allocate the same and leave nothing."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._mark = recorder, len(recorder.events)
        self._pattern: tuple[int, ...] = ()
        self._peak = recorder.allocator.peak_reserved_bytes
        self.count = 0
        self.calm, self._begun = 0, time.process_time()

    def is_calm(self, *, again: bool) -> bool:
        """Return True if iterations that differ raised no peak for long; sooner where they did so before (`again`)."""
        if again:
            return self.calm >= _CALM_PASSES_AGAIN
        return self.calm >= _CALM_PASSES and time.process_time() - self._begun >= _CALM_SECONDS

    def repeats(self) -> bool:
        sizes = self._recorder.sizes_since(self._mark)
        pattern = tuple(size // _BLOCK if size < 0 else -(-size // _BLOCK) for size in sizes)  # away from 0
        peak = self._recorder.allocator.peak_reserved_bytes
        same = bool(pattern) and not sum(pattern) and (pattern, peak) == (self._pattern, self._peak)
        self.count = self.count + 1 if same else 0
        self.calm = self.calm + 1 if peak == self._peak else 0
        self._mark, self._pattern, self._peak = len(self._recorder.events), pattern, peak
        return self.count >= _REPEATS


class Evaluations:
    """Shortens loops of forward passes without gradients, by leaving a `for` statement or ending a DataLoader's epoch.

    A loop with lines that may allocate and never ran is left alone.
    """

    def __init__(self, recorder: Recorder, phases: Phases, lines: LineWatch, notes: list[str]) -> None:
        self._recorder, self._phases, self._lines, self._notes = recorder, phases, lines, notes
        self._places: dict[tuple[CodeType, int], Repetition] = {}
        self._loop: tuple[CodeType, int, int] | None = None
        self._calm: set[object] = set()
        """Loops, and identities of datasets, that were left although their iterations differ."""
        self._asked_after = -_PASSES_OF_A_BATCH - 1
        """Forward passes without gradients before a DataLoader was asked last."""
        self._latest: weakref.ref[object] = weakref.ref(self)
        """Batches of the DataLoader that was asked last."""
        self._ending: weakref.ref[object] | None = None
        self._looked_at: set[int] = set()
        """Datasets by their identity: one look at the lengths of their samples is enough."""
        self.found_longer = False
        self._seen_whole: set[int] = set()
        """Those of them whose samples were all looked at."""
        self._last_played: set[int] = set()
        """Datasets of which the last batch of an epoch was not passed over."""
        self._ended: set[int] = set()
        """Datasets of the epochs that were asked to go on to their last batch."""
        self._given_ahead = _GivenAhead()
        self._long: dict[int, object | None] = {}
        """Last batches, where they are known, of the samplers with more of them than can be drawn, by their identity.
        """

    def after_forward(self) -> None:
        """Look at the innermost loop around a forward pass that has ended: the user's, or one of a package in it."""
        around = ((each, innermost_loop(each), is_package) for each, is_package in counted_frames(sys._getframe(1)))
        frame, loop, _ = next((each for each in around if each[1] or not each[2]), (None, None, True))
        if frame is None or loop is None:
            return
        here = (frame.f_code, loop.first, self._phases.learned())
        if here != self._loop:
            self._places.clear()
            self._loop = here
        place = self._places.get((frame.f_code, frame.f_lineno))
        if place is None:
            self._places[frame.f_code, frame.f_lineno] = Repetition(self._recorder)
            return
        repeats = place.repeats()
        if place.count == 1 or place.calm == _CALM_PASSES_AGAIN // 2:
            self._lines.start(frame)
            self._lines.follow(frame)
        differs = not repeats and not self._is_of_loader() and self._is_calm(place, (frame.f_code, loop.first))
        if repeats or differs:
            note = partial(self._tell, self._place(frame), differs=differs)
            missed = self._missed(frame, loop.first)
            self._lines.left.leave_if_closed(frame.f_code, loop, missed, note, differs=differs)
            self._loop = None

    def _is_calm(self, passes: Repetition, loop: object) -> bool:
        """Return True for a loop, or a dataset, with passes that differ but raised no peak for long."""
        if not passes.is_calm(again=loop in self._calm):
            return False
        self._calm.add(loop)
        return True

    def _is_of_loader(self) -> bool:
        """Return True if a DataLoader gave the batch of the latest forward passes."""
        return self._phases.evaluated - self._asked_after <= _PASSES_OF_A_BATCH

    def _missed(self, frame: FrameType, first: int) -> list[int]:
        code = frame.f_code
        ran = self._lines.ran(code)
        calls = calls_of_loop(code.co_filename, code.co_firstlineno, code.co_name, first)
        return [call.first for call in calls if call.is_missed(ran)]

    def _place(self, frame: FrameType | None) -> Frame | None:
        place = next(own_frames(frame), None)
        return Frame(place.f_code.co_filename, place.f_lineno, place.f_code.co_qualname) if place else None

    def _tell(self, where: Frame | None, *, differs: bool = False) -> None:
        if where is not None:
            place = {"file": where.file, "line": where.line}
            note = say("vgpu.evaluations.calm", **place) if differs else say("vgpu.evaluations.left_out", **place)
            if note not in self._notes:
                self._notes.append(note)

    def install(self) -> None:
        """Let DataLoaders go on to their last batch when an evaluation's batches repeat."""
        from torch.utils.data import dataloader

        usual: Callable[..., object] = dataloader._BaseDataLoaderIter.__next__
        followed: dict[int, tuple[int, int, Repetition]] = {}

        def following(batches: "dataloader._BaseDataLoaderIter") -> object:
            if self._lines.taken.is_passing and self._drops_next(batches):
                return self._given_ahead.stand_in(batches, sys._getframe(1))
            self._latest = weakref.ref(batches)
            learned, evaluated = self._phases.learned(), self._phases.evaluated
            self._asked_after = evaluated
            before = followed.get(id(batches))
            if before is None or before[0] != learned or before[1] == evaluated or not batches._num_yielded:
                followed[id(batches)] = (learned, evaluated, Repetition(self._recorder))
            else:
                followed[id(batches)] = (learned, evaluated, before[2])
                repeats = before[2].repeats()
                differs = not repeats and self._is_calm(before[2], id(batches._dataset))
                if (repeats or differs) and self._to_last(batches):
                    self._tell(self._place(sys._getframe(1)), differs=differs)
            return usual(batches)

        assign(dataloader._BaseDataLoaderIter, __next__=following)
        self._lines.has_to_run = self._has_to_run
        taken = self._lines.taken
        taken.took, taken.after_passing = self._given_ahead.took, self._given_ahead.load

    def _drops_next(self, batches: "dataloader._BaseDataLoaderIter") -> bool:
        """Take the next batch of an epoch away without loading it, unless it is the last one."""
        return _is_of_map(batches) and _ahead_of(batches).drop()

    def _has_to_run(self, items: object, count: int) -> bool:
        """Return True if the next `count` items of a loop have the last batch of an epoch, or the longest sample."""
        items = within_enumerate(items)
        batches = self._latest() if isinstance(items, GeneratorType) else items
        if not _is_of_map(batches):
            return False
        left = _ahead_of(batches)
        if not left.is_looked_at:
            left.is_looked_at = True
            if not stacks_samples(batches._collate_fn):
                skipped = left.seen_ahead(_MOST_AHEAD)
                left.kept = self._longest(batches, skipped, max(len(skipped), length_of(items) or 0))
        ends = left.ends_within(count) and id(batches._dataset) not in self._last_played
        if ends:
            self._last_played.add(id(batches._dataset))
        return ends or left.keeps_within(count)

    def end_epoch(self, pace: int = 1) -> bool:
        """Let the DataLoader that was asked last go on to its last batch; return True if that leaves any out.

        `pace`: batches of one optimizer step. As many come before the last one that the epoch ends as it would.
        """
        batches = self._latest()
        ends = self._to_last(batches, pace)
        if ends:
            self._ending = weakref.ref(batches)
        if _is_of_map(batches):
            self._ended.add(id(batches._dataset))
        return ends

    def saw_longest(self) -> bool:
        """Return True if the longest samples of all epochs that were asked to end were found, and come before that."""
        return bool(self._ended) and self._ended <= self._seen_whole

    def go_to_longest(self) -> bool:
        """Let the DataLoader that was asked last go on to its longest sample; False if all are of one size."""
        self.found_longer = False
        return self.can_find_longest() and self.end_epoch() and self.found_longer

    def has_batches(self) -> bool:
        """Return True if a DataLoader was asked for a batch of a dataset with numbered items."""
        return _is_of_map(self._latest())

    def can_find_longest(self) -> bool:
        """Return True if the samples of the DataLoader that was asked last can be looked at, and may differ in size."""
        batches = self._latest()
        return _is_of_map(batches) and not stacks_samples(batches._collate_fn)

    def is_ending(self) -> bool:
        """Return True while that DataLoader is on its way to the last batch."""
        return self._ending is not None and self._ending() is self._latest() is not None

    def _to_last(self, batches: object, pace: int = 1) -> bool:
        """Let the epoch go on to its last batch; return True if that leaves any out.

        The batch with the largest sample comes before it. The sampler may go on after the epoch: some loaders keep one
        for all epochs.
        """
        if not _is_of_map(batches):
            return False
        try:
            length = len(batches._index_sampler)
        except TypeError:
            return False
        sent: int = getattr(batches, "_send_idx", batches._num_yielded)
        left: Iterator[object] = batches._sampler_iter
        count = -sent % max(length, 1)
        dropped, looked_for = (left.dropped, left.kept) if isinstance(left, _Ahead) else ([], [])
        sampler = batches._index_sampler
        with self._phases.untraced():  # a sampler may be the script's own, and fail
            first, last, drawn = _drawn(left, count) if id(sampler) not in self._long else ([], [], 0)
        if drawn < count:
            end = self._long.setdefault(id(sampler), _last_of(sampler, last))
            if end is None:
                assign(batches, _sampler_iter=itertools.chain(last, left))
                return False
            last, left = [end], iter(())
        kept = self._longest(batches, [*dropped, *first], len(dropped) + count)
        kept = kept or [each for each in first if any(each is one for one in looked_for)]
        before = (count - len(kept) - 1) % pace
        last = [*first[len(first) - before :], *last] if before < len(first) else last
        assign(batches, _sampler_iter=itertools.chain(kept, last, left))
        self._lines.taken.has_passed |= count > 1
        return count > 1

    def _longest(self, batches: "dataloader._BaseDataLoaderIter", skipped: list[object], count: int) -> list[object]:
        """Return another batch and that with the largest sample of these, if their samples are not all of one size."""
        if stacks_samples(batches._collate_fn) or id(batches._dataset) in self._looked_at:
            return []
        self._looked_at.add(id(batches._dataset))
        with self._phases.untraced():
            found = longest(batches._dataset, skipped)
        self.found_longer = found.place is not None
        if found.seen >= count - 1:
            self._seen_whole.add(id(batches._dataset))
        if found.seen < count - 1 and found.place is not None:
            note = say("vgpu.evaluations.longest_of_some", seen=found.seen, all=count - 1)
            if note not in self._notes:
                self._notes.append(note)
        if found.place is None:
            return []
        # With one before it, gradients are there as in the middle of an accumulation, which needs most.
        return [skipped[found.place - 1 if found.place else 1], skipped[found.place]]


def _is_of_map(batches: object) -> "TypeGuard[dataloader._BaseDataLoaderIter]":
    """Return True for batches of a DataLoader over a dataset with numbered items."""
    module = import_module("torch.utils.data.dataloader")
    return isinstance(batches, module._BaseDataLoaderIter) and batches._dataset_kind == module._DatasetKind.Map


def _ahead_of(batches: "dataloader._BaseDataLoaderIter") -> "_Ahead":
    left = batches._sampler_iter
    if not isinstance(left, _Ahead):
        left = _Ahead(left)
        assign(batches, _sampler_iter=left)
    return left


def _drawn(left: Iterator[object], count: int) -> tuple[list[object], list[object], int]:
    """Take `count` batches of a sampler, or as many as come in the time: the first ones, the last, their number."""
    first: list[object] = []
    last: list[object] = []
    drawn, until = 0, time.monotonic() + _SECONDS
    while drawn < count and time.monotonic() < until:
        batches = list(itertools.islice(left, min(count - drawn, _DRAWN_AT_ONCE)))
        if not batches:
            return first, last, count
        drawn += len(batches)
        first += [*last, *batches[:-1]][: _MOST_LOOKED_AT - len(first)]
        last = batches[-1:]
    return first, last, drawn


def _last_of(sampler: object, drawn: list[object]) -> object | None:
    """Return an epoch's last batch, made of numbers that were drawn; None if its size is unknown."""
    from torch.utils.data import BatchSampler

    numbers = drawn[0] if drawn else None
    if type(sampler) is not BatchSampler or not isinstance(numbers, list):
        return None
    size = 0 if sampler.drop_last else len(sampler.sampler) % sampler.batch_size  # type: ignore[arg-type]
    return numbers[:size] if size else numbers


class _Ahead:
    """Batches of a sampler of which all but the last can be dropped."""

    def __init__(self, left: Iterator[object]) -> None:
        self._left, self._next = left, deque[object]()
        self.dropped: list[object] = []
        self.kept: list[object] = []
        """Batches that are not to be dropped."""
        self.is_looked_at = False
        """True once they were looked for."""
        self.passed = 0
        """Batches that were dropped."""

    def __iter__(self) -> "_Ahead":
        return self

    def __next__(self) -> object:
        return self._next.popleft() if self._next else next(self._left)

    def seen_ahead(self, count: int) -> list[object]:
        """Return the next batches, which still come; as many as there are, if not `count`."""
        self._next.extend(itertools.islice(self._left, max(count - len(self._next), 0)))
        return list(itertools.islice(self._next, count))

    def ends_within(self, count: int) -> bool:
        """Return True if there are no more than `count` batches."""
        return len(self.seen_ahead(count + 1)) <= count

    def keeps_within(self, count: int) -> bool:
        """Return True if one of the next `count` batches is kept."""
        return any(each is kept for each in self.seen_ahead(count) for kept in self.kept)

    def drop(self) -> bool:
        """Drop the next batch; False if it is the last one or there is none."""
        if len(self.seen_ahead(2)) < 2:
            return False
        batch = self._next.popleft()
        self.passed += 1
        if len(self.dropped) < _MOST_LOOKED_AT:
            self.dropped.append(batch)
        self._latest = batch
        return True

    def take_back(self) -> None:
        """Let the batch that was dropped last come next."""
        self._next.appendleft(self._latest)
        self.passed -= 1
        if self.dropped and self.dropped[-1] is self._latest:
            self.dropped.pop()


class _StandIn:
    """Stands for a batch that was dropped."""


class _GivenAhead:
    """A batch that a generator around a DataLoader, such as accelerate's, holds for its next item.

    If that batch was dropped, it is loaded after all, once no more iterations are passed over.
    """

    def __init__(self) -> None:
        self._count = 0
        """Batches that were dropped and are not among the items that were taken away since."""
        self._held: tuple[dataloader._BaseDataLoaderIter, FrameType, _StandIn] | None = None
        """The batches, the function that took the latest dropped one, and what stands for it."""

    def stand_in(self, batches: "dataloader._BaseDataLoaderIter", taker: FrameType) -> _StandIn:
        """Return the stand-in that a function gets for a dropped batch."""
        stand_in = _StandIn()
        if taker.f_code.co_flags & inspect.CO_GENERATOR:
            self._held = (batches, taker, stand_in)
            self._count += 1
        return stand_in

    def took(self, item: object) -> None:
        """Note an item that a loop does not get."""
        self._count -= _has_stand_in(item)

    def load(self) -> None:
        """Load the latest batch if its place in an epoch is still to come."""
        held, count = self._held, self._count
        self._held, self._count = None, 0
        if held is None or not count:
            return
        batches, taker, stand_in = held
        names = taker.f_locals
        places = [name for name, value in names.items() if value is stand_in]
        if places:
            _ahead_of(batches).take_back()
            with contextlib.suppress(StopIteration, *FAILURES):  # the script's own
                names |= dict.fromkeys(places, next(batches))
        if sys.version_info < (3, 13):
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(taker), ctypes.c_int(0))
            names.clear()  # Python keeps them with the frame, and so the tensors of now


def _has_stand_in(item: object) -> bool:
    return isinstance(item, _StandIn) or (isinstance(item, tuple) and any(map(_has_stand_in, item)))
