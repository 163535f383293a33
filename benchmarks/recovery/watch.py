"""Sees what a training does, whichever library drives it, and lets one allocation in it fail."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.models.model import GPT, MLP

ACCUMULATION, FAILING_STEP, EVAL_INTERVAL, TRIAL_STEPS = 2, 7, 10, 3
"""Passes of a step; the step that fails, counted from 1; steps between evaluations; steps of a trial of the finder."""


@dataclass
class Update:
    """One optimizer step, or the part of it that was done."""

    before: str
    """Digest of the parameters."""
    after: str
    sequences: list[str]
    """Digests of the tokens whose gradients it used."""
    whole: bool
    stage: str
    """search or train."""
    forwards: int
    """Forward passes in training that had begun by then."""


@dataclass
class Watch:
    """Sees every forward pass and update of this process, and lets one allocation fail."""

    failure: str
    stage: str = "train"
    counter: Callable[[], int] = lambda: 0
    """The tool's own count of steps."""
    counters: list[int] = field(default_factory=list)
    """That count, at each update."""
    updates: list[Update] = field(default_factory=list)
    failed_after: int | None = None
    """Updates done when the error came."""
    error: str = ""
    model: nn.Module | None = None
    parameters: list[Tensor] = field(default_factory=list)
    """Of the model that was updated last, as its optimizer has them."""
    _steps: Counter[str] = field(default_factory=Counter)
    _pending: list[str] = field(default_factory=list)
    _passes: int = 0
    _forwards: int = 0
    _evaluated: int = 0
    _hooked: set[int] = field(default_factory=set)

    def install(self) -> None:
        nn.modules.module.register_module_forward_pre_hook(self._before_forward)
        nn.modules.module.register_module_forward_hook(self._after_forward)
        usual, watch = torch.optim.Adam.step, self

        @functools.wraps(usual)
        def step(self: torch.optim.Adam, closure: Any = None) -> Any:
            return watch._step(self, functools.partial(usual, self, closure))

        torch.optim.Adam.step = step  # AdamW's too

    def fail(self) -> None:
        """The allocator's own error: no address space holds as much."""
        if self.failed_after is None:
            self.failed_after = len(self.updates)
            try:
                torch.empty(2**50, dtype=torch.uint8)
            except RuntimeError as error:
                self.error = str(error)
                raise

    def _before_forward(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, MLP) and not torch.is_grad_enabled() and self.failure == "evaluation":
            self._in_evaluation()
        if not isinstance(module, GPT):
            return
        self._evaluated = 0 if module.training else self._evaluated + 1
        if module.training:
            self._forwards += 1
            if id(module) not in self._hooked:
                self._hooked.add(id(module))
                module.transformer["h"][len(module.transformer["h"]) // 2].mlp.c_proj.weight.register_hook(
                    self._in_backward
                )
            self.model = module

    def _in_evaluation(self) -> None:
        if (self._steps["train"], self._evaluated) == (EVAL_INTERVAL, 2):
            self.fail()

    def _after_forward(self, module: nn.Module, arguments: tuple[Any, ...], loss: Any) -> None:
        if isinstance(module, GPT) and module.training and loss.requires_grad:
            loss.register_hook(lambda _gradient: self._before_backward(module, arguments[0]))

    def _before_backward(self, module: nn.Module, inputs: Tensor) -> None:
        if all(p.grad is None or not p.grad.any() for p in module.parameters()):
            self._pending, self._passes = [], 0
        self._pending += [digest(row) for row in inputs]
        self._passes += 1

    def _in_backward(self, _gradient: Tensor) -> None:
        where = {"backward": ("train", FAILING_STEP - 1), "search": ("search", TRIAL_STEPS)}.get(self.failure)
        if where == (self.stage, self._steps[self.stage]) and self._passes == ACCUMULATION:
            self.fail()

    def _step(self, optimizer: torch.optim.Optimizer, usual: Callable[[], Any]) -> Any:
        self.parameters = parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = digest(*parameters)
        if self.updates and not self.updates[-1].whole and self.updates[-1].forwards == self._forwards:
            before = self.updates.pop().before  # the same update goes on
        if self.stage == "train":
            self.counters.append(self.counter())
        failing = self.failure == "optimizer" and (self.stage, self._steps["train"]) == ("train", FAILING_STEP - 1)
        whole = False
        try:
            with _Writes(self, optimizer) if failing and self.failed_after is None else nullcontext():
                result = usual()
            whole = True
            self._steps[self.stage] += 1
            return result
        finally:
            after = digest(*parameters)
            if whole or after != before:
                seen = [*self._pending]
                self.updates.append(Update(before, after, seen, whole, self.stage, self._forwards))


class _Writes(TorchDispatchMode):
    """Fails before the middle one of the operators of an update that write parameters."""

    def __init__(self, watch: Watch, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self._watch, self._count = watch, 0
        groups = [len(group["params"]) for group in optimizer.param_groups]
        self._middle = (len(groups) if optimizer.defaults["fused"] else sum(groups)) // 2

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::addcdiv_", "aten::_fused_adamw_"):
            if self._count == self._middle:
                self._watch.fail()
            self._count += 1
        return func(*args, **(kwargs or {}))


def digest(*tensors: Tensor) -> str:
    made = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        made.update(tensor.detach().contiguous().numpy().tobytes())
    return made.hexdigest()
