"""Facts of one failure: the figures in its message, with their rounding and arithmetic.

A message prints `6.14 GiB` for anything from 6.135 to 6.145 GiB, so results computed from it are intervals, too.
"""

import re
from collections.abc import Iterator, Mapping

import msgspec

from tightfit.oomlog.tracebacks import TraceFrame
from tightfit.units import MIB

FIGURES = frozenset(
    f"{name}_bytes"
    for name in (
        *("requested", "total", "free", "process", "allocated", "unallocated", "reserved", "private_pool"),
        *("allowed", "others", "outside_pytorch"),
    )
)
"""Figures that a message may state."""

_FACTORS = {"b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}
_ABSURD = 2**63
_SIZE = re.compile(r"\s*(\d{1,24})(\.\d{0,12})?\s*([A-Za-z]{1,5})\s*")


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A number of bytes: the nearest whole one, and the bounds that rounding leaves."""

    bytes: int
    """The nearest whole number of bytes."""
    low: int
    """The least whole number of bytes that prints the same."""
    high: int
    """The greatest whole number of bytes that prints the same."""
    stated: bool = True
    """True if the message prints it, False if it was computed."""

    @classmethod
    def printed(cls, text: str) -> "Figure | None":
        """Return the figure of a printed size. Every unit is binary, like in PyTorch's messages, where old GB were GiB.

        >>> Figure.printed("6.14 GiB").bytes, Figure.printed("512 bytes").high
        (6592774799, 512)
        """
        match = _SIZE.fullmatch(text)
        if not match or match[3][0].lower() not in _FACTORS:
            return None
        unit = 1024 ** _FACTORS[match[3][0].lower()]
        decimals = max(len(match[2] or "") - 1, 0)
        twice = 2 * 10**decimals
        value = 2 * int(match[1] + (match[2] or "")[1:]) * unit  # in units of 1/twice bytes
        nearest = (value + twice // 2) // twice
        if unit == 1:  # c10's format_size prints whole bytes below 1 KiB
            return cls(bytes=nearest, low=nearest, high=nearest)
        low, high = max(-((unit - value) // twice), 0), (value + unit) // twice
        return cls(bytes=nearest, low=min(low, nearest), high=max(high, nearest))

    def __add__(self, other: "Figure") -> "Figure":
        return Figure(
            bytes=self.bytes + other.bytes, low=self.low + other.low, high=self.high + other.high, stated=False
        )

    def __sub__(self, other: "Figure") -> "Figure":
        return Figure(
            bytes=self.bytes - other.bytes, low=self.low - other.high, high=self.high - other.low, stated=False
        )


class OtherProcess(msgspec.Struct, frozen=True, kw_only=True):
    """Another process that the message names."""

    pid: int
    """Its number, as the driver reports it."""
    bytes: int
    """Its memory on the device."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """One failure. A figure that is absent is None; `figures` holds the intervals and marks the printed ones."""

    kind: str
    """A kind in codes.toml."""
    torch_format: str | None = None
    """T0 to T9, or T5b; None where PyTorch's versions do not differ."""
    figures: Mapping[str, Figure] = msgspec.field(default_factory=dict)
    """Figures by the names of the properties below."""
    device_index: int | None = None
    """The index that the message prints; None if it prints none."""
    other_processes: tuple[OtherProcess, ...] = ()
    """Processes that the message names, besides the failed one."""
    rank: int | None = None
    """The rank of the process, from the line's prefix."""
    phase: str | None = None
    """setup, eval, forward, loss, backward, optimizer, save, resume, sample or compile."""
    frames: tuple[TraceFrame, ...] = ()
    """The Python stack, outermost first."""
    exception: str | None = None
    """The exception's class, as printed."""
    message: str = ""
    """The message as far as it was understood, on one line, without control codes."""
    line: int = 0
    """The line of the log that it starts on, counted from 1."""
    notes: tuple[str, ...] = ()
    """Notes in codes.toml."""
    pid: int | None = None
    """The process that was killed, where the message says so."""
    details: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Values as printed that the sentences on this kind repeat, by name."""
    own_pid: int | None = None
    """The number of the listed process that is this one, where the message does not say so."""
    repeats: int = 1
    """Number of times that the log holds this failure of this rank."""

    def _bytes(self, name: str) -> int | None:
        figure = self.figures.get(name)
        return None if figure is None else figure.bytes

    @property
    def requested_bytes(self) -> int | None:
        return self._bytes("requested_bytes")

    @property
    def total_bytes(self) -> int | None:
        return self._bytes("total_bytes")

    @property
    def free_bytes(self) -> int | None:
        return self._bytes("free_bytes")

    @property
    def process_bytes(self) -> int | None:
        """Bytes of this process on the device, with its context; None if the driver printed no true figure."""
        found = self._bytes("process_bytes")
        return None if found is None or found >= _ABSURD else found

    @property
    def allocated_bytes(self) -> int | None:
        return self._bytes("allocated_bytes")

    @property
    def unallocated_bytes(self) -> int | None:
        """Reserved by PyTorch but unallocated, if stated; `cache_bytes` is there in every format."""
        return self._bytes("unallocated_bytes")

    @property
    def reserved_bytes(self) -> int | None:
        """Stated up to PyTorch 2.0, the sum of allocated and unallocated after."""
        return self._bytes("reserved_bytes")

    @property
    def private_pool_bytes(self) -> int | None:
        return self._bytes("private_pool_bytes")

    @property
    def allowed_bytes(self) -> int | None:
        return self._bytes("allowed_bytes")

    @property
    def others_bytes(self) -> int | None:
        """Total - free - this process: what other processes use."""
        return self._bytes("others_bytes")

    @property
    def outside_pytorch_bytes(self) -> int | None:
        """This process - reserved: context, libraries, NCCL."""
        return self._bytes("outside_pytorch_bytes")

    @property
    def not_reserved_bytes(self) -> int | None:
        """Total - free - reserved: other processes and this one's context together, where they cannot be parted."""
        return self._bytes("not_reserved_bytes")

    @property
    def cache_bytes(self) -> int | None:
        """PyTorch's own cache: reserved and not allocated."""
        return self._bytes("cache_bytes")

    @property
    def short_by_bytes(self) -> int | None:
        """Request - free; None if more was free than requested."""
        return self._bytes("short_by_bytes")

    @property
    def cache_would_do(self) -> bool | None:
        """True if free and cached memory together hold the request; None if rounding leaves it open."""
        need, free, cache = (self.figures.get(f"{name}_bytes") for name in ("requested", "free", "cache"))
        if need is None or free is None or cache is None:
            return None
        room = free + cache
        return True if room.low >= need.high else False if room.high < need.low else None


def with_arithmetic(stated: Mapping[str, Figure]) -> tuple[dict[str, Figure], list[str]]:
    """Return the printed figures with those computed from them, and notes on oddities.

    >>> size = Figure.printed
    >>> found, _ = with_arithmetic({"total_bytes": size("11.69 GiB"), "free_bytes": size("2.68 GiB"),
    ...     "process_bytes": size("7.04 GiB")})
    >>> found["others_bytes"].bytes, found["others_bytes"].stated
    (2115271394, False)
    """
    figures = dict(stated)
    notes: list[str] = []
    sane = {name: figure for name, figure in figures.items() if figure.bytes < _ABSURD}
    own = sane.get("process_bytes")
    if "process_bytes" in figures and (own is None or not own.bytes):
        notes.append("process_memory_unknown")
        sane.pop("process_bytes", None)
    if "free_bytes" in figures and "free_bytes" not in sane:  # a difference below zero, without its sign
        notes.append("free_below_zero")
        figures.pop("free_bytes")
    if figures.get("allowed_bytes") and "allowed_bytes" not in sane:
        notes.append("no_limit_set")

    if "unallocated_bytes" in sane:
        sane["cache_bytes"] = figures["cache_bytes"] = msgspec.structs.replace(sane["unallocated_bytes"], stated=False)
        if "allocated_bytes" in sane and "reserved_bytes" not in sane:
            both = sane["allocated_bytes"] + sane["unallocated_bytes"]
            sane["reserved_bytes"] = figures["reserved_bytes"] = both
    for name, first, minus in _DIFFERENCES:
        _add_difference(name, [sane.get(each) for each in (first, *minus)], figures, sane, notes)
    _add_shortage(figures, sane, notes)
    notes += _oddities(figures, sane)
    return figures, list(dict.fromkeys(notes))


_DIFFERENCES = (
    ("cache_bytes", "reserved_bytes", ("allocated_bytes",)),
    ("others_bytes", "total_bytes", ("free_bytes", "process_bytes")),
    ("outside_pytorch_bytes", "process_bytes", ("reserved_bytes",)),
    ("not_reserved_bytes", "total_bytes", ("free_bytes", "reserved_bytes")),
)
"""Each computed figure: its name, the figure that it is taken from, and those that are subtracted."""


def _add_difference(
    name: str, terms: list[Figure | None], figures: dict[str, Figure], sane: dict[str, Figure], notes: list[str]
) -> None:
    known = [term for term in terms if term is not None]
    if len(known) < len(terms) or name in figures:
        return
    result = known[0]
    for term in known[1:]:
        result -= term
    if result.high < 0:
        notes.append("figures_disagree")
        return
    if result.bytes < 0:
        notes.append("rounding_clamped")
    sane[name] = figures[name] = Figure(
        bytes=max(result.bytes, 0), low=max(result.low, 0), high=result.high, stated=False
    )


def _add_shortage(figures: dict[str, Figure], sane: Mapping[str, Figure], notes: list[str]) -> None:
    need, free = sane.get("requested_bytes"), sane.get("free_bytes")
    if need is None or free is None:
        return
    if free.low >= need.high:
        notes.append("more_free_than_requested")
        return
    short = need - free
    figures["short_by_bytes"] = Figure(bytes=max(short.bytes, 0), low=max(short.low, 0), high=short.high, stated=False)


def _oddities(figures: Mapping[str, Figure], sane: Mapping[str, Figure]) -> Iterator[str]:
    total, free = sane.get("total_bytes"), sane.get("free_bytes")
    if total and any(name in sane and sane[name].low > total.high for name in ("allocated_bytes", "process_bytes")):
        yield "spills_to_host"
    if total and free and free.low > total.high:
        yield "free_exceeds_total"
    if "requested_bytes" in figures and figures["requested_bytes"].bytes in (2 * MIB, 20 * MIB):
        yield "request_says_little"
    if "private_pool_bytes" in figures:
        yield "allocated_includes_private_pools"


def with_detail(facts: Facts, name: str, value: str = "yes") -> Facts:
    """Return a failure with a detail that the rest of its log shows."""
    return msgspec.structs.replace(facts, details={**facts.details, name: value})
