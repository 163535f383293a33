"""The command line: hostile and mistaken input, help, the public face, and which room may import which."""

import ast
import functools
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import arguments, environment, here, make_dataset, process

import tightfit
from tightfit.cli import progress
from tightfit.cli.cmd_schema import RECORDS
from tightfit.cli.main import commands
from tightfit.storage import LOCK

SOURCE = Path(tightfit.__file__).parent


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, planted: Path) -> None:
        self.planted = planted

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.planted),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    out_dir = tmp_path_factory.mktemp("finished")
    assert here(arguments(out_dir, data_dir, eval_interval=4)).code == 0
    return out_dir


@pytest.fixture
def out_dir(finished: Path, tmp_path: Path) -> Path:
    """A folder with a finished run, of which nothing may be lost."""
    folder = tmp_path / "out"
    folder.mkdir()
    for path in finished.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(words: list[str], *, out_dir: Path, real: bool = False) -> str:
    """The sentence with which a command is refused: the only line on stderr, exit code 2, and no file changed."""
    before = contents(out_dir)
    done = (process if real else here)(words)
    assert re.fullmatch(r"tightfit: [^\n]+\n", done.err), done.err
    assert done.code == 2
    assert "Traceback" not in done.out
    assert contents(out_dir) == before
    return done.err.removeprefix("tightfit: ").strip()


IN_PROCESS_AND_REAL = pytest.mark.parametrize("real", [False, True], ids=["in process", "real process"])


class TestNothingIsExecuted:
    @IN_PROCESS_AND_REAL
    def test_a_config_that_calls_os_system(self, out_dir: Path, tmp_path: Path, data_dir: Path, real: bool) -> None:
        planted = tmp_path / "planted"
        config = tmp_path / "config.py"
        config.write_text(f"import os\nos.system('touch {planted}')\nmax_iters = 1\n")
        said = refusal([*arguments(out_dir, data_dir), str(config)], out_dir=out_dir, real=real)
        assert said.startswith(f"{config}:1: ")
        assert not planted.exists()

    @pytest.mark.parametrize(
        "line", ["__import__('os').mkdir({!r})", "x = open({!r}, 'w')", "exec('open({!r})')", "[p for p in {!r}]"]
    )
    def test_other_configs_that_would_run(self, out_dir: Path, tmp_path: Path, data_dir: Path, line: str) -> None:
        planted = tmp_path / "planted"
        config = tmp_path / "config.py"
        config.write_text(line.format(str(planted)) + "\n")
        refusal([*arguments(out_dir, data_dir), str(config)], out_dir=out_dir)
        assert not planted.exists()

    @pytest.mark.parametrize(
        ("command", "form", "real"),
        [
            *itertools.product(("resume", "path", "sample", "convert"), ("zip", "legacy", "plain pickle"), (False,)),
            ("resume", "zip", True),
            ("convert", "plain pickle", True),
        ],
    )
    def test_a_checkpoint_that_would_run_code(
        self, out_dir: Path, tmp_path: Path, data_dir: Path, command: str, form: str, real: bool
    ) -> None:
        planted = tmp_path / "planted"
        good = torch.load(out_dir / "ckpt.pt", weights_only=True)
        for name in ("ckpt.pt", "ckpt.prev.pt"):
            hostile = good | {"config": Payload(planted)}
            if form == "plain pickle":
                (out_dir / name).write_bytes(pickle.dumps(hostile))
            else:
                torch.save(hostile, out_dir / name, _use_new_zipfile_serialization=form == "zip")
        path = out_dir / "ckpt.pt"
        words = {
            "resume": arguments(out_dir, data_dir, init_from="resume"),
            "path": arguments(out_dir, data_dir, init_from=path),
            "sample": ["sample", f"--out_dir={out_dir}", f"--data_dir={data_dir}"],
            "convert": ["convert", str(path), str(tmp_path / "converted")],
        }
        said = refusal(words[command], out_dir=out_dir, real=real)
        assert "could run code; it was not read" in said or (form == "plain pickle" and "is cut or damaged" in said)
        assert not planted.exists()
        assert not (tmp_path / "converted").exists()

    @IN_PROCESS_AND_REAL
    def test_a_meta_pkl_that_would_run_code(self, out_dir: Path, tmp_path: Path, real: bool) -> None:
        planted = tmp_path / "planted"
        folder = make_dataset(tmp_path / "data" / "tiny")
        (folder / "meta.json").unlink()
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 64, "itos": Payload(planted)}))
        said = refusal(arguments(out_dir, tmp_path / "data"), out_dir=out_dir, real=real)
        assert "meta.pkl: it asks for" in said
        assert "nothing of it was run" in said
        assert not planted.exists()

    def test_the_payload_works(self, tmp_path: Path) -> None:
        """So that the tests above show something."""
        pickle.loads(pickle.dumps(Payload(tmp_path / "planted")))
        assert (tmp_path / "planted").exists()


