"""The service's cache on disk: answers remembered for this torch and these lines of this package.

Each answer is a file of its own, written aside and renamed, so writers never meet. A file that is cut, corrupt or of
another shape counts as absent; a folder that is missing, full or read-only only means that nothing is remembered.
"""

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import msgspec

from tightfit.simulation.requests import A, Request, decode_answer
from tightfit.storage import cache_folder, locked, write_aside

_MOST_BYTES = 256 * 2**20
"""Bytes that all answers together may take; the oldest go first. One takes 5 to 60 KiB."""
_LOOKS_ONE_IN = 32
"""Writes for each look at the folder's size."""


def recall(request: Request[A]) -> A | None:
    """Return the remembered answer, or None."""
    file = _file(request)
    if file is None:
        return None
    try:
        answer = decode_answer(request, file.read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # the oldest go first, by their last use
    return answer


def remember(request: Request[msgspec.Struct], answer: msgspec.Struct) -> None:
    """Keep an answer, if the disk takes it."""
    file = _file(request)
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file, msgspec.json.encode(answer))
        if random.randrange(_LOOKS_ONE_IN) == 0:
            prune(file.parent)


def prune(folder: Path, most_bytes: int = _MOST_BYTES) -> None:
    """Delete the answers used longest ago until the rest takes at most `most_bytes`."""
    with contextlib.suppress(OSError):
        entries = [(each.stat(), each) for each in folder.iterdir()]
        total = sum(stat.st_size for stat, _ in entries)
        for stat, file in sorted(entries, key=lambda entry: entry[0].st_mtime):
            if total <= most_bytes:
                return
            file.unlink(missing_ok=True)  # another process may prune, too
            total -= stat.st_size


def _file(request: Request[msgspec.Struct]) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    key = msgspec.json.encode(request, order="sorted") + version("torch").encode() + _package_hash()
    return folder / "answers" / f"{hashlib.sha256(key).hexdigest()[:32]}.json"


@cache
def _package_hash() -> bytes:
    """Hash every line and table of this package: the server imports nearly all."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in (*sorted(package.rglob("*.py")), *sorted(package.glob("*.csv"))):
        digest.update(file.read_bytes())
    return digest.digest()


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one process of this user trace at a time; the others then recall its answers."""
    folder = cache_folder()
    with locked(folder / "lock") if folder else contextlib.nullcontext():
        yield
