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
    candidates = [*results, *_alone(tensor, run, shapes), *_of_model(tensor, run, model), *_of_layers(tensor, run.text)]
    candidates += _of_partition(run, model) if tensor == "zero_partition" and model else []
    candidates += _COMBINED[tensor](run.text, [shape for _, _, shape, _ in shapes]) if tensor in _COMBINED else []
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


_CLASSES = re.compile(r"\b(\d{1,4}) classes\b|\b(?:num_classes|n_classes|out_channels)[\"']?\s?[:=]\s?(\d{1,4})\b")
_GRAPH = re.compile(r"\b(edge_index|adj_t|x)=\[(\d{1,10}), (\d{1,10})\]")
_COORDINATES = (2, 3)
"""Numbers of a place in a picture, or in a room."""


def _of_pairs(text: str, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, str | None]]:
    """Yield all pairs of the rows of two printed tensors, and the same with the coordinates of each.

    >>> next(_of_pairs("", [(1200, 4), (261888, 4)]))
    ((1200, 261888), None)
    """
    counts = [shape[0] for shape in dict.fromkeys(shapes) if len(shape) == len(_COORDINATES)]
    for at, one in enumerate(counts):
        for other in counts[at + 1 :] or counts:
            yield (one, other), None
            yield from (((one, other, each), None) for each in _COORDINATES)


def _of_windows(text: str, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, str | None]]:
    """Yield the scores of all printed classes for each place of a printed picture or volume.

    >>> list(_of_windows("14 classes", [(1, 1, 512, 512, 512)]))
    [((1, 14, 512, 512, 512), None)]
    """
    classes = dict.fromkeys(int(match[1] or match[2]) for match in _CLASSES.finditer(text))
    for shape in dict.fromkeys(shapes):
        if len(shape) > _AXES_OF_PICTURE:
            yield from (((shape[0], each, *shape[2:]), None) for each in classes)


_AXES_OF_PICTURE = 3
"""Axes of a picture without its batch."""


def _of_edges(text: str, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, str | None]]:
    """Yield the features of a printed graph's nodes, picked for each of its edges.

    >>> list(_of_edges("Data(edge_index=[2, 5000], x=[300, 16])", []))
    [((5000, 16), None)]
    """
    sizes = {match[1]: (int(match[2]), int(match[3])) for match in _GRAPH.finditer(text)}
    if "edge_index" in sizes and "x" in sizes:
        yield (sizes["edge_index"][1], sizes["x"][1]), None


_COMBINED = {"pairs": _of_pairs, "window_results": _of_windows, "edge_features": _of_edges}
"""What makes the sizes of a kind of tensor from several printed ones."""


def _of_partition(run: RunFacts, model: Model) -> list[tuple[Shape, str | None]]:
    """Return all parameters of the model in one tensor, and each rank's part of them."""
    ranks = run.numbers.get("world_size", 1)
    return [((math.ceil(model.parameters / each),), None) for each in {1, ranks}] if model.parameters else []


_LAYER = re.compile(r"\b(?:Embedding\(|Linear\(in_features=)(\d{2,7}), (?:out_features=)?(\d{2,7})")
_OF_WEIGHTS = ("converted_weight", "created_weight", "moved_model")


def _of_layers(tensor: str, text: str) -> Iterator[tuple[Shape, str | None]]:
    """Yield the weights of the layers that a log prints with the module, for a tensor that is a weight.

    >>> list(_of_layers("moved_model", "(wte): Embedding(50257, 768)"))
    [((50257, 768), None)]
    """
    if tensor in _OF_WEIGHTS:
        for match in dict.fromkeys(each.groups() for each in _LAYER.finditer(text)):
            yield (int(match[0]), int(match[1])), None


_OF_VOCABULARY = ("logits", "float_logits", "loss_of_logits", "float_outputs")


def _of_model(tensor: str, run: RunFacts, model: Model | None) -> list[tuple[Shape, str | None]]:
    """Return the shapes that a tensor of this kind has in one pass of the known model, on one of its cards."""
    numbers = run.numbers
    batch, length = numbers.get("batch_size"), numbers.get("length", 0)
    parts = numbers.get("tensor_parallel", 1)
    vocabulary = (model.vocabulary if model else None) or numbers.get("vocabulary")
    shapes: list[Shape] = []
    if not batch:
        return []
    if tensor in _OF_VOCABULARY and vocabulary:
        shapes = [(*rows, vocabulary // parts) for rows in _rows_of_logits(run, batch, length)]
    elif model is None or not length:
        return []
    elif tensor == "attention_scores" and model.heads:
        shapes = [(batch, model.heads // parts, length, length)]
    elif tensor == "mlp_activation" and model.inner:
        shapes = [(batch, length, times * model.inner // parts) for times in (1, 2)]
    elif tensor == "kv_cache" and model.head_dim and (heads := model.kv_heads or model.heads):
        most = length + numbers.get("new_tokens", 1)
        shapes = [(batch, heads, tokens, model.head_dim) for tokens in range(length, min(most, length + 8192) + 1)]
    elif tensor == "activation" and model.hidden:
        shapes = [(batch, length, model.hidden)]
    return [(shape, None) for shape in shapes]


def _rows_of_logits(run: RunFacts, batch: int, length: int) -> Iterator[Shape]:
    """Yield the axes of logits before the vocabulary: sequences and tokens, or one token of each beam."""
    several = (1, 2) if "preference_pairs" in run.signs else (1,)  # chosen and rejected answers
    for tokens in {length, length - 1, run.numbers.get("completion", 0)}:
        if tokens > 0:
            yield from ((times * batch, tokens) for times in several)
    if "beams" in run.numbers:
        yield (batch * run.numbers["beams"],)
