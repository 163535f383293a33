"""The user's running line: the stack without torch, the standard library and tightfit itself."""

import os
import re
import sysconfig
from types import CodeType, FrameType
from typing import NamedTuple

import torch

from tightfit.packages import is_packages_file, package_folders

_LIBRARIES = tuple(
    os.path.realpath(path) + os.sep
    for path in (
        os.path.dirname(torch.__file__),
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        os.path.join(sysconfig.get_paths()["stdlib"]),
    )
)

MAX_FRAMES = 8
_PRINTED = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


class Frame(NamedTuple):
    file: str
    line: int
    function: str


class _Code(NamedTuple):
    """Facts about a code object, which stays alive with them: hashing it would take longer than the rest."""

    code: CodeType
    counts: bool
    """True if it is neither torch's nor ours nor the standard library's."""
    is_own: bool
    """True if it is in the user's own files."""
    frames: dict[int, Frame]
    """Frames at its lines."""


_codes: dict[int, _Code] = {}


def user_frames(start: FrameType | None, limit: int = MAX_FRAMES) -> tuple[Frame, ...]:
    """Return the frames from `start` outwards, innermost first, without torch's and ours.

    If the first `limit` are all of packages, the innermost frame in the user's own files replaces the last one.
    """
    found: list[Frame] = []
    frame, has_own = start, False
    while frame is not None and (len(found) < limit or not has_own):
        code = _facts(frame.f_code)
        if code.counts:
            if len(found) < limit or code.is_own:
                line = frame.f_lineno
                known = code.frames.get(line) or _frame(code, line)
                found[limit - 1 :] = [known]
            has_own = has_own or code.is_own
        frame = frame.f_back
    return tuple(found)


def is_counted(frame: FrameType) -> bool:
    """Return True if a running frame is neither torch's nor ours nor the standard library's."""
    return _facts(frame.f_code).counts


def is_own(code: CodeType) -> bool:
    """Return True if a function is in the user's own files."""
    return _facts(code).is_own


def is_package(frame: Frame) -> bool:
    """Return True if a frame is in an installed package, rather than in the user's own files."""
    return is_packages_file(frame.file)


def users_line(frames: tuple[Frame, ...]) -> Frame | None:
    """Return the innermost line in the user's own files, or the innermost of any package."""
    return next((frame for frame in frames if not is_package(frame)), frames[0] if frames else None)


def _facts(code: CodeType) -> _Code:
    known = _codes.get(id(code))
    if known is None:
        file = code.co_filename
        counts = not (file.startswith("<") or _is_library(file))
        known = _codes[id(code)] = _Code(code, counts, counts and not is_packages_file(file), {})
    return known


def _frame(code: _Code, line: int) -> Frame:
    made = code.frames[line] = Frame(code.code.co_filename, line, code.code.co_qualname)
    return made


def _is_library(file: str) -> bool:
    """Return True if a file is torch's, ours or the standard library's, rather than another installed package's."""
    name = os.path.realpath(file)
    return name.startswith(_LIBRARIES[:2]) or (name.startswith(_LIBRARIES) and not name.startswith(package_folders()))


def frames_of_text(trace: str) -> tuple[Frame, ...]:
    """Read the user's frames of a printed stack, innermost first.

    >>> frames_of_text('  File "model.py", line 186, in forward\\n    logits = self.lm_head(x)\\n')
    (Frame(file='model.py', line=186, function='forward'),)
    """
    found = [Frame(file, int(line), function) for file, line, function in _PRINTED.findall(trace)]
    return tuple(frame for frame in reversed(found) if not _is_library(frame.file))