class TestBrokenInput:
    @pytest.mark.parametrize("cut", [1, 2, 1001, 7999, 8000])
    def test_a_cut_train_bin(self, out_dir: Path, tmp_path: Path, cut: int) -> None:
        path = make_dataset(tmp_path / "data" / "tiny") / "train.bin"
        os.truncate(path, 8000 - cut)
        for init_from in ("scratch", "resume"):
            said = refusal(arguments(out_dir, tmp_path / "data", init_from=init_from), out_dir=out_dir)
            assert said.startswith(str(path))
            assert "prepare the dataset again" in said

    @pytest.mark.parametrize("name", ["train.bin", "val.bin"])
    def test_ids_above_the_vocabulary(self, out_dir: Path, tmp_path: Path, name: str) -> None:
        path = make_dataset(tmp_path / "data" / "tiny") / name
        ids = np.fromfile(path, dtype="<u2")
        ids[-1] = 64
        ids.tofile(path)
        for init_from in ("scratch", "resume"):
            said = refusal(arguments(out_dir, tmp_path / "data", init_from=init_from), out_dir=out_dir)
            assert said.startswith(f"{path} holds the id 64, but vocab_size=64 allows ids up to 63")

    def test_a_vocabulary_smaller_than_the_datasets(self, out_dir: Path, data_dir: Path) -> None:
        said = refusal(arguments(out_dir, data_dir, vocab_size=60), out_dir=out_dir)
        assert "holds the id 63, but vocab_size=60 allows ids up to 59; set vocab_size=64 or more" in said

    def test_a_dataset_with_a_larger_vocabulary_than_the_checkpoint(self, out_dir: Path, tmp_path: Path) -> None:
        folder = make_dataset(tmp_path / "data" / "tiny")
        for name in ("train.bin", "val.bin"):
            ids = np.fromfile(folder / name, dtype="<u2")
            ids[5] = 99
            ids.tofile(folder / name)
        meta = json.loads((folder / "meta.json").read_text()) | {"vocab_size": 100, "tokenizer": None}
        (folder / "meta.json").write_text(json.dumps(meta))
        said = refusal(arguments(out_dir, tmp_path / "data", init_from="resume"), out_dir=out_dir)
        assert "has 100 ids, but the model of" in said

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "vocab_size": "64"}'])
    def test_a_broken_meta_json(self, out_dir: Path, tmp_path: Path, content: str) -> None:
        path = make_dataset(tmp_path / "data" / "tiny") / "meta.json"
        path.write_text(content)
        said = refusal(arguments(out_dir, tmp_path / "data"), out_dir=out_dir)
        assert said.startswith(f"{path}: ")

    @IN_PROCESS_AND_REAL
    def test_a_missing_dataset(self, out_dir: Path, data_dir: Path, real: bool) -> None:
        said = refusal(arguments(out_dir, data_dir, dataset="tinny"), out_dir=out_dir, real=real)
        assert said == (
            f"there is no dataset 'tinny' in {data_dir}; did you mean tiny? "
            f"Otherwise make it with: tightfit prepare tinny --input PATH --data_dir={data_dir}"
        )

    @pytest.mark.parametrize(
        "damage",
        ["empty", "4 bytes", "half", "all but 100 bytes", "all but 1 byte", "bit", "text", "zip", "state only"],
    )
    @pytest.mark.parametrize("how", ["resume", "path", "sample"])
    def test_a_damaged_checkpoint_and_no_other(
        self, out_dir: Path, data_dir: Path, finished: Path, damage: str, how: str
    ) -> None:
        (out_dir / "ckpt.prev.pt").unlink()
        path = out_dir / "ckpt.pt"
        good = path.read_bytes()
        middle = len(good) // 2
        weights = torch.load(path, weights_only=True)["model"]["lm_head.weight"].numpy().tobytes()
        flipped = bytearray(good)
        flipped[good.index(weights) + 1001] ^= 16
        bad = {
            "empty": b"",
            "4 bytes": good[:4],
            "half": good[:middle],
            "all but 100 bytes": good[:-100],
            "all but 1 byte": good[:-1],
            "bit": bytes(flipped),
            "text": b"not a checkpoint at all\n" * 100,
            "zip": b"PK\x05\x06" + bytes(18),
            "state only": b"",
        }[damage]
        path.write_bytes(bad)
        if damage == "state only":
            torch.save(torch.load(finished / "ckpt.pt", weights_only=True)["model"], path)
        words = {
            "resume": arguments(out_dir, data_dir, init_from="resume"),
            "path": arguments(out_dir, data_dir, init_from=path),
            "sample": ["sample", f"--out_dir={out_dir}", f"--data_dir={data_dir}"],
        }
        said = refusal(words[how], out_dir=out_dir, real=damage == "half" and how == "resume")
        assert str(path) in said
        assert ("is no checkpoint of nanoGPT" if damage == "state only" else "is cut or damaged") in said

    def test_a_checkpoint_of_another_shape(self, out_dir: Path, data_dir: Path) -> None:
        """Its model_args say one thing and its tensors another."""
        (out_dir / "ckpt.prev.pt").unlink()
        content = torch.load(out_dir / "ckpt.pt", weights_only=True)
        for key, value in (("n_layer", 3), ("n_layer", 1), ("n_embd", 64), ("vocab_size", 65), ("bias", True)):
            torch.save(content | {"model_args": content["model_args"] | {key: value}}, out_dir / "ckpt.pt")
            said = refusal(arguments(out_dir, data_dir, init_from="resume"), out_dir=out_dir)
            assert "tensor" in said, said

    def test_moments_of_another_model(self, out_dir: Path, data_dir: Path) -> None:
        (out_dir / "ckpt.prev.pt").unlink()
        content = torch.load(out_dir / "ckpt.pt", weights_only=True)
        content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
        torch.save(content, out_dir / "ckpt.pt")
        said = refusal(arguments(out_dir, data_dir, init_from="resume"), out_dir=out_dir)
        assert "the optimizer's exp_avg of parameter 0 is missing or misshapen" in said

    def test_no_checkpoint_to_resume(self, tmp_path: Path, data_dir: Path) -> None:
        said = refusal(arguments(tmp_path / "new", data_dir, init_from="resume"), out_dir=tmp_path)
        assert said == (
            f"{tmp_path / 'new'} holds no checkpoint to resume: there is no ckpt.pt in it; "
            "start anew with --init_from=scratch"
        )
        assert not (tmp_path / "new").exists()

    def test_an_initial_checkpoint_that_is_not_there(self, out_dir: Path, data_dir: Path) -> None:
        said = refusal(arguments(out_dir, data_dir, init_from="nowhere/ckpt.pt"), out_dir=out_dir)
        assert said.startswith("nowhere/ckpt.pt does not exist")


