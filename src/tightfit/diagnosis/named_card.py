"""The card that a log speaks of: its size and what is taken of it by the log's figures, and its name if known."""

from dataclasses import dataclass

from tightfit.errors import DeviceError
from tightfit.gpus import GPU, MAX_AUTOTUNE_SMS, all_gpus, context_bytes, find_gpu, resolve_gpu
from tightfit.oomlog.facts import Facts, Figure
from tightfit.oomlog.printed import Printed

_COMPARED = 0.02
"""Totals of a card in the wild spread so far around those that the table has seen."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What plays happen on."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    used_bytes: int
    """By other processes."""
    context_bytes: int
    """By this one, outside PyTorch's allocator."""
    how_named: str
    """given, printed, assumed (from the total) or described (a name that is in no table)."""
    total_stated: bool
    """Whether the log says the total; otherwise it is the table's."""


def card_of(facts: Facts, printed: Printed, gpu: str | None) -> Card | None:
    """The card, or None if neither the log nor the caller says enough. DeviceError for a given name that is unknown."""
    total = facts.figures.get("total_bytes")
    found, how = _named(gpu, printed, total)
    if found is None:
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
    few = "few_sms" in printed.hints
    fitting = [
        each for each in all_gpus()
        if each.memory_bytes_min * (1 - _COMPARED) <= total.bytes <= each.memory_bytes * (1 + _COMPARED)
        and (not few or each.sm_count < MAX_AUTOTUNE_SMS)
    ]  # fmt: skip
    # Those whose reported totals include this one first; of these the one with the fewest SMs, which is sold most.
    fitting.sort(key=lambda each: (not each.memory_bytes_min <= total.high + 1 or total.low > each.memory_bytes,
                                   each.memory_is_estimate, each.sm_count))  # fmt: skip
    return (fitting[0], "assumed") if fitting else (None, "")
