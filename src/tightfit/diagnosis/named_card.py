"""The card of a log: its size and its use by the log's figures, and its name if known."""

import re
from collections.abc import Iterator

import msgspec

from tightfit.errors import DeviceError
from tightfit.gpus import GPU, MAX_AUTOTUNE_SMS, all_gpus, context_bytes, find_gpu, resolve_gpu
from tightfit.oomlog.facts import Facts, Figure
from tightfit.oomlog.printed import Printed

_SPREAD = 0.02
"""Share by which totals that cards report in the wild lie outside those of the table."""


_IN_WORDS = re.compile(
    r"\b((?:(?:NVIDIA|GeForce|Tesla|RTX|GTX|Quadro) ?)+"
    r"(?:[1-5]0[5-9]0(?: ?(?:Ti|SUPER|Super|D)\b){0,2}|A\d{4}|[TPVALHB]\d{1,3}[SG]?)"
    r"|[345]090(?: ?Ti)?|[2345]0[678]0(?: ?(?:Ti|ti|TI|SUPER|Super)\b| (?=GPU|card))|T4|L40S?|A10G|A40|A30|H200|B200)\b"
    r"(?! ?(?:Mobile|Max-Q|[Ll]aptop|[Nn]otebook|MiB|MB|tokens|steps|images))"
)
"""Names of cards as people write them."""


def bytes_in_words(text: str) -> int | None:
    """Return the memory of the only card that a text names, as drivers report it; None where the name leaves it open.

    >>> bytes_in_words("It fails on my RTX 3090."), bytes_in_words("a V100"), bytes_in_words("a T4, or an RTX 3090")
    (25311576064, None, None)
    """
    names = dict.fromkeys(match[1] for match in _IN_WORDS.finditer(text))
    cards = [find_gpu(name if not name[:1].isdigit() else f"RTX {name.strip()}") for name in names]
    sizes = {card.memory_bytes_min if card else None for card in cards}
    return sizes.pop() if len(sizes) == 1 else None


_BEFORE_AMPERE = re.compile(
    r"\b(?:T4|V100|P100|P40|K80|K40|M40|M60|RTX ?20[5678]0|20[678]0 ?(?:[Tt][Ii]|SUPER|Super)|1[06][35678]0 ?[Tt][Ii]"
    r"|(?:GTX|gtx) ?(?:[679]\d0|1[06]\d0)|(?:Quadro|QUADRO|TITAN) RTX)\b"
)
_SINCE_AMPERE = re.compile(
    r"\b(?:[AHBL]\d{2,3}[0SG]?|A10G?|L4|L40S?|[AR]TX ?A?[3-6]\d{3}|[345]0[5-9]0|RTX ?[3-6]0\d0|RTX (?:PRO|A)\w*)\b"
)


def is_before_ampere(text: str) -> bool:
    """Return True if all cards that a text names are too old for bfloat16 and 8-bit floating point numbers.

    >>> is_before_ampere("on a 2080Ti"), is_before_ampere("on a T4, then on an RTX 3060"), is_before_ampere("my GPU")
    (True, False, False)
    """
    return bool(_BEFORE_AMPERE.search(text)) and not _SINCE_AMPERE.search(text)


def least_bytes_in_words(text: str) -> int | None:
    """Return the memory of the smallest card that a text names; None if it names no known card.

    >>> least_bytes_in_words("three A100 cards") // 2**30, least_bytes_in_words("our cluster")
    (39, None)
    """
    names = {match[1].rpartition(" ")[2] for match in _IN_WORDS.finditer(text)}
    names |= set(_OF_SEVERAL_SIZES.findall(text))
    known = {
        name: [each.memory_bytes_min for each in all_gpus() if name in re.split(r"[\s-]", each.name)] for name in names
    }
    return min((min(sizes) for sizes in known.values() if sizes), default=None) if all(known.values()) else None


