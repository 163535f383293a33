"""Seldom used parts of `torch.cuda` on the virtual GPU: NVTX, NCCL, pools, tuned products, DataParallel, extensions."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tightfit.allocator.caching import PoolId
from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.frames import user_frames, users_line
from tightfit.vgpu.on_import import after_import
from tightfit.wording import say

_CUDA_FILES = (".cu", ".cuh")
_NCCL_VERSION = (2, 27, 5)
"""The version that torch's wheels of 2.9 to 2.13 bring along."""


def install(device: VirtualDevice) -> None:
    """Patch this process for good."""
    assign(torch.cuda.nvtx, _nvtx=_Nvtx())
    assign(
        torch._C,
        _cuda_sleep=lambda cycles: None,
        _cuda_jiterator_compile_and_launch_kernel=_launch_written_kernel,
        _activate_gpu_trace=lambda: None,
        _cuda_attach_out_of_memory_observer=lambda observer: None,
        _cuda_isHistoryEnabled=lambda: False,
        **_benchmark_limit(),
    )
    _install_nccl()
    _install_pools(device)
    _install_tunable()
    _install_copies()
    after_import("torch.utils.cpp_extension", lambda module: _refuse_cuda_sources(module, device))


def _refuse_cuda_sources(module: ModuleType, device: VirtualDevice) -> None:
    """Raise NotImplementedError where the script compiles kernels of its own: their memory is unknown.

    Scripts that have other code for such a failure go on with that.
    """
    usual: Callable[..., object] = module.__dict__["_jit_compile"]

    @functools.wraps(usual)
    def compiled(name: str, sources: Sequence[str], *args: object, **options: object) -> object:
        if not any(str(each).endswith(_CUDA_FILES) for each in sources):
            return usual(name, sources, *args, **options)
        line = users_line(user_frames(sys._getframe(1)))
        place = say("vgpu.device.place", file=line.file, line=line.line) if line else ""
        device.note(say("vgpu.patches.extension", name=name))
        raise NotImplementedError(say("vgpu.patches.extension_unknown", name=name, place=place))

    assign(module, _jit_compile=compiled)


def _benchmark_limit() -> dict[str, Callable[..., object]]:
    """Keep how many algorithms cuDNN would try, which `torch.backends.cudnn.flags` reads and sets."""
    limits = [10]
    return {
        "_cuda_get_cudnn_benchmark_limit": lambda: limits[-1],
        "_cuda_set_cudnn_benchmark_limit": limits.append,
        "_cuda_get_conv_benchmark_empty_cache": lambda: True,
        "_cudnn_set_conv_benchmark_empty_cache": lambda empties: None,
    }


class _Nvtx:
    """Ranges for a profiler that does not run."""

    def __init__(self) -> None:
        self._depth = 0
        self._numbers = itertools.count(1)

    def rangePushA(self, msg: str) -> int:  # NVTX's own names
        self._depth += 1
        return self._depth - 1

    def rangePop(self) -> int:
        self._depth -= 1
        return self._depth

    def rangeStartA(self, msg: str) -> int:
        return next(self._numbers)

    def rangeEnd(self, range_id: int) -> None: ...
    def markA(self, msg: str) -> None: ...

    def deviceRangeStart(self, msg: str, stream: int = 0) -> object:
        return next(self._numbers)

    def deviceRangeEnd(self, range_handle: object, stream: int = 0) -> None: ...


def _launch_written_kernel(
    code: str, name: str, returns_tuple: bool, outputs: int, tensors: Sequence[Tensor], options: object
) -> Tensor | tuple[Tensor, ...]:
    """Make the outputs of a `torch.cuda.jiterator` kernel, one element for each of its broadcast inputs."""
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    made = tuple(torch.empty(shape, dtype=tensors[0].dtype, device="cuda") for _ in range(outputs))
    return made if returns_tuple else made[0]


def _install_nccl() -> None:
    """Answer collectives over the cards of this process, of which it has one."""
    major, minor, patch = _NCCL_VERSION

    def nothing(*_: object, **__: object) -> None: ...

    assign(
        torch._C,
        _nccl_version=lambda: major << 32 | minor << 16 | patch,
        _nccl_version_suffix=lambda: b"",
        _nccl_unique_id=lambda: bytes(128),
        _nccl_init_rank=lambda num_ranks, uid, rank: object(),
        _nccl_all_reduce=nothing,
        _nccl_reduce=nothing,
        _nccl_broadcast=nothing,
        _nccl_all_gather=nothing,
        _nccl_reduce_scatter=nothing,
    )


