"""Read sizes of memory as people write them."""

import re

from tightfit.errors import ConfigError
from tightfit.units import GIB, KIB, MIB, TIB
from tightfit.wording import say

_FACTORS = {"": 1, "b": 1} | {
    unit: factor
    for letter, binary, decimal in (("k", KIB, 10**3), ("m", MIB, 10**6), ("g", GIB, 10**9), ("t", TIB, 10**12))
    for unit, factor in ((letter, binary), (f"{letter}ib", binary), (f"{letter}b", decimal))
}
_MOST = 2**60
"""Bytes that no machine has, and that a signed 64-bit number holds."""


def parse_bytes(text: str) -> int:
    """Bytes from `11.69GiB`, `512 MB`, `4g` or `1024`; binary for KiB and bare letters, decimal for KB.

    >>> parse_bytes("11.69GiB"), parse_bytes("1 MB"), parse_bytes("4g")
    (12552041923, 1000000, 4294967296)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _FACTORS:
        raise ConfigError(say("config.sizes.not_a_size", text=text))
    size = float(match[1]) * _FACTORS[match[2].lower()]
    if size >= _MOST:
        raise ConfigError(say("config.sizes.too_much", text=text))
    return round(size)
