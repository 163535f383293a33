"""The process that plays: it has loaded torch, and forks a child for each play, so that a play starts in milliseconds.

The virtual GPU changes torch for good, so no process plays twice. Plays that compile are forked from a second process,
itself a fork that has loaded the compiler. Everything ends with the client: the kernel kills the server when its
parent dies, and each child when the server dies.
"""

import contextlib
import ctypes
import gc
import importlib
import logging
import os
import selectors
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import msgspec

from tightfit.errors import DataError, TightfitError
from tightfit.simulation.protection import Protection, protect
from tightfit.simulation.requests import (
    AnyRequest,
    Ask,
    DetailRequest,
    Failed,
    HostRequest,
    LoopRequest,
    Reply,
    ScriptRequest,
    StepRequest,
    TimingRequest,
    received,
)
from tightfit.simulation.wire import Frames, send
from tightfit.system.frame_stack import with_frame_stack
from tightfit.vgpu.records import END_SIGNAL, Findings
from tightfit.wording import say

_TRACING = (
    "tightfit.simulation.step_trace",
    "torch.distributed.tensor",
    "torch.distributed._functional_collectives",
    "torch.fx.experimental.symbolic_shapes",
    "torch.profiler._cupti_monitor",
    "torch.utils._device",
)
"""What torch loads when a first tensor is traced: a second or more of each fork."""
_SHARDING = (
    "torch._dynamo",
    "tightfit.trainer.recovery",
    "tightfit.trainer.sharding",
    "torch.nn.parallel.distributed",
    "torch.testing._internal.distributed.fake_pg",
)
"""What plays of several cards load besides: a second or more of each fork."""
_COMPILER = (
    "torch._dynamo.variables",
    "torch._inductor.compile_fx",
    "torch._inductor.scheduler",
    "torch._inductor.codegen.triton",
    "torch._inductor.codegen.wrapper",
    "torch._inductor.codegen.cuda_combined_scheduling",
    "torch._inductor.codegen.pallas",  # Inductor registers all its backends, and this one takes longest to load
    "torch.distributed.tensor.experimental",
    "sympy.tensor.tensor",
)
"""What torch loads when something is compiled: two seconds of each fork."""
_PR_SET_PDEATHSIG = 1
_CHUNK = 1 << 16


@with_frame_stack
def main() -> None:
    """Serve the socket with the number in the first argument.

    The second is the number of plays at a time, or "once": one request, answered in this process. With "compiler"
    after it, the compiler is loaded before a request needs it; with "shards", what plays of several cards need.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the client gets Ctrl-C and ends this process
    number, mode, *options = sys.argv[1:]
    connection = socket.socket(fileno=int(number))
    connection.set_inheritable(False)  # what a script starts must not keep it open
    if mode == "once":
        _serve_once(connection)
    else:
        _load([*_TRACING, *(_SHARDING if "shards" in options else ())])
        server = Server(connection, workers=int(mode))
        if "compiler" in options:
            server.start_compiler()
        server.serve()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the answer is sent: taking the interpreter down would only take time


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, where it can be asked (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve_once(connection: socket.socket) -> None:
    frames = Frames(Ask)
    while data := connection.recv(_CHUNK):
        for ask in frames.feed(data):
            script, protection = _script_of(ask.request), None
            if script and script.is_quiet:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.dup2(2, 1)  # output of the play goes where a person reads it, and no program expects an answer
            if script:
                _end_at_terminate()
                protection = _protected(script)
                os.chdir(received(script.folder))  # before a module remembers it
                _load(("tightfit.vgpu.script",))
                gc.freeze()
            send(connection, _reply(ask, protection, partial(_tell_steps, connection, ask.number, os.getpid())))
            return


def _end_at_terminate() -> None:
    """Let SIGTERM end a script's play as the client does; a batch system sends it to all processes of a job."""
    own = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a fork of the script's
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), END_SIGNAL if os.getpid() == own else number)

    signal.signal(signal.SIGTERM, handle)


def _tell_steps(connection: socket.socket, number: int, process: int, steps: int) -> None:
    if os.getpid() != process:  # a fork of the script's, whose message could fall into the middle of another one
        return
    with contextlib.suppress(OSError):  # the client has gone, and the kernel ends this process
        send(connection, Reply(number=number, steps=steps))


@dataclass
class Child:
    """A process that plays one request."""

    number: int
    """Number of the request."""
    process: int
    connection: socket.socket
    frames: Frames[Reply] = field(default_factory=lambda: Frames(Reply))
    answer: Reply | None = None


