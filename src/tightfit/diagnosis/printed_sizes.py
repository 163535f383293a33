"""The sizes of the failing line's tensor, where numbers in the log explain the request to the byte.

Three sources are tried: printed shapes, alone or several times; the result of an operator on printed shapes; and the
known model with the run's batch and length.
"""

import math
import re
from collections.abc import Iterator, Sequence

from tightfit.diagnosis.tensor_fits import Fit, Range
from tightfit.diagnosis.usual_models import Model
from tightfit.oomlog.dtypes import ELEMENT_BYTES
from tightfit.oomlog.run_facts import RunFacts

_UNSURE = 0.02
"""Share of a request up to which its rounding leaves no room for another tensor by chance."""
_DTYPES = {"float32": 4, "bfloat16/float16": 2, "float64": 8}
"""Types of a tensor whose dtype is not printed, the usual one first."""
_FLOATS = re.compile(r"\.float\(\)|torch\.float32\b|\bfloat32\b")
_SHAPE = re.compile(
    r"(?:(?P<count>\d{1,6}) (?:\w+ ){1,2}of )?"
    r"(?:(?P<name>[A-Za-z_][\w.]{0,60}?)(?:\.shape|\.size\(\))?\W{1,4})?"
    r"(?:(?:of )?[Ss]hapes?\W{1,3}(?:of )?(?=[(\[t])|(?=torch\.Size))"
    r"(?:torch\.Size\()?[(\[] ?(?P<sizes>\d{1,9}(?:, ?\d{1,9}){1,6}),? ?[)\]]\)?"
    r"(?:\W{1,3}(?:torch\.)?(?P<dtype>(?:b?float|u?int|complex)\d{1,3}|bool)\b)?"
)
"""A printed shape: `x torch.Size([2, 3])`, `x.shape: torch.Size([2, 3])`, `250 batches of shape (2, 3) float32`."""
_MARK = re.compile(r"[Ss]hapes?\W|torch\.Size")
_BEFORE, _BEHIND, _MOST_SHAPES = 90, 110, 200
"""Characters around such a word in which its tensor stands, and words from the end of a log that are looked at."""
_NAME = r"([A-Za-z_]\w{0,40}(?:\.(?!transpose|permute|m?T\b|t\()\w{1,40}){0,3})"
_SWAPPED = r"(?:\.transpose\([^()]{1,12}\)|\.permute\([^()]{1,20}\)|\.mT|\.T|\.t\(\))"
_PRODUCT = re.compile(
    rf"\b(?:bmm|matmul|mm|baddbmm)\( ?{_NAME} ?, ?{_NAME}({_SWAPPED})?|(?<![\w.]){_NAME} ?@ ?{_NAME}({_SWAPPED})?"
)
_DISTANCES = re.compile(rf"\b(?:cdist|pairwise_distances?|cosine_similarity_matrix)\( ?{_NAME} ?, ?{_NAME}")

Shape = tuple[int, ...]


def sized_tensor(tensor: str, sources: Sequence[str], run: RunFacts, model: Model | None, within: Range) -> Fit | None:
    """Return the tensor of a kind in lines.toml that printed numbers make as large as the request, or None.

    `sources` are the lines of the traceback, the failing one first. A request that stands for many sizes is not
    explained.
    """
    if within.is_small or within.high - within.low > _UNSURE * within.high:
        return None
    shapes = list(_printed(run.text))
    source = sources[0] if sources else ""
    results = [each for line in sources for each in _results(line, shapes)]
    candidates = [*results, *_alone(tensor, run, shapes), *_of_model(tensor, run, model)]
    fits = _fitting(tensor, candidates, source, within)
    return min(fits, key=lambda fit: fit.dtype == "float64", default=None)  # the rarest type counts last


