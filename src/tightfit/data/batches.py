"""Choose the sequences of each step: a pure function of seed, split, step and the sequence's number.

Neither the micro-batch, nor the number of processes, nor a resume changes the sequences of a step.
Shapes: b sequences of t tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from tightfit.data.tokenfile import Dataset

Ids = npt.NDArray[np.int64]
Split = Literal["train", "val"]
Purpose = Literal["train", "evaluate train", "evaluate val"]
_STREAMS: dict[Purpose, int] = {"train": 0, "evaluate train": 1, "evaluate val": 2}

T = TypeVar("T")


def starts(key: Sequence[int], numbers: Ids, positions: int, block_size: int) -> Ids:
    """Return the start of each numbered sequence, in [0, positions), in the order given by `key`.

    Each epoch cuts the text into blocks at a random phase and shuffles the blocks. So every token is read once before
    any is read twice. nanoGPT draws with replacement: after one epoch's worth of tokens it has read 63% of them.
    """
    blocks = max(1, positions // block_size)
    phases = min(block_size, positions - (blocks - 1) * block_size)
    result = np.empty_like(numbers)
    for epoch in np.unique(numbers // blocks):
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, int(epoch)])))
        phase = int(generator.integers(phases))
        chosen = numbers // blocks == epoch
        result[chosen] = phase + block_size * permuted(numbers[chosen] % blocks, blocks, generator)
    return result


def permuted(numbers: Ids, size: int, generator: np.random.Generator) -> Ids:
    """Map `numbers` through a random permutation of range(size) without storing the permutation.

    A Feistel network over the next power of four, applied again where the image is outside (cycle walking).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = generator.integers(0, 2**64, size=6, dtype=np.uint64)
    values = numbers.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix every bit of a value into every bit of the result: SplitMix64's finalizer (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Batches:
    """Sequences of a dataset, by number."""

    dataset: Dataset
    block_size: int
    effective_batch: int
    """Sequences in a training step."""
    seed: int

    def read(self, purpose: Purpose, step: int, sequences: range) -> tuple[Ids, Ids]:
        """Return inputs and targets (b, t), int64; targets are one token ahead."""
        file = self.dataset.val if purpose == "evaluate val" else self.dataset.train
        key, first = [self.seed, _STREAMS[purpose], step], 0
        if purpose == "train":
            key, first = [self.seed, _STREAMS[purpose]], step * self.effective_batch
        numbers = np.arange(first + sequences.start, first + sequences.stop)
        begin = starts(key, numbers, len(file) - self.block_size, self.block_size)
        tokens = file.array()[begin[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def micro_batches(sequences: range, size: int) -> list[range]:
    """Split `sequences` into parts of `size`; the last may be smaller.

    >>> micro_batches(range(2, 9), 3)
    [range(2, 5), range(5, 8), range(8, 9)]
    """
    return [sequences[start : start + size] for start in range(0, len(sequences), size)]


def read_ahead(tasks: Sequence[Callable[[], T]] | Iterator[Callable[[], T]], depth: int) -> Iterator[T]:
    """Yield the results of `tasks` in order; a thread computes up to `depth` of them ahead."""
    if depth < 1:
        for task in tasks:
            yield task()
        return
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        pending: list[Future[T]] = []
        try:
            for task in tasks:
                pending.append(pool.submit(task))
                if len(pending) > depth:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
