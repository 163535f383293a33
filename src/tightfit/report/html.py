"""Reports as self-contained HTML: of a training run, a dry run, a plan, or an explanation."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.errors import DataError
from tightfit.report.dryrun_page import dryrun_page, timeline_section
from tightfit.report.page import check_folder, render, write
from tightfit.report.plan_page import plan_page
from tightfit.report.run_page import run_page
from tightfit.report.runs import read_run
from tightfit.report.sections import Section
from tightfit.wording.report import words

if TYPE_CHECKING:
    from tightfit.diagnosis.explanation import Explanation

_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What data of another shape, or from another program, ends in."""

__all__ = ["check_folder", "explanation_report", "findings_report", "plan_report", "run_report", "write"]


def run_report(
    out_dir: str | os.PathLike[str],
    *,
    lang: str = "en",
    plan: Mapping[str, Any] | None = None,
    findings: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> str:
    """The report of the training run in `out_dir`, as HTML.

    `plan` is used instead of the folder's plan.json: `alternatives`, a list of rows of name, keys, peak_bytes, step_s,
    fits and exact, and `predicted_peak_bytes`. `findings` of a dry run with a timeline add what was predicted in time.
    `config` is shown where the folder has none, as that of a run without a checkpoint.
    DataError for a folder without metrics, ConfigError for another language.
    """
    said = words(lang)
    timeline = _timeline(findings, lang) if findings else None
    return render(run_page(read_run(Path(out_dir), plan, config), said, [timeline] if timeline else []), lang=lang)


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
    return render(plan_page(plan, words(lang), _timeline(findings, lang) if findings else None), lang=lang)


def explanation_report(found: "Explanation") -> str:
    """What `tightfit explain` found, as HTML in the language of the explanation."""
    from tightfit.report.explanation_page import explanation_page

    return render(explanation_page(found, words(found.language)), lang=found.language)


def _timeline(findings: Mapping[str, Any], lang: str) -> Section | None:
    try:
        return timeline_section(findings, words(lang))
    except _MALFORMED as error:
        raise DataError(f"these are no findings of a dry run: {_what_is_wrong(error)}") from error


def _what_is_wrong(error: Exception) -> str:
    return f"there is no {error} in them" if isinstance(error, KeyError) else str(error)
