"""`torch.cuda.CUDAGraph` on the virtual GPU: a capture takes its memory from the graph's private pool."""

from contextlib import AbstractContextManager

import torch

from tightfit.allocator.caching import PoolId
from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice

_OWN_STREAM = (1 << 20) + 1
"""Number of a capture's stream where the script captures on the default one."""


class VirtualGraph:
    """A graph of the virtual card. Its memory stays reserved until the graph goes, as on a card."""

    device: VirtualDevice

    def __init__(self, keep_graph: bool = False) -> None:
        self._pool: PoolId | None = None
        self._capture: AbstractContextManager[None] | None = None

    def capture_begin(
        self, pool: PoolId | None = None, capture_error_mode: str = "global", check_input_liveness: bool = False
    ) -> None:
        allocator = self.device.recorder.allocator
        with self.device.recorder.exclusive():
            self._pool = allocator.create_pool() if pool is None else pool
            allocator.retain_pool(self._pool)
        stream = self.device.current_stream or _OWN_STREAM
        self._capture = self.device.in_pool(self._pool, stream)
        self._capture.__enter__()
        self.device.capture_stream = stream

    def capture_end(self) -> None:
        if self._capture is not None:
            self.device.capture_stream = 0
            self._capture.__exit__(None, None, None)
            self._capture = None

    def pool(self) -> PoolId | None:
        return self._pool

    def reset(self) -> None:
        """Release the private pool; its memory can be freed once no tensor is in it."""
        pool, self._pool = self._pool, None
        if pool is not None:
            with self.device.recorder.exclusive():
                self.device.recorder.allocator.release_pool(pool)

    def __del__(self) -> None:
        self.reset()

    def instantiate(self) -> None: ...
    def replay(self) -> None: ...
    def enable_debug_mode(self) -> None: ...
    def debug_dump(self, debug_path: str) -> None: ...

    def raw_cuda_graph(self) -> int:
        return id(self)

    def raw_cuda_graph_exec(self) -> int:
        return id(self)


def install(device: VirtualDevice) -> None:
    """Patch this process for good."""
    allocator = device.recorder.allocator

    def graph_pool_handle() -> PoolId:
        return allocator.create_pool()

    VirtualGraph.device = device
    assign(torch.cuda, torch.cuda.graphs, CUDAGraph=VirtualGraph, graph_pool_handle=graph_pool_handle)
    assign(torch._C, _CUDAGraph=VirtualGraph, _graph_pool_handle=graph_pool_handle, _host_emptyCache=lambda: None)
    assign(
        torch.cuda,
        torch.cuda.graphs,
        is_current_stream_capturing=lambda: device.capture_stream > 0,
    )
