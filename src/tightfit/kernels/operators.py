"""Memory that PyTorch's CUDA operators take from the caching allocator inside their bodies, where no tensor shows it.

Each operator has one row, with its source. An operator without a row takes no such memory, as far as is known. Sizes
follow the sources around torch 2.13, and those of 2.4 for versions before 2.7. `NOT_MODELLED` lists the gaps.
Paths are below `aten/src/ATen/native/cuda` unless given in full.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tightfit.kernels.blas import Workspace, workspaces
from tightfit.kernels.card import Card
from tightfit.kernels.fused_attention import choose_attention
from tightfit.kernels.reduction import take_reduction
from tightfit.kernels.sorting import PAIR_WITH_INDEX
from tightfit.kernels.temporaries import (
    HALF,
    ROWS,
    Argument,
    Dims,
    Hidden,
    Temporaries,
    accumulate_type,
    ceil_div,
    contiguous_copy,
    nbytes,
    row,
)

if TYPE_CHECKING:
    from torch._ops import OpOverload

__all__ = [
    "NOT_MODELLED",
    "WITH_OWN_KERNEL",
    "Hidden",
    "Workspace",
    "choose_attention",
    "hidden_bytes",
    "workspaces",
]

NOT_MODELLED: tuple[str, ...] = (
    "Workspaces of cuDNN: convolutions, and attention on cards that choose cuDNN for it.",
    "Scratch memory of unique, nonzero and masked_select, whose sizes depend on data.",
    "Workspaces of cuSOLVER, cuSPARSE and cuFFT.",
    "Batch normalisation's staging buffers.",
    "Composite operators that run several kernels inside one call and have no row, such as binary cross entropy.",
    "Kernels of Triton, NCCL and other libraries, and memory outside PyTorch's allocator.",
)

WITH_OWN_KERNEL: tuple[str, ...] = ("_fused_rms_norm", "mish_backward", "silu_backward")
"""Operators that CUDA runs as one kernel, and that torch takes apart on a device without a kernel of its own.

