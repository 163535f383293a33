"""Figures of the caching allocator, and PyTorch's error message with them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from tightfit.units import GIB, KIB, MIB, format_bytes

COUNTS = (
    "num_alloc_retries",
    "num_device_alloc",
    "num_device_free",
    "num_oom_rejections",
    "num_ooms",
    "num_sync_all_streams",
)
EXBIBYTE = 2**60
"""Requests from here on are refused at once (one_exa_bytes in CUDACachingAllocator.cpp)."""

PoolId = tuple[int, int]
"""PyTorch's MempoolId_t; (0, 0) is the default pool."""


@dataclass(slots=True, eq=False)
class Stat:
    """One figure: its value now, its peak, and its total growth and shrinkage (c10/core/Allocator.h).

    The shrinkage is not kept but follows from the rest. A decrease is `stat.current -= amount`, and costs no call.
    """

    current: int = 0
    peak: int = 0
    allocated: int = 0
    at_reset: int = 0
    """`current` when the sums were last reset."""

    @property
    def freed(self) -> int:
        return self.at_reset + self.allocated - self.current

    def increase(self, amount: int) -> None:
        self.allocated += amount
        self.current += amount
        if self.current > self.peak:
            self.peak = self.current

    def change(self, amount: int) -> None:
        """Increase or, if the amount is negative, decrease."""
        if amount > 0:
            self.increase(amount)
        else:
            self.current += amount


@dataclass(slots=True, eq=False)
class PoolStats:
    """Figures of all pools, of the small or of the large ones (c10/core/CachingDeviceAllocator.h)."""

    allocation: Stat = field(default_factory=Stat)
    segment: Stat = field(default_factory=Stat)
    active: Stat = field(default_factory=Stat)
    inactive_split: Stat = field(default_factory=Stat)
    allocated_bytes: Stat = field(default_factory=Stat)
    reserved_bytes: Stat = field(default_factory=Stat)
    active_bytes: Stat = field(default_factory=Stat)
    inactive_split_bytes: Stat = field(default_factory=Stat)
    requested_bytes: Stat = field(default_factory=Stat)

    def hand_out(self, size: int, requested: int) -> None:
        """Count one block of `size` bytes that serves a request of `requested` bytes."""
        self.allocation.increase(1)
        self.active.increase(1)
        self.allocated_bytes.increase(size)
        self.active_bytes.increase(size)
        self.requested_bytes.increase(requested)


class AllocatorStats:
    """Figures that torch.cuda.memory_stats reports for one device."""

    def __init__(self) -> None:
        self.all, self.small, self.large = PoolStats(), PoolStats(), PoolStats()
        self.private_reserved: dict[PoolId, tuple[Stat, Stat, Stat]] = {}  # all, small, large; of dead pools too
        self.oversize_allocations = Stat()
        self.oversize_segments = Stat()
        self.counts = dict.fromkeys(COUNTS, 0)

    def reset_peak(self) -> None:
        for _, stat in self._named():
            stat.peak = stat.current

    def reset_accumulated(self) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)
        for _, stat in self._named():
            stat.allocated, stat.at_reset = 0, stat.current

    def flat(self) -> dict[str, int]:
        """Return `name.kind.current`, `.peak`, `.allocated` and `.freed` of each figure, and the plain counts."""
        figures = dict(self.counts)
        for name, stat in self._named():
            for part in ("current", "peak", "allocated", "freed"):
                figures[f"{name}.{part}"] = getattr(stat, part)
        return figures

    def _named(self) -> Iterator[tuple[str, Stat]]:
        kinds = {"all": self.all, "small_pool": self.small, "large_pool": self.large}
        for kind, stats in kinds.items():
            for figure in fields(PoolStats):
                yield f"{figure.name}.{kind}", getattr(stats, figure.name)
        for (first, second), reserved in self.private_reserved.items():
            for kind, stat in zip(kinds, reserved, strict=True):
                yield f"reserved_bytes_by_private_pools.{first}_{second}.{kind}", stat
        yield "oversize_allocations", self.oversize_allocations
        yield "oversize_segments", self.oversize_segments


@dataclass(kw_only=True, eq=False)
class OutOfMemory(Exception):
    """A request that the device cannot serve, with the figures of PyTorch's message."""

    requested_bytes: int
    """Bytes that the device was asked for; the message prints them."""
    tensor_bytes: int
    """The request before rounding."""
    allocated_bytes: int
    reserved_bytes: int
    private_pool_bytes: int
    """Bytes cached in private pools; the message calls them allocated."""
    total_bytes: int
    free_bytes: int
    process_bytes: int
    """Bytes of this process: context and reserved."""
    allowed_bytes: int | None
    """Bytes that the memory fraction allows, or None if none is set."""
    expandable_segments: bool = False

    def __str__(self) -> str:
        return f"no room for {self.requested_bytes} bytes: {self.free_bytes} of {self.total_bytes} are free"

    def message(self, torch_version: tuple[int, int]) -> str:
        """Return the text of torch.OutOfMemoryError on GPU 0 in that version, from 2.4 on."""
        if self.tensor_bytes >= EXBIBYTE:
            return "CUDA out of memory. Tried to allocate more than 1EB memory."
        private, allowed = self.private_pool_bytes, self.allowed_bytes
        pools = f"with {_size(private)} allocated in private pools (e.g., CUDA Graphs), " if private else ""
        limit = "" if allowed is None else f"{_size(allowed)} allowed; "
        return (
            f"CUDA out of memory. Tried to allocate {_size(self.requested_bytes)}. GPU 0 has a total capacity of "
            f"{_size(self.total_bytes)} of which {_size(self.free_bytes)} is free. Including non-PyTorch memory, this "
            f"process has {_size(self.process_bytes)} memory in use. {limit}Of the allocated memory "
            f"{_size(self.allocated_bytes + private)} is allocated by PyTorch, {pools}and "
            f"{_size(self.reserved_bytes - self.allocated_bytes - private)} is reserved by PyTorch but unallocated."
            + self._advice(torch_version)
        )

    def _advice(self, torch_version: tuple[int, int]) -> str:
        # Silent on what is already set since pull request 191105, merged after 2.13.
        if self.expandable_segments and torch_version >= (2, 14):
            return ""
        variable = "PYTORCH_ALLOC_CONF" if (2, 9) <= torch_version < (2, 11) else "PYTORCH_CUDA_ALLOC_CONF"
        site, part = ("docs.pytorch.org", "optimizing-memory-usage-with-pytorch-cuda-alloc-conf")
        if torch_version < (2, 11):
            site, part = "pytorch.org", "environment-variables"
        return (
            f" If reserved but unallocated memory is large try setting {variable}=expandable_segments:True to avoid "
            f"fragmentation.  See documentation for Memory Management  (https://{site}/docs/stable/notes/cuda.html#{part})"
        )


def _size(count: int) -> str:
    # c10's format_size compares with <=: exactly 1 GiB prints as 1024.00 MiB.
    exact = {GIB: "1024.00 MiB", MIB: "1024.00 KiB", KIB: "1024 bytes"}
    return exact.get(count) or format_bytes(count)