class TestMistakes:
    def test_an_unknown_command(self, tmp_path: Path) -> None:
        assert refusal(["trian"], out_dir=tmp_path, real=True) == "'trian' is not a command; did you mean train?"
        assert refusal(["xyz"], out_dir=tmp_path) == "'xyz' is not a command; tightfit --help lists them"

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("--learning_rat=1", "--learning_rat is not a key; did you mean --learning_rate?"),
            ("--max_iters=many", "max_iters takes a whole number, got 'many'"),
            ("--max_iters=-1", "max_iters must be 0 or more, got -1; the default is 600000"),
            ("--dropout=1", "dropout must be at least 0 and below 1, got 1.0; the default is 0.0"),
            ("--n_head=3", "n_embd=32 must be a multiple of n_head=3, like 33"),
            ("--device=gpu", "device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'; the default is 'auto'"),
            ("batch_size=8", "batch_size=8 is neither a file nor an option; write --batch_size=8"),
            ("--micro_batch=9", None),
            ("--block_size=601", None),
            ("missing.py", None),
        ],
    )
    def test_a_wrong_key_or_value(self, out_dir: Path, data_dir: Path, word: str, said: str | None) -> None:
        found = refusal([*arguments(out_dir, data_dir), word], out_dir=out_dir)
        assert found == said if said else word.split("=")[0].strip("-") in found

    @pytest.mark.parametrize("key", ["wandb_log", "tensorboard_log"])
    def test_a_logger_that_is_not_installed(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, key: str
    ) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        done = here(arguments(tmp_path / "out", data_dir, **{key: True}))
        assert done.code == 2
        assert re.fullmatch(r"tightfit: \w+ needs (wandb|tensorboard); pip install 'tightfit\[log\]'.*\n", done.err)

    @pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
    def test_an_out_dir_that_cannot_be(self, tmp_path: Path, data_dir: Path, place: str) -> None:
        (tmp_path / "file").touch()
        said = refusal(arguments(tmp_path / place, data_dir), out_dir=tmp_path)
        assert re.fullmatch(rf"out_dir={tmp_path / place} cannot be written \(.*\); set another", said)

    def test_a_loss_that_is_not_to_be_had(self, out_dir: Path, data_dir: Path) -> None:
        """Noticed when the first loss is computed: the earlier run's files are in previous/ by then, none lost."""
        before = contents(out_dir)
        done = here([*arguments(out_dir, data_dir), "--loss=liger"])
        assert done.code == 2
        assert re.fullmatch(r"tightfit: loss=liger [^\n]+; [^\n]*use loss=auto\n", done.err)
        assert contents(out_dir / "previous") == {name: data for name, data in before.items() if name != LOCK}

    def test_our_own_errors_are_called_so(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tightfit.trainer import loop

        def broken(*_: object) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(loop, "train", broken)
        done = here(arguments(tmp_path, data_dir))
        assert done.code == 3
        assert done.err.endswith("tightfit: this is an error of ours; please report it with the lines above\n")
        assert "ZeroDivisionError: a bug" in done.err

    def test_convert_refuses_what_exists(self, out_dir: Path, tmp_path: Path) -> None:
        said = refusal(["convert", str(out_dir / "ckpt.pt"), str(tmp_path)], out_dir=out_dir)
        assert said == f"{tmp_path} exists; name a new one, or remove it first"


class TestConvert:
    def test_there_and_back(self, out_dir: Path, tmp_path: Path) -> None:
        for source, target in ((out_dir / "ckpt.pt", tmp_path / "hf"), (tmp_path / "hf", tmp_path / "new" / "back.pt")):
            done = here(["convert", source, target])
            assert (done.code, done.out, done.err) == (0, f"{source} -> {target}\n", "")
        one, other = (
            torch.load(path, weights_only=True) for path in (out_dir / "ckpt.pt", tmp_path / "new" / "back.pt")
        )
        assert one["model_args"] == other["model_args"]
        assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


class TestPrepare:
    @pytest.mark.slow
    def test_then_train_then_sample(self, tmp_path: Path) -> None:
        """The commands one after the other, in one real process each, as a user starts them."""
        (tmp_path / "text.txt").write_text("abcdefgh. " * 800)
        prepared = process(
            ["prepare", "letters", "--input", "text.txt", "--data_dir=data", "--tokenizer=characters"], cwd=tmp_path
        )
        assert (prepared.code, prepared.err) == (0, "")
        keys = {"dataset": "letters", "max_iters": 100, "lr_decay_iters": 100, "batch_size": 8}
        trained = process(arguments(tmp_path / "out", tmp_path / "data", **keys), cwd=tmp_path)
        assert (trained.code, trained.err) == (0, "")
        sampled = process(
            ["sample", "--num_samples=1", "--max_new_tokens=17", "--start=abc", "--top_k=1"], cwd=tmp_path
        )
        assert (sampled.code, sampled.err) == (0, "")
        assert sampled.out == "abcdefgh. abcdefgh. \n---------------\n"


class TestHelp:
    def test_the_first_screen(self) -> None:
        for words in ([], ["--help"], ["-h"], ["help"]):
            done = here(words)
            assert done.code == 0
            assert len(done.out.splitlines()) < 24
            assert all(command in done.out for command in commands())

    @pytest.mark.parametrize("command", commands())
    def test_of_each_command_shows_an_example(self, command: str) -> None:
        done = here([command, "--help"])
        assert (done.code, done.err) == (0, "")
        assert f"example: tightfit {command} " in done.out
        assert done.out.startswith(f"usage: tightfit {command}")

    @pytest.mark.parametrize("command", ["train", "sample"])
    def test_every_key_is_explained_with_its_default(self, command: str) -> None:
        from tightfit.config import SampleConfig, TrainConfig, defaults

        lines = here([command, "--help"]).out.splitlines()
        for key, value in defaults(TrainConfig if command == "train" else SampleConfig).items():
            (line,) = [line for line in lines if line.startswith(f"  --{key}=")]
            assert re.match(rf"  --{key}={re.escape(repr(value))} +\S.*\.$", line), line

    def test_help_comes_without_torch_and_in_real_processes(self) -> None:
        """One process asks for them all, and makes mistakes: `-X importtime` names every module that is imported."""
        program = (
            "import sys; from tightfit.cli.main import commands, main\n"
            "for words in [[], ['--version'], ['sample', '-h'], ['nonsense'], ['dryrun', '--gpu=T1', 'x']]:\n"
            "    main(words)\n"
            "for command in commands():\n"
            "    try: main([command, '--help'])\n"
            "    except SystemExit as end: assert not end.code\n"
            "    assert 'torch' not in sys.modules, command\n"
        )
        subprocess.run([sys.executable, "-c", program], env=environment(), check=True, capture_output=True, timeout=60)
        done = process(["--help"])
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith("tightfit: train GPTs that fit the GPU you have")

    def test_version(self) -> None:
        done = here(["--version"])
        assert re.fullmatch(r"tightfit \d+\.\d+\.\d+\n", done.out)


class TestPublicFace:
    def test_importing_it_does_no_work(self) -> None:
        program = (
            "import os, sys; before = dict(os.environ); import tightfit\n"
            "assert dict(os.environ) == before\n"
            "heavy = {'torch', 'numpy', 'rich', 'tiktoken', 'tokenizers'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)

    def test_it_has_its_names_and_no_others(self) -> None:
        program = (
            "import tightfit, types\n"
            "names = {name for name in vars(tightfit) if not name.startswith('_')}\n"
            "own = {name for name in names if not isinstance(getattr(tightfit, name), types.ModuleType)}\n"
            "print(sorted(own - {'Any', 'TYPE_CHECKING'}))\n"
        )
        done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
        assert ast.literal_eval(done.stdout) == sorted(tightfit.__all__)
        assert sorted(tightfit.__all__) == tightfit.__all__
        assert all(getattr(tightfit, name).__doc__ for name in tightfit.__all__)

    def test_no_room_or_module_has_the_name_of_a_public_function(self) -> None:
        functions = {name for name in tightfit.__all__ if name.islower()}
        assert not functions & {part for module in _modules() for part in module.split(".")[1:]}

    def test_every_room_can_be_imported_by_its_dotted_name(self) -> None:
        program = (
            "import importlib, sys, types\n"
            "for name in sys.argv[1:]:\n"
            "    exec(f'import {name} as found')\n"
            "    assert isinstance(found, types.ModuleType) and found.__name__ == name, name\n"
        )
        names = [name for name in _modules() if not name.endswith(("__main__", "nanogpt_loop"))]
        subprocess.run([sys.executable, "-c", program, *names], check=True, timeout=120, env=environment())

    def test_module_names_are_unique(self) -> None:
        names = Counter(path.stem for path in _modules().values() if not path.stem.startswith("__"))
        assert [name for name, count in names.items() if count > 1] == []

    def test_errors_are_one_family_and_have_exit_codes(self) -> None:
        family = [value for value in vars(tightfit).values() if isinstance(value, type)]
        errors = [kind for kind in family if issubclass(kind, Exception)]
        assert all(issubclass(kind, tightfit.TightfitError) for kind in errors)
        assert {kind.__name__: kind.exit_code for kind in errors} == dict.fromkeys(
            (kind.__name__ for kind in errors), 2
        ) | {"DoesNotFit": 1}


FLOORS = [
    ("errors", "units", "display", "tables", "syntax"),
    ("wording",),
    ("foreign", "packages", "storage", "config", "gpus"),
    ("links",),
    ("allocator", "kernels", "models", "data"),
    ("vgpu", "system"),
    ("oomlog", "trainer"),
    ("simulation",),
    ("planner",),
    ("diagnosis", "questions"),
    ("report",),
    ("cli",),
]
"""Rooms from the ground up: each imports from lower ones only. The package's face may import from all."""
MAY_NOT_SEE = {
    "models": {"gpus"},
    "data": {"gpus", "config"},
    "vgpu": {"models", "data", "config"},
    "simulation": {"oomlog"},
}
"""Rooms that are below, and of which a room still knows nothing."""


@functools.cache
def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, but for type checking."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not isinstance(node, ast.If) or "TYPE_CHECKING" not in ast.dump(node.test)
    ]
    for node in ast.walk(tree):
        assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path}: imports are written in full"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tightfit"):
            below = [f"{node.module}.{name.name}" for name in node.names]
            found |= {name if _file_of(name) else node.module for name in below}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("tightfit")}
    return found


