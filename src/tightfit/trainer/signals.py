"""Handle signals of this process for the time of a block."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator


@contextlib.contextmanager
def handling_signals(
    numbers: Iterable[signal.Signals], handler: Callable[[signal.Signals], object], *, once: bool = False
) -> Iterator[None]:
    """Call `handler` for these signals of the process; with `once` the usual handlers return after the first one.

    Python allows this in the main thread only; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, before in usual.items():
            signal.signal(number, before)

    def handle(number: int, _frame: object) -> None:
        if once:
            restore()
        handler(signal.Signals(number))

    for number in usual:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
