"""Read the micro-batches of a run ahead of its steps, and move them to the device."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tightfit.data.batches import Batches, Purpose, micro_batches, read_ahead
from tightfit.trainer.step import MicroBatch


class Feed:
    """Micro-batches of one process, from the step that is next."""

    passes: list[range]
    """Sequences of each pass of a step."""

    def __init__(self, batches: Batches, device: torch.device, *, share: range, steps: int, prefetch: int) -> None:
        """`share`: this process's sequences of a step. `steps`: those of the whole run."""
        self._batches, self._device, self._share, self._steps = batches, device, share, steps
        # On the CPU a reading thread only takes cores from the step: a small model was 3% slower with it.
        self._prefetch = 0 if device.type == "cpu" else prefetch

    def split(self, micro_batch: int, *, step: int) -> None:
        """Run the steps from `step` on in passes of so many sequences."""
        self.passes = micro_batches(self._share, micro_batch)
        self.restart(step)

    def restart(self, step: int) -> None:
        """Read from `step` on, and forget anything read ahead."""
        self._ahead = read_ahead(self._reads(step), self._prefetch)

    def of_step(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches of the next step."""
        return (self._to_device(next(self._ahead)) for _ in self.passes)

    def of_evaluation(self, purpose: Purpose, step: int, share: range, micro_batch: int) -> Iterator[MicroBatch]:
        """Yield this process's `share` of an evaluation's sequences."""
        tasks = (partial(self._read, purpose, step, part) for part in micro_batches(share, micro_batch))
        return (self._to_device(pair) for pair in read_ahead(tasks, self._prefetch))

    def _reads(self, first_step: int) -> Iterator[Callable[[], MicroBatch]]:
        for step in range(first_step, self._steps):
            for part in self.passes:
                yield partial(self._read, "train", step, part)

    def _read(self, purpose: Purpose, step: int, sequences: range) -> MicroBatch:
        inputs, targets = (torch.from_numpy(ids) for ids in self._batches.read(purpose, step, sequences))
        if self._device.type == "cuda":
            return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets

    def _to_device(self, pair: MicroBatch) -> MicroBatch:
        inputs, targets = pair
        return inputs.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)
