"""nanoGPT's loop, played on the virtual GPU. Runs in a process of its own."""

import contextlib
import importlib.util
import linecache
import os
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import msgspec
import torch

from tightfit.simulation.requests import LoopPlay, LoopRequest, Moment
from tightfit.simulation.speed import Meter, rates_of
from tightfit.vgpu.findings import findings_of
from tightfit.vgpu.records import Settings
from tightfit.vgpu.session import VirtualSession

_FILE = os.path.join(os.sep, "nanogpt_loop.py")
"""The loop's file in findings: outside the package, so that its lines count as a user's."""


def play_loop(request: LoopRequest) -> LoopPlay:
    """Play the loop; return its findings, and the card's seconds up to each of its parts."""
    started = time.monotonic()
    session = VirtualSession(
        Settings(
            gpu=request.gpu,
            memory_bytes=request.memory_bytes,
            used_bytes=request.used_bytes,
            context_bytes=request.context_bytes,
            until_stable=False,
        ),
        request.environ,
    )
    rates, meter = rates_of(session.gpu, compiled=request.compiles), Meter()
    course: list[Moment] = []

    def note(part: str, **where: int | str) -> None:
        work = meter.read()
        course.append(Moment(part=part, **where, seconds=work.seconds(rates), kernels=work.launches))  # type: ignore[arg-type]

    loop = _loop_module()
    error: BaseException | None = None
    with contextlib.redirect_stdout(sys.stderr), session.active():
        session.device.observer = meter
        try:
            loop.run(request.settings, note)
        except torch.OutOfMemoryError as failure:
            error = failure
    found = findings_of(session, error)
    if found.failure and found.failure.file == _FILE:
        source = linecache.getline(_FILE, found.failure.line).strip()
        found = msgspec.structs.replace(found, failure=msgspec.structs.replace(found.failure, source=source))
    return LoopPlay(findings=found, course=tuple(course), play_seconds=round(time.monotonic() - started, 3))


def _loop_module() -> ModuleType:
    """The loop, compiled under a file name of its own; torch.compile reads its lines from linecache."""
    source = Path(__file__).with_name("nanogpt_loop.py").read_text(encoding="utf-8")
    linecache.cache[_FILE] = (len(source), None, source.splitlines(keepends=True), _FILE)
    module = importlib.util.module_from_spec(ModuleSpec("nanogpt_loop", None, origin=_FILE))
    sys.modules["nanogpt_loop"] = module
    exec(compile(source, _FILE, "exec"), vars(module))  # our own file
    return module
