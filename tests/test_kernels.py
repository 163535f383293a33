"""The kernel table against sums done by hand, and the choice of attention kernel card by card."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tightfit.gpus import resolve_gpu
from tightfit.kernels import blas
from tightfit.kernels import fused_attention as attention
from tightfit.kernels import operators as kernels
from tightfit.kernels.card import Card
from tightfit.kernels.fused_attention import choose_attention
from tightfit.kernels.operators import hidden_bytes, workspaces
from tightfit.kernels.temporaries import Hidden
from tightfit.vgpu.patches.cuda_api import properties

aten = torch.ops.aten
BF16, F16, F32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int64
MIB = 2**20

T4 = Card(capability=(7, 5), sm_count=40)
A100 = Card(capability=(8, 0), sm_count=108)
RTX3060 = Card(capability=(8, 6), sm_count=28)
RTX4090 = Card(capability=(8, 9), sm_count=128)
H100 = Card(capability=(9, 0), sm_count=132)
B200 = Card(capability=(10, 0), sm_count=148)
RTX5090 = Card(capability=(12, 0), sm_count=170)
MEASURED = Card(capability=(8, 6), sm_count=28, torch_version=(2, 6), cuda_version=(12, 4))
ALL = attention.BACKENDS


def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def hidden(func: object, *args: object, card: Card = RTX3060, **kwargs: object) -> Hidden | None:
    return hidden_bytes(func, args, kwargs, card)


def test_unknown_and_memoryless_operators_take_nothing():
    assert hidden(aten.relu.default, meta(8)) is None
    assert hidden(aten.native_dropout.default, meta(8), 0.1, True) is None
    assert hidden(aten.gelu.default, meta(8)) is None


def test_every_row_names_an_operator_of_torch():
    for name in kernels.ROWS:
        assert hasattr(aten, name.removeprefix("aten::")), name


def test_steps_tell_the_whole_life_in_order():
    given = Hidden(before=(100, 20), after=(3, 4), freed_early=((1, 2), (2, 4)))
    assert list(given.steps()) == [
        ("take", 100),
        ("take", 20),
        ("free", 1),
        ("outputs", 0),
        ("take", 3),
        ("take", 4),
        ("free", 2),
    ]
    assert given.peak_bytes == 120


# Losses


def test_cross_entropy_of_contiguous_logits_takes_nothing():
    logits, target = meta(6, 11), meta(6, dtype=I64)
    assert hidden(aten._log_softmax.default, logits, 1, False) is None
    assert hidden(aten._log_softmax_backward_data.default, logits, logits, 1, F32) is None
    assert hidden(aten.nll_loss_forward.default, logits, target, None, 1, -100) is None
    assert hidden(aten.nll_loss_backward.default, meta(), logits, target, None, 1, -100, meta()) is None


def test_log_softmax_of_strided_logits_copies_them():
    strided = meta(11, 6).t()  # 66 * 4 = 264
    assert hidden(aten._log_softmax.default, strided, 1, False) == Hidden(after=(264,))


def test_softmax_backward_multiplies_into_a_temporary():
    scores = meta(2, 3, 8, 8)  # 384 * 4
    assert hidden(aten._softmax_backward_data.default, scores, scores, -1, F32) == Hidden(after=(1536,))


def test_safe_softmax_looks_for_masked_rows():
    scores = meta(1, 2, 8, 16, dtype=F16)  # 256 scores, 16 rows
    assert hidden(aten._safe_softmax.default, scores, -1) == Hidden(after=(256, 16, 2))
    # torch 2.6: the softmax itself, -inf, the mask, its rows, zero; then the result
    assert hidden(aten._safe_softmax.default, scores, -1, card=MEASURED) == Hidden(before=(512, 2, 256, 16, 2))


def test_mse_loss_holds_the_elementwise_loss():
    # 1000 * 4; 1000 values need one block: 250 loads of 4 for 512 threads
    assert hidden(aten.mse_loss.default, meta(1000), meta(1000), 1) == Hidden(after=(4000,))
    assert hidden(aten.mse_loss.default, meta(1000), meta(1000), 0) is None


# Reductions


def test_bias_gradient_is_summed_through_a_large_buffer():
    # 768 outputs load 4 at a time: a block is 32 x 4 threads, each output column group 32 * 4 wide.
    # values a thread: 2560 / 4 = 640 >= 256; grid 192 / 32 = 6; room for 28 * 1536/128 = 336 blocks
    # blocks an output: min(ceil(336 / 6) = 56, 640 / 16 = 40) = 40
    # 4 bytes * 768 * 40 * 32 * 4 = 15,728,640; 4 bytes a counter * 6
    found = hidden(aten.sum.dim_IntList, meta(2560, 768), [0])
    assert found == Hidden(after=(15_728_640, 24), freed_early=((0, 2), (1, 2)))


def test_dimensions_that_lie_together_are_summed_as_one():
    flat = hidden(aten.sum.dim_IntList, meta(2560, 768), [0])
    assert hidden(aten.sum.dim_IntList, meta(20, 128, 768), [0, 1]) == flat
    assert hidden(aten.sum.dim_IntList, meta(768, 2560).t(), [0]) is None  # each column is dense


def test_more_multiprocessors_split_a_sum_further():
    # T4 takes 1024 threads a multiprocessor: 40 * 8 = 320 blocks, ceil(320 / 6) = 54; 20480 / 4 / 16 = 320 -> 54
    small = hidden(aten.sum.dim_IntList, meta(20480, 768), [0], card=T4)
    # A100: 108 * 16 = 1728 blocks, 1728 / 6 = 288
    large = hidden(aten.sum.dim_IntList, meta(20480, 768), [0], card=A100)
    assert small is not None
    assert small.after[0] == 4 * 768 * 54 * 128
    assert large is not None
    assert large.after[0] == 4 * 768 * 288 * 128


def test_sum_over_rows_needs_no_buffer():
    assert hidden(aten.sum.dim_IntList, meta(4096, 768), [1]) is None
    assert hidden(aten.sum.dim_IntList, meta(8, 768), [0]) is None


def test_full_sum_keeps_one_value_a_block():
    # one output: 2^20 / 4 loads, a block of 512 threads; 2^20 / 512 = 2048 values a thread
    # room for 28 * 3 = 84 blocks; 2048 / 16 = 128 -> 84; 4 bytes * 1 * 84
    found = hidden(aten.sum.default, meta(2**20))
    assert found == Hidden(after=(336, 4), freed_early=((0, 2), (1, 2)))
    assert hidden(aten.mean.default, meta(2**20)) == found
    assert hidden(aten.linalg_vector_norm.default, meta(1024, 1024)) == found


def test_half_types_are_summed_in_float32_and_booleans_are_cast():
    assert hidden(aten.sum.default, meta(2**20, dtype=BF16)) == hidden(aten.sum.default, meta(2**20))
    found = hidden(aten.sum.default, meta(1000, dtype=torch.bool))
    assert found == Hidden(after=(8000,), freed_early=((0, 1),))


def test_a_sum_above_2_gib_runs_in_halves():
    # 2^31 bfloat16 are 4 GiB: two parts of 2^30 values, which share one float32 outside the output.
    # 2^30 / 512 threads = 2^21 values each, at most 256 a thread: 8192 blocks of 4 bytes
    found = hidden(aten.sum.default, meta(2**31, dtype=BF16))
    assert found is not None
    assert found.after == (4, 32_768, 4, 32_768, 4)
    assert found.peak_bytes == 4 + 32_768 + 4


def test_argmax_carries_an_index_with_each_value():
    # (1, 50257): blocks as of a full sum: ceil(50257 / 512) = 99 values a thread < 256: one block
    assert hidden(aten.argmax.default, meta(1, 50257), -1) is None
    # 2^20 values: 84 blocks of 16 bytes
    assert hidden(aten.argmax.default, meta(2**20)) == Hidden((), (84 * 16, 4), ((0, 2), (1, 2)))
    assert hidden(aten.max.default, meta(2**20)) == Hidden((), (84 * 4, 4), ((0, 2), (1, 2)))
    assert hidden(aten.max.other, meta(2**20), meta(2**20)) is None


def test_logsumexp_holds_the_difference():
    # 4 rows of 1000: maxes 16; abs 16 and == 4; difference 16,000; then the output
    found = hidden(aten.logsumexp.default, meta(4, 1000), [1])
    assert found == Hidden(before=(16, 16, 4, 16_000), freed_early=((1, 3), (2, 3), (3, 4)))
    # 16 for the maxes stay to the end; the difference is freed after the output was summed, so with no more to take


def test_foreach_norm_keeps_a_value_for_each_chunk_of_the_longest():
    # chunks: ceil(200,000 / 65,536) = 4; 3 tensors * 4 chunks * 4 bytes, before the 3 results
    tensors = [meta(200_000), meta(10), meta(768, 768)]  # 589,824 / 65,536 = 9 chunks
    assert hidden(aten._foreach_norm.Scalar, tensors[:2], 2) == Hidden(before=(2 * 4 * 4,))
    assert hidden(aten._foreach_norm.Scalar, tensors, 2) == Hidden(before=(3 * 9 * 4,))
    assert hidden(aten._foreach_norm.Scalar, [meta(10, dtype=BF16)], 2) == Hidden(before=(4,))


# Normalisation


def layer_norm_backward(rows: int, columns: int, card: Card, grad: Tensor | None = None) -> Hidden | None:
    x = meta(rows, columns)
    weight, statistic = meta(columns), meta(rows, 1)
    grad = x if grad is None else grad
    return hidden(
        aten.native_layer_norm_backward.default,
        *(grad, x, [columns], statistic, statistic, weight, weight, [True] * 3),
        card=card,
    )


def test_layer_norm_backward_takes_partial_gradients_for_many_narrow_rows():
    # 32,768 / (768 / 32) = 1365 blocks of rows; 1365 * 768 * 4 = 4,193,280 for gamma and for beta
    found = layer_norm_backward(131_072, 768, H100)
    assert found is not None
    assert found.after[:2] == (4_193_280, 4_193_280)
    assert found.after[2] == 768 * 4  # the final gamma gradient, while the first one is still there


@pytest.mark.parametrize(
    ("rows", "columns", "card"),
    [(65_536, 768, H100), (131_072, 2112, H100), (131_072, 768, RTX3060), (131_072, 768, MEASURED)],
)
def test_layer_norm_backward_takes_nothing_otherwise(rows: int, columns: int, card: Card):
    assert layer_norm_backward(rows, columns, card) is None


def test_layer_norm_backward_copies_a_strided_gradient():
    assert layer_norm_backward(64, 32, A100, meta(32, 64).t()) == Hidden(after=(64 * 32 * 4,))


# Embedding


def test_small_embedding_backward_takes_nothing():
    assert hidden(aten.embedding_dense_backward.default, meta(3072, 64), meta(3072, dtype=I64), 100, -1, False) is None


def test_embedding_backward_sorts_and_sums_runs_in_float32():
    # 4096 int64 indices: 32,768 bytes each for sorted, original and range
    # sort: 8 passes * 256 * 8 = 16,384; look-back ceil(4096 / 3840) * 1024 = 2048; counters 32 -> 256;
    #       keys and values again, 32,768 each; + 255 = 84,479
    # segments min(4096, 1000); runs 4096 // 10 + 1000 = 1409; 1409 * 64 * 4 = 360,704 in float32
    found = hidden(
        aten.embedding_dense_backward.default,
        *(meta(4096, 64, dtype=BF16), meta(4096, dtype=I64), 1000, -1, False),
    )
    assert found is not None
    assert found.before == (32_768, 32_768, 32_768, 84_479)
    assert found.after[:2] == (32_768, 8)
    assert found.after[3:5] == (8000, 8000)
    assert found.after[-3:] == (8, 1409 * 8, 360_704)
    held = [size for i, size in enumerate(found.before + found.after) if i not in {i for i, _ in found.freed_early}]
    assert sum(held) == 2 * 32_768 + 32_768 + 8 + 16_000 + 8 + 11_272 + 360_704


# Attention


def heads(
    batch: int = 2, count: int = 4, tokens: int = 128, size: int = 64, dtype: torch.dtype = BF16, strided: bool = True
) -> Tensor:
    """(batch, heads, tokens, size), laid out as nanoGPT does: heads within tokens."""
    if strided:
        return meta(batch, tokens, count, size, dtype=dtype).transpose(1, 2)
    return meta(batch, count, tokens, size, dtype=dtype)


def flash_backward(q: Tensor, kv: Tensor, grad: Tensor, card: Card = A100) -> Hidden | None:
    none = torch.empty(0, device="meta")
    return hidden(
        aten._scaled_dot_product_flash_attention_backward.default,
        *(grad, q, kv, kv, q, meta(1), none, none, 0, 0, 0.0, True, none, none),
        card=card,
    )


def test_flash_forward_takes_nothing_in_training_and_splits_keys_in_decoding():
    q = heads(batch=12, count=12, tokens=1024)
    assert hidden(aten._scaled_dot_product_flash_attention.default, q, q, q, 0.0, True, card=RTX3060) is None
    # one token, 4 heads, 4096 keys in 16 blocks of 256; 56 slots: 1, 2, 3, 4, 6, 8 or 16 parts fill up to
    # 4 * 8 / 56 = 0.57 (16: 64 / 56 over two waves is 0.57 too); the first within 85% of the best is 8
    one, keys = heads(batch=1, tokens=1), heads(batch=1, tokens=4096)
    found = hidden(aten._scaled_dot_product_flash_attention.default, one, keys, keys, card=RTX3060)
    assert found == Hidden(after=(8 * 4 * 4, 8 * 4 * 64 * 4))


def test_flash_backward_accumulates_dq_in_float32():
    # 100 tokens round to 128, head 80 to 96: softmax_d 2*4*128*4 = 4096; dq 4096 * 96 = 393,216
    q = heads(tokens=100, size=80)
    assert flash_backward(q, q, q) == Hidden(after=(4096, 393_216))


def test_flash_backward_copies_a_gradient_laid_out_otherwise():
    q = heads()
    found = flash_backward(q, q, heads(strided=False))
    assert found is not None
    assert found.before == (2 * 4 * 128 * 64 * 2,)


def test_flash_backward_of_grouped_queries_expands_dk_and_dv():
    # 2 batches * 128 tokens * 4 heads * 64 * 2 bytes = 131,072 each
    found = flash_backward(heads(), heads(count=2), heads())
    assert found is not None
    assert found.after[2:] == (131_072, 131_072)


def test_head_sizes_above_192_round_to_256_from_torch_2_7():
    q = heads(size=200)
    rows = 2 * 4 * 128 * 4
    new, old = (
        flash_backward(q, q, q),
        flash_backward(q, q, q, Card(capability=(8, 0), sm_count=108, torch_version=(2, 6))),
    )
    assert new == Hidden(after=(rows, rows * 256))
    assert old == Hidden(after=(rows, rows * 224))


def efficient_backward(q: Tensor, card: Card, dropout: float = 0.0, grad: Tensor | None = None) -> Hidden | None:
    grad = q if grad is None else grad
    return hidden(
        aten._scaled_dot_product_efficient_attention_backward.default,
        *(grad, q, q, q, None, q, meta(1), meta(1), meta(1), dropout, [True] * 3 + [False], True),
        card=card,
    )


def test_efficient_backward_in_float32_multiplies_then_sums():
    # product 2*4*128*64*4 = 262,144; its sum 2*4*128*4 = 4096 and the sum in another order, 4096; then dQ's tiles:
    # 2 blocks of 64 queries * 1 of 64 columns * (16 + 4*64*64) = 32,800 a head, 8 heads
    found = efficient_backward(heads(dtype=F32), MEASURED, 0.1)
    assert found == Hidden(after=(262_144, 4096, 4096, 262_400), freed_early=((1, 3), (0, 3)))
    assert found is not None
    assert found.peak_bytes == 262_144 + 4096 + 4096


def test_efficient_backward_in_half_keeps_dk_and_dv_in_registers_when_they_fit():
    assert efficient_backward(heads(dtype=F16), T4) == Hidden(after=(4096, 262_400))
    # head 128 on a 3060: 64 x 64 tiles, 2 * 2 * 16,400 = 65,600 a head for dQ; dK and dV: keys split
    # min(2, 200 // 8) = 2: 2 * 64 * (128 + 128) * 4 = 131,072; 8 heads * 196,672
    assert efficient_backward(heads(size=128), RTX3060) == Hidden(after=(4096, 8 * 196_672))
    # an A100 has room for tiles of 128 x 128: 16 + 4 * 128 * 128 = 65,552 a head
    assert efficient_backward(heads(size=128), A100) == Hidden(after=(4096, 8 * 65_552))


def test_efficient_forward_accumulates_large_heads_in_float32():
    forward = aten._scaled_dot_product_efficient_attention.default
    assert hidden(forward, *[heads()] * 3, None, True) is None
    assert hidden(forward, *[heads(size=256)] * 3, None, True) == Hidden(after=(2 * 128 * 4 * 256 * 4,))
    assert hidden(forward, *[heads(size=256, dtype=F32)] * 3, None, True) is None


def test_deterministic_backward_of_efficient_attention_does_not_split_keys():
    # head 256 in tiles of 128 queries and 64 keys, dK and dV not in registers. Half of 128 keys a part:
    # 64 * (256 + 256) floats; queries: 128 / 128 * 256 / 64 = 4 buffers of (16 + 4 * 128 * 64) / 4 floats
    q = heads(size=256)
    delta, split, queries = 2 * 4 * 128 * 4, 64 * 512, 4 * (4 + 128 * 64)
    assert efficient_backward(q, A100) == Hidden(after=(delta, 2 * 4 * (2 * split + queries) * 4))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert efficient_backward(q, A100) == Hidden(after=(delta, 2 * 4 * (2 * split + queries) * 4))
        torch.use_deterministic_algorithms(True)
        assert efficient_backward(q, A100) == Hidden(after=(delta, 2 * 4 * (split + queries) * 4))
    finally:
        torch.use_deterministic_algorithms(False)


def choose(card: Card, q: Tensor, kv: Tensor | None = None, mask: Tensor | None = None, **changed: object) -> str:
    options = {"dropout_p": 0.0, "is_causal": mask is None, "enable_gqa": False, "enabled": ALL, "needs_grad": True}
    options |= changed
    kv = q if kv is None else kv
    first = [options.pop(name) for name in ("dropout_p", "is_causal", "enable_gqa")]
    return choose_attention(q, kv, kv, mask, *first, card, **options)


@pytest.mark.parametrize(
    ("card", "bf16", "fp16", "fp32", "masked"),
    [
        (T4, "math", "efficient", "efficient", "math"),
        (A100, "flash", "flash", "efficient", "efficient"),
        (RTX3060, "flash", "flash", "efficient", "efficient"),
        (MEASURED, "flash", "flash", "efficient", "efficient"),
        (RTX4090, "flash", "flash", "efficient", "efficient"),
        (H100, "cudnn", "cudnn", "efficient", "cudnn"),
        (B200, "cudnn", "cudnn", "efficient", "cudnn"),
        (RTX5090, "flash", "flash", "efficient", "efficient"),
        (Card(capability=(12, 0), sm_count=170, torch_version=(2, 6)), "math", "math", "math", "math"),
        (Card(capability=(9, 0), sm_count=132, torch_version=(2, 6)), "flash", "flash", "efficient", "efficient"),
        (Card(capability=(9, 0), sm_count=132, cuda_version=(12, 6)), "flash", "flash", "efficient", "efficient"),
    ],
)
def test_each_card_chooses_by_type_and_mask(card: Card, bf16: str, fp16: str, fp32: str, masked: str):
    assert choose(card, heads(dtype=BF16)) == bf16
    assert choose(card, heads(dtype=F16)) == fp16
    assert choose(card, heads(dtype=F32)) == fp32
    assert choose(card, heads(dtype=BF16), mask=meta(128, 128, dtype=BF16)) == masked


@pytest.mark.parametrize(
    ("card", "size", "dropout", "trains", "expected"),
    [
        (RTX3060, 192, 0.1, True, "flash"),
        (RTX3060, 200, 0.0, True, "efficient"),
        (RTX3060, 256, 0.0, True, "flash"),
        (RTX4090, 256, 0.1, True, "efficient"),
        (RTX5090, 224, 0.0, True, "efficient"),
        (RTX3060, 224, 0.0, False, "flash"),
        (A100, 256, 0.1, True, "flash"),
        (A100, 264, 0.0, True, "efficient"),
        (A100, 100, 0.0, True, "flash"),
        (A100, 300, 0.0, True, "math"),
        (H100, 128, 0.1, True, "flash"),
        (H100, 128, 0.125, True, "cudnn"),
        (H100, 136, 0.0, True, "flash"),
    ],
)
def test_head_size_dropout_and_training_limit_the_choice(card, size, dropout, trains, expected):
    assert choose(card, heads(size=size), dropout_p=dropout, needs_grad=trains) == expected


def test_float32_needs_aligned_head_sizes_only_from_ampere():
    assert choose(A100, heads(size=66, dtype=F32)) == "math"
    assert choose(T4, heads(size=66, dtype=F32)) == "efficient"
    assert choose(T4, heads(size=68, dtype=F16)) == "math"


def test_grouped_queries_need_flash_or_cudnn_before_torch_2_14():
    q, kv = heads(count=8), heads(count=2)
    assert choose(A100, q, kv, enable_gqa=True) == "flash"
    assert choose(H100, q, kv, enable_gqa=True) == "cudnn"
    assert choose(A100, q, kv) == "math"
    assert choose(A100, q, kv, enable_gqa=True, enabled=frozenset({"efficient", "math"})) == "math"
    later = Card(capability=(8, 0), sm_count=108, torch_version=(2, 14))
    assert choose(later, q, kv, enable_gqa=True, enabled=frozenset({"efficient", "math"})) == "efficient"


def test_shapes_and_strides_that_only_math_can_do():
    q = heads()
    assert choose(A100, q, heads(tokens=0), is_causal=False) == "math"
    assert choose(A100, meta(2, 4, 64, 128, dtype=BF16).transpose(2, 3)) == "math"
    assert choose(A100, meta(4, 128, 64, dtype=BF16)) == "math"
    assert choose(A100, q, heads(tokens=64)) == "efficient"  # causal, not square
    assert choose(A100, q, heads(tokens=64), is_causal=False) == "flash"


def test_a_disabled_kernel_is_not_chosen():
    q = heads()
    assert choose(A100, q, enabled=ALL - {"flash"}) == "efficient"
    assert choose(A100, q, enabled=frozenset({"cudnn"})) == "cudnn"
    with pytest.raises(RuntimeError, match="No available kernel"):
        choose(A100, heads(dtype=F32), enabled=frozenset({"flash"}))
    assert attention.enabled_backends() <= ALL


# Matrix products


@pytest.mark.parametrize(
    ("card", "nbytes"),
    [(T4, 8_519_680), (RTX3060, 8_519_680), (H100, 32 * MIB), (B200, 32 * MIB), (RTX5090, 32 * MIB)],
)
def test_cublas_workspace_by_card(card: Card, nbytes: int):
    # :4096:2:16:8 is (4096 * 2 + 16 * 8) KiB = 8320 KiB
    assert workspaces(aten.mm.default, (meta(3, 4), meta(4, 5)), {}, card, {}) == (blas.Workspace("cublas", nbytes),)


def test_blackwell_had_the_small_workspace_before_torch_2_12():
    assert blas.cublas_bytes(Card(capability=(10, 0), sm_count=148, torch_version=(2, 11)), {}) == 8_519_680
    assert blas.cublas_bytes(Card(capability=(9, 0), sm_count=132, torch_version=(2, 6)), {}) == 32 * MIB


def test_cublas_workspace_follows_the_environment():
    mm = (aten.mm.default, (meta(3, 4), meta(4, 5)), {}, A100)
    assert workspaces(*mm, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})[0].nbytes == 16 * 8 * 1024
    assert workspaces(*mm, {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"})[0].nbytes == 8_519_680
    assert workspaces(*mm, {"CUBLAS_WORKSPACE_CONFIG": ":0:0"}) == ()
    assert workspaces(*mm, {"CUBLAS_WORKSPACE_CONFIG": "none"})[0].nbytes == 8_519_680


def test_other_operators_and_empty_products_take_no_workspace():
    assert workspaces(aten.relu.default, (meta(3),), {}, A100, {}) == ()
    assert workspaces(aten.mm.default, (meta(0, 4), meta(4, 5)), {}, A100, {}) == ()


def test_cublaslt_workspace_by_torch_version():
    bias = (aten.addmm.default, (meta(5), meta(3, 4), meta(4, 5)), {})

    def both(*version: int) -> tuple[dict[str, int], Hidden | None]:
        card = Card(capability=(8, 0), sm_count=108, torch_version=version)
        return {w.key: w.nbytes for w in workspaces(*bias, card, {})}, hidden_bytes(*bias, card)

    assert both(2, 6) == ({"cublas": 8_519_680}, Hidden(after=(MIB,)))
    assert both(2, 10) == ({"cublas": 8_519_680, "cublaslt": MIB}, None)
    assert both(2, 11) == ({"cublas": 8_519_680, "cublaslt": MIB}, None)
    assert both(2, 13) == ({"cublas": 8_519_680}, None)
    assert both(2, 15) == ({}, Hidden(after=(MIB,)))
    card = Card(capability=(8, 0), sm_count=108, torch_version=(2, 6))
    assert hidden(aten.addmm.default, meta(3, 5), meta(3, 4), meta(4, 5), card=card) is None


def test_a_matrix_without_dense_rows_or_columns_is_copied():
    expanded = meta(1, 1).expand(6, 5)
    assert hidden(aten.mm.default, meta(4, 6), expanded) == Hidden(after=(120,))
    assert hidden(aten.mm.default, meta(6, 4).t(), meta(5, 6).t()) is None
    assert hidden(aten.bmm.default, meta(2, 4, 6), meta(2, 5, 6).transpose(1, 2)) is None


# Copies, sampling, scans, sorting


def test_adding_at_indices_sorts_them():
    # 5000 indices of 8 bytes: wrapped 40,000 (freed) and times the stride 40,000; sorted and original, 40,000 each;
    # range 40,000 with the sort: ids below 1000 need 10 bits, so 2 passes: 2 * 2048 = 4096, look-back
    # ceil(5000 / 3840) * 1024 = 2048, counters 8 -> 256, keys and values 40,000 -> 40,192 each, + 255
    arguments = (meta(1000, 64), [meta(5000, dtype=I64)], meta(5000, 64))
    found = hidden(aten._index_put_impl_.default, *arguments, True)
    assert found is not None
    assert found.after == (40_000,) * 5 + (4096 + 2048 + 256 + 2 * 40_192 + 255,)
    assert found.peak_bytes == 4 * 40_000 + 87_039
    assert hidden(aten._index_put_impl_.default, *arguments, False) is None


def test_sort_of_a_vocabulary():
    assert hidden(aten.sort.default, meta(4, 4096)) is None
    # one row of 50,257 float32: indices 402,056; sort: 4 passes * 2048 = 8192, look-back in tiles of 384 * 8 = 3072:
    # 17 * 1024 = 17,408, counters 256, keys 201,028 -> 201,216, values 402,056 -> 402,176, + 255
    found = hidden(aten.sort.default, meta(1, 50257))
    assert found is not None
    assert found.after == (402_056, 8192 + 17_408 + 256 + 201_216 + 402_176 + 255)


def test_topk_of_long_rows_counts_digits_in_blocks():
    # one row of 50,257 on 28 multiprocessors of 6 blocks: ceil(50257 / 43008) = 2, at least 4 items a thread:
    # ceil(50257 / 1024) = 50 blocks, 512 bytes of counters each
    found = hidden(aten.topk.default, meta(1, 50257), 40)
    assert found is not None
    assert found.after[:7] == (4, 4, 4, 4, 25_600, 200, 200)
    assert hidden(aten.topk.default, meta(64, 4096), 40) is None


def test_group_norm_scales_each_channel_of_each_sample():
    # 2 samples * 8 channels * 4 bytes = 64; 2 groups of 4: 16
    weight = meta(8)
    x = meta(2, 8, 5, 5)
    assert hidden(aten.native_group_norm.default, x, weight, weight, 2, 8, 25, 2, 1e-5) == Hidden(after=(64, 64))
    statistic = meta(2, 2)
    found = hidden(
        aten.native_group_norm_backward.default, x, x, statistic, statistic, weight, 2, 8, 25, 2, [True, True, True]
    )
    assert found == Hidden(after=(64, 64, 16, 16, 64), freed_early=((2, 5), (3, 5), (4, 5)))


def test_a_blocking_copy_converts_on_the_host():
    class Plain:
        """Stands for a tensor that is on a device this machine does not have."""

        def __init__(self, device: str, dtype: torch.dtype = F32) -> None:
            self.device, self.dtype, self.shape = torch.device(device), dtype, (10,)

        def is_contiguous(self) -> bool:
            return True

    host, card_ = Plain("cpu", torch.float64), Plain("cuda")
    assert hidden(aten.copy_.default, card_, host) is None
    assert hidden(aten.copy_.default, card_, host, True) == Hidden(after=(80,))
    assert hidden(aten._to_copy.default, card_, dtype=BF16, device=torch.device("cpu"), non_blocking=True) == Hidden(
        after=(20,)
    )
    assert hidden(aten._to_copy.default, card_, dtype=BF16) is None


def test_multinomial_draws_a_variate_for_each_probability():
    assert hidden(aten.multinomial.default, meta(1, 50257), 1) == Hidden(after=(50257 * 4,), freed_early=((0, 1),))
    assert hidden(aten.multinomial.default, meta(100), 3, True) == Hidden(after=(400, 400, 400))


def test_cumsum_of_a_vector_uses_cub():
    # tiles of 128 * 15 = 1920: ceil(50257 / 1920) + 32 = 59 words of 8 bytes = 472 -> 512, + 255
    assert hidden(aten.cumsum.default, meta(50257), 0) == Hidden(after=(767,))
    assert hidden(aten.cumsum.default, meta(2, 50257), 1) is None


# Operators on the virtual GPU


def entries_of_native_functions() -> Iterator[tuple[str, set[str], str]]:
    """Name, dispatch keys and structured delegate of each operator in torch's own list."""
    torchgen = pytest.importorskip("torchgen")
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    for entry in text.split("\n- func: ")[1:]:
        dispatch = re.findall(r"^    ([A-Za-z0-9, ]+): ", entry, re.MULTILINE)
        delegate = re.search(r"structured_delegate: (\S+)", entry)
        keys = {key for line in dispatch for key in line.split(", ")}
        yield entry.split("(")[0], keys, delegate[1] if delegate else ""


