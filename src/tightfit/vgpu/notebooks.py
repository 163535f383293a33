"""A notebook as a script: its code cells in order, without IPython's own lines.

Findings name a line by its cell, as Jupyter does: `train.ipynb In[3]` is the third code cell of the notebook.
"""

import ast
import bisect
import json
import re
from pathlib import Path

import msgspec

from tightfit.errors import ConfigError
from tightfit.vgpu.records import Findings
from tightfit.wording import say

Json = str | float | bool | None | list["Json"] | dict[str, "Json"]

_BODY_MAGICS = frozenset({"time", "timeit", "capture", "prun"})
"""Cell magics that run the cell as Python."""
_MAGIC = re.compile(r"^(\s*)(?:[%!?]|\w[\w.]*\s*=\s*[%!]|.*\?\s*$)")
"""Lines that IPython alone reads: magics, shell commands and questions."""
_DISPLAY = "def display(*values): print(*values)"
_CELL = re.compile(r"(.*\.ipynb) In\[(\d+)\]")


def notebook_script(path: Path) -> tuple[str, list[str]]:
    """Return a notebook's cells as one script, and the lines that were left out. ConfigError for another file."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = [_text(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(say("vgpu.command.no_notebook", file=path)) from None
    parts, skipped = [_DISPLAY], list[str]()
    for number, source in enumerate(sources, start=1):
        parts.append(f"# cell {number}\n{_python(source, skipped)}\n")
    return "\n".join(parts), skipped


def in_cells(found: Findings, notebook: Path, script: Path) -> Findings:
    """Return findings with cells of `notebook` in place of lines of the `script` made from that."""
    begins = [0]
    for number, line in enumerate(script.read_text(encoding="utf-8").split("\n"), start=1):
        if line == f"# cell {len(begins)}":
            begins.append(number)

    def cell(line: int) -> tuple[str, int]:
        number = max(1, bisect.bisect_left(begins, line) - 1)
        return f"{notebook.resolve()} In[{number}]", line - begins[number]

    def swapped(value: Json) -> Json:
        if isinstance(value, dict):
            there = {key: swapped(each) for key, each in value.items()}
            name, line = value.get("file"), value.get("line")
            if isinstance(name, str) and isinstance(line, int) and Path(name) == script:
                there["file"], there["line"] = cell(line)
            return there
        if isinstance(value, list):
            return [swapped(each) for each in value]
        if isinstance(value, str):
            return written.sub(lambda match: "{}:{}".format(*cell(int(match[1]))), value)
        return value

    written = re.compile(rf"{re.escape(str(script))}:(\d+)")
    return msgspec.convert(swapped(msgspec.to_builtins(found)), Findings)


def cell_line(file: str, line: int) -> str:
    """Return a line of a cell that findings name; an empty string for any other file."""
    named = _CELL.fullmatch(file)
    if named is None:
        return ""
    try:
        cells = json.loads(Path(named[1]).read_text(encoding="utf-8"))["cells"]
        code = [_text(each["source"]) for each in cells if each["cell_type"] == "code"]
        return code[int(named[2]) - 1].split("\n")[line - 1]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return ""


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def _python(source: str, skipped: list[str]) -> str:
    """Return a cell with `pass` in place of IPython's lines, which are added to `skipped`."""
    lines = source.split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    if lines[first].startswith("%%"):
        skipped.append(lines[first])
        if lines[first][2:].split()[:1] and lines[first][2:].split()[0] in _BODY_MAGICS:
            return _python("\n".join(["pass", *lines[first + 1 :]]), skipped)
        return "\n".join(f"# {line}" for line in lines)
    if _parses(source):
        return source
    is_open = False  # a shell command goes on after a backslash
    for number, line in enumerate(lines):
        found = _MAGIC.match(line)
        if is_open or found:
            skipped.append(line.strip())
            lines[number] = ("" if is_open or found is None else found[1]) + "pass"
            is_open = line.rstrip().endswith("\\")
    return "\n".join(lines)


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True
