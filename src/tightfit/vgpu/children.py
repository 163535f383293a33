"""Processes that a script starts: those of Python are played on the same card, and the rest is reported.

A folder belongs to the play. Each process that plays writes its findings there, and the bytes of the card that it
holds while it starts another one.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from tightfit.vgpu.assign import assign
from tightfit.vgpu.child import wrap_processes
from tightfit.vgpu.findings import findings_of
from tightfit.vgpu.phases import EnoughSeen
from tightfit.vgpu.play_folder import VARIABLE, ChildSettings, watch
from tightfit.vgpu.records import END_SIGNAL, Findings, Place, Settings
from tightfit.vgpu.session import VirtualSession
from tightfit.wording import say

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

_HOOK = str(Path(__file__).parent / "child_hook")
_LONGEST_COMMAND = 120
_LAST_WORDS_S = 6.0
_POLL_S = 0.05


class Children:
    """The processes of one play. To be closed."""

    def __init__(self, settings: Settings, *, guards_files: bool, snapshot: str | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tightfit-play-"))
        (self.folder / "root").write_text(str(Path(__file__).parents[2]))
        ends_at = None if settings.timeout_s is None else time.time() + settings.timeout_s
        asked = ChildSettings(settings=replace(settings, snapshot=snapshot), guards_files=guards_files, ends_at=ends_at)
        (self.folder / "settings.json").write_bytes(msgspec.json.encode(asked))
        os.environ.update(self.environ())

    def __enter__(self) -> "Children":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def environ(self, given: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return an environment in which a Python process finds this play."""
        found = dict(os.environ if given is None else given)
        paths = [_HOOK, *(path for path in found.get("PYTHONPATH", "").split(os.pathsep) if path and path != _HOOK)]
        return {**found, VARIABLE: str(self.folder), "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}

    @contextlib.contextmanager
    def watched(self, session: VirtualSession) -> Iterator[None]:
        """Follow the processes that the lines within start."""
        watch(session.allocator, self.folder)
        _keep_variables(self)
        _follow_forks(session, self.folder)
        yield

    def joined(self, own: Findings) -> Findings:
        """Return the findings of the process that decides, with remarks about the others. Those that run are ended."""
        self._end_running()
        found = self._findings()
        best = max([own, *found], key=_weight)
        remarks = [say("vgpu.children.decides")] if best is not own else []
        remarks += [say("vgpu.children.played", count=len(found))] if found else []
        return self._with_unplayed(replace(best, notes=[*remarks, *best.notes], seconds=own.seconds))

    def found(self) -> Findings | None:
        """Return the findings of the process that decides, without one of our own; None if none was played."""
        found = self._findings()
        return self._with_unplayed(max(found, key=_weight)) if found else None

    def _end_running(self) -> None:
        """Let processes that still play leave their findings."""
        until, asked = time.monotonic() + _LAST_WORDS_S, set[str]()
        while (running := self._running()) and time.monotonic() < until:
            for number in running - asked:
                with contextlib.suppress(OSError):
                    os.kill(int(number), END_SIGNAL)
            asked |= running
            time.sleep(_POLL_S)

    def _running(self) -> set[str]:
        marks = (each for each in self.folder.glob("*.started") if not each.with_suffix(".json").exists())
        return {each.stem for each in marks if os.path.exists(f"/proc/{each.stem}")}

    def _findings(self) -> list[Findings]:
        files = sorted(self.folder.glob("*.json"))
        return [msgspec.json.decode(file.read_bytes(), type=Findings) for file in files if file.stem.isdecimal()]

    def _with_unplayed(self, found: Findings) -> Findings:
        lost = [each for each in self.folder.glob("*.started") if not each.with_suffix(".json").exists()]
        commands = [each.read_text() for each in [*self.folder.glob("*.unplayed"), *lost]]
        if not commands:
            return found
        sentences = [say("vgpu.children.unplayed", command=each[:_LONGEST_COMMAND]) for each in commands]
        places = [Place(file=each[:_LONGEST_COMMAND], line=0) for each in commands]
        return replace(found, notes=[*sentences, *found.notes], not_played=[*places, *found.not_played])


def _keep_variables(children: Children) -> None:
    """Add our variables where a script gives a process an environment of its own."""
    usual: Callable[..., None] = subprocess.Popen.__init__

    def start(process: "subprocess.Popen[bytes]", *args: object, **kwargs: object) -> None:
        env = kwargs.get("env")
        if isinstance(env, Mapping) and VARIABLE not in env:
            kwargs["env"] = children.environ({str(name): str(value) for name, value in env.items()})
        usual(process, *args, **kwargs)

    assign(subprocess.Popen, __init__=start)


def _follow_forks(session: VirtualSession, folder: Path) -> None:
    """Let the forks of `multiprocessing` leave their findings, too."""

    def followed(process: "BaseProcess") -> Callable[[], None]:
        run, before = process.run, len(session.device.recorder.events)

        def run_followed() -> None:
            try:
                run()
            except EnoughSeen:
                pass
            finally:
                _leave(session, folder, sys.exception(), before)

        return run_followed

    wrap_processes(followed)


def _leave(session: VirtualSession, folder: Path, error: BaseException | None, before: int) -> None:
    """Write the findings of a fork that used the card. CUDA refuses that to forks of a process that uses it."""
    if len(session.device.recorder.events) == before:
        return
    if before:
        (folder / f"{os.getpid()}.unplayed").write_text(say("vgpu.children.forked"))
        return
    session.device.recorder.settle()
    (folder / f"{os.getpid()}.json").write_bytes(msgspec.json.encode(findings_of(session, error)))


def _weight(found: Findings) -> tuple[int, int, int]:
    """Return a key that sorts findings: the worst outcome of the processes that used the card decides."""
    used = found.peak.allocated_bytes > 0 or found.failure is not None
    worst = ("fits", "error", "out_of_memory").index(found.outcome)
    return worst, int(used), found.gpu.used_by_others_bytes + found.peak.device_bytes
