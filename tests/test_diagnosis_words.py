"""The wording of explanations: both languages complete, every sentence used, every code of the program said."""

import re
import tomllib
from pathlib import Path

import pytest

from tightfit.diagnosis.causes import is_of_device
from tightfit.diagnosis.stable_codes import page_of, stable_code, stable_codes
from tightfit.errors import ConfigError
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.kinds import memory_of
from tightfit.vgpu.records import CATEGORIES
from tightfit.wording import words_of
from tightfit.wording.diagnosis import LANGUAGES, words
from tightfit.wording.kinds import words as kind_words

SOURCE = Path(__file__).parents[1] / "src" / "tightfit"
ROOMS = ("oomlog", "diagnosis", "wording/diagnosis")
CODE = "\n".join(file.read_text() for room in ROOMS for file in sorted((SOURCE / room).glob("*.py")))

LINES, ADVICE, FRAMEWORKS, PROGRAMS = (
    tomllib.loads((SOURCE / "diagnosis" / name).read_text())
    for name in ("lines.toml", "advice.toml", "frameworks.toml", "config_programs.toml")
)
KINDS = tomllib.loads((SOURCE / "oomlog" / "codes.toml").read_text())["kinds"]
TABLES = tomllib.loads((SOURCE / "diagnosis" / "kind_fixes.toml").read_text())
FIXES = {key.partition("__")[0] for key in TABLES["fixes"]}


def test_both_languages_have_the_same_sentences_with_the_same_fields():
    english, japanese = (dict(words(language).sentences()) for language in LANGUAGES)
    assert english.keys() == japanese.keys()
    for key, fields in english.items():
        # Japanese may name an amount twice in one sentence or not; what is filled in must be the same.
        assert fields == japanese[key], key


def test_japanese_is_japanese():
    for key, _ in words("ja").sentences():
        table, name = key.split(".", 1)
        said = re.sub(r"\{[^}]*\}", "", words("ja")._tables[table][name])
        sentences = ("problem", "causes", "reasons", "nothing", "unplayed", "kinds", "kind_causes", "expected")
        if table in sentences and not name.endswith("_one"):
            assert re.search("[ぁ-んァ-ヶ一-龠]", said), key
            assert re.search(r"。$|：$|\(\)$|(ます|ません|です)。", said), key


@pytest.mark.parametrize("key", [key for key, _ in words("en").sentences()])
def test_every_sentence_is_used(key: str):
    table, name = key.split(".", 1)
    if table in ("kinds", "kind_causes", "kind_advice"):
        assert name in KINDS
        assert not is_of_device(Facts(kind=name))
        return
    if table in ("code_titles", "code_pages"):
        assert name in stable_codes()
        return
    if table == "phases":
        return
    if table == "categories":
        assert name in CATEGORIES or name in LINES or f'"{name}"' in CODE
        return
    if table == "programs" and name in PROGRAMS:
        return
    bare = {"shares_one": "shard", "weights_one": "weight", "held_one": "held"}.get(name, name)
    if table in ("remedies", "reasons") and bare in ADVICE["applicability"]:
        return
    assert re.search(rf'["\'](?:hint_)?{re.escape(bare)}["\']', CODE) or _is_formed(table, bare), key


def _is_formed(table: str, name: str) -> bool:
    """Codes that are put together: a hint's name behind `hint_`, what a tensor grows with, the model's memory."""
    if table == "causes" and name.startswith("grows_"):
        grows = name.removeprefix("grows_")
        return grows in {each["grows"] for each in LINES.values()} or f'return "{grows}"' in CODE
    if table == "causes" and name.startswith("budget_"):
        return name.removesuffix("_in_4_bits").removesuffix("_divided") in ("budget_weights", "budget_training")
    if table == "effects":
        return name in ADVICE["applicability"].values() or name == "to_be_checked"
    if name.endswith(("_elsewhere", "_sized", "_unnamed")):
        return f'"{re.sub("_(elsewhere|sized|unnamed)$", "", name)}"' in CODE
    return table == "causes" and name.startswith("hint_") and f'"{name.removeprefix("hint_")}"' in CODE


def test_every_program_of_a_configuration_and_every_part_has_its_words():
    said, files = words("en"), words_of("explain", "en")
    assert PROGRAMS.keys() - {"no_training"} <= said.table("programs").keys()
    assert PROGRAMS["no_training"].keys() <= files.table("files").keys()
    parts = {part for name, entry in PROGRAMS.items() if name != "no_training" for part in entry.get("parts", {})}
    assert (
        parts - {"half", "full_shard", "flash", "all_linear", "mlp_adapters", "grpo", "fsdp_older"}
        <= said.table("parts").keys()
    )


