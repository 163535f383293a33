"""Why memory ran out: the causes, the most important first, each with its numbers and how it is known."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from tightfit.diagnosis.culprit import Culprit
from tightfit.diagnosis.guess import Guesses
from tightfit.diagnosis.variants import Outcome
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.printed import Printed
from tightfit.units import MIB

MEASURED, SIMULATED, LIKELY = "measured", "simulated", "likely"
_DEVICE_KINDS = frozenset(
    {"cuda_out_of_memory", "hip_out_of_memory", "xpu_out_of_memory", "npu_out_of_memory", "device_out_of_memory",
     "cuda_async", "mps_out_of_memory"}
)  # fmt: skip
"""Kinds in which a tensor of the program did not fit a device."""
_STATE = ("gradients", "optimizer state")


def is_of_device(facts: Facts) -> bool:
    """Whether a tensor did not fit a device, so that a play can say which."""
    return facts.kind in _DEVICE_KINDS


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """One reason; `code` is a key of the words' table `causes`."""

    code: str
    label: str
    """measured (from the log), simulated or likely."""
    values: Mapping[str, Any] = msgspec.field(default_factory=dict)


def causes_of(
    facts: Facts,
    printed: Printed,
    *,
    culprit: Culprit | None = None,
    base: Outcome | None = None,
    train: Outcome | None = None,
    guesses: Guesses | None = None,
    unplayed_because: str = "",
) -> tuple[Cause, ...]:
    """All that is known to have led to the failure, and what looks like a cause and is none."""
    if not is_of_device(facts):
        return (Cause(code=f"kind_{facts.kind}", label=MEASURED, values={"pid": facts.pid}),)
    found = [
        *_of_play(facts, culprit, base, train),
        *_of_guess(facts, culprit, guesses, unplayed_because),
        *_of_figures(facts),
        *_of_hints(printed),
    ]
    return tuple(found) or (Cause(code="unstated", label=MEASURED),)


def _of_play(facts: Facts, culprit: Culprit | None, base: Outcome | None, train: Outcome | None) -> Iterator[Cause]:
    if base is None or culprit is None or culprit.label != SIMULATED:
        if base is not None:
            yield Cause(code="play_fits", label=SIMULATED, values={"device_bytes": base.device_bytes})
        return
    if not culprit.matches:
        yield Cause(code="play_differs", label=SIMULATED)
    variant = base.variant
    is_logits = culprit.tensor == "logits"
    several = {
        "copies": culprit.copies, "each_bytes": culprit.bytes, "all_bytes": culprit.copies * culprit.bytes,
    }  # fmt: skip
    if is_logits and culprit.from_before and culprit.iteration is not None:
        before = {"iteration": culprit.iteration, "before": culprit.iteration - 1}
        yield Cause(code="logits_still_bound", label=SIMULATED, values=several | before)
    elif is_logits and culprit.copies > 1:
        yield Cause(code="logits_several", label=SIMULATED, values=several)
    if is_logits and variant is not None and culprit.bytes % max(1, variant.tokens * variant.vocab_size) == 0:
        yield Cause(
            code="full_logits",
            label=SIMULATED,
            values={
                "tokens": variant.tokens, "vocab_size": variant.vocab_size, "dtype": culprit.dtype,
                "batch_size": variant.batch_size, "block_size": variant.block_size,
                "element_bytes": culprit.bytes // (variant.tokens * variant.vocab_size),
                "each_bytes": culprit.bytes,
            },
        )  # fmt: skip
    else:
        held = sorted(culprit.categories.items(), key=lambda item: -item[1])[:3]
        yield Cause(
            code="held",
            label=SIMULATED,
            values={"held": [{"category": name, "held_bytes": size} for name, size in held]},
        )
    if variant is not None and train is not None and train is not base and not train.fits:
        yield Cause(
            code="training_too",
            label=SIMULATED,
            values={"phase": train.phase, "device_bytes": train.device_bytes, "batch_size": variant.batch_size},
        )
    if variant is not None and culprit.phase == "eval" and not any(culprit.categories.get(name) for name in _STATE):
        yield Cause(
            code="before_first_step",
            label=SIMULATED,
            values={"state_bytes": 12 * variant.parameters, "parameters": variant.parameters},
        )


def _of_guess(facts: Facts, culprit: Culprit | None, guesses: Guesses | None, unplayed_because: str) -> Iterator[Cause]:
    if guesses is None:
        return
    if guesses.cannot_be_told:
        yield Cause(
            code="smallest_request" if guesses.tensor_high <= MIB else "small_request",
            label=MEASURED,
            values={"requested_bytes": facts.requested_bytes, "tensor_high": guesses.tensor_high},
        )
    elif culprit is None:
        # A play that fits already names the next step: the configuration of the run that failed.
        codes = {"config": "tensor_not_told", "card": "tensor_not_told_without_gpu"}
        if unplayed_because in codes:
            values = {"requested_bytes": facts.requested_bytes}
            yield Cause(code=codes[unplayed_because], label=MEASURED, values=values)
    elif culprit.label == LIKELY:
        yield Cause(
            code="guessed",
            label=LIKELY,
            values={
                "tensor": culprit.tensor, "shape": culprit.shape, "dtype": culprit.dtype,
                "batch_size": culprit.guesses[0].batch, "block_size": culprit.guesses[0].block,
                "share": round(culprit.guesses[0].score, 4), "others": len(culprit.guesses) - 1,
            },
        )  # fmt: skip


def _of_figures(facts: Facts) -> Iterator[Cause]:
    """What the message's own figures say of the rest of the card."""
    total, requested = facts.total_bytes, facts.requested_bytes
    if facts.allowed_bytes is not None and "no_limit_set" not in facts.notes:
        yield Cause(code="limited", label=MEASURED, values={"allowed_bytes": facts.allowed_bytes})
    others = facts.figures.get("others_bytes")
    if others is not None and total and others.low > 0.01 * total:
        need = (facts.process_bytes or 0) + (requested or 0)
        enough = (facts.free_bytes or 0) + others.bytes >= (requested or 0)
        yield Cause(
            code="others_decide" if enough else "others_too",
            label=MEASURED,
            values={"others_bytes": others.bytes, "total_bytes": total, "need_bytes": need},
        )
    cache = facts.figures.get("cache_bytes")
    if cache is not None and cache.bytes:
        would = facts.cache_would_do
        code = "cache_fragmented" if would else "cache_little" if would is False else "cache_open"
        yield Cause(
            code=code,
            label=MEASURED,
            values={"cache_bytes": cache.bytes, "short_by_bytes": facts.short_by_bytes, "requested_bytes": requested},
        )
    if facts.private_pool_bytes:
        yield Cause(code="private_pools", label=MEASURED, values={"pool_bytes": facts.private_pool_bytes})
    outside = facts.figures.get("outside_pytorch_bytes")
    if outside is not None and outside.high > 0:
        yield Cause(
            code="outside",
            label=MEASURED,
            values={"outside_bytes": outside.bytes, "low_bytes": outside.low, "high_bytes": outside.high},
        )
    if "more_free_than_requested" in facts.notes:
        yield Cause(code="more_free_than_requested", label=MEASURED, values={"free_bytes": facts.free_bytes})
    if "spills_to_host" in facts.notes:
        yield Cause(code="spills_to_host", label=MEASURED)


def _of_hints(printed: Printed) -> Iterator[Cause]:
    for hint in printed.hints:
        if hint in ("few_sms", "flash_attention_missing"):
            yield Cause(code=f"hint_{hint}", label=MEASURED)
