"""Out-of-memory errors survived: what failed is undone, memory released, settings made smaller, and it runs again.

What is tried again must have written nothing that stays. An evaluation writes nothing; a step writes gradients, which
are dropped, until its update, which is finished rather than undone (`train.atomic`). What is random in a step follows
from its number, and so does what it reads, so that the step that runs again is the same step.

Several processes agree before they exchange gradients and again before they write. One that failed says so in place of
its next agreement: none waits for a sum that never comes, and all go back together, to the same settings. Errors inside
of an exchange itself cannot be undone; there the process ends, which the others notice, and a new one resumes.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from tightfit.errors import DoesNotFit, TightfitError
from tightfit.trainer.atomic import Update
from tightfit.trainer.distributed import GradientExchange, World
from tightfit.trainer.fallback import Adjustable, Fallback, Halving, Settings, least_that_failed
from tightfit.trainer.out_of_memory import (
    SLOW_FALLBACK,
    Kind,
    free_bytes,
    is_out_of_memory,
    release_frames,
    release_memory,
    requested_bytes,
    room_bytes,
    spoils_its_thread,
)
from tightfit.trainer.resident import Reserve
from tightfit.trainer.step import Guard, Phase, StepState
from tightfit.trainer.supervise import BEYOND_SAVING
from tightfit.units import MIB, format_bytes

__all__ = ["BeyondSaving", "Fallback", "Halving", "Kind", "Recovery", "Settings", "is_out_of_memory"]

T = TypeVar("T")
MOST_TRIES = 4
"""Times that the same settings are tried in one step where nothing smaller is left: others' memory comes and goes."""
WAIT_S = 0.5
"""Before the second of those times; twice as long before each one after it."""
PATIENCE = 20
"""Steps without trouble before settings grow; twice as many after each attempt that failed."""
MARGIN_BYTES = 256 * MIB
"""Free memory below which others' growth is acted upon: about what cuBLAS, a kernel's load and a page cache take."""
_SETTINGS_MATTER: tuple[Phase, ...] = ("eval", "forward", "loss", "backward", "compile")
"""Phases in which smaller settings need less. Elsewhere giving memory back comes first."""


class BeyondSaving(TightfitError):
    """This process cannot go on, but a new one can, from the last checkpoint."""

    exit_code = BEYOND_SAVING


class OutOfMemory(DoesNotFit):
    """Nothing smaller is left; what was done so far is whole."""

    of_all = False
    """Whether every process raises it, at the same place."""
    message = ""
    """What the device or the system said."""
    settings: Settings | None = None
    """Those that failed, if there were any yet."""


class _PeerFailed(Exception):
    """Another process could not do its part."""


@dataclass(frozen=True)
class _Failure:
    """What a process tells the others of its error, and what it decided for all of them."""

    phase: Phase
    requested_bytes: int | None
    free_bytes: int | None
    after: Settings | None
    """None: the same settings again."""
    is_last: bool
    wait_s: float
    message: str


