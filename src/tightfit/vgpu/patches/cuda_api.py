"""`torch.cuda` on the virtual GPU: what its Python half asks of its compiled half, and what a script asks of both."""

import contextlib
import itertools
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from tightfit.allocator.caching import CachingAllocator
from tightfit.gpus import GPU
from tightfit.kernels.card import max_threads_per_sm
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.snapshot import Snapshot, snapshot_of

_SHARED_MEMORY_PER_BLOCK = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""KiB that a kernel can ask for, from the CUDA programming guide's table of compute capabilities."""


def driver_name(name: str) -> str:
    """A card's name as its driver gives it, without the memory size that tells two cards of a name apart.

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


class VirtualStream:
    """A stream or an event of the virtual card: work on it is done at once."""

    _numbers = itertools.count(1)

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.stream_id = kwargs["stream_id"] if "stream_id" in kwargs else next(self._numbers)
        self.cuda_stream = self.stream_id
        self.device_index, self.device_type, self.priority = 0, 1, priority
        self.device = torch.device("cuda", 0)

    def wait_event(self, event: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return VirtualEvent() if event is None else event

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VirtualStream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)

    def __enter__(self) -> "VirtualStream":
        self._context = torch.cuda.stream(self)  # type: ignore[arg-type]
        self._context.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


class VirtualEvent:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, **kwargs: Any) -> None:
        self.device = torch.device("cuda", 0)

    def record(self, stream: object = None) -> None: ...
    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        """Milliseconds; nothing was computed, so no time passed."""
        return 1e-3


_RealGenerator = torch.Generator


class VirtualGenerator(_RealGenerator):
    """A generator that a script made for the device: real numbers, which no kernel uses."""

    _device: torch.device

    def __new__(cls, device: Any = "cpu") -> "VirtualGenerator":
        made: VirtualGenerator = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        made._device = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._device


def install(device: VirtualDevice, gpu: GPU, count: int = 1) -> None:
    """Answer for `count` cards of this kind; this process uses the first, or the one of its local rank."""
    allocator = device.recorder.allocator
    _install_compiled_half(device, allocator, gpu, count)
    cuda: Any = torch.cuda
    cuda._initialized = True
    cuda._lazy_init = cuda.init = lambda: None
    cuda._lazy_call = lambda call, **kwargs: call()
    cuda._queued_calls = []
    cuda._is_compiled = lambda: True
    cuda.is_available = lambda: True
    for name in ("_exchange_device", "_maybe_exchange_device"):  # a function each: Dynamo tells them apart
        setattr(cuda, name, lambda index: 0)
    cuda.set_device = lambda device: None
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: count
    cuda._device_count_nvml = lambda: count
    cuda.is_bf16_supported = lambda including_emulation=True: including_emulation or gpu.capability >= (8, 0)
    cuda.is_tf32_supported = lambda: gpu.capability >= (8, 0)
    card = properties(gpu, allocator.total_bytes)
    cuda.get_device_properties = lambda device=None: card
    cuda._get_device_properties = lambda device: card
    cuda.get_device_capability = lambda device=None: gpu.capability
    cuda.get_device_name = lambda device=None: card.name
    cuda.get_arch_list = lambda: [f"sm_{gpu.capability[0]}{gpu.capability[1]}"]
    cuda.can_device_access_peer = lambda device, peer: True
    cuda.cudart = lambda: SimpleNamespace(
        cudaMemGetInfo=lambda index: allocator.mem_get_info(),
        cudaError=SimpleNamespace(success=0),
        cudaProfilerStart=lambda: 0,
        cudaProfilerStop=lambda: 0,
        cudaHostRegister=lambda *args: 0,
        cudaHostUnregister=lambda *args: 0,
        cudaGetErrorString=lambda code: "no error",
    )
    for name in ("utilization", "memory_usage", "temperature", "power_draw", "clock_rate"):
        setattr(cuda, name, lambda device=None: 0)
    cuda.device_memory_used = lambda device=None: allocator.total_bytes - allocator.mem_get_info()[0]
    cuda.list_gpu_processes = lambda device=None: "GPU:0\nno processes are running"
    _install_streams(device)
    _install_random()
    torch.backends.cuda.is_built = lambda: True
    torch.backends.cudnn.is_available = lambda: True
    torch.backends.cudnn.version = lambda: 91002
    if torch.version.cuda is None:
        torch.version.cuda = "13.0"


def _install_compiled_half(device: VirtualDevice, allocator: CachingAllocator, gpu: GPU, count: int) -> None:
    def memory_stats(index: int) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for key, value in allocator.memory_stats().items():
            *path, last = key.split(".")
            place = nested
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        return nested

    def snapshot(*_: Any) -> Snapshot:
        with device.recorder.exclusive():
            return snapshot_of(device.recorder)

    def synchronize(*_: Any) -> None:
        with device.recorder.exclusive():
            allocator.synchronize()

    def empty_cache(*_: Any) -> None:
        with device.recorder.exclusive():
            allocator.empty_cache()

    answers: dict[str, Any] = {
        "_cuda_getDeviceCount": lambda: count,
        "_cuda_getDevice": lambda: 0,
        "_cuda_setDevice": lambda index: None,
        "_cuda_exchangeDevice": lambda index: 0,
        "_cuda_maybeExchangeDevice": lambda index: 0,
        "_cuda_init": lambda: None,
        "_cuda_synchronize": synchronize,
        "_cuda_memoryStats": memory_stats,
        "_cuda_emptyCache": empty_cache,
        "_cuda_resetPeakMemoryStats": lambda index: device.reset_peak_stats(),
        "_cuda_resetAccumulatedMemoryStats": lambda index: allocator.reset_accumulated_stats(),
        "_cuda_setMemoryFraction": lambda fraction, index: allocator.set_memory_fraction(fraction),
        "_cuda_getMemoryFraction": lambda index: allocator.memory_fraction,
        "_cuda_memorySnapshot": snapshot,
        "_cuda_record_memory_history": lambda *args, **kwargs: None,
        "_cuda_record_memory_history_legacy": lambda *args, **kwargs: None,
        "_cuda_hostMemoryStats": lambda *args: {},
        "_cuda_resetPeakHostMemoryStats": lambda *args: None,
        "_cuda_resetAccumulatedHostMemoryStats": lambda *args: None,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_cudaCachingAllocator_is_enabled": lambda: True,
        "_cuda_getArchFlags": lambda: f"sm_{gpu.capability[0]}{gpu.capability[1]}",
        "_cuda_ipc_collect": lambda: None,
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_cuda_get_sync_debug_mode": lambda: 0,
        "_cuda_set_sync_debug_mode": lambda mode: None,
        "_cuda_getCurrentBlasHandle": lambda: 0,
        "_cuda_clearCublasWorkspaces": device.clear_workspaces,
        "_cuda_getCurrentRawStream": lambda index: device.current_stream,
        "_get_accelerator": lambda check=None: torch.device("cuda"),
        "_accelerator_isAllocatorInitialized": lambda: True,
        "_accelerator_emptyCache": empty_cache,
        "_accelerator_getDeviceStats": memory_stats,
        "_accelerator_resetAccumulatedStats": lambda index: allocator.reset_accumulated_stats(),
        "_accelerator_resetPeakStats": lambda index: device.reset_peak_stats(),
        "_accelerator_getMemoryInfo": lambda index: allocator.mem_get_info(),
        "_accelerator_synchronizeDevice": synchronize,
    }
    for name, answer in answers.items():
        setattr(torch._C, name, answer)
    compiled_half: Any = torch._C
    if not hasattr(compiled_half, "_cuda_CUDAAllocator_AllocatorState"):  # imported where torch.cuda is there
        compiled_half._cuda_CUDAAllocator_AllocatorState = type("AllocatorState", (), {})
        compiled_half._set_cached_tensors_enabled = lambda enabled: None


def _install_streams(device: VirtualDevice) -> None:
    cuda: Any = torch.cuda
    default = VirtualStream(stream_id=0)

    def current_stream(where: Any = None) -> VirtualStream:
        return getattr(device.stream, "now", default)

    def set_stream(stream: VirtualStream | None) -> None:
        if stream is not None:
            device.stream.now, device.stream.number = stream, stream.stream_id

    @contextlib.contextmanager
    def on_stream(stream: VirtualStream | None) -> Iterator[VirtualStream | None]:
        before = current_stream()
        set_stream(stream)
        try:
            yield stream
        finally:
            set_stream(before)

    cuda.Stream, cuda.Event, cuda.ExternalStream = VirtualStream, VirtualEvent, VirtualStream
    cuda.streams.Stream, cuda.streams.Event = VirtualStream, VirtualEvent
    cuda.current_stream, cuda.set_stream, cuda.default_stream = current_stream, set_stream, lambda where=None: default
    cuda.stream = on_stream
    # The compiled ones ask the device guard, whose answer is not initialized memory: "Unknown device: 96".
    # Functions of their own: Dynamo refuses one function under two names.
    accelerator: Any = torch.accelerator
    accelerator.current_stream = lambda where=None, /: current_stream(where)
    accelerator.set_stream = lambda stream, /: set_stream(stream)
    cuda.is_current_stream_capturing = lambda: False


def _install_random() -> None:
    states: dict[str, torch.Tensor] = {}
    cuda: Any = torch.cuda

    def get_state(device: Any = "cuda") -> torch.Tensor:
        return states.get("now", torch.zeros(16, dtype=torch.uint8)).clone()

    def set_state(state: torch.Tensor, device: Any = "cuda") -> None:
        states["now"] = state.clone()

    seed = SimpleNamespace(value=0)

    def manual_seed(value: int) -> None:
        seed.value = int(value)

    answers = {
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "get_rng_state_all": lambda: [get_state()],
        "set_rng_state_all": lambda all_states: set_state(next(iter(all_states), torch.zeros(16, dtype=torch.uint8))),
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "seed": lambda: None,
        "seed_all": lambda: None,
        "initial_seed": lambda: seed.value,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
        setattr(cuda.random, name, answer)
    torch.Generator = VirtualGenerator  # type: ignore[misc]
