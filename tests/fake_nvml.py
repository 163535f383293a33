"""NVML's answers on several machines, given by a module in place of `pynvml`; everything above it is the real thing.

The answers follow nvidia-smi and NVML's documentation: totals and the driver's share as on such cards, "Not Supported"
where such a card says so. A machine is data; `install` puts it where `import pynvml` finds it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml as real
import pytest

MIB = 2**20


@dataclass
class Process:
    pid: int
    name: str | None
    mib: int | None
    graphics: bool = False


@dataclass
class Part:
    name: str
    uuid: str
    total_mib: int
    used_mib: int
    sms: int


@dataclass
class Card:
    name: str
    total_mib: int
    reserved_mib: int | None
    """None: a driver that knows only the first form of the question."""
    capability: tuple[int, int]
    processes: list[Process] = field(default_factory=list)
    processes_supported: bool = True
    other_used_mib: int = 0
    """In use by programs that are not listed."""
    untold_reserve_mib: int = 0
    """The driver's reserve where `reserved_mib` is None: a part of `used` in the first form, told apart nowhere."""
    ecc: bool | None = None
    ecc_errors: int = 0
    mig: bool | None = None
    parts: list[Part] = field(default_factory=list)
    temperature: int | None = 40
    utilisation: int | None = 0


@dataclass
class FakeMachine:
    driver: str = "580.95.05"
    cuda: int = 13000
    cards: list[Card] = field(default_factory=list)
    init_error: int | None = None
    wsl: bool = False
    asked: int = 0
    """How many times NVML was started."""


def rtx3060() -> FakeMachine:
    """A desktop: Xorg uses 600 MiB."""
    xorg = Process(1432, "/usr/lib/xorg/Xorg", 600, graphics=True)
    card = Card("NVIDIA GeForce RTX 3060", 12288, 318, (8, 6), [xorg], temperature=41, utilisation=3)
    return FakeMachine(driver="580.95.05", cuda=13000, cards=[card])


