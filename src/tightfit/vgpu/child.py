"""The side of a process that a played script starts: it plays, too, from the moment that it loads torch."""

import atexit
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, NoReturn

import msgspec

from tightfit.vgpu import play_folder
from tightfit.vgpu.play_folder import ChildSettings, held_by_others, watch
from tightfit.wording import say

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from multiprocessing.process import BaseProcess

    from tightfit.vgpu.session import VirtualSession

_LONGEST_ERROR = 2000
"""Characters of an error's text that are shown: torch lists all its backends when an operator is missing."""
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_IS_CAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
_IS_CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n\n"
_CALLS = os.path.join("torch", "nn", "modules", "module.py")
_EARLIER_S = 3.0
"""Seconds before the play's time limit at which a process of it ends: the one that started it may kill it then."""
_WORKER_LOOP = "_worker_loop"
"""Function of a DataLoader's worker: it prepares data on the host."""


class AfterTorch(importlib.abc.MetaPathFinder):
    """Starts the virtual GPU once `import torch` is done."""

    def __init__(self, part: "Part") -> None:
        self._part, self._is_looking = part, False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find torch with our loader, each time: libraries ask whether it is installed before they import it."""
        if name != "torch" or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec("torch")
        finally:
            self._is_looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._loaded)
        return spec

    def _loaded(self) -> None:
        sys.meta_path.remove(self)
        self._part.start()


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader does, and calls a function then."""

    def __init__(self, usual: importlib.abc.Loader, then: Callable[[], None]) -> None:
        self._usual, self._then = usual, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._usual
        self._usual.exec_module(module)
        self._then()


class Part:
    """This process's part of a play."""

    def __init__(self, folder: Path) -> None:
        asked = msgspec.json.decode((folder / "settings.json").read_bytes(), type=ChildSettings)
        used = asked.settings.used_bytes + held_by_others(folder)
        self.settings = msgspec.structs.replace(asked.settings, used_bytes=used)
        self._ends_at = asked.ends_at
        self.guards_files, self._folder = asked.guards_files, folder
        self._session: VirtualSession | None = None
        self._active: AbstractContextManager[object] | None = None
        self._error: BaseException | None = None
        self._started = time.monotonic()

    def start(self, notes: Sequence[str] = ()) -> "VirtualSession":
        """Put the virtual GPU into this process's torch until the process ends."""
        from tightfit.vgpu.session import VirtualSession

        if self._session is not None:
            return self._session
        self._mark("started", " ".join(sys.orig_argv))
        left = None if self._ends_at is None else max(1.0, round(self._ends_at - time.time() - _EARLIER_S))
        settings = msgspec.structs.replace(self.settings, timeout_s=left)
        self._session = session = VirtualSession(settings, guards_files=self.guards_files, is_tested=True)
        session.notes[:0] = notes
        self._active = session.active()
        self._active.__enter__()
        watch(session.allocator, self._folder)
        sys.excepthook = self._end_by_error
        atexit.register(self.finish)
        return session

    def _mark(self, kind: str, text: str) -> None:
        (self._folder / f"{os.getpid()}.{kind}").write_text(text)

    def lose(self, reason: str) -> None:
        """Note that this process was not played."""
        self._mark("unplayed", f"{' '.join(sys.orig_argv)} ({reason})")

    def fail(self, error: BaseException) -> None:
        self._error = error

    def _end_by_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        from tightfit.vgpu.phases import EnoughSeen

        if isinstance(error, EnoughSeen):
            self.finish()
            end_process(0)  # Python would end with 1
        self.fail(error)
        print_traceback(error)

    def finish(self) -> None:
        """Write this process's findings."""
        session, active = self._session, self._active
        if session is None or active is None:
            return
        from tightfit.vgpu.findings import findings_of

        self._session = self._active = None
        active.__exit__(None, None, None)
        found = findings_of(session, self._error, seconds=time.monotonic() - self._started)
        (self._folder / f"{os.getpid()}.json").write_bytes(msgspec.json.encode(found))


