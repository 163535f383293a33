"""Keep the optimizer, gradients and full weights in host memory; the device keeps only the weights of a pass.

This is ZeRO-Offload's split (Ren et al. 2021, arXiv 2101.06840). A complete gradient leaves the device at once and is
added up in host memory. There AdamW updates the float32 weights, and the device gets them back after the update.
Block matrices live on the device in autocast's dtype, the others as they were, so a step computes the same as without
offloading. In bfloat16 a parameter takes 2 bytes on the device instead of 18, and 16 on the host. It works for one
process. A model compiled as one graph would make all gradients at once; compiled block by block, it makes those of one
block at a time.
"""

from functools import partial

import torch
from torch import Tensor, nn

from tightfit.models.model import GPT


class Offload:
    """Full weights and gradients of a model on the host, while its parameters are on a device."""

    def __init__(self, model: GPT, device: torch.device, dtype: torch.dtype) -> None:
        """Move `model` from the host to `device`, its blocks' matrices in `dtype`, that of autocast."""
        self._pinned = device.type == "cuda"
        low = {id(each.weight) for each in model.transformer["h"].modules() if isinstance(each, nn.Linear)}
        self.masters: dict[nn.Parameter, nn.Parameter] = {}
        """The full weight in host memory of each parameter, in the model's order."""
        self._sums: dict[nn.Parameter, Tensor] = {}
        for parameter in model.parameters():
            master = nn.Parameter(self._on_host(parameter.detach()))
            self.masters[parameter] = master
            self._sums[parameter] = self._on_host(torch.zeros_like(master.detach()))
            parameter.data = parameter.detach().to(device, dtype if id(parameter) in low else None, copy=True)
            parameter.register_post_accumulate_grad_hook(partial(self._take, master))
        largest = max(self._sums.values(), key=Tensor.numel).flatten()
        self._staging = {
            kind: self._on_host(torch.zeros_like(largest, dtype=kind))
            for kind in {parameter.dtype for parameter in self.masters}
        }

    def _on_host(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pinned else tensor

    def _take(self, master: nn.Parameter, parameter: Tensor) -> None:
        """Move a complete gradient off the device and add it to those of earlier passes of the step."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        arrived, total = self._staged(parameter), self._sums[parameter]
        arrived.copy_(parameter.grad)
        parameter.grad = None
        if master.grad is None:
            master.grad = total.copy_(arrived)
        else:
            total.add_(arrived)

    def _staged(self, parameter: nn.Parameter) -> Tensor:
        """Return host memory of the parameter's shape and dtype, valid until the next call."""
        return self._staging[parameter.dtype][: parameter.numel()].view_as(parameter)

    @torch.no_grad()
    def return_weights(self) -> None:
        """Copy the updated weights to the device; needs no memory there, so it never fails half way."""
        for parameter, master in self.masters.items():
            parameter.copy_(self._staged(parameter).copy_(master))

    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's state with the host's weights in it."""
        state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        return {
            name: (self.masters.get(value, value) if isinstance(value, nn.Parameter) else value).detach()
            for name, value in state.items()
        }
