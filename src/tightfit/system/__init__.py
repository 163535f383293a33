"""The machine itself: its memory, its cards, and whether they are fit for a run."""

from tightfit.system.memory_limits import HostMemory, Limit, host_memory, own_bytes
from tightfit.system.nvml import Cards, GpuMemory, GpuProcess, gpu_memory, read_cards, spills_to_host

__all__ = [
    "Cards", "GpuMemory", "GpuProcess", "HostMemory", "Limit", "gpu_memory", "host_memory", "own_bytes", "read_cards",
    "spills_to_host",
]  # fmt: skip
