"""Logs of many programs: how each ended, what is said of it in both languages, and what is never said."""

import functools
import tomllib
from pathlib import Path

import msgspec
import pytest

from tightfit.diagnosis.explaining import explain
from tightfit.diagnosis.explanation import ExplanationJson
from tightfit.diagnosis.render import render
from tightfit.report.html import explanation_report
from tightfit.wording.diagnosis import words

FIGURES = ("requested_bytes", "free_bytes", "total_bytes", "process_bytes", "device_index")


class Case(msgspec.Struct, kw_only=True):
    name: str
    log: str
    status: str
    kind: str | None = None
    phase: str | None = None
    figures: dict[str, int | str] = {}
    first_cause: str | None = None
    first_fix: str | None = None
    never_causes: list[str] = []
    says: list[str] = []
    says_ja: list[str] = []
    says_in_both: list[str] = []
    never: list[str] = []
    never_ja: list[str] = []
    never_in_both: list[str] = []


CASES = msgspec.convert(
    tomllib.loads((Path(__file__).parent / "explain_cases" / "kinds.toml").read_text(encoding="utf-8"))["case"],
    list[Case],
)
DENIALS = {
    "en": ["Nothing failed", "no failure", "not about memory"],
    "ja": ["失敗はありません", "見つかりません。実行が"],
}


@functools.cache
def explained(log: str, language: str) -> tuple[str, ExplanationJson]:
    found = explain(log, lang=language)
    return " ".join(render(found, words(language)).split()), found.to_json()


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_said(case: Case, language: str):
    text, _ = explained(case.log, language)
    squeezed = text.replace(" ", "")
    japanese = language == "ja"
    for words_there in [*(case.says_ja if japanese else case.says), *case.says_in_both]:
        assert words_there.replace(" ", "") in squeezed, text
    denials = [] if case.status == "harmless" else DENIALS[language]
    for words_never in [*(case.never_ja if japanese else case.never), *case.never_in_both, *denials]:
        assert words_never.replace(" ", "").lower() not in squeezed.lower(), text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_status_kind_and_figures(case: Case):
    _, found = explained(case.log, "en")
    assert found.status == case.status
    assert case.kind is None or found.kind == case.kind
    assert case.phase is None or found.phase == case.phase
    for name, value in case.figures.items():
        assert name in FIGURES
        assert getattr(found, name) == (None if value == "none" else value), name
    codes = [cause.code for cause in found.causes]
    assert case.first_cause is None or codes[0] == case.first_cause, codes
    assert not set(codes) & set(case.never_causes)
    assert case.first_fix is None or found.remedies[0].code == case.first_fix


ESCAPES = "\x1b[31m\x1b]0;owned\x07\x9b2J\u202e"


@pytest.mark.parametrize(
    "log",
    [
        f"RuntimeError: CUDA OOM: {ESCAPES}<b>lower</b> the batch",
        f"KeyError: '{ESCAPES}<b>x</b>'",
        f"WARNING {ESCAPES}<b>CUDA</b> OutOfMemoryError in TaskAlignedAssigner, using CPU",
        f"mylib.ArenaError: could not allocate {ESCAPES}<b>workspace</b>",
    ],
)
def test_a_logs_own_words_bring_no_control_codes_and_no_tags(log: str):
    found = explain(log)
    text = render(found, words("en"), verbose=True)
    assert not any((ord(each) < 32 and each != "\n") or each in "\x7f\x9b\u202e" for each in text)
    assert "<b>" not in explanation_report(found)
