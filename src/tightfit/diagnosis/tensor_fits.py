"""Tensors of a model that make a request of a printed size: weights, shards, logits, attention scores, activations.

PyTorch's allocator asks the device for 2 MiB on behalf of anything up to 1 MiB, for 20 MiB up to 10 MiB, and for the
next multiple of 2 MiB above (c10/core/AllocatorConfig.h), so a printed request stands for a range of sizes.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod

import msgspec

from tightfit.diagnosis.usual_models import Model, all_models
from tightfit.oomlog.facts import Figure
from tightfit.oomlog.run_facts import RunFacts
from tightfit.units import MIB

ELEMENTS = {"bfloat16/float16": 2, "float32": 4}
"""Bytes of a number; bfloat16 and float16 are not told apart by a size."""
FOUR_BIT = {"4 bits": 0.5}
SMALL = {2 * MIB: (1, MIB), 20 * MIB: (MIB + 1, 10 * MIB - 1)}
"""Tensor bytes that such a request may stand for; 20 MiB are also asked for by 18 to 20 MiB."""
_ROUND = 2 * MIB
_MOST_RANKS = 64


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the tensors that make one request."""

    low: int
    high: int
    is_small: bool = False
    """True if the allocator makes this request for any small tensor, so that its size cannot be told."""

    def holds(self, nbytes: int) -> bool:
        return self.low <= nbytes <= self.high


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that makes the request."""

    tensor: str
    """weight, shard, logits, attention_scores, mlp_activation or hidden_states."""
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    models: tuple[str, ...] = ()
    ranks: int | None = None
    """Cards among which a shard's parameters are divided."""


def range_of(requested: Figure) -> Range:
    """Return the bytes of the tensors that make a request, its rounding considered.

    >>> range_of(Figure.printed("136.00 MiB")).low / MIB
    134.00000095367432
    """
    for request, (low, high) in SMALL.items():
        if requested.low <= request <= requested.high and requested.bytes == request:
            return Range(low=low, high=request if request > 2 * MIB else high, is_small=True)
    first = -(-requested.low // _ROUND) * _ROUND
    last = requested.high // _ROUND * _ROUND
    if first > last:  # no multiple of 2 MiB: other settings, or another backend, which ask for the tensor itself
        return Range(low=requested.low, high=requested.high)
    return Range(low=first - _ROUND + 1, high=last)


HALF = {"bfloat16/float16": 2.0}
"""Bytes of a number in a server's weights, unless they are quantised."""


ONE_BYTE = {"uint8": 1.0}
"""Bytes of a number in an optimizer's state of 8 bits."""


def weights(
    models: Iterable[Model], within: Range, elements: Mapping[str, float] = ELEMENTS, *, merged: bool = False
) -> tuple[Fit, ...]:
    """Return the weights of some models that make the request; a shape of several models is one fit."""
    found: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for model in models:
        for shape in dict.fromkeys(tuple(sorted(each)) for each in model.matrices(merged=merged)):
            for dtype, size in elements.items():
                if dtype in FOUR_BIT and model.vocabulary in shape:  # embeddings stay in 16 bits
                    continue
                if within.holds(round(prod(shape) * size)):
                    found.setdefault((shape, dtype), []).append(model.name)
    return tuple(
        Fit(tensor="weight", shape=shape, dtype=dtype, bytes=round(prod(shape) * elements[dtype]), models=tuple(names))
        for (shape, dtype), names in found.items()
    )


def usual_weights(within: Range, *, draws: bool = False) -> tuple[Fit, ...]:
    """Return the weights of all usual models that make the request, or of those in a program that draws pictures."""
    models = (each for each in all_models() if not draws or each.kind == "diffusion" or each.family in _TEXT_ENCODERS)
    return weights(models, within)


_TEXT_ENCODERS = ("t5", "clip")
"""Families of the models that read the prompts of a picture."""


def all_fits(model: Model, run: RunFacts, within: Range) -> tuple[Fit, ...]:
    """Return every kind of tensor of a run that makes the request; its batch and length are known."""
    batch, length = run.numbers.get("batch_size"), run.numbers.get("length")
    found = [*weights([model], within), *shards(model, run, within)]
    if batch and length and model.hidden:
        found += _of_tokens(model, batch, length, within)
    return tuple(found)


def shards(model: Model, run: RunFacts, within: Range) -> Iterator[Fit]:
    """Yield flat shares of all parameters: whole, or divided among ranks by ZeRO or FSDP."""
    parameters, world = model.parameters, run.numbers.get("world_size")
    if not parameters:
        return
    divided = {"deepspeed", "fsdp"} & run.signs
    counts = [1, *([world] if world and divided else range(2, _MOST_RANKS + 1) if divided else [])]
    for ranks in dict.fromkeys(counts):
        for dtype, size in ELEMENTS.items():
            share = -(-parameters // ranks)
            # Each rank's share is padded: by a few numbers for a parameter.
            if within.low <= share * size * 1.001 and share * size <= within.high:
                yield Fit(tensor="shard", shape=(share,), dtype=dtype, bytes=share * size, ranks=ranks)


def _of_tokens(model: Model, batch: int, length: int, within: Range) -> Iterator[Fit]:
    """Yield tensors that grow with the tokens, for any number of tokens up to batch x length."""
    for dtype, size in ELEMENTS.items():
        for tensor, channels in (
            ("logits", model.vocabulary),
            ("mlp_activation", model.inner),
            ("hidden_states", model.hidden),
        ):
            if not channels:
                continue
            tokens = min(within.high // (channels * size), batch * length)
            if tokens * channels * size >= within.low:
                shape = (tokens, channels)
                yield Fit(tensor=tensor, shape=shape, dtype=dtype, bytes=prod(shape) * size)
        if model.heads:
            side = int((within.high / (batch * model.heads * size)) ** 0.5)
            nbytes = batch * model.heads * side * side * size
            if within.holds(nbytes) and side <= length:
                scores = (batch, model.heads, side, side)
                yield Fit(tensor="attention_scores", shape=scores, dtype=dtype, bytes=nbytes)
