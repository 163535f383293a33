"""Record of the virtual GPU: every allocation in true order, with its place, phase, category and line.

Each allocation goes to the simulated allocator at once, so that memory runs out at the operator where it would.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tightfit.allocator.caching import Block, CachingAllocator, PoolId
from tightfit.vgpu.frames import Frame, users_line
from tightfit.vgpu.records import Category, OriginFields, Phase


@dataclass(slots=True, eq=False)
class Allocation:
    """One piece of device memory, from its request to its release."""

    number: int
    nbytes: int
    """Bytes requested, before the allocator rounds."""
    operator: str
    shape: tuple[int, ...]
    """Shape of the tensor it was made for; empty for a kernel's own memory."""
    dtype: str
    phase: Phase
    category: Category
    frames: tuple[Frame, ...]
    """The user's lines, innermost first."""
    stream: int = 0
    block: Block | None = None

    def origin(self) -> OriginFields:
        """Return the tensor and the user's line, for a record."""
        line = users_line(self.frames) or Frame("", 0, "")
        return {
            "file": line.file,
            "line": line.line,
            "function": line.function,
            "shape": self.shape,
            "dtype": self.dtype,
            "operator": self.operator,
            "category": self.category,
        }


@dataclass(slots=True)
class _Pending:
    """A sum of two gradients. Autograd's engine writes it over the first one if nothing else holds that."""

    sum_of: Allocation
    first: int
    """Storage key of the first gradient."""