@dataclass
class Recovery(Guard):
    """Runs the parts of a run and repeats those that ran out of memory; also the guard within its steps."""

    world: World
    device: torch.device
    say: Callable[[str], object]
    event: Callable[[int, Mapping[str, Any]], object]
    enabled: bool = True
    step: int = 0
    """The step that is being done, for what is told."""
    run: Adjustable | None = None
    """The run, once it has settings to change."""
    fallback: Fallback | None = None
    state: StepState | None = None
    _exchange: GradientExchange | None = None
    _flag: Tensor | None = None
    _tries: Counter[tuple[int, bool, Settings | None]] = field(default_factory=Counter)
    _failed: dict[Settings, int | None] = field(default_factory=dict)
    """Settings that failed, with the memory that was free after they were given up."""
    _clean_steps: int = 0
    _patience: int = field(default_factory=lambda: PATIENCE)
    _has_grown: bool = False
    _room_bytes: int | None = None
    _reserve: Reserve | None = None
    _thread: ThreadPoolExecutor | None = None
    """Works instead of the main thread, which an error has left unfit to."""

    def __post_init__(self) -> None:
        if self.enabled and self.device.type == "cpu":
            warnings.filterwarnings("error", message=SLOW_FALLBACK)
            self._reserve = Reserve()
        if self.enabled and self.world.size > 1:
            self._flag = torch.zeros(1, device=self.world.flag_device(self.device))

    def watch(self, run: Adjustable, fallback: Fallback) -> None:
        """From now on settings of `run` may change."""
        self.run, self.fallback = run, fallback

    def guard(self, state: StepState) -> None:
        """From now on this guards the steps of `state`."""
        self.state = state
        if self.enabled:
            state.guard = self
            if self.world.size > 1:
                self._exchange = GradientExchange(state.model.parameters())

    def tried(
        self, phase: Phase, work: Callable[[], T], *, undo: Callable[[], object] = lambda: None, alone: bool = False
    ) -> T:
        """What `work` returns, after as many errors as it takes; DoesNotFit when nothing smaller is left.

        Unless `alone`, all processes do it together, and `work` has to end with `agree`.
        """
        if not self.enabled:
            return work()
        while True:
            began, random_state, found = time.perf_counter(), None, None
            if self.state is not None:
                self.state.phase = phase
            try:
                random_state = _random_state(self.device)
                return work() if self._thread is None else self._thread.submit(work).result()
            except _PeerFailed:
                pass
            except TightfitError:  # somebody's decision, though an error of memory may be behind it
                raise
            except Exception as error:
                if self._kind(error) is None:
                    raise
                found = self._phase_of(error, phase), requested_bytes(error), last_line(error)
                if spoils_its_thread(error):
                    # Alone: OpenMP ends the process where it gets no memory for the threads of a new team.
                    self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
                release_frames(error)
            undo()
            release_memory(self.device)
            _set_random_state(self.device, random_state)
            failure = self._decided(*found, alone) if found else None
            if not alone:
                if found:
                    self._signal(failed=True)
                failure = self.world.first(failure)
            assert failure is not None, "some process failed"
            self._go_back(failure, time.perf_counter() - began, alone)

    def agree(self) -> None:
        """Returns once all processes are here; raises where one of them failed on its way."""
        if self._signal(failed=False):
            raise _PeerFailed

    def exchange(self) -> None:
        if self._exchange is None:
            return
        try:
            self._exchange.run()
        except Exception as error:
            raise BeyondSaving(f"step {self.step}: the exchange of gradients failed ({error}); {_NEW}") from error

    def write(self, state: StepState) -> None:
        """The update, gone on with until it is whole."""
        update: Update | None = None
        for tries in range(MOST_TRIES):
            began = time.perf_counter()
            try:
                update = update or Update(state.optimizer, state.scaler)
                update.go_on()
                return
            except Exception as error:
                if is_out_of_memory(error) is not Kind.RECOVERABLE:
                    raise
                if tries == MOST_TRIES - 1:
                    self._give_up(update)
                    raise
                size = requested_bytes(error)
                release_frames(error)
            release_memory(self.device)
            self._release_reserve()
            self._tell("optimizer", size, None, time.perf_counter() - began)

    def step_done(self) -> None:
        """A step without trouble; after enough of them settings grow, but not to what failed with as little memory."""
        if not self.enabled or self.run is None or self.fallback is None or not self._failed:
            return
        self._clean_steps += 1
        if self._clean_steps < self._patience:
            return
        self._clean_steps, self._has_grown = 0, False
        if self._reserve is not None:
            self._reserve.take()
        free = free_bytes(self.device)
        failed = frozenset(one for one, then in self._failed.items() if not free or not then or free < 2 * then)
        now = self.run.settings
        larger = self.world.from_main(self.fallback.larger(now, failed))
        if larger is not None:
            self._has_grown = True
            self.say(f"step {self.step}: {self._patience} steps without trouble: {now.changes_to(larger)}")
            self.event(self.step, {"event": "growth", "before": asdict(now), "after": asdict(larger)})
            self.run.use_settings(larger)
            if self._thread is not None and (free is None or free > MARGIN_BYTES):
                self._thread = ThreadPoolExecutor(1)  # with as many threads of its own as at first

    def is_pressed(self) -> bool:
        """Whether others have taken so much that less than the margin is free; not what this process took itself."""
        room = room_bytes(self.device) if self.enabled else None
        if room is None:
            return False
        free, whole = room
        self._room_bytes = max(whole, self._room_bytes or 0)
        return free < MARGIN_BYTES and whole < self._room_bytes - MARGIN_BYTES

    def relieve(self) -> None:
        """Smaller settings before anything fails; all processes together."""
        assert self.run is not None, "settings are watched before the first step"
        assert self.fallback is not None, "with what changes them"
        now = self.run.settings
        release_memory(self.device)
        free, self._room_bytes = room_bytes(self.device) or (0, 0)
        smaller = self.world.from_main(self.fallback.smaller(now, "forward", free))
        self._failed[least_that_failed(now, "forward")] = free
        self._clean_steps = 0
        what = now.changes_to(smaller) if smaller else "nothing smaller is left; cached memory is released"
        self.say(f"step {self.step}: other processes take memory, {format_bytes(free)} is free: {what}")
        told = {"before": asdict(now), "after": asdict(smaller or now), "free_bytes": free}
        self.event(self.step, {"event": "pressure", **told})
        if smaller:
            self.run.use_settings(smaller)

    def _release_reserve(self) -> None:
        if self._reserve is not None:
            self._reserve.release()

    def _kind(self, error: Exception) -> Kind | None:
        """None for what is to be raised as it is; BeyondSaving where the process is."""
        kind = is_out_of_memory(error, after_another=any(step == self.step for step, *_ in self._tries))
        if kind is not Kind.BROKEN:
            return kind
        if self._tries or "NCCL" in str(error):
            raise BeyondSaving(f"step {self.step}: {str(error).splitlines()[0]}; {_NEW}") from error
        return None  # an illegal access with no error of memory before it is somebody's bug

    def _phase_of(self, error: BaseException, phase: Phase) -> Phase:
        """Where in a step it happened: what the step says, and what the frames say of the loss and the compiler."""
        if phase != "forward" or self.state is None:
            return phase
        frames, trace = [], error.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame.f_code)
            trace = trace.tb_next
        if any(code.co_filename.endswith("_dynamo/convert_frame.py") for code in frames):
            return "compile"
        now = self.state.phase
        return "loss" if now == "forward" and any(code.co_name == "token_loss" for code in frames) else now

    def _decided(self, phase: Phase, size: int | None, message: str, alone: bool) -> _Failure:
        now = self.run.settings if self.run is not None else None
        self._tries[self.step, phase in _SETTINGS_MATTER, now] += 1
        tries, free, after = self._tries[self.step, phase in _SETTINGS_MATTER, now], free_bytes(self.device), None
        if now is not None and self.fallback is not None and not alone and (phase in _SETTINGS_MATTER or tries > 1):
            after = self.fallback.smaller(now, phase, free)
        is_last = after is None and tries >= MOST_TRIES
        wait_s = 0.0 if after is not None or is_last else WAIT_S * 2 ** (tries - 1)
        return _Failure(phase, size, free, after, is_last=is_last, wait_s=wait_s, message=message)

    def _go_back(self, failure: _Failure, seconds: float, alone: bool) -> None:
        now = self.run.settings if self.run is not None else None
        if failure.is_last:
            error = OutOfMemory(self._epitaph(failure, now))
            error.of_all, error.message, error.settings = not alone, failure.message, now
            raise error
        if self._has_grown:
            self._patience *= 2
        self._clean_steps, self._has_grown = 0, False
        self._release_reserve()
        self._tell(failure.phase, failure.requested_bytes, failure.after, seconds)
        time.sleep(failure.wait_s)
        if self.run is not None and now is not None and failure.after is not None:
            self._failed[least_that_failed(now, failure.phase)] = failure.free_bytes
            self.run.use_settings(failure.after)

    def _tell(self, phase: Phase, size: int | None, after: Settings | None, seconds: float) -> None:
        now = self.run.settings if self.run is not None else None
        change = now.changes_to(after) if now and after else "memory released, settings as they were"
        refused = f" ({format_bytes(size)} refused)" if size is not None else ""
        self.say(f"step {self.step}: out of memory in {phase}{refused}: {change}; it runs again")
        ended = after or now
        told = {
            "event": "recovery",
            "phase": phase,
            "kind": Kind.RECOVERABLE.value,
            "before": asdict(now) if now else None,
            "after": asdict(ended) if ended else None,
            "requested_bytes": size,
            "seconds_lost": round(seconds, 3),
        }
        self.event(self.step, told)

    def _epitaph(self, failure: _Failure, now: Settings | None) -> str:
        size = failure.requested_bytes
        needs = f"{format_bytes(size)} more" if size is not None else "more memory"
        left = f", {format_bytes(failure.free_bytes)} free" if failure.free_bytes is not None else ""
        at = f" with {now}" if now else ""
        return (
            f"step {self.step}: {failure.phase} needs {needs} than there is{at}{left}, and nothing smaller is left; "
            "try a shorter block_size, a smaller model, or a device with more memory"
        )

    def _give_up(self, update: Update | None) -> None:
        """An update that cannot be finished: undone if nothing was written anywhere, else the process ends."""
        if self.world.size == 1 and (update is None or not update.has_written):
            if update is not None:
                update.withdraw()
            return
        raise BeyondSaving(f"step {self.step}: memory ran out in the middle of the update; {_NEW}")

    def _signal(self, *, failed: bool) -> bool:
        """Whether any process failed; allocates nothing."""
        if self._flag is None:
            return failed
        try:
            self._flag.fill_(float(failed))
            torch.distributed.all_reduce(self._flag)
            return self._flag.item() > 0
        except Exception as error:  # the others have gone on, or will: going back alone would leave them waiting
            raise BeyondSaving(f"step {self.step}: the processes could not agree ({error}); {_NEW}") from error


_NEW = "a new process goes on from the last checkpoint (--supervise, or --init_from=resume)"


def last_line(error: BaseException) -> str:
    """As the last line of a traceback shows it."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name}: {error}"


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None] | None) -> None:
    if state is None:
        return
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