def test_operators_with_a_cuda_kernel_beside_a_composite_one_are_those_of_torch():
    entries = {name: (keys, delegate) for name, keys, delegate in entries_of_native_functions()}
    assert len(entries) > 2000
    found = {
        name
        for name, (keys, delegate) in entries.items()
        if "CompositeImplicitAutograd" in keys and "CUDA" in keys | entries.get(delegate, (set(), ""))[0]
    }
    assert found == set(kernels.WITH_OWN_KERNEL)


X = 1024 * 4096 * 4
"""Bytes of the input in scripts/kernel_peaks.py. The allocator hands out multiples of 512 bytes."""
ELEMENTWISE = (
    *("gelu", "gelu tanh", "silu", "mish", "hardswish", "hardsigmoid", "leaky_relu", "elu", "selu", "softplus"),
    *("softshrink", "logsigmoid", "relu", "tanh", "sigmoid", "log_softmax"),
)
PEAKS = {
    **dict.fromkeys(ELEMENTWISE, (X, X)),
    "glu": (X // 2, X),
    # the weight's gradient for each element, then its sum: one number, 84 partial sums and a counter
    "prelu": (X, 2 * X + 3 * 512),
    "dropout": (X + X // 4, X),
    "softmax": (X, 2 * X),
    # mean and rstd of 1024 rows; gradients of 4096 weights and biases
    "layer_norm": (X + 2 * 1024 * 4, X + 2 * 4096 * 4),
    "rms_norm": (X + 1024 * 4, X + 4096 * 4),
    "rms_norm without weight": (X + 1024 * 4, X),
    # 64 samples of 8 groups and 64 channels: mean and rstd, scale and shift;
    # backward: gradients of 64 weights and biases, ds and db, c2 and c3, c1
    "group_norm": (X + 2 * 2048 + 2 * 16_384, X + 2 * 512 + 2 * 16_384 + 2 * 2048 + 16_384),
    "batch_norm": (X + 2 * 4096 * 4, X + 2 * 4096 * 4),
    # the loss of each element, the output, 84 partial sums and a counter
    "huber": (X + 3 * 512, X),
    "smooth_l1": (X + 3 * 512, X),
    "mse": (X + 3 * 512, X),
    # log-probabilities, loss and total weight; backward: two gradients, when the total weight is free
    "cross_entropy": (X + 2 * 512, 2 * X - 512),
}


def test_operators_take_what_one_cuda_kernel_takes(tmp_path: Path):
    script = Path(__file__).parent / "scripts/kernel_peaks.py"
    words = [sys.executable, "-m", "tightfit", "dryrun", "--gpu", "RTX 3060 12GB"]
    done = subprocess.run([*words, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stderr.splitlines() if line.startswith("{")))
    assert {name: tuple(each) for name, each in found["training"].items()} == PEAKS
    assert found["inference"] == {"silu": X, "mish": X, "rms_norm": X + 1024 * 4}
    assert found["twice"] == {"silu": True, "mish": True, "rms_norm": True}


def test_huber_loss_is_made_before_its_mean():
    assert hidden(aten.huber_loss.default, meta(1000), meta(1000), 1, 1.0) == Hidden(before=(4000,))
    assert hidden(aten.huber_loss.default, meta(1000), meta(1000), 0, 1.0) is None


@pytest.mark.parametrize(("capability", "threads"), [((7, 5), 1024), ((8, 0), 2048), ((8, 7), 1536), ((12, 1), 1536)])
def test_properties_and_reductions_agree_on_the_threads_of_a_multiprocessor(capability, threads):
    gpu = replace(resolve_gpu("RTX 3060 12GB")[0], capability=capability)
    assert properties(gpu, 2**30).max_threads_per_multi_processor == threads
    assert Card(capability=capability, sm_count=28).max_threads_per_sm == threads


def test_the_list_of_what_is_missing_is_sentences():
    assert all(line.endswith(".") and line[0].isupper() for line in kernels.NOT_MODELLED)
    assert inspect.signature(choose_attention).parameters["enabled"].default is None