def _file_of(module: str) -> Path | None:
    base = SOURCE.joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _modules() -> dict[str, Path]:
    paths = sorted(SOURCE.rglob("*.py"))
    return {
        ".".join(["tightfit", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in paths
    }


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


class TestArrows:
    def test_every_room_imports_from_lower_ones_only(self) -> None:
        floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
        for module, path in _modules().items():
            room = _room(module)
            if room not in floor_of:
                assert room in ("", "__main__"), f"{room} has no floor yet"
                continue
            for target in map(_room, imports(path)):
                assert target == room or floor_of[target] < floor_of[room], f"{module} imports {target}"
                assert target not in MAY_NOT_SEE.get(room, ()), f"{module} imports {target}"

    def test_nothing_below_imports_the_command_line(self) -> None:
        for module, path in _modules().items():
            if _room(module) not in ("cli", "__main__"):
                assert not any(_room(target) == "cli" for target in imports(path)), module

    def test_no_cycles(self) -> None:
        graph = {module: imports(path) - {module} for module, path in _modules().items()}
        done: set[str] = set()

        def visit(module: str, path: tuple[str, ...]) -> None:
            assert module not in path, " -> ".join([*path[path.index(module) :], module])
            if module not in done:
                for target in sorted(graph.get(module, ())):
                    visit(target, (*path, module))
                done.add(module)

        for module in graph:
            visit(module, ())

    def test_the_ground_needs_no_torch(self) -> None:
        for module, path in _modules().items():
            rooms = ("", "errors", "units", "config", "gpus", "links", "data", "allocator", "oomlog", "wording")
            if _room(module) in rooms or module == "tightfit.models.shape":
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
                    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                    assert not any(name.split(".")[0] == "torch" for name in names), module


class TestOneParser:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["plan", "--gpu"], "--gpu needs a value; write --gpu='RTX 3060 12GB'"),
            (["plan", "--html="], "--html needs a value; write --html=page.html"),
            (["plan", "--batch_sise=4"], "--batch_sise is not a key; did you mean --batch_size?"),
            (["watch", "--intervall=3"], "--intervall=3 is not an option; did you mean --interval?"),
            (["convert", "a", "b", "c"], "c is one word too many; tightfit convert --help lists the options"),
            (["convert"], "source, target is missing; tightfit convert --help shows an example"),
            (["dryrun", "x.py"], "--gpu is missing; tightfit dryrun --help shows an example"),
            (["dryrun", "--gpu=T4", "--torch=1.13", "x.py"], "torch takes a version of torch 2, such as 2.8"),
            (["watch", "--interval=often"], "--interval: invalid float value: 'often'; tightfit watch --help explains"),
        ],
    )
    def test_a_mistake_is_one_sentence(self, words: list[str], said: str, tmp_path: Path) -> None:
        assert refusal(words, out_dir=tmp_path).startswith(said)

    @pytest.mark.parametrize("shell", ["bash", "zsh"])
    def test_completion_knows_commands_options_and_keys(self, shell: str) -> None:
        done = here(["completion", shell])
        assert done.code == 0
        assert all(word in done.out for word in (*commands(), "--all-gpus", "--gradient_accumulation_steps"))
        if shell == "bash":
            subprocess.run(["bash", "-n"], input=done.out, text=True, check=True, timeout=60)

    @pytest.mark.parametrize("name", RECORDS)
    def test_every_schema_is_printed(self, name: str) -> None:
        done = here(["schema", name])
        assert (done.code, done.err) == (0, "")
        assert "$defs" in json.loads(done.out)

    def test_the_schema_of_a_plan_names_its_fields(self) -> None:
        found = json.loads(here(["schema", "plan"]).out)
        assert found["$defs"]["PlanRow"]["properties"]["peak_bytes"] == {"type": "integer"}
        assert "best" in found["$defs"]["PlanRecord"]["required"]


