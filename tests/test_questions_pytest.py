"""The pytest plugin, in a project of its own: a kept tensor is found by its line, and torch stays as it is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace
from runs import environment

from tightfit.questions.baseline import Entry, KeptTensor, difference, in_words, read_lock, write_lock

ROOT = Path(__file__).parents[1]
PROJECT = """\
import torch
from torch import nn

kept = []


def train(width=256):
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        y = model(torch.randn(4096, width, device="cuda"))
        y.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
"""
TESTS = """\
import pytest
import torch
from project import train

BEFORE = torch.empty, torch.nn.Module.cuda, torch.cuda.is_available()


@pytest.mark.memory(gpu="RTX 3060 12GB", peak="1 GiB")
def test_train():
    train()


@pytest.mark.memory(gpu="RTX 3060 12GB", peak="1 MiB")
def test_limit():
    train()


def test_by_fixture(virtual_gpu, tmp_path):
    found = virtual_gpu("RTX 3060 12GB").play(train, 128)
    assert found.outcome == "fits"
    assert found.peak.allocated_bytes > 0


def test_torch_is_as_it_was():
    assert BEFORE == (torch.empty, torch.nn.Module.cuda, torch.cuda.is_available())
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has tightfit installed."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "project.py").write_text(PROJECT)
    (folder / "test_memory.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -q -p no:cacheprovider\n")
    installed = folder / "site" / "tightfit_plugin-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tightfit-plugin\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[pytest11]\ntightfit = tightfit.questions.pytest_plugin\n")
    return folder


def run(project: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    paths = os.pathsep.join([str(project / "site"), str(ROOT / "src")])
    env = {**environment(), "PYTHONPATH": paths, "LC_ALL": "C.UTF-8", "XDG_CACHE_HOME": str(project / "cache")}
    command = [sys.executable, "-m", "pytest", *words]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False)


def test_the_entry_point_is_the_plugin() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"tightfit": "tightfit.questions.pytest_plugin"}


class TestPlugin:
    def test_a_baseline_is_written_and_a_kept_tensor_is_found_by_its_line(self, project: Path) -> None:
        first = run(project, "--memory-update")
        assert "3 passed, 1 failed" in first.stdout or "1 failed, 3 passed" in first.stdout, first.stdout
        assert "above its limit of 1.00 MiB" in first.stdout
        assert "3 memory baselines written" in first.stdout
        lock = project / "memory.lock.toml"
        entries = read_lock(lock)
        assert list(entries) == sorted(entries)
        before = entries["test_memory.py::test_train"]
        assert before.tensors[0].place.startswith("project.py:")
        changed = PROJECT.replace("        y.mean()", "        kept.append(y.detach())\n        y.mean()")
        (project / "project.py").write_text("# a line that moves the others\n" + changed)
        again = run(project, "-k", "test_train")
        (project / "project.py").write_text(PROJECT)
        assert again.returncode == 1
        assert re.search(r"memory grew: the peak was [\d.]+ MiB and is [\d.]+ MiB", again.stdout), again.stdout
        assert re.search(r"6 × \(4096 × 256 float32\): \d.* at project.py:12: y = model\(torch.randn", again.stdout), (
            again.stdout
        )
        assert read_lock(lock) == entries, "only --memory-update writes"

    def test_without_the_plugin_nothing_is_left_of_it(self, project: Path) -> None:
        done = run(project, "-p", "no:tightfit", "--markers")
        assert done.returncode == 0
        assert "memory(" not in done.stdout
        assert run(project, "-p", "no:tightfit", "--memory-update").returncode == 4


class TestLock:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        entry = entry_with(KeptTensor(bytes=8, count=1, category="logits", shape="2", place="a.py:1", source='"\\x"'))
        write_lock(tmp_path / "memory.lock.toml", {"b[x-\"é'\\n]": entry, "a": entry})
        assert read_lock(tmp_path / "memory.lock.toml") == {"a": entry, "b[x-\"é'\\n]": entry}

    def test_a_line_that_only_moved_is_no_difference(self) -> None:
        one, other = (
            entry_with(KeptTensor(bytes=8, count=1, category="logits", shape="2", place=place, source="y"))
            for place in ("a.py:1", "a.py:9")
        )
        assert difference(one, other).tensors == []

    def test_another_torch_is_named(self) -> None:
        entry = entry_with()
        other = replace(entry, torch="2.14", peak="", peak_bytes=20, allocated_bytes=9, categories={"logits": 9})
        said = in_words(difference(entry, other))
        assert said[1] == "  the baseline is of torch 2.13, this run of torch 2.14"
        assert said[2] == "  logits: 8 bytes before, 9 bytes now"


def entry_with(*tensors: KeptTensor) -> Entry:
    return Entry(
        gpu="A",
        torch="2.13",
        peak="10 bytes",
        peak_bytes=10,
        allocated_bytes=8,
        phase="eval",
        categories={"logits": 8},
        tensors=list(tensors),
    )
