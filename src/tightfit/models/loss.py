"""The language-model loss: cross entropy from hidden states and the vocabulary matrix, without storing all logits.

Shapes: n tokens, c channels, v vocabulary, r the rows (tokens) of one chunk.
"""

from collections.abc import Callable, Iterable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.errors import ConfigError
from tightfit.models.autograd import Context
from tightfit.wording import say

LossKind = Literal["auto", "chunked", "full", "liger"]
IGNORED = -1
"""Target of a token that is left out of the loss, as in nanoGPT."""

# Logits of one chunk, bytes. Every chunk after the first pays a pass over the (v, c) weight gradient.
_CHUNK_BYTES = 64 * 2**20
# Rows of a chunk are a multiple of it where they can be: tensor cores want whole tiles.
_ALIGNED = 64
# Rows of the weight gradient that a chunk adds at a time: a small block is added, not a second gradient.
_SLAB_ROWS = 8192
# Float32 logits worked on at a time on the CPU: the tile stays in cache between its passes.
_CPU_TILE_BYTES = 4 * 2**20
# Below this the whole logits cost less than the bookkeeping of chunks saves.
_FULL_LOGITS_BYTES = 16 * 2**20


def token_loss(
    hidden_nc: Tensor, weight_vc: Tensor, targets_n: Tensor, *, scale: float = 1.0, kind: LossKind = "auto"
) -> Tensor:
    """`scale` times the sum over targets other than -1 of the cross entropy; a float32 scalar.

    `scale` belongs in here, not behind: gradients are made in the forward pass and take it in without a pass
    of their own. `auto` keeps the logits when they are small, and otherwise works in chunks: through
    `F.linear_cross_entropy` for float32 on CUDA where torch has it (2.13 on), and our own elsewhere. In bfloat16
    torch's returns the loss itself in bfloat16, 1 to 2% off, and on the CPU it takes 1.7 to 20 times as long.
    """
    if kind == "auto":
        kind = "full" if logits_bytes(hidden_nc, weight_vc) <= _FULL_LOGITS_BYTES else "chunked"
    if kind == "full":
        logits = F.linear(hidden_nc, weight_vc)
        return F.cross_entropy(logits.float(), targets_n, ignore_index=IGNORED, reduction="sum") * scale
    if kind == "liger":
        return _liger(hidden_nc, weight_vc, targets_n) * scale
    on_cuda, dtype = hidden_nc.device.type == "cuda", _compute_dtype(hidden_nc)
    if on_cuda and dtype == torch.float32 and hasattr(F, "linear_cross_entropy"):
        return _linear_cross_entropy(hidden_nc, weight_vc, targets_n) * scale
    with_grad = torch.is_grad_enabled() and (hidden_nc.requires_grad or weight_vc.requires_grad)
    # Cast out here: the float32 gradient is then autograd's own, which adds the embedding's gradient to it in place.
    out: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_nc.to(dtype), weight_vc.to(dtype), targets_n, scale, with_grad
    )
    return out


def logits_bytes(hidden_nc: Tensor, weight_vc: Tensor) -> int:
    """Bytes of the float32 logits that the full loss holds."""
    return hidden_nc.shape[0] * weight_vc.shape[0] * 4


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _linear_cross_entropy(hidden_nc: Tensor, weight_vc: Tensor, targets_n: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=torch.compiler.is_compiling())
    loss: Tensor = F.linear_cross_entropy(
        hidden_nc, weight_vc, targets_n, reduction="sum", ignore_index=IGNORED, options=options
    )
    return loss


def _liger(hidden_nc: Tensor, weight_vc: Tensor, targets_n: Tensor) -> Tensor:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        raise ConfigError(say("models.loss.no_liger")) from None
    if hidden_nc.device.type != "cuda":
        raise ConfigError(say("models.loss.liger_on", device=hidden_nc.device.type))
    dtype = _compute_dtype(hidden_nc)
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")
    out: Tensor = loss(weight_vc.to(dtype), hidden_nc.to(dtype), targets_n)
    return out.float()


class _ScaledContext(Context, Protocol):
    outer: float


