"""Remedies: the advice that people give for a failure, each with a verdict; here by the log's figures alone."""

import functools
import re
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from tightfit.diagnosis.cause_records import LIKELY, MEASURED, SIMULATED
from tightfit.diagnosis.outcome import Outcome
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.ownership import had_room, others_might_do, ownership
from tightfit.tables import read_table

FITS, FITS_SLOWLY, UNCHECKED = "fits", "fits_slowly", "unchecked"
DOES_NOT_FIT, NO_EFFECT, NOT_MEMORY = "does_not_fit", "no_effect", "not_memory"
VERDICTS = (FITS, FITS_SLOWLY, UNCHECKED, DOES_NOT_FIT, NO_EFFECT, NOT_MEMORY)
"""The order in which they are shown."""
USUAL_SHARE = 16
"""Passes into which the usual advice divides a batch: 64 becomes 16 passes of 4."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """The change that a remedy makes; the records below add the values that its sentences name."""


NO_CHANGE = Change()


class SplitBatch(Change, frozen=True, kw_only=True):
    size: int
    """Sequences of one pass."""
    passes: int
    effective: int
    """Sequences of a step."""
    step_s: float | None


class Recomputation(Change, frozen=True, kw_only=True):
    blocks: int


class ShorterBlock(Change, frozen=True, kw_only=True):
    half: int
    block_size: int


class Evaluation(Change, frozen=True, kw_only=True):
    eval_batch: int
    iterations: int
    """Iterations over both splits."""
    iteration: int | None = None
    """The iteration that fails, from 1."""
    host_tflops: float
    host_eval_s: float
    """Seconds of the evaluation on the processor."""


class OtherDtype(Change, frozen=True, kw_only=True):
    dtype: str
    other: str


class Switch(Change, frozen=True, kw_only=True):
    name: str
    """As the report spells it."""


class Option(Change, frozen=True, kw_only=True):
    name: str
    """The option as the script spells it."""
    size: int
    value: int
    """Its present value."""


class Resized(Change, frozen=True, kw_only=True):
    """A smaller batch with more accumulation, from the numbers that a log prints."""

    size: int
    passes: int
    batch: int
    accumulation: int
    parts: int


class HostRun(Change, frozen=True, kw_only=True):
    step_s: float
    all_s: float
    max_iters: int
    host_tflops: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures that the sentence of a reason names; None where it does not name them. Sizes in bytes."""

    device_bytes: int | None = None
    """This process with the remedy."""
    room_bytes: int | None = None
    """Memory that this process may use."""
    phase: str | None = None
    """Phase of the peak, or of the failure."""
    requested_bytes: int | None = None
    free_bytes: int | None = None
    cache_bytes: int | None = None
    others_bytes: int | None = None
    need_bytes: int | None = None
    """This process with the failing request."""
    total_bytes: int | None = None
    batch_size: int | None = None


_NO_FIGURES = Figures()


