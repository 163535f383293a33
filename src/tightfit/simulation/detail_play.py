"""The play of a script with its details. Runs in the process of the play."""

import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from types import FrameType

import torch
from msgspec.structs import replace

from tightfit.allocator.tape import Replayed, TapedAllocator, digest_of, replay
from tightfit.kernels.card import Card
from tightfit.simulation.details import (
    CardOutcome,
    CardSize,
    Detail,
    FailedAt,
    FileState,
    Held,
    StepTime,
    state_of,
)
from tightfit.simulation.speed import Meter, Work, rates_of
from tightfit.system.private_view import View
from tightfit.vgpu.findings import by_category
from tightfit.vgpu.recorder import Allocation
from tightfit.vgpu.records import Findings
from tightfit.vgpu.session import VirtualSession
from tightfit.vgpu.snapshot import TraceLog

_MOST_HELD = 400
_MOST_FILES = 20_000
_NO_FILES = ("/proc/", "/sys/", "/dev/")
_WRITES = os.O_WRONLY | os.O_RDWR
_LISTINGS = ("os.listdir", "os.scandir")
_IMPORTS = ("importlib", "_frozen_importlib", "pkgutil")


def play_detail(
    cards: Sequence[CardSize],
    play: Callable[[Callable[[int], object]], Findings],
    on_step: Callable[[int], object],
    view: View | None,
) -> Detail:
    """Play in a private view if there is one, and add details from the recorder that the findings leave out."""
    VirtualSession.allocator_kind = TapedAllocator
    VirtualSession.other_cards = [card.name for card in cards]
    files, clock = FilesRead(view), Clock()
    sys.addaudithook(files)

    def stepped(steps: int) -> None:
        clock(steps)
        on_step(steps)

    found = play(stepped)
    session = VirtualSession.running()
    if session is None:
        return Detail(findings=found, held=[], files=files.states(), cards=[], tape="")
    return replace(_read(session, found, cards), files=files.states(), step=clock.step(session))


def _read(session: VirtualSession, found: Findings, cards: Sequence[CardSize]) -> Detail:
    """Read off a session what holds on this card and on others."""
    recorder, allocator = session.device.recorder, session.allocator
    alive = recorder.alive_at(session.device.events_at_failure if found.failure else recorder.peak_event)
    decides = found.categories == by_category(alive)
    assert isinstance(allocator, TapedAllocator)
    follows = decides and allocator.is_replayable and not found.caught_failures
    elsewhere = Elsewhere(session, allocator, found) if follows else None
    return Detail(
        findings=found,
        held=_held(alive) if decides else [],
        files=[],
        cards=elsewhere.outcomes(cards) if elsewhere else [],
        tape=digest_of(allocator.tape) if follows else "",
        tapes=elsewhere.tapes() if elsewhere else {},
        parted=session.parted() if follows else [],
        is_chip_known=session.device.answers.is_chip_known,
        is_cut_short=session.device.out_of_time,
    )


class Clock:
    """The kernels of each optimizer step after the first."""

    def __init__(self) -> None:
        self._meter, self._marks = Meter(), list[Work]()

    def __call__(self, steps: int) -> None:
        if not self._marks and (session := VirtualSession.running()):
            session.device.observer = self._meter
        self._marks.append(self._meter.read())

    def step(self, session: VirtualSession) -> StepTime | None:
        """Return the time of the shortest step: a longer one has an evaluation in it."""
        if len(self._marks) < 2:
            return None
        compiled = "compile" in session.device.recorder.phase_peaks
        rates = rates_of(session.gpu, compiled=compiled)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        timed = [((work := after - before).seconds(rates), work.launches) for before, after in pairs]
        seconds, kernels = min(timed)
        return StepTime(seconds=seconds, kernels=kernels, compiled=compiled) if kernels else None


