"""`tightfit check`: scripts of a TOML file against their baselines, as text, JUnit XML and Markdown."""

import json
import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from runs import here

from tightfit.questions.baseline import read_lock
from tightfit.questions.check import read_scripts

ROOT = Path(__file__).parents[1]
LIST = """\
[step]
command = "step.py --rows=4096"
gpu = "RTX 3060 12GB"
peak = "200 MiB"
"""
SCRIPT = """\
import sys, torch
kept = torch.ones(int(sys.argv[1].partition("=")[2]), 1024, device="cuda")
"""


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "memory.toml").write_text(LIST)
    (tmp_path / "step.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_growth_is_told_in_all_forms(folder: Path) -> None:
    assert here(["check", "--update"]).code == 0
    entry = read_lock(folder / "memory.lock.toml")["step"]
    assert entry.categories == {"other": 4096 * 1024 * 4}
    assert here(["check"]).code == 0
    (folder / "memory.toml").write_text(LIST.replace("4096", "8192"))
    done = here(["check", "--junit", "memory.xml", "--summary", "memory.md"])
    assert done.code == 1
    assert "Memory: 1 of 1 script failed" in done.out
    [case] = ElementTree.parse(folder / "memory.xml").getroot()
    assert case.attrib["name"] == "step"
    failure = case.find("failure")
    assert failure is not None
    assert failure.text is not None
    assert "other, 8192 × 1024 float32: 0 bytes before, 32.00 MiB now, at step.py:2: kept = torch.ones" in failure.text
    summary = (folder / "memory.md").read_text()
    assert "| step | GeForce RTX 3060 12GB | 83.58 MiB | 83.58 MiB |" not in summary
    assert "| FAILS |" in summary
    report = json.loads(here(["check", "--json"]).out)
    assert report["scripts"][0]["problems"][0].startswith("memory grew: the peak was")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "lists no script"),
        ("[a]\ncommand = 'a.py'\n", "missing required field `gpu`"),
        ("[a]\ncommand = 'a.py'\ngpu = 'A100'\npaek = '1GiB'\n", "unknown field `paek`"),
        ("[a\n", "is no list of scripts"),
        ("[a]\ncommand = 'absent.py'\ngpu = 'A100'\n", "absent.py"),
        ("[a]\ncommand = 'step.py'\ngpu = 'A9999'\n", "A9999"),
        ("[a]\ncommand = 'step.py'\ngpu = 'A100'\nused = 'x'\n", "is not a size"),
    ],
)
def test_a_mistake_is_one_sentence(text: str, says: str, folder: Path) -> None:
    (folder / "memory.toml").write_text(text)
    done = here(["check"])
    assert done.code == 2
    assert says in done.err
    assert done.err.count("\n") == 1


class TestThisRepository:
    def test_every_script_has_a_baseline(self) -> None:
        scripts, lock = read_scripts(ROOT / "memory.toml"), read_lock(ROOT / "memory.lock.toml")
        assert scripts.keys() == lock.keys()
        assert all((ROOT / each.command.split()[0]).is_file() for each in scripts.values())

    def test_the_action_runs_a_command_that_exists(self, folder: Path) -> None:
        steps = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"]
        assert "tightfit check" in steps[-1]["run"]
        words = steps[-1]["run"].replace("tightfit check", "").strip()
        env = {**os.environ, "FILE": "memory.toml", "GITHUB_STEP_SUMMARY": "summary.md"}
        shown = subprocess.run(
            ["sh", "-c", f"printf '%s\\n' {words}"], env=env, capture_output=True, text=True, check=True
        )
        assert here(["check", *shown.stdout.split()]).code == 0
        assert (folder / "memory.xml").exists()
        assert (folder / "summary.md").exists()
