"""Update the parameters completely or not at all, even if memory runs out half way.

All earlier parts of a step (reading, forward, loss, backward, exchange, unscaling, clipping) write only gradients, so
dropping the gradients undoes them. The update is not undone but finished: one that stopped half way continues after
memory was released, and ends with the same bits as one that never stopped. This needs no second copy of the weights.

Why that is exact. All moments exist before the first step (`models.optimizer`), so an update allocates next to nothing.
The fused kernel updates each parameter group in one call that allocates nothing: it fails before it writes, or it
completes. `_Journal` notes the completed calls without allocating. The gradients of their parameters are then hidden,
so the optimizer's next step updates only the others. A call of its own raises the step counters; they are set from a
copy taken at the start. Any other optimizer updates one parameter at a time. Copies of the parameter's weight and
moments, made at a moment when no activations are alive, are put back if the update stops.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.overrides import TorchFunctionMode

from tightfit.models.optimizer import parts_of

T = TypeVar("T")
_FUSED = (torch._fused_adamw_, torch._fused_adam_, torch._fused_sgd_)


class Update:
    """One optimizer update from complete, unscaled gradients; after an error call `go_on` again until it returns."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self._optimizer, self._scaler = optimizer, scaler
        self._parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._journal = _Journal(max(len(self._parameters), len(optimizer.param_groups)))
        self._counters: Tensor | None = None
        self._stepped = False

    @property
    def has_written(self) -> bool:
        """True once any parameter has its new value."""
        return self._stepped or self._journal.count > 0

    def go_on(self) -> None:
        """Update the remaining parameters, then the scaler, and drop the gradients."""
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
        """Restore an optimizer that has not written any parameter."""
        if self._counters is not None:
            self._set_counters()
        reset_scaler(self._optimizer, self._scaler)

    def _step_fused(self) -> None:
        self._set_counters()
        for parameter in self._journal.updated:
            parameter.grad = None
        _forget_scale(self._optimizer)
        if self._scaler.is_enabled():
            self._scaler._per_optimizer_states[id(self._optimizer)]["stage"] = OptState.UNSCALED
        if len(self._journal.updated) < len(self._parameters):
            with self._journal:
                self._scaler.step(self._optimizer)

    def _set_counters(self) -> None:
        """Copy the step counters at the first call; at a later one set them as the journal has it."""
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
        """Update one parameter after the other, for optimizers with many kernels; restore one that fails."""
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
        finally:  # after an error some are left
            for alone, grad in waiting[self._journal.count - before :]:
                alone[0].grad = grad


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if a step is one kernel for each parameter group, which cannot stop half way."""
    known = type(optimizer) in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
    return known and all(group.get("fused") for group in optimizer.param_groups)


def reset_scaler(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Make the scaler forget a step that was begun; its scale changes only when a step ends."""
    _forget_scale(optimizer)
    if scaler.is_enabled():
        scaler._per_optimizer_states.pop(id(optimizer), None)


class _Journal(TorchFunctionMode):
    """Notes of the calls that updated their parameters, and of the scale's update, in memory allocated before."""

    def __init__(self, most_calls: int) -> None:
        super().__init__()
        self._calls: list[list[Tensor]] = [[]] * most_calls
        self.count = 0
        self.scale_updated = False

    def __torch_function__(
        self,
        func: Callable[..., T],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> T:
        result = func(*args, **(kwargs or {}))
        if func in _FUSED:
            self.note(cast(list[Tensor], args[0]))
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

    @torch.no_grad()
    def put_back() -> None:
        for tensor, saved in zip(written, before, strict=True):
            tensor.copy_(saved)
        for key in set(state) - keys:  # made by this step, which did not happen
            del state[key]

    with ExitStack() as on_error:
        on_error.callback(put_back)
        optimizer.step()
        on_error.pop_all()


def _found_inf(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Tensor | None:
    """Return 1 if the gradients are not finite, so that no update happens, else 0; None without a scaler."""
    if not scaler.is_enabled():
        return None
    found = list(scaler._found_inf_per_device(optimizer).values())
    return torch.stack([each.to(found[0].device) for each in found]).sum().clamp(max=1) if found else None


def _forget_scale(optimizer: torch.optim.Optimizer) -> None:
    """Delete the attributes that GradScaler.step sets on the optimizer during a step, and leaves after an error."""
    for name in ("grad_scale", "found_inf"):
        if hasattr(optimizer, name):
            delattr(optimizer, name)
