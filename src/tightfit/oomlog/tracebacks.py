"""Python's tracebacks, and IPython's: the frames of one exception, and the phase of training that they are in."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
from msgspec.structs import replace

from tightfit.oomlog.last_words import BELOW
from tightfit.tables import read_patterns


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
    def is_cell(self) -> bool:
        """True for a cell of a notebook."""
        return self.file.startswith(("cell ", "<ipython"))

    @property
    def is_library(self) -> bool:
        """True if the file belongs to an installed package or to Python rather than to the user."""
        path = self.file.replace("\\", "/")
        inside = ("site-packages/", "dist-packages/", "/lib/python", "<frozen", "importlib", "torchinductor_")
        return any(part in path for part in inside) or path.startswith("torch/") or bool(_COMMAND.search(path))


_COMMAND = re.compile(r"/(?:bin|Scripts)/[\w-]{1,60}$")
"""A file without an ending that starts an installed command."""


_HEAD = "most recent call last"
_REMOTE = re.compile(r"\bRayTaskError\(\w+\): ?ray::")
"""The line by which Ray names an error of another process, whose traceback follows without a head."""
_NEAR = 8
"""Lines behind a message in which the head of its traceback stands."""
_EXCEPTION = re.compile(
    r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b|(?:[a-z_]\w*\.)+[A-Z]\w+(?=: \S)"
)
"""The last line of a traceback."""
_FRAME = re.compile(
    r'(?:File|Arquivo|Archivo|Fichier|Datei|Файл) ["“”]([^"“”\n]{1,1000})["“”], '
    r"(?:(?:line|linha|línea|ligne|Zeile|строка) (\d{1,9})(?:, \w{1,4} ([^\n]{1,300}))?|in ([\w.<>]{1,200})\s*$)"
)
"""A frame's head; browsers that translate a page translate its words, too."""
_REST = re.compile(r"line (\d{1,9}), in ([\w.<>]{1,200})")
"""A frame's head in text that begins behind its file's name."""
_NOTEBOOK = re.compile(
    r"(?:File )?(?P<file>(?:[A-Za-z]:)?[~/.\w<\\:][^\n,:()]{0,400}?)(?:\.py:(?P<line>\d{1,8}))?,? in "
    r"(?P<function>[\w.<>]{1,200}|<cell line: \d{1,6}>)\("
)
_CELL = re.compile(r"(?:Input In|Cell In) ?\[(\d{1,6})\],? (?:line (\d{1,8})|in )")
_ARROW = re.compile(r"-+> *(\d{1,8})[ |]?(.*)")
_RICH = re.compile(r"(?P<file>\S.{0,400}?\.py):(?P<line>\d{1,8}) in (?P<function>[\w.<>]{1,200})$")
_RICH_CODE = re.compile(r"❱ *(?P<line>\d{1,8}) +(?P<source>.*)")
"""Rich's tracebacks, whose box was cleaned away: a frame's head, and its line of code."""
_NUMBERED = re.compile(r" *(?:\d{1,6}(?: |$)|\(\.\.\.\)$)")
_CARETS = re.compile(r"[\s^~\"'`]+")


def frames_of(lines: Sequence[str]) -> tuple[TraceFrame, ...]:
    """Return the frames of the last traceback in `lines`, which end where the exception's message starts.

    Prefixes of loggers may stand before them: only lines that quote a file count.
    """
    start = len(lines)
    for start in range(len(lines) - 1, -1, -1):
        if _HEAD in lines[start] or _REMOTE.search(lines[start]):
            break
    else:
        start = -1
    found = list(_read_frames(lines[start + 1 :]))
    if found and start > 0 and found[0].file == "<stdin>" and found[0].source is None:
        found[0] = replace(found[0], source=_statement(lines[start - 1]))
    if start < 0 and found:  # the head was cut off, or is far away: only what stands close together
        return tuple(found[-60:])
    return tuple(found)


