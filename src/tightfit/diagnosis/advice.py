"""The remedies for a failure that was not played: those that cure this case first, in the user's own words."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from tightfit.diagnosis.cause_records import LIKELY, MEASURED
from tightfit.diagnosis.evidence import Evidence, named_bytes, weights_leave_room
from tightfit.diagnosis.failure_case import Case
from tightfit.diagnosis.figure_causes import (
    cache_holds_request,
    cache_is_large,
    cache_is_small,
    causes_of_figures,
    fixes_of_figures,
    has_no_gpu,
    is_of_one_block,
)
from tightfit.diagnosis.fix_lists import codes_for
from tightfit.diagnosis.fix_words import fix, words_of
from tightfit.diagnosis.measures import tried_in
from tightfit.diagnosis.named_card import NOT_CUDA
from tightfit.diagnosis.needless import needless
from tightfit.diagnosis.own_place import placed
from tightfit.diagnosis.own_words import in_own_words_first
from tightfit.diagnosis.remedies import (
    DOES_NOT_FIT,
    NO_EFFECT,
    OTHERS_DO,
    UNCHECKED,
    WITH_SPLIT_SIZE,
    Remedy,
    close_others,
    empty_cache,
    expandable_segments,
    max_split_size,
    ranked,
    to_paste,
)
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.ownership import had_room, ownership
from tightfit.units import GIB

_SHOWN_CURES = 4
_OWN_CAUSES = frozenset({"loading", "resuming", "saving", "outputs"})
"""Quantities whose own cure comes before any other program's memory: it makes the request unnecessary."""
_QUADRATIC = frozenset({"attention", "pairs", "logits"})
"""Quantities of a tensor that comes first where other programs' memory is only estimated."""
_LESS_OF_ALL = frozenset({"less_at_once", "split_in_parts", "split_logged", "smaller_batch", "smaller_model"})
"""Remedies that lessen what the program needs of the card and of what backs it, whatever refused the request."""
_OF_MANY_TENSORS = frozenset({"checkpointing_general", "half_precision", "optimizer_8bit", "offload", "shard"})
"""Remedies that lessen the sum of many tensors; a single large one shrinks with its batch and its length first."""
_FEW = 0.05
"""Share of the card up to which other programs are a desktop, and no fix comes from ending them first."""
_BEFORE_WATERMARK = 2
"""Fixes on a Mac that come before its limit is lifted, which may freeze it."""
_WITH_PAGING = ("cuda_out_of_memory", "hip_out_of_memory", "device_out_of_memory")
"""Kinds of failures that a Windows computer's paging file may cause."""


class _Order(NamedTuple):
    """Remedies in the order in which they are shown."""

    first: list[Remedy]
    """Fixes of a cause that the figures show."""
    cures: list[Remedy]
    """Fixes that lower the program's own need, the surest first."""
    last: list[Remedy]
    """Usual advice that does not help here."""


def advice(facts: Facts, evidence: Evidence) -> tuple[Remedy, ...]:
    """Return the remedies, those that cure this case first; a measured verdict that one does not help is kept."""
    case = Case(facts, evidence)
    if case.has_sign("self_test"):
        return (_likely("self_test"),)
    if has_no_gpu(facts):
        return (_likely("run_on_cpu"),)
    cures = _cures(case)
    if case.is_of("without_torch"):
        return ranked(cures)
    order = _with_others(case, _of_figures(case, cures or list(_of_last_resort(case))))
    order = _with_allocator_setting(case, order)
    first, cures, last = order
    if facts.kind == "mps_out_of_memory":
        watermark = _likely("mps_watermark")
        return ranked([*first, *cures[:_BEFORE_WATERMARK], watermark, *cures[_BEFORE_WATERMARK:]])
    return ranked([*first, *cures, *last, *([] if facts.kind in NOT_CUDA else [empty_cache(facts)])])


def closing_first(remedies: Sequence[Remedy]) -> tuple[Remedy, ...]:
    """Return the remedies of a report in which closing another program helped, with that one first."""
    known = [each for each in remedies if each.code == _OF_KIND]
    closing = known or [
        Remedy(
            code="close_others",
            verdict=UNCHECKED,
            reason="closing_helped",
            label=LIKELY,
            paste=to_paste("close_others"),
        )
    ]
    return (*closing, *(each for each in remedies if each.code not in ("close_others", _OF_KIND)))


_OF_KIND = "kind_other_programs"
"""The fix of a kind of failures that looks who uses the card."""


def _cures(case: Case) -> list[Remedy]:
    """Return the fixes that lower the program's own need, in its user's words."""
    facts, evidence = case
    codes = list(codes_for(case))
    if case.fills_card_at_once:
        codes.sort(key=lambda code: code in _OF_MANY_TENSORS)
    cures = in_own_words_first([fix(code, facts, evidence) for code in codes], evidence)
    if case.shows_no_code:
        whole = Remedy(code="kind_whole_log", verdict=UNCHECKED, reason="general", label=LIKELY, exact=None)
        cures = [_without_code(each) for each in cures]
        return cures if any(each.paste for each in cures) else [*cures[:_BEFORE_LOG], whole, *cures[_BEFORE_LOG:]]
    return cures if evidence.framework is not None else [placed(each, facts.frames) for each in cures]


