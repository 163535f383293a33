"""Memory that a plan may take: free now, less a margin for the prediction's error."""

from dataclasses import dataclass

from tightfit.gpus import GPU, context_bytes
from tightfit.units import MIB
from tightfit.wording import say

DEVICE_MARGIN_SHARE, DEVICE_MARGIN_BYTES = 0.005, 64 * MIB
"""Measured on a real RTX 3060 (benchmarks/virtual): 24 of 25 runs within 0.41% of the prediction, and up to 20 MiB of a
library's workspace in doubt; and a desktop's programs move by tens of MiB."""
HOST_MARGIN_SHARE, HOST_MARGIN_BYTES = 0.03, 32 * MIB
"""Measured on the host (benchmarks/fit_host): predictions within 3% of the peak that the kernel counted."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Memory that a plan may take."""

    total_bytes: int
    """Bytes of the card, or of the tightest limit on the host."""
    used_by_others_bytes: int
    """Bytes that other processes hold."""
    context_bytes: int
    """Bytes of this process outside its tensors: the CUDA context, or Python and its libraries."""
    margin_bytes: int
    """Bytes left free because predictions err."""
    text: str
    """Source of the figures, for people."""
    reserved_bytes: int = 0
    """Addresses that this process holds and does not use, where the limit counts them."""
    nccl_bytes: int = 0
    """Bytes that NCCL takes at most where several cards train together."""

    @property
    def taken_bytes(self) -> int:
        """Bytes that no plan may take."""
        return (
            self.used_by_others_bytes + self.context_bytes + self.reserved_bytes + self.nccl_bytes + self.margin_bytes
        )

    @property
    def bytes(self) -> int:
        """Bytes left for the plan."""
        return max(0, self.total_bytes - self.taken_bytes)


def device_budget(gpu: GPU, *, total_bytes: int | None = None, used_by_others_bytes: int = 0) -> Budget:
    """Return the budget of a card: its planning size, or the total and the use that a driver reports."""
    total = total_bytes or gpu.planning_bytes
    context, why = context_bytes(gpu)
    margin = round(total * DEVICE_MARGIN_SHARE) + DEVICE_MARGIN_BYTES
    return Budget(
        total_bytes=total,
        used_by_others_bytes=used_by_others_bytes,
        context_bytes=context,
        margin_bytes=margin,
        text=why,
    )


def host_budget(limit_bytes: int, *, base_bytes: int, source: str, reserved_bytes: int = 0) -> Budget:
    """Return the budget of a process under a host limit; `base_bytes` is its memory without tensors."""
    margin = round(limit_bytes * HOST_MARGIN_SHARE) + HOST_MARGIN_BYTES
    text = say("planner.budget.host", base=base_bytes, source=source)
    return Budget(
        total_bytes=limit_bytes,
        used_by_others_bytes=0,
        context_bytes=base_bytes,
        margin_bytes=margin,
        text=text,
        reserved_bytes=reserved_bytes,
    )
