"""A process that has loaded torch and forks a child for each trace: a trace then starts in milliseconds.

It reads a line of JSON for each trace (`id`, `request`, `answer`: the file to write) and prints one when its child has
ended (`id`, `code`). The virtual device changes torch for good, so no process traces twice.
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COMPILER = (
    "torch._dynamo.variables", "torch._inductor.compile_fx", "torch._inductor.scheduler",
    "torch._inductor.codegen.triton", "torch._inductor.codegen.wrapper",
    "torch._inductor.codegen.cuda_combined_scheduling",
)  # fmt: skip
"""Loaded once, before something is compiled in a fork or at once: 2 s for each otherwise."""
TRACING = (
    "torch.distributed.tensor", "torch.distributed._functional_collectives", "torch.fx.experimental.symbolic_shapes",
    "torch.profiler._cupti_monitor", "torch.utils._device",
)  # fmt: skip
"""What torch loads when a first tensor is traced: a second or more of each fork."""


def load(names: Iterable[str]) -> None:
    """Load what a trace needs, and what else of torch forks will need, as far as this torch has it."""
    importlib.import_module("tightfit.simulation.step_trace")
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def serve() -> None:
    """Serve until standard input ends."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    load(TRACING)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, Any] = {}
    _say({"id": None, "code": 0})
    pending, open_ = b"", True
    while open_ or running:
        ready, _, _ = select.select([woken, *([0] if open_ else [])], [], [])
        if 0 in ready:
            data = os.read(0, 1 << 16)
            open_ = bool(data)
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                running[_fork(message)] = message["id"]
        if woken in ready:
            os.read(woken, 1 << 10)
            _reap(running)


def serve_one() -> None:
    """Answer a single trace, with the compiler loaded before it is asked for: compiling in a fork takes longer."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    load((*TRACING, *COMPILER))
    line = sys.stdin.readline()
    if line:
        message = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            _answer(message)
        _say({"id": message["id"], "code": 0})
    sys.stdout.flush()
    os._exit(0)  # autograd's thread of a virtual device does not end by itself


def _fork(message: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        gc.freeze()  # what is loaded stays
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(2, 1)
        os.close(0)
        _answer(message)
        code = 0
    finally:
        os._exit(code)


def _answer(message: dict[str, Any]) -> None:
    answer = Path(message["answer"])
    part = answer.with_suffix(".part")
    part.write_text(json.dumps(_traced(message["request"])))
    part.replace(answer)


def _traced(request: dict[str, Any]) -> dict[str, Any]:
    import traceback

    from tightfit.simulation.step_trace import TraceRequest, trace

    logging.getLogger("torch._inductor").setLevel(logging.ERROR)  # it remarks on a card that is not here
    capability = request.pop("capability")
    try:
        return trace(TraceRequest(capability=tuple(capability) if capability else None, **request))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def _reap(running: dict[int, Any]) -> None:
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        _say({"id": running.pop(child), "code": os.waitstatus_to_exitcode(status)})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve_one() if sys.argv[1:] == ["one"] else serve()
