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


_PICTURE = re.compile(r"(?<![\w.,x×*])(\d{4,5}) ?[x×*] ?(\d{4,5})(?! ?[x×*\d]|\w*\.)(?: ?(?:px|pixels?))?")
_OF_PICTURES = re.compile(
    r"\b(?:images?|pictures?|photos?|slides?|scans?|videos?|pixels?|px|resolution|frames?)\b", re.I
)
_LEAST_SIDE = 1400
"""Pixels of a side from which on one picture is a large input."""
_RECORDING = (
    r"(?:audio|recording|video|meeting|podcast|clip|episode|track|song|film|movie|interview|lecture|wav|mp[34])s?"
)
_DURATION = r"(\d{1,3}(?:\.\d)?)[- ]?(second|sec|minute|min|hour|hr)s?"
_LASTING = re.compile(
    rf"(?<!after )(?<!took )(?<!takes )(?<!for )(?<!within )\b{_DURATION}\b(?: long)?(?: \w+){{0,2}}? {_RECORDING}\b"
    rf"|\b{_RECORDING} (?:\w+ ){{0,2}}?(?:of|is|with|has|about) (?:about |around |nearly )?{_DURATION}\b",
    re.IGNORECASE,
)
_UNITS = {"sec": "second", "min": "minute", "hr": "hour"}
_COUNTED = re.compile(
    r"(?<![\w.,/])(\d[\d,]{2,9}) (atoms|residues|amino acids|aa|nodes|tokens|vertices|triangles)\b", re.IGNORECASE
)
_LEAST_COUNT = {"atoms": 500, "residues": 400, "amino acids": 400, "aa": 400, "nodes": 2000, "tokens": 4000}
_LEAST_OF_OTHERS = 100_000


def told_input(text: str) -> str | None:
    """Return the largest input that a report tells of; None for none of any size.

    >>> told_input("one slide of 11000 x 14000 pixels"), told_input("a 71 minute meeting"), told_input("300 nodes")
    ('11000 x 14000 pixels', '71 minutes', None)
    """
    pictures = [each for each in _PICTURE.finditer(text) if min(int(each[1]), int(each[2])) >= _LEAST_SIDE]
    if pictures and _OF_PICTURES.search(text):
        return max(pictures, key=lambda each: int(each[1]) * int(each[2]))[0]
    if lasting := _LASTING.search(text):
        number, unit = (each for each in lasting.groups() if each)
        return f"{number} {_UNITS.get(unit.lower(), unit.lower())}s"
    counts = ((int(each[1].replace(",", "")), each) for each in _COUNTED.finditer(text))
    large = [(count, each[0]) for count, each in counts if count >= _LEAST_COUNT.get(each[2].lower(), _LEAST_OF_OTHERS)]
    return max(large)[1] if large else None
