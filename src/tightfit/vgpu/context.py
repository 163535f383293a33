"""A virtual GPU for the lines of one's own process."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tightfit.allocator.caching import CachingAllocator


class VirtualGPU:
    """`with VirtualGPU("RTX 3060 12GB") as gpu:` runs what follows on a card that is not there.

    From then on this process has no real GPU. `gpu.findings()` says what was used, during and after; memory runs out
    with torch.OutOfMemoryError where the card's would. Keywords as of `tightfit.dryrun`. Raises DeviceError if the
    card is not known, this torch is not, or the process already uses a real GPU or another virtual one.
    """

    def __init__(self, gpu: str, **request: Any) -> None:
        from tightfit.vgpu.session import Request, VirtualSession  # imports torch

        self._session = VirtualSession(Request(**{"gpu": gpu, "until_stable": False, **request}))

    def __enter__(self) -> "VirtualGPU":
        self._active = self._session.active()
        self._active.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._active.__exit__(*error)

    @property
    def allocator(self) -> "CachingAllocator":
        """The card's memory: allocated, reserved and requested bytes, now and at most."""
        return self._session.allocator

    def findings(self) -> dict[str, Any]:
        """The peak and what it consists of, as `tightfit.dryrun` returns it."""
        from tightfit.vgpu.findings import findings_of

        return findings_of(self._session)
