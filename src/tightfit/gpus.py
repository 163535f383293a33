"""Facts of cards, from `gpus.csv` and `contexts.csv`, where each has its source.

A name finds a card only if each of its words belongs to that card and no distinguishing word (Ti, SUPER, Laptop, A10G)
is missing. A name that fits several cards takes the common one, with a note; an unknown card is never taken as another.
"""

import csv
import difflib
import functools
import re
import unicodedata
from dataclasses import dataclass, replace
from importlib.resources import files

from tightfit.errors import DeviceError
from tightfit.units import GIB, MIB
from tightfit.wording import say, term

MAX_AUTOTUNE_SMS = 68
"""torch/_inductor/utils.py, is_big_gpu: on a card with fewer, torch.compile prints "Not enough SMs"."""
UNKNOWN_SM_COUNT = 56
"""For a card that neither the table nor the user describes: near the median of `gpus.csv`, 57."""

LAZY_LOADING = (11, 7)
"""The first CUDA that loads kernels when they are first used; before it a context held all of them, near 1 GiB."""

_MAX_NAME = 100
_BRANDS = {"nvidia", "geforce", "tesla", "gpu", "graphics", "card"}
_OPTIONAL = {"rtx", "gtx", "pcie", "hbm3", "generation", "workstation", "blackwell", "one", "of", "four"}


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One kind of card, or one card that the user described."""

    name: str
    """The name in the table: the driver's, with the size if cards of two sizes share it."""
    arch: str
    """NVIDIA's name of the generation, like Ampere."""
    capability: tuple[int, int]
    """Compute capability: major, minor."""
    sm_count: int
    """Streaming multiprocessors."""
    memory_bytes: int
    """Total memory as the driver reports it on Linux, the best known value; below the advertised size."""
    memory_bytes_min: int
    """The least total ever reported on Linux for this card: newer drivers and ECC lower it."""
    memory_share: float | None = None
    """Share of the nominal size that `_estimated_memory` takes; None if a Linux total is known."""
    bandwidth_gbps: float | None = None
    """Peak memory bandwidth, 10^9 bytes/s."""
    cache_bytes: int | None = None
    """Second-level cache: NVIDIA's white papers of the generations, deviceQuery."""
    bf16_tflops: float | None = None
    """Peak of dense bfloat16 matrix products with float32 accumulation, 10^12 FLOP/s; None if it has no such units."""
    fp16_tflops: float | None = None
    """The same for float16."""
    fp32_tflops: float | None = None
    """Peak of float32 arithmetic without tensor cores, 10^12 FLOP/s."""
    measured_bf16_tflops: float | None = None
    """A published measurement of a large bfloat16 matrix product, 10^12 FLOP/s; cards that boost exceed the peak."""
    measured_fp16_tflops: float | None = None
    """The same for float16."""
    memory_source: str = ""
    """Source of the memory sizes; of an estimate, the nominal size: 12282 MiB by nvidia-smi, or 12 GB as advertised."""
    source: str = ""
    """Source of the other figures."""
    notes: str = ""
    """Remarks about these figures."""

    def __post_init__(self) -> None:
        for field in ("sm_count", "memory_bytes", "memory_bytes_min"):
            if getattr(self, field) < 1:
                raise DeviceError(say("gpus.card.count", field=field, name=self.name, value=getattr(self, field)))
        if self.memory_bytes_min > self.memory_bytes:
            sizes = {"most": self.memory_bytes, "value": self.memory_bytes_min}
            raise DeviceError(say("gpus.card.least_memory", name=self.name, **sizes))
        if self.capability[0] < 1 or self.capability[1] < 0:
            raise DeviceError(say("gpus.card.capability", name=self.name, value=_dotted(self.capability)))

    @property
    def memory_is_estimate(self) -> bool:
        """True if no Linux total is known, so that both sizes come from `_estimated_memory`."""
        return self.memory_share is not None

    @property
    def native_bf16(self) -> bool:
        """True if it computes bfloat16 itself; older cards emulate it slowly, though PyTorch calls it supported."""
        return self.capability >= (8, 0)

    @property
    def planning_bytes(self) -> int:
        """Total bytes to plan with while no driver reports them: the least ever reported for this card."""
        return self.memory_bytes_min

    def peak_flops(self, dtype: str) -> float | None:
        """FLOP/s of matrix products in `dtype` (float32, bfloat16, float16), or None if not known."""
        by_dtype = {"bfloat16": self.bf16_tflops, "float16": self.fp16_tflops, "float32": self.fp32_tflops}
        tflops = by_dtype[dtype]
        return None if tflops is None else tflops * 1e12


