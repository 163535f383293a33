"""Every command of README.md, CONTRIBUTING.md and docs/ is run: as it stands, or shortened as `SHORTENED` says.

What a `console` block shows below its command is held against what was printed; where the command is too slow for the
suite, `-m slow` runs it as it stands and compares.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import Done, environment, here, make_dataset

from benchmarks.figures import with_table

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
SMALL = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --eval_iters=1"
ONE_STEP = f"{SMALL} --max_iters=1 --sample_at_end=0 --device=cpu"
PLAN = f"{SMALL} --vocab_size=96 --micro_batch=2 --loss=full --activation_checkpointing=0 --compile=False"
PLAY = "tightfit dryrun"
"""Documents show the figures of torch 2.13: 2.15 gives cuBLAS's workspaces back."""
DRYRUN = f'{PLAY} --gpu "RTX 3060 12GB" --used 2GiB'
SQUEEZED = (
    "(ulimit -d 680000; tightfit train configs/train_stdlib.py --device=cpu --fit=off "
    "--batch_size=96 --max_iters=3 --log_interval=1 --sample_at_end=0"
)
EXPLAIN = "tightfit explain examples/oom.log"
OPENWEBTEXT = "configs/train_openwebtext.py"


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
    shows: bool = True
    """Whether what is run in its place prints what the block shows; if not, `-m slow` runs the command itself."""
    loose: bool = False
    """Whether digits of what the block shows differ from run to run."""


WHOLE = {
    "tightfit prepare shakespeare_char --input tinyshakespeare.txt": Run(says="(characters)"),
    "tightfit sample --out_dir=out-stdlib --start='class ' --num_samples=1 --max_new_tokens=60": Run(says="class "),
    "tightfit doctor configs/train_stdlib.py": Run(codes=(0, 1), reason="1 where the machine has a problem"),
    "tightfit report out-stdlib": Run(says="report.html"),
    "tightfit report out-stdlib --lang ja": Run(says="report.html"),
    "tightfit convert out-stdlib/ckpt.pt my-gpt": Run(),
    "tightfit schema plan": Run(says="PlanRecord"),
    EXPLAIN: Run(),
    f"{EXPLAIN} --lang ja": Run(),
    f"{DRYRUN} examples/gpt2.py --batch_size=4": Run(slow=True, reason="plays four steps"),
    f"{DRYRUN} --lang ja examples/gpt2.py --batch_size=4": Run(slow=True, reason="plays four steps"),
    'tightfit dryrun --gpu "RTX 3060 12GB" --no-explain --html page.html examples/gpt2.py': Run(
        codes=(1,), slow=True, reason="the same play again; it does not fit"
    ),
    'WORLD_SIZE=4 tightfit dryrun --gpu "RTX 3060 12GB" --no-explain tests/scripts/several_cards.py fsdp': Run(
        says="FITS on GeForce RTX 3060 12GB", slow=True, reason="tests/test_vgpu_scripts.py plays this script"
    ),
    f"{EXPLAIN} --config {OPENWEBTEXT}": Run(slow=True, reason="plays GPT-2 for a minute"),
    f"{EXPLAIN} --config {OPENWEBTEXT} --lang ja": Run(slow=True, reason="plays GPT-2 for a minute"),
    f"{SQUEEZED})": Run(slow=True, loose=True, reason="three steps; tests/test_trainer_recovery.py has faster ones"),
    f"{SQUEEZED} --lang ja)": Run(slow=True, loose=True, reason="three steps"),
}


def on_cards(words: str) -> Run:
    """Plan a small model for several cards."""
    return Run(instead=f"tightfit plan {PLAN} {words}", reason="traces of GPT-2 take minutes", says="NCCL", slow=True)


