"""Rows of the kernel table: the memory that an operator's CUDA code allocates and frees besides its results.

A row follows the C++ body line by line. It calls `take` where the code allocates, `outputs` where the results exist,
and `free` where a temporary dies before the end. Sizes are as requested; the allocator rounds them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Step = tuple[Literal["take", "outputs", "free"], int]
HALF = (torch.float16, torch.bfloat16)
Scalar = bool | int | float | complex
Argument = (
    Tensor
    | Scalar
    | str
    | torch.dtype
    | torch.device
    | torch.layout
    | torch.memory_format
    | torch.Generator
    | Sequence["Argument"]
    | None
)
"""A value that an operator is called with, or returns."""
Arguments = tuple[Argument, ...]


def tensors_in(values: Iterable[Argument]) -> Iterator[Tensor]:
    """Yield the tensors among values and in their lists; collectives have lists of lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


Options = dict[str, Argument]
"""Arguments that an operator is called with by name."""
Dims = int | Sequence[int] | None
"""Dimensions to reduce; None for all."""


@dataclass(frozen=True)
class Hidden:
    """Temporaries of one operator, in bytes. None has zero bytes: the allocator hands out no such block."""

    before: tuple[int, ...] = ()
    """Taken before the outputs, in this order."""
    after: tuple[int, ...] = ()
    """Taken once the outputs exist, in this order."""
    freed_early: tuple[tuple[int, int], ...] = ()
    """Pairs (i, n): entry i of `before + after` is freed as soon as n entries have been taken.

    An entry of `before` with n = len(before) is freed before the outputs. All others live until the operator ends.
    """

    def steps(self) -> Iterator[Step]:
        """Yield ("take", bytes), ("outputs", 0) and ("free", i) in order. The operator's end frees the rest."""
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
        """Most bytes held at once, without the outputs."""
        sizes, held, peak = self.before + self.after, 0, 0
        for what, number in self.steps():
            held += {"take": number, "free": -sizes[number] if what == "free" else 0}.get(what, 0)
            peak = max(peak, held)
        return peak


class Temporaries:
    """Temporaries of one operator, collected in the order of its code."""

    def __init__(self) -> None:
        self._before: list[int] = []
        self._after: list[int] = []
        self._freed: list[tuple[int, int]] = []
        self._outputs = False

    def take(self, nbytes: int) -> int | None:
        """Allocate, and return the number that `free` takes; None for zero bytes."""
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
"""A function of (temporaries, card, *args of the operator, **kwargs of the operator)."""
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
    """Bytes of a dense copy, of the same type or of another."""
    return math.prod(tensor.shape) * (dtype or tensor.dtype).itemsize


def contiguous_copy(tensor: Tensor | None) -> int:
    """Bytes that `tensor.contiguous()` allocates: none for a contiguous tensor."""
    return 0 if tensor is None or tensor.is_contiguous() else nbytes(tensor)


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """Return `at::acc_type` and `at::opmath_type` of a floating type on CUDA."""
    return torch.float32 if dtype in HALF else dtype
