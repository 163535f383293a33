"""One virtual GPU in this process, from the patches of torch to the end of the script."""

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from tightfit.allocator.caching import AllocatorSettings, CachingAllocator
from tightfit.errors import ConfigError, DeviceError
from tightfit.gpus import GPU, context_bytes, resolve_gpu
from tightfit.kernels.card import Card
from tightfit.vgpu import patches
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.frames import Frame
from tightfit.vgpu.patches import backend, lazy_dynamo
from tightfit.vgpu.patches.files import FileGuard
from tightfit.vgpu.phases import EnoughSeen, Phases
from tightfit.vgpu.snapshot import TraceLog, write_snapshot
from tightfit.vgpu.unplayed import LineWatch

_STABLE_STEPS = 2
"""Steps in a row that must have allocated exactly what the step before did."""
_PLAY_ON_S = 20.0
"""Seconds that repeating steps play on for lines of the loop, or after it, that did not run yet."""
_LISTED_UNPLAYED = 10
_DEFAULT_CUDA = (13, 0)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The card, its free memory, and the condition to stop at."""

    gpu: str
    memory_bytes: int | None = None
    """Total memory as the driver reports it, instead of the table's."""
    used_bytes: int = 0
    """Bytes that other processes hold."""
    context_bytes: int | None = None
    """Bytes of this process outside PyTorch's allocator, instead of the table's estimate."""
    capability: tuple[int, int] | None = None
    steps: int | None = None
    """Stop after so many optimizer steps, whatever they allocate."""
    until_stable: bool = True
    """Stop when steps repeat."""
    timeout_s: float | None = None
    """Stop at the first operator after so many seconds."""
    snapshot: str | None = None
    """File for PyTorch's memory snapshot of the end."""
    timeline: bool = False
    """Add the data of a timeline picture to the findings."""
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1; leave it out to stop when steps repeat")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise ConfigError(f"timeout={self.timeout_s:g} must be more than 0 seconds")