class Server:
    """Play the requests of a socket, a few at a time, until the socket ends."""

    def __init__(self, connection: socket.socket, *, workers: int, has_compiler: bool = False) -> None:
        self._connection, self._workers, self._has_compiler = connection, workers, has_compiler
        self._selector = selectors.DefaultSelector()
        self._waiting: deque[Ask] = deque()
        self._children: dict[int, Child] = {}
        """By the number of the file that carries what they send."""
        self._compiler: socket.socket | None = None
        self._compiling = 0

    def serve(self) -> None:
        """Return when the other side has closed the socket; unfinished plays are killed."""
        frames, from_compiler = Frames(Ask), Frames(Reply)
        self._selector.register(self._connection, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._connection:
                    data = self._connection.recv(_CHUNK)
                    if not data:
                        self._end_children()
                        return
                    self._waiting.extend(frames.feed(data))
                elif key.fileobj is self._compiler:
                    self._forward(from_compiler)
                else:
                    self._read_child(key.fd)
            self._start_waiting()

    def start_compiler(self) -> None:
        """Fork the process that loads the compiler; plays that compile nothing go on meanwhile."""
        ours, theirs = socket.socketpair()
        if _forked():
            theirs.close()
            self._compiler = ours
            self._selector.register(ours, selectors.EVENT_READ)
            return
        try:
            ours.close()
            self._close_all()
            _load(_COMPILER)
            Server(theirs, workers=self._workers, has_compiler=True).serve()
        finally:
            os._exit(0)

    def _start_waiting(self) -> None:
        while self._waiting and len(self._children) + self._compiling < self._workers:
            ask = self._waiting.popleft()
            if self._has_compiler or not ask.request.compiles:
                self._fork(ask)
                continue
            if self._compiler is None:
                self.start_compiler()
            assert self._compiler is not None
            send(self._compiler, ask)
            self._compiling += 1

    def _forward(self, frames: Frames[Reply]) -> None:
        assert self._compiler is not None
        for reply in frames.feed(self._compiler.recv(_CHUNK)):
            self._compiling -= not reply.steps
            send(self._connection, reply)

    def _fork(self, ask: Ask) -> None:
        ours, theirs = socket.socketpair()
        if process := _forked():
            theirs.close()
            self._children[ours.fileno()] = Child(ask.number, process, ours)
            self._selector.register(ours.fileno(), selectors.EVENT_READ)
            return
        try:
            ours.close()
            self._close_all()
            null = os.open(os.devnull, os.O_RDWR)
            # What a script prints is for the person who plays it; what libraries print in other plays is for nobody.
            script = _script_of(ask.request)
            output = 2 if script and not script.is_quiet else null
            for source, stream in ((null, 0), (output, 1), (output, 2)):
                os.dup2(source, stream)
            protection = _protected(script) if script else None
            send(theirs, _reply(ask, protection, partial(_tell_steps, theirs, ask.number, os.getpid())))
        finally:
            os._exit(0)

    def _read_child(self, file: int) -> None:
        child = self._children[file]
        if data := child.connection.recv(_CHUNK):
            for reply in child.frames.feed(data):
                if reply.steps:
                    send(self._connection, reply)
                else:
                    child.answer = reply
            return
        self._selector.unregister(file)
        child.connection.close()
        del self._children[file]
        _, status = os.waitpid(child.process, 0)
        code = os.waitstatus_to_exitcode(status)
        failed = Failed(error=say("simulation.server.no_answer", code=code))
        send(self._connection, child.answer or Reply(number=child.number, failed=failed))

    def _end_children(self) -> None:
        """Kill what still plays, and wait until it is gone; the compiler's process does so with its own."""
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process, signal.SIGKILL)
        if self._compiler is not None:
            self._compiler.close()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()

    def _close_all(self) -> None:
        """Close the inherited sockets, so that each ends with its owner."""
        self._selector.close()
        self._connection.close()
        for child in self._children.values():
            child.connection.close()
        if self._compiler is not None:
            self._compiler.close()


def _forked() -> int:
    """Fork: the child's process number in the parent, 0 in the child, which ends when the parent does."""
    gc.freeze()  # what is loaded stays
    if child := os.fork():
        return child
    end_with_parent()
    return 0


def _load(modules: Iterable[str]) -> None:
    """Import the modules that plays will need and this torch has."""
    gc.disable()  # what is loaded stays: looking through it again and again takes time
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.enable()


