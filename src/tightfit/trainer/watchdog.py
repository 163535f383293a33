"""Notice a step that hangs: print the stack of every thread, and let the supervisor start again from the last state."""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from statistics import median

from tightfit.trainer.distributed import World
from tightfit.trainer.supervise import HUNG
from tightfit.wording import say

TIMES = 20
"""Multiple of the usual time of a step after which it counts as hanging."""
LEAST_S, FIRST_S = 300.0, 3600.0
"""Seconds that any step may take, because torch may compile anew; and those of the first step."""
POLL_S = 1.0
SILENT_POLLS = 5
"""Seconds without a sign of life after which a process counts as stopped."""
_REMEMBERED = 50
"""Steps whose median is the usual time."""


class Pulse:
    """Signs of life of the processes of a run, in the store by which torchrun connected them."""

    def __init__(self, world: World, start: str) -> None:
        """`start` is the name of this start of the processes, in a store that holds the signs of those before."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # a connection of its own: the process group's may be busy waiting
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
        self._world, self._start, self._beats = world, start, 0
        self.beat()

    def beat(self) -> None:
        """Tell the others that this process runs."""
        self._beats += 1
        with contextlib.suppress(RuntimeError):  # the store ended with another process
            self._store.set(self._key(self._world.rank), f"{self._beats} {socket.gethostname()}")

    def silent(self) -> list[str]:
        """Return the processes that show no sign of life for a while; nothing in all but one of the others."""
        before = self._all()
        for _ in range(SILENT_POLLS):
            time.sleep(POLL_S)
            self.beat()
        now = self._all()
        silent = [rank for rank, beats in now.items() if beats == before.get(rank)]
        if self._world.rank != min(now.keys() - set(silent), default=None):
            return []
        return [say("trainer.watchdog.process", rank=rank, host=now[rank].split(" ", 1)[1]) for rank in silent]

    def _all(self) -> dict[int, str]:
        found: dict[int, str] = {}
        with contextlib.suppress(RuntimeError):
            for rank in range(self._world.size):
                found[rank] = self._store.get(self._key(rank)).decode()
        return found

    def _key(self, rank: int) -> str:
        return f"tightfit/alive/{self._start}/{rank}"


class Watchdog:
    """A thread that counts the seconds of a step; those in which the whole process is stopped do not count."""

    def __init__(self, log: Callable[[str], object], *, ends: bool, pulse: Pulse | None = None) -> None:
        """`ends`: end the process when a step hangs, for the supervisor or torchrun to start another.

        `pulse` finds out which of several processes stopped.
        """
        self._log, self._ends, self._pulse = log, ends, pulse
        self._usual: deque[float] = deque(maxlen=_REMEMBERED)
        self._step: int | None = None
        self._seconds, self._is_told = 0.0, False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch a step."""
        self._seconds, self._is_told, self._step = 0.0, False, number
        began = time.monotonic()
        try:
            yield
        finally:
            self._step, self._seconds = None, 0.0
        self._usual.append(time.monotonic() - began)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _limit_s(self) -> float:
        return max(LEAST_S, TIMES * median(self._usual)) if self._usual else FIRST_S

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            step = self._step
            self._seconds += POLL_S
            if self._pulse is not None:
                self._pulse.beat()
            if step is None:
                self._look_between_steps()
            elif not self._is_told and self._seconds >= self._limit_s():
                self._is_told = True
                self._tell(step)

    def _look_between_steps(self) -> None:
        """End the process if another one has stopped while all evaluate or save, which may take any time."""
        if self._pulse is None or self._seconds < LEAST_S:
            return
        self._seconds = 0.0
        if silent := self._pulse.silent():
            self._tell_silent(silent)
            if self._ends:
                os._exit(HUNG)

    def _tell_silent(self, silent: list[str]) -> None:
        print(say("trainer.watchdog.silent", processes=", ".join(silent)), file=sys.__stderr__, flush=True)

    def _tell(self, step: int) -> None:
        usual = median(self._usual) if self._usual else None
        known = say("trainer.watchdog.usual", seconds=usual, times=TIMES) if usual is not None else ""
        self._log(say("trainer.watchdog.hangs", step=step, seconds=self._seconds, usual=known))
        try:
            if self._pulse is not None and (silent := self._pulse.silent()):
                self._tell_silent(silent)
            if sys.__stderr__ is not None:
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        finally:
            if self._ends:
                os._exit(HUNG)
