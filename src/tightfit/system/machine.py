"""The facts that doctor checks, read once: cards, torch, host memory, compilers, disks, environment."""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tightfit.system.memory_limits import HostMemory, host_memory
from tightfit.system.nvml import Cards, is_wsl, read_cards
from tightfit.system.torch_build import TorchBuild, read_torch

_VENDORS = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
"""PCI vendor ids of cards that compute."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """A file system."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Compilers:
    """Tools that torch.compile needs besides torch."""

    c: str | None
    """The C compiler that builds triton's launchers; None if there is none."""
    cxx: str | None
    """The C++ compiler for code on the processor."""
    triton: str | None
    """Its version."""
    python_headers: bool
    """True if Python.h exists, which the launchers include."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The facts; the checks are functions of this."""

    cards: Cards
    torch: TorchBuild | None
    host: HostMemory
    compilers: Compilers
    shm: Space | None
    """/dev/shm, through which processes share memory; None where there is none."""
    vendors: frozenset[str]
    """Makers of the graphics cards on the bus: nvidia, amd, intel, apple."""
    environ: Mapping[str, str]
    platform: str
    """sys.platform."""
    wsl: bool


def read_machine() -> Machine:
    """Read every fact; NVML first, before torch starts CUDA and puts this process on the card."""
    cards = read_cards()
    return Machine(
        cards=cards,
        torch=read_torch(),
        host=host_memory(),
        compilers=_compilers(os.environ),
        shm=space(Path("/dev/shm")),
        vendors=gpu_vendors(),
        environ=dict(os.environ),
        platform=sys.platform,
        wsl=is_wsl(),
    )


def space(folder: Path) -> Space | None:
    """The file system of `folder`, or of its nearest parent if it does not exist."""
    for existing in (folder, *folder.absolute().parents):
        if existing.exists():
            if folder == Path("/dev/shm") and existing != folder:
                return None
            usage = shutil.disk_usage(existing)
            return Space(total_bytes=usage.total, free_bytes=usage.free)
    return None


def gpu_vendors(root: Path = Path("/")) -> frozenset[str]:
    """Makers of displays and 3D controllers (class 0x03) on the PCI bus, also where no driver is loaded."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return frozenset({"apple"})
    found = set()
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            if (device / "class").read_text().startswith("0x03"):
                found.add(_VENDORS.get((device / "vendor").read_text().strip(), ""))
        except OSError:
            continue
    return frozenset(found - {""})


def _compilers(environ: Mapping[str, str]) -> Compilers:
    windows = sys.platform == "win32"
    try:
        triton = metadata.version("triton-windows" if windows else "triton")
    except metadata.PackageNotFoundError:
        triton = None
    if triton and importlib.util.find_spec("triton") is None:
        triton = None
    return Compilers(
        c=_first(environ.get("CC"), *(("cl",) if windows else ("gcc", "clang", "cc"))),
        cxx=_first(environ.get("CXX"), *(("cl",) if windows else ("g++", "clang++", "c++"))),
        triton=triton,
        python_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
    )


def _first(*names: str | None) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name))), None)
