"""The sections of a dry run's report: the verdict, memory over time with its tensors, and the assumptions."""

from tightfit.report.page import Page, Section, Table
from tightfit.report.tensor_texts import place_text, shape_text, source_line
from tightfit.report.timeline_chart import timeline_section
from tightfit.units import format_bytes
from tightfit.vgpu.records import Findings
from tightfit.wording.report import Words


def dryrun_page(found: Findings, t: Words) -> Page:
    """Lay out findings as a page."""
    gpu, fits = found.gpu, found.outcome == "fits"
    sections = [timeline_section(found, t), _failure(found, t), _categories(found, t), _largest(found, t)]
    sections += [_phases(found, t), _remarks(found, t)]
    return Page(
        title=t("dryrun", "title", gpu=gpu.name),
        verdict=t("outcome", "fits_as_played" if found.not_played and fits else found.outcome),
        is_bad=not fits,
        facts=_facts(found, t),
        sections=[section for section in sections if section is not None],
    )


def _facts(found: Findings, t: Words) -> list[tuple[str, str, str]]:
    gpu, peak = found.gpu, found.peak
    in_phase = t("dryrun", "in_phase", phase=t.name("phase", peak.phase))
    facts = [
        (t("dryrun", "card"), format_bytes(gpu.total_bytes), gpu.name),
        (t("dryrun", "others"), format_bytes(gpu.used_by_others_bytes), ""),
        (t("dryrun", "device"), format_bytes(peak.device_bytes), t("dryrun", "with_context")),
        (t("dryrun", "allocated"), format_bytes(peak.allocated_bytes), in_phase),
        (t("dryrun", "reserved"), format_bytes(peak.reserved_bytes), ""),
    ]
    if found.failure:
        facts.append((t("dryrun", "asked"), format_bytes(found.failure.requested_bytes), ""))
        facts.append((t("dryrun", "free"), format_bytes(found.failure.free_bytes), ""))
    else:
        facts.append((t("dryrun", "left"), format_bytes(max(0, found.free_bytes)), ""))
    return facts


def _failure(found: Findings, t: Words) -> Section | None:
    failure = found.failure
    if not failure:
        return None
    said = t(
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
    lines = [place_text(failure), source_line(failure), "", failure.message]
    return Section(
        id="failure",
        title=t("failure", "title"),
        paragraphs=[said, t("failure", "tensor", what=t("page", "separator").join(filter(None, what)))],
        preformatted="\n".join(lines).strip(),
    )


def _categories(found: Findings, t: Words) -> Section | None:
    sums = found.categories
    if not sums:
        return None
    whole = sum(sums.values())
    rows = []
    for category, nbytes in sorted(sums.items(), key=lambda item: -item[1]):
        phases = sorted(found.categories_by_phase.get(category, {}).items(), key=lambda item: -item[1])
        made = t("page", "separator").join(f"{t.name('phase', phase)} {format_bytes(each)}" for phase, each in phases)
        rows.append([t.name("category", category), format_bytes(nbytes), f"{nbytes / whole:.1%}", made])
    columns = [t("categories", key) for key in ("category", "bytes", "share", "made")]
    caption = t("categories", "failed" if found.failure else "peak")
    table = Table(caption=caption, columns=columns, rows=rows, numbers=frozenset({1, 2}))
    return Section(id="categories", title=t("categories", "title"), tables=[table])


def _largest(found: Findings, t: Words) -> Section | None:
    if not found.largest:
        return None
    rows = [
        [
            shape_text(each) or t("largest", "workspace"),
            format_bytes(each.bytes),
            t.name("category", each.category),
            each.operator,
            " ".join(filter(None, (place_text(each), source_line(each)))),
        ]
        for each in found.largest
    ]
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
    points += [t("dryrun", "not_played", place=place_text(each)) for each in found.not_played]
    points += [t("dryrun", "not_written", path=path) for path in dict.fromkeys(found.not_written)]
    points += [t("dryrun", "not_modelled", what=what) for what in found.not_modelled]
    points += [t("dryrun", "never_modelled", what=what) for what in found.never_modelled]
    points += found.notes
    return Section(id="remarks", title=t("dryrun", "remarks"), points=points)
