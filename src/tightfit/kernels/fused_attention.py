"""Choice of the attention kernel on a card, and memory of flash and efficient attention besides their outputs.

The choice follows `sdp_utils.cpp` and `sdp_utils_cpp.h` (`select_sdp_backend`) for dense tensors on an NVIDIA card. The
math kernel needs no row here: it is a composite, and its operators are traced one by one.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tightfit.kernels.card import Card, Version
from tightfit.kernels.refused_types import refuse
from tightfit.kernels.temporaries import HALF, Temporaries, ceil_div, contiguous_copy, nbytes, round_up, row

aten = torch.ops.aten

BACKENDS = frozenset({"flash", "efficient", "cudnn", "math"})

_MIB_OF_SHARED_MEMORY = frozenset({(8, 0), (8, 7), (9, 0), (10, 0), (10, 1), (10, 3)})
"""Cards with 160 KiB of shared memory and more for a block; the others of 8.x and 12.x have 99 KiB."""


def enabled_backends() -> frozenset[str]:
    """Return the kernels that `torch.backends.cuda` and `torch.nn.attention.sdpa_kernel` allow now."""
    allowed = {
        "flash": torch._C._get_flash_sdp_enabled(),
        "efficient": torch._C._get_mem_efficient_sdp_enabled(),
        "cudnn": torch._C._get_cudnn_sdp_enabled(),
        "math": torch._C._get_math_sdp_enabled(),
    }
    return frozenset(name for name, allows in allowed.items() if allows)


def choose_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    card: Card,
    *,
    enabled: frozenset[str] | None = None,
    needs_grad: bool,
) -> str:
    """Return 'flash', 'efficient', 'cudnn' or 'math', for dense (batch, heads, tokens, head size) tensors.

    By default, `enabled` holds the kernels that torch allows now. RuntimeError, as in PyTorch, if none of them fits.
    """
    call = _Call(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa, card, needs_grad)
    enabled = enabled_backends() if enabled is None else enabled
    order = ["flash", "efficient", "math", "cudnn"]
    if prefers_cudnn(card):
        order = ["cudnn", "flash", "efficient", "math"]
    able = {"flash": call.flash, "efficient": call.efficient, "cudnn": call.cudnn}
    for name in order:
        if name in enabled and (name == "math" or able[name]()):
            return name
    raise RuntimeError("No available kernel. Aborting execution.")


def prefers_cudnn(card: Card) -> bool:
    """Return True for data-centre cards with a cuDNN above 9.15.0, from torch 2.10; before, it was opt-in.

    Follows `check_prefer_cudnn_attention`.
    """
    if card.torch_version < (2, 10) or card.cudnn_version <= 91500 or card.capability[0] not in (9, 10):
        return False
    return card.cuda_version >= (13, 0) or card.capability[1] in (0, 3)


class _Call:
    """One call of scaled_dot_product_attention, with a check for each kernel that could serve it."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        gqa: bool,
        card: Card,
        needs_grad: bool,
    ) -> None:
        self.q, self.k, self.v, self.mask = q, k, v, mask
        self.dropout, self.causal, self.gqa = dropout, causal, gqa
        self.card, self.needs_grad = card, needs_grad
        self.four_dims = q.dim() == k.dim() == v.dim() == 4

    def flash(self) -> bool:
        head = self.q.shape[-1]
        return (
            self.four_dims
            and self.mask is None
            and head == self.k.shape[-1] == self.v.shape[-1]
            and head <= 256
            and self._between((8, 0), self._newest())
            and not self._flash_backward_lacks(head)
            and (not self.causal or self.q.shape[-2] == self.k.shape[-2])
            and self._dtype_among(HALF)
            and self._heads_match(same_kv=True, gqa=True)
            and self._dense(singleton=True)
        )

    def efficient(self) -> bool:
        if not self.four_dims or not self._between((5, 0), self._newest()):
            return False
        align = self._gemm_alignment()
        head, value_head = self.q.shape[-1], self.v.shape[-1]
        sizes_fit = head == self.k.shape[-1] and all(size > 0 and size % align == 0 for size in (head, value_head))
        types = (*HALF, torch.float32) if self.card.capability[0] >= 8 else (torch.float16, torch.float32)
        return (
            sizes_fit
            and self._starts_aligned(align)
            and self._dense(singleton=False)
            and self._heads_match(same_kv=True, gqa=self.card.torch_version >= (2, 14))
            and self._dtype_among(types)
        )

    def cudnn(self) -> bool:
        version = self.card.cudnn_version
        if not self.four_dims or (self.dropout > 0 and 91100 < version < 91400):
            return False
        tokens_q, tokens_k = self.q.shape[2], self.k.shape[2]
        half = HALF if self.card.capability[0] >= 8 else (torch.float16,)
        return (
            self._dtype_among(half)
            and self._mask_shape_is_known()
            and self._between((8, 0), (12, 1))
            and (self.card.torch_version < (2, 12) or (self.dropout * 16).is_integer())
            and not torch.are_deterministic_algorithms_enabled()
            and self._dense(singleton=True)
            and self._heads_match(same_kv=False, gqa=True)
            and self._cudnn_head_sizes()
            and tokens_k != 1
            and (self.dropout == 0 or tokens_q != 1)
        )

    def _newest(self) -> Version:
        return (9, 0) if self.card.torch_version < (2, 7) else (12, 1)

    def _between(self, lowest: Version, highest: Version) -> bool:
        return lowest <= self.card.capability <= highest

    def _flash_backward_lacks(self, head: int) -> bool:
        """Return True for head sizes above 192 on cards of less shared memory.

        Sizes in (224, 256] without dropout are the exception.
        """
        small = self._between((8, 6), (8, 9)) or self._between((12, 0), (12, 1))
        return small and self.needs_grad and head > 192 and (head <= 224 or self.dropout > 0)

    def _dtype_among(self, types: tuple[torch.dtype, ...]) -> bool:
        return self.q.dtype == self.k.dtype == self.v.dtype and self.q.dtype in types

    def _heads_match(self, *, same_kv: bool, gqa: bool) -> bool:
        if not self.q.shape[0] == self.k.shape[0] == self.v.shape[0]:
            return False
        heads, heads_k, heads_v = self.q.shape[-3], self.k.shape[-3], self.v.shape[-3]
        if self.gqa and gqa:
            return bool(heads % heads_k == 0 and (heads_k == heads_v if same_kv else heads % heads_v == 0))
        return bool(heads == heads_k == heads_v)

    def _dense(self, *, singleton: bool) -> bool:
        """Return True if there are tokens and the last dimension of all tensors is contiguous.

        With `singleton`, a head size of 1 always counts as contiguous.
        """
        if self.q.shape[-2] == 0 or self.k.shape[-2] == 0:
            return False
        rows = all(x.stride(-1) == 1 for x in (self.q, self.k, self.v)) or (singleton and self.q.shape[-1] == 1)
        return rows and (self.mask is None or self.mask.stride(-1) == 1)

    def _gemm_alignment(self) -> int:
        half = self.q.dtype in HALF
        major = self.card.capability[0]
        tensor_cores = major >= 8 or (major == 7 and half)
        least = 4 if major >= 8 else 1
        return max(least, 8 if half else 4) if tensor_cores else least

    def _starts_aligned(self, align: int) -> bool:
        if self.card.capability[0] < 8:
            return True
        return all(int(x.storage_offset()) % align == 0 for x in (self.q, self.k, self.v))

    def _mask_shape_is_known(self) -> bool:
        if self.mask is None:
            return True
        if self.mask.requires_grad or self.mask.dim() not in (2, 4):
            return False
        full = (self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2])[-self.mask.dim() :]
        return all(size in (1, wanted) for size, wanted in zip(self.mask.shape, full, strict=True))

    def _cudnn_head_sizes(self) -> bool:
        head, value_head = self.q.shape[3], self.v.shape[3]
        if head % 8 or value_head % 8:
            return False
        data_centre = self.card.capability == (9, 0) or self.card.capability[0] == 10
        if data_centre and self.card.cudnn_version > 92200:
            trained = max(head, value_head) <= 128 or (head, value_head) in ((192, 128), (256, 256))
            return max(head, value_head) <= 256 and (trained or not self.needs_grad)
        if data_centre and (head, value_head) == (192, 128) and self.card.cudnn_version >= 91100:
            return True
        return bool(max(head, value_head) <= 128)


