"""One optimizer step over any split of the effective batch, and one evaluation.

Ordinary PyTorch code on purpose: on a real device it trains, and without one the same code can be traced.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tightfit.models.optimizer import set_learning_rate
from tightfit.trainer.atomic import Update
from tightfit.trainer.offload import Offload

MicroBatch = tuple[Tensor, Tensor]
"""Inputs and targets, (b, t) int64 on the device."""
Phase = Literal[
    "setup", "resume", "eval", "forward", "loss", "backward", "optimizer", "compile", "log", "save", "sample"
]


class Guard:
    """What a run adds to a step so that it survives an error half way (`trainer.recovery`); this one adds nothing."""

    def agree(self) -> None:
        """Returns once all processes are here; raises where one of them failed on its way."""

    def exchange(self) -> None:
        """Sums the gradients over all processes, where DDP has not done so in backward."""

    def write(self, state: "StepState") -> None:
        """The update itself, after which nothing may be undone."""
        Update(state.optimizer, state.scaler).go_on()


@dataclass
class StepState:
    """All that a step changes, and what it needs for that."""

    model: nn.Module
    """Called as `model(inputs, targets, scale=...)` for a summed loss; may be compiled or wrapped in DDP."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Enabled for float16 only."""
    autocast: Callable[[], torch.autocast]
    processes: int = 1
    """Processes whose gradients are averaged by DDP."""
    offload: Offload | None = None
    """What of it is in host memory instead of the device's."""
    guard: Guard = field(default_factory=Guard)
    phase: Phase = "setup"
    """What is being done, for whoever catches its errors."""


@dataclass(frozen=True)
class StepResult:
    loss: Tensor
    """Mean loss over this process's share of the tokens, times that share: float32 scalar on the device."""
    grad_norm: Tensor | None
    """Norm of the whole gradient before clipping; None if nothing is clipped."""


def optimizer_step(
    state: StepState,
    micro_batches: Iterable[MicroBatch],
    *,
    passes: int,
    tokens: int,
    learning_rate: float,
    grad_clip: float,
    seed_of_pass: Callable[[int], int] | None = None,
) -> StepResult:
    """Update the parameters with the mean gradient over `tokens` target tokens, those of all processes together.

    `micro_batches` yields `passes` of them, of any sizes. Each is weighted by its tokens, so that no split of the
    batch changes the result but by rounding. `seed_of_pass` seeds dropout for each pass.
    """
    set_learning_rate(state.optimizer, learning_rate)
    total = _backward(state, micro_batches, passes, state.processes / tokens, seed_of_pass)
    state.guard.agree()
    state.guard.exchange()
    state.phase, norm = "optimizer", None
    if grad_clip > 0.0 or state.scaler.is_enabled():
        state.scaler.unscale_(state.optimizer)
    if grad_clip > 0.0:
        held = state.offload.masters.values() if state.offload else state.model.parameters()
        norm = nn.utils.clip_grad_norm_(held, grad_clip)
    result = StepResult(total / state.processes, norm)
    state.guard.agree()  # until here only gradients were written: a step that fails is undone by dropping them
    state.guard.write(state)
    if state.offload:
        state.offload.return_weights()
    return result


def _backward(
    state: StepState,
    micro_batches: Iterable[MicroBatch],
    passes: int,
    scale: float,
    seed_of_pass: Callable[[int], int] | None,
) -> Tensor:
    """Adds the gradients of all passes to the parameters'; returns the sum of their losses."""
    total: Tensor | None = None
    state.phase = "forward"
    for number, (inputs, targets) in enumerate(micro_batches):
        if seed_of_pass is not None:
            torch.manual_seed(seed_of_pass(number))
        with _synchronised(state.model, number == passes - 1):
            with state.autocast():
                # DDP divides by the number of processes what is a sum over all tokens here
                loss = state.model(inputs, targets, scale=scale)
            state.phase = "backward"
            state.scaler.scale(loss).backward()
        # A copy: what a CUDA graph returned is overwritten when it runs again.
        total = loss.detach().clone() if total is None else total + loss.detach()
        state.phase = "forward"
    assert total is not None, "a step needs at least one micro-batch"
    return total


def evaluation_loss(state: StepState, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
    """Summed loss and number of target tokens; one micro-batch's memory at a time, and nothing kept between them."""
    model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), state.autocast():
            for inputs, targets in micro_batches:
                total += float(model(inputs, targets))
                tokens += targets.numel()
    finally:
        model.train(was_training)
    return total, tokens


def dropout_seed(seed: int, step: int, sequence: int) -> int:
    """Seed of the pass that begins with this sequence of this step; below 2**63."""
    digest = hashlib.blake2b(f"{seed}/{step}/{sequence}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _synchronised(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """DDP exchanges gradients in the last pass of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()
