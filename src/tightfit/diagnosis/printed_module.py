"""A model as `print(model)` shows it: its parameters counted, and the sizes of its layers."""

import math
import re
from collections.abc import Iterator, Sequence

from tightfit.diagnosis.usual_models import Model

_LINE = re.compile(
    r"^(?P<indent> *)(?:\((?P<name>[\w-]+)\): )?(?:(?P<times>\d{1,4}) x )?(?P<kind>[A-Z]\w{1,60})\((?P<args>[^\n]*)$"
)
_COUNT = re.compile(r"(?<![\w.])\d{1,9}(?![\w.])")
_LEAST_LINES = 4
_LINEARS = re.compile(r".*Linear(?:\dbit\w*)?|Linear\w*")
_NORMS = re.compile(r".*(?:Norm|Norm\dd)")
_LONG = 400_000
"""Characters of a log in which a printed model is looked for."""

_Part = tuple[int, str, int, int]
"""Indentation, class, times it is repeated, and parameters of its own."""


def printed_module(text: str) -> Model | None:
    """Return the model that a log prints layer by layer, as PyTorch does; None without one.

    >>> text = "Net(\\n  (a): Embedding(1000, 64)\\n  (layers): ModuleList(\\n    (0-3): 4 x Block(\\n"
    >>> text += "      (up): Linear(in_features=64, out_features=256, bias=False)\\n    )\\n  )\\n)\\n"
    >>> printed_module(text).parameters
    129536
    """
    if "Linear(in_features=" not in text and "Conv2d(" not in text:
        return None
    for lines in _blocks(text[:_LONG].splitlines()):
        parts = [part for line in lines if (part := _part(line)) is not None]
        if len(parts) >= _LEAST_LINES and sum(own > 0 for *_, own in parts) > 1:
            vocabulary = next((int(each[1]) for each in map(_EMBEDDING.search, lines) if each), None)
            return Model(name=parts[0][1], parameters=_total(parts), vocabulary=vocabulary, printed=True)
    return None


_EMBEDDING = re.compile(r"\(\w*(?:embed_tokens|wte|word_embeddings|tok_embeddings)\): \w*Embedding\((\d{3,7}), \d")


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yield the lines of each printed module, from its class to its closing bracket."""
    block: list[str] = []
    for line in lines:
        if not block and (match := _LINE.match(line)) and not match["indent"] and line.rstrip().endswith("("):
            block = [line]
        elif block:
            block.append(line)
            if line.startswith(")"):
                yield block
                block = []
    if block:  # the end is cut off
        yield block


def _part(line: str) -> _Part | None:
    match = _LINE.match(line)
    if match is None:
        return None
    return len(match["indent"]), match["kind"], int(match["times"] or 1), _own(match["kind"], match["args"])


def _own(kind: str, args: str) -> int:
    """Return the parameters of one layer by its printed arguments; 0 for a module of others, or an unknown one.

    >>> _own("Linear", "in_features=8, out_features=4, bias=True)"), _own("Conv2d", "3, 64, kernel_size=(7, 7))")
    (36, 9472)
    """
    numbers = [int(each) for each in _COUNT.findall(args)]
    has_bias = "bias=False" not in args
    if "in_features=" in args and _LINEARS.fullmatch(kind) and len(numbers) > 1:
        return numbers[0] * numbers[1] + numbers[1] * has_bias
    if kind.endswith("Embedding") and len(numbers) > 1 and args[:1].isdigit():
        return numbers[0] * numbers[1]
    if kind.startswith("Conv") and "kernel_size=" in args and len(numbers) > 1:
        kernel = [int(each) for each in _COUNT.findall(args.partition("kernel_size=")[2].partition(")")[0])]
        groups = int(found[1]) if (found := re.search(r"groups=(\d+)", args)) else 1
        return numbers[0] * numbers[1] * math.prod(kernel) // groups + numbers[1] * has_bias
    if _NORMS.fullmatch(kind) and numbers and "affine=False" not in args:
        return numbers[0] * (1 if "RMS" in kind else 2)
    return 0


def _total(parts: Sequence[_Part]) -> int:
    """Return all parameters: each part's own, as often as the modules around it are repeated."""
    total, around = 0, list[tuple[int, int]]()
    for indent, _, times, own in parts:
        while around and around[-1][0] >= indent:
            around.pop()
        count = times * (around[-1][1] if around else 1)
        total += own * count
        around.append((indent, count))
    return total
