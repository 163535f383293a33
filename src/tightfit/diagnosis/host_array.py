"""The size of an array on the host that the failing line makes, where the line or the report has its numbers."""

import re
from math import prod

import msgspec

from tightfit.oomlog.dtypes import ELEMENT_BYTES
from tightfit.oomlog.facts import Facts, Figure
from tightfit.units import MIB

_MADE = (
    r"(?<![\w.])(?:np|numpy)\.(?P<function>zeros|ones|empty|ndarray|full)\(\s*(?:shape ?= ?)?"
    r"[\[(](?P<sizes>[^\[\]()]{1,120})[\])](?P<rest>[^\n]*)"
)
_DTYPE = (
    r"(?:dtype ?= ?|^ ?, ?)(?:np\.|numpy\.|[\"'])?"
    r"(?P<dtype>float(?:16|32|64)|u?int(?:8|16|32|64)|complex(?:64|128)|bool)_?\b"
)
_ANY_DTYPE = r"dtype|^ ?, ?[\w.\"']"
_CREATES = r"(?:np|numpy)\.\w+\("
_NAME = r"[A-Za-z_][\w.]*"
_PRODUCT = r"(?<![\w.])\d[\d,_]{0,14}(?: ?[x×*] ?\d[\d,_]{0,14}){1,5}(?![\w.]\d)"
_MOST_REAL, _LEAST = 2**44, 16 * MIB
"""Bytes between which an array may well be the reason: larger is a mistake in a size, smaller fails only if the memory
was full before."""


class HostArray(msgspec.Struct, frozen=True, kw_only=True):
    """An array of NumPy's."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


def array_of_line(source: str, text: str) -> HostArray | None:
    """Return the array that a line of code makes; a name in its shape takes the number that `text` has in its place.

    >>> array_of_line("x = np.zeros((8000, 224, 224, 3), dtype=np.float32)", "").bytes
    4816896000
    >>> array_of_line("f = np.empty([n, 196, 512], np.float16)", "n is 80k, so 82783x196x512 values").shape
    (82783, 196, 512)
    >>> array_of_line("f = np.empty([n, 196])", "n is large")
    """
    made = re.search(_MADE, source) if len(re.findall(_CREATES, source)) == 1 else None
    dtype = _dtype_of(made["function"], made["rest"]) if made else None
    if made is None or dtype is None:
        return None
    sizes = [each.strip() for each in made["sizes"].split(",") if each.strip()]
    shape = _literal(sizes) or next(filter(None, (_in_place(sizes, each) for each in _products(text))), None)
    return HostArray(shape=shape, dtype=dtype) if shape else None


def _dtype_of(function: str, rest: str) -> str | None:
    """Return the dtype of the elements; NumPy's own is float64, but that of a filled array is the value's."""
    if (stated := re.search(_DTYPE, rest)) is not None:
        return stated["dtype"]
    return None if function == "full" or re.search(_ANY_DTYPE, rest) else "float64"


def _literal(sizes: list[str]) -> tuple[int, ...] | None:
    numbers = [each.replace("_", "") for each in sizes]
    return tuple(map(int, numbers)) if numbers and all(map(str.isdigit, numbers)) else None


def _products(text: str) -> list[tuple[int, ...]]:
    """Return the products of numbers that a text writes out, such as 82783x196x512."""
    found = (re.split(r" ?[x×*] ?", match[0]) for match in re.finditer(_PRODUCT, text))
    return [tuple(int(each.replace(",", "").replace("_", "")) for each in sizes) for sizes in found]


def _in_place(sizes: list[str], numbers: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the numbers if they are those of the shape, with one in the place of each name."""
    known = [size.replace("_", "") for size in sizes]
    fits = len(known) == len(numbers) and any(map(str.isdigit, known))
    same = fits and all(
        re.fullmatch(_NAME, size) or size == str(number) for size, number in zip(known, numbers, strict=True)
    )
    return numbers if same else None


def with_array(facts: Facts, text: str) -> Facts:
    """Return a lack of the host's memory with the array of its failing line, where the message states no size."""
    source = facts.frames[-1].source if facts.frames else None
    if source is None or facts.requested_bytes is not None:
        return facts
    array = array_of_line(source, text)
    if array is None or not _LEAST <= array.bytes <= _MOST_REAL:
        return facts
    size = Figure(bytes=array.bytes, low=array.bytes, high=array.bytes, stated=False)
    details = {"shape": ",".join(map(str, array.shape)), "dtype": array.dtype, "by_line": "yes"}
    return msgspec.structs.replace(
        facts, figures={**facts.figures, "requested_bytes": size}, details={**facts.details, **details}
    )


_MULTIPLIES = re.compile(
    r"(?P<one>[A-Za-z_][\w.]*)\)? ?@ ?\(?(?P<two>[A-Za-z_]\w*)(?P<turned>\.(?:T|mT|t\(\)|transpose\([^)\n]{1,20}\)))?"
    r"|\b(?:torch|np|numpy)\.(?P<call>matmul|mm|inner|cdist)\((?P<first>[A-Za-z_]\w*), ?(?P<second>[A-Za-z_]\w*)"
    r"(?P<flipped>\.(?:T|mT|t\(\)))?"
)
"""A product of two matrices, or the distances of all their rows, in a line of code."""
_PRINTED_SIZES = r"\b(\w+)(?:\.shape|\.size\(\))?[ :=]{1,3}torch\.Size\(\[(\d{1,12}), ?(\d{1,12})\]\)"
_OF_ROWS = ("inner", "cdist")
_TYPES = ("float32", "float64", "float16")


def with_product(facts: Facts, text: str) -> Facts:
    """Return a lack of the host's memory with the product of its failing line, and its shape if that is known."""
    source = facts.frames[-1].source if facts.frames else None
    found = _MULTIPLIES.search(source) if source else None
    if found is None:
        return facts
    details = {**facts.details, "product": "yes", **_result_of(found, facts.requested_bytes, text)}
    return msgspec.structs.replace(facts, details=details)


def _result_of(found: re.Match[str], requested: int | None, text: str) -> dict[str, str]:
    """Return the shape and the type of a product that takes the bytes requested; nothing if none does."""
    sizes = {name: (int(rows), int(columns)) for name, rows, columns in re.findall(_PRINTED_SIZES, text)}
    one, two = sizes.get(found["one"] or found["first"]), sizes.get(found["two"] or found["second"])
    if one is None or two is None:
        return {}
    of_rows = found["turned"] or found["flipped"] or found["call"] in _OF_ROWS
    shape = (one[0], two[0] if of_rows else two[1])
    fits = next((each for each in _TYPES if prod(shape) * ELEMENT_BYTES[each] == requested), None)
    return {"product_shape": str(shape), "product_type": fits} if fits else {}
