"""Bytes and counts: how they are printed and how they are read."""

import re

from tightfit.errors import ConfigError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
_FACTORS = {"": 1, "b": 1} | {
    unit: factor
    for letter, binary, decimal in (("k", KIB, 10**3), ("m", MIB, 10**6), ("g", GIB, 10**9), ("t", TIB, 10**12))
    for unit, factor in ((letter, binary), (f"{letter}ib", binary), (f"{letter}b", decimal))
}
_MOST = 2**60
"""Bytes that no machine has, and that a signed 64-bit number holds."""


def format_bytes(count: int | float) -> str:
    """Bytes as PyTorch's messages print them: two decimals in KiB, MiB or GiB, or whole bytes below 1 KiB.

    >>> format_bytes(6_592_774_799), format_bytes(512)
    ('6.14 GiB', '512 bytes')
    """
    for factor, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= factor:
            return f"{count / factor:.2f} {name}"
    return f"{int(count)} bytes"


def parse_bytes(text: str) -> int:
    """Bytes from `11.69GiB`, `512 MB`, `4g` or `1024`; binary for KiB and bare letters, decimal for KB.

    >>> parse_bytes("11.69GiB"), parse_bytes("1 MB"), parse_bytes("4g")
    (12552041923, 1000000, 4294967296)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _FACTORS:
        raise ConfigError(f"{text!r:.60} is not a size; write a number and a unit, like 11.69GiB or 512MiB")
    size = float(match[1]) * _FACTORS[match[2].lower()]
    if size >= _MOST:
        raise ConfigError(f"{text!r:.60} is more than any memory; write a number and a unit, like 11.69GiB or 512MiB")
    return round(size)


def format_count(count: int | float) -> str:
    """A large count with three significant figures.

    >>> format_count(123_587_328), format_count(65_536), format_count(950)
    ('124M', '65.5K', '950')
    """
    for factor, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= factor * 0.9995:
            scaled = count / factor
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{name}"
    return f"{count:.0f}"


def format_duration(seconds: float) -> str:
    """Seconds in hours, minutes and seconds.

    >>> format_duration(3.21), format_duration(75), format_duration(7384)
    ('3.2s', '1m15s', '2h03m')
    """
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"
