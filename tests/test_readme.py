"""Every command of README.md and CONTRIBUTING.md is run: as it stands, or shortened as `SHORTENED` says."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import environment, here, make_dataset

ROOT = Path(__file__).parents[1]
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
OOM = (
    "[0/0] Not enough SMs to use max_autotune_gemm mode\n"
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity of 11.69 GiB "
    "of which 2.68 GiB is free. Including non-PyTorch memory, this process has 7.04 GiB memory in use. Of the "
    "allocated memory 6.78 GiB is allocated by PyTorch, and 224.90 MiB is reserved by PyTorch but unallocated.\n"
)
SMALL = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --eval_iters=1"
ONE_STEP = f"{SMALL} --max_iters=1 --sample_at_end=0 --device=cpu"
PLAN = f"{SMALL} --vocab_size=96 --micro_batch=2 --loss=full --activation_checkpointing=0 --compile=False"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A command as it is run here."""

    instead: str = ""
    """What is run in its place; empty: the command itself."""
    reason: str = ""
    """Why it is not run as it stands, or why its exit code is what it is."""
    codes: tuple[int, ...] = (0,)
    says: str = ""
    """Part of what it prints."""
    slow: bool = False
    """Whether it runs with `-m slow` only."""


WHOLE = {
    "tightfit prepare shakespeare_char --input tinyshakespeare.txt": Run(says="(characters)"),
    "tightfit sample --out_dir=out-stdlib --start='class ' --num_samples=1 --max_new_tokens=60": Run(says="class "),
    "tightfit doctor configs/train_stdlib.py": Run(codes=(0, 1), reason="1 where the machine has a problem"),
    "tightfit report out-stdlib": Run(says="report.html"),
    "tightfit convert out-stdlib/ckpt.pt my-gpt": Run(),
}
SHORTENED = {
    "tightfit prepare stdlib": Run(
        instead="tightfit prepare stdlib --tokenizer bytes",
        reason="its own tokenizer is trained for several seconds",
        says="vocabulary 256 (bytes)",
    ),
    "tightfit train configs/train_stdlib.py": Run(
        instead=f"tightfit train configs/train_stdlib.py {ONE_STEP}",
        reason="500 steps take minutes",
        says="step 1: train loss",
    ),
    "tightfit train configs/train_stdlib.py --init_from=resume": Run(
        instead=f"tightfit train configs/train_stdlib.py --init_from=resume {ONE_STEP} --max_iters=2",
        reason="500 steps take minutes",
        says="step 2: train loss",
    ),
    "torchrun --nproc_per_node=4 -m tightfit train configs/train_gpt2.py": Run(
        instead=f"torchrun --nproc_per_node=1 -m tightfit train configs/train_stdlib.py {ONE_STEP}",
        reason="GPT-2 on OpenWebText; tests/test_trainer_distributed.py runs four processes",
        says="step 1: train loss",
    ),
    'tightfit plan --n_layer=48 --n_head=25 --n_embd=1600 --gpu "RTX 3060 12GB"': Run(
        instead=f'tightfit plan {PLAN} --gpu "RTX 3060 12GB"',
        reason="traces of GPT-2 XL take minutes",
        says="GeForce RTX 3060 12GB: 11.62 GiB",
    ),
    "tightfit plan configs/train_openwebtext.py --all-gpus": Run(
        instead=f"tightfit plan configs/train_openwebtext.py --all-gpus {PLAN}",
        reason="traces of GPT-2 take minutes; those of any model on every compute capability take one",
        says="RTX 3060 12GB",
        slow=True,
    ),
    'tightfit plan configs/train_openwebtext.py --gpu "My card" --memory 10GiB --capability 8.6': Run(
        instead=f'tightfit plan configs/train_openwebtext.py --gpu "My card" --memory 10GiB --capability 8.6 {PLAN}',
        reason="traces of GPT-2 take a minute",
        says="'My card' is not in the table of GPUs: it is planned as described",
    ),
    "tightfit explain oom.log --config configs/train_openwebtext.py": Run(
        instead="tightfit explain oom.log --lang en",
        reason="playing GPT-2 takes a minute; tests/test_diagnosis.py does",
        says="6.14 GiB were asked for and 2.68 GiB of 11.69 GiB were free",
    ),
    "tightfit watch out-stdlib": Run(instead="tightfit watch out-stdlib --once", reason="endless", says="host memory"),
    'tightfit dryrun --gpu "RTX 3060 12GB" --memory 11.69GiB --used 1.97GiB --timeline docs/story.svg train.py'
    " --dataset=openwebtext_local --batch_size=64 --gradient_accumulation_steps=1": Run(
        instead='tightfit dryrun --gpu "RTX 3060 12GB" --memory 11.69GiB --used 1.97GiB --timeline docs/story.svg '
        "--no-explain train.py --batch_size=64",
        reason="nanoGPT is not part of this repository: train.py is a loop like its own, not compiled. It does not fit",
        codes=(1,),
        says="DOES NOT FIT on GeForce RTX 3060 12GB, 11.69 GiB, 1.97 GiB of it used by others",
    ),
    "python -m benchmarks.gpu.calibrate --out my-card --minutes 7": Run(
        instead="python -m benchmarks.gpu.calibrate --out my-card --list", reason="needs a GPU", says="gpt2"
    ),
}
PROGRAMS = {
    "tightfit": ["-m", "tightfit"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone"],
    "python": [],
}
"""Programs that are run, as arguments of this Python. Lines of others are checked: see `TestWhatIsNotRun`."""


def commands(text: str) -> list[str]:
    r"""Lines of fenced blocks of `sh`, and lines of any block that begin with `$ `, without comments after two spaces.

    >>> commands("```sh\nmake test  # all of it\n\n# alone\n```\n$ no\n```\n$ ls 'a # b' \\\n  c\nb\n```\n")
    ['make test', "ls 'a # b' c"]
    """
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if line.startswith("$ ") or language == "sh":
                found.append(re.sub(r"(^|\s{2,})# .*$", "", line.removeprefix("$ ")).strip())
    return [command for command in found if command]


def program(command: str) -> str:
    return Path(shlex.split(command)[0]).name


ALL = list(dict.fromkeys(command for text in DOCUMENTS.values() for command in commands(text)))
RUN = [command for command in ALL if program(command) in PROGRAMS]


def _marks(command: str) -> list[pytest.MarkDecorator]:
    run = (WHOLE | SHORTENED).get(command)
    return [pytest.mark.slow] if run and run.slow else []


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands find: a checkout's configs, a dataset, a finished run, a log, a script and a text."""
    folder = tmp_path_factory.mktemp("materials")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copy(ROOT / "tests" / "scripts" / "nanogpt_like.py", folder / "train.py")
    make_dataset(folder / "data" / "stdlib")
    config = folder / "configs" / "train_stdlib.py"
    done = here(
        ["train", config, *ONE_STEP.split(), f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'out-stdlib'}"]
    )
    assert done.code == 0, done.err
    (folder / "oom.log").write_text(OOM)
    (folder / "tinyshakespeare.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n" * 200)
    (folder / "docs").mkdir()
    return folder


class TestWhatIsRun:
    def test_every_command_is_in_one_table_and_every_entry_is_a_command(self) -> None:
        assert len(RUN) >= 12
        assert not WHOLE.keys() & SHORTENED.keys()
        listed = WHOLE.keys() | SHORTENED.keys()
        assert not set(RUN) - listed, "in a document and in no table"
        assert not listed - set(RUN), "in a table and in no document"
        assert all(not run.instead for run in WHOLE.values())
        assert all(run.instead and run.reason for run in SHORTENED.values())

    @pytest.mark.parametrize("command", [pytest.param(each, marks=_marks(each)) for each in RUN])
    def test_it_ends_as_it_should(self, command: str, materials: Path, tmp_path: Path) -> None:
        run = (WHOLE | SHORTENED)[command]
        folder = tmp_path / "checkout"
        shutil.copytree(materials, folder)
        name, *words = shlex.split(run.instead or command)
        done = subprocess.run(
            [sys.executable, *PROGRAMS[name], *words],
            cwd=folder,
            env={
                **environment(),
                "PYTHONPATH": str(ROOT),
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
                "LC_ALL": "C.UTF-8",
            },
            capture_output=True,
            text=True,
            timeout=300 if run.slow else 60,
            check=False,
        )
        assert done.returncode in run.codes, done.stderr
        assert run.says in done.stdout, done.stdout + done.stderr
        assert "Traceback" not in done.stderr or 1 in run.codes


class TestWhatIsNotRun:
    """`make`, `pip` and `pytest`, by what their lines name."""

    def test_there_is_a_check_for_every_program(self) -> None:
        assert {program(command) for command in ALL} <= {*PROGRAMS, "make", "pip", "pytest"}

    @pytest.mark.parametrize("command", [each for each in ALL if program(each) == "make"])
    def test_make_has_the_target(self, command: str) -> None:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        _, *wanted = shlex.split(command)
        assert wanted
        assert set(wanted) <= set(targets)

    @pytest.mark.parametrize("command", [each for each in ALL if program(each) == "pip"])
    def test_pip_installs_extras_that_exist(self, command: str) -> None:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        installs = re.fullmatch(r"pip install (?:-e )?'?\.(?:\[([\w,]+)\])?'?", command)
        assert installs, f"{command} installs something else than this package"
        assert set(filter(None, (installs[1] or "").split(","))) <= extras.keys()

    @pytest.mark.parametrize("command", [each for each in ALL if program(each) == "pytest"])
    def test_pytest_is_given_tests_that_exist(self, command: str) -> None:
        _, *paths = shlex.split(command)
        assert paths
        assert all((ROOT / path).is_file() for path in paths)


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_within_the_repository_lead_somewhere(document: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[document]) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            assert anchor in _anchors((ROOT / (path or document)).read_text(encoding="utf-8")), link


def test_pictures_are_small_and_described() -> None:
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", DOCUMENTS["README.md"])
    assert pictures
    for described, path in pictures:
        assert len(described) > 40
        assert (ROOT / path).stat().st_size < 300_000
