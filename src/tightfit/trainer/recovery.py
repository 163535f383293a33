"""Survive out-of-memory errors: undo the failed work, release memory, choose smaller settings, run the work again.

Work that runs again must have written nothing that stays. An evaluation writes nothing. A step writes gradients, which
are dropped, until its update, which is finished rather than undone (`trainer.atomic`). A step's number decides its
random numbers and its data, so the step that runs again is the same step.

Several processes agree before they exchange gradients and again before they write. A process that failed reports this
in place of its next agreement. So none waits for a sum that never comes, and all go back together, to the same
settings. An error inside an exchange cannot be undone: the process ends, the others notice, and a new one resumes.
"""

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tightfit.errors import DoesNotFit, TightfitError
from tightfit.trainer.atomic import Update
from tightfit.trainer.distributed import GradientExchange, World
from tightfit.trainer.events import Event, GrowthEvent, PressureEvent, RecoveryEvent
from tightfit.trainer.fallback import MARGIN_BYTES, Adjustable, Fallback, Growth, Phase, Settings
from tightfit.trainer.out_of_memory import (
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
from tightfit.trainer.step import Guard, StepState
from tightfit.trainer.supervise import BEYOND_SAVING
from tightfit.wording import say

T = TypeVar("T")
MOST_TRIES = 4
"""Tries of the same settings in one step where nothing smaller is left: others' memory comes and goes."""
WAIT_S = 0.5
"""Seconds before the first retry of the same settings; doubles with each further retry."""
_FAILS = float(2**20)
"""A process that failed adds so much to the processes' common sum, one that stops adds 1; more than processes are."""
_SETTINGS_MATTER: tuple[Phase, ...] = ("eval", "forward", "loss", "backward", "compile")
"""Phases in which smaller settings need less. In the others releasing memory comes first."""


class BeyondSaving(TightfitError):
    """This process cannot continue, but a new one can, from the last checkpoint."""

    exit_code = BEYOND_SAVING


@contextmanager
def exchanging(told: Callable[[Exception], str]) -> Iterator[None]:
    """BeyondSaving for an error within an exchange: going back would leave the other processes waiting in it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise BeyondSaving(told(error)) from error


class OutOfMemory(DoesNotFit):
    """Nothing smaller is left; the work done so far is complete."""

    of_all = False
    """True if every process raises it at the same place."""
    message = ""
    """Error message of the device or the system."""
    settings: Settings | None = None
    """The settings that failed; None if the run had none yet."""


class _PeerFailed(Exception):
    """Another process could not do its part."""


class _Found(NamedTuple):
    """Facts of an error, taken before its traceback and tensors are dropped."""

    phase: Phase
    requested_bytes: int | None
    message: str


@dataclass(frozen=True)
class _Failure:
    """An error and the decision that follows from it, as one process sends them to the others."""

    found: _Found
    free_bytes: int | None
    after: Settings | None
    """None: the same settings again."""
    is_last: bool
    wait_s: float


@dataclass
class Recovery(Guard):
    """Runs the parts of a run and repeats those that ran out of memory; also the guard within its steps."""

    world: World
    device: torch.device
    log: Callable[[str], object]
    event: Callable[[int, Event], object]
    enabled: bool = True
    sharded: bool = False
    """True if the model is spread over the processes, which then have to agree even without `enabled`."""
    step: int = 0
    """The current step, for messages."""
    run: Adjustable | None = None
    """The run, once it has settings to change."""
    fallback: Fallback | None = None
    state: StepState | None = None
    waited_s: float = 0.0
    """Seconds in which this process waited for agreement with others."""
    _growth: Growth = field(default_factory=Growth)
    _exchange: GradientExchange | None = None
    _flag: Tensor | None = None
    _tries: Counter[tuple[int, bool, Settings | None]] = field(default_factory=Counter)
    _refusal: tuple[int, str] = (-1, "")
    """Step and message of the newest error that names a size; libraries word the ones after it in many ways."""
    _reserve: Reserve | None = None
    _thread: ThreadPoolExecutor | None = None
    """Runs the work in place of the main thread, after an error that left that thread unable to run new kernels."""

    def __post_init__(self) -> None:
        if self.enabled and self.device.type == "cpu":
            self._reserve = Reserve()
        if (self.enabled or self.sharded) and self.world.size > 1:
            self._flag = torch.zeros(1, device=self.world.flag_device(self.device))

    def watch(self, run: Adjustable, fallback: Fallback, *, failed: Settings | None = None) -> None:
        """Allow the settings of `run` to change from now on; `failed` are those that ended the process before."""
        self.run, self.fallback = run, fallback
        if failed is not None:
            self._growth.failed(failed, "forward", free_bytes(self.device))

    def guard(self, state: StepState) -> None:
        """Guard the steps of `state` from now on."""
        self.state = state
        if self.enabled:
            state.guard = self
            if state.shards:
                state.shards.agree = self.agree
            elif self.world.size > 1:
                self._exchange = GradientExchange(state.model.parameters())

    def tried(
        self, phase: Phase, work: Callable[[], T], *, undo: Callable[[], object] = lambda: None, alone: bool = False
    ) -> T:
        """Return the result of `work` after as many errors as it takes; DoesNotFit when nothing smaller is left.

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
            except TightfitError:  # a decision of this package, even if an error of memory caused it
                raise
            except Exception as error:  # of any class: compilers and libraries wrap an error of memory in their own
                if self._kind(error) is None:
                    raise
                found = _Found(self._phase_of(error, phase), requested_bytes(error), last_line(error))
                if spoils_its_thread(error):
                    # One thread: OpenMP ends the process if it gets no memory for the threads of a new team.
                    self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
                release_frames(error)
            undo()
            release_memory(self.device)
            _set_random_state(self.device, random_state)
            failure = self._decided(found, alone) if found else None
            if not alone:
                if found:
                    self._signal(failed=True)
                failure = self.world.first(failure)
            assert failure is not None, "some process failed"
            self._go_back(failure, time.perf_counter() - began, alone)

    def agree(self, *, stops: bool = False) -> bool:
        """Return once all processes are here, True if one of them `stops`; raise if one of them failed before."""
        if self._flag is None:
            return stops
        failed, stops = self._signal(failed=False, stops=stops)
        if failed:
            raise _PeerFailed
        return stops

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time as waiting for other processes."""
        began = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - began

    def exchange(self) -> None:
        """Sum the gradients over all processes; BeyondSaving if that fails."""
        if self._exchange is None:
            return
        with exchanging(lambda error: say("trainer.recovery.exchange_failed", step=self.step, reason=error)):
            self._exchange.run()

    def write(self, state: StepState) -> None:
        """Update the parameters; continue after errors until the update is complete."""
        update: Update | None = None
        for tries in range(MOST_TRIES):
            began = time.perf_counter()
            try:
                update = update or Update(state.optimizer, state.scaler)
                update.go_on()
                return
            except (RuntimeError, MemoryError) as error:  # an 8-bit update is compiled, and Dynamo's errors are these
                if is_out_of_memory(error) is not Kind.RECOVERABLE:
                    raise
                if tries == MOST_TRIES - 1:
                    self._give_up(update)
                    raise
                size = requested_bytes(error)
                release_frames(error)
            release_memory(self.device)
            self._release_reserve()
            self._report("optimizer", size, None, time.perf_counter() - began)

    def step_done(self) -> None:
        """Count a step without trouble; after enough of them let settings grow, but not to those that would fail."""
        if self.run is None or self.fallback is None or not self._growth.is_due():
            return
        if self._reserve is not None:
            self._reserve.take()
        free, now = free_bytes(self.device), self.run.settings
        larger = self.world.from_main(self.fallback.larger(now, self._growth.too_large(free)))
        if larger is None:
            return
        steps, change = self._growth.patience, now.changes_to(larger)
        self._growth.has_grown = True
        self.log(say("trainer.recovery.grows", step=self.step, steps=steps, change=change))
        self.event(self.step, GrowthEvent(before=now, after=larger))
        self.run.use_settings(larger)
        if self._thread is not None and (free is None or free > MARGIN_BYTES):
            self._thread = ThreadPoolExecutor(1)  # with as many threads of its own as at first

    def is_pressed(self) -> bool:
        """Return True if others have taken so much memory that less than the margin is free."""
        room = room_bytes(self.device) if self.enabled else None
        return room is not None and self._growth.is_pressed(*room)

    def relieve(self) -> None:
        """Choose smaller settings before anything fails; all processes do this together."""
        assert self.run is not None, "settings are watched before the first step"
        assert self.fallback is not None, "with what changes them"
        now = self.run.settings
        release_memory(self.device)
        free, self._growth.room_bytes = room_bytes(self.device) or (0, 0)
        smaller = self.world.from_main(self.fallback.smaller(now, "forward", free))
        self._growth.failed(now, "forward", free)
        change = now.changes_to(smaller) if smaller else say("trainer.recovery.nothing_smaller")
        self.log(say("trainer.recovery.pressed", step=self.step, free=free, change=change))
        self.event(self.step, PressureEvent(before=now, after=smaller or now, free_bytes=free))
        if smaller:
            self.run.use_settings(smaller)

    def _release_reserve(self) -> None:
        if self._reserve is not None:
            self._reserve.release()

    def _settings(self) -> Settings | None:
        return self.run.settings if self.run is not None else None

    def _kind(self, error: Exception) -> Kind | None:
        """Return None for an error to raise again; raise BeyondSaving if it broke the process."""
        kind = is_out_of_memory(error, after_another=any(step == self.step for step, *_ in self._tries))
        if kind is not Kind.BROKEN:
            return kind
        if self._tries or "NCCL" in str(error):
            reason = str(error).splitlines()[0]
            raise BeyondSaving(say("trainer.recovery.broken", step=self.step, reason=reason)) from error
        return None  # an illegal access without an error of memory before it is a bug

    def _phase_of(self, error: BaseException, phase: Phase) -> Phase:
        """Return the phase within a step: the state's, or the loss or the compiler if the frames show them."""
        if phase != "forward" or self.state is None:
            return phase
        codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(code.co_filename.endswith("_dynamo/convert_frame.py") for code in codes):
            return "compile"
        now = self.state.phase
        return "loss" if now == "forward" and any(code.co_name == "token_loss" for code in codes) else now

    def _decided(self, found: _Found, alone: bool) -> _Failure:
        now, matters = self._settings(), found.phase in _SETTINGS_MATTER
        self._tries[self.step, matters, now] += 1
        tries, free, after = self._tries[self.step, matters, now], free_bytes(self.device), None
        if now is not None and self.fallback is not None and not alone and (matters or tries > 1):
            after = self.fallback.smaller(now, found.phase, free)
        is_last = after is None and tries >= MOST_TRIES
        wait_s = 0.0 if after is not None or is_last else WAIT_S * 2 ** (tries - 1)
        return _Failure(found, free, after, is_last=is_last, wait_s=wait_s)

    def _go_back(self, failure: _Failure, seconds: float, alone: bool) -> None:
        now, found = self._settings(), failure.found
        if found.requested_bytes is not None:
            self._refusal = self.step, found.message
        if failure.is_last:
            error = OutOfMemory(self._last_message(failure, now))
            step, refusal = self._refusal
            error.message = refusal if step == self.step else found.message
            error.of_all, error.settings = not alone, now
            raise error
        self._growth.after_error()
        self._release_reserve()
        self._report(found.phase, found.requested_bytes, failure.after, seconds)
        time.sleep(failure.wait_s)
        if self.run is not None and now is not None and failure.after is not None:
            self._growth.failed(now, found.phase, failure.free_bytes)
            self.run.use_settings(failure.after)

    def _report(self, phase: Phase, size: int | None, after: Settings | None, seconds: float) -> None:
        """Log and record an error that the run survived."""
        now = self._settings()
        change = now.changes_to(after) if now and after else say("trainer.recovery.same_settings")
        refused = say("trainer.recovery.refused", size=size) if size is not None else ""
        self.log(say("trainer.recovery.retries", step=self.step, phase=phase, refused=refused, change=change))
        event = RecoveryEvent(
            phase=phase,
            before=now,
            after=after or now,
            requested_bytes=size,
            seconds_lost=round(seconds, 3),
        )
        self.event(self.step, event)

    def _last_message(self, failure: _Failure, now: Settings | None) -> str:
        size, free = failure.found.requested_bytes, failure.free_bytes
        return say(
            "trainer.recovery.nothing_left",
            step=self.step,
            phase=failure.found.phase,
            needed=say("trainer.recovery.more", size=size) if size is not None else say("trainer.recovery.more_memory"),
            settings=say("trainer.recovery.with_settings", settings=now) if now else "",
            free=say("trainer.recovery.free", size=free) if free is not None else "",
        )

    def _give_up(self, update: Update | None) -> None:
        """Undo an update that cannot be finished if no process wrote anything; else raise BeyondSaving."""
        if self.world.size == 1 and (update is None or not update.has_written):
            if update is not None:
                update.withdraw()
            return
        raise BeyondSaving(say("trainer.recovery.half_updated", step=self.step))

    def _signal(self, *, failed: bool, stops: bool = False) -> tuple[bool, bool]:
        """Return whether any process failed and whether any stops; allocates nothing."""
        if self._flag is None:
            return failed, stops
        try:
            self._flag.fill_(_FAILS if failed else float(stops))
            with self.waiting():
                torch.distributed.all_reduce(self._flag)
                total = self._flag.item()
            return total >= _FAILS, total % _FAILS > 0
        except (RuntimeError, MemoryError) as error:  # the others go on: going back alone would leave them waiting
            raise BeyondSaving(say("trainer.recovery.no_agreement", step=self.step, reason=error)) from error


def last_line(error: BaseException) -> str:
    """Return the last line of the error's traceback, like "RuntimeError: CUDA out of memory"."""
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
