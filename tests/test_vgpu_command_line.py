"""Command lines that start a training: what one process of each runs, with which arguments and variables."""

import json
from pathlib import Path

import msgspec
import pytest
from plays import played

from tightfit.cli.cmd_dryrun import parser
from tightfit.errors import ConfigError
from tightfit.report.tensor_texts import source_line
from tightfit.vgpu.command_line import Program, program_word, read_command
from tightfit.vgpu.notebooks import notebook_script


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "run.sh").write_text("#!/bin/bash\npython train.py\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def read(line: str, rank: int = 0) -> Program:
    return read_command(line.split(), rank=rank, environ={})


PLAIN = [
    ("train.py --lr 3", "script", "train.py", ("--lr", "3")),
    ("python -u train.py -m", "script", "train.py", ("-m",)),
    ("python3.11 -X dev -W ignore -Bu train.py", "script", "train.py", ()),
    ("-m pkg.train a", "module", "pkg.train", ("a",)),
    ("python -um pkg.train a", "module", "pkg.train", ("a",)),
    ("python -c pass a", "code", "pass", ("a",)),
    ("env A=1 nohup python train.py", "script", "train.py", ()),
    ("bash run.sh x", "other", "bash", ("run.sh", "x")),
    ("./run.sh x", "other", "bash", ("./run.sh", "x")),
    ("tightfit plan", "entry_point", "tightfit=tightfit.cli.main:main", ("plan",)),
]


@pytest.mark.parametrize(("line", "kind", "target", "arguments"), PLAIN, ids=[each[0] for each in PLAIN])
def test_what_a_command_runs(line: str, kind: str, target: str, arguments: tuple[str, ...]) -> None:
    program = read(line)
    assert (program.kind, program.target, program.arguments) == (kind, target, arguments)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("train.py --config other.py", "train.py"),
        ("-m open_clip_train.main --model RN50", "open_clip_train.main"),
        ("torchrun --nproc_per_node=8 train.py", "train.py"),
        ("accelerate launch --config_file a.yaml sub/train.py", "sub/train.py"),
        ("bash run.sh", "run.sh"),
        ("tune run full", "tune"),
        ("train.py -m", "train.py"),
    ],
)
def test_the_word_by_which_a_command_is_known(line: str, word: str) -> None:
    assert program_word(line.split()) == word


def test_variables_in_front_are_set() -> None:
    assert read("CUDA_VISIBLE_DEVICES=0 A=b=c python train.py").environ == {"CUDA_VISIBLE_DEVICES": "0", "A": "b=c"}


LAUNCHED = [
    "torchrun --nproc_per_node=4 --nnodes=2 train.py --lr 3",
    "torchrun --nproc-per-node 4 --nnodes 1:2 --rdzv-backend c10d --standalone train.py --lr 3",
    "python -m torch.distributed.run --nproc_per_node=4 --nnodes 2 train.py --lr 3",
    "deepspeed --num_nodes 2 --num_gpus=4 --no_local_rank train.py --lr 3",
    "fabric run --num-nodes=2 --devices=4 train.py --lr 3",
]


@pytest.mark.parametrize("line", LAUNCHED)
def test_a_rank_gets_its_launchers_variables(line: str) -> None:
    program = read(line, rank=6)
    assert (program.kind, program.target, program.arguments) == ("script", "train.py", ("--lr", "3"))
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    assert [program.environ[name] for name in names] == ["8", "6", "2", "29500"]


def test_launchers_that_pass_the_local_rank() -> None:
    assert read("deepspeed --include localhost:4,5 train.py", 1).arguments == ("--local_rank=1",)
    assert read("python -m torch.distributed.launch --nproc_per_node=2 train.py", 1).arguments == ("--local-rank=1",)


def test_an_unnamed_number_of_processes_is_one_and_said() -> None:
    program = read("torchrun --nproc_per_node=gpu train.py")
    assert (program.environ["WORLD_SIZE"], len(program.notes)) == ("1", 1)
    assert "--nproc_per_node=8" in program.notes[0]


@pytest.mark.slow  # accelerate's own parser loads torch
def test_accelerate_reads_its_config(tmp_path: Path) -> None:
    settings = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\n"
    (tmp_path / "a.yaml").write_text(f"{settings}num_machines: 1\nnum_processes: 4\nmachine_rank: 0\nuse_cpu: false\n")
    program = read("accelerate launch --config_file a.yaml train.py --lr 3", rank=3)
    assert (program.target, program.arguments) == ("train.py", ("--lr", "3"))
    names = ("WORLD_SIZE", "RANK", "ACCELERATE_MIXED_PRECISION")
    assert [program.environ[name] for name in names] == ["4", "3", "bf16"]


