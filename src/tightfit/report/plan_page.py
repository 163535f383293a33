"""The sections of a plan's page: what was chosen, its memory at the peak, the alternatives, what was remarked."""

from collections.abc import Iterator, Mapping
from typing import Any

from tightfit.report.bars import CACHE, MARGIN, OTHERS, OUTSIDE, Part, colour_of, parts_table
from tightfit.report.run_page import alternatives_section, plain, text
from tightfit.report.runs import alternatives, is_finite, predicted_bytes
from tightfit.report.sections import Page, Section
from tightfit.units import format_bytes
from tightfit.wording.report import Words


def plan_page(plan: Mapping[str, Any], t: Words, timeline: Section | None = None) -> Page:
    """A plan as `plan --json` prints it, as far as it has its keys."""
    notes = plan.get("notes")
    points = [text(note) for note in notes] if isinstance(notes, list) else []
    budget = plan.get("budget")
    room = budget.get("bytes") if isinstance(budget, Mapping) else None
    sections = [
        _memory(plan, t),
        timeline,
        alternatives_section(alternatives(plan), t, budget_bytes=room if is_finite(room) else None),
        Section(id="remarks", title=t("remarks", "title"), points=points) if points else None,
    ]
    return Page(title=t("plan", "page"), facts=_facts(plan, t), sections=[each for each in sections if each])


def _facts(plan: Mapping[str, Any], t: Words) -> list[tuple[str, str, str]]:
    facts = []
    if peak := predicted_bytes(plan):
        facts.append((t("run", "predicted"), format_bytes(peak), ""))
    budget, best = plan.get("budget"), plan.get("best")
    if isinstance(budget, Mapping) and is_finite(room := budget.get("bytes")):
        facts.append((t("plan", "budget"), format_bytes(room), text(plan.get("device", ""))))
    chosen = best if isinstance(best, Mapping) else plan
    if isinstance(keys := chosen.get("keys"), Mapping) and keys:
        facts.append((t("plan", "chosen"), text(chosen.get("name", "")), plain(keys)))
    return facts


def _memory(plan: Mapping[str, Any], t: Words) -> Section | None:
    """The whole card when the chosen plan is at its peak; None for a plan that does not say it all."""
    budget, best = plan.get("budget"), plan.get("best")
    if not isinstance(budget, Mapping) or not isinstance(best, Mapping):
        return None
    total, categories = budget.get("total_bytes"), best.get("categories")
    if not is_finite(total) or total <= 0 or not isinstance(categories, Mapping):
        return None
    title = t("plan", "memory")
    return Section(id="memory", title=title, tables=[parts_table(title, [*_parts(budget, best, t)], int(total), t)])


def _parts(budget: Mapping[str, Any], best: Mapping[str, Any], t: Words) -> Iterator[Part]:
    sizes = {name: int(size) for name, size in best["categories"].items() if is_finite(size)}
    peak = best.get("peak_bytes")
    cache = int(peak) - sum(sizes.values()) if is_finite(peak) else 0

    def of_budget(key: str) -> int:
        value = budget.get(key)
        return int(value) if is_finite(value) else 0

    yield Part(t("bars", "others"), of_budget("used_by_others_bytes"), OTHERS)
    yield Part(t("bars", "outside"), of_budget("context_bytes") + of_budget("reserved_bytes"), OUTSIDE)
    for name, nbytes in sorted(sizes.items(), key=lambda item: -item[1]):
        yield Part(t.name("category", name), nbytes, colour_of(name))
    yield Part(t("bars", "cache"), cache, CACHE)
    yield Part(t("bars", "margin"), of_budget("margin_bytes"), MARGIN)
