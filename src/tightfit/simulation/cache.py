"""The service's cache on disk: answers remembered for this torch and these lines of this package.

Each answer is a file of its own, written aside and renamed, so writers never meet. A file that is cut, corrupt or of
another shape counts as absent; a folder that is missing, full or read-only only means that nothing is remembered.
"""

import contextlib
import hashlib
import os
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec

from tightfit.errors import DataError
from tightfit.simulation.requests import A, Request, decode_answer
from tightfit.storage import cache_folder, locked, write_aside
from tightfit.wording import say

_MOST_BYTES = 256 * 2**20
"""Bytes that all answers together may take; the oldest go first. One takes 5 to 60 KiB."""
_LOOKS_ONE_IN = 32
"""Writes for each look at the folder's size."""
_OWN_NAME = re.compile(r"[0-9a-f]{32}\.json|\.[0-9a-f]{32}\.json\.\d+\.\d+\.writing")
"""Names of answers, and of parts that a killed process left."""


class CacheState(msgspec.Struct, frozen=True, kw_only=True):
    """The cache on disk, as `tightfit cache --json` prints it."""

    folder: str | None
    """Folder of the answers; None where this user has no home, so that nothing is kept."""
    files: int
    """Files of answers, and of parts that a killed process left."""
    bytes: int
    most_bytes: int
    """Size above which the answers used longest ago are deleted."""
    removed_files: int = 0
    """Files that `tightfit cache clear` deleted."""
    freed_bytes: int = 0


class _Remembered(msgspec.Struct, frozen=True):
    """An answer and the digest of the question and the answer: a file that anything else wrote is not believed."""

    digest: str
    answer: msgspec.Raw


def recall(request: Request[A]) -> A | None:
    """Return the remembered answer, or None."""
    file = _file(request)
    if file is None:
        return None
    try:
        found = msgspec.json.decode(file.read_bytes(), type=_Remembered)
        if found.digest != _digest(file, bytes(found.answer)):
            return None
        answer = decode_answer(request, found.answer)
    except (OSError, msgspec.MsgspecError, RecursionError):
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
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = msgspec.json.encode(answer)
        write_aside(file, msgspec.json.encode(_Remembered(_digest(file, data), msgspec.Raw(data))))
        if random.randrange(_LOOKS_ONE_IN) == 0:
            prune(file.parent)


def _digest(file: Path, answer: bytes) -> str:
    return hashlib.sha256(file.name.encode() + answer).hexdigest()


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


def read_cache() -> CacheState:
    """Count the answers on disk. DataError for a folder that cannot be read."""
    sizes, folder = [size for _, size in _own_files()], _answers_folder()
    where = str(folder) if folder else None
    return CacheState(folder=where, files=len(sizes), bytes=sum(sizes), most_bytes=_MOST_BYTES)


def clear_cache() -> CacheState:
    """Delete the answers, and no other file; processes that use them play again. DataError for one that stays."""
    freed = []
    for file, size in _own_files():
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(say("simulation.cache.not_removed", path=file, reason=error.strerror)) from None
        freed.append(size)
    return msgspec.structs.replace(read_cache(), removed_files=len(freed), freed_bytes=sum(freed))


def _own_files() -> list[tuple[Path, int]]:
    folder, found = _answers_folder(), []
    try:
        for file in sorted(folder.iterdir()) if folder and folder.is_dir() else ():
            if _OWN_NAME.fullmatch(file.name):
                with contextlib.suppress(FileNotFoundError):  # another process pruned it, or finished its part
                    found.append((file, file.lstat().st_size))
    except OSError as error:
        raise DataError(say("simulation.cache.unreadable", path=folder, reason=error.strerror)) from None
    return found


def _answers_folder() -> Path | None:
    folder = cache_folder()
    return folder and folder / "answers"


def _file(request: Request[msgspec.Struct]) -> Path | None:
    from importlib.metadata import version  # imports email: only for those who play

    folder = _answers_folder()
    if folder is None:
        return None
    key = request.key() + version("torch").encode() + _package_hash()
    return folder / f"{hashlib.sha256(key).hexdigest()[:32]}.json"


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
