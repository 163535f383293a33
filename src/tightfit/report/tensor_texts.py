"""A tensor, its place and its line of source, as short text."""

import linecache
import sys
from functools import cache
from pathlib import Path

from tightfit.vgpu.notebooks import cell_line
from tightfit.vgpu.records import Origin, Place

_LINE = 100


def shape_text(each: Origin) -> str:
    """`65536 × 50304 bfloat16`; empty for a kernel's own memory."""
    return f"{' × '.join(map(str, each.shape))} {each.dtype}" if each.shape else ""


def place_text(each: Place) -> str:
    """`model.py:186 in GPT.forward`."""
    if not each.file:
        return ""
    function = f" in {each.function}" if isinstance(each, Origin) and each.function else ""
    return f"{_short_path(each.file)}:{each.line}{function}"


def source_line(each: Place) -> str:
    """Return the line's text, where its file can be read."""
    if not each.file:
        return ""
    return (cell_line(each.file, each.line) or linecache.getline(each.file, each.line)).strip()[:_LINE]


@cache
def _short_path(file: str) -> str:
    """Shorten a path to the part that tells files apart: a page may be sent to others."""
    if cell := _cell(file):
        return cell
    path = Path(file)
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(Path(*path.parts[-3:]))


def _cell(file: str) -> str:
    """Return a notebook's cell, `Cell In[3]`, for the file name that IPython gives it; empty for any other file."""
    if (ipython := sys.modules.get("IPython")) is None or (shell := ipython.get_ipython()) is None:
        return ""
    named = getattr(shell.compile, "format_code_name", None)  # IPython 7 has none
    return " ".join(named(file) or ()) if named else ""
