"""Run a script on the virtual GPU as `python script.py` would, and return the findings."""

import contextlib
import os
import runpy
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tightfit.errors import ConfigError
from tightfit.vgpu.findings import findings_of
from tightfit.vgpu.phases import EnoughSeen
from tightfit.vgpu.session import Request, VirtualSession

_LONGEST_ERROR = 2000
"""Characters of an error's text that are shown: torch lists all its backends when an operator is missing."""


def run_script(script: str, arguments: list[str], request: Request) -> dict[str, Any]:
    """Findings (see `findings_of`) of a script with its arguments; ConfigError if it is not there.

    The script's own output goes to standard error, where a person sees it and a machine's reader does not.
    """
    path = Path(script)
    if not path.is_file():
        raise ConfigError(f"{script} is not a file; give the training script's path")
    started = time.monotonic()
    session = VirtualSession(request)
    sys.argv = [script, *arguments]
    sys.path[0:0] = [str(path.resolve().parent)]
    error: BaseException | None = None
    with contextlib.redirect_stdout(sys.stderr), session.active():
        try:
            runpy.run_path(script, run_name="__main__")
        except EnoughSeen:
            pass
        except SystemExit as end:
            error = end if end.code not in (None, 0) else None
        except BaseException as failure:
            error = failure
            _print_traceback(failure)
    found = findings_of(session, error)
    found["seconds"] = round(time.monotonic() - started, 3)
    return found


def _print_traceback(error: BaseException) -> None:
    """Print the traceback without our frames and torch's dispatch below, as it would look on a real card."""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
    frames = traceback.extract_tb(error.__traceback__)
    frames = traceback.StackSummary.from_list(
        frame for frame in frames if not frame.filename.startswith((ours, "<frozen runpy>"))
    )
    print("Traceback (most recent call last):", file=sys.stderr)
    print("".join(frames.format()), end="", file=sys.stderr)
    text = "".join(traceback.format_exception_only(error))
    print(text if len(text) < _LONGEST_ERROR else text[:_LONGEST_ERROR] + " ...", file=sys.stderr)
