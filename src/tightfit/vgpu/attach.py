"""First steps of a Python process that a played script starts: Python's start hook calls `attach`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tightfit.vgpu.child import AfterTorch, Part, end_process, follow_processes
from tightfit.vgpu.on_import import after_import

_OURS = ("tightfit.simulation.server", "tightfit/simulation/server.py")
_COMPILE_WORKER = ("torch._inductor.compile_worker", "torch/_inductor/compile_worker")


def attach(folder: str) -> None:
    """Play this process if it is one of a script's that trains."""
    words = list(sys.orig_argv[1:])
    if any(mark in word for word in words for mark in (*_OURS, *_COMPILE_WORKER)):
        return
    if "--multiprocessing-fork" in words:
        follow_processes(lambda: Part(Path(folder)))
        after_import("torchvision.extension", _declare_operators)
    elif _is_launcher(words):
        _play_launched(Path(folder), words)
    else:
        follow_processes(lambda: Part(Path(folder)))
        sys.meta_path.insert(0, AfterTorch(Part(Path(folder))))


def _declare_operators(extension: ModuleType) -> None:
    """Let torchvision be imported before the virtual GPU is there, or where none will be: in a loader's worker."""
    from tightfit.vgpu.torchvision_names import declare

    declare(extension)


def _is_launcher(words: Sequence[str]) -> bool:
    from tightfit.vgpu.command_line import launcher_of

    return bool(words) and bool(launcher_of(["python", *words])[0] or launcher_of(words)[0])


def _play_launched(folder: Path, words: Sequence[str]) -> None:
    """Play the program of a launcher in this process, and end the process."""
    from tightfit.errors import TightfitError
    from tightfit.vgpu.command_line import launcher_of, read_command
    from tightfit.vgpu.script import play_in_child

    command = ["python", *words] if launcher_of(["python", *words])[0] else list(words)
    part = Part(folder)
    code = 0
    try:
        program = read_command(command, rank=part.settings.rank)
        code = play_in_child(program, part)
    except TightfitError as error:
        print(f"tightfit: {error}", file=sys.stderr)
        part.lose(str(error))
        code = 2
    end_process(code)
