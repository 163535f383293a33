"""`tightfit cache`: what it counts, what it deletes, and what it leaves alone."""

import json
import os
from pathlib import Path

import msgspec
import pytest
from runs import here

from tightfit.simulation import cache
from tightfit.simulation.requests import HostRates, HostRequest

RATES = HostRates(flops={"float32": 1e11}, bandwidth=1e10, base_bytes={"resident": 1})
STRANGER = "0" * 31 + ".json"
"""Not the name of an answer."""


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two answers, a part that a killed process left, a lock, and a file of somebody else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for processor in ("one", "another"):
        cache.remember(HostRequest(processor=processor), RATES)
    folder = tmp_path / "tightfit" / "answers"
    first = min(folder.iterdir())
    (folder / f".{first.name}.17.23.writing").write_bytes(b"12345")
    (folder / STRANGER).write_text("not ours")
    (folder.parent / "lock").touch()
    return folder


def of_answers(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.name != STRANGER)


def test_it_shows_where_and_how_much(answers: Path) -> None:
    done = here(["cache"])
    assert (done.code, done.err) == (0, "")
    assert done.out == f"3 simulations stored, {of_answers(answers)} bytes of at most 256.00 MiB\n{answers}\n"
    japanese = here(["cache", "--lang=ja"]).out
    assert "シミュレーション結果: 3 件" in japanese
    assert str(answers) in japanese


def test_clear_deletes_answers_and_nothing_else(answers: Path) -> None:
    size = of_answers(answers)
    done = here(["cache", "clear"])
    assert done.out == f"3 simulations deleted, {size} bytes freed in {answers}\n"
    assert [file.name for file in answers.iterdir()] == [STRANGER]
    assert (answers.parent / "lock").exists()
    assert here(["cache", "clear"]).out.startswith("0 simulations deleted")


def test_a_process_in_the_middle_of_an_answer_goes_on(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = HostRequest(processor="third")
    real = os.replace

    def cleared_just_before(part: Path, path: Path) -> None:
        assert here(["cache", "clear"]).code == 0
        real(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cleared_just_before)
        cache.remember(question, RATES)
    assert cache.recall(question) is None
    cache.remember(question, RATES)
    assert cache.recall(question) == RATES


def test_json_holds_the_record(answers: Path) -> None:
    size = of_answers(answers)
    state = msgspec.json.decode(here(["cache", "--json"]).out, type=cache.CacheState)
    assert state == cache.CacheState(folder=str(answers), files=3, bytes=size, most_bytes=2**28)
    after = json.loads(here(["cache", "clear", "--json"]).out)
    assert after == msgspec.to_builtins(
        cache.CacheState(folder=str(answers), files=0, bytes=0, most_bytes=2**28, removed_files=3, freed_bytes=size)
    )


def test_without_a_cache_or_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert here(["cache"]).out.startswith("0 simulations stored, 0 bytes of")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(cache, "cache_folder", lambda: None)
    for words in (["cache"], ["cache", "clear"]):
        assert here(words).out == "no cache: this user has no home folder, so every command simulates again\n"


def test_what_cannot_be_deleted_is_named(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    done = here(["cache", "clear"])
    first = min(file for file in answers.iterdir() if file.name != STRANGER)
    assert done.code == 2
    assert done.err == f"tightfit: {first} cannot be deleted (Permission denied); delete it as its owner\n"


def test_another_word_is_refused() -> None:
    done = here(["cache", "clean"])
    assert done.code == 2
    assert "invalid choice: 'clean'" in done.err


@pytest.mark.parametrize("form", ["{}", "[]", "null", "1", '"x"', "[" * 5000, '{"a":' * 5000, "of another", "unsigned"])
def test_a_file_that_this_package_did_not_write_is_ignored(answers: Path, form: str) -> None:
    one, another = (cache._file(HostRequest(processor=processor)) for processor in ("one", "another"))
    assert one is not None
    assert another is not None
    emptied = msgspec.json.encode(HostRates(flops={}, bandwidth=0, base_bytes={})).decode()
    one.write_text({"of another": another.read_text(), "unsigned": emptied}.get(form, form))
    assert cache.recall(HostRequest(processor="one")) is None
    assert cache.recall(HostRequest(processor="another")) == RATES
