"""Facts of a card, its torch and its CUDA that decide which kernel runs and how much memory it needs."""

from dataclasses import dataclass

Version = tuple[int, int]

_THREADS_PER_SM = {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (12, 0): 1536, (12, 1): 1536}
"""CUDA programming guide, technical specifications per compute capability: 7.0, 8.0, 9.0 and 10.x have 2048."""


def max_threads_per_sm(capability: Version) -> int:
    """Threads that one multiprocessor holds at once."""
    return _THREADS_PER_SM.get(capability, 2048)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card as PyTorch's CUDA code knows it."""

    capability: Version
    """Compute capability: major, minor."""
    sm_count: int
    """Streaming multiprocessors."""
    torch_version: Version = (2, 13)
    """Version of the torch that runs there."""
    cuda_version: Version = (12, 8)
    """Version of CUDA that this torch was built for."""

    @property
    def max_threads_per_sm(self) -> int:
        return max_threads_per_sm(self.capability)

    @property
    def cudnn_version(self) -> int:
        """Version of cuDNN in torch's own wheels, in the format of `cudnnGetVersion`: 91900 is 9.19.0.

        Source: `.ci/docker/common/install_cuda.sh` and the pull requests that changed it (146717, 162268, 177321).
        A cuDNN installed by hand may have another version.
        """
        if self.torch_version < (2, 7):
            return 90100
        if self.torch_version < (2, 8):
            return 90701 if self.cuda_version >= (12, 8) else 90501
        if self.torch_version < (2, 11):
            return (
                {(2, 9): 91300, (2, 10): 91501}.get(self.torch_version, 91002)
                if self.cuda_version >= (13, 0)
                else 91002
            )
        if self.cuda_version < (12, 8):
            return 91002
        return 91900 if self.torch_version < (2, 12) else 92000
