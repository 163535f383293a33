"""Batch normalisation as cuDNN runs it, which a build of torch without CUDA never chooses.

Follows ATen/native/Normalization.cpp. In evaluation cuDNN keeps no statistics. Its backward pass lays the incoming
gradient out anew where it is not dense. Instance normalisation comes the same way.
"""

import torch
from torch import Tensor, library

from tightfit.kernels.temporaries import Argument
from tightfit.vgpu.patches import backend

aten = torch.ops.aten

_MOST_ELEMENTS = 2**31 - 1
"""Some kernels of cuDNN count in 32 bits."""
_LARGEST_BATCH = {True: 880801, False: 65535}
"""Inputs of a batch, in training and in evaluation."""
_CUDNN = 1
"""The number of cuDNN's kernels among those of the operator."""


def install() -> None:
    """Patch this process for good, where torch has not been built with cuDNN."""
    if torch._C._has_cudnn:
        return
    operators = library.Library("aten", "IMPL")
    for key in ("AutogradCUDA", "CUDA"):
        operators.impl("_batch_norm_impl_index", _normalised, key, allow_override=True)
    backend.KEPT.append(operators)


def _normalised(
    data: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    is_enabled: bool,
) -> Argument:
    parts = (weight, bias, mean, variance)
    if weight is None or bias is None or not _takes_cudnn(data, weight, parts, training):
        func = aten._batch_norm_impl_index.default
        plain: Argument = func._op_dk(
            torch._C.DispatchKey.CompositeImplicitAutograd, data, *parts, training, momentum, eps, is_enabled
        )
        return plain
    running = [None if part is None else part.contiguous() for part in (mean, variance)]
    data = data.contiguous(memory_format=torch._prims_common.suggest_memory_format(data))
    found: tuple[Tensor, ...] = aten.cudnn_batch_norm.default(
        data, weight.contiguous(), bias.contiguous(), *running, training, momentum, eps
    )
    return (*found, _CUDNN)


def _takes_cudnn(data: Tensor, weight: Tensor, parts: tuple[Tensor | None, ...], training: bool) -> bool:
    """Follow `_select_batch_norm_backend`; what torch refuses goes its plain way, with its message."""
    given = [part for part in parts if part is not None]
    is_of_type = torch.bfloat16 not in (data.dtype, weight.dtype) and (
        data.dtype != torch.float16 or weight.dtype == torch.float32
    )
    is_whole = len(given) == len(parts) or (training and parts[2:] == (None, None))
    if not (torch.backends.cudnn.enabled and is_of_type and is_whole and data.dim() > 2 and data.numel()):
        return False
    has_room = data.shape[0] <= _LARGEST_BATCH[training] and data.numel() < _MOST_ELEMENTS
    return has_room and all(part.numel() == data.shape[1] for part in given)
