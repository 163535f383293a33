"""Run a script on the virtual GPU as `python script.py` would, and return the findings."""

import contextlib
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tightfit.errors import ConfigError
from tightfit.vgpu.findings import findings_of
from tightfit.vgpu.phases import EnoughSeen
from tightfit.vgpu.records import Findings, Settings
from tightfit.vgpu.session import VirtualSession
from tightfit.wording import say

_LONGEST_ERROR = 2000
"""Characters of an error's text that are shown: torch lists all its backends when an operator is missing."""


def run_script(
    script: str,
    arguments: Sequence[str],
    settings: Settings,
    *,
    on_step: Callable[[int], object] = lambda steps: None,
) -> Findings:
    """Play a script with its arguments; `on_step` hears of its optimizer steps. ConfigError if it is not there.

    The script's own output goes to standard error, where a person sees it and a machine's reader does not.
    """
    path = Path(script)
    if not path.is_file():
        raise ConfigError(say("vgpu.script.no_file", script=script))
    started = time.monotonic()
    session = VirtualSession(settings)
    session.on_step = on_step
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
        except BaseException as failure:  # the script's own, whatever it is: the findings name it
            error = failure
            _print_traceback(failure)
    return findings_of(session, error, seconds=time.monotonic() - started)


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
