"""Runs a script in a fresh process, on the card that is there or on a virtual one, and reads the figures it wrote."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tightfit

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_DRYRUN = """import json, sys, msgspec, tightfit
script, arguments, request = json.loads(sys.argv[1])
print(msgspec.json.encode(tightfit.dryrun(script, *arguments, **request)).decode())"""
_LONGEST_ERROR = 500
"""Characters of a failed program's last line that are kept."""


@dataclass(frozen=True)
class Ran:
    """What a script left."""

    figures: dict[str, Any] | None
    """The JSON that it wrote, or None if it ended before."""
    findings: dict[str, Any] | None
    """Of `tightfit.dryrun`; None on a real card."""
    output: str
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line of what it printed."""
        lines = self.output.strip().splitlines()
        return lines[-1][:_LONGEST_ERROR] if lines else "no output"


def run_on_card(script: Path, arguments: Sequence[str], *, timeout_s: float = 300) -> Ran:
    """The script on the real card; it gets `--json FILE` to write its figures to."""
    return _with_figures(lambda place: [sys.executable, str(script), *arguments, "--json", place], timeout_s)


def run_on_virtual(script: Path, arguments: Sequence[str], request: dict[str, Any], *, timeout_s: float = 600) -> Ran:
    """The same under `tightfit.dryrun(script, ..., **request)`, to the script's end."""
    return _with_figures(
        lambda place: dryrun_command(script, [*arguments, "--json", place], request), timeout_s, virtual=True
    )


def dryrun_command(script: Path, arguments: Sequence[str], request: dict[str, Any]) -> list[str]:
    """The command that runs a script to its end on a virtual card and prints the findings."""
    request = {"until_stable": False, **request}
    return [sys.executable, "-c", _DRYRUN, json.dumps([str(script), list(arguments), request])]


def environment(*, virtual: bool = False) -> dict[str, str]:
    """This process's, with one card, the same tightfit and these scripts; one thread for each virtual card."""
    paths = [str(Path(tightfit.__file__).parents[1]), str(ROOT), os.environ.get("PYTHONPATH", "")]
    found = {
        "CUDA_VISIBLE_DEVICES": "0",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    # Its files are to be read, so it does not work on a view of its own.
    return {**found, "OMP_NUM_THREADS": "1", "TIGHTFIT_DRYRUN_FILES": "patches"} if virtual else found


def run(
    command: Sequence[str], *, timeout_s: float, cwd: Path | None = None, virtual: bool = False
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error; after `timeout_s` seconds it is killed with all its children."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(virtual=virtual),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        err += f"\nkilled after {timeout_s:g} seconds"
    return process.returncode, out, err


def has_liger() -> bool:
    """Whether the loss kernels of liger-kernel are installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def _with_figures(command: Callable[[str], list[str]], timeout_s: float, *, virtual: bool = False) -> Ran:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tightfit-gpu-") as folder:
        place = Path(folder, "figures.json")
        _, out, err = run(command(str(place)), timeout_s=timeout_s, virtual=virtual)
        figures = json.loads(place.read_text()) if place.exists() else None
    findings = json.loads(out) if virtual and out.startswith("{") else None
    return Ran(figures, findings, err, round(time.monotonic() - started, 2))
