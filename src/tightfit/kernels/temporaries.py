"""The shape of one row of the kernel table: what an operator's CUDA code takes from the allocator and gives back.

A row follows the C++ body line by line: `take` where it allocates, `outputs` where its results exist, `free` where a
temporary dies before the end. Sizes are as requested; the allocator rounds them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Step = tuple[Literal["take", "outputs", "free"], int]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Hidden:
    """Temporaries of one operator, in bytes; nothing of zero bytes is in it, as the allocator gives none."""

    before: tuple[int, ...] = ()
    """Taken before the outputs, in this order."""
    after: tuple[int, ...] = ()
    """Taken once the outputs exist, in this order."""
    freed_early: tuple[tuple[int, int], ...] = ()
    """(i, n): the i-th of `before + after` is freed when n of them have been taken; all others when the operator ends.
    One of `before` with n = len(before) is freed before the outputs."""

    def steps(self) -> Iterator[Step]:
        """The life of the operator: ("take", bytes), ("outputs", 0), ("free", i); what is not freed ends with it."""
        sizes = self.before + self.after
        for taken in range(len(sizes) + 1):
            early = [i for i, n in self.freed_early if n == taken]
            if taken == len(self.before):
                yield from (("free", i) for i in early if i < taken)
                yield "outputs", 0
                early = [i for i in early if i >= taken]
            yield from (("free", i) for i in early)
            if taken < len(sizes):
                yield "take", sizes[taken]

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at once, outputs not counted."""
        sizes, held, peak = self.before + self.after, 0, 0
        for what, number in self.steps():
            held += {"take": number, "free": -sizes[number] if what == "free" else 0}.get(what, 0)
            peak = max(peak, held)
        return peak


class Temporaries:
    """Collects the temporaries of one operator in the order of its code."""

    def __init__(self) -> None:
        self._before: list[int] = []
        self._after: list[int] = []
        self._freed: list[tuple[int, int]] = []
        self._outputs = False

    def take(self, nbytes: int) -> int | None:
        """Allocate, and return what `free` needs; None if there is nothing to allocate."""
        if nbytes <= 0:
            return None
        (self._after if self._outputs else self._before).append(nbytes)
        return len(self._before) + len(self._after) - 1

    def outputs(self) -> None:
        self._outputs = True

    def free(self, *blocks: int | None) -> None:
        taken = len(self._before) + len(self._after)
        self._freed += [(block, taken) for block in blocks if block is not None]

    def scratch(self, *sizes: int) -> None:
        """Allocate these together and free them at once."""
        self.free(*[self.take(nbytes) for nbytes in sizes])

    def hidden(self) -> Hidden | None:
        if not self._before and not self._after:
            return None
        return Hidden(tuple(self._before), tuple(self._after), tuple(self._freed))


Row = Callable[..., None]
"""Called with (temporaries, card, *args of the operator, **kwargs of the operator)."""
ROWS: dict[str, Row] = {}


def row(*operators: str) -> Callable[[Row], Row]:
    """Register the temporaries of these operators, named as in `OpOverloadPacket._qualified_op_name`."""

    def register(function: Row) -> Row:
        for operator in operators:
            ROWS[f"aten::{operator}"] = function
        return function

    return register


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    return ceil_div(a, multiple) * multiple


def nbytes(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of a dense copy, as it is or of another type."""
    return math.prod(tensor.shape) * (dtype or tensor.dtype).itemsize


def contiguous_copy(tensor: Tensor | None) -> int:
    """Bytes that `tensor.contiguous()` allocates: none if it already is."""
    return 0 if tensor is None or tensor.is_contiguous() else nbytes(tensor)


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """`at::acc_type` and `at::opmath_type` of a floating type on CUDA."""
    return torch.float32 if dtype in HALF else dtype