def _must_be_deterministic() -> bool:
    """Return True if torch refuses kernels that are not deterministic, instead of warning of them."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


# Memory of the kernels. Flash: transformers/cuda/flash_attn/flash_api.cpp (mha_fwd, mha_bwd), attention_backward.cu.


def _flash_head(head: int, card: Card) -> int:
    rounded = round_up(head, 32)
    return 256 if card.torch_version >= (2, 7) and rounded >= 224 else rounded


def key_splits(batch: int, heads: int, tokens_q: int, tokens_k: int, head: int, card: Card) -> int:
    """Parts in which flash attention reads the keys of a query block (`num_splits_heuristic`); 1 in most training."""
    key_blocks = ceil_div(tokens_k, 256 if head <= 64 else 128 if head <= 128 else 64)
    query_blocks = batch * heads * ceil_div(tokens_q, 64)
    slots = card.sm_count * (2 if card.torch_version >= (2, 7) else 1)
    if query_blocks >= 0.8 * slots:
        return 1
    efficiency = {}
    for splits in range(1, min(128, slots, key_blocks) + 1):
        if splits == 1 or ceil_div(key_blocks, splits) != ceil_div(key_blocks, splits - 1):
            waves = query_blocks * splits / slots
            efficiency[splits] = waves / math.ceil(waves)
    best = max(efficiency.values())
    return min(splits for splits, value in efficiency.items() if value >= 0.85 * best)


@row("_scaled_dot_product_flash_attention")
def _flash(
    t: Temporaries, card: Card, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, *_: object, **__: object
) -> None:
    batch, heads, tokens, head = q.shape
    t.outputs()
    if dropout_p == 0:
        splits = key_splits(batch, heads, tokens, k.shape[2], head, card)
        if splits > 1:
            rows = splits * batch * heads * tokens * 4
            partial = t.take(rows), t.take(rows * _flash_head(head, card))
            if card.torch_version < (2, 7):
                t.free(*partial)
    elif card.torch_version >= (2, 7):
        t.scratch(16)  # the state of the random generator is allocated twice


@row("_scaled_dot_product_flash_attention_backward")
def _flash_backward(
    t: Temporaries, card: Card, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *_: object, **__: object
) -> None:
    batch, heads, tokens, head = q.shape
    t.take(contiguous_copy(grad_out.transpose(1, 2)))
    t.take(contiguous_copy(out.transpose(1, 2)))
    t.outputs()
    rows = batch * heads * round_up(tokens, 128) * 4
    copies = ceil_div(card.sm_count, batch * heads) if _must_be_deterministic() else 1
    t.take(rows)  # softmax_d
    t.take(copies * rows * _flash_head(head, card))  # dq_accum
    if k.shape[1] != heads:
        expanded = batch * k.shape[2] * heads * head * q.dtype.itemsize
        t.take(expanded)
        t.take(expanded)


# Efficient: transformers/cuda/attention.cu, attention_backward.cu, mem_eff_attention/kernel_{forward,backward}.h.


@row("_scaled_dot_product_efficient_attention")
def _efficient(t: Temporaries, card: Card, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> None:
    """Take a float32 output to add to for half types with a head size above 128, which does not fit registers."""
    t.outputs()
    if q.dtype in HALF and max(q.shape[3], v.shape[3]) > 128:
        batch, heads, tokens, _head = q.shape
        t.take(batch * tokens * heads * v.shape[3] * 4)


def _backward_tile(dtype: torch.dtype, head: int, dropout: bool, card: Card) -> tuple[int, int, bool]:
    """Return (queries, keys, dK and dV stay in registers) of the first kernel in cutlassB.h that the card can run.

    Shared memory decides between neighbours: tiles of 128 x 128, or of 128 x 64 in float32, do not fit 99 KiB.
    """
    large = card.capability in _MIB_OF_SHARED_MEMORY
    if dtype not in HALF:
        return (128, 64, False) if head > 64 and large else (64, 64, False)
    if head <= 64:
        return 64, 64, True
    if card.capability[0] < 8:
        return 128, 64, head <= 128
    if head <= 96 and card.capability in ((8, 6), (8, 9)) and not dropout:
        return 128, 64, True
    if head <= 128:
        return (128, 128, True) if large else (64, 64, False)
    return 128, 64, False


@row("_scaled_dot_product_efficient_attention_backward")
def _efficient_backward(
    t: Temporaries,
    card: Card,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float = 0.0,
    *_: object,
    **__: object,
) -> None:
    batch, heads, tokens, head = q.shape
    value_head = v.shape[3]
    queries, keys, in_registers = _backward_tile(q.dtype, max(head, value_head), dropout_p > 0, card)
    half = q.dtype in HALF

    t.take(contiguous_copy(grad_out.transpose(1, 2)))
    t.outputs()
    if half and (in_registers or card.capability != (7, 0)):
        t.take(batch * heads * tokens * 4)  # delta
    else:
        _take_delta(t, grad_out, out)
    of_keys = 0
    if half and not in_registers:
        splits = _splits_with_accumulation(batch * heads, k.shape[2], keys)
        of_keys = splits * keys * (round_up(head, queries) + round_up(value_head, queries))
    of_queries = ceil_div(tokens, queries) * ceil_div(head, keys) * (16 + 4 * queries * keys) // 4
    t.take(batch * heads * round_up(of_keys + of_queries, 4) * 4)


def _take_delta(t: Temporaries, grad_out: Tensor, out: Tensor) -> None:
    """Take (grad_out.to(float) * out.to(float)).sum(-1).transpose(-2, -1).contiguous(), all alive until the last."""
    batch, heads, tokens, _head = out.shape
    delta = batch * heads * tokens * 4
    casts = [t.take(nbytes(x, torch.float32)) for x in (grad_out, out) if out.dtype in HALF]
    product, summed = t.take(nbytes(out, torch.float32)), t.take(delta)
    if heads > 1 and tokens > 1:
        t.take(delta)
        t.free(summed)
    t.free(product, *casts)


def _splits_with_accumulation(blocks: int, tokens: int, tile: int) -> int:
    """Parts that the keys of one head are split into, where each part needs memory to add up dK and dV."""
    if _must_be_deterministic() or (blocks >= 256 and tokens <= 2 * tile):
        return 1
    return max(1, min(ceil_div(tokens, tile), 200 // blocks))


def attention(
    ask: Callable[[Callable[[Card], str]], str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run `scaled_dot_product_attention` with the kernel that the card would choose; `ask` puts a question to it."""
    refuse("scaled_dot_product_attention", (query, key, value))
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    call = (query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    chosen = ask(lambda card: choose_attention(*call, card, needs_grad=needs_grad))
    out: Tensor
    if chosen == "flash":
        return _flash_attention(query, key, value, dropout_p, is_causal, scale)
    if chosen == "math":
        out = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return out
    mask = _expanded(attn_mask, query, key)
    if chosen == "efficient":
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, needs_grad, dropout_p, is_causal, scale=scale
        )[0]
    else:
        out = aten._scaled_dot_product_cudnn_attention(
            query, key, value, mask, needs_grad, dropout_p, is_causal, False, scale=scale
        )[0]
    return out


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    """Run flash attention, with heads padded to a multiple of 8."""
    head = query.shape[-1]
    short = -head % 8
    if short:
        query, key, value = (torch.nn.functional.pad(x, (0, short)) for x in (query, key, value))
        scale = head**-0.5 if scale is None else scale
    out: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[
        0
    ]
    return out[..., :head] if short else out


def _expanded(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
