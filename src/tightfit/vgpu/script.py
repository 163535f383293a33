"""Run a program on the virtual GPU as Python would, and return the findings."""

import argparse
import contextlib
import errno
import importlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from msgspec.structs import replace

from tightfit.errors import ConfigError, DeviceError
from tightfit.vgpu.at_exit import ExitFunctions
from tightfit.vgpu.child import Part, print_traceback
from tightfit.vgpu.children import Children
from tightfit.vgpu.command_line import Program
from tightfit.vgpu.findings import errors_behind, findings_of
from tightfit.vgpu.notebooks import in_cells, notebook_script
from tightfit.vgpu.phases import EnoughSeen
from tightfit.vgpu.records import Findings, Settings
from tightfit.vgpu.session import VirtualSession
from tightfit.wording import say

_LISTED_LINES = 5
_NETWORK_NAMES = (
    "gaierror herror URLError ConnectionError ConnectError ConnectTimeout NewConnectionError NameResolutionError "
    "MaxRetryError OfflineModeIsEnabled LocalEntryNotFoundError OfflineModeEnabled ClientConnectorError CommError"
)
_NETWORK_ERRORS = frozenset(_NETWORK_NAMES.split())
"""Errors that the standard library, requests, httpx, urllib3, huggingface_hub, datasets and wandb raise offline."""
_NETWORK_PLACES = (
    "Network is unreachable",
    "Temporary failure in name resolution",
    "huggingface.co",
    "Hugging Face Hub",
)
"""Texts of errors whose libraries hide the first one, as `evaluate.load` does."""


def run_script(script: str, arguments: Sequence[str], settings: Settings) -> Findings:
    """Play a script with its arguments. ConfigError if it is not there."""
    return run_program(Program(kind="script", target=script, arguments=tuple(arguments)), settings)


def run_program(
    program: Program,
    settings: Settings,
    *,
    in_view: bool = False,
    has_network: bool = True,
    on_step: Callable[[int], object] = lambda steps: None,
) -> Findings:
    """Play a program. ConfigError if it is not there.

    Its own output goes to standard error, where a person sees it and a machine's reader does not.
    `in_view`: the user's files are kept by a private view, so that other programs may run, too. `on_step` hears of the
    program's optimizer steps.
    """
    _set_environment(program, settings)
    if program.kind == "other" and not in_view:
        raise ConfigError(say("vgpu.command.needs_view", command=program.target))
    started = time.monotonic()
    children = Children(
        settings, guards_files=not in_view, snapshot=settings.snapshot if program.kind == "other" else None
    )
    notebook = Path(program.target).resolve()  # before the play goes to its folder
    with children, _prepared(program) as (run, notes, script):
        if run is None:
            return _only_children(program, children, started)
        session = VirtualSession(settings, guards_files=not in_view)
        session.notes[:0] = notes
        session.on_step = on_step
        with contextlib.redirect_stdout(sys.stderr), session.active(), children.watched(session):
            error = _run(run, program, session)
        found = findings_of(session, error, seconds=time.monotonic() - started)
        if script:
            found = in_cells(found, notebook, Path(script))
        if error is not None and in_view and (limit := _limit_of_view(error, has_network)):
            found = replace(found, stopped_because=f"{found.stopped_because}; {limit}")
        found = children.joined(found)
        if found.outcome == "fits" and not found.peak.allocated_bytes:
            found = replace(found, notes=[*found.notes, say("vgpu.findings.unused")])
        return found


def play_in_child(program: Program, part: Part) -> int:
    """Play a program that a launcher would start, in the process of the launcher; return its exit code."""
    _set_environment(program, part.settings)
    with _prepared(program) as (run, notes, _):
        if run is None:
            return subprocess.run([program.target, *program.arguments], check=False).returncode
        error = _run(run, program, part.start(notes))
        if error is not None:
            part.fail(error)
        part.finish()
    return 0 if error is None else 1


def _run(run: Callable[[], object], program: Program, session: VirtualSession) -> BaseException | None:
    """Run a program and its exit functions; return the error that ended it."""
    if cards := program.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ["CUDA_VISIBLE_DEVICES"] = cards  # for the script: torch has looked for cards already
    exits = ExitFunctions()
    with exits.registering():
        error = _error_of(run)
        if error is None and not session.ends_early:
            last = exits.call(_error_of)
            error = last if isinstance(last, torch.OutOfMemoryError) else None
    return None if error is not None and session.ends_unset(error) else error


def _error_of(run: Callable[[], object]) -> BaseException | None:
    try:
        run()
    except EnoughSeen:
        pass
    except SystemExit as end:
        return _behind(end) if end.code not in (None, 0) else None
    except BaseException as failure:  # the script's own, whatever it is: the findings name it
        session = VirtualSession.running()
        if session is None or session.device.assumed.needed_by(failure) is None:  # else it is played once more
            print_traceback(failure)
        return failure
    return None


def _behind(end: SystemExit) -> BaseException | None:
    """Return the error for which the script ended itself, as Hydra does once it has printed one; else its own end.

    A text of the script's own says more than such an error. An out-of-memory error is left for the findings to judge.
    """
    errors = list(errors_behind(end))
    if any(isinstance(each, EnoughSeen) for each in errors):
        return None
    if isinstance(end.code, str) or any(isinstance(each, torch.OutOfMemoryError) for each in errors):
        return end
    refusal = _refusal_of(end)
    return argparse.ArgumentError(None, refusal) if refusal else errors[min(1, len(errors) - 1)]


