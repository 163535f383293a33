"""Sentences on failures that no tensor of PyTorch explains, by kind."""

import math
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tightfit.diagnosis.cause_records import LIKELY, MEASURED
from tightfit.diagnosis.kind_details import detail_names
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.kinds import memory_of
from tightfit.wording import kinds as wording

if TYPE_CHECKING:
    from tightfit.wording.diagnosis import Words

_DTYPES = {"float": "float32", "double": "float64", "half": "float16"}
"""TensorFlow's own names, and those that people know."""


_LARGEST_CARD = 400 * 2**30
"""Bytes that no card or chip has."""
_SMALL_ARRAY = 2**29
"""Bytes of an array on the host below which it fails only if the memory was full before it."""
_TINY = 2**20
"""Bytes below which a request fails only if the card was full before it."""


_MOVES = re.compile(r"\.to\(|\.cuda\(|\bcuda\.set_device\(|_lazy_init\(")
"""Lines of code that open a card, or move a model there."""


_OPERATOR = re.compile(r"(&&|\|\||[<>=!]=|(?<![-<>])[<>](?![=<>]))")
"""An operator of C's, around which a message has spaces."""


def values_of(facts: Facts) -> dict[str, object]:
    """Return the values that sentences on a failure may name: its figures, what follows from them, its details."""
    found: dict[str, object] = {
        name.removesuffix("_bytes"): figure.bytes for name, figure in facts.figures.items() if figure.bytes < 2**63
    }
    found |= {name: text for name, text in facts.details.items() if name not in found}
    if condition := facts.details.get("assertion"):
        found["assertion"] = _OPERATOR.sub(r" \1 ", condition)
    if facts.short_by_bytes is not None:
        found["short"] = facts.short_by_bytes
    if shape := facts.details.get("shape"):
        found["shape"] = f"({', '.join(shape.split(','))})"
    if dtype := facts.details.get("dtype"):
        found["dtype"] = _DTYPES.get(dtype, dtype)
    elif shape:
        found["unsized"] = math.prod(int(size) for size in shape.split(",") if size.strip().isdigit()) * 4
    if facts.phase == "eval" and any("transformers/trainer" in frame.file.replace("\\", "/") for frame in facts.frames):
        found["predictions"] = True
    is_moved = any(_MOVES.search(frame.source or "") for frame in facts.frames)
    if facts.phase == "setup" and facts.kind == "cuda_driver" and is_moved:
        found["at_start"] = True
    if facts.requested_bytes is not None and facts.requested_bytes < _TINY:
        found["tiny"] = True
    if facts.kind == "host_numpy" and 0 < (facts.requested_bytes or 0) < _SMALL_ARRAY:
        found["small_array"] = True
    if (facts.requested_bytes or 0) > _LARGEST_CARD:
        found["beyond_card"] = True
    if _is_square(facts.details.get("shape", "")):
        found["square"] = True
    if facts.kind == "tensorflow_out_of_memory":
        found |= dict.fromkeys(_by_axes(facts.details.get("shape", "")), True)
        if 0 < (facts.requested_bytes or 0) < _LITTLE:
            found["little"] = True
    if facts.kind in _OF_TENSORFLOW and (examples := _examples(facts.details.get("shape", ""))) is not None:
        found["examples"] = examples
    if facts.total_bytes and facts.free_bytes is not None:
        found["share_fits"] = f"{int(100 * facts.free_bytes / facts.total_bytes) / 100:.2f}"
        found.setdefault("others", facts.total_bytes - facts.free_bytes)
    return found


_OF_TENSORFLOW = ("tensorflow_out_of_memory", "tensorflow_host_memory")
_LITTLE = 2**24
"""Bytes of a tensor below which the card was full before it."""
_FEWEST_EXAMPLES = 16


def _examples(shape: str) -> int | None:
    """Return the first size of a tensor of three axes or more, which is that of the batch; None for a kernel.

    >>> _examples("600,120,1503"), _examples("64,32,3,3"), _examples("3,3,512,512")
    (600, None, None)
    """
    sizes = [int(size) for size in shape.split(",") if size.strip().isdigit()]
    if len(sizes) < 3 or sizes[0] < _FEWEST_EXAMPLES or sizes[-2] == sizes[-1] <= _LARGEST_KERNEL:
        return None
    return sizes[0]


_LONG_SIDE, _ALIKE = 20_000, 1.5
"""Rows and columns from which on an array of two similar sizes is mostly one of all pairs, or of a wrong size."""


_LARGEST_KERNEL, _FEWEST_CHANNELS, _FEWEST_PLACES = 7, 64, 9
"""Side of a convolution's kernel, its channels, and the length of an axis that is neither."""


