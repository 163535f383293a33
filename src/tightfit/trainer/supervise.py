"""Restart a training run that the system killed, from its last good state; this is the small parent process.

The kernel's out-of-memory killer raises no error that the run could survive, and after some faults of a CUDA context
no call of the process succeeds. The parent never imports torch: it holds about 20 MiB. The child writes its last
checkpoint and its settings to a file. A restart halves the settings, so it needs less memory.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import msgspec

from tightfit.config import TrainConfig
from tightfit.config.schema import Setting
from tightfit.storage import write_aside
from tightfit.trainer.fallback import Settings
from tightfit.trainer.signals import handling_signals
from tightfit.wording import say

BEYOND_SAVING = 75
"""Exit code of a process that a new one can replace: EX_TEMPFAIL of BSD's sysexits.h."""
HUNG = 76
"""Exit code of a process whose step hung; a new one starts from the last state with the same settings."""
LEARNT = "TIGHTFIT_LEARNT"
"""Environment variable with the settings of the processes before this one."""
STATUS = "TIGHTFIT_STATUS"
"""Environment variable with the path of a supervised run's status file; a run that has it has a supervisor."""
_STATUS_BYTES = 1 << 16
MOST_RESTARTS = 3
"""Restarts without a newer checkpoint before the parent gives up."""
LONG_RUN = 1000
"""Steps from which a run is supervised by default."""
_KILLED = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, getattr(signal, "SIGBUS", signal.SIGKILL))
"""Signals of memory shortage: the system's killer; std::bad_alloc that nothing caught; a library that wrote to memory
it did not get (oneDNN's assembler does); a page that the system cannot supply."""
_CRASHES = {
    int(signal.SIGSEGV): "segmentation fault",
    int(signal.SIGABRT): "abort",
    int(getattr(signal, "SIGBUS", signal.SIGABRT)): "bus error",
}
"""Faults of a program or a library; a shortage of memory is only one of their causes."""
_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """State of a supervised run: enough to continue it with less memory."""

    saved_step: int
    """Step of the last checkpoint; 0 if there is none."""
    n_layer: int
    activation_memory_budget: float
    lossy: dict[str, Setting]
    """Keys that a plan set although they change the result; a restart must not choose them anew."""
    settings: Settings
    wanted: Settings | None = None
    """Settings that the first process began with, to which a run may grow back."""


class Learnt(msgspec.Struct, frozen=True, kw_only=True):
    """Knowledge of the processes before this one, in the environment variable `LEARNT`."""

    wanted: Settings
    failed: Settings


def learnt() -> Learnt | None:
    """Return the facts that a restarted process needs; None in a first process."""
    try:
        return msgspec.json.decode(os.environ[LEARNT], type=Learnt)
    except (KeyError, msgspec.MsgspecError):
        return None


def wants_supervision(config: TrainConfig) -> bool:
    """Follow the key `supervise`; "auto" means long runs of one process that print to the real stdout and stderr."""
    if STATUS in os.environ or config.supervise is False:
        return False
    if config.supervise is True:
        return True
    is_long = config.max_iters >= LONG_RUN and not config.eval_only
    return is_long and "RANK" not in os.environ and is_a_file(sys.stdout) and is_a_file(sys.stderr)


def supervise(arguments: Sequence[str], config: TrainConfig, *, log: Callable[[str], object] = print) -> int:
    """Run `tightfit train ARGUMENTS` in a child until it ends by itself; return the last child's exit code."""
    if config.save_interval:
        log(say("trainer.supervise.saves_at_intervals", steps=config.save_interval))
    else:
        log(say("trainer.supervise.saves_at_evaluations", steps=config.eval_interval))
    added: list[str] = []
    lossy: dict[str, Setting] = {}
    restarts, saved = 0, -1
    with _status_file() as path, contextlib.ExitStack() as at_end:
        at_end.callback(os.environ.pop, LEARNT, None)
        while True:
            sys.stdout.flush()
            code = _run_child([*arguments, *added], path)
            if not can_be_replaced(code):
                return _exit_code(code)
            status = read_status(path)
            restarts += 1
            if status is not None:
                if status.saved_step > saved:
                    restarts, saved = 1, status.saved_step
                if code != HUNG:
                    known = Learnt(wanted=status.wanted or status.settings, failed=status.settings)
                    os.environ[LEARNT] = msgspec.json.encode(known).decode()
                lossy |= status.lossy  # a child that got them as options has none of its own
                less = overrides(msgspec.structs.replace(status, lossy=lossy))
                added = _from_last_state(added, less) if code == HUNG else less
            if restarts > MOST_RESTARTS:
                if code == HUNG or -code in _CRASHES:
                    log(say("trainer.supervise.crashes", cause=_cause(code), times=restarts))
                else:
                    log(say("trainer.supervise.gives_up", cause=_cause(code), times=restarts))
                return _exit_code(code)
            log(_restart(code, saved, added))


