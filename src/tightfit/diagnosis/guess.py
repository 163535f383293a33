"""Which tensors make a request of a printed size, when nothing is known of the run: usual models, most likely first.

PyTorch's allocator asks the device for 2 MiB on behalf of anything up to 1 MiB, for 20 MiB up to 10 MiB, and for the
next multiple of 2 MiB above (c10/core/AllocatorConfig.h), so a printed request stands for a range of sizes.
"""

from collections.abc import Iterator

import msgspec
from msgspec.structs import replace

from tightfit.oomlog.facts import Figure
from tightfit.units import MIB

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SMALL = {2 * MIB: (1, MIB), 20 * MIB: (MIB + 1, 10 * MIB - 1)}
"""Tensor bytes that such a request may stand for."""
_ROUND = 2 * MIB

_VOCABULARIES = {
    50_304: 1.0, 50_257: 1.0, 32_000: 0.7, 128_256: 0.7, 151_936: 0.7, 32_064: 0.3, 30_522: 0.5, 30_528: 0.2,
    256_000: 0.3, 250_002: 0.2, 151_669: 0.1, 152_064: 0.3, 49_152: 0.3, 100_277: 0.2, 32_768: 0.3, 50_280: 0.1,
    50_265: 0.2, 51_200: 0.15, 262_144: 0.2, 65_536: 0.15, 65_024: 0.1, 32_128: 0.2, 21_128: 0.2, 65: 0.4,
}  # fmt: skip
"""Vocabulary sizes of usual models, and how usual: GPT-2 (padded), Llama, Qwen, BERT, T5, Gemma, characters."""
_BLOCKS = {
    1024: 1.0, 512: 0.8, 2048: 0.8, 256: 0.7, 128: 0.5, 4096: 0.6, 8192: 0.3, 768: 0.15, 384: 0.1, 1536: 0.1, 640: 0.03,
    3072: 0.05, 6144: 0.03,
}  # fmt: skip
_BATCHES = {
    1: 0.6, 2: 0.7, 4: 0.8, 8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0, 128: 0.6, 256: 0.3, 512: 0.2, 12: 0.9, 6: 0.4, 24: 0.4,
    10: 0.2, 20: 0.2, 48: 0.3, 96: 0.2, 3: 0.2, 5: 0.15, 40: 0.1, 80: 0.05, 100: 0.15, 180: 0.05, 192: 0.05, 384: 0.03,
}  # fmt: skip
_HEADS = {12: 1.0, 16: 0.6, 20: 0.3, 25: 0.3, 32: 0.5, 8: 0.4, 6: 0.3, 40: 0.1, 64: 0.1}
_WIDTHS = {768: 1.0, 1024: 0.6, 1280: 0.4, 1600: 0.4, 2048: 0.4, 4096: 0.4, 384: 0.3, 512: 0.3, 2560: 0.1, 5120: 0.1}
_DTYPES = {"bfloat16": 1.0, "float16": 0.7, "float32": 0.9}
_MORE_LIKELY_THAN_NOT = 0.5
"""A tensor is named only above this score."""
_ROLES = {"logits": 1.0, "attention_scores": 0.35, "mlp_activation": 0.25}


