"""The batch with the largest sample among those of a DataLoader that are left out.

Samples of several lengths are filled up to the longest of their batch, so that one batch of an epoch decides the peak.
Most samples are loaded on the host for that, in the time that `SECONDS` gives; nothing is computed with them.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from tightfit.vgpu.arrow_samples import arrow_sizes
from tightfit.vgpu.loop_items import FAILURES, size_of

SECONDS = 5.0
"""Time for looking at the samples of one epoch."""
_AT_ONCE = 256
"""Batches that are looked at together where samples need not be loaded."""


class Longest(NamedTuple):
    """Facts from the samples of some batches."""

    place: int | None
    """Number of the batch with the largest sample; None if all are of one size, or their sizes cannot be told."""
    seen: int
    """Batches that were looked at."""


def longest(dataset: object, batches: Sequence[object], *, seconds: float = SECONDS) -> Longest:
    """Look at the samples of batches, each a list of their numbers in the dataset."""
    sizes = list(_largest_of_each(dataset, batches, seconds))
    return Longest(sizes.index(max(sizes)) if len(set(sizes)) > 1 else None, len(sizes))


def stacks_samples(collate: object) -> bool:
    """Return True for torch's own way to make a batch, which takes samples of one size alone."""
    return collate is torch.utils.data.default_collate


def are_of_one_size(dataset: object, count: int, *, seconds: float = 1.0) -> bool:
    """Return True if the first samples of a dataset are of one size, as far as the time goes."""
    sizes: set[int] = set()
    for size in _largest_of_each(dataset, ([number] for number in range(count)), seconds):
        sizes.add(size)
        if len(sizes) > 1:
            return False
    return True


def _largest_of_each(dataset: object, batches: Iterable[object], seconds: float) -> Iterator[int]:
    """Yield the size of each batch's largest sample, up to a batch that cannot be looked at or the end of the time."""
    until = time.monotonic() + seconds
    left = itertools.takewhile(lambda batch: isinstance(batch, (list, tuple)), batches)
    try:
        from_columns = arrow_sizes(dataset)
        while some := list(itertools.islice(left, _AT_ONCE if from_columns else 1)):
            if time.monotonic() > until:
                return
            numbers = [number for batch in some for number in batch]  # type: ignore[attr-defined]
            sizes = iter(from_columns(numbers) if from_columns else _loaded_sizes(dataset, numbers))
            for batch in some:
                yield max(itertools.islice(sizes, len(batch)), default=0)  # type: ignore[arg-type]
    except FAILURES:  # of the script's own dataset, which raises them where the script comes to them
        return


def _loaded_sizes(dataset: object, numbers: Sequence[object]) -> list[int]:
    return [size_of(dataset[number], of_card=False) for number in numbers]  # type: ignore[index]
