"""The sections of a dry run's report: the verdict, memory over time with its tensors, and the assumptions."""

from collections import Counter
from collections.abc import Mapping

from tightfit.report.bars import colour_of
from tightfit.report.sections import Page, Section, Segment, Table
from tightfit.report.tensor_texts import place_text, shape_text, source_line
from tightfit.report.timeline_chart import timeline_section
from tightfit.units import format_bytes
from tightfit.vgpu.records import Findings, VirtualCard, is_fragmented
from tightfit.wording.report import Words


def dryrun_page(found: Findings, t: Words) -> Page:
    """Lay out findings for a page or a terminal."""
    sections = [timeline_section(found, t), *_failure(found, t), _categories(found, t), _largest(found, t)]
    sections += [_phases(found, t), _remarks(found, t), _never_modelled(found, t)]
    return Page(
        title=t("dryrun", "title", gpu=found.gpu.name),
        verdict=verdict_of(found, t),
        is_bad=found.outcome != "fits",
        facts=_facts(found, t),
        sections=[section for section in sections if section is not None],
    )


_BEFORE_A_MODEL_RUNS = {"setup", "resume"}


def verdict_of(found: Findings, t: Words) -> str:
    """Return the outcome with the card, and the memory that the card has left."""
    as_played = found.outcome == "fits" and found.not_played
    verdict = t(
        "outcome",
        "fits_as_played" if as_played else found.outcome,
        card=card_text(found.gpu, t),
        device=format_bytes(found.peak.device_bytes),
        left=format_bytes(found.free_bytes),
        reason=found.stopped_because,
    )
    processes = [each.file for each in found.not_played if not each.line]
    if found.outcome == "fits" and found.caught_failures:
        verdict += t("outcome", "caught", count=found.caught_failures)
    elif found.outcome == "fits" and not found.steps and found.phases.keys() <= _BEFORE_A_MODEL_RUNS:
        verdict += t("outcome", "no_model_ran")
    return " ".join([verdict, *(t("outcome", "process_not_played", command=each) for each in processes)])


def card_text(gpu: VirtualCard, t: Words) -> str:
    """Return the card's name and memory."""
    return t(
        "outcome",
        "card_and_others" if gpu.used_by_others_bytes else "card",
        name=gpu.name,
        total=format_bytes(gpu.total_bytes),
        others=format_bytes(gpu.used_by_others_bytes),
    )


def _facts(found: Findings, t: Words) -> list[tuple[str, str, str]]:
    peak, failure = found.peak, found.failure
    in_phase = t("dryrun", "in_phase", phase=t.name("phase", peak.phase))
    facts = [
        ("device", peak.device_bytes, t("dryrun", "with_context", context=format_bytes(found.gpu.context_bytes))),
        ("requested", peak.requested_bytes, in_phase),
        ("allocated", peak.allocated_bytes, ""),
        ("reserved", peak.reserved_bytes, _cache_text(found, t)),
    ]
    if failure:
        facts += [("asked", failure.requested_bytes, ""), ("free", failure.free_bytes, "")]
    else:
        facts.append(("left", max(0, found.free_bytes), ""))
    rows = [(t("dryrun", key), format_bytes(nbytes), remark) for key, nbytes, remark in facts]
    if times := sum(each.times for each in found.made_up_values):
        mostly = t("dryrun", "mostly_at", place=place_text(found.made_up_values[0]))
        rows.append((t("dryrun", "made_up_answers"), f"{times:,}", mostly))
    return rows


def _cache_text(found: Findings, t: Words) -> str:
    """Explain a gap of more than a quarter between the highest reserved and allocated bytes."""
    cached = found.peak.reserved_bytes - found.peak.allocated_bytes
    is_large = is_fragmented(found.peak.reserved_bytes, found.peak.allocated_bytes)
    return t("dryrun", "fragments", cached=format_bytes(cached)) if is_large else ""


