"""Memory of operators that sort, scan or draw samples, including the backward of embedding and indexing.

Paths are below `aten/src/ATen/native/cuda`. CUB's own scratch memory follows `dispatch_radix_sort.cuh` and
`dispatch_scan.cuh`. Its tiles depend on CUB's tuning tables, so it may be off by a few hundred bytes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tightfit.kernels.card import Card
from tightfit.kernels.reduction import take_reduction
from tightfit.kernels.temporaries import Temporaries, accumulate_type, ceil_div, contiguous_copy, nbytes, round_up, row

PAIR_WITH_INDEX = 16
"""sizeof(pair<T, int64_t>) for T of up to 8 bytes."""


def radix_sort_bytes(count: int, key: int, value: int, card: Card, *, bits: int | None = None) -> int:
    """Bytes of cub::DeviceRadixSort::SortPairs: histograms, look-back table, and a second copy of keys and values.

    The look-back table has 256 counters for each tile. A tile is 384 threads (256 before Ampere), each with as many
    items as registers allow. Hopper's and Blackwell's tiles may differ in newer CUB, by less than 0.5 bytes an item.
    """
    widest = max(key, value)
    ampere = card.capability[0] >= 8
    threads, items = (384, 21) if ampere else (256, 23)
    if ampere and key == 4 and value:
        items = 17
    tile = threads * max(1, items * 4 // max(4, widest))
    if count <= 256 * max(1, 19 * 4 // max(4, widest)):
        return 1
    passes = ceil_div(bits or key * 8, 8)
    parts = [passes * 256 * 8, ceil_div(count, tile) * 256 * 4, passes * 4]
    if passes > 1:
        parts += [count * key, count * value]
    return sum(round_up(part, 256) for part in parts) + 255


def scan_bytes(count: int, item: int) -> int:
    """Bytes of a cub scan: one (state, value) word for each tile of 128 threads, and 32 more."""
    tile = 128 * max(1, 15 * 4 // max(4, item))
    return round_up((ceil_div(count, tile) + 32) * 2 * item, 256) + 255


# Embedding.cu, EmbeddingBackwardKernel.cu

_ROWS_PER_PARTIAL = 10
_FEW_INDICES = 3072


@row("embedding_dense_backward")
def _embedding_backward(
    t: Temporaries,
    card: Card,
    grad: Tensor,
    indices: Tensor,
    num_weights: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> None:
    """Sort the indices, then sum runs of at most 10 equal ones in float32, then add those up row by row."""
    index = indices.dtype.itemsize
    count, width = indices.numel(), grad.shape[-1]
    t.take(contiguous_copy(indices))
    t.take(contiguous_copy(grad))
    if count <= _FEW_INDICES and not scale_grad_by_freq:
        t.outputs()
        return
    t.take(count * index)  # sorted_indices
    t.take(count * index)  # orig_indices
    t.scratch(count * index, radix_sort_bytes(count, index, index, card))
    if scale_grad_by_freq:
        t.take(count * index)
        t.scratch(scan_bytes(count, index))
        t.scratch(scan_bytes(count, index))
    t.outputs()
    segments = min(count, num_weights)
    partials = count // _ROWS_PER_PARTIAL + segments
    t.take(count * index)  # segment_offsets
    t.take(8)
    t.scratch(scan_bytes(count, 4))
    t.take(segments * index)  # partials_per_segment
    t.take(segments * index)  # partials_per_segment_offset
    t.scratch(scan_bytes(segments, index))
    t.take(8)
    t.take(partials * index)  # partial_segment_offset
    t.take(partials * width * accumulate_type(grad.dtype).itemsize)  # grad_weight_per_segment


# Indexing.cu (index_put_with_sort_kernel)


@row("_index_put_impl_", "index_put_", "index_put")
def _index_put(
    t: Temporaries,
    card: Card,
    input: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
    *_: object,
) -> None:
    """Adding values sorts the indices; writing needs no memory. Masks are left out: their size depends on data."""
    t.outputs()
    given = [index for index in indices if index is not None]
    if not (accumulate or torch.are_deterministic_algorithms_enabled()) or not given:
        return
    if any(index.dtype in (torch.bool, torch.uint8) for index in given):
        return
    count = max(index.numel() for index in given)
    first = next(d for d, index in enumerate(indices) if index is not None)
    behind = [d for d in range(first + 1, input.dim()) if d >= len(indices) or indices[d] is None]
    inner = math.prod(input.shape[d] for d in behind)
    outer = math.prod(input.shape[:first])
    t.take(contiguous_copy(input))
    linear = None
    for _index in given:
        wrapped, product = t.take(count * 8), t.take(count * 8)
        t.free(wrapped)
        if linear is None:
            linear = product
        else:
            t.free(product)
    expanded = count * inner * outer
    t.take(expanded * values.dtype.itemsize if values.numel() < expanded else contiguous_copy(values))
    if not count or not inner:
        return
    t.take(count * 8)  # sorted_indices
    t.take(count * 8)  # orig_indices
    bits = max(1, ((input.numel() - 1) // inner).bit_length())
    t.scratch(count * 8, radix_sort_bytes(count, 8, 8, card, bits=bits))


# Sort.cpp, SortStable.cu, TensorTopK.cpp, TensorTopK.cu

_SORTED_IN_PLACE = 4096
_ONE_BY_ONE = 1_000_000


@row("sort")
def _sort(
    t: Temporaries, card: Card, input: Tensor, dim: int = -1, *_: object, stable: bool | None = None, **__: object
) -> None:
    t.outputs()
    _take_sort(t, card, input, dim)


def _take_sort(t: Temporaries, card: Card, input: Tensor, dim: int) -> None:
    if input.dim() == 0 or input.shape[dim] <= _SORTED_IN_PLACE:
        return
    if not (input.is_contiguous() and input.stride(dim) == 1):
        t.take(nbytes(input))
        t.take(nbytes(input))
        t.take(nbytes(input, torch.int64))
    item, length, count = input.dtype.itemsize, input.shape[dim], input.numel()
    rows = count // length
    if rows == 1 or length >= _ONE_BY_ONE:
        order = t.take(length * 8)
        t.scratch(radix_sort_bytes(length, item, 8, card))  # for each row, one after another
        t.free(order)
    elif rows < 128:
        pairs = t.take(count * 8), t.take(count * 8)
        t.scratch(count * item, radix_sort_bytes(count, item, 8, card))
        t.scratch(radix_sort_bytes(count, 8, 0, card, bits=max(1, (rows - 1).bit_length())))
        t.free(*pairs)
    else:
        order = t.take(count * 8)
        t.scratch(round_up(count * item, 256) + round_up(count * 8, 256) + 255)
        t.free(order)


@row("topk")
def _topk(t: Temporaries, card: Card, input: Tensor, k: int, dim: int = -1, *_: object, **__: object) -> None:
    """Few very long rows are sorted. In other long rows, several blocks search digit by digit, with counters."""
    t.outputs()
    if input.dim() == 0 or not input.numel():
        return
    length = input.shape[dim]
    rows, item = input.numel() // length, input.dtype.itemsize
    if rows <= 10 and length >= 100_000:
        t.take(input.numel() * item)
        t.take(input.numel() * 8)
        _take_sort(t, card, input, dim)
        return
    t.take(contiguous_copy(input))
    if not _several_blocks(rows, length):
        return
    items = min(64, max(4, ceil_div(length * rows, card.sm_count * 6 * 256)))
    blocks = rows * ceil_div(length, items * 256)
    for size in (rows * item, rows * 4, rows * 4, rows * max(4, item), blocks * 512, blocks * 4, blocks * 4):
        t.take(size)
    for _pass in ("below k", "equal to the k-th"):
        t.scratch(scan_bytes(blocks, 4))


def _several_blocks(rows: int, length: int) -> bool:
    """Return True where `should_use_multiblock` does."""
    for most, least in ((20, 20000), (40, 10000), (80, 8000), (199, 5000), (799, 3000), (4000, 800)):
        if rows <= most:
            return length >= least
    return length >= 400


# ATen/native/Distributions.cpp, CumsumKernel.cu, ScanUtils.cuh


@row("multinomial")
def _multinomial(
    t: Temporaries,
    card: Card,
    probabilities: Tensor,
    num_samples: int,
    replacement: bool = False,
    *_: object,
    **__: object,
) -> None:
    """Draw one exponential variate for each probability. The checks before it read single numbers."""
    t.outputs()
    if not replacement or num_samples == 1:
        variates = t.take(nbytes(probabilities))
        if num_samples == 1:
            q = torch.empty(probabilities.shape, dtype=probabilities.dtype, device="meta")
            take_reduction(t, card, q, (-1,), PAIR_WITH_INDEX, out_dtype=torch.int64, in_output=False)
        else:
            t.take(num_samples * (probabilities.numel() // probabilities.shape[-1]) * probabilities.dtype.itemsize)
        t.free(variates)
    else:
        for _copy_of in ("distribution", "normalised", "prefix sums"):
            t.take(nbytes(probabilities))


@row("cumsum", "cumprod")
def _scan(t: Temporaries, card: Card, input: Tensor, dim: int, *_: object, **__: object) -> None:
    """Take CUB's memory for a vector only; rows are scanned in place."""
    t.outputs()
    t.take(contiguous_copy(input))
    if input.dim() and input.numel() == input.shape[dim] and input.numel():
        t.take(scan_bytes(input.numel(), input.dtype.itemsize))