def all_gpus() -> tuple[GPU, ...]:
    """Every card of the table, in its order."""
    return tuple(entry.gpu for entry in _table())


def find_gpu(name: str) -> GPU | None:
    """The card that a driver calls `name`, like "NVIDIA GeForce RTX 3090", or None if it fits no card or several.

    >>> find_gpu("NVIDIA GeForce RTX 3090").name
    'GeForce RTX 3090'
    >>> find_gpu("NVIDIA GeForce RTX 3060") is None  # 8 GB or 12 GB: the name does not say
    True
    """
    found = _candidates(name)
    return found[0].gpu if len(found) == 1 else None


def resolve_gpu(
    text: str,
    *,
    memory_bytes: int | None = None,
    capability: tuple[int, int] | None = None,
    sm_count: int | None = None,
) -> tuple[GPU, list[str]]:
    """The card that `text` names, and a sentence for each fact that `text` leaves open or an argument changes.

    Arguments that are given replace the table's values, except that a contradicting `capability` is an error.
    A name outside the table needs `memory_bytes` and `capability`. DeviceError names the missing ones.

    >>> gpu, notes = resolve_gpu("v100")
    >>> gpu.name
    'Tesla V100-SXM2-16GB'
    >>> notes[0].partition("; ")[2]
    'it could also be Tesla V100-PCIE-16GB, Tesla V100-SXM2-32GB'
    >>> resolve_gpu("a100 80gb pcie")[0].sm_count
    108
    """
    found = _candidates(text)
    if not found:
        return _described(text, memory_bytes, capability, sm_count)
    gpu, notes = _choose(text, found, memory_bytes, sm_count)
    if capability is not None and capability != gpu.capability:
        own, given = _dotted(gpu.capability), _dotted(capability)
        raise DeviceError(say("gpus.resolve.other_capability", name=gpu.name, own=own, given=given))
    if sm_count is not None and sm_count != gpu.sm_count:
        notes.append(say("gpus.resolve.sm_count", name=gpu.name, given=sm_count, known=gpu.sm_count))
        gpu = replace(gpu, sm_count=sm_count)
    gpu, note = _resized(gpu, memory_bytes)
    return gpu, [*notes, *note]


def context_bytes(gpu: GPU, cuda_version: tuple[int, int] = (12, 8)) -> tuple[int, str]:
    """Bytes that a process uses on `gpu` outside PyTorch's allocator, and a sentence with their source.

    It is the CUDA context with the kernels loaded; NCCL and other libraries come on top. Rows of `contexts.csv` with
    the card's compute capability and SM count are measurements of its chip; the largest counts, with its rounding
    error. Otherwise it is an estimate from the rows of the nearest capability: interpolated between the SM counts on
    either side of the card's, or in proportion beyond them. The driver sets memory aside for every SM: 3 to 6 MiB each
    on all but one of the chips measured. Of CUDA's versions only `LAZY_LOADING` shows in the measurements, so rows on
    its same side count.

    >>> context_bytes(resolve_gpu("T4")[0])[0] // 2**20
    150
    """
    lazy = cuda_version >= LAZY_LOADING
    rows = [row for row in _contexts() if (row.cuda_version >= LAZY_LOADING) == lazy]
    same = [row for row in rows if (row.capability, row.sm_count) == (gpu.capability, gpu.sm_count)]
    if same:
        row = max(same, key=lambda row: row.upper_bytes)
        return row.upper_bytes, _measured(row)
    rows = [row for row in rows if row.for_estimates]
    nearest = min(_distance(row, gpu) for row in rows)
    by_sms = {  # the largest of each SM count comes last and stays
        row.sm_count: row
        for row in sorted(rows, key=lambda row: (row.sm_count, row.upper_bytes))
        if _distance(row, gpu) == nearest
    }
    below = [row for sms, row in by_sms.items() if sms <= gpu.sm_count][-1:]
    above = [row for sms, row in by_sms.items() if sms > gpu.sm_count][:1]
    used = below + above
    if len(used) == 2:
        low, high = used
        share = (gpu.sm_count - low.sm_count) / (high.sm_count - low.sm_count)
        estimate = round(low.upper_bytes + share * (high.upper_bytes - low.upper_bytes))
    else:
        estimate = round(used[0].upper_bytes * gpu.sm_count / used[0].sm_count)
    cards = [say("gpus.context.card", name=row.gpu, sm_count=row.sm_count, size=row.upper_bytes) for row in used]
    joined = say("gpus.context.and").join(cards)
    return estimate, say("gpus.context.estimate", size=estimate, sm_count=gpu.sm_count, cards=joined)


