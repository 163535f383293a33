"""Plans, dry runs and explanations where a person works in Python: as one line, as text, as a table in a notebook."""

from collections.abc import Iterator

from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.statements import Sentences, expected_lines, problem_lines
from tightfit.planner.planning import PlanResult
from tightfit.planner.sentences import device_name, in_words
from tightfit.report.bars import ALARM, CACHE, OTHERS, OUTSIDE, Part, colour_of, parts_table
from tightfit.report.dryrun_page import dryrun_page, verdict_of
from tightfit.report.explanation_page import explanation_page
from tightfit.report.page import fragment
from tightfit.report.plan_page import plan_page
from tightfit.report.sections import Page, Section
from tightfit.report.tensor_texts import place_text
from tightfit.report.terminal import page_text
from tightfit.units import format_bytes
from tightfit.vgpu.records import Findings
from tightfit.wording import chosen_language
from tightfit.wording.diagnosis import words as told_in
from tightfit.wording.report import Words, words

_OPEN = frozenset({"failure", "shortage", "chosen", "memory", "problem", "cause", "fixes"})
"""Sections that a notebook shows unfolded."""


def line(record: object) -> str:
    """Name the verdict, the peak and its place, in one line."""
    t = words(_language(record))
    match record:
        case Findings():
            said = _findings_line(record, t)
        case PlanResult():
            said = _plan_line(record, t)
        case Explanation():
            said = _explanation_line(record)
        case _:
            raise TypeError(f"no line for {type(record).__name__}")
    shown = "".join(each for each in " ".join(said.split()) if each.isprintable())
    return f"<{type(record).__name__}: {shown}>"


def text(record: object) -> str:
    """Return the text that the command prints."""
    return page_text(_page(record))


def html(record: object) -> str:
    """Return the record as HTML for a notebook: verdict, memory by category, and the rest folded away."""
    page = _page(record)
    sections = [each for each in page.sections if not each.page_only]
    if isinstance(record, Findings):
        sections[:0] = [*_card_memory(record, words(_language(record)))]
    return fragment(page, sections, unfolded=_OPEN, lang=_language(record))


def _language(record: object) -> str:
    return record.language if isinstance(record, Explanation) else chosen_language(None)


def _page(record: object) -> Page:
    t = words(_language(record))
    match record:
        case Findings():
            return dryrun_page(record, t)
        case PlanResult():
            return plan_page(record, t)
        case Explanation():
            return explanation_page(record, t)
        case _:
            raise TypeError(f"no page for {type(record).__name__}")


def _findings_line(found: Findings, t: Words) -> str:
    failure, verdict = found.failure, verdict_of(found, t)
    if failure is None:
        return t("line", "peak", verdict=verdict, phase=t.name("phase", found.peak.phase))
    return t(
        "line",
        "failed_at" if failure.file else "failed",
        verdict=verdict,
        phase=t.name("phase", failure.phase),
        requested=format_bytes(failure.requested_bytes),
        free=format_bytes(failure.free_bytes),
        place=place_text(failure),
    )


def _plan_line(result: PlanResult, t: Words) -> str:
    best, least, budget = result.choice.best, result.choice.least, format_bytes(result.where.budget.bytes)
    if best:
        return t(
            "line",
            "plan",
            plan=in_words(best, result.choice.share),
            peak=format_bytes(best.peak_bytes),
            budget=budget,
            device=device_name(result),
            phase=t.name("phase", best.phase),
        )
    needs = format_bytes(least.peak_bytes) if least else "?"
    return t("line", "no_plan", device=device_name(result), least=needs, budget=budget)


def _explanation_line(found: Explanation) -> str:
    said = told_in(found.language)
    if found.facts is None:
        return explanation_page(found, words(found.language)).verdict
    return f"{next(problem_lines(found, said))} {next(expected_lines(found, Sentences(found, said), said))}"


def _card_memory(found: Findings, t: Words) -> Iterator[Section]:
    """Show the whole card at the peak, or at the failure with the request that did not fit."""
    if found.categories:
        title = t("notebook", "failed" if found.failure else "peak")
        table = parts_table(title, [*_parts(found, t)], found.gpu.total_bytes, t)
        yield Section(id="memory", title=title, tables=[table])


def _parts(found: Findings, t: Words) -> Iterator[Part]:
    failure = found.failure
    reserved = failure.reserved_bytes if failure else found.peak.reserved_bytes
    yield Part(t("bars", "others"), found.gpu.used_by_others_bytes, OTHERS)
    yield Part(t("bars", "outside"), found.gpu.context_bytes, OUTSIDE)
    for name, nbytes in sorted(found.categories.items(), key=lambda item: -item[1]):
        yield Part(t.name("category", name), nbytes, colour_of(name))
    yield Part(t("bars", "cache"), reserved - sum(found.categories.values()), CACHE)
    if failure:
        yield Part(t("bars", "request"), failure.requested_bytes, ALARM)
