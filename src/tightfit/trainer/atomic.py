"""The one part of a step that writes: made so that it happens wholly or, as far as anyone can see, not at all.

Everything before it (reading, forward, loss, backward, exchange, unscaling, clipping) writes gradients only, so that
dropping them undoes it. The update itself is not undone but finished: an update that stopped half way goes on after
memory was released, and ends with the same bits as one that never stopped. This needs no second copy of the weights.

Why that is exact. All moments exist before the first step (`gpt.optimizer`), so an update allocates next to nothing.
The fused kernel updates each parameter group in one call that allocates nothing: it is refused before it writes, or
it ends. `_Journal` notes, without allocating, which calls ended; the gradients of their parameters are then hidden, and
the optimizer's next step updates the others alone. Step counters, raised by a call of their own, are set from a copy
taken at the start. Any other optimizer works on one parameter at a time, whose tensors are copied aside first and put
back if it stops: the largest parameter's weight and moments, at a moment when no activations are alive.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tightfit.models.optimizer import parts_of

_FUSED = (torch._fused_adamw_, torch._fused_adam_, torch._fused_sgd_)


class Update:
    """One optimizer update, from gradients that are complete and unscaled; `go_on` may be called until it returns."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self._optimizer, self._scaler = optimizer, scaler
        self._parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._journal = _Journal(max(len(self._parameters), len(optimizer.param_groups)))
        self._counters: Tensor | None = None
        self._stepped = False

    @property
    def has_written(self) -> bool:
        """Whether any parameter is already the new one."""
        return self._stepped or self._journal.count > 0

    def go_on(self) -> None:
        """Update what is not yet updated, then the scaler; gradients are gone afterwards."""
        if not self._stepped:
            if is_fused(self._optimizer):
                self._step_fused()
            else:
                self._step_each()
            self._stepped = True
        if not self._journal.scale_updated:
            with self._journal:
                self._scaler.update()
        reset_scaler(self._optimizer, self._scaler)
        for parameter in self._parameters:
            parameter.grad = None

    def withdraw(self) -> None:
        """Leave an optimizer that nothing was written to as it was before."""
        if self._counters is not None:
            self._set_counters()
        reset_scaler(self._optimizer, self._scaler)

    def _step_fused(self) -> None:
        self._set_counters()
        for parameter in self._journal.updated:
            parameter.grad = None
        _forget_scale(self._optimizer)
        if self._scaler.is_enabled():
            self._scaler._per_optimizer_states[id(self._optimizer)]["stage"] = _unscaled()
        if len(self._journal.updated) < len(self._parameters):
            with self._journal:
                self._scaler.step(self._optimizer)

    def _set_counters(self) -> None:
        """At the first call keep the step counters; at a later one set them to what the journal says."""
        counters = [self._optimizer.state[p]["step"] for p in self._parameters if "step" in self._optimizer.state[p]]
        if not counters:
            return
        if self._counters is None:
            self._counters = torch.stack(counters)
            return
        done = {id(parameter) for parameter in self._journal.updated}
        raised = torch.tensor([float(id(p) in done) for p in self._parameters], device=self._counters.device)
        if (found_inf := _found_inf(self._optimizer, self._scaler)) is not None:
            raised *= 1 - found_inf.to(raised.device)
        for counter, value in zip(counters, self._counters + raised, strict=True):
            counter.copy_(value)

    def _step_each(self) -> None:
        """For optimizers whose kernels are many: one parameter after the other, each put back if it fails."""
        found_inf = _found_inf(self._optimizer, self._scaler)
        if found_inf is not None and float(found_inf):
            return
        before = self._journal.count
        waiting = [([parameter], parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        for (parameter,), _ in waiting:
            parameter.grad = None
        try:
            for alone, grad in waiting:
                alone[0].grad = grad
                _step_one(self._optimizer, alone[0])
                self._journal.note(alone)
                alone[0].grad = None
        except BaseException:
            for alone, grad in waiting[self._journal.count - before :]:
                alone[0].grad = grad
            raise


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is one kernel a parameter group, which cannot stop half way."""
    known = type(optimizer) in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
    return known and all(group.get("fused") for group in optimizer.param_groups)


def reset_scaler(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """The scaler forgets a step that was begun; its scale changes only when a step ends."""
    _forget_scale(optimizer)
    if scaler.is_enabled():
        scaler._per_optimizer_states.pop(id(optimizer), None)


class _Journal(TorchFunctionMode):
    """Which calls have updated their parameters, and whether the scale is; room for the notes is made before."""

    def __init__(self, most_calls: int) -> None:
        super().__init__()
        self._calls: list[list[Tensor]] = [[]] * most_calls
        self.count = 0
        self.scale_updated = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FUSED:
            self.note(args[0])
        elif func is torch._amp_update_scale_:
            self.scale_updated = True
        return result

    def note(self, parameters: list[Tensor]) -> None:
        self._calls[self.count] = parameters
        self.count += 1

    @property
    def updated(self) -> list[Tensor]:
        return [parameter for call in self._calls[: self.count] for parameter in call]


def _step_one(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    state = optimizer.state[parameter]
    moments = (parts_of(value).values() for value in state.values() if isinstance(value, Tensor))
    written = [parameter.detach(), *chain.from_iterable(moments)]
    before = [tensor.clone() for tensor in written]
    keys = set(state)
    try:
        optimizer.step()
    except BaseException:
        with torch.no_grad():
            for tensor, saved in zip(written, before, strict=True):
                tensor.copy_(saved)
        for key in set(state) - keys:  # made by this step, which did not happen
            del state[key]
        raise


def _found_inf(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Tensor | None:
    """1 where the gradients are not finite and the update is left out; None without a scaler."""
    if not scaler.is_enabled():
        return None
    found = list(scaler._found_inf_per_device(optimizer).values())
    return torch.stack([each.to(found[0].device) for each in found]).sum().clamp(max=1) if found else None


def _forget_scale(optimizer: torch.optim.Optimizer) -> None:
    """What GradScaler.step hangs on the optimizer for the time of the step, and leaves there when that fails."""
    for name in ("grad_scale", "found_inf"):
        if hasattr(optimizer, name):
            delattr(optimizer, name)


def _unscaled() -> Any:
    return torch.amp.grad_scaler.OptState.UNSCALED