def _fitting(tensor: str, shapes: list[tuple[Shape, str | None]], source: str, within: Range) -> Iterator[Fit]:
    """Yield the shapes that make the request, each in its printed dtype or in one of the usual ones."""
    for shape, printed in shapes:
        known = {printed: ELEMENT_BYTES[printed]} if printed in ELEMENT_BYTES and not _FLOATS.search(source) else None
        for dtype, size in (known or ({"float32": 4} if _FLOATS.search(source) else _DTYPES)).items():
            nbytes = math.prod(shape) * size
            if within.holds(nbytes):
                yield Fit(tensor=tensor, shape=shape, dtype=str(dtype), bytes=nbytes)


def _printed(text: str) -> Iterator[tuple[str, int, Shape, str | None]]:
    """Yield the name, the count, the shape and the dtype of each tensor that a log prints, the last one first."""
    for mark in reversed(list(_MARK.finditer(text))[-_MOST_SHAPES:]):
        around = text[max(mark.start() - _BEFORE, 0) : mark.end() + _BEHIND]
        for match in _SHAPE.finditer(around):
            shape = tuple(int(each) for each in match["sizes"].split(","))
            yield (match["name"] or "").removesuffix(".shape"), int(match["count"] or 1), shape, match["dtype"]


def _alone(
    tensor: str, run: RunFacts, shapes: list[tuple[str, int, Shape, str | None]]
) -> Iterator[tuple[Shape, str | None]]:
    """Yield each printed shape, as often as the log counts it, and once for each card where outputs are gathered."""
    world = run.numbers.get("world_size", 1) if tensor in _GATHERED else 1
    for _, count, shape, dtype in shapes:
        yield shape, dtype
        for times in {count, world} - {1}:
            yield (times * shape[0], *shape[1:]), dtype


_GATHERED = ("gathered_predictions", "gathered_outputs", "gathered_batch")


def _results(source: str, shapes: list[tuple[str, int, Shape, str | None]]) -> Iterator[tuple[Shape, str | None]]:
    """Yield the shape of the result of a product, or of all distances, on the failing line.

    >>> list(_results("sims = emb @ emb.T", [("emb", 1, (120000, 768), None)]))
    [((120000, 120000), None)]
    """
    known = {name: (shape, dtype) for name, _, shape, dtype in reversed(shapes) if name}
    for pattern in (_PRODUCT, _DISTANCES):
        for match in pattern.finditer(source):
            one, other, *swapped = [each for each in match.groups() if each is not None]
            if one in known and other in known:
                (first, dtype), (second, _) = known[one], known[other]
                yield (*first[:-1], second[-2 if swapped or pattern is _DISTANCES else -1]), dtype


_OF_VOCABULARY = ("logits", "float_logits", "loss_of_logits", "float_outputs")


def _of_model(tensor: str, run: RunFacts, model: Model | None) -> list[tuple[Shape, str | None]]:
    """Return the shapes that a tensor of this kind has in one pass of the known model."""
    numbers = run.numbers
    batch, length = numbers.get("batch_size"), numbers.get("length")
    if not batch or not length:
        return []
    vocabulary = (model.vocabulary if model else None) or numbers.get("vocabulary")
    shapes: list[Shape] = []
    if tensor in _OF_VOCABULARY and vocabulary:
        several = (1, 2) if "preference_pairs" in run.signs else (1,)  # chosen and rejected answers
        shapes = [(times * batch, tokens, vocabulary) for times in several for tokens in (length, length - 1)]
    elif model is None:
        return []
    elif tensor == "attention_scores" and model.heads:
        shapes = [(batch, model.heads, length, length)]
    elif tensor == "mlp_activation" and model.inner:
        shapes = [(batch, length, model.inner), (batch, length, 2 * model.inner)]
    elif tensor == "kv_cache" and model.head_dim and (heads := model.kv_heads or model.heads):
        most = length + numbers.get("new_tokens", 1)
        shapes = [(batch, heads, tokens, model.head_dim) for tokens in range(length, min(most, length + 8192) + 1)]
    elif tensor == "activation" and model.hidden:
        shapes = [(batch, length, model.hidden)]
    return [(shape, None) for shape in shapes]