MISTAKES = [
    ("", "there is no command to play"),
    ("missing.py", "missing.py is not a file; give the path"),
    ("nosuch train.py", "nosuch is neither a file here nor an installed command"),
    ("python", "python has no script to run"),
    ("torchrun --nproc_per_node=2", "torchrun has no script to run"),
    ("torchrun --nproc_per_node=two train.py", "--nproc_per_node=two must be a whole number from 1"),
    ("torchrun --max-restarts", "torchrun: argument --max-restarts"),
    ("deepspeed --num_gpus=0 train.py", "--num_gpus=0 must be a whole number from 1"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[each[0] or "nothing" for each in MISTAKES])
def test_a_mistake_is_one_sentence(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as caught:
        read(line)
    assert message in str(caught.value)


@pytest.mark.parametrize("line", ["torchrun --nproc_per_node=2 train.py", "train.py", "WORLD_SIZE=2 python train.py"])
def test_a_rank_must_be_there(line: str) -> None:
    with pytest.raises(ConfigError, match="--rank 2 must be below the number of processes"):
        read(line, rank=2)


class TestOptions:
    def test_the_command_begins_at_its_first_word(self) -> None:
        for words in (
            ["--gpu", "T4", "--json", "torchrun", "--json"],
            ["--gpu=T4", "--json", "--", "torchrun", "--json"],
        ):
            options, _ = parser().read(words)
            assert (options.script, options.arguments, options.json) == ("torchrun", ["--json"], True)
        options, _ = parser().read(["--gpu", "T4", "-m", "pkg.train", "a"])
        assert (options.script, options.arguments) == ("-m", ["pkg.train", "a"])

    def test_an_option_after_the_script_is_pointed_out(self) -> None:
        with pytest.raises(
            ConfigError, match=r"--gpu stands after train\.py, which would get it; give tightfit's options"
        ):
            parser().read(["train.py", "--gpu", "T4"])


def test_a_notebook_is_its_cells_without_ipythons_lines(tmp_path: Path) -> None:
    cells = [
        "%matplotlib inline\n!pip install x \\\n  y\na = 1",
        "%%time\nb = a + 1",
        "%%bash\nls",
        "for _ in [0]:\n    x = !ls",
    ]
    sources = [{"cell_type": "code", "source": each} for each in cells]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "# T"}, *sources]}))
    text, skipped = notebook_script(tmp_path / "n.ipynb")
    names: dict[str, object] = {}
    exec(text, names)
    assert (names["a"], names["b"]) == (1, 2)
    assert skipped == ["%matplotlib inline", "!pip install x \\", "y", "%%time", "%%bash", "x = !ls"]


def test_a_notebooks_lines_are_those_of_its_cells(tmp_path: Path) -> None:
    cells = [
        "import torch\nfrom torch import nn",
        "%%time\nmodel = nn.Linear(1024, 1024, device='cuda')\n",
        "# cell 3\nx = torch.ones(8, 1024, device='cuda')\nif model(x).sum().item() > 3:\n    print('large')",
    ]
    sources = [{"cell_type": "code", "source": each.splitlines(keepends=True)} for each in cells]
    notebook = tmp_path / "train.ipynb"
    notebook.write_text(json.dumps({"cells": [sources[0], {"cell_type": "markdown", "source": "# T"}, *sources[1:]]}))
    found = played(["--gpu", "A100", notebook], folder=tmp_path)
    largest = next(each for each in found.largest if each.category == "parameters")
    assert (largest.shape, largest.file, largest.line) == ((1024, 1024), f"{notebook} In[2]", 2)
    assert source_line(largest) == "model = nn.Linear(1024, 1024, device='cuda')"
    (value,) = found.made_up_values
    assert (value.file, value.line) == (f"{notebook} In[3]", 3)
    assert "train.ipynb.py" not in json.dumps(msgspec.to_builtins(found)), "a file that is gone"


def test_no_notebook_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "n.ipynb").write_text("[]")
    with pytest.raises(ConfigError, match="not a notebook that Jupyter could open"):
        notebook_script(tmp_path / "n.ipynb")


def test_a_module_may_lie_in_a_folder_without_init(tmp_path: Path) -> None:
    for file, text in {
        "pkg/__init__.py": "",
        "pkg/cli/main.py": "import torch\ntorch.ones(3, device='cuda')\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
    assert played(["--gpu", "A100", "-m", "pkg.cli.main"], folder=tmp_path).outcome == "fits"