_STATEMENT = re.compile(r"[\w.\[\], '\"]{1,80}? ?[-+*/|&]?= ?\S|[\w.]{1,80}\(.*\)$")


def _statement(line: str) -> str | None:
    """Return the statement typed at Python's prompt, which stands right before the head of the traceback."""
    line = line.strip()
    return line[:400] if _STATEMENT.match(line) else None


def frames_behind(lines: Sequence[str], *, anywhere: bool = False) -> tuple[TraceFrame, ...]:
    """Return the frames that stand behind a message, up to the next traceback or message.

    A program that logs an exception before its traceback, or a person, put them there; `anywhere` behind a title.
    A traceback of its own, with a last line that names another exception, is another failure's.
    """
    chained = next((at for at, line in enumerate(lines) if _CHAINED.search(line)), None)
    lines = lines[:chained]
    heads = [at for at, line in enumerate(lines) if _HEAD in line]
    first = heads[0] if heads and not any(map(_FRAME.search, lines[: heads[0]])) else None
    start = first + 1 if first is not None and (anywhere or first <= _NEAR) else 0
    ends = (at for at in range(start, len(lines)) if _HEAD in lines[at] or "out of memory" in lines[at].lower())
    behind = lines[start : next(ends, len(lines))]
    found = () if start and any(map(_EXCEPTION.match, behind)) else _outermost_first(tuple(_frames(behind)))
    on_host = any(_ON_HOST.search(each.source or "") for each in found[-2:])
    return () if on_host or any(_LAUNCHER.search(each.file) for each in found) else found


def _outermost_first(found: tuple[TraceFrame, ...]) -> tuple[TraceFrame, ...]:
    """Return frames in Python's order: a debugger of an editor prints the innermost first, and the script last."""
    reverse = len(found) > 1 and found[-1].function == "<module>" != found[0].function and not found[-1].is_library
    return found[::-1] if reverse else found


def is_cut(lines: Sequence[str]) -> bool:
    """Return True if the lines behind a message hold the head of a traceback, and not the message that ends it."""
    heads = [at for at, line in enumerate(lines) if _HEAD in line]
    return bool(heads) and not any("out of memory" in line.lower() for line in lines[heads[0] :])


_CHAINED = re.compile(r"During handling of the above exception|direct cause of the following exception")
"""Python's words before the traceback of another exception, raised while the first was handled."""
_ON_HOST = re.compile(r"map_location ?= ?(?:torch\.device\()?[\"']cpu")
"""A call that asks for no memory on a device: the traceback behind the message is another failure's."""


_LAUNCHER = re.compile(
    r"accelerate[\\/]commands|torch[\\/]distributed[\\/](?:run|launch\w*|elastic)\b|deepspeed[\\/]launcher|bin[\\/]torchrun"
)
"""Files of programs that start others: their tracebacks tell only that one of these failed."""


_BROKEN = re.compile(r"\S.{0,400}\.py:[ │|]*$")


