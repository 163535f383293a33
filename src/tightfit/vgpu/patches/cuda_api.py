"""`torch.cuda` on the virtual GPU: its Python half, and the compiled half that this asks."""

import re
import threading
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.cuda._utils import _get_device_index

from tightfit.allocator.caching import CachingAllocator
from tightfit.gpus import GPU
from tightfit.kernels.card import max_threads_per_sm
from tightfit.vgpu.assign import assign
from tightfit.vgpu.card_properties import capability_of, watched
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.patches import cuda_extras, cuda_graphs, cuda_streams, cuda_types, library_settings
from tightfit.vgpu.recorder import Allocation
from tightfit.vgpu.snapshot import Snapshot, snapshot_of

Where = torch.device | str | int | None
Nested = dict[str, "int | Nested"]
"""Figures of `torch.cuda.memory_stats` by the parts of their names."""

_SHARED_MEMORY_PER_BLOCK = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""KiB that a kernel can ask for, from the CUDA programming guide's table of compute capabilities."""


def driver_name(name: str) -> str:
    """Return a card's name as its driver gives it, without the memory size that tells two cards of a name apart.

    >>> driver_name("GeForce RTX 3060 12GB"), driver_name("Tesla T4")
    ('NVIDIA GeForce RTX 3060', 'Tesla T4')
    """
    if name.startswith("GeForce"):
        return "NVIDIA " + re.sub(r" \d+ ?GB$", "", name)
    return re.sub(r" \(.*\)$", "", name)


def properties(gpu: GPU, total_bytes: int) -> SimpleNamespace:
    """Return what `torch.cuda.get_device_properties` would for a card."""
    major, minor = gpu.capability
    return SimpleNamespace(
        name=driver_name(gpu.name),
        major=major,
        minor=minor,
        total_memory=total_bytes,
        multi_processor_count=gpu.sm_count,
        is_integrated=0,
        is_multi_gpu_board=0,
        warp_size=32,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=max_threads_per_sm(gpu.capability),
        regs_per_multiprocessor=65536,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=_SHARED_MEMORY_PER_BLOCK.get(gpu.capability, 96) * 1024,
        shared_memory_per_multiprocessor=(_SHARED_MEMORY_PER_BLOCK.get(gpu.capability, 96) + 1) * 1024,
        L2_cache_size=gpu.cache_bytes or 4 * 2**20,
        clock_rate=1_700_000,
        memory_clock_rate=7_500_000,
        memory_bus_width=192,
        gcnArchName=f"sm_{major}{minor}",
        uuid="00000000-0000-0000-0000-000000000000",
        pci_bus_id=1,
        pci_device_id=0,
        pci_domain_id=0,
    )


def install(device: VirtualDevice, gpu: GPU, count: int = 1) -> None:
    """Answer for `count` cards of this kind; this process uses the first, or the one of its local rank."""
    allocator = device.recorder.allocator
    device.count = count
    _install_compiled_devices(device, count)
    _install_compiled_memory(device, allocator)
    _install_devices(device, watched(properties(gpu, allocator.total_bytes), device.answers))
    _install_libraries(allocator)
    cuda_streams.install(device)
    cuda_graphs.install(device)
    cuda_extras.install(device)
    cuda_types.install()
    library_settings.install(device)


def _install_devices(device: VirtualDevice, card: SimpleNamespace) -> None:
    count = device.count

    def properties_of(device: Where = None) -> SimpleNamespace:
        if not 0 <= _get_device_index(device, optional=True) < count:
            raise AssertionError("Invalid device id")
        return card

    virtual = device

    def is_ampere() -> bool:
        return virtual.answers.ask(lambda card: card.capability >= (8, 0))

    def set_device(device: Where) -> None:
        virtual.check_ordinal(_get_device_index(device))

    assign(
        torch.cuda,
        _initialized=True,
        _lazy_init=lambda: None,
        init=lambda: None,
        _lazy_call=lambda call, **kwargs: call(),
        _queued_calls=[],
        _is_compiled=lambda: True,
        is_available=lambda: True,
        _exchange_device=_exchange(virtual),
        _maybe_exchange_device=_exchange(virtual),
        set_device=set_device,
        current_device=lambda: 0,
        device_count=lambda: count,
        _device_count_nvml=lambda: count,
        is_bf16_supported=lambda including_emulation=True: including_emulation or is_ampere(),
        is_tf32_supported=is_ampere,
        get_device_properties=properties_of,
        _get_device_properties=properties_of,
        get_device_capability=lambda device=None: capability_of(properties_of(device), virtual.answers),
        get_device_name=lambda device=None: properties_of(device).name,
        get_arch_list=lambda: [card.gcnArchName],
        can_device_access_peer=lambda device, peer_device: True,
    )


