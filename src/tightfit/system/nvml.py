"""Facts of every card from NVML, NVIDIA's management library: memory, the processes that use it, the card's state.

nvidia-ml-py reads NVML. Where it, the library or the driver is missing, there is a `Failure` and no card. A fact that
one card or driver does not report is None.
"""

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, NewType, Protocol, Self, TypeVar

import msgspec

from tightfit.wording import chosen_language
from tightfit.wording.system import words

T = TypeVar("T")
Handle = NewType("Handle", object)
"""NVML's opaque pointer to a card or a part of one."""
FailureKind = Literal["no_bindings", "no_library", "no_driver", "mismatch", "not_allowed", "lost", "other", "no_cards"]


class Failure(msgspec.Struct, frozen=True):
    """The reason for which NVML reports nothing."""

    kind: FailureKind
    detail: str = ""
    """NVML's own words."""

    def sentence(self, language: str = "en") -> str:
        return words(language)("nvml", self.kind, detail=self.detail)


@dataclass(frozen=True, kw_only=True)
class GpuProcess:
    """A process that has memory on a card."""

    pid: int
    name: str | None
    """The program's file name; None for a process that is not visible here, as outside this container."""
    used_bytes: int | None
    """None where the operating system does not report it (Windows, WSL)."""
    draws: bool = False
    """True for a process that only draws: the desktop, a browser."""


@dataclass(frozen=True, kw_only=True)
class MigInstance:
    """A part of a card that MIG divides; a process uses one of them."""

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    sm_count: int | None
    others: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """One card, now."""

    index: int
    """NVML's number, in order of the PCI bus; CUDA's order may differ, the uuid does not."""
    name: str
    uuid: str
    total_bytes: int
    """The total that nvidia-smi shows: CUDA's and `reserved_bytes` together."""
    free_bytes: int
    reserved_bytes: int | None
    """The driver's reserve; None if this driver does not report it."""
    own_bytes: int | None
    """Bytes of this process on the card; None if NVML does not report them."""
    others: tuple[GpuProcess, ...] | None
    """The other processes on the card, largest first; None if NVML does not report them."""
    capability: tuple[int, int] | None
    """Compute capability: major, minor."""
    ecc: bool | None
    """True with error correction on; None for a card without it."""
    ecc_errors: int | None
    """Errors since the driver was loaded that could not be corrected."""
    mig: bool | None
    instances: tuple[MigInstance, ...]
    temperature_c: int | None
    utilisation: float | None
    """Share of the last moments in which a kernel ran, 0 to 1."""
    spills_to_host: bool
    """True where an allocation beyond the card goes to slow host memory instead of failing (Windows, WSL)."""

    @property
    def used_bytes(self) -> int:
        """Bytes that are not free: other processes', this process's and the driver's reserve together."""
        return self.total_bytes - self.free_bytes

    @property
    def used_by_others_bytes(self) -> int | None:
        """Bytes that other processes hold, listed or not: never this process's, never the driver's reserve.

        A driver that does not report its reserve counts it as used; then the listed processes are added up.
        None if one of those has no figure.
        """
        if self.reserved_bytes is not None:
            return max(0, self.used_bytes - self.reserved_bytes - (self.own_bytes or 0))
        sizes = [None] if self.others is None else [process.used_bytes for process in self.others]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None


@dataclass(frozen=True, kw_only=True)
class Cards:
    """All cards that NVML reports, or its failure."""

    cards: tuple[GpuMemory, ...] = ()
    driver: str | None = None
    cuda_version: tuple[int, int] | None = None
    """The newest CUDA that the driver supports."""
    failure: Failure | None = None


def gpu_memory(index: int | str = 0) -> tuple[GpuMemory | None, str]:
    """The card with this NVML number or UUID, or None and a sentence with the reason."""
    found = read_cards()
    for card in found.cards:
        if index in (card.index, card.uuid):
            return card, ""
    if found.failure:
        return None, found.failure.sentence(chosen_language(None))
    return None, words(chosen_language(None))("nvml", "no_such_card", index=index, count=len(found.cards))


