"""Read PyTorch's memory snapshots, which are pickles, without executing anything in them."""

import io
import os
import pickle
from pathlib import Path
from typing import BinaryIO, Never

from tightfit.errors import DataError
from tightfit.foreign import reads_in_bounds
from tightfit.wording import say

_NOT_PLAIN_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)
"""Errors of the unpickler for bytes that no pickler wrote."""


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of plain values only: without classes and functions, it can call nothing."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Never:
        raise DataError(say("oomlog.snapshot_reader.calls", path=self._path, name=f"{module}.{name}"))


def read_snapshot(path: str | os.PathLike[str]) -> dict[str, object]:
    """Read a snapshot of PyTorch or tightfit without executing anything in it. DataError for any other file.

    Its size bounds the time and memory that it may take.
    """
    source = Path(path)
    try:
        pickled = source.read_bytes()
        if not reads_in_bounds(pickled):
            raise DataError(say("oomlog.snapshot_reader.bounds", path=source, size=len(pickled)))
        found = _PlainUnpickler(io.BytesIO(pickled), source).load()
    except OSError as error:
        raise DataError(say("oomlog.snapshot_reader.unreadable", path=source, reason=error.strerror)) from None
    except _NOT_PLAIN_PICKLE as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(say("oomlog.snapshot_reader.cut", path=source, error=reason)) from None
    if not isinstance(found, dict) or not isinstance(found.get("segments"), list):
        raise DataError(say("oomlog.snapshot_reader.other", path=source, kind=type(found).__name__))
    return found
