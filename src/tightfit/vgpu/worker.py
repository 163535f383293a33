"""Starts the process that has the virtual GPU: its changes to torch never touch the one that asks."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tightfit.errors import ConfigError, DeviceError, TightfitError


def dryrun(what: str | os.PathLike[str] | Callable[[], object], *arguments: str, **request: Any) -> dict[str, Any]:
    """Return what a training script, or an importable function, would use on a virtual GPU, or where it would fail.

    `request`: gpu (a card's name), and as wanted memory_bytes, used_bytes, context_bytes, capability (a pair), steps,
    timeout_s, snapshot (a file). Returns `outcome` ("fits", "out_of_memory" or "error"), `peak`, `categories`,
    `phases`, `largest`, `failure` and what was assumed; sizes in bytes. It runs in a process of its own, so that this
    one's torch stays as it is. Raises TightfitError for a card or script that is not known.
    """
    if not callable(what):
        return dryrun_script(os.fspath(what), list(arguments), **request)
    place = f"{what.__module__}:{what.__qualname__}"
    if what.__module__ == "__main__" or "<" in what.__qualname__:
        raise ConfigError(f"{place} cannot be imported by another process; put it into a module, or pass a script")
    with tempfile.TemporaryDirectory(prefix="tightfit-") as folder:
        script = Path(folder, "call.py")
        script.write_text(f"import {what.__module__} as module\nmodule.{what.__qualname__}()\n")
        paths = os.pathsep.join([*filter(None, sys.path), os.getcwd()])
        return dryrun_script(str(script), [], environ={**os.environ, "PYTHONPATH": paths}, **request)


def dryrun_script(
    script: str, arguments: list[str], environ: Mapping[str, str] | None = None, **request: Any
) -> dict[str, Any]:
    """Findings of a script on a virtual GPU; `request` has the fields of `tightfit.vgpu.session.Request`.

    Raises this package's errors for a card or script that is not known.
    """
    if not Path(script).is_file():
        raise ConfigError(f"{script} is not a file; give the path of the training script")
    with tempfile.TemporaryDirectory(prefix="tightfit-") as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(request))
        words = [sys.executable, "-m", "tightfit.vgpu", str(asked), str(answered), script, *arguments]
        code = subprocess.run(words, env={**(environ or os.environ), "CUDA_VISIBLE_DEVICES": ""}).returncode
        try:
            found: dict[str, Any] = json.loads(answered.read_text())
        except FileNotFoundError:
            raise DeviceError(
                f"the process of the virtual GPU ended with code {code} and left no result; "
                "if the script kills itself or its own memory ran out, that is the reason"
            ) from None
    if "mistake" in found:
        error = TightfitError(found["mistake"])
        error.exit_code = found["exit_code"]
        raise error
    return found