class VirtualSession:
    """The virtual GPU of this process; there is one, and it stays until the process ends."""

    _running: "VirtualSession | None" = None

    def __init__(self, request: Request) -> None:
        self.request = request
        lazy_dynamo.keep_dynamo_out()
        self.gpu: GPU
        self.gpu, self.notes = resolve_gpu(
            request.gpu, memory_bytes=request.memory_bytes, capability=request.capability
        )
        total = request.memory_bytes or self.gpu.planning_bytes
        context, why_context = (
            (request.context_bytes, "") if request.context_bytes is not None else context_bytes(self.gpu)
        )
        if why_context:
            self.notes.append(why_context)
        self.allocator = CachingAllocator(
            total_bytes=total,
            used_by_others=request.used_bytes,
            context_bytes=context,
            settings=AllocatorSettings.from_environment(request.environ),
        )
        self.phases = Phases(self._after_step)
        major, minor = (int(part) for part in torch.__version__.split(".")[:2])
        card = Card(
            capability=self.gpu.capability,
            sm_count=self.gpu.sm_count,
            torch_version=(major, minor),
            cuda_version=_cuda_version(),
        )
        self.device = VirtualDevice(card, self.allocator, self.phases)
        TraceLog.attach(self.device.recorder)
        self.stopped_because = "the script ended"
        self._mark = 0
        self._last_pattern: tuple[int, ...] = ()
        self._stable = 0
        self._peak_before = (0, 0)
        self._files: FileGuard
        self._lines = LineWatch()
        self._repeats_since: float | None = None
        self._allocating: set[Frame] = set()
        self._read_allocations = 0
        self._unplayed: list[Frame] = []
        self.not_played: list[Frame] = []
        """Lines that an early stop left out, although they may allocate."""

    @contextmanager
    def active(self) -> Iterator["VirtualSession"]:
        """Run the lines within on the device; EnoughSeen ends them early."""
        if VirtualSession._running not in (None, self):
            raise DeviceError(
                f"this process already has a virtual {VirtualSession._running.gpu.name}, and a process has one; "
                "use tightfit.dryrun for each card, or a process each"
            )
        if VirtualSession._running is None:
            self._files = patches.install(self.device, self.gpu)
            self.phases.install()
            backend.self_test()
            VirtualSession._running = self
        timer = self._start_timer()
        try:
            with self._files.watching(), self.device.mode():
                yield self
        except EnoughSeen:
            pass
        finally:
            self._lines.stop()
            if timer is not None:
                timer.cancel()
            self.device.recorder.settle()
            self.device.roles.mark_all()
            for end in self.device.at_end:
                end()
            if self.request.snapshot is not None:
                write_snapshot(self.device.recorder, self.request.snapshot)

    def _start_timer(self) -> threading.Timer | None:
        if self.request.timeout_s is None:
            return None

        def late() -> None:
            self.stopped_because = f"{self.request.timeout_s:g} seconds had passed"
            self.not_played = self._unplayed
            self.device.out_of_time = True

        timer = threading.Timer(self.request.timeout_s, late)
        timer.daemon = True
        timer.start()
        return timer

    def _after_step(self) -> None:
        """Decide after each optimizer step whether another could differ."""
        recorder = self.device.recorder
        self.device.roles.mark_all()
        pattern = self._pattern()
        peak = (recorder.peak_allocated, recorder.allocator.peak_reserved_bytes)
        self._stable = self._stable + 1 if (pattern, peak) == (self._last_pattern, self._peak_before) else 0
        self._last_pattern, self._peak_before = pattern, peak
        steps = self.phases.steps
        if self.request.steps is not None:
            if steps >= self.request.steps:
                self._end(f"{steps} steps were asked for")
        elif self.request.until_stable:
            self._end_if_stable()

    def _end_if_stable(self) -> None:
        """End when steps repeat and every line that may allocate ran, or when playing on took too long."""
        recorder, frame = self.device.recorder, sys._getframe()
        steps = self.phases.steps
        self._lines.start(frame)
        self._lines.follow(frame)
        self._unplayed = self._lines.unplayed(frame, self._allocating_lines())[:_LISTED_UNPLAYED]
        if self._stable >= _STABLE_STEPS:
            self._repeats_since = self._repeats_since or time.monotonic()
            if self._unplayed and time.monotonic() - self._repeats_since < _PLAY_ON_S:
                return
            self.not_played = self._unplayed
            if "eval" not in recorder.phase_peaks:
                self.notes.append(
                    "no evaluation was seen before the steps repeated; if the script makes one later, "
                    "its memory is not in this: --steps goes on"
                )
            self._end(
                f"steps {steps - self._stable} to {steps} made the same allocations in the same order, "
                "and the peak did not grow"
            )

    def _allocating_lines(self) -> set[Frame]:
        """Return the user's lines that allocated so far; each call reads only the allocations made since the last."""
        allocations = self.device.recorder.allocations
        self._allocating.update(place for each in allocations[self._read_allocations :] for place in each.frames)
        self._read_allocations = len(allocations)
        return self._allocating

    def _end(self, reason: str) -> None:
        self.stopped_because = reason
        raise EnoughSeen(reason)

    def _pattern(self) -> tuple[int, ...]:
        """The step's allocations and releases by size; which object it was does not matter."""
        recorder = self.device.recorder
        events, allocations = recorder.events, recorder.allocations
        pattern = tuple(
            allocations[number - 1].nbytes if number > 0 else -allocations[-number - 1].nbytes
            for number in events[self._mark :]
        )
        self._mark = len(events)
        return pattern


def _cuda_version() -> tuple[int, int]:
    """CUDA version of this build of torch; without CUDA, the default one of torch 2.11 to 2.15."""
    if torch.version.cuda is None:
        return _DEFAULT_CUDA
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)
