"""The service's client: starts the server at the first question, remembers answers, ends everything at once."""

import contextlib
import importlib.util
import math
import os
import select
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar, cast

import msgspec
import psutil

from tightfit.errors import DeviceError
from tightfit.simulation.cache import recall, remember
from tightfit.simulation.requests import AnyRequest, Ask, Failed, Reply, Request, decode_answer
from tightfit.simulation.stand_in_terminal import input_for_plays
from tightfit.simulation.wire import Frames, send
from tightfit.storage import has_temporary_folder, without_temporary_folder
from tightfit.vgpu.records import END_SIGNAL
from tightfit.wording import say

_TIMEOUT_S = 600
"""Seconds without any answer before the client gives up."""
_ENDING_S = 2
"""Seconds that the server gets to end its plays; then the kernel ends them with it."""
_LAST_WORDS_S = 20
"""Seconds that an interrupted play gets to answer with its findings so far."""
_CHUNK = 1 << 16
_POLL_S = 0.5
A = TypeVar("A", bound=msgspec.Struct)
Progress = Callable[[int, int], object]
"""Called with the plays done and the plays asked for."""


class Simulator:
    """Answers requests by playing them on the virtual GPU, two or more at a time. To be closed."""

    def __init__(
        self,
        *,
        workers: int | None = None,
        progress: Progress | None = None,
        on_step: Callable[[int], object] = lambda steps: None,
    ) -> None:
        """`on_step` hears how many optimizer steps the plays of one call of `play` have done together."""
        self._workers, self._progress = workers or min(4, os.cpu_count() or 1), progress
        self._on_step = on_step
        self.will_compile = False
        """Load the compiler when the server starts: a play that needs it is expected."""
        self.will_shard = False
        """Load what plays of several cards need when the server starts."""
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._replies = Frames(Reply)
        self.played = 0
        """Plays that were made, not found on disk."""

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._process is not None and sys.platform == "linux":
            _kill(self._process)  # Ctrl-C is not to wait for torch to load
        self.close()

    def close(self) -> None:
        """End the server and all that it still plays, at once."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            try:
                self._process.wait(_ENDING_S)
            except subprocess.TimeoutExpired:  # it still loads torch
                self._process.kill()
                self._process.wait()
            self._process = self._connection = None

    def play(self, requests: Sequence[Request[A]]) -> list[A | Failed]:
        """Return the answer to each request, in their order, or `Failed`. Put the longest first.

        DeviceError if the server does not answer for ten minutes.
        """
        answers: dict[int, A | Failed] = {}
        for number, request in enumerate(requests):
            if request.is_remembered and (found := recall(request)) is not None and request.still_holds(found):
                answers[number] = found
        steps: dict[int, int] = {}
        self._on_step(0)
        missing = [number for number in range(len(requests)) if number not in answers]
        self.played += len(missing)
        self._report(len(answers), len(requests))
        for reply in self._asked({number: requests[number] for number in missing}):
            request = requests[reply.number]
            if reply.steps:
                steps[reply.number] = reply.steps
                self._on_step(sum(steps.values()))
                continue
            if reply.failed is None:
                answers[reply.number] = answer = decode_answer(request, reply.answer)
                if request.is_remembered:
                    remember(request, answer)
            else:
                answers[reply.number] = reply.failed
            self._report(len(answers), len(requests))
        return [answers[number] for number in range(len(requests))]

    def _report(self, done: int, total: int) -> None:
        if self._progress:
            self._progress(done, total)

    def _asked(self, requests: Mapping[int, Request[A]]) -> Iterator[Reply]:
        """Yield replies to `requests` as they come: one to each, and before it those that count its steps."""
        waiting = set(requests)
        if not waiting:
            return
        if any(each.compiles for each in requests.values()) and not has_temporary_folder():
            raise DeviceError(say("simulation.client.nowhere_to_compile"))
        try:
            connection = self._start()
            for number, request in requests.items():
                send(connection, Ask(number=number, request=cast(AnyRequest, request)))
            while waiting:
                for reply in self._received(connection):
                    if not reply.steps:
                        waiting.discard(reply.number)
                    yield reply
        except ConnectionError:
            self.close()
            yield from (Reply(number=number, failed=Failed(error=say("simulation.client.died"))) for number in waiting)

    def _received(self, connection: socket.socket) -> list[Reply]:
        ready, _, _ = select.select([connection], [], [], _TIMEOUT_S)
        if not ready:
            raise DeviceError(say("simulation.client.gave_up", seconds=_TIMEOUT_S))
        data = connection.recv(_CHUNK)
        if not data:
            raise ConnectionResetError
        return self._replies.feed(data)

    def _start(self) -> socket.socket:
        if self._connection is None:
            hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **without_temporary_folder()}
            options = ["compiler"] if self.will_compile and importlib.util.find_spec("triton") else []
            options += ["shards"] if self.will_shard else []
            words = [str(self._workers), *options]
            self._process, self._connection = _start_server(*words, environ={**os.environ, **hidden})
            self._replies = Frames(Reply)
        return self._connection


def run_once(
    request: Request[A],
    *,
    timeout_s: float | None = None,
    environ: Mapping[str, str] | None = None,
    on_step: Callable[[int], object] = lambda steps: None,
) -> A | Failed:
    """Answer one request in a process of its own, on this machine's real devices, or return `Failed`.

    `on_step` hears how many optimizer steps a script has done. After Ctrl-C a play answers with its findings so far.
    """
    process, connection = _start_server(
        "once", environ={**(os.environ if environ is None else environ), **without_temporary_folder()}
    )
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    try:
        send(connection, Ask(number=0, request=cast(AnyRequest, request)))
        frames = Frames(Reply)
        while time.monotonic() < deadline:
            has_ended = process.poll() is not None  # a child of the play may hold the socket open after it
            try:
                ready, _, _ = select.select([connection], [], [], 0.0 if has_ended else _POLL_S)
            except KeyboardInterrupt:
                if deadline != math.inf:
                    raise
                deadline = time.monotonic() + _LAST_WORDS_S
                process.send_signal(END_SIGNAL)
                continue
            data = connection.recv(_CHUNK) if ready else b""
            for reply in frames.feed(data):
                if reply.steps:
                    on_step(reply.steps)
                    continue
                return reply.failed or decode_answer(request, reply.answer)
            if not data and (ready or has_ended):
                code = process.wait()
                if code == -END_SIGNAL:  # it had not begun to play
                    raise KeyboardInterrupt
                return Failed(error=say("simulation.client.no_answer", code=code))
        if timeout_s is None:
            raise KeyboardInterrupt
        return Failed(error=say("simulation.client.too_slow", seconds=f"{timeout_s:.0f}"))
    except ConnectionError:
        return Failed(error=say("simulation.client.no_answer", code=process.wait()))
    finally:
        connection.close()
        _kill(process)
        process.wait()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a server with its plays and what their scripts started, which nothing else would end."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in started:
        with contextlib.suppress(psutil.Error):
            child.kill()


def _start_server(*mode: str, environ: Mapping[str, str]) -> tuple["subprocess.Popen[bytes]", socket.socket]:
    """Start `python -m tightfit.simulation.server`; it ends when the socket does, or this process.

    ModuleNotFoundError where torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-m", "tightfit.simulation.server", str(theirs.fileno()), *mode]
    with theirs, input_for_plays() as (stdin, kept):
        environ = _with_this_package(environ)
        # In a session of its own: what a terminal or `timeout` sends to all is for this process, which passes it on.
        process = subprocess.Popen(
            words, stdin=stdin, env=environ, pass_fds=(theirs.fileno(), *kept), start_new_session=True
        )
    return process, ours


def _with_this_package(environ: Mapping[str, str]) -> dict[str, str]:
    """Let the server import this very package where only this process's sys.path has it, as in a notebook's clone."""
    root = str(Path(__file__).parents[2])
    if root in map(sysconfig.get_path, ("purelib", "platlib")):
        return dict(environ)
    return {**environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))}
