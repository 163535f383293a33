"""What a script asks of its card: its name and versions, and the memory that it sees used."""

import os
import platform
import re
import subprocess
from typing import Any

import torch

from benchmarks.gpu.processes import ROOT
from tightfit.config.sizes import parse_bytes
from tightfit.errors import DeviceError

_FIGURES = {
    "tried_bytes": r"Tried to allocate ([\d.]+ \w+)",
    "total_bytes": r"total capacity of ([\d.]+ \w+)",
    "free_bytes": r"of which ([\d.]+ \w+) is free",
    "process_bytes": r"this process has ([\d.]+ \w+) memory in use",
    "allowed_bytes": r"([\d.]+ \w+) allowed",
    "allocated_bytes": r"Of the allocated memory ([\d.]+ \w+) is allocated",
    "unallocated_bytes": r"and ([\d.]+ \w+) is reserved by PyTorch but unallocated",
}
"""Of torch.OutOfMemoryError's text, torch 2.4 to 2.15."""


def require() -> None:
    """DeviceError unless there is a card, real or virtual."""
    if not torch.cuda.is_available():
        raise DeviceError("torch finds no CUDA device here; --dry of the program that starts this needs none")


def facts() -> dict[str, Any]:
    """The card and the versions that decide what a run takes; makes a CUDA context."""
    card = torch.cuda.get_device_properties(0)
    return {
        "gpu": card.name,
        "capability": f"{card.major}.{card.minor}",
        "sm_count": card.multi_processor_count,
        "total_bytes": card.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "driver": _driver(),
        "python": platform.python_version(),
    }


def device_used_bytes() -> tuple[int, str]:
    """Memory used on the card by everybody, and who says so: NVML, or else CUDA."""
    used = used_by_nvml()
    if used is not None:
        return used, "nvml"
    free, total = torch.cuda.mem_get_info(0)
    return total - free, "cuda"


def used_by_nvml() -> int | None:
    """Bytes used on the card by everybody; None without nvidia-ml-py, a driver or a real card.

    Not by torch.cuda.device_memory_used, which makes this process a user of the card.
    """
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    if not which:  # of a virtual card
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        by = pynvml.nvmlDeviceGetHandleByIndex if which.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        return int(pynvml.nvmlDeviceGetMemoryInfo(by(int(which) if which.isdigit() else which)).used)
    except pynvml.NVMLError:
        return None


def peaks() -> dict[str, int]:
    """Peaks of PyTorch's caching allocator since the process began, bytes, and how often it had to start over."""
    stats = torch.cuda.memory_stats()
    found = {f"{name}_bytes": stats[f"{name}_bytes.all.peak"] for name in ("requested", "allocated", "reserved")}
    return {**found, "retries": stats["num_alloc_retries"]}


def read_message(message: str) -> dict[str, int]:
    """The figures of an out-of-memory message, bytes, as far as its two decimals tell them."""
    found = {name: re.search(pattern, message) for name, pattern in _FIGURES.items()}
    return {name: parse_bytes(match[1].replace("bytes", "B")) for name, match in found.items() if match}


def revision() -> str:
    """The checkout's git revision, with a plus sign if files differ from it; empty without git."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except ImportError:
        return ""
    except pynvml.NVMLError:
        return ""
