"""What a plan knows of the weights that a run starts from, and what is refused before anything is planned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import arguments, here

from tightfit.cli.main import main
from tightfit.config import TrainConfig, read_config
from tightfit.errors import CheckpointError
from tightfit.planner.planning import make_plan, named_card, with_shape

PARAMETERS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
"""As transformers' GPT2LMHeadModel.num_parameters() counts them."""


@pytest.mark.slow
def test_a_plan_is_of_the_weights_that_the_run_starts_from(own_cache: Path) -> None:
    resolved = read_config(TrainConfig, ["--init_from=gpt2", "--compile=False", "--n_layer=2", "--n_embd=24"])
    best = make_plan(resolved, named_card("RTX 4090")).choice.best
    assert best is not None
    assert best.parameters == PARAMETERS["gpt2"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_name_has_its_shape(name: str) -> None:
    from tightfit.models.model import GPT, GPTConfig

    config = with_shape(TrainConfig(init_from=name))
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    with torch.device("meta"):
        model = GPT(GPTConfig(**{key: getattr(config, key) for key in keys}))
    assert model.count_parameters() == PARAMETERS[name]


def test_a_checkpoint_and_a_folder_have_theirs(tmp_path: Path, data_dir: Path) -> None:
    out = tmp_path / "out"
    assert here(arguments(out, data_dir, n_layer=3, max_iters=2, eval_interval=1)).code == 0
    assert main(["convert", str(out / "ckpt.pt"), str(tmp_path / "folder")]) == 0
    for start in ({"init_from": "resume", "out_dir": str(out)}, {"init_from": str(tmp_path / "folder")}):
        config = with_shape(TrainConfig(n_layer=12, n_embd=768, **start))
        own = json.loads((tmp_path / "folder" / "config.json").read_text())
        assert (config.n_layer, config.n_embd) == (3, own["n_embd"])
        assert config.block_size == own["n_positions"], "not longer than its positions"


@pytest.mark.parametrize("damage", ["cut", "no checkpoint at all", "no dataset"])
def test_a_run_that_cannot_start_is_refused_before_it_is_planned(
    damage: str, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 124M on the processor: its plan alone takes longer than this may."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    out.mkdir()
    if damage == "cut":
        assert here(arguments(out, data_dir, max_iters=2, eval_interval=1)).code == 0
        for path in out.glob("*.pt"):
            path.write_bytes(path.read_bytes()[:-1000])
    dataset = "nowhere" if damage == "no dataset" else "tiny"
    words = ["train", "--device=cpu", f"--out_dir={out}", f"--data_dir={data_dir}", f"--dataset={dataset}"]
    words += ["--init_from=resume", "--supervise=False", "--memory=6GiB"]
    ended = subprocess.run([sys.executable, "-m", "tightfit", *words], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ("dataset" if damage == "no dataset" else "checkpoint") in ended.stderr
    assert not list((tmp_path / "cache").rglob("*.json")), "nothing was measured or traced"


def test_a_folders_word_is_not_taken_for_its_weights(tmp_path: Path, data_dir: Path) -> None:
    """A model of two billion blocks would be planned for, until memory is out."""
    assert here(arguments(tmp_path / "out", data_dir, max_iters=1, eval_interval=1)).code == 0
    assert main(["convert", str(tmp_path / "out" / "ckpt.pt"), str(tmp_path / "folder")]) == 0
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "n_layer": 2**31 - 1}))
    with pytest.raises(CheckpointError, match="has weights of 2 blocks"):
        with_shape(TrainConfig(init_from=str(tmp_path / "folder")))
    (tmp_path / "folder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        with_shape(TrainConfig(init_from=str(tmp_path / "folder")))
