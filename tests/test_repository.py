"""The files around the code: they parse, and the commands, keys, targets and paths that they name exist."""

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from runs import here
from test_packaging import LOG

from tightfit.cli.cmd_schema import RECORDS
from tightfit.cli.exits import FAILED, INTERRUPTED, OUR_ERROR
from tightfit.cli.main import command_module
from tightfit.config import defaults

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SETTINGS = [*FORMS, *WORKFLOWS, ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml", ROOT / ".pre-commit-config.yaml"]
DOCUMENTS = [ROOT / "AGENTS.md", ROOT / "SECURITY.md", ROOT / ".github" / "pull_request_template.md"]
AGENTS = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
LIGHT = ["msgspec", "rich", "psutil", "nvidia-ml-py", "pyyaml"]
"""What the light installation has: tests/test_packaging.py runs it without the others."""


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.name


def shell_lines() -> Iterator[str]:
    """Yield the lines that workflows run."""
    for workflow in WORKFLOWS:
        for job in read(workflow)["jobs"].values():
            for step in job["steps"]:
                yield from step.get("run", "").splitlines()


@pytest.mark.parametrize("path", SETTINGS, ids=name_of)
def test_it_parses(path: Path) -> None:
    assert read(path)


def test_the_citation_names_title_authors_and_license() -> None:
    citation = read(ROOT / "CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == project["authors"]
    assert citation["license"] == project["license"]
    assert citation["title"].startswith(project["name"])


class TestWorkflows:
    @pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
    def test_each_job_has_a_limit_and_reads_only(self, path: Path) -> None:
        workflow = read(path)
        assert workflow["permissions"] == {"contents": "read"}
        assert all(job["timeout-minutes"] <= 180 for job in workflow["jobs"].values())

    def test_the_targets_and_files_that_they_run_exist(self) -> None:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        lines = list(shell_lines())
        made = [line.split()[1] for line in lines if line.startswith("make ")]
        assert {"check", "suite", "dist", "slow"} <= set(made) <= set(targets)
        paths = [word for line in lines for word in line.split() if word.startswith("tests/")]
        assert paths
        assert all((ROOT / path).is_file() for path in paths)

    def test_all_pythons_of_the_metadata_and_both_ends_of_torch_are_tested(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        matrix = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]
        pythons = [re.fullmatch(r".*:: (3\.\d+)", each) for each in project["classifiers"]]
        assert matrix["python"] == [python[1] for python in pythons if python]
        [torch] = (each for each in project["dependencies"] if each.startswith("torch"))
        assert torch == "torch>=2.11,<2.16"
        assert [each["torch"] for each in matrix["include"]] == ["2.11.*", "2.15.*"]
        assert f"torch=={matrix['torch'][0]}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


class TestForms:
    @pytest.mark.parametrize("path", FORMS, ids=name_of)
    def test_it_has_a_name_and_fields_of_its_own(self, path: Path) -> None:
        form = read(path)
        assert form["name"]
        assert form["description"]
        ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len(ids) == len(set(ids)) >= 2

    def test_a_bug_comes_with_doctor_and_a_wrong_prediction_with_a_measurement(self) -> None:
        assert [form.stem for form in FORMS] == ["bug", "feature", "prediction"]
        bug, _, prediction = map(read, FORMS)
        required = {field["id"] for field in prediction["body"] if field.get("validations", {}).get("required")}
        assert {"predicted", "measured", "script", "doctor"} <= required
        for form in (bug, prediction):
            [doctor] = (field for field in form["body"] if field.get("id") == "doctor")
            assert "tightfit doctor --json" in doctor["attributes"]["label"]


def named_commands() -> list[str]:
    """`tightfit ...` in back quotes, of all documents and forms, and what the container runs."""
    texts = [path.read_text(encoding="utf-8") for path in (*DOCUMENTS, *FORMS)]
    found = [command for text in texts for command in re.findall(r"`tightfit( [^`]+)`", text)]
    container = [*shell_lines(), *(ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()]
    found += [line.split(" tightfit")[-1] for line in container if "docker run" in line]
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", named_commands())
def test_it_names_a_command_and_its_options(command: str) -> None:
    words = shlex.split(command)
    words = words[: words.index("--")] if "--" in words else words
    if words == ["--version"]:
        return
    parser = command_module(words[0]).parser()
    known = {option for action in parser._actions for option in action.option_strings}
    known |= {f"--{key}" for key in defaults(parser.takes_keys)} if parser.takes_keys else set()
    assert {word.partition("=")[0] for word in words[1:] if word.startswith("--")} <= known
    if parser.takes_keys is None and words[0] != "dryrun":
        assert parser.read(words[1:])


def test_the_hooks_run_what_is_installed_for_development() -> None:
    hooks = read(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = {hook["entry"].split()[0] for hook in hooks if hook["language"] == "system"}
    assert own == {".venv/bin/ruff", ".venv/bin/mypy"}
    assert all(
        any(each.startswith(f"{Path(tool).name}==") for each in project["optional-dependencies"]["dev"]) for tool in own
    )


def test_the_container_gets_all_that_the_build_reads() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = {word for line in re.findall(r"^COPY (?!--)(.*) \S+$", dockerfile, re.MULTILINE) for word in line.split()}
    let_in = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {f"!{name}" for name in copied} == {each for each in let_in if each.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {pyproject["project"]["readme"], *wheel["force-include"], *wheel["packages"]}
    assert {Path(name).parts[0] for name in needed} <= copied
    assert re.search(r"^USER 1000$", dockerfile, re.MULTILINE)


class TestForAssistants:
    def test_the_keys_exist(self) -> None:
        rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", AGENTS, re.MULTILINE)
        assert {name for name, _ in rows} == set(RECORDS)
        for name, cell in rows:
            module, record = RECORDS[name]
            for key in re.findall(r"`([\w.\[\]]+)`", cell):
                assert_has(getattr(importlib.import_module(module), record), key)

    def test_outcomes_and_verdicts_are_as_written(self) -> None:
        from tightfit.vgpu.records import Findings

        outcome = msgspec.json.schema(Findings)["$defs"]["Findings"]["properties"]["outcome"]["enum"]
        assert set(outcome) == {"fits", "out_of_memory", "error"}
        assert "`fits`, `out_of_memory` or `error`" in AGENTS

    def test_the_exit_codes_are_as_written(self, tmp_path: Path) -> None:
        log = tmp_path / "oom.log"
        log.write_text(LOG)
        assert (here(["explain", log, "--json"]).code, here(["cache", "--json"]).code) == (0, 0)
        assert (here(["watch", "--once"]).code, here(["dryrun", "train.py"]).code) == (0, 2)
        assert (FAILED, OUR_ERROR, INTERRUPTED) == (1, 3, 130)
        assert "2 is a mistake in what was asked" in AGENTS
        assert "3 an error\nof tightfit's own, 130 an interruption" in AGENTS

    def test_the_light_installation_is_the_one_that_is_tested(self) -> None:
        assert f"pip install --no-deps .\npip install {' '.join(LIGHT)}\n" in AGENTS


def assert_has(record: type, path: str) -> None:
    """Fail if `a.b[].c` names no field of the record's schema."""
    [schema], definitions = msgspec.json.schema_components([record])
    for part in path.split("."):
        kinds = [schema, *schema.get("anyOf", [])]
        fields: dict[str, Any] = {}
        for kind in kinds:
            fields |= definitions.get(kind.get("$ref", "").rpartition("/")[2], kind).get("properties", {})
        name = part.removesuffix("[]")
        assert name in fields, f"{record.__name__} has no {path}"
        schema = fields[name]
        if part.endswith("[]"):
            assert schema["type"] == "array", f"{path} of {record.__name__} is no list"
            schema = schema["items"]
