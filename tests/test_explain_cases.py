"""Explanations of small logs without a configuration: what must be said, and what must never be, in both languages.

Each TOML file in explain_cases/ holds cases: `file` beside it, or the text itself as `log`; `says` and `never` are
parts of the explanation in English, `says_ja` and `never_ja` in Japanese, white space apart. `culprit` is the kind of
tensor that is named, or "" for none; `first` the code of the first cause; `fixes` the first fixes that are shown.
"""

import tomllib
from pathlib import Path

import pytest

from tightfit.diagnosis.explaining import explain
from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.plays import Plays
from tightfit.diagnosis.render import render, shown_remedies
from tightfit.wording.diagnosis import words

FOLDER = Path(__file__).parent / "explain_cases"
CASES = [case for file in sorted(FOLDER.glob("*.toml")) for case in tomllib.loads(file.read_text())["case"]]
KEYS = {
    *("name", "log", "file", "kind", "status", "phase", "culprit", "first", "fixes", "never_fixes"),
    *("says", "says_ja", "says_in_both", "never", "never_ja", "never_in_both"),
    *("figures", "first_cause", "never_causes", "first_fix"),  # of test_oomlog_cases.py
}
FIXES = 5
"""Fixes that are shown at most."""


@pytest.fixture(autouse=True)
def nothing_is_played(monkeypatch: pytest.MonkeyPatch):
    """None of these logs has a configuration of nanoGPT's: playing its defaults would be about another run."""
    monkeypatch.setattr(Plays, "play", lambda plays, stage: pytest.fail("a stranger's run was played"))


def plain(text: str) -> str:
    return "".join(text.split()).lower()


def text_of(case: dict) -> str:
    return case["log"] if "log" in case else (FOLDER / case["file"]).read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_what_is_said_and_concluded(case: dict):
    assert case.keys() <= KEYS, case.keys() - KEYS
    found = explain(text_of(case))
    check_what_is_said(case, found, "en")
    check_what_is_said(case, found, "ja")
    check_what_is_concluded(case, found)


def check_what_is_said(case: dict, found: Explanation, language: str) -> None:
    printed = render(found, words(language))
    text = plain(printed)
    in_full = text + plain(render(found, words(language), verbose=True))
    suffix = "" if language == "en" else "_ja"
    for said in case.get("says" + suffix, []):
        assert plain(said) in text, (language, said)
    for unsaid in case.get("never" + suffix, []):
        assert plain(unsaid) not in in_full, (language, unsaid)
    for both in case.get("says_in_both", []):
        assert plain(both) in text, (language, both)
    for neither in case.get("never_in_both", []):
        assert plain(neither) not in in_full, (language, neither)
    assert "{" not in printed.replace("{'", "").replace('{"', ""), language


def check_what_is_concluded(case: dict, found: Explanation) -> None:
    if found.facts is not None and found.facts.kind.endswith("out_of_memory"):
        assert len(shown_remedies(found)) <= FIXES
    if "culprit" in case:
        assert (found.culprit.tensor if found.culprit else "") == case["culprit"]
    if "kind" in case:
        assert (found.facts.kind if found.facts else "") == case["kind"]
    if "phase" in case:
        assert (found.facts.phase if found.facts else "") == case["phase"]
    if "status" in case:
        assert found.to_json().status == case["status"]
    if "first" in case:
        assert found.causes[0].code == case["first"]
    if "fixes" in case:
        assert [each.code for each in shown_remedies(found)][: len(case["fixes"])] == case["fixes"]
    assert not set(case.get("never_fixes", [])) & {
        each.code for each in found.remedies if each.verdict in ("unchecked", "fits")
    }
