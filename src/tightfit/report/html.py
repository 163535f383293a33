"""Reports as self-contained HTML: of a training run, a dry run, a plan, or an explanation."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightfit.errors import DataError
from tightfit.report.dryrun_page import dryrun_page, timeline_section
from tightfit.report.page import Page, Section, render, write
from tightfit.report.run_page import alternatives_section, plain, run_page, text
from tightfit.report.runs import alternatives, is_finite, predicted_bytes, read_run
from tightfit.report.words import Words, words
from tightfit.units import format_bytes

_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What data of another shape, or from another program, ends in."""

__all__ = ["findings_report", "plan_report", "run_report", "text_report", "write"]


def run_report(
    out_dir: str | os.PathLike[str],
    *,
    lang: str = "en",
    plan: Mapping[str, Any] | None = None,
    findings: Mapping[str, Any] | None = None,
) -> str:
    """The report of the training run in `out_dir`, as HTML.

    `plan` is used instead of the folder's plan.json: `alternatives`, a list of rows of name, keys, peak_bytes, step_s,
    fits and exact, and `predicted_peak_bytes`. `findings` of a dry run with a timeline add what was predicted in time.
    DataError for a folder without metrics, ConfigError for another language.
    """
    said = words(lang)
    timeline = _timeline(findings, lang) if findings else None
    return render(run_page(read_run(Path(out_dir), plan), said, [timeline] if timeline else []), lang=lang)


def findings_report(findings: Mapping[str, Any], *, lang: str = "en") -> str:
    """The report of a dry run (see `tightfit.vgpu.findings`), as HTML; with `timeline` in it, the chart of that."""
    said = words(lang)
    try:
        return render(dryrun_page(findings, said), lang=lang)
    except _MALFORMED as error:
        raise DataError(f"these are no findings of a dry run: {_what_is_wrong(error)}") from error


def plan_report(plan: Mapping[str, Any], *, lang: str = "en", findings: Mapping[str, Any] | None = None) -> str:
    """A plan as `plan --json` prints it: its `best`, `alternatives`, `budget` and `notes`.

    `findings` of a dry run with a timeline add memory over time.
    """
    said = words(lang)
    notes = plan.get("notes")
    points = [text(note) for note in notes] if isinstance(notes, list) else []
    sections = [
        _timeline(findings, lang) if findings else None,
        alternatives_section(alternatives(plan), said),
        Section(id="remarks", title=said("remarks", "title"), points=points) if points else None,
    ]
    page = Page(title=said("plan", "page"), facts=_plan_facts(plan, said), sections=[each for each in sections if each])
    return render(page, lang=lang)


def _plan_facts(plan: Mapping[str, Any], said: Words) -> list[tuple[str, str, str]]:
    facts = []
    if peak := predicted_bytes(plan):
        facts.append((said("run", "predicted"), format_bytes(peak), ""))
    budget, best = plan.get("budget"), plan.get("best")
    if isinstance(budget, Mapping) and is_finite(room := budget.get("bytes")):
        facts.append((said("plan", "budget"), format_bytes(room), text(plan.get("device", ""))))
    chosen = best if isinstance(best, Mapping) else plan
    if isinstance(keys := chosen.get("keys"), Mapping) and keys:
        facts.append((said("plan", "chosen"), text(chosen.get("name", "")), plain(keys)))
    return facts


def text_report(title: str, body: str, *, lang: str = "en", findings: Mapping[str, Any] | None = None) -> str:
    """Text made elsewhere, such as an explanation, with the memory over time of the findings that it rests on."""
    said = words(lang)
    sections = [Section(id="text", title=said("text", "title"), preformatted=body)]
    timeline = _timeline(findings, lang) if findings else None
    return render(Page(title=title, sections=[*sections, *([timeline] if timeline else [])]), lang=lang)


def _timeline(findings: Mapping[str, Any], lang: str) -> Section | None:
    try:
        return timeline_section(findings, words(lang))
    except _MALFORMED as error:
        raise DataError(f"these are no findings of a dry run: {_what_is_wrong(error)}") from error


def _what_is_wrong(error: Exception) -> str:
    return f"there is no {error} in them" if isinstance(error, KeyError) else str(error)
