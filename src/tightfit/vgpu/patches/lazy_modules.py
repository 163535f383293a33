"""Lazy modules: parameters without a shape remember the device that `.cuda()` asks for until they get one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from tightfit.vgpu.assign import assign

_ASKED = "tightfit_asked_for"


def install() -> None:
    """Patch this process for good."""
    usual: Callable[..., None] = UninitializedParameter.materialize

    def materialize(
        tensor: UninitializedParameter,
        shape: Sequence[int],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        asked = getattr(tensor, _ASKED, None)
        if not isinstance(asked, Tensor):
            usual(tensor, shape, device, dtype)
            return
        made = torch.empty(shape, device=device or asked.device, dtype=dtype or asked.dtype)
        assign(tensor, data=made)
        if not isinstance(tensor, FakeTensor):  # else it has become a parameter already
            assign(tensor, __class__=vars(type(tensor))["cls_to_become"])

    assign(UninitializedParameter, UninitializedBuffer, materialize=materialize)


def is_moved(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> bool:
    """Return True for a tensor without a shape, which remembers where `function` moves tensors of its type."""
    if not is_lazy(tensor):
        return False
    before = getattr(tensor, _ASKED, torch.empty(0, dtype=tensor.dtype, device="cpu"))
    setattr(tensor, _ASKED, function(before))
    return True
