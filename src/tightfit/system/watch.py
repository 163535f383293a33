"""Sample the memory of every card, the host and a training run at an interval; show it live and keep it as CSV."""

import csv
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live

from tightfit.errors import ConfigError
from tightfit.system.nvml import NvmlSession
from tightfit.system.sampling import Sample, samples
from tightfit.system.watch_view import frame, missing_cards, plain_line
from tightfit.wording.system import Words

HISTORY_S = 300
"""Seconds that the sparklines cover."""


class CsvLog:
    """One row for the host, one for each card and one for the run at each moment; every row is on disk at once."""

    COLUMNS = (
        "time", "device", "name", "total_bytes", "used_bytes", "others_bytes", "temperature_c", "utilisation",
        "step", "loss", "tokens_per_s", "reserved_bytes", "peak_bytes", "allocated_bytes",
    )  # fmt: skip

    def __init__(self, path: Path) -> None:
        """Append to a log of the same columns; ConfigError for another file or one that cannot be written."""
        self._path = path
        header = ",".join(self.COLUMNS) + "\n"
        try:
            with suppress(FileNotFoundError), path.open("rb") as file:
                if (start := file.read(len(header))) and start != header.encode():
                    raise ConfigError(f"--log={path} exists and is not a log of watch; name another file")
            self._file = path.open("a", encoding="utf-8", newline="")
            self._writer = csv.DictWriter(self._file, self.COLUMNS, lineterminator="\n")
            if not self._file.tell():
                self._writer.writeheader()
        except OSError as error:
            raise ConfigError(f"--log={path} cannot be written ({error.strerror}); name another file") from None

    def write(self, sample: Sample) -> None:
        """Write one sample. ConfigError if that fails, as on a full disk."""
        try:
            for row in _rows(sample):
                self._writer.writerow({"time": sample.time.isoformat(timespec="milliseconds"), **row})
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"--log={self._path} cannot be written any more ({error.strerror}); name a file on another disk"
            ) from None

    def close(self) -> None:
        with suppress(OSError):  # the row that did not fit is still in the buffer
            self._file.close()


def watch(
    folder: Path | None,
    *,
    interval_s: float,
    once: bool,
    log: Path | None,
    console: Console,
    words: Words,
) -> None:
    """Sample until interrupted, or once: a live picture on a terminal, elsewhere a line each time."""
    history: deque[Sample] = deque(maxlen=max(2, int(HISTORY_S / interval_s)))
    with ExitStack() as stack:
        csv_log = CsvLog(log) if log else None
        if csv_log:
            stack.callback(csv_log.close)
        moments = samples(folder, stack.enter_context(NvmlSession()))
        ends_within = stack.enter_context(_ending())
        show = _show(stack, console, words, interval_s, once=once)
        while True:
            began = time.monotonic()
            history.append(next(moments))
            if csv_log:
                csv_log.write(history[-1])
            show(history)
            if once or ends_within(max(0.0, interval_s - (time.monotonic() - began))):
                return


def _show(
    stack: ExitStack, console: Console, words: Words, interval_s: float, *, once: bool
) -> Callable[[deque[Sample]], None]:
    def line(history: deque[Sample]) -> None:
        if len(history) == 1:  # missing cards stay missing: print that once
            for missing in missing_cards(history[-1], words):
                console.print(missing, soft_wrap=True)
        console.print(plain_line(history[-1], words), soft_wrap=True)

    def picture(history: deque[Sample]) -> None:
        console.print(frame(history, words, interval_s=interval_s, width=console.width, height=10**6))

    if not console.is_terminal:
        return line
    if once:
        return picture
    live = stack.enter_context(Live(console=console, auto_refresh=False))

    def update(history: deque[Sample]) -> None:
        size = console.size
        live.update(frame(history, words, interval_s=interval_s, width=size.width, height=size.height), refresh=True)

    return update


@contextmanager
def _ending() -> Iterator[Callable[[float], bool]]:
    """Yield a function that waits some seconds, and returns True as soon as SIGINT or SIGTERM came.

    The loop then ends in order and restores the terminal. A handler runs in the midst of whatever the main thread does:
    setting an Event for which it waits would wait for ever for the Event's own lock.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def handle(*_: object) -> None:
        with suppress(BlockingIOError):  # after thousands of signals
            theirs.send(b".")

    numbers = (signal.SIGINT, signal.SIGTERM)
    with ours, theirs:
        usual = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield lambda seconds: bool(select.select([ours], [], [], seconds)[0])
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)


def _rows(sample: Sample) -> Iterator[dict[str, str | float | None]]:
    host, run = sample.host, sample.run
    yield {"device": "host", "total_bytes": host.total_bytes, "used_bytes": host.used_bytes}
    for card in sample.cards.cards:
        yield {
            "device": f"gpu{card.index}",
            "name": card.name,
            "total_bytes": card.total_bytes,
            "used_bytes": card.used_bytes,
            "others_bytes": card.used_by_others_bytes,
            "temperature_c": card.temperature_c,
            "utilisation": card.utilisation,
        }
    if run:
        yield {
            "device": "run",
            "name": str(sample.folder),
            "step": run.step,
            "loss": run.loss,
            "tokens_per_s": run.tokens_per_s,
            "reserved_bytes": run.memory_bytes,
            "peak_bytes": run.peak_bytes,
            "allocated_bytes": run.allocated_bytes,
        }
