"""Dry runs of scripts and functions, each in a process of its own: its changes to torch never touch this one's."""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from tightfit.errors import ConfigError, DeviceError, TightfitError
from tightfit.simulation.client import Simulator, run_once
from tightfit.simulation.requests import Failed, ScriptRequest, sent
from tightfit.vgpu.records import Findings, Settings
from tightfit.wording import say


def dryrun_script(
    script: str,
    arguments: Sequence[str],
    settings: Settings,
    environ: Mapping[str, str] | None = None,
    *,
    simulator: Simulator | None = None,
) -> Findings:
    """Play a script on a virtual GPU, in `environ` instead of this process's environment.

    It runs in a new process, or in a fork of `simulator`'s, which starts at once. Raises this package's errors for an
    unknown card or script, DeviceError if the process left no result.
    """
    if not Path(script).is_file():
        raise ConfigError(say("vgpu.script.no_file", script=script))
    environ = {**(os.environ if environ is None else environ), "CUDA_VISIBLE_DEVICES": ""}
    request = ScriptRequest(
        script=sent(script),
        arguments=tuple(map(sent, arguments)),
        settings=replace(settings, snapshot=settings.snapshot and sent(settings.snapshot)),
        environ={sent(name): sent(value) for name, value in environ.items()},
        folder=sent(os.getcwd()),
    )
    answer = simulator.play([request])[0] if simulator else run_once(request, environ=environ)
    if isinstance(answer, Findings):
        return answer
    raise _error_of(answer)


def dryrun_function(function: Callable[[], object], settings: Settings) -> Findings:
    """Play a function that another process can import. ConfigError for one that it cannot."""
    place = f"{function.__module__}:{function.__qualname__}"
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise ConfigError(say("simulation.dry_run.not_importable", place=place))
    with tempfile.TemporaryDirectory(prefix="tightfit-") as folder:
        script = Path(folder, "call.py")
        script.write_text(f"import {function.__module__} as module\nmodule.{function.__qualname__}()\n")
        paths = os.pathsep.join([*filter(None, sys.path), os.getcwd()])
        return dryrun_script(str(script), [], settings, environ={**os.environ, "PYTHONPATH": paths})


def _error_of(failed: Failed) -> TightfitError:
    if not failed.exit_code:
        return DeviceError(say("simulation.dry_run.no_result", reason=failed.error))
    error = TightfitError(failed.error)
    error.exit_code = failed.exit_code
    return error