def _failure(found: Findings, t: Words) -> list[Section]:
    """Name the failed request and its line; the message goes to the page alone, a terminal has it in the traceback."""
    failure = found.failure
    if failure is None:
        return []
    words = t(
        "failure",
        "sentence",
        phase=t.name("phase", failure.phase),
        operator=failure.operator,
        requested=format_bytes(failure.requested_bytes),
        free=format_bytes(failure.free_bytes),
        allocated=format_bytes(failure.allocated_bytes),
        cached=format_bytes(failure.reserved_bytes - failure.allocated_bytes),
    )
    what = [shape_text(failure), t.name("category", failure.category)]
    paragraphs = [words, t("failure", "tensor", what=t("page", "separator").join(filter(None, what)))]
    if failure.file:
        paragraphs.append(t("failure", "at", place=place_text(failure)))
    return [
        Section(id="failure", title=t("failure", "title"), paragraphs=paragraphs, preformatted=source_line(failure)),
        Section(id="message", title=t("failure", "message"), preformatted=failure.message, page_only=True),
    ]


def _categories(found: Findings, t: Words) -> Section | None:
    sums = found.categories
    if not sums:
        return None
    whole = sum(sums.values())
    rows = []
    for category, nbytes in _largest_first(sums):
        phases = _largest_first(found.categories_by_phase.get(category, {}))
        made = t("page", "separator").join(f"{t.name('phase', phase)} {format_bytes(each)}" for phase, each in phases)
        rows.append([t.name("category", category), format_bytes(nbytes), f"{nbytes / whole:.1%}", made])
    most = max(sums.values())
    bars = [[Segment(0, nbytes / most, colour_of(category))] for category, nbytes in _largest_first(sums)]
    columns = [t("categories", key) for key in ("category", "bytes", "share", "made")]
    caption = t("categories", "failed" if found.failure else "peak")
    table = Table(caption=caption, columns=columns, rows=rows, bars=bars, numbers=frozenset({1, 2}))
    return Section(id="categories", title=t("categories", "title"), tables=[table])


def _largest_first(sums: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(sums.items(), key=lambda item: -item[1])


def _largest(found: Findings, t: Words) -> Section | None:
    if not found.largest:
        return None
    counts = Counter(
        (
            shape_text(each) or t("largest", "workspace"),
            format_bytes(each.bytes),
            t.name("category", each.category),
            each.operator,
            " ".join(filter(None, (place_text(each), source_line(each)))),
        )
        for each in found.largest
    )
    rows = [[f"{count} × ({row[0]})" if count > 1 else row[0], *row[1:]] for row, count in counts.items()]
    columns = [t("largest", key) for key in ("tensor", "bytes", "category", "operator", "line")]
    caption = t("largest", "failed" if found.failure else "peak")
    table = Table(caption=caption, columns=columns, rows=rows, numbers=frozenset({1}))
    return Section(id="largest", title=t("largest", "title"), tables=[table])


def _phases(found: Findings, t: Words) -> Section | None:
    if not found.phases:
        return None
    rows = [[t.name("phase", phase), format_bytes(nbytes)] for phase, nbytes in found.phases.items()]
    columns = [t("phases", "phase"), t("phases", "bytes")]
    table = Table(caption=t("phases", "caption"), columns=columns, rows=rows, numbers=frozenset({1}))
    return Section(id="phases", title=t("phases", "title"), tables=[table])


def _remarks(found: Findings, t: Words) -> Section:
    points = [t("dryrun", "ended", steps=found.steps, seconds=f"{found.seconds:.1f}")]
    points.append(t("dryrun", "because", reason=found.stopped_because))
    if found.caught_failures:
        points.append(t("dryrun", "caught", count=found.caught_failures))
    if times := sum(each.times for each in found.made_up_values):
        points.append(t("dryrun", "made_up", count=f"{times:,}", place=place_text(found.made_up_values[0])))
    points += [t("dryrun", "not_played", place=place_text(each)) for each in found.not_played if each.line]
    points += [t("dryrun", "not_written", path=path) for path in dict.fromkeys(found.not_written)]
    points += [t("dryrun", "not_modelled", what=what) for what in found.not_modelled]
    points += found.notes
    return Section(id="remarks", title=t("dryrun", "remarks"), points=points)


def _never_modelled(found: Findings, t: Words) -> Section:
    return Section(id="never", title=t("dryrun", "never_modelled"), points=found.never_modelled, page_only=True)
