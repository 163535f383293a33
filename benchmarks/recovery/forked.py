"""Runs as processes of their own, forked from one that has loaded torch: starting one takes no seconds."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from ranks import in_ranks

from tightfit.simulation.server import end_with_parent


class Forked:
    """A forked process, with those of subprocess.Popen's methods that attacks need."""

    def __init__(self, action: Callable[[], int], out: Path, err: Path | None = None, **environ: str) -> None:
        """Fork a process that ends with the exit code of `action`; without `err`, errors go to `out`, too."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.peak_bytes = 0
        """Most resident memory, once it has ended."""
        self.pid = os.fork()
        if not self.pid:
            _become(action, out, err, environ)

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status, used = os.wait4(self.pid, os.WNOHANG)
            if done:
                self.returncode, self.peak_bytes = os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                assert timeout is not None
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(action: Callable[[], int], out: Path, err: Path | None, environ: Mapping[str, str]) -> NoReturn:
    """Run `action` in this new process with another output and environment, and end it."""
    end_with_parent()
    os.environ.update(environ)
    for stream, path in ((sys.stdout, out), (sys.stderr, err or out)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, stream.fileno())
        os.close(opened)
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    _end_with(action)


def _end_with(action: Callable[[], int]) -> NoReturn:
    """Run `action` as a program, and end this process."""
    code = 70
    try:
        code = action()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ranks(count: int, action: Callable[[], int]) -> int:
    """Run `action` as so many ranks of one run, which end with this process; return the largest exit code."""

    def begin() -> int:
        end_with_parent()
        return action()

    return in_ranks(count, begin)
