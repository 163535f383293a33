"""A notebook as a script: its code cells in order, without IPython's own lines."""

import ast
import json
import re
from pathlib import Path

from tightfit.errors import ConfigError
from tightfit.wording import say

_BODY_MAGICS = frozenset({"time", "timeit", "capture", "prun"})
"""Cell magics that run the cell as Python."""
_MAGIC = re.compile(r"^(\s*)(?:[%!?]|\w[\w.]*\s*=\s*[%!]|.*\?\s*$)")
"""Lines that IPython alone reads: magics, shell commands and questions."""


def notebook_script(path: Path) -> tuple[str, list[str]]:
    """Return a notebook's cells as one script, and the lines that were left out. ConfigError for another file."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = [_text(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(say("vgpu.command.no_notebook", file=path)) from None
    parts, skipped = [], list[str]()
    for number, source in enumerate(sources, start=1):
        parts.append(f"# cell {number}\n{_python(source, skipped)}\n")
    return "\n".join(parts), skipped


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