@dataclass
class Recorder:
    """Feeds `allocator`, and keeps the order of allocations (+number) and releases (-number) in `events`."""

    allocator: CachingAllocator
    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    phase_peaks: dict[Phase, int] = field(default_factory=dict)
    """Highest allocated bytes seen in each phase."""
    peak_allocated: int = 0
    peak_event: int = 0
    """Length of `events` when the allocated bytes were highest."""
    peak_phase: Phase = "setup"

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._released: deque[tuple[int, weakref.ref[torch.UntypedStorage]]] = deque()
        self._held: dict[int, tuple[weakref.ref[torch.UntypedStorage], Allocation]] = {}
        self._pending: _Pending | None = None
        self.before_first: Callable[[], None] | None = None
        """Called before the first request."""
        self.pool: PoolId | None = None
        """Private pool that requests take memory from now."""

    # Tensors

    def of_storage(self, tensor: Tensor) -> Allocation | None:
        """Return the allocation that holds a tensor's data."""
        return self.held_by(tensor.untyped_storage())

    def held_by(self, storage: torch.UntypedStorage) -> Allocation | None:
        """Return the allocation of a storage: of 0 bytes if it is empty, None if it is not on the device."""
        held = self._held.get(storage._cdata)
        # A storage that died while another thread had the lock may have left its number to this one.
        return held[1] if held is not None and held[0]() is storage else None

    def address_of(self, storage: torch.UntypedStorage) -> int | None:
        """Return the device address of a storage; None without memory there."""
        held = self.held_by(storage)
        return held.block.address if held is not None and held.block is not None else None

    def track(self, tensor: Tensor, describe: Callable[[int], Allocation]) -> None:
        """Take memory for a tensor with a new or grown storage."""
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        held = self.held_by(storage)
        if held is None:
            allocation = describe(nbytes)
            if nbytes:
                self.take(allocation)
            self._hold(storage, allocation)
        elif held.nbytes < nbytes:
            self.resize(storage, describe(nbytes))

    def resize(self, storage: torch.UntypedStorage, new: Allocation) -> None:
        """Give a storage of the device the memory `new`, taken before the old memory is freed.

        ATen's `resize_bytes_cuda` does the same; 0 bytes only free.
        """
        key = storage._cdata
        self.settle()
        if new.nbytes:
            self.take(new)
        reference, old = self._held[key]
        self._held[key] = (reference, new)
        self.give(old)

    def _hold(self, storage: torch.UntypedStorage, allocation: Allocation) -> None:
        key = storage._cdata
        reference = weakref.ref(storage, lambda ref: self._on_release(key, ref))
        with self.exclusive():
            self._held[key] = (reference, allocation)

    def note_given(self, tensor: Tensor, describe: Callable[[int], Allocation]) -> None:
        """Know a tensor whose memory another process holds: it takes nothing here."""
        storage = tensor.untyped_storage()
        self._hold(storage, describe(storage.nbytes()))

    def track_accumulation(self, tensor: Tensor, first: Tensor, describe: Callable[[int], Allocation]) -> None:
        """Track `tensor`, the sum that autograd's engine made of a new gradient and `first`.

        The engine adds in place when it holds the only reference to `first`. That shows at once: `first` is released
        before anything else happens. So the sum waits, and takes over the memory of `first` or takes its own.
        """
        self.settle()
        storage = tensor.untyped_storage()
        allocation = describe(storage.nbytes())
        self._pending = _Pending(allocation, first.untyped_storage()._cdata)
        self._hold(storage, allocation)

    def settle(self) -> None:
        """Take memory for a waiting sum: the gradient that it was added to is still held."""
        with self.exclusive():
            self._settle()

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._take(pending.sum_of)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other threads and dying storages from changing the recorder and its allocator."""
        with self._lock:
            self._release_dead()
            yield
        self._drain()

    def _on_release(self, key: int, reference: "weakref.ref[torch.UntypedStorage]") -> None:
        """Called by Python when a storage dies, at any moment, also within our own lines and in other threads."""
        self._released.append((key, reference))
        self._drain()

    def _drain(self) -> None:
        while self._released and self._lock.acquire(blocking=False):
            try:
                self._release_dead()
            finally:
                self._lock.release()

    def _release_dead(self) -> None:
        while self._released:
            self._release(*self._released.popleft())

    def _release(self, key: int, reference: "weakref.ref[torch.UntypedStorage]") -> None:
        held = self._held.get(key)
        if held is None or held[0] is not reference:
            return
        del self._held[key]
        allocation = held[1]
        pending = self._pending
        if pending is not None and pending.first == key:
            self._pending = None
            self._hand_over(allocation, pending.sum_of)
        elif pending is not None and pending.sum_of is allocation:
            self._pending = None
        else:
            self._give(allocation)

    def _hand_over(self, old: Allocation, new: Allocation) -> None:
        new.block, old.block = old.block, None
        if new.block is not None:
            new.block.tag = new
        self._register(new)
        self.events.append(-old.number)

    # Kernels

    def take(self, allocation: Allocation) -> None:
        """Take memory from the allocator. Raises its OutOfMemory."""
        with self.exclusive():
            self._settle()
            self._take(allocation)

    def give(self, allocation: Allocation) -> None:
        with self.exclusive():
            self._give(allocation)

    def give_all_of(self, pool: PoolId) -> None:
        """Take back all memory of a private pool, also from tensors that are still held."""
        with self.exclusive():
            for key, (_, allocation) in list(self._held.items()):
                if allocation.block is not None and allocation.block.pool.owner == pool:
                    del self._held[key]
                    self._give(allocation)

    def _take(self, allocation: Allocation) -> None:
        self._release_dead()
        if self.before_first is not None:
            before, self.before_first = self.before_first, None
            before()
        allocation.block = self.allocator.malloc(allocation.nbytes, stream=allocation.stream, pool=self.pool)
        allocation.block.tag = allocation
        self._register(allocation)
        allocated = self.allocator.allocated_bytes
        if allocated > self.phase_peaks.get(allocation.phase, 0):
            self.phase_peaks[allocation.phase] = allocated
        if allocated > self.peak_allocated:
            self.peak_allocated, self.peak_event, self.peak_phase = allocated, len(self.events), allocation.phase

    def _register(self, allocation: Allocation) -> None:
        allocation.number = len(self.allocations) + 1
        self.allocations.append(allocation)
        self.events.append(allocation.number)

    def _give(self, allocation: Allocation) -> None:
        block, allocation.block = allocation.block, None
        if block is not None:
            self.allocator.free(block)
            self.events.append(-allocation.number)

    # Queries

    def alive_at(self, event: int) -> list[Allocation]:
        """List the allocations held after the first `event` events."""
        alive: dict[int, Allocation] = {}
        for number in self.events[:event]:
            if number > 0:
                alive[number] = self.allocations[number - 1]
            else:
                alive.pop(-number, None)
        return list(alive.values())

    def sizes_since(self, event: int) -> Iterator[int]:
        """Yield the bytes of each event from number `event` on, negative for a release."""
        for number in self.events[event:]:
            nbytes = self.allocations[abs(number) - 1].nbytes
            yield nbytes if number > 0 else -nbytes

    def mark(self, tensor: Tensor, category: Category) -> None:
        """Set the category that a tensor turned out to have."""
        allocation = self.of_storage(tensor) if tensor.layout == torch.strided else None
        if allocation is not None:
            allocation.category = category
