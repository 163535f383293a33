"""Work of one kernel in numbers, without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Place = Literal["device", "host", "link"]
Exchange = Literal["", "all_gather", "reduce_scatter", "all_reduce", "broadcast"]


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
    exchange: Exchange = ""
    """Collective that it is, between cards."""
    ranks: int = 1
    """Cards that take part in it."""
    stride: int = 1
    """Distance of their ranks: that of nodes, if each is in another node."""


Observer = Callable[[Kernel], None]
"""A function that the virtual device calls with each kernel."""