def _refusal_of(end: SystemExit) -> str:
    """Return argparse's remark on the arguments for which it ended the script, or nothing."""
    frames = (frame for frame, _ in traceback.walk_tb(end.__traceback__))
    refusals = (each for each in frames if each.f_code is argparse.ArgumentParser.error.__code__)
    return next((str(each.f_locals["message"]) for each in refusals), "")


def _limit_of_view(error: BaseException, has_network: bool) -> str:
    """Return a sentence about the limit of the private view that an error comes from, or nothing."""
    if not has_network and _wants_network(error):
        return say("vgpu.findings.no_network")
    match error:
        case OSError(errno=errno.ENOSPC):
            return say("vgpu.findings.no_room")
        case OSError(errno=errno.EOVERFLOW):
            return say("vgpu.findings.other_owner")
    return ""


def _wants_network(error: BaseException) -> bool:
    """Return True if an error, or one that led to it, is that of a missing network."""
    return any(
        type(each).__name__ in _NETWORK_ERRORS or any(place in str(each) for place in _NETWORK_PLACES)
        for each in errors_behind(error)
    )


def _set_environment(program: Program, settings: Settings) -> None:
    os.environ.update({name: value for name, value in program.environ.items() if name != "CUDA_VISIBLE_DEVICES"})
    size = os.environ.get("WORLD_SIZE", "1")
    if settings.rank and size.isdecimal() and int(size) > 1:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        os.environ["RANK"], os.environ["LOCAL_RANK"] = str(settings.rank), str(settings.rank % local_size)


@contextlib.contextmanager
def _prepared(program: Program) -> Iterator[tuple[Callable[[], object] | None, list[str], str]]:
    """Set `sys.argv` and `sys.path` as Python would; yield the call that runs the program, and remarks.

    The last one is the script that a notebook was made into, or nothing.
    """
    target, notes = program.target, list(program.notes)
    sys.argv = [target, *program.arguments]
    match program.kind:
        case "other":
            yield None, notes, ""
        case "module":
            sys.path.insert(0, os.getcwd())
            _check_module(target)
            yield (lambda: runpy.run_module(target, run_name="__main__", alter_sys=True)), notes, ""
        case "code":
            sys.argv[0] = "-c"
            sys.path.insert(0, os.getcwd())
            yield (lambda: _run_code(target)), notes, ""
        case "entry_point":
            name, _, place = target.partition("=")
            sys.argv[0] = shutil.which(name) or name
            yield (lambda: _call(place)), notes, ""
        case "notebook":
            with _notebook(Path(target)) as (script, skipped):
                yield (lambda: runpy.run_path(script, run_name="__main__")), [*notes, *skipped], script
        case _:
            if not os.path.isfile(target):
                raise ConfigError(say("vgpu.script.no_file", script=target))
            sys.path.insert(0, str(Path(target).resolve().parent))
            yield (lambda: runpy.run_path(target, run_name="__main__")), notes, ""


def _check_module(name: str) -> None:
    if not _is_there(name):
        raise ConfigError(say("vgpu.command.no_module", module=name, folder=os.getcwd()))


def _is_there(name: str) -> bool:
    """Return True if a module is there. Its package is not imported, which may look for a card, or fail by itself."""
    first, *rest = name.split(".")
    try:
        found = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return False
    for part in rest:
        folders = found.submodule_search_locations if found else None
        # A full name would be looked up in its imported package, if a folder has no __init__.py.
        found = PathFinder.find_spec(part, folders) if folders is not None else None
    return found is not None


def _run_code(code: str) -> None:
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(code, "<string>", "exec"), main.__dict__)  # as `python -c` does


def _call(place: str) -> None:
    """Call an entry point as its console script does."""
    module, _, name = place.partition(":")
    function: object = importlib.import_module(module.strip())
    for part in name.partition("[")[0].strip().split("."):
        function = getattr(function, part)
    assert callable(function)
    sys.exit(function())


@contextlib.contextmanager
def _notebook(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Write a notebook's cells as a script, and go to its folder as Jupyter does."""
    text, lines = notebook_script(path)
    with tempfile.TemporaryDirectory(prefix="tightfit-") as folder:
        script = Path(folder, f"{path.name}.py")
        script.write_text(text, encoding="utf-8")
        os.chdir(path.resolve().parent)
        sys.path.insert(0, os.getcwd())
        os.environ.setdefault("MPLBACKEND", "agg")
        listed = "; ".join(lines[:_LISTED_LINES])
        yield str(script), [say("vgpu.command.magics", count=len(lines), lines=listed)] if lines else []


def _only_children(program: Program, children: Children, started: float) -> Findings:
    """Run a shell script or another program; the Python programs that it starts are played."""
    done = subprocess.run([program.target, *program.arguments], env=children.environ(), check=False)
    found = children.found()
    if found is None:
        raise DeviceError(say("vgpu.command.nothing_played", command=program.target, code=done.returncode))
    return replace(found, notes=[*program.notes, *found.notes], seconds=round(time.monotonic() - started, 3))
