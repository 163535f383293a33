"""The process that plays: it has loaded torch, and forks a child for each play, so that one starts in milliseconds.

Each line of its standard input is a batch: `{"folder": ..., "workers": n, "plays": [...]}`; the answer to play i is the
file `i.json` in the folder, and a line is printed when all are there. The virtual GPU changes torch for good, so no
process plays twice.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tightfit.simulation.server import COMPILER, TRACING, load

_LOOP = "nanogpt_loop.py"


def serve() -> None:
    """Serve until standard input ends."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gc.disable()  # what is loaded stays
    load(TRACING)
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        batch = json.loads(line)
        _run_batch(Path(batch["folder"]), batch["plays"], batch["workers"])
        print("done", flush=True)


def _run_batch(folder: Path, plays: list[dict[str, Any]], workers: int) -> None:
    shutil.copyfile(Path(__file__).with_name(_LOOP), folder / _LOOP)
    if sum(bool(_keys(play).get("compile")) for play in plays) and importlib.util.find_spec("triton"):
        load(COMPILER)
        gc.freeze()
    running = 0
    for number, play in enumerate(plays):
        if running == workers:
            os.wait()
            running -= 1
        if os.fork() == 0:
            _child(play, folder / _LOOP, folder / f"{number}.json")
        running += 1
    for _ in range(running):
        os.wait()


def _keys(play: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = play["keys"] if "keys" in play else play["trace"]["config"]
    return found


def _child(play: dict[str, Any], loop: Path, answer: Path) -> None:
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            found = _trace(play) if "trace" in play else _play(play, loop)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        part = answer.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(answer)
    finally:
        os._exit(0)  # autograd's thread of a virtual device does not end by itself


def _trace(play: dict[str, Any]) -> dict[str, Any]:
    """tightfit's own trainer, as a plan's prediction is made."""
    from tightfit.simulation.step_trace import TraceRequest, trace

    request = dict(play["trace"])
    request["capability"] = tuple(request["capability"]) if request["capability"] else None
    return trace(TraceRequest(**request))


def _play(play: dict[str, Any], loop: Path) -> dict[str, Any]:
    """nanoGPT's loop: the findings, and its course, with the card's seconds up to each of its parts."""
    from tightfit.simulation.speed import Meter, rates_of
    from tightfit.vgpu.findings import findings_of
    from tightfit.vgpu.session import Request, VirtualSession

    started = time.monotonic()
    request = dict(play["request"])
    request["capability"] = tuple(request["capability"]) if request.get("capability") else None
    session = VirtualSession(Request(**request, until_stable=False, environ=play["environ"]))
    rates, meter = rates_of(session.gpu, compiled=bool(play["keys"]["compile"])), Meter()
    course: list[dict[str, Any]] = []

    def note(what: str, **where: Any) -> None:
        work = meter.read()
        course.append({"what": what, **where, "seconds": work.seconds(rates), "kernels": work.launches})

    spec = importlib.util.spec_from_file_location("nanogpt_loop", loop)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    error: BaseException | None = None
    with contextlib.redirect_stdout(sys.stderr), session.active():
        session.device.observer = meter
        try:
            module.run(play["keys"], note)
        except Exception as failure:
            error = failure
    found = findings_of(session, error)
    lines = loop.read_text().splitlines()
    if found["failure"] and found["failure"]["file"] == str(loop):
        found["failure"]["source"] = lines[found["failure"]["line"] - 1].strip()
    return found | {"course": course, "play_seconds": round(time.monotonic() - started, 3)}


if __name__ == "__main__":
    serve()
    sys.stdout.flush()
    os._exit(0)
