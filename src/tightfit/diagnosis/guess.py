"""Tensors of usual models that make a request of a printed size, most likely first, where the run is unknown.

PyTorch's allocator asks the device for 2 MiB on behalf of anything up to 1 MiB, for 20 MiB up to 10 MiB, and for the
next multiple of 2 MiB above (c10/core/AllocatorConfig.h), so a printed request stands for a range of sizes.
"""

import csv
import functools
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from math import prod

import msgspec
from msgspec.structs import replace

from tightfit.oomlog.facts import Figure
from tightfit.units import MIB

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SMALL = {2 * MIB: (1, MIB), 20 * MIB: (MIB + 1, 10 * MIB - 1)}
"""Tensor bytes that such a request may stand for."""
_ROUND = 2 * MIB
_DTYPES = {"bfloat16": 1.0, "float16": 0.7, "float32": 0.9}
"""Weight of each dtype; the weights of sizes are in usual_sizes.csv."""
_TENSORS = {"logits": ("vocab_size", 1.0), "attention_scores": ("heads", 0.35), "mlp_activation": ("width", 0.25)}
"""Quantity that each tensor grows with, besides its tokens, and the tensor's weight."""
_MORE_LIKELY_THAN_NOT = 0.5
"""A tensor is named only above this score."""
_DIGITS = 4


class Guess(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of a usual model that makes a request of that size."""

    tensor: str
    """logits (or their gradient, or the loss's float32 copy if dtype is float32), attention_scores, mlp_activation."""
    batch: int
    block: int
    vocab_size: int | None = None
    heads: int | None = None
    width: int | None = None
    """n_embd; an MLP's activation has four times as many channels."""
    dtype: str
    shape: tuple[int, ...]
    """Shape in nanoGPT: logits are (tokens, vocabulary)."""
    tensor_bytes: int
    score: float
    """Share of this combination among all that make the request, by how usual each is."""


class Guesses(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors that may have made a request."""

    tensor_low: int
    """Least bytes of a tensor that makes this request."""
    tensor_high: int
    cannot_be_told: bool
    """True if the allocator makes this request for any small tensor."""
    likely: tuple[Guess, ...] = ()
    """Most likely first; empty if it cannot be told, or no usual model has such a tensor."""
    named: Guess | None = None
    """The first guess if it is more likely than all others together."""


def guess(requested: Figure, *, most: int = 12) -> Guesses:
    """Return the tensors of usual models that make a printed request, rounding considered.

    >>> found = guess(Figure.printed("6.14 GiB")).likely[0]
    >>> found.tensor, found.batch, found.block, found.vocab_size, found.dtype
    ('logits', 64, 1024, 50304, 'bfloat16')
    """
    low, high, told = _tensor_range(requested)
    if not told:
        return Guesses(tensor_low=low, tensor_high=high, cannot_be_told=True)
    found = sorted(_candidates(low, high), key=lambda each: (-each.score, each.batch, each.block))
    total = sum(each.score for each in found)
    likely = tuple(replace(each, score=round(each.score / total, _DIGITS)) for each in found[:most])
    is_named = bool(found) and found[0].score / total > _MORE_LIKELY_THAN_NOT
    named = likely[0] if is_named else None
    return Guesses(tensor_low=low, tensor_high=high, cannot_be_told=False, likely=likely, named=named)


def _tensor_range(requested: Figure) -> tuple[int, int, bool]:
    """Return bytes of the tensors that make this request, at least and at most; False if any small tensor makes it."""
    for request, (low, high) in SMALL.items():
        if requested.low <= request <= requested.high and requested.bytes == request:
            # 20 MiB is also what a tensor between 18 and 20 MiB asks for.
            return low, request if request > 2 * MIB else high, False
    first = -(-requested.low // _ROUND) * _ROUND
    last = requested.high // _ROUND * _ROUND
    if first > last:  # no multiple of 2 MiB: other settings, or another backend, which ask for the tensor itself
        return requested.low, requested.high, True
    return first - _ROUND + 1, last, True


@functools.cache
def _usual_sizes() -> dict[str, dict[int, float]]:
    """Read the weight of each usual size, by quantity."""
    sizes: dict[str, dict[int, float]] = {}
    with files("tightfit.diagnosis").joinpath("usual_sizes.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            sizes.setdefault(row["quantity"], {})[int(row["value"])] = float(row["usual"])
    return sizes


def _candidates(low: int, high: int) -> Iterator[Guess]:
    """Yield each tensor of `low` to `high` bytes; its score is the product of its weights."""
    sizes = _usual_sizes()
    for dtype, block, batch in product(_DTYPES, sizes["block"], sizes["batch"]):
        usual = _DTYPES[dtype] * sizes["block"][block] * sizes["batch"][batch]
        for tensor, (quantity, weight) in _TENSORS.items():
            for size, usual_size in sizes[quantity].items():
                shape = _shape(tensor, batch, block, size)
                nbytes = ELEMENT_BYTES[dtype] * prod(shape)
                if low <= nbytes <= high:
                    yield Guess(
                        tensor=tensor,
                        batch=batch,
                        block=block,
                        vocab_size=size if quantity == "vocab_size" else None,
                        heads=size if quantity == "heads" else None,
                        width=size if quantity == "width" else None,
                        dtype=dtype,
                        shape=shape,
                        tensor_bytes=nbytes,
                        score=weight * usual * usual_size,
                    )


def _shape(tensor: str, batch: int, block: int, size: int) -> tuple[int, ...]:
    if tensor == "logits":
        return (batch * block, size)
    return (batch, size, block, block) if tensor == "attention_scores" else (batch, block, 4 * size)