def _exchange(device: VirtualDevice) -> Callable[[int], int]:
    def exchange(index: int) -> int:
        """Make a card the current one, and return the index of the one before; -1 changes nothing."""
        if index >= 0:
            device.check_ordinal(index)
        return 0

    return exchange


class _CudaError(int):
    """A status of the CUDA runtime: it is always this one."""

    success = 0


def _install_libraries(allocator: CachingAllocator) -> None:
    """Answer for the CUDA runtime, NVML, cuBLAS and cuDNN."""
    for name in ("utilization", "memory_usage", "temperature", "power_draw", "clock_rate"):
        assign(torch.cuda, **{name: lambda device=None: 0})
    runtime = SimpleNamespace(
        cudaMemGetInfo=lambda index: allocator.mem_get_info(),
        cudaError=_CudaError,
        cudaProfilerStart=lambda: 0,
        cudaProfilerStop=lambda: 0,
        cudaHostRegister=lambda *args: 0,
        cudaHostUnregister=lambda *args: 0,
        cudaGetErrorString=lambda code: "no error",
    )
    assign(
        torch.cuda,
        device_memory_used=lambda device=None: allocator.total_bytes - allocator.mem_get_info()[0],
        cudart=lambda: runtime,
        _cudart=runtime,
    )
    assign(torch.cuda, torch.cuda.memory, list_gpu_processes=lambda device=None: "GPU:0\nno processes are running")
    assign(torch.backends.cuda, is_built=lambda: True)
    cudnn = torch.backends.cudnn
    assign(cudnn, cudnn.__dict__.get("m", cudnn), is_available=lambda: True, version=lambda: 91002, _init=lambda: True)
    if torch.version.cuda is None:
        torch.version.cuda = "13.0"


def _install_compiled_devices(device: VirtualDevice, count: int) -> None:
    def architecture() -> str:
        major, minor = device.answers.ask(lambda card: card.capability)
        return f"sm_{major}{minor}"

    assign(
        torch._C,
        _cuda_getDeviceCount=lambda: count,
        _cuda_getDevice=lambda: 0,
        _cuda_setDevice=device.check_ordinal,
        _cuda_exchangeDevice=_exchange(device),
        _cuda_maybeExchangeDevice=_exchange(device),
        _cuda_canDeviceAccessPeer=lambda device, peer: True,
        _cuda_getCompiledVersion=lambda: 13000,
        _cuda_init=lambda: None,
        _cuda_getArchFlags=architecture,
        _cuda_ipc_collect=lambda: None,
        _cuda_isCurrentStreamCapturing=lambda: device.capture_stream > 0,
        _cuda_get_sync_debug_mode=lambda: 0,
        _cuda_set_sync_debug_mode=lambda mode: None,
        _cuda_getCurrentBlasHandle=lambda: 0,
        _cuda_getCurrentSolverHandle=lambda: 0,
        _cuda_hasPrimaryContext=lambda index: True,
        _get_accelerator=lambda check=None: torch.device("cuda"),
    )
    if not hasattr(torch._C, "_cuda_CUDAAllocator_AllocatorState"):  # imported where torch.cuda is there
        assign(
            torch._C,
            _cuda_CUDAAllocator_AllocatorState=type("AllocatorState", (), {}),
            _set_cached_tensors_enabled=lambda enabled: None,
        )


