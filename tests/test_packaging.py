"""The wheel and the sdist, and an installation that lacks packages."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from runs import environment

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LIGHT = ("msgspec", "rich", "psutil", "nvidia-ml-py", "pyyaml")
"""Packages that the light installation has, beside what they bring themselves."""
WITHOUT = """
import sys
for name in {absent!r}:
    sys.modules[name] = None  # as if it were not installed
from tightfit.cli.main import main
code = main(sys.argv[1:])
loaded = [name for name in {heavy!r} if sys.modules.get(name)]
print(f"loaded {{loaded}}", file=sys.stderr)
sys.exit(code)
"""
LOG = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity of 11.69 GiB "
    "of which 2.68 GiB is free. Including non-PyTorch memory, this process has 7.04 GiB memory in use. Of the "
    "allocated memory 6.78 GiB is allocated by PyTorch, and 224.90 MiB is reserved by PyTorch but unallocated.\n"
)


def files_of_the_package() -> set[str]:
    """Paths below src and configs that belong in the wheel, as they are named there."""
    package = ROOT / "src" / "tightfit"
    source = {file.relative_to(ROOT / "src").as_posix() for file in package.rglob("*") if file.is_file()}
    configs = {f"tightfit/configs/{file.name}" for file in (ROOT / "configs").iterdir() if file.is_file()}
    return {name for name in source | configs if not name.endswith(".pyc")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("built")
    words = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_the_wheel_holds_every_file_of_the_package(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = files_of_the_package()
    assert names == expected
    assert {"tightfit/py.typed", "tightfit/gpus.csv", "tightfit/configs/train_stdlib.py"} <= expected


def test_a_wheel_can_be_built_from_the_sdist(built: Path) -> None:
    """So it holds all that the build reads; and it holds the tests, and nothing that git ignores."""
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in files_of_the_package() if "/configs/" not in name} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "configs/train_stdlib.py", "tests/test_packaging.py"} <= names
    assert not {name for name in names if name.startswith((".venv", ".git/", "data/")) or name.endswith(".pyc")}


def test_the_metadata_names_licenses_commands_and_pythons(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        [scripts] = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/entry_points.txt"))
    assert f"Version: {PROJECT['version']}\n" in metadata
    assert "License-Expression: MIT\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert "License-File: src/tightfit/report/vendor/uplot-1.6.32/LICENSE\n" in metadata
    assert "tightfit = tightfit.cli.main:main" in scripts


def distribution(requirement: str) -> str:
    """
    >>> distribution("nvidia-ml-py>=12.535; sys_platform == 'linux'")
    'nvidia-ml-py'
    """
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def test_each_dependency_is_imported_and_each_import_is_a_dependency() -> None:
    imported = {name for file in (ROOT / "src").rglob("*.py") for name in top_level_imports(file)}
    imported -= {*sys.stdlib_module_names, "tightfit"}
    names = {
        "nvidia-ml-py": "pynvml",
        "pyyaml": "yaml",
        "liger-kernel": "liger_kernel",
        "huggingface-hub": "huggingface_hub",
    }
    extras = {extra: each for extra, each in PROJECT["optional-dependencies"].items() if extra not in ("dev", "docs")}
    base = {names.get(name, name) for name in map(distribution, PROJECT["dependencies"])}
    optional = {names.get(name, name) for each in extras.values() for name in map(distribution, each)}
    by_name = {"pynvml", "wandb", "tensorboard"}  # by import_module, the last by torch
    brought = {"markupsafe"}  # by jinja2
    assert imported - brought == (base | optional) - by_name


def top_level_imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


def imported_names() -> list[str]:
    """Names under which the packages are imported that the whole installation has and the light one lacks."""
    names = map(distribution, PROJECT["dependencies"])
    return [name for name in names if name not in LIGHT]


def run_without(absent: list[str], *words: str) -> "subprocess.CompletedProcess[str]":
    code = WITHOUT.format(absent=absent, heavy=["torch", "numpy", "tokenizers", "yaml"])
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=environment(), capture_output=True, text=True, check=False
    )


@pytest.fixture
def log(tmp_path: Path) -> str:
    path = tmp_path / "oom.log"
    path.write_text(LOG)
    return str(path)


def test_the_light_installation_reads_logs_and_checks_the_machine(log: str) -> None:
    explained = run_without(imported_names(), "explain", log)
    assert (explained.returncode, explained.stderr) == (0, "loaded []\n")
    assert "6.14 GiB were asked for and 2.68 GiB of 11.69 GiB" in explained.stdout
    doctor = run_without(imported_names(), "doctor", "--json")
    assert (doctor.returncode, doctor.stderr) == (1, "loaded []\n")
    assert '"torch is not installed"' in doctor.stdout


def test_with_everything_installed_a_log_alone_loads_nothing_heavy(log: str) -> None:
    assert run_without([], "explain", log).stderr == "loaded []\n"


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["plan", "--gpu", "A100", "--n_layer=1"], "torch"),
        (["dryrun", "--gpu", "A100", __file__], "torch"),
        (["sample"], "torch"),
        (["completion", "bash"], "shtab"),
        (["prepare", "x", "--input", __file__], "numpy"),
    ],
)
def test_a_command_names_the_package_that_it_lacks(words: list[str], package: str) -> None:
    done = run_without([package], *words)
    [requirement] = (each for each in PROJECT["dependencies"] if re.match(rf"{package}\W", each))
    parts = re.split(r"(?<=\d),", requirement.removeprefix(package))
    sentence, _, rest = done.stderr.partition("\n")
    assert done.returncode == 2
    assert rest.startswith("loaded ")
    assert sentence.startswith(
        f"tightfit: {words[0]} needs the Python package {package}, which is not installed; "
        "install all that is missing: pip install '"
    )
    assert all(part in sentence for part in parts)


class Environment:
    """A fresh virtual environment, and nothing of this one."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=True)
        self.bin, self.folder = folder / "venv" / "bin", folder

    def install(self, *words: object) -> None:
        pinned = ["--quiet", "--constraint", ROOT / "constraints.txt"]
        done = self._run([self.bin / "pip", "install", *pinned, *words])
        assert done.returncode == 0, done.stderr

    def tightfit(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self._run([self.bin / "tightfit", *words])

    def _run(self, words: list[object]) -> "subprocess.CompletedProcess[str]":
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environ |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "PIP_CACHE_DIR": str(Path.home() / ".cache" / "pip")}
        return subprocess.run(
            list(map(str, words)), cwd=self.folder, env=environ, capture_output=True, text=True, check=False
        )


