"""A small parent process that starts a training run again when the system killed it, from its last good state.

The kernel's out-of-memory killer gives no error that the run itself could survive, and after some faults of a CUDA
context no call of the process succeeds. The parent never imports torch: it holds about 20 MiB. The child tells it by a
file what it last saved and how it ran; a restart halves that, so that what was killed for memory needs less of it.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tightfit.config import TrainConfig
from tightfit.storage import write_aside

BEYOND_SAVING = 75
"""Exit code of a process that a new one can replace: EX_TEMPFAIL of BSD's sysexits.h."""
STATUS = "TIGHTFIT_STATUS"
"""Names the file in which a supervised run tells how it is; also tells a run that it has a supervisor."""
MOST_RESTARTS = 3
"""Restarts without a newer saved state before the parent gives up."""
LONG_RUN = 1000
"""Steps from which on a run is supervised without being asked."""
_KILLED = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, getattr(signal, "SIGBUS", signal.SIGKILL))
"""For want of memory: the system's killer; std::bad_alloc that nothing caught; a library that wrote to what it did not
get (oneDNN's assembler does); a page that cannot be had."""
_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def wants_supervision(config: TrainConfig) -> bool:
    """As the key says; of itself for long runs of one process whose output is not captured in this one."""
    if STATUS in os.environ or config.supervise is False:
        return False
    if config.supervise is True:
        return True
    is_long = config.max_iters >= LONG_RUN and not config.eval_only
    return is_long and "RANK" not in os.environ and _is_a_file(sys.stdout) and _is_a_file(sys.stderr)


def supervise(arguments: Sequence[str], config: TrainConfig, *, say: Callable[[str], object] = print) -> int:
    """Run `tightfit train ARGUMENTS` in a child until it ends by itself; the exit code of the last one."""
    points = f"every {config.save_interval} steps" if config.save_interval else "at evaluations only (--save_interval)"
    every = f"; evaluations are every {config.eval_interval} steps" if not config.save_interval else ""
    say(f"supervised: if the system kills this run it starts again from its last state, saved {points}{every}")
    added: list[str] = []
    lossy: dict[str, Any] = {}
    restarts, saved = 0, -1
    with tempfile.TemporaryDirectory(prefix="tightfit-") as folder:
        status = Path(folder) / "status.json"
        while True:
            sys.stdout.flush()
            code = _run_child([*arguments, *added], status)
            if not can_be_replaced(code):
                return code if code >= 0 else 128 - code
            told = read_status(status)
            restarts = 1 if told.get("saved_step", -1) > saved else restarts + 1
            saved = max(saved, told.get("saved_step", -1))
            if restarts > MOST_RESTARTS:
                say(f"{_cause(code)} {restarts} times with nothing newer saved: {_ADVICE}")
                return code if code >= 0 else 128 - code
            lossy |= told.get("lossy", {})  # a child that was given them tells of no plan of its own
            added = overrides({**told, "lossy": lossy})
            begin = f"step {told['saved_step']}" if told.get("saved_step", 0) > 0 else "where it began"
            say(f"{_cause(code)}; starting again from {begin} with {' '.join(added) or 'the same settings'}")


_ADVICE = "this run does not fit; try a smaller --micro_batch, a smaller model or more memory"


def overrides(told: Mapping[str, Any]) -> list[str]:
    """Options that make a run go on where it was, with less memory than it told to have used.

    >>> overrides({"saved_step": 40, "n_layer": 12, "micro_batch": 6, "eval_micro_batch": 12, "loss": "auto",
    ...            "checkpointed_blocks": 0})
    ['--init_from=resume', '--micro_batch=3', '--eval_micro_batch=6', '--loss=auto', '--activation_checkpointing=0']
    """
    words = []
    if told.get("saved_step", 0) > 0:
        words.append("--init_from=resume")
    if "micro_batch" in told:
        is_least = told["micro_batch"] == 1
        words += [
            f"--micro_batch={max(1, told['micro_batch'] // 2)}",
            f"--eval_micro_batch={max(1, told['eval_micro_batch'] // 2)}",
            f"--loss={'chunked' if is_least and told['loss'] != 'liger' else told['loss']}",
            f"--activation_checkpointing={told['n_layer'] if is_least else told['checkpointed_blocks']}",
        ]
        words += [f"--{key}={value}" for key, value in told.get("lossy", {}).items()]
        if (budget := told.get("activation_memory_budget", 1.0)) < 1:
            words.append(f"--activation_memory_budget={budget:g}")
    return words


def can_be_replaced(code: int) -> bool:
    """Whether a child that ended with `code` (minus the signal's number if one killed it) may be started again."""
    return code == BEYOND_SAVING or -code in _KILLED


def report_status(**told: float | str | Mapping[str, Any]) -> None:
    """Tell the supervisor, if there is one; a reader sees the old status or the new one."""
    if path := os.environ.get(STATUS):
        with contextlib.suppress(OSError):  # the supervisor is gone, or its disk is full: a restart would know less
            write_aside(Path(path), json.dumps(told))


def read_status(path: Path) -> dict[str, Any]:
    """What the child told last; nothing if it ended before it told anything."""
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _run_child(arguments: Sequence[str], status: Path) -> int:
    """In a process group of its own, so that a Ctrl-C reaches it once: from here."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tightfit", "train", *arguments],
        env={**os.environ, STATUS: str(status)},
        process_group=0 if os.name == "posix" else None,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    with _passing_signals_to(child):
        return child.wait()


@contextlib.contextmanager
def _passing_signals_to(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    numbers = [getattr(signal, name) for name in _PASSED_ON if hasattr(signal, name)]
    usual = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, lambda got, _frame: child.send_signal(got))
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """SIGTERM when the supervisor is gone, so that no run goes on unseen; PR_SET_PDEATHSIG of linux/prctl.h."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _cause(code: int) -> str:
    if code == BEYOND_SAVING:
        return "the training process could not go on"
    return f"the training process was ended by {signal.Signals(-code).name}, as the system does when memory is short"


def _is_a_file(stream: object) -> bool:
    """Output that a caller captures in this process would lack the child's."""
    try:
        return int(stream.fileno()) in (1, 2)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