def _resized(gpu: GPU, memory_bytes: int | None) -> tuple[GPU, list[str]]:
    """The card with the memory that was given, if any, and a sentence about its size."""
    if memory_bytes is None:
        if gpu.memory_share is None:
            return gpu, []
        advertised, size = gpu.memory_source.endswith("GB"), gpu.memory_source
        source = say("gpus.resolve.advertised" if advertised else "gpus.resolve.in_nvidia_smi", size=size)
        estimate = {"size": gpu.memory_bytes, "share": gpu.memory_share}
        return gpu, [say("gpus.resolve.estimated", name=gpu.name, source=source, **estimate)]
    sizes = {"size": memory_bytes, "known": gpu.memory_bytes_min}
    estimated = gpu.memory_is_estimate
    note = say("gpus.resolve.not_the_estimate" if estimated else "gpus.resolve.not_the_least", name=gpu.name, **sizes)
    given = replace(gpu, memory_bytes=memory_bytes, memory_bytes_min=memory_bytes, memory_source="as given")
    return replace(given, memory_share=None), [note]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A card of the table, with the words that its name must and may contain."""

    gpu: GPU
    required: frozenset[str]
    allowed: frozenset[str]
    common_rank: int | None
    """1 for the first choice when a name fits several cards; None for a card that is never chosen so."""
    common_reason: str
    not_listed: str
    """Other cards of this name, which are not in the table."""


@dataclass(frozen=True, kw_only=True)
class _Context:
    """A row of `contexts.csv`: one published measurement."""

    gpu: str
    capability: tuple[int, int]
    sm_count: int
    cuda_version: tuple[int, int]
    for_estimates: bool
    """True if estimates for other chips may use it."""
    upper_bytes: int
    """The reading and its rounding error, and the kernels if it was read before any were loaded."""
    source: str


def _candidates(text: str) -> list[_Entry]:
    if len(text) > _MAX_NAME:  # cutting it could turn an unknown name into a known one
        return []
    words = _words(text) - _BRANDS
    return [entry for entry in _table() if entry.required <= words <= entry.allowed]


def _choose(text: str, found: list[_Entry], memory_bytes: int | None, sm_count: int | None) -> tuple[GPU, list[str]]:
    """Choose one of the cards that `text` fits: by SM count or memory, else the common one; and the reason."""
    if len(found) == 1:
        gpu, more = found[0].gpu, found[0].not_listed
        open_size = memory_bytes is None and not any(re.fullmatch(r"\d+gb", word) for word in _words(text))
        note = say("gpus.resolve.also_made_with", text=text, name=gpu.name, others=more)
        return gpu, [note] if more and open_size else []
    left = [entry for entry in found if entry.gpu.sm_count == sm_count] or found
    if memory_bytes is not None:  # sizes that share a name differ by 20% or more, drivers and ECC by 7% at most
        left = [entry for entry in left if 0.9 < memory_bytes / entry.gpu.memory_bytes < 1.1] or left
    if len(left) == 1:
        return left[0].gpu, [say("gpus.resolve.by_size", text=text, name=left[0].gpu.name)]
    ranked = sorted((entry for entry in left if entry.common_rank), key=lambda entry: entry.common_rank or 0)
    if not ranked:
        names = ", ".join(entry.gpu.name for entry in left)
        raise DeviceError(say("gpus.resolve.ambiguous", text=text, names=names))
    best = ranked[0]
    others = ", ".join(entry.gpu.name for entry in found if entry is not best)
    reason = term("gpus.reason", best.common_reason)
    return best.gpu, [say("gpus.resolve.common", text=text, name=best.gpu.name, reason=reason, others=others)]


def _described(
    text: str, memory_bytes: int | None, capability: tuple[int, int] | None, sm_count: int | None
) -> tuple[GPU, list[str]]:
    """Make a card outside the table from the user's description."""
    name = " ".join(text.split())
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise DeviceError(say("gpus.resolve.no_name", text=_short(text), most=_MAX_NAME))
    if memory_bytes is None or capability is None:
        options = {say("gpus.resolve.memory"): memory_bytes, say("gpus.resolve.capability"): capability}
        missing = say("gpus.context.and").join(option for option, value in options.items() if value is None)
        near = _nearest(name)
        hint = say("gpus.resolve.nearest", names=near) if near else ""
        raise DeviceError(say("gpus.resolve.unknown", name=name, hint=hint, missing=missing))
    notes = [say("gpus.resolve.described", name=name)]
    if sm_count is None:
        sm_count = UNKNOWN_SM_COUNT
        notes.append(say("gpus.resolve.unknown_sm_count", count=sm_count))
    arch = {gpu.capability: gpu.arch for gpu in all_gpus()}.get(capability, "unknown")
    gpu = GPU(
        name=name,
        arch=arch,
        capability=capability,
        sm_count=sm_count,
        memory_bytes=memory_bytes,
        memory_bytes_min=memory_bytes,
        memory_source="as given",
        source="as given",
    )
    return gpu, notes