_BEFORE_LOG = 3
"""Fixes that are shown before the one that asks for the whole log."""


def _without_code(remedy: Remedy) -> Remedy:
    """Return a remedy without lines of PyTorch for a loop that somebody else may have written."""
    is_code = remedy.paste == to_paste(remedy.code) or any(_OF_LOOP.search(line) for line in remedy.paste)
    return replace(remedy, paste=(), page="") if is_code else remedy


_OF_LOOP = re.compile(
    r"^(?:x = torch\.utils|with torch\.|optimizer\.step\(\)|outputs\.append|optimizer = |[a-z_]*batch_size = )"
)
"""Lines of a training or an evaluation in PyTorch."""


_OF_USE = ("less_at_once", "smaller_picture", "offload", "smaller_weights", "quantized_weights", "smaller_model")
"""What the user of a trained model may change in its program, whatever tensor failed."""


def _of_last_resort(case: Case) -> Iterator[Remedy]:
    """Yield what is left where no fix of the tables is about the program and its phase."""
    facts, evidence = case
    uses = case.is_of("servers") or case.is_of("trainers")
    if facts.phase == "load" and case.shows("subject.reads_checkpoint") and not uses:
        yield fix("load_on_host", facts, evidence)
    of_use = [code for code in _OF_USE if evidence.infers and case.has_own(code)]
    yield from (fix(code, facts, evidence) for code in of_use if code not in needless(case))
    if not facts.frames:
        yield Remedy(code="kind_whole_log", verdict=UNCHECKED, reason="general", label=LIKELY, exact=None)


def _likely(code: str, pasted: str | None = None) -> Remedy:
    """Return a likely remedy with its lines, or those of another code."""
    return Remedy(code=code, verdict=UNCHECKED, reason=code, label=LIKELY, paste=to_paste(pasted or code))


def _of_figures(case: Case, cures: list[Remedy]) -> _Order:
    """Return the fixes of a cause that the figures show before the others."""
    facts, evidence = case
    first = [
        *_other_device(case),
        *_of_shared_memory(case),
        *(_in_words_of_program(each, case) for each in fixes_of_figures(facts)),
        *(each for each in cures if each.code == "kept_graph"),
    ]
    cures = [each for each in cures if each.code != "kept_graph"]
    if is_of_one_block(facts):
        return _Order([fix("xpu_relaxed_limit", facts, evidence), *first], cures[:2], [])
    if had_room(facts) and facts.allowed_bytes is None:  # the size of a tensor is not the cause
        less = [each for each in cures if each.code in _LESS_OF_ALL and each.paste]
        return _Order(_of_room(case, first), [fix("watched_card", facts, evidence), *less[:2]], [])
    return _Order(first, cures, [])


def _in_words_of_program(remedy: Remedy, case: Case) -> Remedy:
    """Return a fix of the figures with the program's own option, where it has one."""
    words = words_of(remedy.code, case.evidence) if case.has_own(remedy.code) else None
    return remedy if words is None else replace(remedy, paste=words.lines, page=words.page)


def _other_device(case: Case) -> Iterator[Remedy]:
    """Yield the fix of a run on a card that is much smaller than those that the report names, or that is in use."""
    if named_bytes(*case) is not None:
        yield _likely("other_device")
    if weights_leave_room(*case):
        yield _likely("card_in_use", pasted="close_others")


def _of_shared_memory(case: Case) -> Iterator[Remedy]:
    """Yield the fixes for a GPU that shares the machine's memory, where PyTorch has only a part."""
    if any(each.code == "host_shares_memory" for each in causes_of_figures(case.facts)):
        yield _likely("host_looked_at")
        yield _likely("no_second_copy")
        yield from [_likely("gtt_limit")] if case.facts.kind == "hip_out_of_memory" else []


_DESKTOP = 16.5 * GIB
"""Memory of the largest card that is usual in a machine of one's own."""


def _may_be_windows(case: Case) -> bool:
    """Return True for a person's report of one process on a small card, in which nothing shows the system."""
    is_report = case.run.text.lstrip().startswith("# ") and case.run.numbers.get("world_size", 1) == 1
    is_small = (case.facts.total_bytes or 0) < _DESKTOP
    return is_report and is_small and not (case.evidence.is_on_windows or case.shows("subject.linux"))


def _of_room(case: Case, first: list[Remedy]) -> list[Remedy]:
    """Return the first fixes of a card that had room: on Windows, its paging file may have been full."""
    first = [] if case.is_of("applications") else first
    of_host = case.shows("subject.host_memory")
    known = case.facts.kind in _WITH_PAGING
    if known and _may_be_windows(case):
        return [*([] if of_host else first), fix("windows_paging_if", *case)]
    paging = known and case.evidence.is_on_windows
    return [*([fix("windows_paging", *case)] if paging else []), *([] if of_host else first)]