def read_cards() -> Cards:
    """Every card's state now; a missing NVML raises nothing. To read often, keep an `NvmlSession`."""
    with NvmlSession() as session:
        return session.read()


class NvmlSession:
    """NVML kept open: starting it can take longer than all its answers. `with NvmlSession() as nvml: nvml.read()`."""

    def __init__(self) -> None:
        self._nvml: ModuleType | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def read(self) -> Cards:
        """Every card's state now. After a failure the next call starts NVML anew."""
        try:
            pynvml = importlib.import_module("pynvml")  # no types, and optional
        except ImportError:
            return Cards(failure=Failure("no_bindings", "nvidia-ml-py"))
        try:
            if self._nvml is None:
                pynvml.nvmlInit()
                self._nvml = pynvml
            return _Reader(pynvml).all()
        except pynvml.NVMLError as error:  # no driver; or a card that fell off the bus while it was read
            self._end()
            return Cards(failure=_failure(pynvml, error))

    def _end(self) -> None:
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
            self._nvml = None


def _failure(nvml: ModuleType, error: Exception) -> Failure:
    kinds: dict[int, FailureKind] = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no_library",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "no_driver",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "mismatch",
        nvml.NVML_ERROR_NO_PERMISSION: "not_allowed",
        nvml.NVML_ERROR_GPU_IS_LOST: "lost",
        nvml.NVML_ERROR_RESET_REQUIRED: "lost",
    }
    return Failure(kinds.get(getattr(error, "value", -1), "other"), str(error))


class _Row(Protocol):
    """A process in NVML's list."""

    pid: int
    usedGpuMemory: int | None


