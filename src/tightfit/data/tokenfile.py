"""Token files: flat arrays of ids on disk, and the checks that a run makes before it uses them."""

import contextlib
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tightfit.data.meta import DTYPES, Meta, read_meta
from tightfit.data.workfolder import WORK_FOLDER, publishing
from tightfit.errors import DataError
from tightfit.storage import write_aside

Ids = npt.NDArray[np.uint16 | np.uint32]

SCAN_TOKENS = 2**24
"""Ids that a scan reads at a time: 32 MiB of uint16, so memory stays small for any file."""


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
            raise DataError(f"{path} cannot be opened ({error.strerror}); prepare the dataset again") from None
        if size == 0:
            raise DataError(f"{path} is empty; prepare the dataset again")
        if size % item_bytes:
            raise DataError(
                f"{path} has {size:,} bytes, not a multiple of the {item_bytes} of one {dtype} id, so it is "
                "cut short or no token file; copy it again or prepare the dataset again"
            )
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
            raise DataError(
                f"{self.path} has {self.tokens:,} tokens; block_size={block_size} needs more than that; "
                f"use a block_size below {self.tokens:,} or prepare more text"
            )
        if self.dtype == "uint16" and self._looks_like_uint32():
            raise DataError(
                f"{self.path} looks like uint32 ids read as uint16: every second number is 0; "
                "prepare the dataset again, or say dtype uint32 in its meta.json"
            )
        if vocab_size is not None and (largest := self.largest_id()) >= vocab_size:
            raise DataError(
                f"{self.path} holds the id {largest:,}, but vocab_size={vocab_size:,} allows ids up to "
                f"{vocab_size - 1:,}; set vocab_size={largest + 1} or more, or prepare the dataset again"
            )

    def largest_id(self) -> int:
        """Return the largest id. One scan finds it; a file next to the tokens keeps it until they change."""
        status = self.path.stat()
        key = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "dtype": self.dtype}
        remembered = self.path.with_name(f"{self.path.name}.checked.json")
        try:
            found = json.loads(remembered.read_text())
            if isinstance(found, dict) and found.items() >= key.items() and isinstance(found["largest_id"], int):
                return found["largest_id"]
        except (OSError, ValueError, KeyError):
            pass  # absent or unreadable: scan
        ids = self.array()
        largest = max(int(ids[i : i + SCAN_TOKENS].max()) for i in range(0, self.tokens, SCAN_TOKENS))
        with contextlib.suppress(OSError):  # a read-only folder or a full disk: scan again next time
            write_aside(remembered, json.dumps({**key, "largest_id": largest}))
        return largest

    def _wrong_length(self, expected_tokens: int) -> str:
        size = self.tokens * DTYPES[self.dtype]
        for dtype, item_bytes in DTYPES.items():
            if dtype != self.dtype and size == expected_tokens * item_bytes:
                return (
                    f"{self.path} has {size:,} bytes, which is {expected_tokens:,} tokens as {dtype}, but "
                    f"meta.json says {self.dtype}; prepare the dataset again"
                )
        kind = "cut short" if self.tokens < expected_tokens else "of another preparation"
        return (
            f"{self.path} has {self.tokens:,} tokens but meta.json says {expected_tokens:,}, so it is "
            f"{kind}; copy it again or prepare the dataset again"
        )

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
        raise DataError(
            f"the preparation of {folder} was interrupted while it put its files in place; "
            f"run tightfit prepare {name} once more, which takes a moment"
        )
    for file_name in ("train.bin", "val.bin"):
        if not (folder / file_name).is_file():
            unfinished = (folder / WORK_FOLDER).exists()
            step = "continue its unfinished preparation with" if unfinished else "make it with"
            raise DataError(f"{folder} has no {file_name}; {step}: tightfit prepare {name}")
    meta = read_meta(folder)
    dtype = meta.dtype if meta else "uint16"
    train, val = (TokenFile.open(folder / file_name, dtype) for file_name in ("train.bin", "val.bin"))
    train.validate(expected_tokens=meta.train_tokens if meta else None)
    val.validate(expected_tokens=meta.val_tokens if meta else None)
    vocab_size = meta.vocab_size if meta else None
    return Dataset(folder=folder, train=train, val=val, dtype=dtype, vocab_size=vocab_size, meta=meta)


def _find_folder(name: str, data_dir: Path) -> Path:
    folder = data_dir / name
    if folder.is_dir():
        return folder
    if (os.sep in name or name in (".", "..")) and Path(name).is_dir():
        return Path(name)
    there = sorted(path.parent.name for path in data_dir.glob("*/train.bin"))
    close = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {close[0]}? Otherwise make it with" if close else "make it with"
    raise DataError(f"there is no dataset {name!r} in {data_dir}; {hint}: tightfit prepare {name}")
