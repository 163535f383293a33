"""Run one optimizer step over any split of the effective batch, or one evaluation.

This is ordinary PyTorch code on purpose: on a real device it trains, and the virtual device traces the same code.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tightfit.models.loss import IGNORED
from tightfit.models.optimizer import set_learning_rate
from tightfit.trainer.atomic import Update, reset_scaler
from tightfit.trainer.fallback import Phase
from tightfit.trainer.offload import Offload

if TYPE_CHECKING:  # FSDP2 takes more than a second to import, and few runs need it
    from tightfit.trainer.sharding import Shards

MicroBatch = tuple[Tensor, Tensor]
"""Inputs and targets, (b, t) int64 on the device."""


class Guard:
    """Hooks by which a run survives an error half way through a step (`trainer.recovery`); these do nothing extra."""

    def agree(self) -> object:
        """Return once all processes are here; raise if one of them failed before."""

    def exchange(self) -> None:
        """Sum the gradients over all processes, unless DDP or FSDP2 has done so in backward."""

    def write(self, state: "StepState") -> None:
        """Update the parameters; nothing can be undone afterwards."""
        Update(state.optimizer, state.scaler).go_on()


@dataclass
class StepState:
    """Everything that a step changes or needs."""

    model: nn.Module
    """Called as `model(inputs, targets, scale=...)` for a summed loss; may be compiled or wrapped in DDP."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Enabled for float16 only."""
    autocast: Callable[[], torch.autocast]
    processes: int = 1
    """Processes over which DDP averages the gradients."""
    offload: Offload | None = None
    """The parts in host memory instead of the device's."""
    shards: "Shards | None" = None
    """The parts of a model that is spread over processes."""
    guard: Guard = field(default_factory=Guard)
    phase: Phase = "setup"
    """The current phase, for the handler of its errors."""


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
    accepts: Callable[[StepResult], bool] = lambda result: True,
) -> StepResult:
    """Update the parameters with the mean gradient over `tokens` target tokens, those of all processes together.

    `micro_batches` yields `passes` of them, of any sizes. Each counts by its tokens, so another split of the batch
    changes the result only by rounding. `seed_of_pass` gives the seed of each pass's dropout, set for the process. A
    step changes nothing if its result is not accepted.
    """
    set_learning_rate(state.optimizer, learning_rate)
    total = _backward(state, micro_batches, passes, state.processes / tokens, seed_of_pass)
    state.guard.agree()
    state.guard.exchange()
    state.phase, norm = "optimizer", None
    if grad_clip > 0.0 or state.scaler.is_enabled():
        state.scaler.unscale_(state.optimizer)
    if grad_clip > 0.0:
        norm = _clip(state, grad_clip)
    result = StepResult(total / state.processes, norm)
    state.guard.agree()  # until here only gradients were written: a step that fails is undone by dropping them
    if not accepts(result):
        state.optimizer.zero_grad(set_to_none=True)
        state.model.zero_grad(set_to_none=True)  # of weights whose optimizer is on the host
        reset_scaler(state.optimizer, state.scaler)
        return result
    state.guard.write(state)
    if state.offload:
        state.offload.return_weights()
    return result


def _clip(state: StepState, limit: float) -> Tensor:
    if state.shards:
        return state.shards.clip(limit)
    held = state.offload.masters.values() if state.offload else state.model.parameters()
    return nn.utils.clip_grad_norm_(held, limit)


def _backward(
    state: StepState,
    micro_batches: Iterable[MicroBatch],
    passes: int,
    scale: float,
    seed_of_pass: Callable[[int], int] | None,
) -> Tensor:
    """Add the gradients of all passes to the parameters'; return the sum of the losses."""
    total: Tensor | None = None
    state.phase = "forward"
    for number, (inputs, targets) in enumerate(micro_batches):
        if seed_of_pass is not None:
            torch.manual_seed(seed_of_pass(number))
        if state.shards:
            state.shards.begin_pass(is_last=number == passes - 1)
        with _synchronised(state.model, number == passes - 1):
            with state.autocast():
                # a sum over all tokens; DDP divides it by the number of processes
                loss = state.model(inputs, targets, scale=scale)
            state.phase = "backward"
            state.scaler.scale(loss).backward()
        # A copy: the next run of a CUDA graph overwrites its result.
        total = loss.detach().clone() if total is None else total + loss.detach()
        state.phase = "forward"
    assert total is not None, "a step needs at least one micro-batch"
    return total


def evaluation_loss(state: StepState, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
    """Return the summed loss and the number of target tokens; hold one micro-batch's memory at a time."""
    model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    # FSDP2 would keep gathered weights made in inference mode, which no later training step could use.
    without_gradients = torch.no_grad() if state.shards else torch.inference_mode()
    try:
        with without_gradients, state.autocast():
            for inputs, targets in micro_batches:
                total += float(model(inputs, targets))
                tokens += int((targets != IGNORED).sum()) if state.shards else targets.numel()
    finally:
        model.train(was_training)
    if state.shards:
        state.shards.end_evaluation()
    return total, tokens


def dropout_seed(seed: int, step: int, sequence: int) -> int:
    """Return the seed of the pass that begins with this sequence of this step; below 2**63."""
    digest = hashlib.blake2b(f"{seed}/{step}/{sequence}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _synchronised(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Let DDP exchange gradients in the last pass of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()