class _Reader:
    """Questions to NVML between its init and shutdown."""

    def __init__(self, nvml: ModuleType) -> None:
        self.nvml = nvml
        self.spills = spills_to_host()

    def all(self) -> Cards:
        count = self.nvml.nvmlDeviceGetCount()
        cuda = self._ask(self.nvml.nvmlSystemGetCudaDriverVersion)
        return Cards(
            cards=tuple(self.card(index) for index in range(count)),
            driver=self._ask(self.nvml.nvmlSystemGetDriverVersion),
            cuda_version=(cuda // 1000, cuda % 1000 // 10) if cuda else None,
        )

    def card(self, index: int) -> GpuMemory:
        nvml, ask = self.nvml, self._ask
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        total, free, reserved = self._memory(handle)
        processes = self._processes(handle)
        mig = ask(lambda: bool(nvml.nvmlDeviceGetMigMode(handle)[0]))
        rates = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        return GpuMemory(
            index=index,
            name=_printable(ask(lambda: nvml.nvmlDeviceGetName(handle)) or "GPU"),
            uuid=ask(lambda: nvml.nvmlDeviceGetUUID(handle)) or "",
            total_bytes=total,
            free_bytes=free,
            reserved_bytes=reserved,
            own_bytes=_own_bytes(processes),
            others=_others(processes),
            capability=ask(lambda: tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))),
            ecc=ask(lambda: bool(nvml.nvmlDeviceGetCurrentEccMode(handle))),
            ecc_errors=ask(
                lambda: nvml.nvmlDeviceGetTotalEccErrors(
                    handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            ),
            mig=mig,
            instances=tuple(self._instances(handle)) if mig else (),
            temperature_c=ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            utilisation=rates.gpu / 100 if rates else None,
            spills_to_host=self.spills and not self._is_tcc(handle),
        )

    def _ask(self, question: Callable[[], T]) -> T | None:
        """An answer, or None where this card or driver has none (not supported, not allowed, too old)."""
        try:
            return question()
        except (self.nvml.NVMLError, UnicodeDecodeError):
            return None

    def _memory(self, handle: Handle) -> tuple[int, int, int | None]:
        """Total, free and reserved bytes. Drivers before 510 know only the call that does not report the reserve."""
        try:
            memory = self.nvml.nvmlDeviceGetMemoryInfo(handle, self.nvml.nvmlMemory_v2)
            return memory.total, memory.free, memory.reserved
        except self.nvml.NVMLError:
            memory = self.nvml.nvmlDeviceGetMemoryInfo(handle)
            return memory.total, memory.free, None

    def _processes(self, handle: Handle) -> dict[int, GpuProcess] | None:
        """Processes by pid: one that computes and draws is in both lists, with the same figure."""
        found: dict[int, GpuProcess] = {}
        asked = 0
        for kind in ("Compute", "Graphics"):
            rows = self._rows(kind, handle)
            if rows is None:
                continue
            asked += 1
            for row in rows:
                process = GpuProcess(
                    pid=row.pid, name=self._name(row.pid), used_bytes=row.usedGpuMemory, draws=kind == "Graphics"
                )
                found.setdefault(row.pid, process)
        return found if asked else None

    def _rows(self, kind: str, handle: Handle) -> list[_Row] | None:
        """NVML's list of processes. Drivers before 510 know only the second version of the call.

        Without a version pynvml raises an error that is no NVMLError.
        """
        for version in ("v3", "v2"):
            question = getattr(self.nvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}")
            rows: list[_Row] | None = self._ask(functools.partial(question, handle))
            if rows is not None:
                return rows
        return None

    def _name(self, pid: int) -> str | None:
        """The program's name from NVML, not from /proc: NVML's pids are the machine's, and a container has its own."""
        name = self._ask(lambda: self.nvml.nvmlSystemGetProcessName(pid))
        return _printable(name.replace("\\", "/").rpartition("/")[2]) if name else None

    def _instances(self, handle: Handle) -> Iterator[MigInstance]:
        nvml = self.nvml
        for number in range(self._ask(lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0):
            try:
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
                memory = nvml.nvmlDeviceGetMemoryInfo(part)
            except nvml.NVMLError:
                continue  # there is room for more instances than were made
            attributes = self._ask(functools.partial(nvml.nvmlDeviceGetAttributes, part))
            yield MigInstance(
                name=_printable(self._ask(functools.partial(nvml.nvmlDeviceGetName, part)) or f"MIG {number}"),
                uuid=self._ask(functools.partial(nvml.nvmlDeviceGetUUID, part)) or "",
                total_bytes=memory.total,
                free_bytes=memory.free,
                sm_count=attributes.multiprocessorCount if attributes else None,
                others=_others(self._processes(part)) or (),
            )

    def _is_tcc(self, handle: Handle) -> bool:
        """Return True for a card on Windows without the display driver's memory manager, which does not spill."""
        model = (
            self._ask(lambda: self.nvml.nvmlDeviceGetCurrentDriverModel(handle)) if sys.platform == "win32" else None
        )
        return model is not None and model != self.nvml.NVML_DRIVER_WDDM


def spills_to_host(root: Path = Path("/")) -> bool:
    """Return True where the driver pages GPU memory to the host: Windows, and Linux inside Windows (WSL).

    A run that does not fit becomes many times slower there, so memory beyond the card counts as out of memory.
    """
    return sys.platform == "win32" or is_wsl(root)


def is_wsl(root: Path = Path("/")) -> bool:
    try:
        return "microsoft" in (root / "proc/sys/kernel/osrelease").read_text().lower()
    except OSError:
        return False


def _own_bytes(processes: dict[int, GpuProcess] | None) -> int | None:
    if processes is None:
        return None
    own = processes.get(os.getpid())
    return own.used_bytes if own else 0


def _others(processes: dict[int, GpuProcess] | None) -> tuple[GpuProcess, ...] | None:
    if processes is None:
        return None
    others = [process for pid, process in processes.items() if pid != os.getpid()]
    return tuple(sorted(others, key=lambda process: (-(process.used_bytes or 0), process.pid)))


def _printable(text: str) -> str:
    """A program's name without control characters, which must not reach a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)[:100]
