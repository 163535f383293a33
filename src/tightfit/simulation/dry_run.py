"""Dry runs of scripts and functions, each in a process of its own: its changes to torch never touch this one's."""

import contextlib
import io
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType

from msgspec.structs import replace

from tightfit.errors import ConfigError, DeviceError, TightfitError
from tightfit.links import split_count
from tightfit.simulation.client import Simulator, run_once
from tightfit.simulation.requests import Failed, ScriptRequest, received, sent
from tightfit.vgpu.card_arguments import described_gpu
from tightfit.vgpu.command_line import check_command, launcher_of
from tightfit.vgpu.records import Findings, Settings
from tightfit.wording import say

_IN_FULL_S = 40.0
"""Seconds for playing all iterations of a script that failed after some were passed over."""
_OF_ITS_CODE = re.compile(
    r"unexpected keyword argument|invalid combination of arguments|required (positional|keyword-only) argument|"
    r"positional arguments? but|"
    r"ModuleNotFoundError|ImportError|module '[^']*' has no attribute|Parent directory .* does not exist"
)
"""Errors that come of the script's code and versions of libraries, whichever iterations ran before."""
_BY_MISSING_ITERATIONS = re.compile(
    r"NoneType|sequence of length|non-empty|empty (list|sequence|TensorList)|IndexError|KeyError|ZeroDivisionError|"
    r"UnboundLocalError|NameError|FileNotFoundError"
)
"""Errors as scripts make them of results, or files, that some iterations did not leave behind."""
_MOST_LENGTHS = 8
"""Plays of a script that fails because lengths were made up, each with one more that fits its later lines."""
_CALL = """\
import pickle
with open({path!r}, "rb") as file:
    function, arguments = pickle.load(file)
function(*arguments)
"""


def dryrun_script(
    script: str | os.PathLike[str],
    arguments: Sequence[str],
    settings: Settings,
    environ: Mapping[str, str] | None = None,
    *,
    simulator: Simulator | None = None,
    is_quiet: bool = False,
    on_step: Callable[[int], object] = lambda steps: None,
) -> Findings:
    """Play a script on a virtual GPU, in `environ` instead of this process's environment.

    It runs in a new process, or in a fork of `simulator`'s, which starts at once; in a new one `on_step` hears of the
    optimizer steps done. What the script prints is left out if `is_quiet`. Raises this package's errors for an unknown
    card or script, DeviceError if the process left no result.
    """
    request = replace(script_request(script, arguments, settings, environ), is_quiet=is_quiet)
    environ = {received(name): received(value) for name, value in request.environ.items()}

    def played(asked: ScriptRequest) -> Findings | Failed:
        return simulator.play([asked])[0] if simulator else run_once(asked, environ=environ, on_step=on_step)

    answer, request = _with_needed_lengths(request, played)
    may_be_ours = answer.outcome == "error" and answer.is_shortened and not _OF_ITS_CODE.search(answer.stopped_because)
    return _in_full(answer, request, played) if may_be_ours else answer


def _with_needed_lengths(
    request: ScriptRequest, play: Callable[[ScriptRequest], Findings | Failed]
) -> tuple[Findings, ScriptRequest]:
    """Play a script, and again with each length without which it fails; return the last findings and their request."""
    while True:
        answer = play(request)
        if not isinstance(answer, Findings):
            raise error_of(answer)
        known = request.settings.needed
        if answer.needed is None or len(known) == _MOST_LENGTHS:
            return answer, request
        request = replace(request, settings=replace(request.settings, needed=(*known, answer.needed)))


def _in_full(failed: Findings, request: ScriptRequest, play: Callable[[ScriptRequest], Findings | Failed]) -> Findings:
    """Play a script that failed after iterations were passed over once more, with all of them.

    It may count its iterations, and fail because of those that did not run. Without an end in time, the failure stays,
    unless such iterations are what an error like it comes of.
    """
    seconds = min(request.settings.timeout_s or _IN_FULL_S, _IN_FULL_S)
    again = play(replace(request, settings=replace(request.settings, until_stable=False, timeout_s=seconds)))
    if not isinstance(again, Findings) or (again.outcome == "fits" and again.not_played):
        if isinstance(again, Findings) and _BY_MISSING_ITERATIONS.search(failed.stopped_because):
            why = say("simulation.dry_run.by_missing", error=failed.stopped_because, seconds=f"{seconds:g}")
            return replace(failed, outcome="fits", stopped_because=why, not_played=again.not_played)
        return replace(failed, notes=[*failed.notes, say("simulation.dry_run.shortened")])
    note = say("simulation.dry_run.in_full", error=failed.stopped_because)
    return replace(again, notes=[*again.notes, note]) if again.outcome != "error" else again


