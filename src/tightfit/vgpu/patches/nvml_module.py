"""`pynvml` and `nvidia-smi` on the virtual GPU: both tell of the virtual card instead of looking for a driver."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from tightfit.allocator.caching import CachingAllocator
from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.on_import import after_import
from tightfit.vgpu.process_starts import before_start

_DRIVER, _CUDA = "580.95.05", 13000
"""A driver that torch's wheels for CUDA 13 run with."""
_CARD = "TIGHTFIT_VIRTUAL_CARD"
"""Environment variable in which a child process finds the card."""
_PROGRAMS = str(Path(__file__).with_name("bin"))
_MODULE = "pynvml"


def install(device: VirtualDevice, card: SimpleNamespace) -> None:
    """Patch this process for good."""
    answers = _answers(device, card)
    after_import(_MODULE, lambda module: assign(module, **answers))
    _install_program(device, card)


def _answers(device: VirtualDevice, card: SimpleNamespace) -> dict[str, object]:
    """Return NVML's functions by name."""
    allocator = device.recorder.allocator

    def memory(handle: int, version: object = None) -> SimpleNamespace:
        free, total = allocator.mem_get_info()
        return SimpleNamespace(total=total, free=free, used=total - free, reserved=0, version=version)

    def by_index(index: int) -> int:
        if not 0 <= index < device.count:
            error: Callable[[int], Exception] = sys.modules[_MODULE].__dict__["NVMLError"]
            raise error(2)  # NVML_ERROR_INVALID_ARGUMENT
        return index

    def processes(handle: int) -> list[SimpleNamespace]:
        used = allocator.context_bytes + allocator.reserved_bytes
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=used, gpuInstanceId=0, computeInstanceId=0)]

    fixed: dict[str, object] = {
        "SystemGetDriverVersion": _DRIVER,
        "SystemGetNVMLVersion": f"13.{_DRIVER}",
        "SystemGetCudaDriverVersion": _CUDA,
        "SystemGetCudaDriverVersion_v2": _CUDA,
        "DeviceGetName": card.name,
        "DeviceGetUUID": f"GPU-{card.uuid}",
        "DeviceGetUtilizationRates": SimpleNamespace(gpu=0, memory=0),
        "DeviceGetTemperature": 40,
        "DeviceGetTemperatureV": 40,
        "DeviceGetPowerUsage": 30_000,
        "DeviceGetEnforcedPowerLimit": 350_000,
        "DeviceGetPowerManagementLimit": 350_000,
        "DeviceGetTotalEnergyConsumption": 0,
        "DeviceGetFanSpeed": 0,
        "DeviceGetClockInfo": card.clock_rate // 1000,
        "DeviceGetMaxClockInfo": card.clock_rate // 1000,
        "DeviceGetMinorNumber": 0,
        "DeviceGetComputeMode": 0,
        "DeviceGetPersistenceMode": 1,
        "DeviceGetGraphicsRunningProcesses": [],
        "DeviceGetPciInfo": SimpleNamespace(busId="00000000:01:00.0", domain=0, bus=1, device=0),
    }
    answers: dict[str, object] = {f"nvml{name}": _always(value) for name, value in fixed.items()}
    answers.update(
        nvmlInit=lambda: None,
        nvmlInitWithFlags=lambda flags: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: device.count,
        nvmlDeviceGetHandleByIndex=by_index,
        nvmlDeviceGetHandleByUUID=lambda uuid: 0,
        nvmlDeviceGetHandleByPciBusId=lambda pciBusId: 0,
        nvmlDeviceGetIndex=lambda handle: handle,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetCudaComputeCapability=lambda handle: device.answers.ask(lambda card: card.capability),
        nvmlDeviceGetComputeRunningProcesses=processes,
        nvmlDeviceGetComputeRunningProcesses_v2=processes,
        nvmlDeviceGetComputeRunningProcesses_v3=processes,
    )
    return answers


def _always(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


def _install_program(device: VirtualDevice, card: SimpleNamespace) -> None:
    """Put a program named nvidia-smi first in the path, and the card into the environment of children."""
    os.environ["PATH"] = os.pathsep.join([_PROGRAMS, os.environ.get("PATH", os.defpath)])
    os.environ["TIGHTFIT_PYTHON"] = sys.executable
    allocator = device.recorder.allocator

    def tell(command: Sequence[object]) -> None:
        # Only nvidia-smi shows them to the program, which may then decide by them. A query of the name does not.
        words = str(command)
        is_shown = "nvidia-smi" in words and ("--query" not in words or "memory" in words)
        free, total = allocator.mem_get_info() if is_shown else CachingAllocator.mem_get_info(allocator)
        told = {
            "name": card.name,
            "uuid": f"GPU-{card.uuid}",
            "compute_cap": f"{card.major}.{card.minor}",
            "driver": _DRIVER,
            "cuda": f"{_CUDA // 1000}.{_CUDA % 1000 // 10}",
            "count": device.count,
            "total": total >> 20,
            "free": free >> 20,
            "used": (total - free) >> 20,
            "pid": os.getpid(),
            "process": os.path.basename(sys.executable),
        }
        with contextlib.suppress(OSError, ValueError):
            os.environ[_CARD] = json.dumps(told)

    before_start(tell)