class Remedy(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of advice and its effect on this run."""

    code: str
    """A key of the words' table `remedies`."""
    verdict: str
    """One of VERDICTS."""
    reason: str
    """A key of the words' table `reasons`."""
    label: str = SIMULATED
    """measured, simulated or likely."""
    exact: bool | None = True
    """True if the result of training stays the same, up to rounding; None if nothing would be changed."""
    device_bytes: int | None = None
    """Predicted peak of this process; where it does not fit, the bytes needed at that point."""
    saved_bytes: int | None = None
    """Bytes fewer than the failing request would have needed."""
    slowdown: float | None = None
    """Predicted: 0.05 is 5% more time a step; None is not estimated."""
    paste: tuple[str, ...] = ()
    """Lines for the configuration, the program or the shell."""
    page: str = ""
    """The page of documentation that the lines stand on; empty where there is none."""
    applicability: str = ""
    """exact, changes_result, needs_hardware or to_be_checked; empty where `exact` says it."""
    change: Change = NO_CHANGE
    figures: Figures = _NO_FIGURES


def ranked(remedies: Sequence[Remedy]) -> tuple[Remedy, ...]:
    """Sort by verdict; of those that fit, exact before lossy, then the fastest."""

    def place(each: Remedy) -> tuple[int, bool, float]:
        fits = each.verdict == FITS
        return VERDICTS.index(each.verdict), fits and each.exact is False, (each.slowdown or 0.0) if fits else 0.0

    return tuple(sorted(remedies, key=place))


@functools.cache
def _pastes() -> dict[str, dict[str, list[str]]]:
    """Read the lines to paste, by framework and remedy."""
    return read_table("tightfit.diagnosis", "pastes.toml", dict[str, dict[str, list[str]]])


def to_paste(code: str, framework: str = "nanogpt", /, **values: int | str) -> tuple[str, ...]:
    """Return a remedy's lines in the words of a framework, with `values` filled in.

    >>> to_paste("split", size=4, passes=16)
    ('batch_size = 4', 'gradient_accumulation_steps = 16')
    """
    tables = _pastes()
    lines = (tables["pytorch"] | tables[framework]).get(code, [])
    return tuple(line.format(**values) for line in lines)


def judged(
    code: str,
    outcome: Outcome,
    *,
    before: Outcome,
    room_bytes: int,
    exact: bool = True,
    paste: tuple[str, ...] = (),
    slowdown: float | None = None,
    change: Change = NO_CHANGE,
) -> Remedy:
    """Return the verdict on a remedy from its own play; `before` is the play without it."""
    failure = outcome.failure
    return Remedy(
        code=code,
        verdict=FITS if outcome.fits else DOES_NOT_FIT,
        reason="fits" if outcome.fits else "fails_at" if failure else "too_much",
        exact=exact,
        device_bytes=outcome.device_bytes,
        saved_bytes=before.device_bytes - outcome.device_bytes,
        slowdown=slowdown,
        paste=paste,
        change=change,
        figures=figures_of(outcome, room_bytes),
    )


def figures_of(outcome: Outcome, room_bytes: int, *, batch_size: int | None = None) -> Figures:
    """Return the figures of a play's peak or failure."""
    failure = outcome.failure
    return Figures(
        device_bytes=outcome.device_bytes,
        room_bytes=room_bytes,
        phase=outcome.phase,
        requested_bytes=failure.requested_bytes if failure else None,
        free_bytes=failure.free_bytes if failure else None,
        batch_size=batch_size,
    )


def _unchecked(code: str, reason: str, figures: Figures = _NO_FIGURES) -> Remedy:
    return Remedy(code=code, verdict=UNCHECKED, reason=reason, label=LIKELY, paste=to_paste(code), figures=figures)


_WITHOUT_SETTING = ("T0", "T1", "T2")
"""Messages of versions before about 1.10, which have no setting for the allocator."""
WITH_SPLIT_SIZE = "T3"
"""Messages of versions up to 2.0, which have max_split_size_mb alone."""


def max_split_size(segments: Remedy) -> Remedy:
    """Return the setting that stands in for expandable segments in PyTorch 1.10 to 2.0, and on Windows."""
    return replace(segments, code="max_split_size", paste=to_paste("max_split_size"))


def expandable_segments(facts: Facts) -> Remedy:
    """Judge the allocator's setting: free and cached memory together must hold the request."""
    code, figures = "expandable_segments", _cache_figures(facts)
    if facts.cache_would_do is not False:
        reason = "cache_might_do" if facts.cache_would_do else "unstated"
        is_old = facts.cache_would_do and facts.torch_format in _WITHOUT_SETTING
        return _unchecked(code, "cache_needs_newer" if is_old else reason, figures)
    return Remedy(
        code=code,
        verdict=DOES_NOT_FIT,
        reason="cache_too_small",
        label=MEASURED,
        saved_bytes=facts.cache_bytes,
        paste=to_paste(code),
        figures=figures,
    )


def empty_cache(facts: Facts) -> Remedy:
    """Judge the call that empties the cache: PyTorch makes it before it fails."""
    return Remedy(
        code="empty_cache",
        verdict=NO_EFFECT,
        reason="empty_cache" if facts.cache_bytes is not None else "empty_cache_unstated",
        label=MEASURED,
        paste=to_paste("empty_cache"),
        figures=_cache_figures(facts),
    )


def _cache_figures(facts: Facts) -> Figures:
    return Figures(cache_bytes=facts.cache_bytes, free_bytes=facts.free_bytes, requested_bytes=facts.requested_bytes)


_OTHERS_DO = {False: "others_might_do", True: "others_may_hold"}
_OTHERS_TOO_LITTLE = {False: "others_too_little", True: "others_at_most"}
"""Reasons by whether the memory of others is an estimate."""
OTHERS_DO = frozenset(_OTHERS_DO.values())


def close_others(facts: Facts) -> Remedy:
    """Judge closing other programs: their memory and the free memory together must hold the request."""
    code, free, requested = "close_others", facts.free_bytes, facts.requested_bytes
    found = ownership(facts)
    is_told = facts.others_bytes is not None or facts.not_reserved_bytes is not None
    if free is None or requested is None or not is_told:
        return _unchecked(code, "unstated")
    if had_room(facts):
        figures = Figures(free_bytes=free, requested_bytes=requested)
        return Remedy(code=code, verdict=NO_EFFECT, reason="enough_was_free", label=MEASURED, figures=figures)
    might_do = others_might_do(facts)
    if found.others is None:
        if might_do:  # a desktop or a small context may hold what is missing
            return _unchecked(code, "unstated")
        label = MEASURED if facts.others_bytes is not None else LIKELY
        return Remedy(code=code, verdict=NO_EFFECT, reason="no_others", label=label)
    least = found.others.low if found.is_estimated else found.others.bytes
    enough = found.decides or might_do
    others = least if free + least >= requested or not found.is_estimated else found.others.high
    process = facts.process_bytes or facts.reserved_bytes or 0
    return Remedy(
        code=code,
        verdict=UNCHECKED if enough else DOES_NOT_FIT,
        reason=_OTHERS_DO[found.is_estimated] if enough else _OTHERS_TOO_LITTLE[found.is_estimated],
        label=LIKELY if found.is_estimated else MEASURED,
        saved_bytes=others,
        paste=to_paste(code),
        figures=Figures(
            others_bytes=others,
            free_bytes=free,
            requested_bytes=requested,
            room_bytes=free + others,
            need_bytes=process + requested,
            total_bytes=facts.total_bytes,
        ),
    )


_TOOLS = {"hip": "rocm-smi", "xpu": "xpu-smi ps", "npu": "npu-smi info"}
"""Programs of other vendors that list the processes on a card."""
_OF_AMD = re.compile(r"\bHIP\b|\bROCm\d?\b|hipError|rocm_driver", re.IGNORECASE)


_SETTING = re.compile(r"PYTORCH_(?:HIP_)?ALLOC_CONF")


def _setting(facts: Facts, vendor: str) -> str:
    """Return the name of the allocator's setting on the user's device: on AMD's cards that of the message."""
    named = _SETTING.search(facts.message)
    return {"npu": "PYTORCH_NPU_ALLOC_CONF", "hip": named[0] if named else "PYTORCH_HIP_ALLOC_CONF"}.get(
        vendor, "PYTORCH_CUDA_ALLOC_CONF"
    )


_ON_LINUX = re.compile(
    r"\b(?:Colab|Kaggle|Ubuntu|Debian|WSL)\b|(?<![\w.:])/(?:home|content|root|mnt|kaggle|workspace)/|\bwebui\.sh\b"
)
_SET = re.compile(r"^set (?=[A-Z_]{3,40}=)")


def _exported(line: str) -> str:
    """Return a setting of Windows' shell as another shell takes it."""
    found = _SET.sub("export ", line)
    setting, space, remark = found.partition("  #")
    name, equals, value = setting.partition("=")
    quoted = f'{name}{equals}"{value}"' if found != line and " " in value else setting
    return quoted + space + remark


def for_machine(remedies: Sequence[Remedy], facts: Facts, text: str, *, on_windows: bool) -> tuple[Remedy, ...]:
    """Return the remedies with the tool of the card's vendor, and with settings as the user's shell takes them.

    `text` is the log's.
    """
    is_amd = _OF_AMD.search(facts.message) or "hipErrorOutOfMemory" in text
    vendor = "hip" if is_amd else facts.kind.partition("_")[0]
    setting = _setting(facts, vendor)
    if not on_windows and _ON_LINUX.search(text):
        remedies = [replace(each, paste=tuple(map(_exported, each.paste))) for each in remedies]
    if vendor not in _TOOLS and not on_windows:
        return tuple(remedies)
    tool = _TOOLS.get(vendor, "nvidia-smi")
    known = {"nvidia-smi": tool, "nvidia-smi -l 1": f"watch -n 1 {tool}" if vendor in _TOOLS else "nvidia-smi -l 1"}

    def said(line: str) -> str:
        line = known.get(line, line)
        line = line.replace("PYTORCH_CUDA_ALLOC_CONF", setting)
        return re.sub(r"^export (?=\w+=)", "set ", line) if on_windows else line

    def of_machine(each: Remedy) -> Remedy:
        is_other = vendor in _TOOLS and not known.keys().isdisjoint(each.paste)
        return replace(each, paste=tuple(map(said, each.paste)), page="" if is_other else each.page)

    return tuple(map(of_machine, remedies))