class Guess(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of a usual model that makes a request of that size."""

    role: str
    """logits (or their gradient, or the loss's float32 copy if dtype is float32), attention_scores, mlp_activation."""
    batch: int
    block: int
    dtype: str
    tensor_bytes: int
    score: float
    """How usual the combination is; the scores of all guesses of a request add up to 1."""
    vocab_size: int | None = None
    heads: int | None = None
    width: int | None = None
    """n_embd; an MLP's activation has four times as many channels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As nanoGPT shapes it: logits are (tokens, vocabulary)."""
        if self.role == "logits":
            return (self.batch * self.block, self.vocab_size or 0)
        if self.role == "attention_scores":
            return (self.batch, self.heads or 0, self.block, self.block)
        return (self.batch, self.block, 4 * (self.width or 0))


class Guesses(msgspec.Struct, frozen=True, kw_only=True):
    """What a request may have been for."""

    tensor_low: int
    """Least bytes of a tensor that makes this request."""
    tensor_high: int
    cannot_be_told: bool
    """Whether the request is one that the allocator makes for any small tensor."""
    likely: tuple[Guess, ...]
    """Most likely first; empty if it cannot be told, or no usual model has such a tensor."""

    @property
    def named(self) -> Guess | None:
        """The first guess if it is more likely than all others together, else None."""
        return self.likely[0] if self.likely and self.likely[0].score > _MORE_LIKELY_THAN_NOT else None


def request_of(tensor_bytes: int) -> int:
    """What the allocator asks the device for, with its default settings, when nothing cached fits.

    >>> request_of(65_536 * 50_304 * 2) / 2**20, request_of(600) / 2**20
    (6288.0, 2.0)
    """
    if tensor_bytes <= MIB:
        return 2 * MIB
    if tensor_bytes < 10 * MIB:
        return 20 * MIB
    return -(-tensor_bytes // _ROUND) * _ROUND


def guess(requested: Figure, *, most: int = 12) -> Guesses:
    """The tensors of usual models that make a printed request, rounding considered.

    >>> found = guess(Figure.printed("6.14 GiB")).likely[0]
    >>> found.role, found.batch, found.block, found.vocab_size, found.dtype
    ('logits', 64, 1024, 50304, 'bfloat16')
    """
    low, high, told = _tensor_range(requested)
    if not told:
        return Guesses(tensor_low=low, tensor_high=high, cannot_be_told=True, likely=())
    found = sorted(_candidates(low, high), key=lambda each: (-each.score, each.batch, each.block))
    total = sum(each.score for each in found)
    kept: dict[tuple[object, ...], Guess] = {}
    for each in found:
        share = each.score / total
        key = (each.role, each.batch, each.block, each.vocab_size, each.heads, each.width, each.dtype)
        kept.setdefault(key, replace(each, score=share))
    return Guesses(tensor_low=low, tensor_high=high, cannot_be_told=False, likely=tuple(kept.values())[:most])


def _tensor_range(requested: Figure) -> tuple[int, int, bool]:
    """Bytes of the tensors that make a request which prints so, and whether that says anything."""
    for request, (low, high) in SMALL.items():
        if requested.low <= request <= requested.high and requested.bytes == request:
            # 20 MiB is also what a tensor between 18 and 20 MiB asks for.
            return low, request if request > 2 * MIB else high, False
    first = -(-requested.low // _ROUND) * _ROUND
    last = requested.high // _ROUND * _ROUND
    if first > last:  # no multiple of 2 MiB: other settings, or another backend, which ask for the tensor itself
        return requested.low, requested.high, True
    return first - _ROUND + 1, last, True


def _candidates(low: int, high: int) -> Iterator[Guess]:
    for dtype, usual_dtype in _DTYPES.items():
        size = ELEMENT_BYTES[dtype]
        for block, usual_block in _BLOCKS.items():
            for batch, usual_batch in _BATCHES.items():
                tokens, usual = batch * block, usual_dtype * usual_block * usual_batch
                for vocabulary, usual_vocabulary in _VOCABULARIES.items():
                    if low <= tokens * vocabulary * size <= high:
                        yield Guess(
                            role="logits", batch=batch, block=block, dtype=dtype, vocab_size=vocabulary,
                            tensor_bytes=tokens * vocabulary * size,
                            score=_ROLES["logits"] * usual * usual_vocabulary,
                        )  # fmt: skip
                for heads, usual_heads in _HEADS.items():
                    if low <= tokens * block * heads * size <= high:
                        yield Guess(
                            role="attention_scores", batch=batch, block=block, dtype=dtype, heads=heads,
                            tensor_bytes=tokens * block * heads * size,
                            score=_ROLES["attention_scores"] * usual * usual_heads,
                        )  # fmt: skip
                for width, usual_width in _WIDTHS.items():
                    if low <= tokens * 4 * width * size <= high:
                        yield Guess(
                            role="mlp_activation", batch=batch, block=block, dtype=dtype, width=width,
                            tensor_bytes=tokens * 4 * width * size,
                            score=_ROLES["mlp_activation"] * usual * usual_width,
                        )  # fmt: skip
