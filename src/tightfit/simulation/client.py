"""The service's client: starts the server at the first question, remembers answers, ends everything at once."""

import importlib.util
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TypeVar, cast

import msgspec

from tightfit.errors import DeviceError
from tightfit.simulation.cache import recall, remember
from tightfit.simulation.requests import AnyRequest, Ask, Failed, Reply, Request, decode_answer
from tightfit.simulation.wire import Frames, send

_TIMEOUT_S = 600
"""Seconds without any answer after which the server is given up."""
_ENDING_S = 2
"""Seconds that the server gets to end its plays; then the kernel ends them with it."""
_CHUNK = 1 << 16
_DIED = "the process that plays ended early; if this machine's memory ran out, that is the reason"
A = TypeVar("A", bound=msgspec.Struct)
Progress = Callable[[int, int], object]
"""Called with the plays done and the plays asked for."""


class Simulator:
    """Answers requests by playing them on the virtual GPU, two or more at a time. To be closed."""

    def __init__(self, *, workers: int | None = None) -> None:
        self._workers = workers or min(4, os.cpu_count() or 1)
        self.will_compile = False
        """Load the compiler when the server starts: a play that needs it is expected."""
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

    def play(self, requests: Sequence[Request[A]], *, progress: Progress | None = None) -> list[A | Failed]:
        """Return the answer to each request, in their order, or `Failed`. Put the longest first.

        DeviceError if the server does not answer for ten minutes.
        """
        answers: dict[int, A | Failed] = {}
        for number, request in enumerate(requests):
            if (found := recall(request)) is not None:
                answers[number] = found
        missing = [number for number in range(len(requests)) if number not in answers]
        self.played += len(missing)
        for reply in self._asked({number: requests[number] for number in missing}):
            request = requests[reply.number]
            if reply.failed is None:
                answers[reply.number] = answer = decode_answer(request, reply.answer)
                remember(request, answer)
            else:
                answers[reply.number] = reply.failed
            if progress:
                progress(len(answers), len(requests))
        return [answers[number] for number in range(len(requests))]

    def _asked(self, requests: Mapping[int, Request[A]]) -> Iterator[Reply]:
        """Replies to `requests`, as they come; each request has one."""
        waiting = set(requests)
        if not waiting:
            return
        try:
            connection = self._start()
            for number, request in requests.items():
                send(connection, Ask(number=number, request=cast(AnyRequest, request)))
            while waiting:
                for reply in self._received(connection):
                    waiting.discard(reply.number)
                    yield reply
        except ConnectionError:
            self.close()
            yield from (Reply(number=number, failed=Failed(error=_DIED)) for number in waiting)

    def _received(self, connection: socket.socket) -> list[Reply]:
        ready, _, _ = select.select([connection], [], [], _TIMEOUT_S)
        if not ready:
            raise DeviceError(f"a trace took more than {_TIMEOUT_S} seconds; train with --fit=off, and report it")
        data = connection.recv(_CHUNK)
        if not data:
            raise ConnectionResetError
        return self._replies.feed(data)

    def _start(self) -> socket.socket:
        if self._connection is None:
            hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            options = ["compiler"] if self.will_compile and importlib.util.find_spec("triton") else []
            words = [str(self._workers), *options]
            self._process, self._connection = _start_server(*words, environ={**os.environ, **hidden})
            self._replies = Frames(Reply)
        return self._connection


def run_once(request: Request[A], *, timeout_s: float) -> A | Failed:
    """Answer one request in a process of its own, on this machine's real devices, or return `Failed`."""
    process, connection = _start_server("once", environ=dict(os.environ))
    deadline = time.monotonic() + timeout_s
    try:
        send(connection, Ask(number=0, request=cast(AnyRequest, request)))
        frames = Frames(Reply)
        while True:
            ready, _, _ = select.select([connection], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return Failed(error=f"not done after {timeout_s:.0f} s")
            data = connection.recv(_CHUNK)
            if not data:
                return Failed(error=f"it ended with code {process.wait()} and no answer")
            for reply in frames.feed(data):
                return reply.failed or decode_answer(request, reply.answer)
    finally:
        connection.close()
        process.kill()
        process.wait()


def _start_server(*mode: str, environ: dict[str, str]) -> tuple["subprocess.Popen[bytes]", socket.socket]:
    """Start `python -m tightfit.simulation.server`; it ends when the socket does, or this process."""
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-m", "tightfit.simulation.server", str(theirs.fileno()), *mode]
    with theirs:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, env=environ, pass_fds=(theirs.fileno(),))
    return process, ours
