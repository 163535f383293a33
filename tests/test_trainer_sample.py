"""Sampling: the cache changes nothing, the draws are bounded, and the command finds model and vocabulary."""

import dataclasses
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CHARACTERS, VOCAB, Done, arguments, here, process
from torch import Tensor, nn

from tightfit.errors import ConfigError
from tightfit.models.model import GPT, GPTConfig
from tightfit.trainer.checkpoint import save
from tightfit.trainer.sample import encode_prompt, generate
from tightfit.trainer.stored import load


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=12, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # sharper than at the start, so that the past matters
    return model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    out_dir = tmp_path_factory.mktemp("trained")
    done = here(arguments(out_dir, data_dir, max_iters=80, lr_decay_iters=80, batch_size=16))
    assert done.code == 0
    return out_dir


def sample(out_dir: Path, data_dir: Path, *words: object) -> Done:
    usual = [f"--out_dir={out_dir}", f"--data_dir={data_dir}", "--device=cpu", "--dtype=float32"]
    return here(["sample", *usual, "--num_samples=2", "--max_new_tokens=30", *words])


def texts(done: Done) -> list[str]:
    assert (done.code, done.err) == (0, "")
    return done.out.split("\n---------------\n")[:-1]


class Uniform(nn.Module):
    """Finds all ids alike."""

    config = GPTConfig(block_size=4, vocab_size=50, n_layer=1, n_head=1, n_embd=1)

    def forward(self, idx: Tensor, **_: object) -> Tensor:
        return torch.zeros(idx.shape[0], 50)


