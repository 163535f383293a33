"""The samples of watch: cards, host, and the last step that a training run logged."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from tightfit.storage import METRICS
from tightfit.system.machine import gpu_vendors
from tightfit.system.memory_limits import HostMemory, host_memory
from tightfit.system.nvml import Cards, NvmlSession
from tightfit.units import MIB

"""The file that a run writes in its folder; tightfit.trainer.metrics uses the same name."""
_TAIL_BYTES = MIB
"""Bytes read from the end of a long file, some thousand steps."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The last step that a training run logged."""

    step: int
    loss: float | None
    tokens_per_s: float | None
    memory_bytes: int | None
    """Bytes that PyTorch's allocator reserves on CUDA, elsewhere the resident memory."""
    peak_bytes: int | None
    allocated_bytes: int | None
    """Bytes of tensors on CUDA, if the run logs them."""
    age_s: float
    """Seconds since the run wrote it."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Everything at one moment."""

    time: datetime
    cards: Cards
    host: HostMemory
    folder: Path | None
    """The run's; None if none is watched."""
    run: RunState | None
    vendors: frozenset[str]


class MetricsTail:
    """The last training step in a growing `metrics.jsonl`; starts over when the file is replaced, as on resuming."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._identity = 0, (0, 0)
        self._row: _Row | None = None

    def read(self) -> RunState | None:
        """None while the file is missing or no step is in it."""
        try:
            status = self.path.stat()
            if (status.st_dev, status.st_ino) != self._identity or status.st_size < self._offset:
                self._offset, self._identity, self._row = 0, (status.st_dev, status.st_ino), None
            self._offset = max(self._offset, status.st_size - _TAIL_BYTES)
            with self.path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return None
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            self._row = _training_row(line) or self._row
        return _state(self._row, max(0.0, time.time() - status.st_mtime)) if self._row else None


def samples(folder: Path | None, nvml: NvmlSession) -> Iterator[Sample]:
    """Take one sample at each `next`."""
    tail = MetricsTail(folder / METRICS) if folder else None
    vendors = gpu_vendors()
    while True:
        yield Sample(
            time=datetime.now().astimezone(),
            cards=nvml.read(),
            host=host_memory(),
            folder=folder,
            run=tail.read() if tail else None,
            vendors=vendors,
        )


class _Row(msgspec.Struct):
    """A logged step in `metrics.jsonl`. Evaluations have no memory, so their rows are none."""

    step: int
    memory_bytes: int | None
    loss: float | None = None
    tokens_per_s: float | None = None
    memory_peak_bytes: int | None = None
    memory_allocated_bytes: int | None = None


def _training_row(line: bytes) -> _Row | None:
    """The step in a line, or None; a killed run may leave half a line."""
    try:
        return msgspec.convert(json.loads(line), _Row)  # json reads the NaN of a run that diverged, msgspec does not
    except (ValueError, msgspec.ValidationError):
        return None


def _state(row: _Row, age_s: float) -> RunState:
    return RunState(
        step=row.step,
        loss=row.loss,
        tokens_per_s=row.tokens_per_s,
        memory_bytes=row.memory_bytes,
        peak_bytes=row.memory_peak_bytes,
        allocated_bytes=row.memory_allocated_bytes,
        age_s=age_s,
    )