def end_process(code: int) -> NoReturn:
    """End this process as Python does at the end of a script."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def follow_processes(part_of: Callable[[], Part]) -> None:
    """Play the processes of `multiprocessing`, except those that only prepare data."""
    part_of = cache(part_of)
    play_folder.card_of_this_process = lambda: part_of().start().device

    def played(process: "BaseProcess") -> Callable[[], None]:
        run, target = process.run, getattr(process, "_target", None)
        is_worker = getattr(target, "__name__", "") == _WORKER_LOOP
        return run if is_worker else lambda: _run_played(run, part_of())

    wrap_processes(played)


def wrap_processes(wrapped: Callable[["BaseProcess"], Callable[[], None]]) -> None:
    """Let each process of `multiprocessing` run what `wrapped` returns for it, instead of its own `run`."""
    import multiprocessing.process as processes

    usual = processes.BaseProcess._bootstrap  # type: ignore[attr-defined]

    def bootstrap(process: "BaseProcess", *args: object, **kwargs: object) -> int:
        setattr(process, "run", wrapped(process))  # noqa: B010
        code: int = usual(process, *args, **kwargs)
        return code

    setattr(processes.BaseProcess, "_bootstrap", bootstrap)  # noqa: B010


def _run_played(run: Callable[[], None], part: Part) -> None:
    from tightfit.vgpu.phases import EnoughSeen

    if "torch" not in sys.modules:
        sys.meta_path.insert(0, AfterTorch(part))
    else:
        part.start()
    try:
        run()
    except EnoughSeen:
        pass
    finally:
        if (error := sys.exception()) is not None:
            part.fail(error)
        part.finish()


def print_traceback(error: BaseException) -> None:
    """Print the traceback and those of the errors behind it, as they would look on a real card.

    Our frames and torch's dispatch below are left out, and errors that our code handled. Where memory ran out, calls in
    torch.nn.Module are only counted: they are most of a long traceback. Any other frame stays, because `tightfit
    explain` reads the phase and the layer from it.
    """
    parts = [_one_traceback(error)]
    for behind, is_cause in _behind(error):
        parts[:0] = [_one_traceback(behind), _IS_CAUSE if is_cause else _IS_CONTEXT]
    print("".join(parts), file=sys.stderr)


def _behind(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """Yield the errors behind one as Python follows them, each with True if it is the cause of the one before it."""
    seen = [error]
    while True:
        behind, is_cause = error.__cause__, error.__cause__ is not None
        if behind is None and (_was_handled_here(error.__context__) or not error.__suppress_context__):
            behind = error.__context__
            while behind is not None and _was_handled_here(behind):
                behind = behind.__context__
        if behind is None or behind in seen:
            return
        yield behind, is_cause
        seen.append(error := behind)


def _was_handled_here(error: BaseException | None) -> bool:
    """Return True for an error that our code caught or, if it has no traceback, made."""
    if error is None:
        return False
    trace = error.__traceback__
    return trace is None or trace.tb_frame.f_code.co_filename.startswith(_OURS)


def _one_traceback(error: BaseException) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_OURS, "<frozen runpy>"))
    ]
    is_short = type(error).__name__ == "OutOfMemoryError"
    lines = ["Traceback (most recent call last):\n"] if frames else []
    for left_out, part in groupby(
        frames, key=lambda frame: is_short and frame is not frames[-1] and frame.filename.endswith(_CALLS)
    ):
        several = traceback.StackSummary.from_list(list(part))
        counted = f"  [{say('vgpu.child.left_out', count=len(several))}]\n"
        lines += [counted] if left_out else several.format()
    text = "".join(traceback.format_exception_only(error))
    return "".join(lines) + (text if len(text) < _LONGEST_ERROR else text[:_LONGEST_ERROR] + " ...\n")