# Progress


def test_a_host_without_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*given: object) -> int:
        return len(bytearray(2**62))

    monkeypatch.setattr("tightfit.cli.cmd_doctor.run", allocate)
    done = here(["doctor"])
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(r"tightfit: the host's memory, or this process's share of it, is used up; [^\n]+\n", done.err)


def test_progress_is_a_line_now_and_then_where_no_terminal_is(capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress, "_FIRST_S", 0.02)
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    told = iter(lambda: capsys.readouterr().err, "never")
    with progress.shown("reading") as shown:
        first = next(text for text in told if text)
        shown.stage("playing")
        shown.count(1, 3)
        next(text for text in told if "1 of 3 done (" in text)
        shown.count_steps(7)
        next(text for text in told if "playing: 1 of 3 done, 7 optimizer steps so far (" in text)
        shown.stage("playing train.py with bs=8")
        shown.count(0, 1)
        shown.count_steps(1)
        next(text for text in told if "playing train.py with bs=8: 1 optimizer step done (" in text)
    assert re.match(r"tightfit: reading \(\d+ s\)\n", first)
    capsys.readouterr()
    time.sleep(0.1)
    assert not capsys.readouterr().err, "it ends with the block"


def test_progress_of_a_short_command_is_not_shown(capsys) -> None:
    with progress.shown("reading"):
        pass
    assert not capsys.readouterr().err
