"""Notice a step that hangs: print the stack of every thread, and let the supervisor start again from the last state."""

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

from tightfit.trainer.supervise import HUNG
from tightfit.wording import say

TIMES = 20
"""Multiple of the usual time of a step after which it counts as hanging."""
LEAST_S, FIRST_S = 300.0, 3600.0
"""Seconds that any step may take, because torch may compile anew; and those of the first step."""
POLL_S = 1.0
_REMEMBERED = 50
"""Steps whose median is the usual time."""


class Watchdog:
    """A thread that counts the seconds of a step; those in which the whole process is stopped do not count."""

    def __init__(self, log: Callable[[str], object], *, ends: bool) -> None:
        """`ends`: end the process when a step hangs, for the supervisor to start another."""
        self._log, self._ends = log, ends
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
            self._step = None
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
            if step is not None and not self._is_told and self._seconds >= self._limit_s():
                self._is_told = True
                self._tell(step)

    def _tell(self, step: int) -> None:
        usual = median(self._usual) if self._usual else None
        known = say("trainer.watchdog.usual", seconds=usual, times=TIMES) if usual is not None else ""
        self._log(say("trainer.watchdog.hangs", step=step, seconds=self._seconds, usual=known))
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        if self._ends:
            os._exit(HUNG)