class _Memory:
    """Memory calls of the device, each alone in the recorder."""

    def __init__(self, device: VirtualDevice, allocator: CachingAllocator) -> None:
        self._device, self._allocator = device, allocator
        self._raw: dict[int, Allocation] = {}

    def stats(self, index: int) -> Nested:
        self._device.check_ordinal(index)
        nested: Nested = {}
        for key, value in self._allocator.memory_stats().items():
            *path, last = key.split(".")
            place = nested
            for part in path:
                inner = place.setdefault(part, {})
                assert isinstance(inner, dict)
                place = inner
            place[last] = value
        return nested

    def snapshot(self, wanted: tuple[int, ...] | None = None) -> Snapshot:
        """Return all memory, or that of the pool with the number that `wanted` begins with."""
        with self._device.recorder.exclusive():
            found = snapshot_of(self._device.recorder)
        if wanted and any(wanted[:2]):
            found["segments"] = [each for each in found["segments"] if each["segment_pool_id"] == wanted[:2]]
        return found

    def allocate(self, size: int, stream: int = 0) -> int:
        """Take memory that belongs to no tensor, and return its address."""
        allocation = self._device.take_raw(size)
        assert allocation.block is not None
        self._raw[allocation.block.address] = allocation
        return allocation.block.address

    def delete(self, address: int) -> None:
        self._device.recorder.give(self._raw.pop(address))

    def synchronize(self, *_: object) -> None:
        self._device.check_not_capturing()
        with self._device.recorder.exclusive():
            self._allocator.synchronize()

    def empty_cache(self, *_: object) -> None:
        with self._device.recorder.exclusive():
            self._allocator.empty_cache()


def _install_compiled_memory(device: VirtualDevice, allocator: CachingAllocator) -> None:
    memory = _Memory(device, allocator)
    _install_labels()
    assign(
        torch._C,
        _cuda_synchronize=memory.synchronize,
        _cuda_memoryStats=memory.stats,
        _cuda_cudaCachingAllocator_raw_alloc=memory.allocate,
        _cuda_cudaCachingAllocator_raw_delete=memory.delete,
        _cuda_cudaCachingAllocator_enable=lambda value: None,
        _cuda_emptyCache=memory.empty_cache,
        _cuda_resetPeakMemoryStats=lambda index: device.reset_peak_stats(),
        _cuda_resetAccumulatedMemoryStats=lambda index: allocator.reset_accumulated_stats(),
        _cuda_setMemoryFraction=lambda fraction, index: allocator.set_memory_fraction(fraction),
        _cuda_getMemoryFraction=lambda index: allocator.memory_fraction,
        _cuda_memorySnapshot=memory.snapshot,
        _cuda_record_memory_history=lambda *args, **kwargs: None,
        _cuda_record_memory_history_legacy=lambda *args, **kwargs: None,
        _cuda_hostMemoryStats=lambda *args: {},
        _cuda_resetPeakHostMemoryStats=lambda *args: None,
        _cuda_resetAccumulatedHostMemoryStats=lambda *args: None,
        _cuda_getAllocatorBackend=lambda: "native",
        _cuda_cudaCachingAllocator_is_enabled=lambda: True,
        _cuda_clearCublasWorkspaces=device.clear_workspaces,
        _cuda_getCurrentRawStream=lambda index: device.current_stream,
        _accelerator_isAllocatorInitialized=lambda: True,
        _accelerator_emptyCache=memory.empty_cache,
        _accelerator_emptyHostCache=lambda: None,
        _accelerator_getDeviceStats=memory.stats,
        _accelerator_resetAccumulatedStats=lambda index: allocator.reset_accumulated_stats(),
        _accelerator_resetPeakStats=lambda index: device.reset_peak_stats(),
        _accelerator_getMemoryInfo=lambda index: allocator.mem_get_info(),
        _accelerator_synchronizeDevice=memory.synchronize,
    )


def _install_labels() -> None:
    """Keep the label that a thread gives its requests from torch 2.15; snapshots are without them."""
    labels = threading.local()
    assign(
        torch._C,
        _cuda_memoryMetadataSupported=lambda: True,
        _cuda_setMemoryMetadata=lambda label: setattr(labels, "now", label),
        _cuda_getMemoryMetadata=lambda: getattr(labels, "now", ""),
        _cuda_annotateMemory=lambda address, label: None,
    )
