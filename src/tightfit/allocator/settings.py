"""Settings of PYTORCH_CUDA_ALLOC_CONF: how the caching allocator rounds, splits, grows and collects."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from tightfit.errors import ConfigError
from tightfit.units import MIB
from tightfit.wording import say

Value = bool | int | float | tuple[int, ...]

# Sizes of c10/core/AllocatorConfig.h.
MIN_BLOCK = 512
SMALL_SIZE = MIB
SMALL_SEGMENT = 2 * MIB
MIN_LARGE_ALLOC = 10 * MIB
ROUND_LARGE = 2 * MIB

UNLIMITED = 2**64 - 1
"""`max_split_size` when no limit is set: the largest size_t."""
ROUNDUP_INTERVALS = 16
"""Divisions are kept for each power of two from 1 MiB to 64 GiB (c10/core/AllocatorConfig.cpp)."""
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables with settings; only the first that is set counts (c10/core/AllocatorConfig.cpp)."""
IGNORED_KEYS = frozenset(
    {
        "expandable_segments_reserve",
        "expandable_segments_reserve_by_class",
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
    }
)
"""Keys that PyTorch accepts and that change no figure here: host memory, locks, address space."""


@dataclass(frozen=True, kw_only=True)
class AllocatorSettings:
    """The caching allocator's settings, with the defaults of PyTorch 2.11 to 2.13."""

    max_split_size: int = UNLIMITED
    """Bytes; blocks of this size and more are never split, and serve only requests of about their own size."""
    max_non_split_rounding: int | None = None
    """Bytes by which such a block may exceed the request that it serves; None: `large_segment_size`."""
    roundup_power2_divisions: tuple[int, ...] = ()
    """Steps between two powers of two, for sizes from 1 MiB, 2 MiB, ... 32 GiB; empty: round to 512 bytes."""
    garbage_collection_threshold: float = 0.0
    """Share of the allowed memory above which old cached blocks are released; 0: never. Needs a memory fraction."""
    expandable_segments: bool = False
    """Segments grow by pages instead of being allocated whole."""
    large_segment_size: int = 20 * MIB
    """Bytes of a segment that serves requests between 1 and 10 MiB, and of a page of a large expandable segment."""
    per_process_memory_fraction: float = 1.0
    """Share of the device's memory that the process may reserve."""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """Given `key:value` pairs that change nothing here."""

    def __post_init__(self) -> None:
        for key, value, rule in self._broken_rules():
            shown = f"{value:g}" if isinstance(value, float) else value
            raise ConfigError(say("allocator.settings.must_be", key=key, rule=rule, value=str(shown)))

    def _broken_rules(self) -> Iterator[tuple[str, object, str]]:
        """Yield key, value and rule of each setting that breaks one."""
        large = self.large_segment_size
        if large <= MIN_LARGE_ALLOC:
            yield "large_segment_size_mb", large / MIB, say("allocator.settings.above", limit=MIN_LARGE_ALLOC // MIB)
        if self.max_split_size < large:
            yield "max_split_size_mb", self.max_split_size / MIB, say("allocator.settings.at_least", least=large // MIB)
        if self.max_non_split_rounding is not None and self.max_non_split_rounding < large:
            rounding = self.max_non_split_rounding / MIB
            yield "max_non_split_rounding_mb", rounding, say("allocator.settings.at_least", least=large // MIB)
        divisions = self.roundup_power2_divisions
        if len(divisions) not in (0, ROUNDUP_INTERVALS):
            count = say("allocator.settings.all_or_none", count=ROUNDUP_INTERVALS)
            yield "roundup_power2_divisions", divisions, count
        bad = [each for each in divisions if each & (each - 1)]
        if bad:
            yield "roundup_power2_divisions", bad, say("allocator.settings.powers_or_zero")
        if not 0 <= self.garbage_collection_threshold < 1:
            threshold = self.garbage_collection_threshold
            yield "garbage_collection_threshold", threshold, say("allocator.settings.zero_or_below_one")
        if not 0 <= self.per_process_memory_fraction <= 1:
            fraction = self.per_process_memory_fraction
            yield "per_process_memory_fraction", fraction, say("allocator.settings.up_to_one")
        # cuMemCreate takes whole 2 MiB pages only; PyTorch does not check this and fails in the driver.
        if self.expandable_segments and large % ROUND_LARGE:
            yield "large_segment_size_mb", large / MIB, say("allocator.settings.even")

    @classmethod
    def parse(cls, text: str, *, variable: str = VARIABLES[0]) -> Self:
        """Return the settings of `key:value,key:[a:1,b:2]`; errors name the `variable`.

        Stricter than PyTorch in one way: a number must be whole, where std::stoull reads "30MB" as 30. A negative one
        wraps around as there, so that max_split_size_mb:-1 means no limit. Raises ConfigError.

        >>> AllocatorSettings.parse("max_split_size_mb:128").max_split_size
        134217728
        """
        make: Callable[..., Self] = cls
        values: dict[str, Value] = {}
        ignored = []
        try:
            for key, value in _pairs(text):
                if key in _READERS:
                    values[_READERS[key].field] = _READERS[key].read(key, value)
                elif key in IGNORED_KEYS:
                    ignored.append(f"{key}:{value}")
                elif key == "backend":
                    _check_backend(value)
                elif key == "throw_on_cudamalloc_oom":
                    if value != "False":
                        raise ConfigError(say("allocator.settings.early_rejection", value=repr(value)))
                    ignored.append(f"{key}:{value}")
                else:
                    known = ", ".join(sorted([*_READERS, "backend"]))
                    sentence = say("allocator.settings.unknown_key", key=repr(key), value=repr(value), known=known)
                    raise ConfigError(sentence)
            return make(**values, ignored=tuple(ignored))
        except ConfigError as error:
            raise ConfigError(f"{variable}: {error}") from None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read the first of VARIABLES that `environ` has, else return the defaults. Raises ConfigError."""
        for variable in VARIABLES:
            if variable in environ:
                return cls.parse(environ[variable], variable=variable)
        return cls()

    def round_size(self, size: int) -> int:
        """Bytes of the block for a request of `size` bytes: a multiple of 512, or a step between powers of two.

        >>> AllocatorSettings().round_size(1), AllocatorSettings().round_size(1200)
        (512, 1536)
        >>> AllocatorSettings(roundup_power2_divisions=(4,) * 16).round_size(5000)
        5120
        """
        if self.roundup_power2_divisions and size >= MIN_BLOCK:
            index = min(max(size.bit_length() - 1 - 20, 0), ROUNDUP_INTERVALS - 1)
            divisions = self.roundup_power2_divisions[index]
            if divisions > 1 and size > MIN_BLOCK * divisions:
                # size > 512 * divisions, so a step is at least 512 bytes; a power of two is a step already.
                step = (1 << (size.bit_length() - 1)) // divisions
                return -(-size // step) * step
        return max(-(-size // MIN_BLOCK) * MIN_BLOCK, MIN_BLOCK)

    def segment_size(self, size: int) -> int:
        """Bytes of the segment for a block of `size` bytes (get_allocation_size in PyTorch)."""
        if size <= SMALL_SIZE:
            return SMALL_SEGMENT
        if size < MIN_LARGE_ALLOC:
            return self.large_segment_size
        return -(-size // ROUND_LARGE) * ROUND_LARGE


def _check_backend(value: str) -> None:
    if value == "cudaMallocAsync":
        raise ConfigError(say("allocator.settings.async_backend"))
    if value != "native":
        raise ConfigError(say("allocator.settings.must_be", key="backend", rule="native", value=repr(value)))


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """Yield keys and values without spaces; a list keeps its brackets. PyTorch allows one comma at the end."""
    rest = re.sub(r"\s", "", text)
    while rest:
        match = re.match(r"([^,:\[\]]+):(\[[^\[\]]*\]|[^,:\[\]]+)(,|$)", rest)
        if not match:
            raise ConfigError(say("allocator.settings.unreadable", text=repr(rest)))
        yield match[1], match[2]
        rest = rest[match.end() :]


def _mebibytes(text: str) -> int:
    # std::stoull wraps a negative number, and PyTorch then takes the largest number of MiB that fits.
    mebibytes = min(int(text) % 2**64, UNLIMITED // MIB)
    return UNLIMITED if mebibytes == UNLIMITED // MIB else mebibytes * MIB


def _boolean(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"


def _threshold(text: str) -> float:
    if not 0 < float(text) < 1:
        raise ValueError(text)
    return float(text)


def _divisions(text: str) -> tuple[int, ...]:
    """Read `4`, or `[256:1,512:2,>:4]`: divisions from 256 MiB, from 512 MiB, and above the last boundary.

    A first boundary also covers everything below it. A power of two between two boundaries gets no divisions.
    """
    if not text.startswith("["):
        return (_power_of_two(text),) * ROUNDUP_INTERVALS
    table = [0] * ROUNDUP_INTERVALS
    last, first = 0, True
    for entry in text[1:-1].split(","):
        boundary, value_text = entry.split(":")
        value = int(value_text) and _power_of_two(value_text)
        if boundary == ">":
            table[last + 1 :] = [value] * (ROUNDUP_INTERVALS - last - 1)
            continue
        last = min(_power_of_two(boundary).bit_length() - 1, ROUNDUP_INTERVALS - 1)
        if first:
            table[:last] = [value] * last
            first = False
        table[last] = value
    return tuple(table)


def _power_of_two(text: str) -> int:
    number = int(text)
    if number < 1 or number & (number - 1):
        raise ValueError(text)
    return number


class _Reader(NamedTuple):
    """A key's field of the settings, the function that reads its value, and the rule that the value must follow."""

    field: str
    value: Callable[[str], Value]
    rule: Callable[[], str]

    def read(self, key: str, text: str) -> Value:
        try:
            return self.value(text)
        except ValueError:
            sentence = say("allocator.settings.must_be", key=key, rule=self.rule(), value=repr(text))
            raise ConfigError(sentence) from None


def _whole_mebibytes(field: str) -> _Reader:
    return _Reader(field, _mebibytes, lambda: say("allocator.settings.mebibytes"))


_READERS = {
    "max_split_size_mb": _whole_mebibytes("max_split_size"),
    "max_non_split_rounding_mb": _whole_mebibytes("max_non_split_rounding"),
    "large_segment_size_mb": _whole_mebibytes("large_segment_size"),
    "garbage_collection_threshold": _Reader(
        "garbage_collection_threshold", _threshold, lambda: say("allocator.settings.between_zero_and_one")
    ),
    "per_process_memory_fraction": _Reader(
        "per_process_memory_fraction", float, lambda: say("allocator.settings.fraction")
    ),
    "expandable_segments": _Reader("expandable_segments", _boolean, lambda: say("allocator.settings.boolean")),
    "roundup_power2_divisions": _Reader(
        "roundup_power2_divisions", _divisions, lambda: say("allocator.settings.divisions")
    ),
}
