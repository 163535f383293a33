"""Causal self-attention: which kernel computes it.

Shapes: b sequences, t tokens, h heads, d channels a head, s the rows of one tile, n = b * h.
"""

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.models.autograd import Context

# Rows of queries in one tile. 128 was the fastest of 64, 128 and 256 on an AVX512-BF16 processor with 2 cores
# (4 x 12 heads x 256 tokens: 8.3 ms forward and backward, against 9.2 and 13.6, and 18.5 of torch's kernel).
_TILE_ROWS = 128
# Scores alive at once (8 MiB in bfloat16): the tile stays in a shared cache, whatever the batch.
_TILE_SCORES = 4 * 2**20


def causal_attention(qkv: Tensor, n_head: int, *, dropout: float = 0.0) -> Tensor:
    """softmax(mask(q k^T / sqrt(d))) v for packed projections qkv (b, t, 3 h d); returns (b, t, h d).

    The processor's bfloat16 goes through tiles of our own: torch 2.13's CPU kernel takes about twice as long.
    Everything else goes to `scaled_dot_product_attention`.
    """
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and dropout == 0.0:
        out: Tensor = _TiledAttention.apply(qkv, n_head)  # type: ignore[no-untyped-call]
        return out
    b, t, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (x.view(b, t, n_head, -1).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return y.transpose(1, 2).reshape(b, t, channels)


class KeyValueCache:
    """Keys and values of the tokens already seen by each block, for sampling: (b, h, t, d) pairs."""

    def __init__(self, n_layer: int) -> None:
        self.keys: list[Tensor | None] = [None] * n_layer
        self.values: list[Tensor | None] = [None] * n_layer

    @property
    def length(self) -> int:
        """Tokens held."""
        return 0 if self.keys[0] is None else self.keys[0].shape[2]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past_k, past_v = self.keys[layer], self.values[layer]
        if past_k is not None and past_v is not None:
            k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        self.keys[layer], self.values[layer] = k, v
        return k, v


def cached_attention(qkv: Tensor, n_head: int, cache: KeyValueCache, layer: int) -> Tensor:
    """Attention of new tokens, packed (b, t, 3 h d), to themselves and to those in `cache`; extends it."""
    b, t, packed = qkv.shape
    q, k, v = (z.view(b, t, n_head, -1).transpose(1, 2) for z in qkv.chunk(3, dim=2))
    k, v = cache.extend(layer, k, v)
    visible = torch.ones(t, k.shape[2], dtype=torch.bool, device=qkv.device).tril(k.shape[2] - t)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return y.transpose(1, 2).reshape(b, t, packed // 3)


class _HeadsContext(Context, Protocol):
    n_head: int


class _TiledAttention(torch.autograd.Function):
    """Attention over tiles of query rows, which skips the keys that a tile cannot see.

    Scores are recomputed in backward, so that only q, k and v are kept.
    """

    @staticmethod
    def forward(ctx: _HeadsContext, qkv: Tensor, n_head: int) -> Tensor:
        b, t, packed = qkv.shape
        q, k, v = _split_heads(qkv, n_head)
        q = q * (1.0 / math.sqrt(q.shape[-1]))
        out_ntd = torch.empty_like(q)
        for heads in _head_groups(q):
            for rows, seen in _tiles(t):
                weights = _weights(q[heads, rows], k[heads, seen], rows)
                out_ntd[heads, rows] = torch.bmm(weights, v[heads, seen])
        ctx.save_for_backward(q, k, v)
        ctx.n_head = n_head
        return out_ntd.view(b, n_head, t, -1).transpose(1, 2).reshape(b, t, packed // 3)

    @staticmethod
    def backward(ctx: _HeadsContext, *grads: Tensor) -> tuple[Tensor, None]:
        q, k, v = ctx.saved_tensors
        n, t, d = q.shape
        b = n // ctx.n_head
        g = grads[0].view(b, t, ctx.n_head, d).transpose(1, 2).reshape(n, t, d)
        grad_qkv = q.new_empty(3, n, t, d)
        for heads in _head_groups(q):
            grad_k, grad_v = (torch.zeros(k[heads].shape, dtype=torch.float32) for _ in range(2))
            for rows, seen in _tiles(t):
                q_tile, g_tile, k_tile = q[heads, rows], g[heads, rows], k[heads, seen]
                weights = _weights(q_tile, k_tile, rows)
                grad_weights = torch.bmm(g_tile, v[heads, seen].transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_v[:, seen] += torch.bmm(weights.transpose(1, 2), g_tile)
                grad_k[:, seen] += torch.bmm(grad_scores.transpose(1, 2), q_tile)
                torch.mul(torch.bmm(grad_scores, k_tile), 1.0 / math.sqrt(d), out=grad_qkv[0, heads, rows])
            grad_qkv[1, heads], grad_qkv[2, heads] = grad_k, grad_v
        return grad_qkv.view(3, b, ctx.n_head, t, d).permute(1, 3, 0, 2, 4).reshape(b, t, -1), None


def _split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    b, t, packed = qkv.shape
    d = packed // (3 * n_head)
    q, k, v = qkv.view(b, t, 3, n_head, d).permute(2, 0, 3, 1, 4).reshape(3, b * n_head, t, d).unbind(0)
    return q, k, v


def _head_groups(q_ntd: Tensor) -> list[slice]:
    n, t, _ = q_ntd.shape
    size = max(1, _TILE_SCORES // (min(t, _TILE_ROWS) * t))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _tiles(t: int) -> list[tuple[slice, slice]]:
    return [
        (slice(start, min(start + _TILE_ROWS, t)), slice(0, min(start + _TILE_ROWS, t)))
        for start in range(0, t, _TILE_ROWS)
    ]


def _weights(q_nsd: Tensor, k_ntd: Tensor, rows: slice) -> Tensor:
    scores = torch.bmm(q_nsd, k_ntd.transpose(1, 2))
    size = rows.stop - rows.start
    future = torch.full((size, size), -math.inf, dtype=scores.dtype).triu_(1)
    scores[:, :, rows] += future
    return torch.softmax(scores, dim=-1)
