"""Sentences of `say`: each is there in both languages, with the fields that the code fills in, and each is used."""

import ast
import functools
import os
import re
import tomllib
from pathlib import Path

import pytest

from tightfit.cli.main import commands, main
from tightfit.cli.parser import language_in
from tightfit.errors import ConfigError
from tightfit.wording import LANGUAGES, Words, say, speak

SOURCE = Path(__file__).parents[1] / "src" / "tightfit"
ROOMS = sorted(
    folder.name
    for folder in (SOURCE / "wording").iterdir()
    if (folder / "en.toml").exists() and not (folder / "__init__.py").exists()
)
"""Rooms with sentences that `say` finds by name; the others have tests of their own."""


@functools.cache
def _calls(function: str) -> list[tuple[str, str, frozenset[str] | None]]:
    """Place, name and fields of each `say("room.table.key", ...)` or `term("room.table", ...)`.

    No fields where they are passed as a mapping.
    """
    found = []
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if re.search(rf"tightfit.wording import .*\b{function}\b", text) else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
                names = [keyword.arg for keyword in node.keywords]
                fields = None if None in names else frozenset(name for name in names if name)
                for constant in ast.walk(node.args[0]):
                    if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                        found.append((f"{file.name}:{node.lineno}", constant.value, fields))
    return found


def _sentences(room: str, language: str) -> dict[str, frozenset[str]]:
    return {f"{room}.{key}": fields for key, fields in Words(f"tightfit.wording.{room}", language).sentences()}


@pytest.mark.parametrize("room", ROOMS)
def test_both_languages_fill_in_the_same_fields(room: str):
    english, japanese = (_sentences(room, language) for language in LANGUAGES)
    assert english == japanese


@pytest.mark.parametrize("room", ROOMS)
def test_japanese_is_japanese(room: str):
    tables = tomllib.loads((SOURCE / "wording" / room / "ja.toml").read_text(encoding="utf-8"))
    for table, sentences in tables.items():
        for key, sentence in sentences.items():
            assert re.search("[ぁ-んァ-ヶ一-龠、]", re.sub(r"\{[^}]*\}", "", sentence)), f"{room}.{table}.{key}"


def test_every_call_has_its_sentence_and_fills_in_its_fields():
    known = {key: fields for room in ROOMS for key, fields in _sentences(room, "en").items()}
    for place, sentence, fields in _calls("say"):
        assert sentence in known, f"{place}: {sentence}"
        needed = {re.split(r"[.\[]", field.partition(":")[0])[0] for field in known[sentence]}
        assert fields is None or needed == fields, f"{place}: {sentence} needs {needed}, got {fields}"


def test_every_table_of_terms_takes_any_name_and_gets_its_fields():
    known = {key: fields for room in ROOMS for key, fields in _sentences(room, "en").items()}
    for place, table, fields in _calls("term"):
        assert f"{table}.other" in known, f"{place}: {table}"
        needed = {field.partition(":")[0] for key in known if key.startswith(f"{table}.") for field in known[key]}
        assert fields is None or needed == fields, f"{place}: {table} needs {needed}, got {fields}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_sentence_is_used(room: str):
    used = {sentence for _, sentence, _ in _calls("say")}
    unused = _sentences(room, "en").keys() - used
    assert not [key for key in unused if key.rpartition(".")[0] not in {table for _, table, _ in _calls("term")}]


def test_the_language_of_a_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TIGHTFIT_LANG", "en")
    assert "is not a size" in say("config.sizes.not_a_size", text="x")
    assert speak("ja") == "ja"
    assert "サイズとして読めません" in say("config.sizes.not_a_size", text="x")
    with pytest.raises(ConfigError, match="--lang must be one of en, ja, got 'fr'"):
        speak("fr")


def test_a_noun_takes_its_number(monkeypatch: pytest.MonkeyPatch):
    words = Words("tightfit.wording.config", "en")
    shown = [words.vformat("{n:pass|passes}, {s:time}", (), {"n": n, "s": 75}) for n in (1, "1", 4)]
    assert shown == ["1 pass, 1m15s", "1 pass, 1m15s", "4 passes, 1m15s"]


class TestLanguageOfACommand:
    """`--lang`, which every command takes, before or after the command's name."""

    @pytest.mark.parametrize("command", commands())
    def test_every_command_takes_it(self, command: str, capsys: pytest.CaptureFixture[str]):
        assert main([command, "--help", "--lang=ja"]) == 0
        assert "表示する言語" in capsys.readouterr().out

    @pytest.mark.parametrize("words", [["--lang", "ja", "xyz"], ["xyz", "--lang=ja"], ["watch", "a", "b", "--lang=ja"]])
    def test_it_changes_mistakes(self, words: list[str], capsys: pytest.CaptureFixture[str]):
        before = os.environ.get("TIGHTFIT_LANG")
        assert main(words) == 2
        assert re.search("ありません|余分な引数です", capsys.readouterr().err)
        assert os.environ.get("TIGHTFIT_LANG") == before, "the caller keeps its language"

    def test_a_scripts_own_option_is_no_language(self):
        assert language_in(["--lang=fr"]) is None
        assert language_in(["train.py", "--", "--lang", "ja"]) is None