@contextlib.contextmanager
def _status_file() -> Iterator[Path]:
    """Yield a file for the child's status: on Linux one in memory, which ends with this process however that ends."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("tightfit-status")
        try:
            yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory(prefix="tightfit-") as folder:
            yield Path(folder) / "status.json"


def _restart(code: int, saved: int, added: Sequence[str]) -> str:
    start = say("trainer.supervise.step", step=saved) if saved > 0 else say("trainer.supervise.beginning")
    options = " ".join(added) or say("trainer.supervise.same_settings")
    return say("trainer.supervise.restarts", cause=_cause(code), start=start, options=options)


def overrides(status: Status) -> list[str]:
    """Return options that continue a run from its last checkpoint with less memory than its status has.

    >>> settings = Settings(micro_batch=6, eval_micro_batch=12, loss="auto", checkpointed_blocks=0)
    >>> overrides(Status(saved_step=40, n_layer=12, activation_memory_budget=1.0, lossy={}, settings=settings))
    ['--init_from=resume', '--micro_batch=3', '--eval_micro_batch=6', '--loss=auto', '--activation_checkpointing=0']
    """
    now = status.settings
    is_least = now.micro_batch == 1
    words = ["--init_from=resume"] if status.saved_step > 0 else []
    words += [
        f"--micro_batch={max(1, now.micro_batch // 2)}",
        f"--eval_micro_batch={max(1, now.eval_micro_batch // 2)}",
        f"--loss={'chunked' if is_least and now.loss != 'liger' else now.loss}",
        f"--activation_checkpointing={status.n_layer if is_least else now.checkpointed_blocks}",
    ]
    words += [f"--{key}={value}" for key, value in status.lossy.items()]
    if status.activation_memory_budget < 1:
        words.append(f"--activation_memory_budget={status.activation_memory_budget:g}")
    return words


def _from_last_state(added: Sequence[str], less: Sequence[str]) -> list[str]:
    """Keep the options so far, and resume if `less`, the options for less memory, would."""
    resume = "--init_from=resume"
    return [*added, resume] if resume in less and resume not in added else list(added)


def can_be_replaced(code: int) -> bool:
    """Return True if a child that ended with `code` may restart; a signal's number counts as negative."""
    return code in (BEYOND_SAVING, HUNG) or -code in _KILLED


def report_status(status: Status) -> None:
    """Write the status for the supervisor, if there is one; a reader finds the old status or the new one."""
    if path := os.environ.get(STATUS):
        with contextlib.suppress(OSError):  # the supervisor is gone, or its disk is full: a restart would know less
            data = msgspec.json.encode(status)
            if path.startswith("/proc/"):
                with open(path, "r+b", buffering=0) as file:
                    file.write(data.ljust(_STATUS_BYTES))  # one call: spaces take the place of a longer status
            else:
                write_aside(Path(path), data)


def read_status(path: Path) -> Status | None:
    """Return the child's last status; None if it ended before it wrote one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Status)
    except (OSError, msgspec.DecodeError):
        return None


def _run_child(arguments: Sequence[str], status: Path) -> int:
    """Run the child in a process group of its own, so that Ctrl-C reaches it only once: from here."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tightfit", "train", *arguments],
        env={**os.environ, STATUS: str(status)},
        process_group=0 if os.name == "posix" else None,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    numbers = [signal.Signals[name] for name in _PASSED_ON if hasattr(signal, name)]
    with handling_signals(numbers, child.send_signal):
        return child.wait()


def _end_with_parent() -> None:
    """Ask for SIGTERM when the supervisor ends, so that no run continues unseen; PR_SET_PDEATHSIG of linux/prctl.h."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _cause(code: int) -> str:
    if code == HUNG:
        return say("trainer.supervise.hung")
    if code == BEYOND_SAVING:
        return say("trainer.supervise.could_not_continue")
    name = signal.Signals(-code).name
    if -code in _CRASHES:
        return say("trainer.supervise.crashed", signal=name, fault=_CRASHES[-code])
    return say("trainer.supervise.killed", signal=name)


def is_a_file(stream: TextIO) -> bool:
    """Return True for the process's own output; a stream that a caller captures would lack the child's."""
    try:
        return stream.fileno() in (1, 2)
    except (AttributeError, OSError, ValueError):
        return False
