"""Memory that PyTorch's CUDA reductions take when several blocks share one output: `ATen/native/cuda/Reduce.cuh`.

First `TensorIterator` moves the reduced dimensions to the front, orders them by stride and merges neighbours. Then
`setReduceConfig` shapes the grid. Where several blocks work on one output (`ctas_per_output` > 1), two buffers come
from the caching allocator: one for partial results, one for a counter of each group of outputs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.kernels.card import Card
from tightfit.kernels.temporaries import HALF, Temporaries, ceil_div

_MAX_THREADS = 512
_MAX_THREADS_COMPLEX128 = 256
_MIN_VALUES_PER_THREAD = 16
_MAX_VALUES_PER_THREAD = 256
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class _Dim:
    """One dimension of the iterator; strides in elements."""

    size: int
    out_stride: int
    """0 where reduced."""
    in_stride: int

    @property
    def reduced(self) -> bool:
        return self.out_stride == 0


@dataclass(frozen=True)
class Iteration:
    """A reduction after `TensorIterator` has reordered and merged it, fastest dimension first."""

    dims: tuple[_Dim, ...]
    dtype: torch.dtype
    out_itemsize: int
    offset: int = 0
    """Offset of the input in its storage, in elements. It limits the width of a load."""

    @classmethod
    def of(
        cls, tensor: Tensor, dims: Sequence[int] | None, *, dtype: torch.dtype, out_itemsize: int | None = None
    ) -> "Iteration":
        """Return the reduction of `tensor`, read as `dtype`, over `dims` into a new contiguous tensor.

        None or no `dims` reduces all.
        """
        count = tensor.dim()
        reduced = {d % count for d in dims} if dims else set(range(count))
        out_strides, running = [0] * count, 1
        for d in reversed(range(count)):
            if d not in reduced:
                out_strides[d] = running
                running *= max(1, tensor.shape[d])
        pieces = [_Dim(tensor.shape[d], out_strides[d], tensor.stride(d)) for d in range(count)]
        return cls(
            dims=_merge(_order(pieces)),
            dtype=dtype,
            out_itemsize=out_itemsize or dtype.itemsize,
            offset=int(tensor.storage_offset()),
        )

    @property
    def numel(self) -> int:
        return math.prod(d.size for d in self.dims)

    @property
    def outputs(self) -> int:
        return math.prod(d.size for d in self.dims if not d.reduced)

    def halves(self) -> Iterator["Iteration"]:
        """Yield the parts of `with_32bit_indexing`: it halves the widest dimension until 32-bit indices suffice."""
        if self._fits_32_bits():
            yield self
            return
        widest = max(range(len(self.dims)), key=lambda d: self._extent(self.dims[d]))
        dim = self.dims[widest]
        for size in (dim.size // 2, dim.size - dim.size // 2):
            dims = list(self.dims)
            dims[widest] = _Dim(size, dim.out_stride, dim.in_stride)
            yield from Iteration(tuple(dims), self.dtype, self.out_itemsize, self.offset).halves()

    def _extent(self, dim: _Dim) -> int:
        return (dim.size - 1) * max(dim.out_stride * self.out_itemsize, dim.in_stride * self.dtype.itemsize)

    def _fits_32_bits(self) -> bool:
        if self.numel > _INT32_MAX:
            return False
        ins = 1 + sum((d.size - 1) * d.in_stride * self.dtype.itemsize for d in self.dims)
        outs = 1 + sum((d.size - 1) * d.out_stride * self.out_itemsize for d in self.dims)
        return max(ins, outs) <= _INT32_MAX


def _order(dims: list[_Dim]) -> list[_Dim]:
    """Sort as `TensorIteratorBase::reorder_dimensions`: an insertion sort that leaves ambiguous neighbours alone."""
    order = list(reversed(dims))
    for i in range(1, len(order)):
        at = i
        for j in range(i - 1, -1, -1):
            comparison = _compare(order[j], order[at])
            if comparison > 0:
                order[j], order[at] = order[at], order[j]
                at = j
            elif comparison < 0:
                break
    return order


def _compare(first: _Dim, second: _Dim) -> int:
    if first.reduced != second.reduced:
        return 1 if second.reduced else -1
    for a, b in ((first.out_stride, second.out_stride), (first.in_stride, second.in_stride)):
        if a == 0 or b == 0:
            continue
        if a != b:
            return -1 if a < b else 1
        if first.size > second.size:
            return 1
    return 0


def _merge(dims: list[_Dim]) -> tuple[_Dim, ...]:
    """Merge neighbours as `TensorIteratorBase::coalesce_dimensions` does."""
    merged = dims[:1]
    for dim in dims[1:]:
        last = merged[-1]
        joins = (
            last.size == 1
            or dim.size == 1
            or (last.size * last.in_stride == dim.in_stride and last.size * last.out_stride == dim.out_stride)
        )
        if not joins:
            merged.append(dim)
            continue
        strides = dim if last.size == 1 else last
        merged[-1] = _Dim(last.size * dim.size, strides.out_stride, strides.in_stride)
    return tuple(merged)


def _last_power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1) if n > 0 else 1


def _output_vector(it: Iteration, reduced: int) -> int:
    """Outputs that one thread loads together (`get_output_vec_size`)."""
    width = 4
    others = [d.in_stride for i, d in enumerate(it.dims) if i != reduced]
    for n in (it.offset, it.dims[reduced].size, *others):
        while n % width:
            width //= 2
    return width


def _block_shape(it: Iteration, inputs: int, outputs: int) -> tuple[bool, int, int, int]:
    """Return (x runs along the reduced dimension, loads along x, along y, outputs that one thread loads)."""
    if not it.dims:
        return True, 1, 1, 1
    reduced = sum(d.reduced for d in it.dims)
    along_reduced = reduced == len(it.dims) or it.dims[0].in_stride < it.dims[reduced].in_stride
    fastest = it.dims[0] if along_reduced else it.dims[reduced]
    if along_reduced:
        vectorized = fastest.in_stride == 1 and inputs >= 128 and reduced == 1
        return True, inputs // 4 if vectorized else inputs, outputs, 1
    width = _output_vector(it, reduced) if fastest.in_stride == 1 else 1
    return False, outputs // width, inputs, width


def global_buffers(it: Iteration, item_bytes: int, card: Card) -> tuple[int, int] | None:
    """Bytes of the partial results and of the counters, or None if one block finishes each output alone.

    `item_bytes` is the size of one running value. Source: setReduceConfig, ReduceConfig::global_memory_size and
    semaphore_size. A load along the reduced dimension brings 2, 4 or 8 values by operator and version; inputs long
    enough to be split fill the block with any of them, so 4 stands for all.
    """
    outputs = it.outputs
    inputs = it.numel // outputs
    along_reduced, across, down, width = _block_shape(it, inputs, outputs)
    threads = (_MAX_THREADS_COMPLEX128 if it.dtype is torch.complex128 else _MAX_THREADS) // width
    across2 = _last_power_of_two(across) if across < threads else threads
    down2 = _last_power_of_two(down) if down < threads else threads
    height = min(down2, threads // min(across2, 32))
    block_width = min(across2, threads // height)

    step_input, step_output = (block_width, 1) if along_reduced else (1, block_width)
    if ceil_div(inputs, step_input) < min(height * 16, _MAX_VALUES_PER_THREAD):
        return None
    step_input *= height
    values = ceil_div(inputs, step_input)
    grid = ceil_div(outputs // width, step_output)
    target = card.sm_count * (card.max_threads_per_sm // (block_width * height))
    if values < _MAX_VALUES_PER_THREAD or grid > target:
        return None
    blocks = max(
        min(ceil_div(target, grid), ceil_div(values, _MIN_VALUES_PER_THREAD)), ceil_div(values, _MAX_VALUES_PER_THREAD)
    )
    if blocks <= 1:
        return None
    partial = item_bytes * outputs * blocks
    return (partial if along_reduced else partial * block_width * width), 4 * grid


def take_reduction(
    t: Temporaries,
    card: Card,
    tensor: Tensor,
    dims: Sequence[int] | None,
    item_bytes: int,
    *,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    in_output: bool | None = None,
) -> None:
    """Take and free the memory with which `gpu_reduce_kernel` reduces `tensor`, read as `dtype`.

    Above 2 GiB the reduction runs in parts. Some types are too coarse to add up in the output (`in_output` False; by
    default the half types). Their parts share one more buffer of running values.
    """
    if tensor.numel() == 0 or tensor.dim() == 0:
        return
    dtype = dtype or tensor.dtype
    out_dtype = out_dtype or dtype
    it = Iteration.of(tensor, dims, dtype=dtype, out_itemsize=out_dtype.itemsize)
    parts = list(it.halves())
    if in_output is None:
        in_output = not (dtype in HALF and out_dtype is dtype)
    held = None
    if len(parts) > 1 and not in_output and out_dtype.itemsize < item_bytes:
        held = t.take(max([1] + [d.size * d.out_stride for d in it.dims]) * item_bytes)
    for part in parts:
        t.scratch(*(global_buffers(part, item_bytes, card) or ()))
    t.free(held)
