"""Reports as self-contained HTML: of a training run, a dry run, or an explanation."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.report.dryrun_page import dryrun_page
from tightfit.report.page import render
from tightfit.report.run_page import run_page
from tightfit.report.runs import read_run
from tightfit.report.timeline_chart import timeline_section
from tightfit.vgpu.records import Findings
from tightfit.wording.report import words

if TYPE_CHECKING:
    from tightfit.diagnosis.explanation import Explanation


def run_report(
    out_dir: str | os.PathLike[str],
    *,
    lang: str = "en",
    plan: Mapping[str, Any] | None = None,
    findings: Findings | None = None,
    config: Mapping[str, Any] | None = None,
) -> str:
    """Lay out the training run in `out_dir` as HTML.

    `plan` is used instead of the folder's plan.json: `alternatives`, a list of rows of name, keys, peak_bytes, step_s,
    fits and exact, and `predicted_peak_bytes`. `findings` of a dry run with a timeline add what was predicted in time.
    `config` is shown where the folder has none, as that of a run without a checkpoint.
    DataError for a folder without metrics, ConfigError for another language.
    """
    said = words(lang)
    timeline = timeline_section(findings, words(lang)) if findings else None
    return render(run_page(read_run(Path(out_dir), plan, config), said, [timeline] if timeline else []), lang=lang)


def findings_report(findings: Findings, *, lang: str = "en") -> str:
    """Lay out a dry run as HTML, with a chart of its `timeline` if it has one."""
    return render(dryrun_page(findings, words(lang)), lang=lang)


def explanation_report(found: "Explanation") -> str:
    """Lay out an explanation as HTML in its own language."""
    from tightfit.report.explanation_page import explanation_page

    return render(explanation_page(found, words(found.language)), lang=found.language)
