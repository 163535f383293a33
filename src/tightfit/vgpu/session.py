"""One virtual GPU in this process, from the patches of torch to the end of the script."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import torch

from tightfit.allocator.caching import AllocatorSettings, CachingAllocator
from tightfit.allocator.tape import TapedAllocator
from tightfit.errors import DeviceError
from tightfit.gpus import GPU, all_gpus, context_bytes, resolve_gpu
from tightfit.kernels.card import Card
from tightfit.vgpu import patches
from tightfit.vgpu.assumed import Assumed
from tightfit.vgpu.card_arguments import torch_versions
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.frames import Frame
from tightfit.vgpu.lazy_dynamo import keep_dynamo_out
from tightfit.vgpu.patches import backend, generation, random_numbers, trainers
from tightfit.vgpu.patches.files import FileGuard
from tightfit.vgpu.phases import EnoughSeen, Phases
from tightfit.vgpu.records import END_SIGNAL, Settings
from tightfit.vgpu.snapshot import TraceLog, write_snapshot
from tightfit.vgpu.stopping import Stopping
from tightfit.vgpu.unset_names import lines_that_set
from tightfit.wording import say

_PATIENCE_S = 3.0
"""Seconds that a script without operators has before it is ended where it is."""
_DEFAULT_CUDA = (
    ((2, 11), (13, 0)),
    ((2, 8), (12, 8)),
    ((2, 7), (12, 6)),
    ((2, 5), (12, 4)),
    ((2, 1), (12, 1)),
    ((2, 0), (11, 7)),
)
"""CUDA of torch's wheels on PyPI, by the first version of torch that has it (compatibility matrix in RELEASE.md)."""


