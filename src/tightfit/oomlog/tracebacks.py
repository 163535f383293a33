"""Python's tracebacks, and IPython's: the frames of one exception, and the phase of training that they are in."""

import functools
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files

import msgspec
from msgspec.structs import replace


class TraceFrame(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a traceback."""

    file: str
    """The path as printed, or `cell N` of a notebook."""
    line: int | None
    """Counted from 1; None if the traceback does not print it."""
    function: str
    """The function's name, `<module>` outside one."""
    source: str | None = None
    """The line of code, if the traceback shows it."""

    @property
    def is_library(self) -> bool:
        """True if the file belongs to an installed package or to Python rather than to the user."""
        path = self.file.replace("\\", "/")
        inside = ("site-packages/", "dist-packages/", "/lib/python", "<frozen", "importlib", "torchinductor_")
        return any(part in path for part in inside) or path.startswith("torch/")


_FRAME = re.compile(r'File "([^"\n]{1,1000})", line (\d{1,9})(?:, in ([^\n]{1,300}))?')
_NOTEBOOK = re.compile(
    r"(?:File )?(?P<file>[~/.\w<\\:][^\n,:()]{0,400}?)(?:\.py:(?P<line>\d{1,8}))?,? in (?P<function>[\w.<>]{1,200})\("
)
_CELL = re.compile(r"(?:Input In|Cell In) ?\[(\d{1,6})\],? (?:line (\d{1,8})|in )")
_ARROW = re.compile(r"-+> *(\d{1,8})[ |]?(.*)")
_CARETS = re.compile(r"[\s^~]+")


def frames_of(lines: Sequence[str]) -> tuple[TraceFrame, ...]:
    """Return the frames of the last traceback in `lines`, which end where the exception's message starts.

    Prefixes of loggers may stand before them: only lines that quote a file count.
    """
    start = len(lines)
    for start in range(len(lines) - 1, -1, -1):
        if "most recent call last" in lines[start]:
            break
    else:
        start = -1
    found = list(_frames(lines[start + 1 :]))
    if start < 0 and found:  # the head was cut off, or is far away: only what stands close together
        return tuple(found[-60:])
    return tuple(found)


def _frames(lines: Iterable[str]) -> Iterable[TraceFrame]:
    waiting: TraceFrame | None = None
    for line in lines:
        match = _FRAME.search(line)
        if match:
            if waiting:
                yield waiting
            function = (match[3] or "<module>").strip()
            waiting = TraceFrame(file=match[1], line=int(match[2]), function=function)
            continue
        arrow = _ARROW.match(line.strip())
        if arrow:
            if waiting:
                yield replace(waiting, line=int(arrow[1]), source=arrow[2].strip()[:400] or None)
                waiting = None
            continue
        notebook = _notebook(line)
        if notebook:
            if waiting and waiting.line is not None:
                yield waiting
            waiting = notebook
        elif waiting and waiting.line is not None and line.strip() and not _CARETS.fullmatch(line):
            yield replace(waiting, source=line.strip()[:400])
            waiting = None
    if waiting and waiting.line is not None:
        yield waiting


def _notebook(line: str) -> TraceFrame | None:
    """Return a frame from its head in IPython's format; its line of code follows behind an arrow."""
    text = line.strip()
    cell = _CELL.match(text)
    if cell:
        return TraceFrame(file=f"cell {cell[1]}", line=int(cell[2]) if cell[2] else None, function="<module>")
    if " in " not in text or not text.startswith(("File ", "~", "/", "<ipython", "C:", "D:", "E:")):
        return None
    match = _NOTEBOOK.match(text)
    if not match:
        if text.startswith("<ipython") and " in <module>" in text:
            return TraceFrame(file=text.split(" in ")[0], line=None, function="<module>")
        return None
    file = match["file"] + (".py" if match["line"] else "")
    return TraceFrame(file=file, line=int(match["line"]) if match["line"] else None, function=match["function"])


@functools.cache
def _signs() -> dict[str, dict[str, re.Pattern[str]]]:
    """Read `phases.toml`: `calls` or `functions`, and of each the phases."""
    tables = tomllib.loads(files("tightfit.oomlog").joinpath("phases.toml").read_text(encoding="utf-8"))
    return {
        kind: {phase: re.compile("|".join(signs)) for phase, signs in table.items()} for kind, table in tables.items()
    }


def phase_of(frames: Sequence[TraceFrame]) -> str | None:
    """Return the phase of training that a stack is in, or None if no frame shows it.

    Saving, resuming, sampling and evaluation come first, because they run the model for another purpose. In a
    training step, the last part that was entered names the phase.
    """
    calls, functions = _signs()["calls"], _signs()["functions"]
    names = {frame.function.rsplit(".", 1)[-1] for frame in frames}
    code = "\n".join(frame.source or "" for frame in frames)
    paths = [frame.file.replace("\\", "/") for frame in frames]

    def called(phase: str) -> bool:
        return bool(calls[phase].search(code))

    def entered(phase: str) -> bool:
        return any(map(functions[phase].fullmatch, names))

    def runs(phase: str) -> bool:
        return called(phase) or any(calls[phase].search(f"{name}(") for name in names)

    def in_files(*parts: str) -> bool:
        return any(part in path for path in paths for part in parts)

    tests: dict[str, Callable[[], bool]] = {
        "save": lambda: runs("save"),
        "resume": lambda: runs("resume"),
        "sample": lambda: entered("sample") or called("sample"),
        "eval": lambda: entered("eval") or called("eval"),
        "optimizer": lambda: called("optimizer") or in_files("torch/optim/"),
        "backward": lambda: called("backward") or entered("backward"),
        "compile": lambda: entered("compile") and in_files("torch/_", "triton/"),
        "loss": lambda: runs("loss"),
        "forward": lambda: entered("forward"),
        "setup": lambda: called("setup") or entered("setup"),
    }
    return next((phase for phase, shows in tests.items() if shows()), None)