def _with_others(case: Case, order: _Order) -> _Order:
    """Return the order with other programs on the card: first where their end would do, last where it would not."""
    first, cures, last = order
    others = close_others(case.facts)
    if others.verdict in (DOES_NOT_FIT, NO_EFFECT):
        last = [others]
    if others.reason not in OTHERS_DO or any(each.code == "set_device" for each in first):
        return _Order(first, cures, last)
    # A small estimate may be all this process's own libraries.
    decides = others.label == MEASURED or ownership(case.facts).decides
    is_own = case.evidence.grows in _OWN_CAUSES and not _have_card(others, case.facts)
    is_own = is_own or (others.label == LIKELY and case.evidence.grows in _QUADRATIC)
    others = _with_other_card(others, case) if decides else others
    if decides and case.held_beside is not None:
        beside = [each for each in cures if each.code in _OF_LIBRARIES]
        return _Order([*first, *beside, others], [], last)
    if decides and not is_own and not _are_few(others, case.facts):
        keep = case.evidence.grows in _OWN_CAUSES or not _are_most(others, case.facts)
        return _Order([*first, others], cures if keep else [], last)
    return _Order(first, [*cures[:_SHOWN_CURES], others, *cures[_SHOWN_CURES:]], last)


_OF_LIBRARIES = ("tensorflow_off_card", "fewer_environments", "other_library")
"""Fixes of another library's memory in this process."""
_CARD = re.compile(r"(?:\b(?:GPU|gpu|card|device|cuda)|显卡|カード)[ #:_]{0,2}([0-7])(?![\d.])")


def _with_other_card(others: Remedy, case: Case) -> Remedy:
    """Return the fix of a card that others use, with the other card that the report names."""
    here = case.facts.device_index or 0
    named = [each for each in _CARD.findall(case.run.text.replace(case.facts.message, "")) if int(each) != here]
    if not named:
        return others
    return replace(others, paste=(*others.paste, f"export CUDA_VISIBLE_DEVICES={named[0]}  # the other card"))


def _are_few(others: Remedy, facts: Facts) -> bool:
    """Return True if other programs hold so little that a run that needs it has hardly a chance without them."""
    held = others.figures.others_bytes or 0
    return 0 < held < _FEW * (facts.total_bytes or 0)


_LARGE_PART = 8
"""Part of the card from which on a request is worth a fix of its own, beside others whose memory is estimated."""
_TIMES = 2
"""Times this process's memory from which on that of others is the whole cause."""


def _are_most(others: Remedy, facts: Facts) -> bool:
    """Return True if other programs hold so much more than this one that no fix of its own need is called for."""
    own, held = facts.process_bytes or facts.reserved_bytes, others.figures.others_bytes or 0
    is_large = (facts.requested_bytes or 0) > (facts.total_bytes or 0) / _LARGE_PART
    is_sure = others.label == MEASURED or (held > (facts.total_bytes or 0) / 2 and not is_large)
    return is_sure and own is not None and held > _TIMES * own


def _have_card(others: Remedy, facts: Facts) -> bool:
    """Return True if other programs hold most of the card, and this one hardly anything.

    A request that is made unnecessary is then not the last one. Ranks that load onto one card hold more each.
    """
    total = facts.total_bytes or 0
    return (others.figures.others_bytes or 0) > total / 2 and (facts.allocated_bytes or 0) < _HARDLY_ANY * total


_HARDLY_ANY = 0.02
"""Share of the card that a process has at its start."""


def _with_allocator_setting(case: Case, order: _Order) -> _Order:
    """Return the order with the allocator's setting: first where the cache is in pieces that would do."""
    first, cures, last = order
    segments, grows = _segments(case), case.evidence.grows
    may_be_pieces = not {"more_free_than_requested", "spills_to_host"} & set(case.facts.notes)
    if not may_be_pieces:
        return order
    if segments.code in tried_in(case.run.text):
        return _Order(first, [*cures, segments], last)
    if segments.reason in ("cache_might_do", "cache_needs_newer"):
        is_cause = cache_is_large(case.facts) and not cache_is_small(case.facts) and grows not in _OWN_CAUSES
        if not is_cause and (grows == "model" or cache_is_small(case.facts)):  # the next request fails as this one did
            return order
        holds, needs_newer = cache_holds_request(case.facts), segments.reason == "cache_needs_newer"
        place = int(holds and needs_newer and not is_cause) if is_cause or holds else _SHOWN_CURES
        place = 1 if grows in _OWN_CAUSES and place == 0 else place
        place = min(len(cures), place)
        return _Order(first, [*cures[:place], segments, *cures[place:]], last)
    return _Order(first, cures, [segments, *last]) if segments.verdict == DOES_NOT_FIT else order


def _segments(case: Case) -> Remedy:
    """Return the allocator's setting that the user's PyTorch has: Windows, and versions up to 2.0, know only one."""
    found, on_windows = expandable_segments(case.facts), case.has_sign("windows")
    if found.reason == "cache_needs_newer" and on_windows:  # expandable segments are not for Windows
        return replace(found, reason="unstated")
    if found.reason == "cache_might_do" and (on_windows or case.facts.torch_format == WITH_SPLIT_SIZE):
        return max_split_size(found)
    return found
