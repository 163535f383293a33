"""The shape of a tensor of all pairs that a report tells in a sentence."""

import math
import re

_SHAPE = (
    r"\b(?:shapes?|sizes?|tensors?|matri(?:x|ces)|spaces?|dimensions?|arrays?|形状|大小|维度|テンソル|行列)\b[^\n()\[\]]{0,30}?"
    r"(?P<shape>[(\[] ?\w{1,16}(?: ?[,x×*] ?\w{1,16}){2,4} ?[)\]])"
)
_PART = r"\w+"
_STEM = r"(?P<stem>[nN]|num|len|[A-Za-z])_?(?P<of>\d|(?![bchdw]\b)[a-z]{1,3})"
_COUNTS = r"(?:[nNmMlLsSpPqQ]|(?:num|n|len)_\w{1,12})"
"""Names of counts; not of the sides of a picture, of channels, or of a batch."""
_ALIKE = ({"n", "m"}, {"s", "t"}, {"p", "q"})
_OF_PAIRS = (
    r"(?i)\b(?:node|point|pair|entit(?:y|ie)|vert(?:ex|ice)|atom|residue|edge|item|box(?:e)?|token)s?\b|broadcast"
)


def shape_of_pairs(text: str) -> str | None:
    """Return the shape of a tensor with a vector for each pair, as a report writes it; None if it names none.

    >>> shape_of_pairs("a matrix with the shape of (1,n_s,n_t,d), where n is the number of nodes")
    '(1,n_s,n_t,d)'
    >>> shape_of_pairs("features of shape (B, N, C) for N points")
    >>> shape_of_pairs("images of shape (n, h, w, c)")
    """
    if not re.search(_OF_PAIRS, text):
        return None
    for match in re.finditer(_SHAPE, text):
        names = re.findall(_PART, match["shape"])
        if any(map(_is_pair, names[:-2], names[1:-1])):
            return match["shape"]
    return None


def _is_pair(one: str, other: str) -> bool:
    """Return True for two axes that count the two sides of pairs."""
    if one.isdigit() or other.isdigit():
        return False
    if one == other:
        return bool(re.fullmatch(_COUNTS, one))
    stems = re.fullmatch(_STEM, one), re.fullmatch(_STEM, other)
    is_alike = stems[0] is not None and stems[1] is not None and stems[0]["stem"] == stems[1]["stem"]
    return is_alike or {one.lower(), other.lower()} in _ALIKE


_NAMED_SHAPE = re.compile(r"[\[(](\d{1,10}(?:, ?\d{1,10}){1,4})[\])]")
_LEAST, _MOST = 2**30, 2**50
"""Bytes of a tensor that a card hardly holds many of, and of one that nobody has."""


def largest_shape(text: str) -> tuple[int, ...]:
    """Return the largest shape of a text whose tensor of float32 is large, or none.

    >>> largest_shape("the return of message is [9075063, 1] * [9075063, 200]")
    (9075063, 200)
    >>> largest_shape("kernel (3, 3) of [64, 64]")
    ()
    """
    shapes = [tuple(int(each) for each in found.split(",")) for found in _NAMED_SHAPE.findall(text)]
    large = [each for each in shapes if _LEAST <= 4 * math.prod(each) < _MOST]
    return max(large, key=math.prod, default=())
