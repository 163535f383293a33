"""Print bytes, counts and durations."""

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
_PIB, _EIB = 2**50, 2**60


def format_bytes(count: int | float) -> str:
    """Bytes as PyTorch's messages print them: two decimals, or whole bytes below 1 KiB; larger ones in TiB to EiB.

    >>> format_bytes(6_592_774_799), format_bytes(512), format_bytes(3 * 2**40)
    ('6.14 GiB', '512 bytes', '3.00 TiB')
    """
    for factor, name in ((_EIB, "EiB"), (_PIB, "PiB"), (TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= factor:
            return f"{count / factor:.2f} {name}"
    return f"{int(count)} bytes"


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