def script_request(
    script: str | os.PathLike[str],
    arguments: Sequence[str],
    settings: Settings,
    environ: Mapping[str, str] | None = None,
    *,
    replaced: Mapping[str, str] | None = None,
) -> ScriptRequest:
    """Return the request for a play of a script in this folder. Raises as `dryrun_script` does, before any play."""
    if not isinstance(script, str | os.PathLike):
        raise ConfigError(say("simulation.dry_run.no_program", value=script))
    command = [os.fspath(script), *arguments]
    settings, sizes = _one_of_several(settings, command)
    environ = {**(os.environ if environ is None else environ), **sizes, "CUDA_VISIBLE_DEVICES": ""}
    check_command(command, rank=settings.rank, environ=environ)
    _refuse_unknown_card(settings)
    return ScriptRequest(
        script=sent(command[0]),
        arguments=tuple(map(sent, arguments)),
        settings=replace(settings, snapshot=settings.snapshot and sent(settings.snapshot)),
        environ={sent(name): sent(value) for name, value in environ.items()},
        folder=sent(os.getcwd()),
        replaced={sent(os.path.abspath(path)): text for path, text in (replaced or {}).items()},
    )


def _one_of_several(settings: Settings, command: Sequence[str]) -> tuple[Settings, dict[str, str]]:
    """Return settings that name one card, and the environment of one process of as many as were named.

    `4x RTX 4090` are four processes, which torchrun would start. ConfigError if the command has a launcher already.
    """
    nodes, per_node, name = split_count(settings.gpu)
    if nodes * per_node == 1:
        return settings, {}
    launcher, _ = launcher_of(command)
    if launcher:
        raise ConfigError(say("simulation.dry_run.counted_twice", launcher=launcher, gpu=settings.gpu, name=name))
    sizes = {"WORLD_SIZE": str(nodes * per_node), "LOCAL_WORLD_SIZE": str(per_node)}
    return replace(settings, gpu=name), sizes


def dryrun_function(function: Callable[..., object], arguments: Sequence[object], settings: Settings) -> Findings:
    """Play a call in a process of its own.

    A function that the process can import goes by its name, any other by its code, as those of a notebook.
    ConfigError for one that cannot be sent.
    """
    with function_script(function, arguments) as (script, environ):
        return dryrun_script(script, [], settings, environ=environ)


@contextlib.contextmanager
def function_script(
    function: Callable[..., object], arguments: Sequence[object]
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Write a script that makes the call; yield it with the environment to play it in. ConfigError as above."""
    place = f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"
    try:
        call = _pickled((function, tuple(arguments)))
    except (TypeError, pickle.PicklingError) as error:
        raise ConfigError(say("simulation.dry_run.not_sent", place=place, reason=error)) from None
    with tempfile.TemporaryDirectory(prefix="tightfit-") as folder:
        script, pickled = Path(folder, "call.py"), Path(folder, "call.pickle")
        pickled.write_bytes(call)
        script.write_text(_CALL.format(path=str(pickled)), encoding="utf-8")
        paths = os.pathsep.join([*filter(None, sys.path), os.getcwd()])
        yield str(script), {**os.environ, "PYTHONPATH": paths}


def _pickled(call: tuple[object, ...]) -> bytes:
    """Pickle with code by value, as cloudpickle does, and with the names of its files, by which findings tell lines."""
    import cloudpickle

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, value: object) -> object:
            if isinstance(value, CodeType):
                build, parts = self.dispatch_table[CodeType](value)
                return code_of_file, (build, parts, value.co_filename)
            return super().reducer_override(value)

    data = io.BytesIO()
    Pickler(data).dump(call)
    return data.getvalue()


def code_of_file(build: Callable[..., CodeType], parts: Sequence[object], file: str) -> CodeType:
    """Build a code object as of `file`; pickles name this function."""
    return build(*parts).replace(co_filename=file)


def _refuse_unknown_card(settings: Settings) -> None:
    """Raise DeviceError or ConfigError before a process is started."""
    described_gpu(
        settings.gpu,
        memory_bytes=settings.memory_bytes,
        used_bytes=settings.used_bytes,
        capability=settings.capability,
    )


def error_of(failed: Failed) -> TightfitError:
    """Return the error of a play that could not be made."""
    if not failed.exit_code:
        return DeviceError(say("simulation.dry_run.no_result", reason=failed.error))
    error = TightfitError(failed.error)
    error.exit_code = failed.exit_code
    return error