def _by_axes(shape: str) -> Iterator[str]:
    """Yield the signs in a TensorFlow tensor's axes: the weight of a convolution, a batch of one, large pictures.

    >>> list(_by_axes("3,3,512,2048")), list(_by_axes("1,2988,5312,64")), list(_by_axes("16,257,257,32"))
    (['kernel'], ['single'], [])
    >>> list(_by_axes("5,64,4890,4890"))
    ['wide']
    """
    sizes = [int(size) for size in shape.split(",") if size.strip().isdigit()]
    if len(sizes) == 4 and sizes[0] == sizes[1] <= _LARGEST_KERNEL and min(sizes[2:]) >= _FEWEST_CHANNELS:
        yield "kernel"
    elif len(sizes) >= 3 and sizes[0] == 1 and sizes[1] >= _FEWEST_PLACES:
        yield "single"
    elif len(sizes) == 4 and _is_of_large_picture(sizes[1:]):
        yield "wide"


_WIDE = 1000
"""Rows and columns from which on the pictures, and not the batch, make a tensor large."""


def _is_of_large_picture(sizes: Sequence[int]) -> bool:
    """Return True for the axes of pictures with many rows and columns: the channels are first or last."""
    return min(sizes[:2]) >= _WIDE or min(sizes[1:]) >= _WIDE


def _is_square(shape: str) -> bool:
    sizes = sorted(int(size) for size in shape.split(",") if size.isdigit())
    return len(sizes) == 2 and sizes[0] >= _LONG_SIDE and sizes[1] <= _ALIKE * sizes[0]


def key_for(keys: Mapping[str, object], kind: str, known: Mapping[str, object]) -> str | None:
    """Return the first key `kind__name` with a known name, else `kind` if it is a key."""
    kinds = (kind, _ALIKE_KINDS.get(kind))
    named = (key for key in keys if key.partition("__")[0] in kinds and key.partition("__")[2] in known)
    sayable = (key for key in named if _fields(keys[key]) <= known.keys())
    return next(sayable, kind if kind in keys else None)


_ALIKE_KINDS = {"host_memory_error": "host_numpy"}
"""Kinds of which the second's sentences on a detail are true of the first, too."""


def _fields(sentence: object) -> set[str]:
    """Return the names that a sentence fills in; none for a list of fixes."""
    parsed = string.Formatter().parse(sentence) if isinstance(sentence, str) else ()
    return {name for _, name, _, _ in parsed if name}


_TWO_ENDS = re.compile(r"([?!…])\.(?=\s|$)")
"""A quoted question, and the end of the sentence that quotes it."""


_NO_SPACE = re.compile(r"(\d)([KMGT]i?B)\b")
"""A size as a message prints it, without a space before its unit."""


def said(table: str, facts: Facts, words: "Words") -> str:
    """Return the sentence of a failure in the table `problem` or `cause`."""
    sentences, known = wording.words(words.language), values_of(facts)
    if (key := key_for(sentences.table(table), facts.kind, known)) is not None:
        return _NO_SPACE.sub(r"\1 \2", _TWO_ENDS.sub(r"\1", sentences(table, key, **known)))
    return words({"problem": "kinds", "cause": "kind_causes"}[table], facts.kind)


_TOLD_CAUSES = frozenset({"growing", "loading", "resuming", "pairs_shape", "share_asked"})
"""Details of a person's report by which its sentence names a likely cause."""


_SUPPOSES = re.compile(r"\b[Uu]sually\b")
"""A word by which a sentence tells what is usual, and measures nothing."""


def label_of(facts: Facts) -> str:
    """Return the evidence of a kind's cause: measured where the message itself names it."""
    if "cause_unstated" in facts.notes:
        return LIKELY
    if "reported" in facts.details and facts.kind == "program_words":  # its sentence says what is not known
        return LIKELY if _TOLD_CAUSES & facts.details.keys() else MEASURED
    causes, values = wording.words("en").table("cause"), values_of(facts)
    if _SUPPOSES.search(str(causes.get(key_for(causes, facts.kind, values) or "", ""))):
        return LIKELY
    if (key_for(causes, facts.kind, values) or "").partition("__")[2] in detail_names():  # words elsewhere in the log
        return LIKELY
    known = (key.partition("__") for key in causes if key.startswith(f"{facts.kind}__"))
    by_figures = any(_has_digit(values.get(name)) and name not in detail_names() for _, _, name in known)
    return MEASURED if by_figures or memory_of(facts.kind) in ("host", "none") else LIKELY


def _has_digit(value: object) -> bool:
    """Return True for a figure of the message; the name of a library or a program measures nothing."""
    return value is not None and any(each.isdigit() for each in str(value))


def fix_said(code: str, facts: Facts, words: "Words") -> str:
    """Return the words of a fix with a code that begins with `kind_`."""
    name = code.removeprefix("kind_")
    sentences = wording.words(words.language)
    if sentences.has("fix", name):
        return sentences("fix", name, **values_of(facts))
    return words("kind_advice", name)


def expected_said(facts: Facts, words: "Words") -> str:
    """Return the sentence on the expected result of a kind's fixes."""
    sentences = wording.words(words.language)
    is_own = sentences.has("expected", facts.kind) and "tried_zero" not in facts.details
    return sentences("expected", facts.kind if is_own else memory_of(facts.kind))