class WithoutCache(nn.Module):
    """A model that computes the whole text anew for each token."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, idx: Tensor, **_: object) -> Tensor:
        return self.model(idx)


class TestGenerate:
    @pytest.mark.parametrize("new", [1, 5, 9, 10, 11, 30], ids=lambda new: f"{3 + new} of 12")
    @pytest.mark.parametrize("top_k", [None, 5])
    def test_the_cache_changes_no_draw(self, model: GPT, new: int, top_k: int | None) -> None:
        """Below, at and across the block size: the same seed draws the same ids with and without it."""
        prompt = torch.tensor([[1, 2, 3]])
        drawn = []
        for one in (model, WithoutCache(model)):
            torch.manual_seed(1)
            drawn.append(generate(one, prompt, new, top_k=top_k))
        assert torch.equal(*drawn)
        assert drawn[0].shape == (1, 3 + new)
        assert torch.equal(drawn[0][:, :3], prompt)

    def test_a_prompt_longer_than_the_block(self, model: GPT) -> None:
        prompt = torch.arange(40)[None]
        drawn = []
        for shown in (prompt, prompt[:, -12:]):
            torch.manual_seed(1)
            drawn.append(generate(model, shown, 5)[:, -5:])
        assert torch.equal(*drawn)

    def test_top_k_1_always_takes_the_likeliest(self, model: GPT) -> None:
        prompt = torch.tensor([[7]])
        drawn = [generate(model, prompt, 20, top_k=1) for _ in range(3)]
        assert torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[0], drawn[2])
        with torch.inference_mode():
            assert drawn[0][0, 1] == model(prompt).argmax()

    def test_seeds_and_temperatures_differ(self, model: GPT) -> None:
        drawn = set()
        for seed, temperature in ((1, 1.0), (2, 1.0), (1, 3.0)):
            torch.manual_seed(seed)
            drawn.add(tuple(generate(model, torch.tensor([[7]]), 20, temperature=temperature)[0].tolist()))
        assert len(drawn) == 3

    def test_a_low_temperature_is_nearly_greedy(self, model: GPT) -> None:
        cold = generate(model, torch.tensor([[7]]), 20, temperature=1e-3)
        assert torch.equal(cold, generate(model, torch.tensor([[7]]), 20, top_k=1))

    def test_ids_from_vocab_size_on_are_never_drawn(self) -> None:
        torch.manual_seed(0)
        drawn = generate(Uniform(), torch.tensor([[0]]), 2000, vocab_size=10)
        assert set(drawn[0].tolist()) == set(range(10))

    def test_top_k_leaves_k(self) -> None:
        class Sloping(Uniform):
            def forward(self, idx: Tensor, **_: object) -> Tensor:
                return torch.linspace(0, 1, 50).expand(idx.shape[0], 50)

        torch.manual_seed(0)
        drawn = generate(Sloping(), torch.tensor([[49]]), 1000, top_k=3)
        assert set(drawn[0].tolist()) == {47, 48, 49}


class TestCommand:
    def test_prints_samples_that_begin_with_the_prompt(self, trained: Path, data_dir: Path) -> None:
        found = texts(sample(trained, data_dir, "--start=Hello"))
        assert len(found) == 2
        assert found[0] != found[1]
        assert all(text.startswith("Hello") and len(text) == 35 for text in found)
        assert set("".join(found)) <= set(CHARACTERS)

    def test_a_trained_model_has_learned_who_follows_whom(self, trained: Path, data_dir: Path) -> None:
        """Greedily drawn pairs are the commonest ones of the training text: it is the trained weights that speak."""
        ids = np.fromfile(data_dir / "tiny" / "train.bin", dtype="<u2").astype(int)
        counts = np.zeros((VOCAB, VOCAB), dtype=int)
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
        drawn = [CHARACTERS.index(c) for c in texts(sample(trained, data_dir, "--start=a", "--top_k=1"))[0]]
        likeliest = sum(counts[one].argmax() == other for one, other in itertools.pairwise(drawn))
        assert likeliest > 15  # of 30; an untrained model gets 0 or 1

    def test_the_seed_decides(self, trained: Path, data_dir: Path) -> None:
        one, same, other = (sample(trained, data_dir, "--start=ab", f"--seed={seed}").out for seed in (1, 1, 2))
        assert one == same != other

    def test_a_prompt_from_a_file(self, trained: Path, data_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "prompt.txt").write_text("From a file\n")
        found = texts(sample(trained, data_dir, f"--start=FILE:{tmp_path / 'prompt.txt'}"))
        assert found[0].startswith("From a file\n")

    @pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
    def test_a_file_that_cannot_be_read(
        self, trained: Path, data_dir: Path, tmp_path: Path, content: bytes | None
    ) -> None:
        if content:
            (tmp_path / "prompt.txt").write_bytes(content)
        done = sample(trained, data_dir, f"--start=FILE:{tmp_path / 'prompt.txt'}")
        assert done.code == 2
        assert re.fullmatch(r"tightfit: start=FILE:.*: the file cannot be read as UTF-8 text .*\n", done.err)

    def test_an_unknown_character_in_the_prompt(self, trained: Path, data_dir: Path) -> None:
        done = sample(trained, data_dir, "--start=café")
        assert done.code == 2
        assert re.fullmatch(r"tightfit: .*é.*\n", done.err)

    def test_an_empty_prompt(self, trained: Path, data_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").touch()
        done = sample(trained, data_dir, f"--start=FILE:{tmp_path / 'empty.txt'}")
        assert (done.code, done.err) == (2, "tightfit: the prompt has no tokens; give some text with --start\n")

    def test_a_missing_vocabulary(self, trained: Path, tmp_path: Path) -> None:
        done = sample(trained, tmp_path)
        assert done.code == 2
        assert re.fullmatch(
            r"tightfit: .*ckpt\.pt was trained on the dataset 'tiny', whose vocabulary is not in .*; "
            r"make it again with tightfit prepare tiny --input PATH --data_dir=\S+, or set --data_dir to its folder\n",
            done.err,
        )

    def test_a_padded_vocabulary_is_never_drawn_from(self, tmp_path: Path, data_dir: Path) -> None:
        """Drawn from a model that has learned next to nothing: three in four ids would mean nothing."""
        assert here(arguments(tmp_path, data_dir, vocab_size=256, max_iters=1)).code == 0
        found = texts(sample(tmp_path, data_dir, "--max_new_tokens=200", "--temperature=100", "--top_k=256"))
        assert set("".join(found)) <= set(CHARACTERS)
        assert len(set(found[0])) > 40

    def test_the_best_model_speaks_not_the_last(self, trained: Path, data_dir: Path, tmp_path: Path) -> None:
        """ckpt.pt is the best where always_save_checkpoint is off; last.pt is there to resume."""
        folder = shutil.copytree(trained, tmp_path / "run")
        expected = sample(folder, data_dir).out
        best = load(folder / "ckpt.pt")
        spoiled = {name: torch.zeros_like(tensor) for name, tensor in best.model.items()}
        save(folder, dataclasses.replace(best, model=spoiled, step=best.step + 1), name="last.pt")
        assert sample(folder, data_dir).out == expected
        (folder / "ckpt.pt").write_bytes(b"")
        done = sample(folder, data_dir)
        assert done.code == 0
        assert "is cut or damaged; using" in done.err
        assert done.out != expected
        (folder / "last.pt").write_bytes(b"")
        done = sample(folder, data_dir)
        assert (done.code, done.out) == (2, "")
        assert "holds no undamaged checkpoint" in done.err
        assert "scratch" not in done.err, "that is for training"

    def test_a_folder_without_a_model(self, tmp_path: Path, data_dir: Path) -> None:
        done = sample(tmp_path, data_dir)
        assert (done.code, done.out) == (2, "")
        assert done.err == (
            f"tightfit: there is no checkpoint in {tmp_path}; train a model there, or name another --out_dir\n"
        )

    def test_from_a_path(self, trained: Path, data_dir: Path, tmp_path: Path) -> None:
        expected = sample(trained, data_dir).out
        assert sample(tmp_path, data_dir, f"--init_from={trained / 'ckpt.pt'}").out == expected

    def test_as_a_real_process(self, trained: Path, data_dir: Path) -> None:
        words = ["sample", f"--out_dir={trained}", f"--data_dir={data_dir}", "--num_samples=1", "--max_new_tokens=5"]
        done = process([*words, "--start=xyz", "--device=cpu"])
        assert (done.code, done.err) == (0, "")
        assert re.fullmatch(r"xyz[\w \n]{5}\n-{15}\n", done.out)


class TestPrompt:
    class Numbers:
        """A tokenizer whose text is numbers."""

        def encode(self, text: str, *, allow_eot: bool = False) -> list[int]:
            assert allow_eot
            return [int(word) for word in text.split()]

    def test_ids_that_the_model_does_not_know_are_refused(self) -> None:
        assert encode_prompt(self.Numbers(), "1 9", 10) == [1, 9]  # type: ignore[arg-type]
        with pytest.raises(
            ConfigError, match="the prompt has token 10, but the model knows only those below 10; sample with"
        ):
            encode_prompt(self.Numbers(), "1 10", 10)  # type: ignore[arg-type]