_OF_SEVERAL_SIZES = re.compile(r"\b([AHV]100)\b")
"""Cards whose names leave their memory open."""


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """The card on which a run is played."""

    name: str
    capability: tuple[int, int]
    """Compute capability: major, minor."""
    total_bytes: int
    used_bytes: int
    """Bytes used by other processes."""
    context_bytes: int
    """Bytes used by this process outside PyTorch's allocator."""
    how_named: str
    """given, printed, assumed (from the total) or described (a name that is in no table)."""
    total_stated: bool
    """True if the log prints the total; otherwise it is the table's."""

    @property
    def room_bytes(self) -> int:
        """Bytes that this process may use."""
        return self.total_bytes - self.used_bytes


NOT_CUDA = ("mps_out_of_memory", "xpu_out_of_memory", "npu_out_of_memory")
"""Kinds of failures on devices other than CUDA's and ROCm's."""
OF_OTHER_MAKERS = ("hip_out_of_memory", *NOT_CUDA)
"""Kinds of failures on devices that are not NVIDIA's: the virtual GPU plays none of them."""


def card_of(facts: Facts, printed: Printed, gpu: str | None) -> Card | None:
    """Return the card, or None if neither the log nor the caller names it. DeviceError for an unknown given name."""
    total = facts.figures.get("total_bytes")
    found, how = _named(gpu, printed, total)
    if found is None or (how != "given" and facts.kind in OF_OTHER_MAKERS):
        return None
    size = total.bytes if total else found.planning_bytes
    context = facts.outside_pytorch_bytes
    others = facts.others_bytes
    if context is None:
        context = min(context_bytes(found)[0], facts.not_reserved_bytes or size)
    if others is None:
        others = max(0, facts.not_reserved_bytes - context) if facts.not_reserved_bytes is not None else 0
    return Card(
        name=found.name,
        capability=found.capability,
        total_bytes=size,
        used_bytes=others,
        context_bytes=context,
        how_named=how,
        total_stated=total is not None,
    )


def _named(gpu: str | None, printed: Printed, total: Figure | None) -> tuple[GPU | None, str]:
    memory = total.bytes if total else None
    if gpu is not None:
        return resolve_gpu(gpu, memory_bytes=memory)[0], "given"
    if printed.gpu_name:
        known = find_gpu(printed.gpu_name)
        if known:
            return known, "printed"
        try:
            return resolve_gpu(printed.gpu_name, memory_bytes=memory)[0], "printed"
        except DeviceError:
            pass  # a name that no table has: by its size, then
    if total is None:
        return None, ""
    fitting = sorted(_cards_of_size(total, few_sms="few_sms" in printed.hints), key=lambda each: _rank(each, total))
    return (fitting[0], "assumed") if fitting else (None, "")


def _cards_of_size(total: Figure, *, few_sms: bool) -> Iterator[GPU]:
    """Yield cards that may report `total`; torch.compile's warning about SMs rules the large ones out."""
    for each in all_gpus():
        low, high = each.memory_bytes_min * (1 - _SPREAD), each.memory_bytes * (1 + _SPREAD)
        if low <= total.bytes <= high and (not few_sms or each.sm_count < MAX_AUTOTUNE_SMS):
            yield each


def _rank(card: GPU, total: Figure) -> tuple[bool, bool, int]:
    """Put cards that report this total first; among them the one with the fewest SMs, which is sold most."""
    reports_it = card.memory_bytes_min <= total.high + 1 and total.low <= card.memory_bytes
    return not reports_it, card.memory_is_estimate, card.sm_count


_MIG = re.compile(r"\bMIG[ -](\d{1,2}[gc]\.\d{1,3}gb)\b", re.IGNORECASE)


def mig_profile(text: str) -> str | None:
    """Return the profile of the slice of a card that a log names.

    >>> mig_profile("NVIDIA A100-SXM4-40GB MIG 2g.10gb"), mig_profile("NVIDIA A100")
    ('2g.10gb', None)
    """
    found = _MIG.search(text)
    return found[1] if found else None