In native_functions.yaml they have an entry for CUDA and one for CompositeImplicitAutograd; torch 2.13 has these three.
"""


def hidden_bytes(
    func: "OpOverload", args: Sequence[Argument], kwargs: Mapping[str, Argument], card: Card
) -> Hidden | None:
    """Return the temporaries of one call of an operator; None if it takes none or is unknown. Reads no data."""
    found = ROWS.get(func.overloadpacket._qualified_op_name)
    if found is None:
        return None
    temporaries = Temporaries()
    found(temporaries, card, *args, **kwargs)
    return temporaries.hidden()


# Losses: Loss.cu, NLLLoss2d.cu, SoftMax.cu, ATen/native/Loss.cpp


@row("nll_loss_forward", "nll_loss2d_forward")
def _nll(
    t: Temporaries, card: Card, input: Tensor, target: Tensor, weight: Tensor | None, *_: object, **__: object
) -> None:
    """Take copies of tensors that are not contiguous, and no more: one block adds up the whole loss."""
    t.outputs()
    for tensor in (input, target, weight):
        t.take(contiguous_copy(tensor))


@row("nll_loss_backward", "nll_loss2d_backward")
def _nll_backward(
    t: Temporaries,
    card: Card,
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *_: object,
    **__: object,
) -> None:
    t.outputs()
    for tensor in (target, weight):
        t.take(contiguous_copy(tensor))


@row("_log_softmax", "_softmax")
def _softmax(t: Temporaries, card: Card, input: Tensor, *_: object, **__: object) -> None:
    t.outputs()
    t.take(contiguous_copy(input))


@row("_log_softmax_backward_data")
def _log_softmax_backward(t: Temporaries, card: Card, grad: Tensor, output: Tensor, *_: object, **__: object) -> None:
    t.outputs()
    t.take(contiguous_copy(grad))
    t.take(contiguous_copy(output))


@row("_softmax_backward_data")
def _softmax_backward(t: Temporaries, card: Card, grad: Tensor, output: Tensor, *_: object, **__: object) -> None:
    """Multiply grad by output first, as softmax_backward_cuda_out does."""
    t.outputs()
    t.take(nbytes(output, torch.promote_types(grad.dtype, output.dtype)))
    t.take(contiguous_copy(output))


@row("_safe_softmax")
def _safe_softmax(t: Temporaries, card: Card, input: Tensor, dim: int, dtype: torch.dtype | None = None) -> None:
    """Fill fully masked rows with zero, for math attention: ATen/native/transformers/attention.cpp.

    torch 2.6 compares with a tensor and keeps the softmax; 2.11 (at the latest) calls isneginf and overwrites it.
    """
    out = dtype or input.dtype
    masked, rows = input.numel(), input.numel() // max(1, input.shape[dim])
    if card.torch_version >= (2, 11):
        t.outputs()
        t.scratch(contiguous_copy(input))
        for size in (masked, rows, out.itemsize):
            t.take(size)
    else:
        for size in (nbytes(input, out), out.itemsize, masked, rows, out.itemsize):
            t.take(size)
        t.outputs()


@row("mse_loss", "smooth_l1_loss")
def _elementwise_loss(
    t: Temporaries, card: Card, input: Tensor, target: Tensor, reduction: int = 1, *_: object, **__: object
) -> None:
    t.outputs()
    if reduction:
        loss = torch.empty(input.shape, dtype=input.dtype, device="meta")
        t.take(nbytes(loss))
        take_reduction(t, card, loss, None, accumulate_type(loss.dtype).itemsize)


@row("huber_loss")
def _huber_loss(
    t: Temporaries, card: Card, input: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0
) -> None:
    """Make the elementwise loss first; the output is its `mean` or `sum`: ATen/native/Loss.cpp."""
    if not reduction:
        return
    t.take(nbytes(input))
    t.outputs()
    loss = torch.empty(input.shape, dtype=input.dtype, device="meta")
    take_reduction(t, card, loss, None, accumulate_type(loss.dtype).itemsize)


# Normalisation: layer_norm_kernel.cu


def _gamma_beta(
    t: Temporaries, card: Card, shape: Sequence[int], rows: int, wanted: int, dtype: torch.dtype, acc: int = 4
) -> None:
    """Add up many narrow rows in two passes: LaunchGammaBetaBackwardCUDAKernel, from torch 2.8 (148605).

    Each block of rows writes a partial gradient. Then `sum(0)` makes the final tensors, which replace the first ones.
    """
    columns = math.prod(shape)
    if card.torch_version < (2, 8) or not wanted or rows <= 64 * 1024 or columns // 32 >= card.sm_count // 2:
        return
    blocks = min(32 * 1024 // ceil_div(columns, 32), ceil_div(rows, 32))
    partial = torch.empty((blocks, columns), dtype=dtype, device="meta")
    for _ in range(wanted):
        t.take(nbytes(partial))
    for _ in range(wanted):
        replaced = t.take(columns * dtype.itemsize)
        take_reduction(t, card, partial, (0,), accumulate_type(dtype).itemsize)
        t.free(replaced)


@row("native_layer_norm", "_fused_rms_norm")
def _layer_norm(
    t: Temporaries, card: Card, input: Tensor, normalized_shape: Sequence[int], *rest: Argument, **__: object
) -> None:
    for tensor in (input, *rest):
        if isinstance(tensor, Tensor):
            t.take(contiguous_copy(tensor))
    t.outputs()


@row("native_layer_norm_backward")
def _layer_norm_backward(
    t: Temporaries,
    card: Card,
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> None:
    for tensor in (input, weight, bias):
        t.take(contiguous_copy(tensor))
    t.outputs()
    t.take(contiguous_copy(grad_out))
    rows = input.numel() // max(1, math.prod(normalized_shape))
    dtype = weight.dtype if weight is not None else input.dtype
    _gamma_beta(t, card, normalized_shape, rows, sum(map(bool, output_mask[1:])), dtype)


@row("_fused_rms_norm_backward")
def _rms_norm_backward(
    t: Temporaries,
    card: Card,
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> None:
    for tensor in (input, weight):
        t.take(contiguous_copy(tensor))
    t.outputs()
    t.take(contiguous_copy(grad_out))
    rows = input.numel() // max(1, math.prod(normalized_shape))
    dtype = weight.dtype if weight is not None else input.dtype
    _gamma_beta(t, card, normalized_shape, rows, int(output_mask[1]), dtype)


@row("native_group_norm")
def _group_norm(
    t: Temporaries,
    card: Card,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: int,
    channels: int,
    pixels: int,
    *_: object,
) -> None:
    """Take a scale and a shift for each sample and channel: group_norm_kernel.cu."""
    t.outputs()
    if pixels > 1 and (weight is not None or bias is not None):
        each = batch * channels * accumulate_type(input.dtype).itemsize
        t.take(each)
        t.take(each)


@row("native_group_norm_backward")
def _group_norm_backward(
    t: Temporaries,
    card: Card,
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    batch: int,
    channels: int,
    pixels: int,
    groups: int,
    output_mask: Sequence[bool],
) -> None:
    t.outputs()
    item = accumulate_type(input.dtype).itemsize
    t.take(batch * channels * item)  # ds
    t.take(batch * channels * item)  # db
    if pixels > 1 and output_mask[0]:
        per_channel = batch * channels * item if weight is not None else 0
        t.scratch(batch * groups * item, batch * groups * item, per_channel)


# Reductions: Reduce.cuh, ReduceSumProdKernel.cu, ReduceMomentKernel.cu, ReduceNormKernel.cu, ...


def _dims(dim: Dims) -> Sequence[int] | None:
    return (dim,) if isinstance(dim, int) else dim


@row("sum", "mean", "nansum", "prod")
def _sum(
    t: Temporaries,
    card: Card,
    input: Tensor,
    dim: Dims = None,
    *_: object,
    dtype: torch.dtype | None = None,
    **__: object,
) -> None:
    """Cast to another type first, except for half types summed in float32 (make_reduction)."""
    t.outputs()
    floating = input.is_floating_point() or input.is_complex()
    out = dtype or (input.dtype if floating else torch.int64)
    read = input.dtype if input.dtype in HALF and out is torch.float32 else out
    cast = t.take(nbytes(input, read)) if read is not input.dtype else None
    take_reduction(t, card, input, _dims(dim), accumulate_type(out).itemsize, dtype=read, out_dtype=out)
    t.free(cast)


@row("linalg_vector_norm")
def _vector_norm(
    t: Temporaries,
    card: Card,
    input: Tensor,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    **__: object,
) -> None:
    out = dtype or input.dtype
    _sum(t, card, input, dim, dtype=out)


@row("norm")
def _norm(
    t: Temporaries,
    card: Card,
    input: Tensor,
    p: float = 2,
    dim: Dims = None,
    *_: object,
    dtype: torch.dtype | None = None,
    **__: object,
) -> None:
    _sum(t, card, input, dim, dtype=dtype or input.dtype)


@row("amax", "amin", "any", "all")
def _extreme(t: Temporaries, card: Card, input: Tensor, dim: Dims = None, *_: object, **__: object) -> None:
    t.outputs()
    take_reduction(t, card, input, _dims(dim), input.dtype.itemsize, in_output=True)


@row("max", "min")
def _max(t: Temporaries, card: Card, input: Tensor, dim: Dims = None, *_: object, **__: object) -> None:
    """Reduce for max(x), and with indices for max(x, dim); max(x, other) needs no memory."""
    t.outputs()
    if dim is None:
        take_reduction(t, card, input, None, input.dtype.itemsize, in_output=True)
    elif isinstance(dim, int):
        take_reduction(t, card, input, (dim,), PAIR_WITH_INDEX, in_output=False)


@row("argmax", "argmin")
def _argmax(t: Temporaries, card: Card, input: Tensor, dim: int | None = None, *_: object, **__: object) -> None:
    t.outputs()
    take_reduction(t, card, input, _dims(dim), PAIR_WITH_INDEX, out_dtype=torch.int64, in_output=False)


@row("var", "std", "var_mean", "std_mean")
def _var(t: Temporaries, card: Card, input: Tensor, dim: Dims = None, *_: object, **__: object) -> None:
    """Reduce WelfordData: mean, m2, an int32 count and the same as a float."""
    t.outputs()
    item = 32 if input.dtype is torch.float64 else 16
    take_reduction(t, card, input, _dims(dim) if not isinstance(dim, bool) else None, item, in_output=False)


@row("logsumexp")
def _logsumexp(t: Temporaries, card: Card, input: Tensor, dim: Dims, *_: object, **__: object) -> None:
    """Compute log(sum(exp(x - max))) + max with a difference as large as the input: ATen/native/ReduceOps.cpp."""
    dims = _dims(dim) or range(input.dim())
    kept = math.prod(size for d, size in enumerate(input.shape) if d not in {x % input.dim() for x in dims})
    t.take(kept * input.dtype.itemsize)  # maxes
    take_reduction(t, card, input, dims, input.dtype.itemsize, in_output=True)
    t.scratch(kept * input.dtype.itemsize, kept)  # maxes.abs() == inf
    difference = t.take(nbytes(input))
    t.outputs()
    take_reduction(t, card, input, dims, accumulate_type(input.dtype).itemsize)
    t.free(difference)


# Lists of tensors: ForeachReduceOp.cu, MultiTensorApply.cuh

_CHUNK = 65536


@row("_foreach_norm", "_foreach_powsum")
def _foreach_norm(
    t: Temporaries, card: Card, tensors: Sequence[Tensor], ord: float = 2, dtype: torch.dtype | None = None
) -> None:
    """Take one value for each 65,536 elements of the longest tensor, for every tensor."""
    if ord not in (0, 1, 2, math.inf) or not tensors or any(not x.is_floating_point() for x in tensors):
        return
    _foreach_partials(t, tensors, accumulate_type(dtype or tensors[0].dtype).itemsize)


@row("_foreach_max")
def _foreach_max(t: Temporaries, card: Card, tensors: Sequence[Tensor]) -> None:
    if tensors:
        _foreach_partials(t, tensors, tensors[0].dtype.itemsize)


def _foreach_partials(t: Temporaries, tensors: Sequence[Tensor], item: int) -> None:
    chunks = max(ceil_div(x.numel(), _CHUNK) for x in tensors)
    t.take(len(tensors) * chunks * item)
    t.outputs()


# Copies between host and device: Copy.cu (copy_kernel_cuda)


@row("copy_")
def _copy(t: Temporaries, card: Card, to: Tensor, source: Tensor, non_blocking: bool = False) -> None:
    t.outputs()
    _across(t, source, to.dtype, to.device.type, non_blocking)


@row("_to_copy")
def _to_copy(
    t: Temporaries,
    card: Card,
    source: Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **__: object,
) -> None:
    t.outputs()
    _across(t, source, dtype or source.dtype, torch.device(device or source.device).type, non_blocking)


def _across(t: Temporaries, source: Tensor, dtype: torch.dtype, to: str, non_blocking: bool) -> None:
    """Convert types on the host, unless the copy does not block. Strided memory becomes dense where it lies."""
    if {source.device.type, to} != {"cpu", "cuda"}:
        return
    converts = dtype is not source.dtype
    if to == "cuda" and non_blocking and converts:
        t.take(nbytes(source))
    elif to == "cpu" and non_blocking and converts:
        t.take(nbytes(source, dtype))
    elif to == "cpu":
        t.take(contiguous_copy(source))
