"""A virtual GPU for the lines of one's own process."""

from types import TracebackType
from typing import TYPE_CHECKING

from tightfit.units import format_bytes
from tightfit.vgpu.card_arguments import described_gpu
from tightfit.vgpu.records import Findings, Settings

if TYPE_CHECKING:
    from tightfit.allocator.caching import CachingAllocator


class VirtualGPU:
    """`with VirtualGPU("RTX 3060 12GB") as gpu:` runs the lines within on a card that is not there.

    From then on this process has no real GPU. Read `gpu.findings()` during or after it; memory runs out with
    torch.OutOfMemoryError where the card's would. Raises TightfitError for an unknown card or a wrong value, and if the
    process already uses a real GPU or another virtual one.
    """

    def __init__(
        self,
        gpu: str,
        *,
        memory_bytes: int | None = None,
        used_bytes: int = 0,
        context_bytes: int | None = None,
        capability: tuple[int, int] | None = None,
        steps: int | None = None,
        until_stable: bool = False,
        timeout_s: float | None = None,
        snapshot: str | None = None,
        timeline: bool = False,
        torch: str | None = None,
    ) -> None:
        """Keywords as of `tightfit.dryrun`."""
        settings = Settings(
            gpu=gpu,
            memory_bytes=memory_bytes,
            used_bytes=used_bytes,
            context_bytes=context_bytes,
            capability=capability,
            steps=steps,
            until_stable=until_stable,
            timeout_s=timeout_s,
            snapshot=snapshot,
            timeline=timeline,
            torch=torch,
        )
        described_gpu(gpu, memory_bytes=memory_bytes, used_bytes=used_bytes, capability=capability)
        from tightfit.vgpu.session import VirtualSession  # imports torch

        self._session = VirtualSession(settings)

    def __repr__(self) -> str:
        return f"<VirtualGPU: {self._session.gpu.name}, {format_bytes(self.allocator.total_bytes)}>"

    def __enter__(self) -> "VirtualGPU":
        self._active = self._session.active()
        self._active.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._active.__exit__(kind, error, trace)

    @property
    def allocator(self) -> "CachingAllocator":
        """The card's memory: allocated, reserved and requested bytes, now and at most."""
        return self._session.allocator

    def findings(self) -> Findings:
        """Return the peak and its tensors, as `tightfit.dryrun` does."""
        from tightfit.vgpu.findings import findings_of

        return findings_of(self._session)