class _ChunkedLoss(torch.autograd.Function):
    """Logits of a chunk of rows at a time, in one reused buffer that its gradient then overwrites.

    The gradients of hidden states and weight are made in the forward pass: no logits are computed twice.
    """

    @staticmethod
    def forward(
        ctx: _ScaledContext, hidden_nc: Tensor, weight_vc: Tensor, targets_n: Tensor, scale: float, with_grad: bool
    ) -> Tensor:
        # float16 ends at 6e-8: there the scale waits for the incoming gradient, which has a GradScaler's factor.
        inner = 1.0 if hidden_nc.dtype == torch.float16 else scale
        n, v = hidden_nc.shape[0], weight_vc.shape[0]
        rows = _chunk_rows(n, weight_vc)
        logits_rv = hidden_nc.new_empty(rows, v)
        grad_hidden = torch.empty_like(hidden_nc) if with_grad else None
        grad_weight: Tensor | None = None
        loss = hidden_nc.new_zeros((), dtype=torch.float32)
        for chunk in chunks(n, rows):
            logits = logits_rv[: chunk.stop - chunk.start]
            torch.mm(hidden_nc[chunk], weight_vc.t(), out=logits)
            loss += _consume(logits, targets_n[chunk], inner, with_grad)
            if grad_hidden is not None:
                torch.mm(logits, weight_vc, out=grad_hidden[chunk])
                grad_weight = _add_weight_grad(grad_weight, logits, hidden_nc[chunk], only=rows == n)
        del logits, logits_rv
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_vc.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.outer = 1.0 if inner == scale else scale
        return loss * scale

    @staticmethod
    def backward(ctx: _ScaledContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        g = grads[0] * ctx.outer
        if g.device.type != "cpu" or torch.compiler.is_compiling() or g.item() != 1.0:
            grad_hidden, grad_weight = grad_hidden * g, grad_weight * g
        return grad_hidden, grad_weight, None, None, None


def _chunk_rows(n: int, weight_vc: Tensor) -> int:
    """Return the rows of one chunk: all n up to two chunks' worth, since one chunk needs no float32 gradient sum."""
    row_bytes = weight_vc.shape[0] * weight_vc.element_size()
    rows = max(1, _CHUNK_BYTES // row_bytes)
    return n if n * row_bytes <= 2 * _CHUNK_BYTES else rows - rows % _ALIGNED if rows > _ALIGNED else rows


def all_chunks(n: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


chunks: Callable[[int, int], Iterable[slice]] = all_chunks
"""Slices of n tokens, of so many rows each but the last; a trace of a step leaves out most of those that are alike."""


def _add_weight_grad(total_vc: Tensor | None, logits_rv: Tensor, hidden_rc: Tensor, *, only: bool) -> Tensor:
    """Add this chunk's weight gradient: in low precision if it is the only chunk, else to a float32 sum."""
    if only:
        return logits_rv.t() @ hidden_rc
    v = logits_rv.shape[1]
    if total_vc is None:
        total_vc = hidden_rc.new_zeros(v, hidden_rc.shape[1], dtype=torch.float32)
    for start in range(0, v, _SLAB_ROWS):
        slab = slice(start, start + _SLAB_ROWS)
        total_vc[slab] += logits_rv[:, slab].t() @ hidden_rc
    return total_vc


def _consume(logits_rv: Tensor, targets_r: Tensor, scale: float, with_grad: bool) -> Tensor:
    """Return the sum of these rows' cross entropies; overwrite the logits with their gradient times `scale`."""
    counted_r = targets_r != IGNORED
    index_r1 = targets_r.clamp_min(0).unsqueeze(1)
    rows = logits_rv.shape[0]
    tile = max(1, _CPU_TILE_BYTES // (logits_rv.shape[1] * 4)) if logits_rv.device.type == "cpu" else rows
    total = logits_rv.new_zeros((), dtype=torch.float32)
    for start in range(0, rows, tile):
        part = slice(start, start + tile)
        log_p = torch.log_softmax(logits_rv[part], dim=-1, dtype=torch.float32)
        total -= (log_p.gather(1, index_r1[part]).squeeze(1) * counted_r[part]).sum()
        if with_grad:
            grad = log_p.exp_()
            weight_r1 = (counted_r[part] * scale).unsqueeze(1).to(grad.dtype)
            grad.scatter_add_(1, index_r1[part], torch.full_like(weight_r1, -1.0))
            torch.mul(grad, weight_r1, out=grad)
            logits_rv[part] = grad
    return total
