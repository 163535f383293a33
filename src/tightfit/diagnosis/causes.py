"""Causes of a failure, the most important first, each with its figures and its evidence."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from tightfit.diagnosis import kind_sentences
from tightfit.diagnosis.cause_records import (
    COMPUTED,
    SIMULATED,
    CategoryBytes,
    Cause,
    FillsCard,
    FullLogits,
    Held,
    LogitsBound,
    LogitsCopies,
    OtherKind,
    OtherProcesses,
    PlayFits,
    StateToCome,
    ToldShape,
    TrainingToo,
)
from tightfit.diagnosis.culprit import Culprit
from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.evidence_causes import causes_of_evidence, causes_of_purpose, causes_of_report
from tightfit.diagnosis.figure_causes import DECISIVE, cache_holds_request, causes_of_figures, has_no_gpu
from tightfit.diagnosis.outcome import Outcome
from tightfit.diagnosis.told_shape import largest_shape
from tightfit.diagnosis.variants import Variant
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.ownership import had_room, others_might_do
from tightfit.oomlog.printed import Printed

_DEVICE_KINDS = frozenset(
    {
        "cuda_out_of_memory",
        "hip_out_of_memory",
        "xpu_out_of_memory",
        "npu_out_of_memory",
        "device_out_of_memory",
        "cuda_async",
        "mps_out_of_memory",
    }
)
"""Kinds in which a tensor of the program did not fit a device."""
_STATE = ("gradients", "optimizer state")
_STATE_BYTES = 12
"""Bytes of a parameter's gradient and AdamW's two moments in float32."""
_SHOWN_CATEGORIES = 3


def is_of_device(facts: Facts) -> bool:
    """Return True if a tensor did not fit a device, so that a play can tell which."""
    return facts.kind in _DEVICE_KINDS or facts.torch_format == "T0"


def causes_of(
    facts: Facts,
    printed: Printed,
    *,
    run: Variant | None = None,
    culprit: Culprit | None = None,
    base: Outcome | None = None,
    train: Outcome | None = None,
    evidence: Evidence | None = None,
    unplayed_because: str = "",
) -> tuple[Cause, ...]:
    """Return all known causes, and hints that look like one. `base` and `train` are plays of `run`."""
    if not is_of_device(facts):
        is_told = facts.kind == "program_words" or (facts.kind == "cuda_driver" and facts.phase == "save")
        told = [*causes_of_report(facts, evidence)] if evidence is not None and is_told else []
        return (*told, OtherKind(code=f"kind_{facts.kind}", label=kind_sentences.label_of(facts), pid=facts.pid))
    if has_no_gpu(facts):
        return (Cause(code="mps_unusable", label="likely"),)
    found = list(_of_play(base, culprit, run, train))
    first: list[Cause] = []
    rest: list[Cause] = []
    if evidence is not None:
        first, rest = causes_of_evidence(facts, culprit, evidence, unplayed_because)
    figures = list(causes_of_figures(facts))
    decisive = [each for each in figures if each.code in DECISIVE]
    others = figures[len(decisive) :]
    if facts.kind == "mps_out_of_memory":  # PyTorch's own limit is what every such message is about
        rest, others = [*others, *rest], []
    small = [each for each in decisive if _is_small(each)]
    full = [*_of_full_card(facts)] if evidence is not None and not (first or decisive != small or found) else []
    if any(each.code.startswith("grows_") for each in rest):
        full = []
        if evidence is not None and evidence.grows in _QUADRATIC:  # an estimate of other programs comes behind it
            others = [*(each for each in decisive if each.code in _ESTIMATED), *others]
            decisive = [each for each in decisive if each.code not in _ESTIMATED]
    if cache_holds_request(facts):
        rest, others = _with_pieces(rest, others)
    decisive = [*full, *decisive, *found] if small else [*decisive, *found, *full]
    found = [*first, *decisive, *rest, *others, *_of_hints(printed)]
    shown = tuple(found) or (_of_little(facts, evidence.run.text if evidence is not None else ""),)
    is_bare = facts.requested_bytes is None and not (culprit or [each for each in first if each.code != "works_with"])
    if evidence is not None and (is_bare or _is_of_server(facts, evidence, found)):
        return _with_purpose(shown, facts, evidence)
    return shown


_SMALL = 0.05
"""Share of the card below which other programs only take what a full one lacks."""


def _is_small(cause: Cause) -> bool:
    """Return True for other programs that hold a small part of the card."""
    return isinstance(cause, OtherProcesses) and cause.others_bytes < _SMALL * cause.total_bytes


def _of_play(
    base: Outcome | None, culprit: Culprit | None, run: Variant | None, train: Outcome | None
) -> Iterator[Cause]:
    """Yield the causes that a play of the run shows; none without a play."""
    if base is not None and (culprit is None or culprit.label != SIMULATED):
        yield play_fits(base)
    elif base is not None and culprit is not None:
        yield from _of_tensor(culprit, run)
        if run is not None:
            yield from _of_run(culprit, run, None if train is base else train)


def _with_pieces(rest: list[Cause], others: list[Cause]) -> tuple[list[Cause], list[Cause]]:
    """Return the causes with the cache's fragments before those that only say that something is not known."""
    pieces = [each for each in others if each.code == "cache_fragmented"]
    at = next((at for at, each in enumerate(rest) if each.code.startswith("tensor_not_told")), len(rest))
    return [*rest[:at], *pieces, *rest[at:]], [each for each in others if each not in pieces]


