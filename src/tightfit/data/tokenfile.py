"""Token files: flat arrays of ids on disk, and the checks that a run makes before it uses them."""

import contextlib
import difflib
import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from tightfit.data.meta import DTYPES, Meta, read_meta
from tightfit.data.workfolder import WORK_FOLDER, publishing
from tightfit.errors import DataError
from tightfit.storage import write_aside
from tightfit.wording import say

Ids = npt.NDArray[np.uint16 | np.uint32]

SCAN_TOKENS = 2**24
"""Ids that a scan reads at a time: 32 MiB of uint16, so memory stays small for any file."""


class _Scan(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a scan, and the file as it was then."""

    size: int
    mtime_ns: int
    dtype: str
    largest_id: int
    digest: str


@dataclass(frozen=True)
class TokenFile:
    """A flat file of little-endian ids; `TokenFile.open` makes one."""

    path: Path
    dtype: str
    """uint16 or uint32."""
    tokens: int
    """Length of the file in ids."""

    @classmethod
    def open(cls, path: str | Path, dtype: str = "uint16") -> "TokenFile":
        """Open a file by its length alone. DataError if it is missing, empty or ends within an id."""
        path, item_bytes = Path(path), DTYPES[dtype]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(say("data.tokenfile.unreadable", path=path, reason=error.strerror)) from None
        if size == 0:
            raise DataError(say("data.tokenfile.empty", path=path))
        if size % item_bytes:
            raise DataError(say("data.tokenfile.torn", path=path, size=size, item_bytes=item_bytes, dtype=dtype))
        return cls(path, dtype, size // item_bytes)

    def __len__(self) -> int:
        return self.tokens

    def array(self) -> Ids:
        """Return the ids as a new read-only memory map.

        Opening takes some 60 µs. A map that stays open counts every page it read as the process's memory.
        """
        return np.memmap(self.path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r", shape=(self.tokens,))

    def validate(
        self,
        *,
        block_size: int | None = None,
        vocab_size: int | None = None,
        expected_tokens: int | None = None,
    ) -> None:
        """Raise DataError unless the length is as expected and above block_size, and all ids are below vocab_size."""
        if expected_tokens is not None and expected_tokens != self.tokens:
            raise DataError(self._wrong_length(expected_tokens))
        if block_size is not None and self.tokens <= block_size:
            raise DataError(say("data.tokenfile.short", path=self.path, tokens=self.tokens, block_size=block_size))
        if self.dtype == "uint16" and self._looks_like_uint32():
            raise DataError(say("data.tokenfile.looks_like_uint32", path=self.path))
        if vocab_size is not None and (largest := self.largest_id()) >= vocab_size:
            sizes = {"size": vocab_size, "most": vocab_size - 1, "needed": largest + 1}
            raise DataError(say("data.tokenfile.large_id", path=self.path, id=largest, **sizes))

    def largest_id(self) -> int:
        """Return the largest id."""
        return self._scanned().largest_id

    def digest(self) -> str:
        """Return a digest of the ids, which tells texts apart."""
        return self._scanned().digest

    def _scanned(self) -> "_Scan":
        """Scan the file once; a file next to the tokens keeps the result until they change."""
        status = self.path.stat()
        remembered = self.path.with_name(f"{self.path.name}.checked.json")
        try:
            found = msgspec.json.decode(remembered.read_bytes(), type=_Scan)
            if (found.size, found.mtime_ns, found.dtype) == (status.st_size, status.st_mtime_ns, self.dtype):
                return found
        except (OSError, msgspec.MsgspecError, RecursionError):
            pass  # absent, or not written by this version: scan
        ids, largest, digest = self.array(), 0, hashlib.blake2b(digest_size=16)
        for start in range(0, self.tokens, SCAN_TOKENS):
            part = ids[start : start + SCAN_TOKENS]
            largest = max(largest, int(part.max()))
            digest.update(part.tobytes())
        scan = _Scan(
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            dtype=self.dtype,
            largest_id=largest,
            digest=digest.hexdigest(),
        )
        with contextlib.suppress(OSError):  # a read-only folder or a full disk: scan again next time
            write_aside(remembered, msgspec.json.encode(scan))
        return scan

    def _wrong_length(self, expected: int) -> str:
        path, size, dtype = self.path, self.tokens * DTYPES[self.dtype], self.dtype
        for other, item_bytes in DTYPES.items():
            if other != dtype and size == expected * item_bytes:
                return say(
                    "data.tokenfile.other_dtype", path=path, size=size, tokens=expected, other=other, dtype=dtype
                )
        if self.tokens < expected:
            return say("data.tokenfile.cut_short", path=path, tokens=self.tokens, expected=expected)
        return say("data.tokenfile.of_another", path=path, tokens=self.tokens, expected=expected)

    def _looks_like_uint32(self) -> bool:
        head = self.array()[:4096]
        low, high = head[0::2], head[1::2]
        return len(high) >= 64 and not high.any() and len(np.unique(low)) > 16


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A prepared dataset, as `open_dataset` returns it."""

    folder: Path
    train: TokenFile
    val: TokenFile
    dtype: str
    vocab_size: int | None
    """None if the folder has no meta, as nanoGPT's BPE datasets."""
    meta: Meta | None

    def validate(self, *, block_size: int, vocab_size: int | None = None) -> None:
        """Raise DataError unless both files serve this block_size and vocab_size (None: the dataset's own)."""
        for file in (self.train, self.val):
            file.validate(block_size=block_size, vocab_size=vocab_size or self.vocab_size)


def open_dataset(name: str | Path, data_dir: str | Path = "data") -> Dataset:
    """Open the dataset `<data_dir>/<name>`, or the folder at the path `name`. DataError if there is none."""
    folder = _find_folder(str(name), Path(data_dir))
    if publishing(folder):
        raise DataError(say("data.tokenfile.interrupted", folder=folder, command=preparation(folder)))
    for file_name in ("train.bin", "val.bin"):
        if not (folder / file_name).is_file():
            if (folder / WORK_FOLDER).exists():
                lacks = say("data.tokenfile.unfinished", folder=folder, file=file_name, command=preparation(folder))
                raise DataError(lacks)
            lacks = say("data.tokenfile.lacks_file", folder=folder, file=file_name, command=preparation(folder))
            raise DataError(lacks)
    meta = read_meta(folder)
    dtype = meta.dtype if meta else "uint16"
    train, val = (TokenFile.open(folder / file_name, dtype) for file_name in ("train.bin", "val.bin"))
    train.validate(expected_tokens=meta.train_tokens if meta else None)
    val.validate(expected_tokens=meta.val_tokens if meta else None)
    vocab_size = meta.vocab_size if meta else None
    return Dataset(folder=folder, train=train, val=val, dtype=dtype, vocab_size=vocab_size, meta=meta)


def preparation(folder: Path) -> str:
    """Return the command that makes the dataset of this folder.

    >>> preparation(Path("data/stdlib")), preparation(Path("sets/novels"))
    ('tightfit prepare stdlib', 'tightfit prepare novels --input PATH --data_dir=sets')
    """
    from tightfit.data.recipes import NAMES  # training itself has no use for what reads and fetches text

    own = "" if folder.name in NAMES else " --input PATH"
    elsewhere = "" if folder.parent == Path("data") else f" --data_dir={shlex.quote(str(folder.parent))}"
    return f"tightfit prepare {shlex.quote(folder.name)}{own}{elsewhere}"


def _find_folder(name: str, data_dir: Path) -> Path:
    folder = data_dir / name
    if folder.is_dir():
        return folder
    if (os.sep in name or name in (".", "..")) and Path(name).is_dir():
        return Path(name)
    there = sorted(path.parent.name for path in data_dir.glob("*/train.bin"))
    close = difflib.get_close_matches(name, there, n=1)
    make = say("data.tokenfile.make", command=preparation(folder))
    hint = say("data.tokenfile.did_you_mean", near=close[0], make=make) if close else make
    raise DataError(say("data.tokenfile.no_dataset", name=name, folder=data_dir, hint=hint))
