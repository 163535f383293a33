"""The work folder of a preparation, `<dataset>/.prepare`: its journal, and the renames that publish the dataset.

Token files grow there; the journal records the lengths that are safely on disk. At the end a marker lists the
finished files, and they are renamed into the dataset's folder, meta.json last. While the marker exists, nobody opens
the dataset, and the next preparation completes the renames. So a crash at any point leaves the previous dataset, the
new one, or one marked as unfinished.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from tightfit.data.meta import DTYPES
from tightfit.errors import DataError, DoesNotFit
from tightfit.storage import sync_folder, write_aside
from tightfit.wording import say

WORK_FOLDER = ".prepare"
_MARKER = "publish.json"
_JOURNAL = "journal.json"
_FILES = ("train.bin", "val.bin", "tokenizer.json", "meta.pkl", "meta.json")
"""Every file of a dataset, in the order of publication."""


@dataclass(kw_only=True)
class Journal:
    """Progress of a preparation that is safely on disk."""

    job: str
    """Digest of everything that decides the result."""
    dtype: str = "uint16"
    """Number format of the files."""
    shards: int = 0
    """Shards, in reading order, with all ids in the files."""
    train: int = 0
    """Ids in train.bin."""
    val: int = 0
    """Ids in val.bin."""
    position: int = 0
    """Bytes of input read for them."""
    documents: int = 0
    """Documents ended in them."""

    def save(self, work: Path) -> None:
        write_aside(work / _JOURNAL, json.dumps(asdict(self)), durable=True)


def open_journal(work: Path, job: str) -> Journal:
    """Open the journal of this job; start an empty work folder if the journal there belongs to another job."""
    try:
        journal = msgspec.json.decode((work / _JOURNAL).read_bytes(), type=Journal)
        held = [(work / f"{split}.bin").stat().st_size // DTYPES[journal.dtype] for split in ("train", "val")]
        if journal.job == job and held[0] >= journal.train and held[1] >= journal.val:
            return journal
    except (OSError, msgspec.MsgspecError, RecursionError, KeyError):
        pass  # absent, or not written by this version
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    journal = Journal(job=job)
    journal.save(work)
    return journal


def discard_unstarted(folder: Path) -> None:
    """Remove the work folder if nothing is journaled there yet, then the dataset's folder if it is empty."""
    work = folder / WORK_FOLDER
    with contextlib.suppress(OSError, msgspec.MsgspecError, RecursionError):
        if not msgspec.json.decode((work / _JOURNAL).read_bytes(), type=Journal).shards:
            shutil.rmtree(work)
        folder.rmdir()  # refuses if there is anything in it


class TokenWriter:
    """A token file in the work folder: cut to the journal's length, then appended to."""

    def __init__(self, path: Path, dtype: str, tokens: int) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        self._file.truncate(tokens * self._dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def append(self, ids: npt.NDArray[np.uint32]) -> None:
        rest = memoryview(ids.astype(self._dtype).tobytes())
        while rest:
            rest = rest[self._file.write(rest) or 0 :]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def publish(folder: Path) -> None:
    """Make the finished files of the work folder the dataset; meta.json must be among them."""
    work = folder / WORK_FOLDER
    names = [name for name in _FILES if (work / name).exists()]
    assert "meta.json" in names
    write_aside(work / _MARKER, json.dumps(names), durable=True)
    finish_publishing(folder)


def publishing(folder: Path) -> bool:
    """Return True if a publication of this dataset has begun and not ended."""
    return (folder / WORK_FOLDER / _MARKER).exists()


def finish_publishing(folder: Path) -> None:
    """Complete a publication that a crash interrupted; without one, do nothing."""
    if not publishing(folder):
        return
    work = folder / WORK_FOLDER
    try:
        names = msgspec.json.decode((work / _MARKER).read_bytes(), type=list[str])
    except (msgspec.MsgspecError, RecursionError):
        names = []
    if "meta.json" not in names:  # `publish` writes it always; without it everything would count as stale
        raise DataError(say("data.workfolder.strange_marker", path=work / _MARKER, work=work))
    for stale in set(_FILES) - set(names):
        (folder / stale).unlink(missing_ok=True)
    for name in _FILES:
        if name in names and (work / name).exists():
            (work / name).replace(folder / name)
    sync_folder(folder)
    (work / _MARKER).unlink()
    shutil.rmtree(work)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the dataset's folder. DataError if another process prepares it. The lock ends with the process."""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(say("data.workfolder.locked", folder=folder)) from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise DoesNotFit for a full disk, quota or file-size limit, and DataError for a folder that cannot be used."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            path = error.filename or folder
            raise DataError(say("data.workfolder.forbidden", path=path, reason=error.strerror or error)) from None
        work = folder / WORK_FOLDER
        kept = sum(path.stat().st_size for path in work.glob("*") if path.is_file())
        free, reason = shutil.disk_usage(folder).free, error.strerror
        raise DoesNotFit(
            say("data.workfolder.full", folder=folder, reason=reason, kept=kept, free=free, work=work)
        ) from None


def require_space(folder: Path, *, needed_bytes: int) -> None:
    """Raise DoesNotFit if the folder's disk has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise DoesNotFit(say("data.workfolder.small_disk", needed=needed_bytes, folder=folder, free=free))
