"""A script's own `atexit` functions, which belong to its play: Python would call them after the play's findings."""

import atexit
import contextlib
from collections.abc import Callable, Iterator
from types import CodeType

from tightfit.vgpu.assign import assign
from tightfit.vgpu.child import print_traceback
from tightfit.vgpu.frames import is_own
from tightfit.vgpu.phases import EnoughSeen


class ExitFunctions:
    """Registers a script's functions in place of `atexit`, and calls them as it would."""

    def __init__(self) -> None:
        self._kept: list[tuple[Callable[..., object], Callable[[], object]]] = []

    @contextlib.contextmanager
    def registering(self) -> Iterator[None]:
        register, unregister = atexit.register, atexit.unregister

        def keep(function: Callable[..., object], /, *args: object, **kwargs: object) -> Callable[..., object]:
            if not _is_scripts(function):
                return register(function, *args, **kwargs)
            self._kept.append((function, lambda: function(*args, **kwargs)))
            return function

        def forget(function: Callable[..., object], /) -> None:
            self._kept = [each for each in self._kept if each[0] != function]
            unregister(function)

        assign(atexit, register=keep, unregister=forget)
        try:
            yield
        finally:
            assign(atexit, register=register, unregister=unregister)

    def call(self) -> BaseException | None:
        """Call the functions, the last one first; return the last error of theirs."""
        failure: BaseException | None = None
        while self._kept:
            try:
                self._kept.pop()[1]()
            except (EnoughSeen, SystemExit):
                pass
            except BaseException as error:  # the script's own, whatever it is: Python goes on after it, too
                print_traceback(error)
                failure = error
        return failure


def _is_scripts(function: Callable[..., object]) -> bool:
    code = getattr(getattr(function, "func", function), "__code__", None)
    return isinstance(code, CodeType) and is_own(code)
