"""What one kernel does, in numbers: known here without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Place = Literal["device", "host", "link"]


@dataclass(frozen=True)
class Kernel:
    """One kernel's work."""

    flops: int
    nbytes: int
    """Read and written."""
    dtype: str
    """Of its first input that is no whole number."""
    is_attention: bool = False
    """Fused attention, part of whose work no matrix unit does."""
    place: Place = "device"
    """Where its tensors are; `link` for a copy between host and device."""


Observer = Callable[[Kernel], None]
"""Hears of every kernel of the virtual device."""