SCRIPT = """import torch
from torch import nn

model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for step in range(3):
    loss = model(torch.randn(64, 512, device="cuda")).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=64", "--batch_size=4"]


@pytest.mark.slow
def test_the_wheel_alone_runs_every_command(built: Path, tmp_path: Path, log: str) -> None:
    clean = Environment(tmp_path)
    clean.install("torch", *built.glob("*.whl"))
    assert clean.tightfit("explain", log).returncode == 0
    assert clean.tightfit("doctor").returncode in (0, 1)
    planned = clean.tightfit("plan", *SMALL, "--vocab_size=512", "--gpu", "RTX 3060 12GB", "--json")
    assert json.loads(planned.stdout)["best"]["fits"], planned.stderr
    (tmp_path / "script.py").write_text(SCRIPT)
    played = clean.tightfit("dryrun", "--gpu", "RTX 3060 12GB", "--timeline", "memory.svg", "script.py")
    assert (played.returncode, "FITS" in played.stdout) == (0, True), played.stderr
    assert (tmp_path / "memory.svg").stat().st_size > 1000
    run = ["--max_iters=2", "--eval_iters=1", "--eval_interval=2", "--sample_at_end=0", "--device=cpu"]
    trained = clean.tightfit("train", "configs/train_stdlib.py", *SMALL, *run, "--html", "run.html")
    assert trained.returncode == 0, trained.stderr
    assert "step 2: train loss" in trained.stdout
    assert f"reading the one that comes with tightfit, {clean.bin.parent}" in trained.stderr
    assert "uPlot" in (tmp_path / "run.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_light_installation_explains_a_log(built: Path, tmp_path: Path, log: str) -> None:
    clean = Environment(tmp_path)
    clean.install("--no-deps", *built.glob("*.whl"))
    clean.install(*LIGHT)
    explained = clean.tightfit("explain", log)
    assert (explained.returncode, explained.stderr) == (0, "")
    assert clean.tightfit("doctor", "--json").returncode == 1
    refused = clean.tightfit("plan", "--gpu", "A100")
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert "plan needs the Python package" in refused.stderr
    _, _, command = refused.stderr.strip().partition("pip install ")
    missing = {distribution(each) for each in shlex.split(command)}
    assert missing == set(map(distribution, PROJECT["dependencies"])) - {*LIGHT}
