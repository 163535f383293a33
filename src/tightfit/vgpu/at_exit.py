"""The end of a script, which belongs to its play: threads, `atexit` functions and processes."""

import atexit
import contextlib
import multiprocessing
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from types import CodeType

from tightfit.vgpu.assign import assign
from tightfit.vgpu.frames import is_own


class ExitFunctions:
    """Registers a script's functions in place of `atexit`, and calls them as it would."""

    def __init__(self) -> None:
        self._kept: list[tuple[Callable[..., object], Callable[[], object]]] = []
        self._processes: weakref.WeakSet[BaseProcess] = weakref.WeakSet()

    @contextlib.contextmanager
    def registering(self) -> Iterator[None]:
        register, unregister, start = atexit.register, atexit.unregister, BaseProcess.start

        def keep(function: Callable[..., object], /, *args: object, **kwargs: object) -> Callable[..., object]:
            if not _is_scripts(function):
                return register(function, *args, **kwargs)
            self._kept.append((function, lambda: function(*args, **kwargs)))
            return function

        def forget(function: Callable[..., object], /) -> None:
            self._kept = [each for each in self._kept if each[0] != function]
            unregister(function)

        def note(process: BaseProcess) -> None:
            if not process.daemon and _is_scripts(_target(process)):  # it forgets its target when it starts
                self._processes.add(process)
            start(process)

        assign(atexit, register=keep, unregister=forget)
        assign(BaseProcess, start=note)
        try:
            yield
        finally:
            assign(atexit, register=register, unregister=unregister)
            assign(BaseProcess, start=start)

    def call(self, run: Callable[[Callable[[], object]], BaseException | None]) -> BaseException | None:
        """Wait for threads, call the functions, the last one first and all of them, and wait for processes, by `run`.

        Return the last error that it returned.
        """
        failure = run(_wait_for_threads)
        while self._kept:
            failure = run(self._kept.pop()[1]) or failure
        return run(self._wait_for_processes) or failure

    def _wait_for_processes(self) -> None:
        for each in multiprocessing.active_children():
            if each in self._processes:
                each.join()


def _wait_for_threads() -> None:
    for each in threading.enumerate():
        if each is not threading.current_thread() and not each.daemon and _is_scripts(_target(each)):
            each.join()


def _target(started: threading.Thread | BaseProcess) -> Callable[..., object]:
    """Return the function that a thread or process runs: the one that it was given, or its own method."""
    given: Callable[..., object] | None = getattr(started, "_target", None)
    return given or type(started).run


def _is_scripts(function: Callable[..., object]) -> bool:
    code = getattr(getattr(function, "func", function), "__code__", None)
    return isinstance(code, CodeType) and is_own(code)