def _with_purpose(shown: tuple[Cause, ...], facts: Facts, evidence: Evidence) -> tuple[Cause, ...]:
    """Put the program's activity first, or second where a full card's figures stand alone."""
    at = int(shown[0].code in ("fills_card", "fills_card_alone"))
    return (*shown[:at], *causes_of_purpose(facts, evidence), *shown[at:])


_SERVERS = ("vllm", "sglang", "tgi", "lmdeploy", "tensorrt_llm")


def _is_of_server(facts: Facts, evidence: Evidence, found: Sequence[Cause]) -> bool:
    """Return True for a server of language models at its start or in its work, where no figure decides."""
    decides = any(each.code in DECISIVE or each.code.startswith("grows_") for each in found)
    return evidence.framework in _SERVERS and facts.phase in (None, "warmup") and not decides


_QUADRATIC = ("attention", "pairs", "logits")
_ESTIMATED = ("others_estimated_decide",)
_FULL = 0.8
"""Share of the card that one process holds at least, if the card is called full with it."""


def _of_full_card(facts: Facts) -> Iterator[Cause]:
    """Yield that the process itself fills the card, where its figures show that."""
    held, total = facts.process_bytes or facts.reserved_bytes or facts.allocated_bytes, facts.total_bytes
    if held and total and _FULL * total <= held <= total and not had_room(facts):
        yield FillsCard(code=_code_of_full(facts), held_bytes=held, total_bytes=total)


def _code_of_full(facts: Facts) -> str:
    """Return the code that says `must` only where neither the cache nor other programs are a way out."""
    return "fills_card_alone" if facts.cache_would_do is False and not others_might_do(facts) else "fills_card"


_TELLS_SIZE = re.compile(
    r"\b(?:wants?|needs?|asks? for|tr(?:y|ies|ied) to (?:allocate|get)) (?:\w+ ){0,2}?[\d.]+ ?[GM]i?B\b", re.IGNORECASE
)
"""A person's words for the size of the request, without the message."""


def _of_little(facts: Facts, text: str) -> Cause:
    """Return the one cause of a message that shows no other."""
    held, total = facts.process_bytes or facts.allocated_bytes, facts.total_bytes
    if held and total and held > total // 2:
        return FillsCard(code=_code_of_full(facts), held_bytes=held, total_bytes=total)
    if facts.requested_bytes is None:
        shape = largest_shape(text)
        if shape:
            return ToldShape(code="told_shape", label=COMPUTED, shape=shape, bytes=4 * math.prod(shape))
        return Cause(code="unquoted" if _TELLS_SIZE.search(text) else "unstated")
    return Cause(code="request_alone" if facts.total_bytes is None else "held_unstated")


def play_fits(played: Outcome) -> Cause:
    """Return the cause for a play that explains nothing, because it fits."""
    return PlayFits(code="play_fits", label=SIMULATED, device_bytes=played.device_bytes)


def _of_tensor(culprit: Culprit, run: Variant | None) -> Iterator[Cause]:
    """Yield causes by the tensor that failed in the play."""
    if not culprit.matches:
        yield Cause(code="play_differs", label=SIMULATED)
    elements = run.tokens * run.config.vocab_size if run else 0
    if culprit.tensor == "logits":
        yield from _of_copies(culprit)
        if run is not None and elements and culprit.bytes % elements == 0:
            yield FullLogits(
                code="full_logits",
                label=SIMULATED,
                tokens=run.tokens,
                vocab_size=run.config.vocab_size,
                dtype=culprit.dtype,
                batch_size=run.config.batch_size,
                block_size=run.config.block_size,
                element_bytes=culprit.bytes // elements,
                each_bytes=culprit.bytes,
            )
            return
    yield Held(code="held", label=SIMULATED, held=by_size(culprit.categories)[:_SHOWN_CATEGORIES])


def _of_copies(culprit: Culprit) -> Iterator[Cause]:
    """Yield the reason for several tensors of the logits' size at once."""
    copies, each_bytes, all_bytes = culprit.copies, culprit.bytes, culprit.copies * culprit.bytes
    if culprit.from_before and culprit.iteration is not None:
        yield LogitsBound(
            code="logits_still_bound",
            label=SIMULATED,
            copies=copies,
            each_bytes=each_bytes,
            all_bytes=all_bytes,
            iteration=culprit.iteration,
            before=culprit.iteration - 1,
        )
    elif copies > 1:
        yield LogitsCopies(
            code="logits_several", label=SIMULATED, copies=copies, each_bytes=each_bytes, all_bytes=all_bytes
        )


def by_size(categories: Mapping[str, int]) -> tuple[CategoryBytes, ...]:
    """Return categories with their bytes, the largest first."""
    largest_first = sorted(categories.items(), key=lambda item: -item[1])
    return tuple(CategoryBytes(category=name, held_bytes=size) for name, size in largest_first)


def _of_run(culprit: Culprit, run: Variant, train: Outcome | None) -> Iterator[Cause]:
    """Yield later needs: a training step that fails, too, and the optimizer's state."""
    if train is not None and not train.fits:
        yield TrainingToo(
            code="training_too",
            label=SIMULATED,
            phase=train.phase,
            device_bytes=train.device_bytes,
            batch_size=run.config.batch_size,
        )
    if culprit.phase == "eval" and not any(culprit.categories.get(name) for name in _STATE):
        yield StateToCome(
            code="before_first_step",
            label=SIMULATED,
            state_bytes=_STATE_BYTES * run.parameters,
            parameters=run.parameters,
        )


def _of_hints(printed: Printed) -> Iterator[Cause]:
    for hint in printed.hints:
        if hint in ("few_sms", "flash_attention_missing"):
            yield Cause(code=f"hint_{hint}")