def _unbroken(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines, with the head of a frame of Rich's that its box broke behind the file as one."""
    held = ""
    for line in lines:
        if held:
            line, held = held + line.strip(" │|"), ""
        elif _BROKEN.search(line):
            held = line.rstrip(" │|")
            continue
        yield line
    if held:
        yield held


_UNNUMBERED = 0
"""Stands for the line's number in a frame that a person wrote without it."""


def _read_frames(lines: Iterable[str]) -> Iterator[TraceFrame]:
    """Yield the frames in lines of a log; one that a person wrote without its line's number has none."""
    return (replace(each, line=None) if each.line == _UNNUMBERED else each for each in _frames(lines))


def _frames(lines: Iterable[str]) -> Iterable[TraceFrame]:
    waiting: TraceFrame | None = None
    boxed = numbered = False
    column = 0
    for line in _unbroken(lines):
        match = _FRAME.search(line)
        if match:
            if waiting:
                yield waiting
            function = (match[3] or match[4] or "<module>").strip()
            number = int(match[2] or _UNNUMBERED)
            waiting, numbered = TraceFrame(file=match[1], line=number, function=function), False
            column = match.start() if not line[: match.start()].strip() else 0
            continue
        if waiting is None and (rest := _REST.fullmatch(line.strip())):
            waiting, numbered, column = TraceFrame(file="", line=int(rest[1]), function=rest[2]), False, 0
            continue
        if rich := _RICH.match(line.strip()):
            if waiting and waiting.line is not None:
                yield waiting
            waiting, boxed = TraceFrame(file=rich["file"], line=int(rich["line"]), function=rich["function"]), True
            continue
        if waiting and boxed:
            if code := _RICH_CODE.match(line.strip()):
                yield replace(waiting, source=_code(code["source"]) or None)
                waiting, boxed = None, False
            continue
        if arrow := _ARROW.match(line.strip()):
            if waiting:
                yield replace(waiting, line=int(arrow[1]), source=_code(arrow[2]) or None)
                waiting = None
            continue
        if notebook := _notebook(line):
            if waiting and waiting.line is not None:
                yield waiting
            waiting, numbered = notebook, True
        elif waiting and numbered and _NUMBERED.match(line):
            continue  # IPython prints the lines around the failing one, which has an arrow
        elif waiting and waiting.line is not None and line.strip() and not _CARETS.fullmatch(line):
            ends = len(line) - len(line.lstrip()) < column  # a line of code is indented at least as far as its file
            ends = ends or BELOW.fullmatch(line) is not None
            yield waiting if ends else replace(waiting, source=_code(line))
            waiting = None
    if waiting and waiting.line is not None:
        yield waiting


def _code(text: str) -> str:
    """Return a line of code without the marks of a quotation that begins or ends with it.

    >>> _code("    model = model.cuda()`"), _code("y = f'`{x}`'")
    ('model = model.cuda()', "y = f'`{x}`'")
    """
    text = text.strip()
    is_quoted = text.endswith("`") and (text.startswith("`") or text.count("`") % 2)
    return (text.strip("`").strip() if is_quoted else text)[:400]


_QUOTED_FILE = re.compile(r"^[^\n]{0,40}?\bFile \[?(?=[A-Za-z]:\\|~|/|<)")
"""Words before a frame's head that a person wrote, and the bracket of a link that a web page made of the path."""


def _notebook(line: str) -> TraceFrame | None:
    """Return a frame from its head in IPython's format; its line of code follows behind an arrow."""
    text = _QUOTED_FILE.sub("File ", line.strip())
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


_signs = functools.partial(read_patterns, "tightfit.oomlog", "phases.toml")
"""Reads `calls`, `functions`, `files` or `lines`, and of each the phases."""


_LOSS_OF_CALL = re.compile(r"(?:cross_entropy|criterion|loss_fn|nll_loss)\(\s*[\w.]*\b(?:model|net|self)\b[\w.]*\(")
"""A loss of a model's outputs that are computed on the same line."""


_QUANTISES = re.compile(r"quanti[sz]e|calibrat|gptq|\bawq", re.IGNORECASE)
_MOVES_MODEL = re.compile(r"\b(?:model|net|module|pipe|pipeline|unet|transformer)\w*\.(?:to|cuda)\(")


class _Stack:
    """Signs of a phase on a stack."""

    def __init__(self, frames: Sequence[TraceFrame]) -> None:
        self._frames = frames
        self._names = {frame.function.rsplit(".", 1)[-1] for frame in frames}
        self._code = "\n".join(frame.source or "" for frame in frames)
        self._paths = "\n".join(f"{frame.file}:{frame.function}".replace("\\", "/") for frame in frames)

    def called(self, phase: str) -> bool:
        return phase in _signs()["calls"] and bool(_signs()["calls"][phase].search(self._code))

    def entered(self, phase: str) -> bool:
        functions = _signs()["functions"].get(phase)
        return functions is not None and any(map(functions.fullmatch, self._names))

    def named(self, phase: str) -> bool:
        """Return True if a function on the stack is one that the calls of a phase name."""
        return any(_signs()["calls"][phase].search(f"{name}(") for name in self._names)

    def computes_outputs(self) -> bool:
        """Return True within `model(...)` of `criterion(model(images), labels)`, which Python runs first."""
        places = [place for place, each in enumerate(self._frames) if _LOSS_OF_CALL.search(each.source or "")]
        deeper = self._frames[places[-1] + 1 :] if places else ()
        return any(each.function.rsplit(".", 1)[-1] == "forward" and "loss" not in each.file for each in deeper)

    def quantises(self) -> bool:
        """Return True for weights that are quantised one by one: a copy of one is no model that is moved."""
        return any(map(_QUANTISES.search, self._names)) and not _MOVES_MODEL.search(self._code)

    def in_files(self, phase: str) -> bool:
        """Return True for a file, or a function of a file, that only this phase runs."""
        found = _signs()["files"].get(phase)
        return found is not None and bool(found.search(self._paths))


def phase_of(frames: Sequence[TraceFrame], lines: Sequence[str] = ()) -> str | None:
    """Return the phase of training that a stack is in, or None if no frame shows it.

    Saving, loading, serving, sampling and evaluation come first, because they run the model for another purpose. In a
    training step, the last part that was entered names the phase. Without a stack, the last of the `lines` before the
    message that a program prints at the start of a phase does.
    """
    stack = _Stack(frames)
    of_stack: dict[str, Callable[[], bool]] = {
        "autotune": lambda: stack.in_files("autotune"),
        "warmup": lambda: stack.called("warmup") or stack.entered("warmup") or stack.in_files("warmup"),
        "merge": lambda: stack.called("merge"),
        "save": lambda: stack.called("save") or stack.named("save") or stack.in_files("save"),
        "resume": lambda: (stack.called("resume") or stack.named("resume")) and not stack.entered("load"),
        "load": lambda: stack.called("load") or stack.entered("load") or stack.in_files("load"),
        "eval": lambda: stack.entered("eval") or stack.called("eval") or stack.in_files("eval"),
        "gather": lambda: stack.entered("gather") or stack.in_files("gather"),
        "sample": lambda: stack.entered("sample") or stack.called("sample") or stack.in_files("sample"),
        "optimizer": lambda: stack.called("optimizer") or stack.in_files("optimizer"),
        "backward": lambda: stack.called("backward") or stack.entered("backward"),
        "compile": lambda: stack.entered("compile") and stack.in_files("compile"),
        "loss": lambda: (stack.called("loss") and not stack.computes_outputs()) or stack.named("loss"),
        "forward": lambda: stack.entered("forward"),
        "setup": lambda: (
            stack.in_files("setup") or ((stack.called("setup") or stack.entered("setup")) and not stack.quantises())
        ),
    }
    found = next((phase for phase, shows in of_stack.items() if shows()), None) if frames else None
    if found in ("forward", "loss", "setup") and _ends_in_engine(lines):
        return "backward"
    by_line = found or _phase_of_lines(lines)
    saved_before = found is None and by_line == "save" and bool(frames)  # a stack would show the saving itself
    return None if saved_before else by_line


def _ends_in_engine(lines: Sequence[str]) -> bool:
    """Return True if the last line before a message is autograd's engine, without its frame."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return bool(_signs()["lines"]["backward"].search(last))


def is_warm_up(lines: Sequence[str]) -> bool:
    """Return True if a server warms up in the lines, which stand behind a report's title."""
    return any(map(_signs()["lines"]["warmup"].search, lines))


_LINES_BEFORE = 60
"""Lines before a message that are searched for the start of a phase."""


def _phase_of_lines(lines: Sequence[str]) -> str | None:
    for line in reversed(lines[-_LINES_BEFORE:]):
        for phase, words in _signs()["lines"].items():
            if words.search(line):
                return None if phase == "step" else phase
    return None