def _install_pools(device: VirtualDevice) -> None:
    recorder = device.recorder

    class MemPool:
        """A private pool of the device's memory, which is released when this object goes."""

        def __init__(self, allocator: object = None, use_on_oom: bool = False, no_split: bool = False) -> None:
            self.allocator = allocator
            with recorder.exclusive():
                self.id = recorder.allocator.create_pool()  # this object is its one user

        def use_count(self) -> int:
            return 1

        def snapshot(self, include_traces: bool = True) -> object:
            return torch.cuda.memory_snapshot(self.id)

        def __del__(self) -> None:
            with recorder.exclusive():
                recorder.allocator.release_pool(self.id)

    @contextlib.contextmanager
    def use_mem_pool(pool: MemPool, device: object = None) -> Iterator[None]:
        before: PoolId | None = recorder.pool
        recorder.pool = pool.id
        try:
            yield
        finally:
            recorder.pool = before

    assign(torch.cuda, torch.cuda.memory, MemPool=MemPool, use_mem_pool=use_mem_pool)


def _install_tunable() -> None:
    """Keep the settings of tuned matrix products, which then run as usual."""
    settings: dict[str, Any] = {  # of four types
        "is_enabled": False,
        "tuning_is_enabled": True,
        "get_max_tuning_duration": 30,
        "get_max_tuning_iterations": 100,
        "get_filename": "tunableop_results.csv",
        "get_rotating_buffer_size": 0,
    }
    setters = {
        "enable": "is_enabled",
        "tuning_enable": "tuning_is_enabled",
        "set_max_tuning_duration": "get_max_tuning_duration",
        "set_max_tuning_iterations": "get_max_tuning_iterations",
        "set_filename": "get_filename",
        "set_rotating_buffer_size": "get_rotating_buffer_size",
    }
    for name in settings:
        assign(torch._C, **{f"_cuda_tunableop_{name}": lambda name=name: settings[name]})
    for name, kept in setters.items():
        assign(torch._C, **{f"_cuda_tunableop_{name}": lambda value, *_, kept=kept: settings.update({kept: value})})
    untuned = {"on": False}
    assign(
        torch._C,
        _cuda_record_untuned_enable=lambda value: untuned.update(on=value),
        _cuda_record_untuned_is_enabled=lambda: untuned["on"],
        _cuda_tunableop_get_results=tuple,
        _cuda_tunableop_get_validators=tuple,
        _cuda_tunableop_read_file=lambda filename: False,
        _cuda_tunableop_set_numerical_check_tolerances=lambda *_: None,
        _cuda_tunableop_clear_all=lambda: None,
    )


def _card(index: int) -> torch.device:
    """Return a card by its number, of which a negative one is the host."""
    return torch.device("cpu") if index < 0 else torch.device("cuda", index)


def _install_copies() -> None:
    """Copy between cards for DataParallel, as torch/csrc/cuda/comm.cpp does; a tensor that lies there already stays."""

    def scatter(
        tensor: Tensor, devices: Sequence[int], chunk_sizes: Sequence[int] | None, dim: int, streams: object
    ) -> list[Tensor]:
        parts = tensor.chunk(len(devices), dim) if chunk_sizes is None else tensor.split(list(chunk_sizes), dim)
        return [part.to(_card(index), non_blocking=True) for part, index in zip(parts, devices, strict=False)]

    def scatter_out(tensor: Tensor, out: Sequence[Tensor], dim: int, streams: object) -> list[Tensor]:
        sizes = [each.shape[dim] for each in out]
        return [each.copy_(part) for each, part in zip(out, tensor.split(sizes, dim), strict=True)]

    def broadcast(tensor: Tensor, devices: Sequence[int]) -> list[Tensor]:
        return [tensor.to(_card(index), non_blocking=True) for index in devices]

    def broadcast_out(tensor: Tensor, out: Sequence[Tensor]) -> list[Tensor]:
        return [each.copy_(tensor) for each in out]

    def broadcast_coalesced(tensors: Sequence[Tensor], devices: Sequence[int], buffer: int) -> list[list[Tensor]]:
        return [[tensor.to(_card(index), non_blocking=True) for tensor in tensors] for index in devices]

    def gather(tensors: Sequence[Tensor], dim: int, destination: int | None) -> Tensor:
        return torch.cat([tensor.to(_card(destination or 0)) for tensor in tensors], dim)

    def gather_out(tensors: Sequence[Tensor], out: Tensor, dim: int) -> Tensor:
        return out.copy_(torch.cat([tensor.to(out.device) for tensor in tensors], dim))

    assign(
        torch._C,
        _scatter=scatter,
        _scatter_out=scatter_out,
        _broadcast=broadcast,
        _broadcast_out=broadcast_out,
        _broadcast_coalesced=broadcast_coalesced,
        _gather=gather,
        _gather_out=gather_out,
    )