SHORTENED = {
    "tightfit prepare stdlib": Run(
        instead="tightfit prepare stdlib --tokenizer bytes",
        reason="its own tokenizer is trained for several seconds",
        says="vocabulary 256 (bytes)",
        shows=False,
    ),
    "tightfit train configs/train_stdlib.py": Run(
        instead=f"tightfit train configs/train_stdlib.py {ONE_STEP}",
        reason="500 steps take minutes",
        says="step 1: train loss",
        shows=False,
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
        slow=True,
    ),
    "torchrun --nproc_per_node=4 -m tightfit train configs/train_gpt2.py --shard=full": Run(
        instead=f"torchrun --nproc_per_node=2 -m tightfit train configs/train_stdlib.py {ONE_STEP} --shard=full",
        reason="GPT-2 on OpenWebText; tests/test_trainer_distributed.py runs four processes",
        says="step 1: train loss",
        slow=True,
    ),
    'tightfit plan configs/train_gpt2.py --gpu "4x RTX 4090"': on_cards('--shard=full --gpu "4x RTX 4090"'),
    'tightfit plan configs/train_gpt2.py --gpu "2x8x A100 80GB"': on_cards('--shard=hybrid --gpu "2x8x A100 80GB"'),
    'tightfit plan --n_layer=48 --n_head=25 --n_embd=1600 --gpu "RTX 3090" --cards auto': Run(
        instead=f'tightfit plan {PLAN} --gpu "RTX 3090" --cards auto', reason="GPT-2 XL takes minutes", slow=True
    ),
    'tightfit plan configs/train_gpt2.py --gpu "2x RTX 3060 12GB" --link "PCIe 3.0 x8"': on_cards(
        '--shard=none --gpu "2x RTX 3060 12GB" --link "PCIe 3.0 x8"'
    ),
    "tightfit plan --n_layer=32 --n_head=32 --n_embd=4096 --block_size=8192 --batch_size=2"
    ' --gpu "8x H100 SXM"': on_cards('--shard=optimizer --gpu "8x H100 SXM"'),
    'tightfit plan configs/train_gpt2.py --gpu "2x8x A100 80GB" --network "InfiniBand HDR"': on_cards(
        '--shard=full --gpu "2x2x A100 80GB" --network "InfiniBand HDR"'
    ),
    **dict.fromkeys(
        (
            "torchrun --nproc_per_node=2 -m tightfit train configs/train_gpt2.py",
            "torchrun --nproc_per_node=8 -m tightfit train configs/train_gpt2.py --shard=full",
            "torchrun --nproc_per_node=8 --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
            " -m tightfit train configs/train_gpt2.py --shard=hybrid",
        ),
        Run(
            instead=f"torchrun --nproc_per_node=2 -m tightfit train configs/train_stdlib.py {ONE_STEP} --shard=hybrid",
            reason="GPT-2 on OpenWebText, on eight cards or two nodes",
            says="step 1: train loss",
            slow=True,
        ),
    ),
    f'tightfit plan {OPENWEBTEXT} --gpu "RTX 3060 12GB" --memory 11.69GiB --used 2GiB': Run(
        instead=f'tightfit plan {OPENWEBTEXT} --gpu "RTX 3060 12GB" --memory 11.69GiB --used 2GiB {PLAN}',
        reason="traces of GPT-2 take a minute",
        says="GeForce RTX 3060 12GB: 11.69 GiB",
        shows=False,
        slow=True,
    ),
    'tightfit plan --n_layer=48 --n_head=25 --n_embd=1600 --gpu "RTX 3060 12GB"': Run(
        instead=f'tightfit plan {PLAN} --gpu "RTX 3060 12GB"',
        reason="traces of GPT-2 XL take minutes",
        says="GeForce RTX 3060 12GB: 11.62 GiB",
        shows=False,
        slow=True,
    ),
    f"tightfit plan {OPENWEBTEXT} --all-gpus": Run(
        instead=f"tightfit plan {OPENWEBTEXT} --all-gpus {PLAN}",
        reason="traces of GPT-2 take minutes; those of any model on every compute capability take one",
        says="RTX 3060 12GB",
        slow=True,
    ),
    f'tightfit plan {OPENWEBTEXT} --gpu "My card" --memory 10GiB --capability 8.6': Run(
        instead=f'tightfit plan {OPENWEBTEXT} --gpu "My card" --memory 10GiB --capability 8.6 {PLAN}',
        reason="traces of GPT-2 take a minute",
        says="'My card' is not in the table of GPUs: it is planned as described",
    ),
    f"{DRYRUN} examples/gpt2.py": Run(
        instead=f"{DRYRUN} --no-explain examples/gpt2.py",
        reason="the explanation plays the script again",
        codes=(1,),
    ),
    f"{DRYRUN} --lang ja examples/gpt2.py": Run(
        instead=f"{DRYRUN} --no-explain --lang ja examples/gpt2.py",
        reason="the explanation plays the script again",
        codes=(1,),
        slow=True,
    ),
    'tightfit dryrun --gpu "RTX 3060 12GB" --no-explain --json --snapshot out.pickle examples/gpt2.py': Run(
        instead='tightfit dryrun --gpu "RTX 3060 12GB" --no-explain --json examples/gpt2.py',
        reason="tests/test_vgpu_snapshot.py reads snapshots",
        codes=(1,),
        says='"out_of_memory"',
        slow=True,
    ),
    f"{EXPLAIN} --script examples/gpt2.py -- --batch_size=12": Run(
        instead=f"{EXPLAIN} --lang en",
        reason="plays the script for each fix; tests/test_diagnosis.py does",
        says="6.14 GiB were asked for and 2.68 GiB of 11.69 GiB",
    ),
    f"{DRYRUN} --largest batch_size examples/gpt2.py": Run(
        instead='tightfit dryrun --gpu "RTX 3060 12GB" --memory 1GiB --largest width tests/scripts/accelerate_loop.py',
        reason="plays of GPT-2 take minutes, as do large batches that a DataLoader collects sample by sample; "
        "tests/test_questions.py asks all three questions of a small script",
        says="THAT FITS on GeForce RTX 3060 12GB",
        slow=True,
    ),
    "tightfit dryrun --all-gpus examples/gpt2.py --batch_size=4": Run(
        instead="tightfit dryrun --all-gpus tests/scripts/accelerate_loop.py",
        reason="plays of GPT-2 take minutes",
        says="FITS on 70 of 70 cards",
        slow=True,
    ),
    f"{DRYRUN.replace(' --used 2GiB', '')} --suggest examples/gpt2.py": Run(
        instead='tightfit dryrun --gpu "RTX 3060 12GB" --memory 8GiB --suggest '
        "tests/scripts/transformers_loop.py distilgpt2 AdamW 48",
        reason="plays of GPT-2 take minutes; tests/test_questions_suggest.py applies what is suggested",
        says="+model.gradient_checkpointing_enable()",
        slow=True,
    ),
    'tightfit dryrun --gpu "RTX 3060 12GB" --compare "--batch_size=2" "--batch_size=4" examples/gpt2.py': Run(
        instead='tightfit dryrun --gpu "RTX 3060 12GB" --compare "--width=256" "--width=512" '
        "tests/scripts/accelerate_loop.py",
        reason="plays of GPT-2 take minutes",
        says="--width=256 NEEDS LEAST",
        slow=True,
    ),
    "tightfit check memory.toml --update": Run(
        instead="tightfit check memory.toml --json --lang ja",
        reason="the list of this page names a script of its reader; tests/test_questions_check.py writes baselines",
        codes=(2,),
    ),
    "tightfit check memory.toml --junit memory.xml --summary memory.md": Run(
        instead="tightfit check memory.toml --summary memory.md",
        reason="the list of this page names a script of its reader; tests/test_questions_check.py has one",
        codes=(2,),
    ),
    "tightfit watch out-stdlib": Run(instead="tightfit watch out-stdlib --once", reason="endless", says="host memory"),
    'tightfit dryrun --gpu "RTX 3060 12GB" --memory 11.69GiB --used 1.97GiB --timeline story.svg train.py'
    " --dataset=openwebtext_local --batch_size=64 --gradient_accumulation_steps=1": Run(
        instead='tightfit dryrun --gpu "RTX 3060 12GB" --memory 11.69GiB --used 1.97GiB --timeline story.svg '
        "--no-explain train.py --batch_size=64",
        reason="nanoGPT is not part of this repository: train.py is a loop like its own, not compiled; the suite plays "
        "it in tests/test_vgpu_dryrun.py",
        codes=(1,),
        says="DOES NOT FIT on GeForce RTX 3060 12GB, 11.69 GiB, 1.97 GiB of it used by others",
        shows=False,
        slow=True,
    ),
    "python -m benchmarks.gpu.calibrate --out my-card --minutes 7": Run(
        instead="python -m benchmarks.gpu.calibrate --out my-card --list", reason="needs a GPU", says="gpt2"
    ),
}
AS_SHOWN = {
    'tightfit plan --n_layer=48 --n_head=25 --n_embd=1600 --gpu "RTX 3060 12GB"': (
        'tightfit plan --n_layer=48 --n_head=25 --n_embd=1600 --gpu "RTX 3060 12GB"'
    ),
    "tightfit prepare stdlib": "tightfit prepare stdlib",
    "tightfit train configs/train_stdlib.py": "tightfit train configs/train_stdlib.py --max_iters=1 --sample_at_end=0",
    f'tightfit plan {OPENWEBTEXT} --gpu "RTX 3060 12GB" --memory 11.69GiB --used 2GiB': (
        f'tightfit plan {OPENWEBTEXT} --gpu "RTX 3060 12GB" --memory 11.69GiB --used 2GiB'
    ),
    'tightfit dryrun --gpu "RTX 3060 12GB" --memory 11.69GiB --used 1.97GiB --timeline story.svg train.py'
    " --dataset=openwebtext_local --batch_size=64 --gradient_accumulation_steps=1": "",
}
"""What prints the block of each command whose shortened form does not, for `-m slow`; empty: needs nanoGPT, and
benchmarks/story.py draws that run."""
PROGRAMS = {
    "tightfit": ["-m", "tightfit"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone"],
    "python": [],
    "(ulimit": [],
}
"""Programs that are run, as arguments of this Python. Lines of others are checked: see `TestWhatIsNotRun`."""
NOT_RUN = {"make", "pip", "pytest", "python3"}
_ENVIRONMENT = re.compile(r"([A-Z_]+)=(\S+) ")


def blocks(text: str) -> list[tuple[str, str]]:
    r"""Commands with what is shown below each.

    Commands are lines of fenced blocks of `sh`, without comments after two spaces, and lines of any block that begin
    with `$ `; only those have something below them.

    >>> blocks("```sh\nmake test  # all of it\n\n# alone\n```\n$ no\n```\n$ ls 'a # b' \\\n  c\nb\n```\n")
    [('make test', ''), ("ls 'a # b' c", 'b')]
    """
    found: list[tuple[str, str]] = []
    for language, block in re.findall(r"^ *```(\w*)(?: *\{[^\n]*)?\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if line.startswith("$ ") or language == "sh":
                found.append((re.sub(r"(^|\s{2,})# .*$", "", line.removeprefix("$ ")).strip(), ""))
            elif found and "$ " in block:
                command, shown = found[-1]
                found[-1] = command, f"{shown}\n{line}".lstrip("\n")
    return [(command, shown) for command, shown in found if command]


def program(command: str) -> str:
    return Path(shlex.split(_ENVIRONMENT.sub("", command))[0]).name


BLOCKS = [each for text in DOCUMENTS.values() for each in blocks(text)]
ALL = list(dict.fromkeys(command for command, _ in BLOCKS))
RUN = [command for command in ALL if program(command) in PROGRAMS]


def assert_shown(printed: str, shown: str, *, loose: bool) -> None:
    """The parts between lines of `...` were printed, in this order; line breaks, times and rates do not count."""
    rest = _plain(printed, loose)
    for part in filter(str.strip, re.split(r"^\.\.\.$", shown, flags=re.MULTILINE)):
        _, found, rest = rest.partition(_plain(part, loose))
        assert found, f"not printed, or not in this order:\n{part}\nbut:\n{printed}"


def _plain(text: str, loose: bool) -> str:
    """Drop line breaks, which depend on the terminal's width, and figures that differ from run to run."""
    text = re.sub(r"[\d.,]+K? ?(?:tok/s|ms|s)\b", "#", text)
    if loose:  # where memory runs out depends on the machine
        text = re.sub(r"\d[\d.,]*", "#", re.sub(r"(in|:) (loss|forward|backward)", r"\1 PHASE", text))
    return re.sub(r"\s", "", text)


def _marks(command: str) -> list[pytest.MarkDecorator]:
    run = (WHOLE | SHORTENED).get(command)
    return [pytest.mark.slow] if run and run.slow else []


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands find: a checkout's files, a dataset, a finished run, a script and a text."""
    folder = tmp_path_factory.mktemp("materials")
    for name in ("configs", "examples", "tests/scripts"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "tests" / "scripts" / "nanogpt_like.py", folder / "train.py")
    make_dataset(folder / "data" / "stdlib")
    config = folder / "configs" / "train_stdlib.py"
    done = here(
        ["train", config, *ONE_STEP.split(), f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'out-stdlib'}"]
    )
    assert done.code == 0, done.err
    (folder / "tinyshakespeare.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n" * 200)
    return folder


@pytest.fixture(scope="module")
def true_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files with the dataset that the blocks show, for `-m slow`."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    with contextlib.chdir(folder):
        assert here(["prepare", "stdlib"]).code == 0
    return folder


def run_in(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> Done:
    """A command of tightfit's in this process, so that torch is loaded once; any other in one of its own."""
    for key, value in _ENVIRONMENT.findall(command):
        monkeypatch.setenv(key, value)
    bare = _ENVIRONMENT.sub("", command)
    name, *words = shlex.split(bare)
    if name == "tightfit":
        monkeypatch.chdir(folder)
        return here(words)
    return _process(folder, [sys.executable, *PROGRAMS[name], *words] if name != "(ulimit" else ["bash", "-c", bare])


def _process(folder: Path, command: list[str]) -> Done:
    """`tightfit` in the path is the one that is tested."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    (binaries / "tightfit").write_text(f'#!/bin/sh\nexec {sys.executable} -m tightfit "$@"\n')
    (binaries / "tightfit").chmod(0o755)
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PATH": f"{binaries}:{os.environ['PATH']}"}
    ended = subprocess.run(
        command,
        cwd=folder,
        env={**environment(), **paths, "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Done(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.usefixtures("own_cache")
class TestWhatIsRun:
    def test_every_command_is_in_one_table_and_every_entry_is_a_command(self) -> None:
        assert len(RUN) >= 25
        assert not WHOLE.keys() & SHORTENED.keys()
        listed = WHOLE.keys() | SHORTENED.keys()
        assert not set(RUN) - listed, "in a document and in no table"
        assert not listed - set(RUN), "in a table and in no document"
        assert all(not run.instead for run in WHOLE.values())
        assert all(run.instead and run.reason for run in SHORTENED.values())
        assert AS_SHOWN.keys() == {command for command, run in SHORTENED.items() if not run.shows}

    @pytest.mark.parametrize("command", [pytest.param(each, marks=_marks(each)) for each in RUN])
    def test_it_ends_as_it_should(
        self, command: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = (WHOLE | SHORTENED)[command]
        folder = tmp_path / "checkout"
        shutil.copytree(request.getfixturevalue("true_checkout" if run.loose else "materials"), folder)
        done = run_in(folder, (run.instead or command).replace(PLAY, f"{PLAY} --torch 2.13"), monkeypatch)
        assert done.code in run.codes, done.err
        assert run.says in done.out, done.out + done.err
        assert "Traceback" not in done.err or 1 in run.codes
        for each, shown in BLOCKS:
            if each == command and run.shows:
                assert_shown(done.out, shown, loose=run.loose)

    @pytest.mark.slow
    @pytest.mark.parametrize("command", [each for each, instead in AS_SHOWN.items() if instead])
    def test_the_block_shows_what_it_prints(
        self, command: str, true_checkout: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = run_in(true_checkout, AS_SHOWN[command], monkeypatch)
        assert done.code == 0, done.err
        for each, shown in BLOCKS:
            if each == command:
                assert_shown(done.out, shown, loose=False)


def test_what_was_not_printed_is_found() -> None:
    shown = "...\nfirst 2.5s\n...\nlast\n..."
    assert_shown("before\nfirst\n  7.1s\nlast\n", shown, loose=False)
    with pytest.raises(AssertionError, match="not in this order"):
        assert_shown("last\nfirst 7.1s\n", shown, loose=False)


class TestWhatIsNotRun:
    """`make`, `pip`, `pytest` and what makes a virtual environment, by what their lines name."""

    def test_there_is_a_check_for_every_program(self) -> None:
        assert {program(command) for command in ALL} <= {*PROGRAMS, *NOT_RUN}

    @pytest.mark.parametrize("command", [each for each in ALL if program(each) == "make"])
    def test_make_has_the_target(self, command: str) -> None:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        _, *wanted = shlex.split(command)
        assert wanted
        assert set(wanted) <= set(targets)

    @pytest.mark.parametrize("command", [each for each in ALL if program(each) == "pip"])
    def test_pip_installs_extras_and_packages_that_exist(self, command: str) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert "torch>=2.11,<2.16" in project["dependencies"]
        needed = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}
        for word in shlex.split(command.removesuffix(" --index-url https://download.pytorch.org/whl/cpu"))[2:]:
            own = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
            if own:
                assert set(filter(None, (own[1] or "").split(","))) <= project["optional-dependencies"].keys()
            else:
                assert word in needed | {"torch<2.16", "--no-deps"}, f"{word} is not needed by this package"

    @pytest.mark.parametrize("command", [each for each in ALL if program(each) == "pytest"])
    def test_pytest_is_given_tests_that_exist(self, command: str) -> None:
        _, *paths = shlex.split(command)
        assert paths
        assert all((ROOT / path).is_file() for path in paths)

    def test_python3_only_makes_the_environment(self) -> None:
        lines = {each for each in ALL if program(each) == "python3"}
        assert lines == {"python3 -m venv .venv && . .venv/bin/activate"}


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_within_the_repository_lead_somewhere(document: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[document]) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            assert anchor in _anchors((ROOT / (path or document)).read_text(encoding="utf-8")), link


class TestReadme:
    def test_it_is_short(self) -> None:
        assert len(DOCUMENTS["README.md"].split()) <= 900

    def test_its_table_is_that_of_the_rows(self) -> None:
        assert with_table(DOCUMENTS["README.md"]) == DOCUMENTS["README.md"], "python -m benchmarks.figures README.md"

    def test_a_dry_run_runs_the_script_is_said_before_the_first_one(self) -> None:
        before, _, _ = DOCUMENTS["README.md"].partition("$ tightfit dryrun")
        assert "executes the script, with your user's rights" in before

    def test_pictures_are_small_described_and_there_for_light_and_dark(self) -> None:
        pictures = re.findall(r'(?:src|srcset)="([^"]+)"', DOCUMENTS["README.md"])
        assert pictures == ["docs/story-dark.svg", "docs/story.svg"]
        assert all((ROOT / path).stat().st_size < 300_000 for path in pictures)
        assert len(re.search(r'alt="([^"]+)"', DOCUMENTS["README.md"])[1]) > 40


class TestSite:
    @pytest.mark.slow
    def test_it_builds_without_a_warning_and_loads_nothing_from_elsewhere(self, tmp_path: Path) -> None:
        pytest.importorskip("mkdocs", reason="the site needs pip install '.[docs]'")
        pytest.importorskip("material")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for page in (tmp_path / "site").rglob("*.html"):
            text = page.read_text(encoding="utf-8")
            assert not re.findall(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//[^"]*"', text), page
            assert not re.findall(r'<link[^>]* rel="(?:stylesheet|preconnect)"[^>]* href="(?:https?:)?//', text), page
        truth = (tmp_path / "site" / "how-true.html").read_text(encoding="utf-8")
        assert "{{" not in truth
        assert "-10.5%" in truth, "the worst miss"
