"""A script's own `atexit` functions, which belong to its play: Python would call them after the play's findings."""

import atexit
import contextlib
from collections.abc import Callable, Iterator
from types import CodeType

from tightfit.vgpu.assign import assign
from tightfit.vgpu.frames import is_own


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

    def call(self, run: Callable[[Callable[[], object]], BaseException | None]) -> BaseException | None:
        """Call the functions by `run`, the last one first and all of them; return the last error that it returned."""
        failure: BaseException | None = None
        while self._kept:
            failure = run(self._kept.pop()[1]) or failure
        return failure


def _is_scripts(function: Callable[..., object]) -> bool:
    code = getattr(getattr(function, "func", function), "__code__", None)
    return isinstance(code, CodeType) and is_own(code)
