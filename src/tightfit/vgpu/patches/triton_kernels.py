"""A script's own Triton kernels on the virtual GPU: launched without computing, with unknown outputs.

A kernel takes no memory of the caching allocator. What its caller allocates for it is a tensor like any other.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.vgpu.assign import assign
from tightfit.vgpu.autotuning import TRITON_CACHE_BYTES, run_as_timed
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.on_import import after_import

_NO_TIME_MS = 1e-3
"""As between two events of the virtual card: nothing was computed."""


def install(device: VirtualDevice, card: SimpleNamespace) -> None:
    """Patch Triton in this process when the script imports it."""
    after_import("triton.runtime.jit", lambda module: assign(module.__dict__["JITFunction"], run=_launcher(device)))
    after_import("triton.runtime.driver", lambda module: _use_driver(module, card))
    after_import("triton.testing", lambda module: assign(module, do_bench=_benchmark, do_bench_cudagraph=_benchmark))


def _launcher(device: VirtualDevice) -> Callable[..., object]:
    def run(kernel: object, /, *args: object, grid: object = None, warmup: bool = False, **kwargs: object) -> _Compiled:
        """Act as a launch: check where the tensors are, and forget their known values."""
        for position, value in enumerate((*args, *kwargs.values())):
            if isinstance(value, FakeTensor) and value.fake_device.type != "cpu":
                device.values.forget(value.untyped_storage())
            elif isinstance(value, Tensor):
                raise ValueError(f"Pointer argument (at {position}) cannot be accessed from Triton (cpu tensor?)")
        return _Compiled()

    return run


class _Compiled:
    """A compiled kernel, which has no code."""

    n_regs, n_spills, shared = 32, 0, 0

    def __init__(self) -> None:
        self.metadata = SimpleNamespace(shared=0, num_warps=4, num_stages=1, name="kernel")
        self.asm: dict[str, str] = {}

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def _init_handles(self) -> None: ...


def _use_driver(module: ModuleType, card: SimpleNamespace) -> None:
    module.__dict__["driver"].set_active(_Driver(card))


class _Driver:
    """Triton's driver of the virtual card."""

    def __init__(self, card: SimpleNamespace) -> None:
        self._card = card
        self.utils = SimpleNamespace(
            get_device_properties=lambda index: {
                "max_shared_mem": card.shared_memory_per_block_optin,
                "max_num_regs": card.regs_per_multiprocessor,
                "multiprocessor_count": card.multi_processor_count,
                "warpSize": card.warp_size,
                "sm_clock_rate": card.clock_rate,
                "mem_clock_rate": card.memory_clock_rate,
                "mem_bus_width": card.memory_bus_width,
            }
        )

    def get_current_target(self) -> Any:  # triton's GPUTarget
        return import_module("triton.backends.compiler").GPUTarget("cuda", self._card.major * 10 + self._card.minor, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, index: int) -> None: ...

    def get_current_stream(self, index: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> ModuleType:
        return torch.cuda

    def get_benchmarker(self) -> Callable[..., object]:
        return _benchmark

    def get_empty_cache_for_benchmark(self) -> Tensor:
        return torch.empty(TRITON_CACHE_BYTES // 4, dtype=torch.int32, device="cuda")

    def clear_cache(self, cache: Tensor) -> None: ...


def _benchmark(
    fn: Callable[[], object], *_: object, quantiles: list[float] | None = None, return_mode: str = "mean", **__: object
) -> object:
    """Run a function once, with the memory that a benchmark of Triton takes; no time is measured."""
    run_as_timed(fn, TRITON_CACHE_BYTES)
    return [_NO_TIME_MS] * len(quantiles) if quantiles else _NO_TIME_MS
