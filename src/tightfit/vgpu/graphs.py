"""Memory under CUDA graphs: `torch.compile(mode="reduce-overhead")` takes it from a private pool that keeps it.

Follows torch/_inductor/cudagraph_trees.py. All graphs of a process share one pool on a stream of their own. A graph is
first run as it is in the pool, then recorded there, then replayed: the same addresses each time. Its inputs other than
parameters and results of other graphs are copied into the pool. The next call of a compiled function takes back the
results of the last one, unless a backward pass is still to come. It takes back even those that the script holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses.fake_tensor import FakeTensor

from tightfit.allocator.caching import PoolId
from tightfit.kernels.temporaries import Argument
from tightfit.vgpu.device import VirtualDevice

_STREAM = 1 << 20
"""Number of the stream on which graphs are recorded: one that no script has."""


class CudaGraphs:
    """The pool of a process's graphs: `called` and `run` follow its use."""

    def __init__(self, device: VirtualDevice) -> None:
        self._device = device
        self._pool: PoolId | None = None
        self._calls = 0
        self._calls_at_last_run = 0
        self._awaits_backward = False

    def called(self) -> None:
        """Count a call of a compiled function."""
        self._calls += 1

    @contextmanager
    def run(self, arguments: list[Argument], *, backward: bool, inference: bool) -> Iterator[None]:
        """Run one graph within, with its memory in the pool."""
        recorder = self._device.recorder
        if self._pool is None:
            self._pool = recorder.allocator.create_pool()
            recorder.allocator.retain_pool(self._pool)
        if self._calls != self._calls_at_last_run and not self._awaits_backward:
            recorder.give_all_of(self._pool)
        self._calls_at_last_run = self._calls
        self._awaits_backward = not backward and (self._awaits_backward or not inference)
        with self._device.in_pool(self._pool, _STREAM):
            copies = [  # no other list of the inputs: it would keep alive what the graph frees
                self._device.copy_into_pool(tensor)
                for tensor in arguments
                if isinstance(tensor, FakeTensor) and self._is_copied(tensor)
            ]
            try:
                yield
            finally:
                for copy in copies:
                    recorder.give(copy)

    def _is_copied(self, tensor: FakeTensor) -> bool:
        held = self._device.recorder.of_storage(tensor)
        return (
            held is not None
            and held.nbytes > 0
            and held.category != "parameters"
            and (held.block is None or held.block.pool.owner != self._pool)
        )
