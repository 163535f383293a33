"""Progress of a long command on standard error: a bar on a terminal, a line every few seconds anywhere else."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tightfit.wording import say

EVERY_S = 4.0
"""Seconds between two lines. Nothing may be silent for more than five."""
_FIRST_S = 4.0
"""Seconds before the first line: a shorter command prints none."""
_FRAMES_A_S = 4


class Progress:
    """The stage of a command and the plays done in it."""

    def __init__(self, text: str) -> None:
        self._text, self._done, self._total, self._steps = text, 0, 0, 0
        self._started = time.monotonic()

    def stage(self, text: str) -> None:
        """Begin another stage."""
        self._text, self._done, self._total, self._steps = text, 0, 0, 0

    def count(self, done: int, total: int) -> None:
        """Note how many of the stage's plays are done."""
        self._done, self._total = done, total

    def count_steps(self, steps: int) -> None:
        """Note how many optimizer steps the stage's plays have done together."""
        self._steps = steps

    def state(self) -> tuple[str, int, int]:
        """Return the stage, the plays that are done in it and all of them; 0 plays if they are not known."""
        text = say("cli.progress.with_steps", text=self._text, steps=self._steps) if self._steps else self._text
        return text, self._done, self._total

    def line(self) -> str:
        """Describe the state in a line."""
        text, seconds = self._text, time.monotonic() - self._started
        if self._total > 1:
            counts = {"done": self._done, "total": self._total}
            if self._steps:
                return say("cli.progress.counted_steps", text=text, **counts, steps=self._steps, seconds=seconds)
            return say("cli.progress.counted", text=text, **counts, seconds=seconds)
        if self._steps:
            return say("cli.progress.line_steps", text=text, steps=self._steps, seconds=seconds)
        return say("cli.progress.line", text=text, seconds=seconds)


@contextmanager
def shown(text: str, *, bar: bool = True) -> Iterator[Progress]:
    """Show the progress of the lines within; without `bar` in lines also on a terminal, where others print as well."""
    progress, ended = Progress(text), threading.Event()
    show = _draw if bar and sys.stderr.isatty() else _print
    thread = threading.Thread(target=show, args=(progress, ended), daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        ended.set()
        thread.join()


def _print(progress: Progress, ended: threading.Event) -> None:
    wait_s = _FIRST_S
    while not ended.wait(wait_s):
        print(f"tightfit: {progress.line()}", file=sys.stderr, flush=True)
        wait_s = EVERY_S


def _draw(progress: Progress, ended: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    stage = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (SpinnerColumn("line"), BarColumn(bar_width=20), TimeElapsedColumn(), stage)
    with Bar(*columns, console=Console(stderr=True), transient=True, refresh_per_second=_FRAMES_A_S) as bars:
        task = bars.add_task("", total=None)
        while not ended.wait(1 / _FRAMES_A_S):
            text, done, total = progress.state()
            bars.update(task, description=text, completed=done, total=total or None)
