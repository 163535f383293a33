"""The batch with the largest sample among those of a DataLoader that are left out.

Samples of several lengths are filled up to the longest of their batch, so that one batch of an epoch decides the peak.
The samples are loaded on the host, in the time that `SECONDS` gives; nothing is computed with them.
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tightfit.vgpu.skipping import FAILURES

SECONDS = 5.0
"""Time for looking at the samples of one epoch."""


class Longest(NamedTuple):
    """What the samples of some batches showed."""

    place: int | None
    """Number of the batch with the largest sample; None if all are of one size, or their sizes cannot be told."""
    seen: int
    """Batches that were looked at."""


def longest(dataset: object, batches: Sequence[object], *, seconds: float = SECONDS) -> Longest:
    """Look at the samples of batches, each a list of their numbers in the dataset."""
    until = time.monotonic() + seconds
    sizes: list[int] = []
    for batch in batches:
        if not isinstance(batch, (list, tuple)) or time.monotonic() > until:
            break
        try:
            sizes.append(max((_size(dataset[number]) for number in batch), default=0))  # type: ignore[index]
        except FAILURES:  # of the script's own dataset, which raises them where the script comes to them
            break
    return Longest(sizes.index(max(sizes)) if len(set(sizes)) > 1 else None, len(sizes))


def stacks_samples(collate: object) -> bool:
    """Return True for torch's own way to make a batch, which takes samples of one size alone."""
    return collate is torch.utils.data.default_collate


def are_of_one_size(dataset: object, count: int, *, seconds: float = 1.0) -> bool:
    """Return True if the first samples of a dataset are of one size, as far as the time goes."""
    until = time.monotonic() + seconds
    sizes: set[int] = set()
    for number in range(count):
        if len(sizes) > 1 or time.monotonic() > until:
            break
        try:
            sizes.add(_size(dataset[number]))  # type: ignore[index]
        except FAILURES:
            break
    return len(sizes) < 2


def _size(sample: object) -> int:
    """Return the number of values in a sample: of its tensors, arrays, texts and lists."""
    match sample:
        case Tensor():
            return 0 if sample.is_cuda else sample.numel()
        case str() | bytes():
            return len(sample)
        case Mapping():
            return sum(map(_size, sample.values()))
        case list() | tuple():
            return sum(map(_size, sample))
    size = getattr(sample, "size", 1)
    return size if isinstance(size, int) else 1
