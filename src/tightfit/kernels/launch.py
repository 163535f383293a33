"""Work of one kernel in numbers, without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Place = Literal["device", "host", "link"]


@dataclass(frozen=True)
class Kernel:
    """Work of one kernel."""

    flops: int
    nbytes: int
    """Bytes read and written."""
    dtype: str
    """Type of the first floating-point input."""
    is_attention: bool = False
    """True for fused attention, which does part of its work outside the matrix units."""
    place: Place = "device"
    """Place of its tensors; `link` for a copy between host and device."""


Observer = Callable[[Kernel], None]
"""A function that the virtual device calls with each kernel."""