def _nearest(name: str) -> str:
    """Up to three names of the table that look like `name`, brands aside."""
    by_words = {" ".join(sorted(_words(gpu.name) - _BRANDS)): gpu.name for gpu in all_gpus()}
    close = difflib.get_close_matches(" ".join(sorted(_words(name) - _BRANDS)), by_words, n=3, cutoff=0.5)
    return ", ".join(by_words[words] for words in close)


def _words(text: str) -> frozenset[str]:
    """Lower-case words of a name, with sizes as `12gb` and joined forms (rtx3060ti, 12 G) taken apart.

    >>> sorted(_words("RTX3060Ti-8G"))
    ['3060', '8gb', 'rtx', 'ti']
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"nvidia|geforce|tesla|rtx|gtx", r" \g<0> ", text)
    text = re.sub(r"(?<=\d)(ti|super|laptop|mobile)", r" \1", text)
    text = re.sub(r"\bti(?=super|laptop|mobile)", "ti ", text)
    text = re.sub(r"(?<![a-z\d.])(\d{1,3})\s*(?:gib|gb|g)\b", r" \1gb ", text)
    text = re.sub(r"\b(?:mobile|notebook)\b", "laptop", text)
    return frozenset(re.findall(r"[a-z\d]+", text))


def _short(text: str) -> str:
    return repr(text) if len(text) <= _MAX_NAME else say("gpus.resolve.long_name", text=text[:40], characters=len(text))


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(str(part) for part in capability)


def _pair(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


def _number(text: str) -> float | None:
    return float(text) if text else None


def _rows(name: str) -> list[dict[str, str]]:
    with files("tightfit").joinpath(name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@functools.cache
def _table() -> tuple[_Entry, ...]:
    rows = _rows("gpus.csv")
    return tuple(_entry(row, rows) for row in rows)


def _entry(row: dict[str, str], rows: list[dict[str, str]]) -> _Entry:
    words = _words(row["name"]) - _BRANDS
    forms = {word for word in words if re.fullmatch(r"sxm\d?", word)}
    sizes = {word for word in words if re.fullmatch(r"\d+gb", word)}
    rank = row["common_rank"]
    return _Entry(
        gpu=_gpu(row, rows),
        required=frozenset(words - _OPTIONAL - forms - sizes),
        allowed=words
        | _words(row["extra_words"])
        | {f"{row['memory_marketing_gb']}gb"}
        | ({"sxm"} if forms else set()),
        common_rank=int(rank) if rank else None,
        common_reason=row["common_reason"],
        not_listed=row["not_listed"],
    )


def _gpu(row: dict[str, str], rows: list[dict[str, str]]) -> GPU:
    known = bool(row["linux_bytes_min_seen"])
    estimate, nominal, share = (0, "", None) if known else _estimated_memory(row, rows)
    return GPU(
        name=row["name"],
        arch=row["arch"],
        capability=_pair(row["compute_capability"]),
        sm_count=int(row["sm_count"]),
        memory_bytes=int(row["memory_total_bytes_as_reported"]) if known else estimate,
        memory_bytes_min=int(row["linux_bytes_min_seen"]) if known else estimate,
        memory_share=share,
        bandwidth_gbps=_number(row["mem_bandwidth_GBps"]),
        cache_bytes=round(float(row["l2_mib"]) * MIB) if row["l2_mib"] else None,
        bf16_tflops=_number(row["bf16_dense_tflops"]),
        fp16_tflops=_number(row["fp16_dense_tflops"]),
        fp32_tflops=_number(row["fp32_tflops"]),
        measured_bf16_tflops=_number(row["measured_bf16_matmul_tflops"]),
        measured_fp16_tflops=_number(row["measured_fp16_matmul_tflops"]),
        memory_source=row["memory_source"] if known else nominal,
        source=row["source"],
        notes=row["notes"],
    )


def _estimated_memory(row: dict[str, str], rows: list[dict[str, str]]) -> tuple[int, str, float]:
    """Bytes for a card without a known Linux total, its nominal size and the share; low so that a plan still fits.

    nvidia-smi's total includes the driver's reserve, so it is scaled by the least share that CUDA reports on another
    card. Both figures are of one setting of ECC; the least total may be of another. Without such a total the
    advertised size is scaled by the least share that a GeForce of that size ever reported. Windows totals are not
    used, because they include the reserve too.
    """
    known = [other for other in rows if other["linux_bytes_min_seen"]]
    if row["nvidia_smi_mib"]:
        share = min(
            int(other["memory_total_bytes_as_reported"]) / (int(other["nvidia_smi_mib"]) * MIB)
            for other in known
            if other["nvidia_smi_mib"]
        )
        total, nominal = int(row["nvidia_smi_mib"]) * MIB, f"{row['nvidia_smi_mib']} MiB"
    else:
        size = row["memory_marketing_gb"]
        share = min(
            int(other["linux_bytes_min_seen"]) / (int(size) * GIB)
            for other in known
            if other["memory_marketing_gb"] == size and other["name"].startswith("GeForce")
        )
        total, nominal = int(size) * GIB, f"{size} GB"
    return int(total * share) // MIB * MIB, nominal, share


@functools.cache
def _contexts() -> tuple[_Context, ...]:
    rows = _rows("contexts.csv")
    kernels = max(int(row["bytes"]) for row in rows if row["kind"] == "kernels")
    return tuple(
        _Context(
            gpu=row["gpu"],
            capability=_pair(row["compute_capability"]),
            sm_count=int(row["sm_count"]),
            cuda_version=_pair(row["cuda_version"]),
            for_estimates=row["for_estimates"] == "yes",
            upper_bytes=int(row["bytes"]) + int(row["error_bytes"]) + (kernels if row["kind"] == "context" else 0),
            source=row["source"],
        )
        for row in rows
        if row["kind"] != "kernels"
    )


def _distance(row: _Context, gpu: GPU) -> int:
    """Distance of two compute capabilities; a major step counts as ten minor ones."""
    return abs(10 * (row.capability[0] - gpu.capability[0]) + row.capability[1] - gpu.capability[1])


def _measured(row: _Context) -> str:
    major, minor = row.cuda_version
    version = f"{major}.{minor}" if minor else f"{major}"
    return say("gpus.context.measured", size=row.upper_bytes, gpu=row.gpu, version=version, source=row.source)