def two_a100_mig() -> FakeMachine:
    """Two A100 40 GB: the first divided in two, the second with MIG on and no instance."""
    parts = [
        Part("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "MIG-4f2c6f0a-0000-5000-8000-000000000001", 19968, 37, 42),
        Part("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "MIG-4f2c6f0a-0000-5000-8000-000000000002", 19968, 12000, 42),
    ]
    divided = Card("NVIDIA A100-SXM4-40GB", 40960, 524, (8, 0), ecc=True, mig=True, parts=parts, utilisation=None)
    empty = Card("NVIDIA A100-SXM4-40GB", 40960, 524, (8, 0), ecc=True, mig=True, utilisation=None)
    return FakeMachine(driver="535.183.01", cuda=12020, cards=[divided, empty])


def t4() -> FakeMachine:
    """A cloud machine; the old driver knows only CUDA 11.4 and the first form of the memory question."""
    python = Process(4242, "/opt/conda/bin/python3.11", 5120)
    return FakeMachine(
        driver="470.256.02",
        cuda=11040,
        cards=[Card("Tesla T4", 15109, None, (7, 5), [python], ecc=True, temperature=67, utilisation=98)],
    )


def wsl_laptop() -> FakeMachine:
    """Linux inside Windows: there is a process, but what it uses is kept by Windows."""
    shown = Process(31, None, None)
    card = Card("NVIDIA GeForce RTX 4060 Laptop GPU", 8188, 249, (8, 9), [shown], other_used_mib=1300)
    return FakeMachine(driver="581.29", cuda=13000, cards=[card], wsl=True)


def mismatch() -> FakeMachine:
    """A driver that was updated under a running system."""
    return FakeMachine(init_error=real.NVML_ERROR_LIB_RM_VERSION_MISMATCH)


def no_driver() -> FakeMachine:
    return FakeMachine(init_error=real.NVML_ERROR_LIBRARY_NOT_FOUND)


MACHINES = {
    "rtx3060": rtx3060,
    "two_a100_mig": two_a100_mig,
    "t4": t4,
    "wsl_laptop": wsl_laptop,
    "mismatch": mismatch,
    "no_driver": no_driver,
}


def install(monkeypatch: pytest.MonkeyPatch, machine: FakeMachine) -> FakeMachine:
    """`import pynvml` now reaches this machine."""
    monkeypatch.setitem(sys.modules, "pynvml", module(machine))
    return machine


def module(machine: FakeMachine) -> ModuleType:
    """A module with pynvml's constants and errors, and this machine's answers."""
    fake = ModuleType("pynvml")
    for name, value in vars(real).items():
        if name.startswith(("NVML_", "NVMLError", "NVMLLibrary", "nvmlMemory_v2")):
            setattr(fake, name, value)
    for name, answer in _answers(machine).items():
        setattr(fake, name, answer)
    return fake


def _error(code: int) -> Exception:
    error: Exception = real.NVMLError(code)
    return error


def _required(value: Any) -> Any:
    if value is None:
        raise _error(real.NVML_ERROR_NOT_SUPPORTED)
    return value


def _answers(machine: FakeMachine) -> dict[str, Any]:
    names = {process.pid: process.name for card in machine.cards for process in card.processes}

    def init() -> None:
        machine.asked += 1
        if machine.init_error is not None:
            raise _error(machine.init_error)

    def memory(handle: Card | Part, version: int | None = None) -> SimpleNamespace:
        if isinstance(handle, Part):
            total, used, reserved = handle.total_mib, handle.used_mib, 0
        else:
            if version and handle.reserved_mib is None:
                raise _error(real.NVML_ERROR_FUNCTION_NOT_FOUND)
            listed = sum({process.pid: process.mib or 0 for process in handle.processes}.values())
            total = handle.total_mib
            reserved = handle.untold_reserve_mib if handle.reserved_mib is None else handle.reserved_mib
            used = listed + handle.other_used_mib + sum(part.used_mib for part in handle.parts)
        free = total - used - reserved
        shown_used = used if version else used + reserved
        return SimpleNamespace(total=total * MIB, free=free * MIB, used=shown_used * MIB, reserved=reserved * MIB)

    def running(handle: Card | Part, graphics: bool) -> list[SimpleNamespace]:
        if isinstance(handle, Part):
            return []
        if not handle.processes_supported:
            raise _error(real.NVML_ERROR_NOT_SUPPORTED)
        return [
            SimpleNamespace(pid=process.pid, usedGpuMemory=None if process.mib is None else process.mib * MIB)
            for process in handle.processes
            if process.graphics == graphics
        ]

    def newest(graphics: bool, error: Callable[[], Exception]) -> Any:
        def ask(handle: Card | Part) -> list[SimpleNamespace]:
            if isinstance(handle, Card) and handle.reserved_mib is None:
                raise error()  # as drivers before 510
            return running(handle, graphics)

        return ask

    def not_found() -> Exception:
        return _error(real.NVML_ERROR_FUNCTION_NOT_FOUND)

    def part(handle: Card, number: int) -> Part:
        if number >= len(handle.parts):
            raise _error(real.NVML_ERROR_NOT_FOUND)
        return handle.parts[number]

    def utilisation(handle: Card) -> SimpleNamespace:
        return SimpleNamespace(gpu=_required(handle.utilisation), memory=0)

    return {
        "nvmlInit": init,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(machine.cards),
        "nvmlSystemGetDriverVersion": lambda: machine.driver,
        "nvmlSystemGetCudaDriverVersion": lambda: machine.cuda,
        "nvmlSystemGetProcessName": lambda pid: names.get(pid) or _required(None),
        "nvmlDeviceGetHandleByIndex": lambda index: machine.cards[index],
        "nvmlDeviceGetName": lambda handle: handle.name,
        "nvmlDeviceGetUUID": lambda handle: getattr(handle, "uuid", f"GPU-{handle.name}-{id(handle)}"),
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: handle.capability,
        "nvmlDeviceGetCurrentEccMode": lambda handle: int(_required(handle.ecc)),
        "nvmlDeviceGetTotalEccErrors": lambda handle, *_: handle.ecc_errors if handle.ecc else _required(None),
        "nvmlDeviceGetMigMode": lambda handle: [int(_required(handle.mig)), int(_required(handle.mig))],
        "nvmlDeviceGetMaxMigDeviceCount": lambda handle: 7,
        "nvmlDeviceGetMigDeviceHandleByIndex": part,
        "nvmlDeviceGetAttributes": lambda handle: SimpleNamespace(multiprocessorCount=handle.sms),
        "nvmlDeviceGetTemperature": lambda handle, sensor: _required(handle.temperature),
        "nvmlDeviceGetUtilizationRates": utilisation,
        "nvmlDeviceGetComputeRunningProcesses": newest(False, real.NVMLLibraryMismatchError),
        "nvmlDeviceGetComputeRunningProcesses_v3": newest(False, not_found),
        "nvmlDeviceGetComputeRunningProcesses_v2": lambda handle: running(handle, False),
        "nvmlDeviceGetGraphicsRunningProcesses": newest(True, real.NVMLLibraryMismatchError),
        "nvmlDeviceGetGraphicsRunningProcesses_v3": newest(True, not_found),
        "nvmlDeviceGetGraphicsRunningProcesses_v2": lambda handle: running(handle, True),
    }