class FilesRead:
    """Audit hook that notes the files which a play opens to read, and the folders that it lists.

    In a private view, the files outside are noted: those that the play wrote itself are no part of the script.
    """

    def __init__(self, view: View | None = None) -> None:
        self._stat = view.stat_before if view else os.stat
        self._notes_folders = view is not None
        self._found: dict[str, FileState] = {}
        self._skipped = (*_NO_FILES, *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")))
        self._own = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
        self._torch = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
        self._packages = tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib"))

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in ("open", *_LISTINGS) or len(self._found) > _MOST_FILES:
            return
        path = arguments[0]
        if event in _LISTINGS:
            path = "." if path is None else path
            is_read = self._notes_folders and not _is_import(sys._getframe(1))
        else:
            is_read = not self._writes(*arguments[1:])
        if not isinstance(path, str) or not is_read:
            return
        path = os.path.abspath(path)
        if path not in self._found and self._counts(path) and not path.startswith(self._packages):
            self._found[path] = state_of(path, self._stat)

    def states(self) -> list[FileState]:
        """Return them with the modules that are loaded now."""
        for module in list(sys.modules.values()):
            path = getattr(module, "__file__", None)
            if not isinstance(path, str) or not os.path.exists(path):
                continue
            path = os.path.abspath(path)  # a script's own is as the command line has it
            if path not in self._found and self._counts(path):
                self._found[path] = state_of(path, self._stat)
        # Files that the play made and removed are no part of the script.
        return [each for path, each in sorted(self._found.items()) if each.size < 0 or os.path.exists(path)]

    def _counts(self, path: str) -> bool:
        """Return False for files that a change of Python, torch or this package changes."""
        is_package = path.startswith(self._packages)
        if path.startswith((self._own, self._torch)) or (path.startswith(self._skipped) and not is_package):
            return False
        return f"{os.sep}__pycache__{os.sep}" not in path and "tightfit-play-" not in path

    @staticmethod
    def _writes(mode: object, flags: object) -> bool:
        if isinstance(mode, str):
            return not mode.startswith("r") or "+" in mode
        return isinstance(flags, int) and bool(flags & _WRITES)


def _is_import(frame: FrameType) -> bool:
    """Return True for a caller that looks for modules: it lists every folder that may hold one."""
    return str(frame.f_globals.get("__name__")).startswith(_IMPORTS)


def _held(alive: Iterable[Allocation]) -> list[Held]:
    """Sum equal tensors of one line."""
    sums: dict[Held, tuple[int, int]] = {}
    for each in alive:
        kind = Held(**each.origin(), phase=each.phase, count=0, bytes=0)
        count, nbytes = sums.get(kind, (0, 0))
        sums[kind] = count + 1, nbytes + each.nbytes
    made = [replace(kind, count=count, bytes=nbytes) for kind, (count, nbytes) in sums.items()]
    return sorted(made, key=lambda each: -each.bytes)[:_MOST_HELD]


class Elsewhere:
    """The run on other cards that answered alike: the same requests, some of them of another size."""

    def __init__(self, session: VirtualSession, allocator: TapedAllocator, found: Findings) -> None:
        self._session, self._allocator, self._failed = session, allocator, found.failure is not None
        self._kinds = session.alike()
        self._peaks: dict[tuple[tuple[int, int], ...], int | None] = {}
        """By the requests that are of another size there than here."""

    def outcomes(self, cards: Sequence[CardSize]) -> list[CardOutcome]:
        return [self._outcome(card, self._kinds[card.name]) for card in cards if card.name in self._kinds]

    def tapes(self) -> dict[str, str]:
        """Return a digest of each card's requests, if the program has looked at the number of multiprocessors."""
        if not self._session.device.answers.is_chip_known:
            return {}
        digests = {kind: digest_of(self._allocator.tape_on(kind)) for kind in set(self._kinds.values())}
        return {name: digests[kind] for name, kind in self._kinds.items()}

    def _outcome(self, card: CardSize, kind: Card) -> CardOutcome:
        limited = self._allocator.memory_fraction < 1
        if not self._failed and not limited:
            reserved = self._peak_without_limit(kind)
            if reserved is not None and reserved <= card.room_bytes:
                # No request is refused, so each gets the same block as there.
                device_bytes = card.context_bytes + reserved
                return CardOutcome(name=card.name, total_bytes=card.total_bytes, fits=True, device_bytes=device_bytes)
        played = self._replay(kind, card)
        return CardOutcome(
            name=card.name,
            total_bytes=card.total_bytes,
            fits=played.error is None,
            device_bytes=card.context_bytes + played.peak_reserved_bytes + _refused(played),
            failure=_failed_at(self._session, played),
        )

    def _peak_without_limit(self, kind: Card) -> int | None:
        """Return the bytes that the run reserves in the memory of this play; None if a request is refused there."""
        allocator = self._allocator
        sizes = tuple(allocator.sizes_on(kind).items())
        if not sizes:
            return allocator.peak_reserved_bytes
        if sizes not in self._peaks:
            there = CardSize(name="", total_bytes=allocator.total_bytes, context_bytes=allocator.context_bytes)
            played = self._replay(kind, there)
            self._peaks[sizes] = None if played.error else played.peak_reserved_bytes
        return self._peaks[sizes]

    def _replay(self, kind: Card, card: CardSize) -> Replayed:
        return replay(
            self._allocator.tape_on(kind),
            total_bytes=card.total_bytes,
            used_by_others=card.used_bytes,
            context_bytes=card.context_bytes,
            settings=self._allocator.settings,
        )


def _refused(played: Replayed) -> int:
    return played.error.requested_bytes if played.error else 0


def _failed_at(session: VirtualSession, played: Replayed) -> FailedAt | None:
    if played.error is None or played.failed_request is None:
        return None
    recorder = session.device.recorder
    log = TraceLog.of(recorder)
    assert log is not None
    # Sums that took over a block made no request, so allocations alone do not count them.
    requests = [recorder.allocations[recorder.events[each.event] - 1] for each in log if each.action == "alloc"]
    if played.failed_request < len(requests):
        allocation = requests[played.failed_request]
    elif session.device.failure is not None:
        allocation = session.device.failure[0]
    else:
        return None
    return FailedAt(
        **allocation.origin(),
        phase=allocation.phase,
        requested_bytes=played.error.tensor_bytes,
        free_bytes=played.error.free_bytes,
    )