class VirtualSession:
    """The virtual GPU of this process; there is one, and it stays until the process ends."""

    _running: "VirtualSession | None" = None
    allocator_kind: type[CachingAllocator] = CachingAllocator
    _has_ended = False
    other_cards: Sequence[str] = ()
    """Names of cards for which the play may hold, too."""

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str] | None = None,
        *,
        guards_files: bool = True,
        is_tested: bool = False,
    ) -> None:
        """`environ` has the settings of the allocator, instead of this process's environment.

        `guards_files`: keep the user's files by patches of Python's functions. `is_tested`: another process of the
        play has tested this torch.

        DeviceError for an unknown card.
        """
        self.settings = settings
        self._guards_files, self._is_tested = guards_files, is_tested
        keep_dynamo_out()
        self.gpu, self.notes = resolve_gpu(
            settings.gpu, memory_bytes=settings.memory_bytes, capability=settings.capability
        )
        self.allocator = self.allocator_kind(
            total_bytes=settings.memory_bytes or self.gpu.planning_bytes,
            used_by_others=settings.used_bytes,
            context_bytes=self._context_bytes(),
            settings=AllocatorSettings.from_environment(os.environ if environ is None else environ),
        )
        self.on_step: Callable[[int], object] = lambda steps: None
        """Called with the optimizer steps done after each of them."""
        self.phases = Phases(self._after_step)
        self.device = VirtualDevice(self._card_of(self.gpu), self.allocator, self.phases)
        self.device.assumed = Assumed(settings.assumed, settings.needed)
        self.device.end_soon = self._end_soon
        self.device.answers.alike = self._others()
        if isinstance(self.allocator, TapedAllocator):
            self.device.answers.before_request = self.allocator.next_elsewhere
        TraceLog.attach(self.device.recorder)
        self._reads_settings = environ is None
        self._stopping = Stopping(settings, self.device.recorder, self.phases, self.device.draws, self.notes)
        self._waited_a_step_ago = 0
        """Mark of the blocks freed before the latest step: the host runs ahead of a card by 1024 kernels, which is less
        than a step of most models."""
        self._files: FileGuard

    @classmethod
    def running(cls) -> "VirtualSession | None":
        """Return the virtual GPU of this process, if it has one."""
        return cls._running

    def _context_bytes(self) -> int:
        if self.settings.context_bytes is not None:
            return self.settings.context_bytes
        context, estimated_from = context_bytes(self.gpu)
        if estimated_from:
            self.notes.append(estimated_from)
        return context

    def _read_settings(self) -> None:
        """Read the allocator's settings when PyTorch does: scripts set the variable after they started Python."""
        settings = AllocatorSettings.from_environment(os.environ)
        if settings != self.allocator.settings:
            self.allocator.configure(settings)

    def _card_of(self, gpu: GPU) -> Card:
        return _card(gpu, self.settings.torch)

    def _others(self) -> list[Card]:
        """Return a card of each kind among the other ones that were asked for."""
        found = dict.fromkeys(self._card_of(gpu) for gpu in all_gpus() if gpu.name in self.other_cards)
        return [card for card in found if card != self.device.card]

    def alike(self) -> dict[str, Card]:
        """Return the other cards that were asked for and have answered all that the program asked as this one did."""
        alike = (self.device.card, *self.device.answers.alike)
        return {name: card for name, card in self._named().items() if card in alike}

    def parted(self) -> list[list[str]]:
        """Return the names of the cards that answered otherwise, in groups that answered alike until they left."""
        named = self._named()
        return [[name for name, card in named.items() if card in group] for group in self.device.answers.parted]

    def _named(self) -> dict[str, Card]:
        return {gpu.name: self._card_of(gpu) for gpu in all_gpus() if gpu.name in self.other_cards}

    @property
    def stopped_because(self) -> str:
        return self._stopping.reason

    @property
    def not_played(self) -> list[Frame]:
        """Lines that an early stop left out, although they may allocate."""
        return self._stopping.not_played

    @property
    def is_shortened(self) -> bool:
        """True if iterations that repeat were passed over."""
        return self._stopping.is_shortened

    def ends_unset(self, error: BaseException) -> bool:
        """Return True for an error of a name that may be unset because an answer was made up, after some steps."""
        lines = lines_that_set(error) if self.phases.steps and self.device.values.made_up else []
        if lines:
            self._stopping.end_unset(error, lines)
        return bool(lines)

    @property
    def ends_early(self) -> bool:
        """True if the play is over although the script is not: its time is, or it did the steps asked for."""
        settings = self.settings
        return self.device.out_of_time or settings.steps is not None or settings.until in ("eval", "steps")

    @contextmanager
    def active(self) -> Iterator["VirtualSession"]:
        """Run the lines within on the device; EnoughSeen ends them early."""
        self._take_over()
        timer = self._start_timer()
        self._listen()
        if self._reads_settings:
            self.device.recorder.before_first = self._read_settings
        try:
            with self._files.watching(), self.device.mode():
                yield self
        except EnoughSeen:
            pass
        finally:
            self._has_ended = True
            self._stopping.close()
            if timer is not None:
                timer.cancel()
            self.device.recorder.settle()
            self.device.roles.mark_all()
            for end in self.device.at_end:
                end()
            if self.settings.snapshot is not None:
                write_snapshot(self.device.recorder, self.settings.snapshot)

    def _take_over(self) -> None:
        """Put the device into this process's torch, once. DeviceError if another one is there."""
        if VirtualSession._running is None:
            self._files = patches.install(
                self.device, self.gpu, guards_files=self._guards_files, rank=self.settings.rank
            )
            if not self._is_tested:
                backend.self_test(in_fork=not self._guards_files)
            backend.let_scripts_see_cards()
            self.phases.install()
            if self.settings.until_stable:
                self._stopping.shorten_evaluations()
                trainers.install(self.phases)
                generation.install(self.device.recorder, self.notes)
                random_numbers.install(self.device.draws)
            VirtualSession._running = self
        elif VirtualSession._running is not self:
            raise DeviceError(say("vgpu.session.one_card", card=VirtualSession._running.gpu.name))

    def _start_timer(self) -> threading.Timer | None:
        if self.settings.timeout_s is None:
            return None

        main = threading.main_thread().ident
        timer = threading.Timer(
            self.settings.timeout_s, lambda: self._cut_short(sys._current_frames().get(main or 0), interrupted=False)
        )
        timer.daemon = True
        timer.start()
        return timer

    def _listen(self) -> None:
        """End the play when the process that waits for it sends a signal."""
        if threading.current_thread() is not threading.main_thread() or self._has_ended:
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self._has_ended:
                return
            if not self.device.out_of_time:
                self._cut_short(frame, interrupted=True)
            elif any(each.f_code.co_name == "__del__" for each, _ in traceback.walk_stack(frame)):
                self._end_soon()  # Python drops what is raised there: a DataLoader joins its workers so
            else:
                raise EnoughSeen

        signal.signal(END_SIGNAL, handle)

    def _cut_short(self, frame: FrameType | None, *, interrupted: bool) -> None:
        """End the script at its next operator, or where it is if it runs none."""
        self._stopping.cut_short(frame, interrupted=interrupted)
        self._end_soon()

    def _end_soon(self) -> None:
        self.device.out_of_time = True
        again = threading.Timer(_PATIENCE_S, lambda: os.kill(os.getpid(), END_SIGNAL))
        again.daemon = True
        if signal.getsignal(END_SIGNAL) not in (signal.SIG_DFL, None):
            again.start()

    def _after_step(self) -> None:
        with self.device.recorder.exclusive():
            self.allocator.finish(self._waited_a_step_ago)
            self._waited_a_step_ago = self.allocator.waited
        self.device.roles.mark_all()
        self.on_step(self.phases.steps)
        self._stopping.after_step(self.phases.steps, has_optimizer=self.phases.has_optimizer)


def _card(gpu: GPU, torch_text: str | None) -> Card:
    """Describe the card to the kernels, with the torch that runs there: the installed one if `torch_text` is None."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    version, cuda = torch_versions(torch_text) if torch_text else ((major, minor), _build_cuda())
    cuda = cuda or next(cuda for first, cuda in _DEFAULT_CUDA if version >= first)
    return Card(capability=gpu.capability, sm_count=gpu.sm_count, torch_version=version, cuda_version=cuda)


def _build_cuda() -> tuple[int, int] | None:
    """Return the CUDA version of the installed torch, None for a build without CUDA."""
    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)
