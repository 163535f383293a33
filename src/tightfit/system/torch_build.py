"""The installed torch: its version, the hardware it was built for, and its devices."""

import ast
import importlib.util
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

SUPPORTED = ((2, 11), (2, 15))
"""The oldest and the newest torch that tightfit is tested with, as in its dependencies."""


@dataclass(frozen=True, kw_only=True)
class TorchDevice:
    """A CUDA or ROCm device, in torch's own order."""

    name: str
    capability: tuple[int, int]
    sm_count: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """The installed torch."""

    version: str
    cuda: tuple[int, int] | None = None
    """CUDA of its build."""
    hip: str | None = None
    """ROCm of its build."""
    mps: bool = False
    """True if it can use Apple's GPU."""
    capabilities: tuple[tuple[int, int], ...] = ()
    """Compute capabilities with machine code in it; empty if it does not report them."""
    newest_portable: tuple[int, int] | None = None
    """Capability of the portable code (PTX), which newer cards translate; None without such code."""
    devices: tuple[TorchDevice, ...] = ()
    complaint: str = ""
    """torch's warning when it listed its devices."""

    @property
    def release(self) -> tuple[int, int]:
        """
        >>> TorchBuild(version="2.13.0+cu130").release
        (2, 13)
        """
        major, minor = self.version.split(".")[:2]
        return int(major), int(re.sub(r"\D.*", "", minor) or 0)

    def serves(self, capability: tuple[int, int]) -> bool | None:
        """Return True if it has code for a card of this capability: same major version, not newer; None if unknown.

        >>> TorchBuild(version="2.13", capabilities=((7, 5), (8, 0), (9, 0))).serves((8, 6))
        True
        >>> TorchBuild(version="2.13", capabilities=((7, 5), (8, 0), (9, 0))).serves((7, 0))
        False
        """
        if not self.capabilities:
            return None
        portable = self.newest_portable is not None and capability >= self.newest_portable
        return portable or any(own[0] == capability[0] and own <= capability for own in self.capabilities)


def read_torch() -> TorchBuild | None:
    """Read the installed torch, importing it only if it may find a GPU; None if there is none."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    stated = _assigned(Path(found.origin).with_name("version.py"))
    build = TorchBuild(version=stated["__version__"] or "", cuda=_version(stated.get("cuda")), hip=stated.get("hip"))
    if not (build.cuda or build.hip or sys.platform == "darwin"):
        return build
    try:
        return _with_devices(build)
    except ImportError:
        return None


def _assigned(file: Path) -> dict[str, str | None]:
    """Return the texts that a module of constants assigns."""
    values: dict[str, str | None] = {}
    for line in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(line, ast.Assign | ast.AnnAssign) and isinstance(line.value, ast.Constant):
            name = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
            if isinstance(name, ast.Name) and isinstance(line.value.value, str | None):
                values[name.id] = line.value.value
    return values


def _with_devices(build: TorchBuild) -> TorchBuild:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        found = tuple(_device(index) for index in devices)
        # The flags of the build, even where no device is seen, for which get_arch_list gives nothing.
        flags = torch._C._cuda_getArchFlags() if hasattr(torch._C, "_cuda_getArchFlags") else None
    arches = (flags or "").split()
    portable = [_capability(arch) for arch in arches if arch.startswith("compute_")]
    return replace(
        build,
        mps=torch.backends.mps.is_available(),
        capabilities=tuple(_capability(arch) for arch in arches if arch.startswith("sm_")),
        newest_portable=max(portable, default=None),
        devices=found,
        complaint=str(caught[0].message).partition("\n")[0] if caught else "",
    )


def _device(index: int) -> TorchDevice:
    import torch

    found = torch.cuda.get_device_properties(index)
    return TorchDevice(
        name=found.name,
        capability=(found.major, found.minor),
        sm_count=found.multi_processor_count,
        total_bytes=found.total_memory,
    )


def _version(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def dotted(version: tuple[int, int]) -> str:
    """
    >>> dotted((8, 6))
    '8.6'
    """
    return f"{version[0]}.{version[1]}"


def _capability(arch: str) -> tuple[int, int]:
    """
    >>> _capability("sm_90a"), _capability("compute_120")
    ((9, 0), (12, 0))
    """
    digits = re.sub(r"\D", "", arch)
    return int(digits[:-1]), int(digits[-1])


def hidden_by_environment(environ: Mapping[str, str]) -> str | None:
    """The value of CUDA_VISIBLE_DEVICES if it hides every card."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    return value if value is not None and value.strip() in ("", "-1", "none", "NoDevFiles") else None
