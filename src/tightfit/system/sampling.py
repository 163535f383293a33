"""What watch looks at, at one moment: cards, host, and what a training run last told of itself."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tightfit.system.machine import gpu_vendors
from tightfit.system.memory_limits import HostMemory, host_memory
from tightfit.system.nvml import Cards, NvmlSession
from tightfit.units import MIB

METRICS = "metrics.jsonl"
"""What a run writes in its folder; tightfit.trainer.metrics names it the same."""
_TAIL_BYTES = MIB
"""Of a long file only the end is read, some thousand steps."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A training run as it last told of itself."""

    step: int
    loss: float | None
    tokens_per_s: float | None
    memory_bytes: int | None
    """On CUDA what PyTorch's allocator reserves, elsewhere the resident memory."""
    peak_bytes: int | None
    allocated_bytes: int | None
    """On CUDA what tensors hold, if the run writes it."""
    age_s: float
    """Seconds since it wrote."""


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
        self._row: Mapping[str, Any] = {}

    def read(self) -> RunState | None:
        """None while the file is missing or no step is in it."""
        try:
            status = self.path.stat()
            if (status.st_dev, status.st_ino) != self._identity or status.st_size < self._offset:
                self._offset, self._identity, self._row = 0, (status.st_dev, status.st_ino), {}
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
    """One at each `next`."""
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


def _training_row(line: bytes) -> Mapping[str, Any] | None:
    """A logged step; evaluations have no memory, and a killed run may leave half a line."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) and "memory_bytes" in row else None


def _state(row: Mapping[str, Any], age_s: float) -> RunState:
    def number(key: str) -> Any:
        value = row.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    return RunState(
        step=row["step"],
        loss=number("loss"),
        tokens_per_s=number("tokens_per_s"),
        memory_bytes=number("memory_bytes"),
        peak_bytes=number("memory_peak_bytes"),
        allocated_bytes=number("memory_allocated_bytes"),
        age_s=age_s,
    )
