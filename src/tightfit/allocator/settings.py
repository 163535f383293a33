"""Settings of PYTORCH_CUDA_ALLOC_CONF: how the caching allocator rounds, splits, grows and collects."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from tightfit.errors import ConfigError
from tightfit.units import MIB

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
        "expandable_segments_reserve", "expandable_segments_reserve_by_class", "graph_capture_record_stream_reuse",
        "pinned_free_catch_all", "pinned_max_cached_size_mb", "pinned_max_round_threshold_mb",
        "pinned_num_register_threads", "pinned_reserve_segment_size_mb", "pinned_use_background_threads",
        "pinned_use_cuda_host_register", "pinned_use_hip_host_register", "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
    }
)  # fmt: skip
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
    """`key:value` pairs that were given and change nothing here."""

    def __post_init__(self) -> None:
        large = self.large_segment_size
        divisions = self.roundup_power2_divisions
        _check(large > MIN_LARGE_ALLOC, "large_segment_size_mb", large / MIB, "more than 10")
        _check(self.max_split_size >= large, "max_split_size_mb", self.max_split_size / MIB, f"{large // MIB} or more")
        if self.max_non_split_rounding is not None:
            rounding = self.max_non_split_rounding
            _check(rounding >= large, "max_non_split_rounding_mb", rounding / MIB, f"{large // MIB} or more")
        _check(len(divisions) in (0, ROUNDUP_INTERVALS), "roundup_power2_divisions", divisions, "16 numbers or none")
        bad = [each for each in divisions if each & (each - 1)]
        _check(not bad, "roundup_power2_divisions", bad, "powers of two, or 0 for none")
        threshold, fraction = self.garbage_collection_threshold, self.per_process_memory_fraction
        _check(0 <= threshold < 1, "garbage_collection_threshold", threshold, "above 0 and below 1")
        _check(0 <= fraction <= 1, "per_process_memory_fraction", fraction, "from 0 to 1")
        # cuMemCreate takes whole 2 MiB pages only; PyTorch does not check this and fails in the driver.
        pages = not self.expandable_segments or large % ROUND_LARGE == 0
        _check(pages, "large_segment_size_mb", large / MIB, "even when expandable_segments is True")

    @classmethod
    def parse(cls, text: str, *, variable: str = VARIABLES[0]) -> Self:
        """The settings that `key:value,key:[a:1,b:2]` stands for; `variable` is named in errors.

        Stricter than PyTorch in one way: a number must be whole, where std::stoull reads "30MB" as 30. A negative one
        wraps around as there, so that max_split_size_mb:-1 means no limit. Raises ConfigError.

        >>> AllocatorSettings.parse("max_split_size_mb:128").max_split_size
        134217728
        """
        values: dict[str, Any] = {}
        ignored = []
        for key, value in _pairs(text, variable):
            if key in _READERS:
                name, read, rule = _READERS[key]
                try:
                    values[name] = read(value)
                except ValueError:
                    raise ConfigError(f"{variable}: {key} must be {rule}, got {value!r}") from None
            elif key in IGNORED_KEYS:
                ignored.append(f"{key}:{value}")
            elif key == "backend":
                _check_backend(value, variable)
            elif key == "throw_on_cudamalloc_oom":
                if value != "False":
                    raise ConfigError(
                        f"{variable}: throw_on_cudamalloc_oom must be False here, got {value!r}: the virtual GPU does "
                        "not follow PyTorch's early rejection; remove the key"
                    )
                ignored.append(f"{key}:{value}")
            else:
                known = ", ".join(sorted([*_READERS, "backend"]))
                raise ConfigError(f"{variable}: {key!r} with value {value!r} is not a key of PyTorch; known: {known}")
        try:
            return cls(**values, ignored=tuple(ignored))
        except ConfigError as error:
            raise ConfigError(f"{variable}: {error}") from None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """The settings of the first of VARIABLES that `environ` has, or the defaults. Raises ConfigError."""
        for variable in VARIABLES:
            if variable in environ:
                return cls.parse(environ[variable], variable=variable)
        return cls()

    def round_size(self, size: int) -> int:
        """Bytes of the block that a request of `size` bytes gets: a multiple of 512, or a step between powers of two.

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
        """Bytes that are asked of the device for a block of `size` bytes (get_allocation_size there)."""
        if size <= SMALL_SIZE:
            return SMALL_SEGMENT
        if size < MIN_LARGE_ALLOC:
            return self.large_segment_size
        return -(-size // ROUND_LARGE) * ROUND_LARGE


def _check(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        shown = f"{value:g}" if isinstance(value, float) else value
        raise ConfigError(f"{key} must be {rule}, got {shown}")


def _check_backend(value: str, variable: str) -> None:
    if value == "cudaMallocAsync":
        raise ConfigError(
            f"{variable}: backend:cudaMallocAsync leaves memory to the driver, which the virtual GPU cannot follow; "
            "use backend:native or remove the key"
        )
    if value != "native":
        raise ConfigError(f"{variable}: backend must be native, got {value!r}")


def _pairs(text: str, variable: str) -> list[tuple[str, str]]:
    """Keys and values, without spaces; a list keeps its brackets. One comma at the end is allowed, as in PyTorch."""
    rest = re.sub(r"\s", "", text)
    pairs = []
    while rest:
        match = re.match(r"([^,:\[\]]+):(\[[^\[\]]*\]|[^,:\[\]]+)(,|$)", rest)
        if not match:
            raise ConfigError(f"{variable}: cannot read {rest!r}; write key:value pairs with commas between them")
        pairs.append((match[1], match[2]))
        rest = rest[match.end() :]
    return pairs


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
    """`4`, or `[256:1,512:2,>:4]`: divisions for sizes from 256 MiB, from 512 MiB, and above the last one named.

    A first boundary also covers everything below it; a power of two between two boundaries is left without divisions.
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


_READERS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "max_split_size_mb": ("max_split_size", _mebibytes, "a whole number of MiB"),
    "max_non_split_rounding_mb": ("max_non_split_rounding", _mebibytes, "a whole number of MiB"),
    "large_segment_size_mb": ("large_segment_size", _mebibytes, "a whole number of MiB"),
    "garbage_collection_threshold": ("garbage_collection_threshold", _threshold, "a number above 0 and below 1"),
    "per_process_memory_fraction": ("per_process_memory_fraction", float, "a number from 0 to 1"),
    "expandable_segments": ("expandable_segments", _boolean, "True or False"),
    "roundup_power2_divisions": (
        "roundup_power2_divisions", _divisions, "a power of two, or a list like [256:1,512:2,>:4] of powers of two"
    ),
}  # fmt: skip