def _reply(
    ask: Ask, protection: Protection | None = None, on_step: Callable[[int], object] = lambda steps: None
) -> Reply:
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)  # it remarks on a card that is not here
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # no card logs a script's errors
    try:
        answer = _answer(ask.request, protection, on_step)
        return Reply(number=ask.number, answer=msgspec.Raw(_encoded(answer)))
    except TightfitError as error:
        failed = Failed(error=str(error), traceback=traceback.format_exc(), exit_code=error.exit_code)
        return Reply(number=ask.number, failed=failed)
    except Exception as error:  # a play may fail in any way that torch can; the client judges
        failed = Failed(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        return Reply(number=ask.number, failed=failed)


def _encoded(answer: msgspec.Struct) -> bytes:
    """Encode an answer; bytes of file names that are no text are shown as escapes."""
    try:
        return msgspec.json.encode(answer)
    except UnicodeEncodeError:
        return msgspec.json.encode(_printable(msgspec.to_builtins(answer)))


def _printable(value: object) -> object:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case list():
            return [_printable(each) for each in value]
        case dict():
            return {_printable(name): _printable(each) for name, each in value.items()}
    return value


def _enter(request: ScriptRequest) -> None:
    """Give this process the environment, the working folder and the import path of a script."""
    os.environ.clear()
    os.environ.update({received(name): received(value) for name, value in request.environ.items()})
    os.chdir(received(request.folder))
    if processes := sys.modules.get("multiprocessing.process"):
        processes.__dict__["ORIGINAL_DIR"] = os.getcwd()  # by which it finds the script again
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[1:1] = [path for path in paths if path not in sys.path]


def _script_of(request: AnyRequest) -> ScriptRequest | None:
    """Return the script that a request plays, if it plays one."""
    if isinstance(request, DetailRequest):
        return request.run
    return request if isinstance(request, ScriptRequest) else None


def _protected(request: ScriptRequest) -> Protection:
    words = [received(each) for each in (request.script, *request.arguments)]
    environ = {received(name): received(value) for name, value in request.environ.items()}
    snapshot = request.settings.snapshot
    return protect(
        words,
        environ,
        received(request.folder),
        network=request.settings.network,
        outside=[received(snapshot)] if snapshot else [],
    )


def _play_script(request: ScriptRequest, protection: Protection, on_step: Callable[[int], object]) -> Findings:
    from tightfit.vgpu.command_line import read_command
    from tightfit.vgpu.script import run_program

    _enter(request)
    for name, value in protection.environ.items():
        os.environ.setdefault(name, value)
    _replace_files(request, protection)
    snapshot = request.settings.snapshot
    settings = msgspec.structs.replace(request.settings, snapshot=snapshot and received(snapshot))
    words = [received(each) for each in (request.script, *request.arguments)]
    program = read_command(words, rank=settings.rank)
    found = run_program(
        program,
        settings,
        in_view=protection.view is not None,
        has_network=protection.has_network,
        on_step=on_step,
    )
    protection.carry_out()
    return msgspec.structs.replace(
        found,
        protection=protection.kind,
        notes=[protection.note, *found.notes],
        not_written=[
            *found.not_written,
            *protection.changed(besides=[*found.not_written, *map(received, request.replaced)]),
        ],
    )


def _replace_files(request: ScriptRequest, protection: Protection) -> None:
    """Write the texts that a script is to find into the private view. DataError where there is none."""
    if request.replaced and protection.view is None:
        raise DataError(say("simulation.server.needs_view", file=next(map(received, request.replaced))))
    for path, text in request.replaced.items():
        Path(received(path)).write_bytes(text.encode("utf-8", "surrogateescape"))


def _answer(request: AnyRequest, protection: Protection | None, on_step: Callable[[int], object]) -> msgspec.Struct:
    """Play one request. Each kind has its own imports."""
    match request:
        case StepRequest():
            from tightfit.simulation.step_trace import trace_step

            return trace_step(request)
        case LoopRequest():
            from tightfit.simulation.loop_play import play_loop

            return play_loop(request)
        case ScriptRequest():
            assert protection is not None
            return _play_script(request, protection, on_step)
        case DetailRequest():
            from tightfit.simulation.detail_play import play_detail

            assert protection is not None
            return play_detail(request.cards, partial(_play_script, request.run, protection), on_step, protection.view)
        case HostRequest():
            from tightfit.simulation.processor import measure_host

            return measure_host()
        case TimingRequest():
            from tightfit.simulation.timing import time_step

            return time_step(request)


if __name__ == "__main__":
    main()
