"""Save a run's state whatever becomes of its folder: go on, try again, and at the end look for another place."""

import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tightfit.errors import CannotSave, DoesNotFit
from tightfit.storage import LAST, has_temporary_folder
from tightfit.wording import say

RETRY_S = 60.0
"""Seconds after which a save that failed is tried again, if none is due before."""
LAST_TRIES, LAST_WAIT_S = 3, 1.0
"""Tries of the last save in the run's own folder, and seconds before the second; twice as long before the third."""


class Begin(Protocol):
    """Copy the present state, and write the copy while the run goes on. Errors of the writing are the future's."""

    def __call__(self, folder: Path, name: str) -> "Future[None]": ...


class Write(Protocol):
    """Save the present state in a folder. CannotSave or DoesNotFit if that fails; the last good state stays."""

    def __call__(self, folder: Path, name: str, *, is_last: bool) -> object: ...


@dataclass
class Saver:
    """Saves of one run."""

    folder: Path
    write: Write
    log: Callable[[str], object]
    agreed: Callable[[Path | None], Path | None] | None = None
    """Return the main process's place to all processes, where all of them save together."""
    begin: Begin | None = None
    """Saves in the background where it is set, but for the last save of a run."""
    saved_step: int = 0
    """Step of the newest state that is on disk."""
    _retry_at: float | None = None
    _running: "tuple[int, Future[None]] | None" = None
    """Step of the state that is being written in the background."""

    def is_due(self) -> bool:
        """Return True if a save failed and it is time for the next try."""
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def save(self, name: str, step: int) -> None:
        """Save; if that fails, log it: the run goes on with its state in memory."""
        self.finish()
        try:
            if self.begin is None:
                self._written(name, step, is_last=False)
            else:
                self._running = step, self.begin(self.folder, name)
        except (CannotSave, DoesNotFit) as error:
            self._failed(error)

    def poll(self) -> bool:
        """Return True if a save in the background has ended since the last call."""
        if self._running is None or not self._running[1].done():
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Wait until nothing is written in the background; log what failed, to be tried again."""
        if self._running is None:
            return
        (step, writing), self._running = self._running, None
        try:
            writing.result()
        except (CannotSave, DoesNotFit) as error:
            self._failed(error)
        else:
            self.saved_step, self._retry_at = step, None

    def _failed(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        self.log(say("trainer.loop.goes_on", error=error, seconds=RETRY_S))

    def save_last(self, name: str, step: int) -> None:
        """Save at the end of a run; after several failures raise what failed, and save in another place if one can."""
        self.finish()
        for tries in range(LAST_TRIES):
            try:
                return self._written(name, step, is_last=True)
            except (CannotSave, DoesNotFit) as error:
                failed = error
            if tries < LAST_TRIES - 1:
                time.sleep(LAST_WAIT_S * 2**tries)
        raise CannotSave(say("trainer.loop.not_saved", error=failed, kept=self._kept_elsewhere(step))) from None

    def _written(self, name: str, step: int, *, is_last: bool) -> None:
        self.write(self.folder, name, is_last=is_last)
        self.saved_step, self._retry_at = step, None

    def _kept_elsewhere(self, step: int) -> str:
        parents = [self.folder.absolute().parent]
        if has_temporary_folder():
            parents.append(Path(tempfile.gettempdir()))
        for parent in parents:
            place = self._new_folder(parent)
            if self.agreed is not None:
                place = self.agreed(place)
            if place is None:
                continue
            try:
                self.write(place, LAST, is_last=True)
            except (CannotSave, DoesNotFit):
                shutil.rmtree(place, ignore_errors=True)
                continue
            return say("trainer.loop.rescued", step=step, place=place)
        return say("trainer.loop.lost", step=self.saved_step) if self.saved_step else say("trainer.loop.lost_all")

    def _new_folder(self, parent: Path) -> Path | None:
        try:
            return Path(tempfile.mkdtemp(prefix=f"{self.folder.name}.rescued-", dir=parent))
        except OSError:
            return None