def test_every_kind_is_said():
    for language in LANGUAGES:
        for kind in KINDS:
            if not is_of_device(Facts(kind=kind)) and memory_of(kind) != "harmless":
                of_old = all(words(language).has(table, kind) for table in ("kinds", "kind_causes", "kind_advice"))
                own = kind_words(language)
                assert of_old or (kind in FIXES and own.has("problem", kind) and own.has("cause", kind)), kind


def test_amounts_are_said_as_people_say_them():
    said = words("en")
    assert [said.vformat("{x:duration}", (), {"x": x}) for x in (0.25, 119, 200, 9000, 400_000)] == [
        "0.2 s", "119 s", "3.3 minutes", "2.5 hours", "4.6 days",
    ]  # fmt: skip
    assert said.vformat("{x:shape} {y:change}", (), {"x": (2, 3), "y": 0.4}) == "(2, 3) +40%"
    assert words("ja").vformat("{x:duration}", (), {"x": 9000}) == "2.5 時間"


def test_a_language_that_is_not_there():
    with pytest.raises(ConfigError, match="--lang must be one of en, ja, got 'fr'"):
        words("fr")


def test_tables_use_known_codes():
    pastes, formats = (
        tomllib.loads((SOURCE / name).read_text()) for name in ("diagnosis/pastes.toml", "oomlog/formats.toml")
    )
    for framework, remedies in pastes.items():
        assert not remedies.keys() - words("en").table("remedies").keys(), framework
    assert {each["kind"] for each in formats["format"]} <= KINDS.keys()


def test_sentences_on_kinds_are_there_in_both_languages_with_the_same_fields():
    english, japanese = (dict(kind_words(language).sentences()) for language in LANGUAGES)
    assert english == japanese
    for table in ("problem", "cause", "fix", "expected", "nothing", "follows"):
        for key, sentence in kind_words("ja").table(table).items():
            said = re.sub(r"\{[^}]*\}", "", sentence)
            assert re.search("[ぁ-んァ-ヶ一-龠]", said), key
            assert table == "fix" or re.search("。$|。[^。]*$|：$|」$", said), key


def test_every_kind_has_its_fixes_and_every_fix_its_words():
    fix_words = kind_words("en").table("fix")
    used = {code for codes in TABLES["fixes"].values() for code in codes}
    assert used == fix_words.keys()
    assert TABLES["paste"].keys() <= used
    for table in ("problem", "cause"):
        assert {key.partition("__")[0] for key in kind_words("en").table(table)} <= KINDS.keys()
    assert KINDS.keys() >= FIXES


def test_every_remedy_of_the_tables_is_worded_and_has_an_effect():
    remedies, reasons = (words("en").table(name) for name in ("remedies", "reasons"))
    known = ADVICE["applicability"].keys()
    assert known <= remedies.keys()
    assert set(ADVICE["needs_words"]["codes"]) <= known
    for codes in ADVICE["fixes"].values():
        assert set(codes) <= known & reasons.keys()
    assert known - {"close_others", "expandable_segments", "max_split_size", "raise_fraction"} <= reasons.keys()
    for program, table in FRAMEWORKS.items():
        assert table.keys() - {"like"} <= known, program
        assert set(table.get("like", [])) <= FRAMEWORKS.keys()
        for entry in (each for name, each in table.items() if name != "like"):
            assert entry["lines"]
            assert re.fullmatch(r"(https://\S+)?", entry["page"])


def test_every_kind_of_line_is_worded():
    categories = words("en").table("categories")
    assert LINES.keys() <= categories.keys()
    assert {each["grows"] for each in LINES.values()} <= ADVICE["fixes"].keys()


def test_every_cause_and_every_kind_has_a_code_with_its_page():
    causes = {name for name in words("en").table("causes") if not name.endswith("_one")}
    assert {stable_code(name) for name in causes} | {stable_code(f"kind_{kind}") for kind in KINDS} <= set(
        stable_codes()
    )
    assert "TF-505" in stable_codes()
    for language in LANGUAGES:
        for code in stable_codes():
            title, page = page_of(code.lower(), language).split("\n\n")
            assert title.startswith(f"{code}: ")
            assert page.endswith((".", "。"))
    with pytest.raises(ConfigError, match="'TF-1' is not a code"):
        page_of("TF-1", "en")


def test_the_documentation_has_the_page_of_every_code():
    pages = "\n\n".join("## " + page_of(code, "en") for code in stable_codes())
    document = (SOURCE.parents[1] / "docs" / "codes.md").read_text(encoding="utf-8")
    assert document.endswith(f"\n\n{pages}\n")
