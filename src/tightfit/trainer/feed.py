"""Read the micro-batches of a run ahead of its steps, and move them to the device."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tightfit.data.batches import Batches, Purpose, micro_batches, read_ahead
from tightfit.models.loss import IGNORED
from tightfit.trainer.step import MicroBatch


class Feed:
    """Micro-batches of one process, from the step that is next."""

    passes: list[range]
    """Sequences of each pass of a step."""

    def __init__(
        self, batches: Batches, device: torch.device, *, share: range, steps: int, prefetch: int, in_step_with: int = 1
    ) -> None:
        """`share`: this process's sequences of a step. `steps`: those of the whole run.

        `in_step_with` so many processes, each runs as many passes: some have no sequences, and count for nothing.
        """
        self._batches, self._device, self._share, self._steps = batches, device, share, steps
        self._in_step_with = in_step_with
        # On the CPU a reading thread only takes cores from the step: a small model was 3% slower with it.
        self._prefetch = 0 if device.type == "cpu" else prefetch

    def split(self, micro_batch: int, *, step: int) -> None:
        """Run the steps from `step` on in passes of so many sequences."""
        self.passes = self._passes(self._share, self._batches.effective_batch, micro_batch)
        self.restart(step)

    def restart(self, step: int) -> None:
        """Read from `step` on, and forget anything read ahead."""
        self._ahead = read_ahead(self._reads(step), self._prefetch)

    def of_step(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches of the next step."""
        return (self._to_device(next(self._ahead)) for _ in self.passes)

    def _passes(self, share: range, sequences: int, micro_batch: int) -> list[range]:
        passes = micro_batches(share, micro_batch)
        if self._in_step_with > 1:
            largest_share = -(-sequences // self._in_step_with)
            passes += [range(share.stop, share.stop)] * (-(-largest_share // micro_batch) - len(passes))
        return passes

    def of_evaluation(
        self, purpose: Purpose, step: int, share: range, micro_batch: int, *, sequences: int
    ) -> Iterator[MicroBatch]:
        """Yield this process's `share` of an evaluation's `sequences`."""
        passes = self._passes(share, sequences, micro_batch)
        tasks = (partial(self._read, purpose, step, part) for part in passes)
        return (self._to_device(pair) for pair in read_ahead(tasks, self._prefetch))

    def _reads(self, first_step: int) -> Iterator[Callable[[], MicroBatch]]:
        for step in range(first_step, self._steps):
            for part in self.passes:
                yield partial(self._read, "train", step, part)

    def _read(self, purpose: Purpose, step: int, sequences: range) -> MicroBatch:
        if sequences:
            inputs, targets = (torch.from_numpy(ids) for ids in self._batches.read(purpose, step, sequences))
        else:
            inputs = torch.zeros((1, self._batches.block_size), dtype=torch.int64)
            targets = torch.full_like(inputs, IGNORED)
        if self._device.type == "cuda":
            return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets

    def _to_device(self, pair: MicroBatch) -> MicroBatch:
        inputs, targets = pair
        return inputs.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)
