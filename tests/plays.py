"""Dry runs of scripts by one warm server for all tests of a process: a play starts in milliseconds.

`tightfit dryrun` itself starts a new process; tests of the command do so, too.
"""

import contextlib
import functools
import json
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tightfit.cli import cmd_dryrun
from tightfit.simulation.client import Simulator
from tightfit.simulation.dry_run import dryrun_script
from tightfit.vgpu.records import Findings


@functools.cache
def simulator() -> Simulator:
    """The server of this process, for all tests in it, which `end_server` ends, or else the kernel with the process."""
    kept = Simulator()
    kept.will_compile = True
    return kept


def end_server() -> None:
    if simulator.cache_info().currsize:
        simulator().close()


def played(words: list[object], *, folder: Path | None = None, environ: dict[str, str] | None = None) -> Findings:
    """Play as `tightfit dryrun WORDS` would, in `folder`."""
    options, _ = cmd_dryrun.parser().read([str(word) for word in words])
    before = os.getcwd()
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, before)
        os.chdir(folder or before)
        return dryrun_script(
            options.script, options.arguments, cmd_dryrun.settings_of(options), environ, simulator=simulator()
        )


def findings(
    words: list[object], *, folder: Path | None = None, environ: dict[str, str] | None = None
) -> dict[str, Any]:
    """What `--json` prints of them."""
    return json.loads(msgspec.json.encode(played(words, folder=folder, environ=environ)))  # type: ignore[no-any-return]


def use_one_server(patch: pytest.MonkeyPatch) -> None:
    """Let all simulators of this process use one server: its start takes seconds."""
    start = Simulator._start

    def shared(asking: Simulator) -> socket.socket:
        connection, asking._replies = start(simulator()), simulator()._replies
        return connection

    patch.setattr(Simulator, "_start", shared)
