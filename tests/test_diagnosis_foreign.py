"""Configurations and models of other programs: what `tightfit explain` reads from them and changes in them."""

import json
import subprocess
from pathlib import Path

import pytest

from tightfit.cli.main import main

LOG = """\
Traceback (most recent call last):
  File "/x/transformers/models/llama/modeling_llama.py", line 700, in forward
    hidden_states = self.mlp(hidden_states)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.91 GiB. GPU 0 has a total capacity of 23.64 GiB of which
 1.20 GiB is free. Process 123 has 22.43 GiB memory in use. Of the allocated memory 20.50 GiB is allocated by PyTorch,
 and 1.40 GiB is reserved by PyTorch but unallocated.
"""
LLAMA_FACTORY = """\
model_name_or_path: gpt2
finetuning_type: lora  # the adapter
per_device_train_batch_size: 8  # sequences
cutoff_len: 1024
"""
DEEPSPEED = """\
{
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 3}
}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("oom.log").write_text(LOG)
    return tmp_path


def explain(*words: str) -> int:
    return main(["explain", "oom.log", *words])


def test_a_diff_applies_with_patch(capsys: pytest.CaptureFixture[str]):
    Path("sft.yaml").write_text(LLAMA_FACTORY)
    assert explain("--config", "sft.yaml", "--fix") == 0
    shown = capsys.readouterr()
    assert Path("sft.yaml").read_text() == LLAMA_FACTORY
    assert "batch 2 x accumulation 4 instead of 8 x 1" in shown.err
    subprocess.run(["patch", "sft.yaml"], input=shown.out, text=True, check=True, capture_output=True)
    patched = Path("sft.yaml").read_text()
    changed = LLAMA_FACTORY.replace("size: 8", "size: 2") + "gradient_accumulation_steps: 4\n"
    assert patched == changed


def test_write_changes_only_the_values(capsys: pytest.CaptureFixture[str]):
    Path("ds.json").write_text(DEEPSPEED)
    assert explain("--config", "ds.json", "--fix", "--write") == 0
    assert Path("ds.json").read_text() == DEEPSPEED.replace('gpu": 4', 'gpu": 1').replace('steps": 2', 'steps": 8')
    assert '-    "train_micro_batch_size_per_gpu": 4,\n' in capsys.readouterr().out


def test_line_ends_of_windows_stay():
    Path("sft.yaml").write_bytes(LLAMA_FACTORY.replace("\n", "\r\n").encode())
    assert explain("--config", "sft.yaml", "--fix", "--write") == 0
    after = Path("sft.yaml").read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n") == 5
    assert b"size: 2  # sequences\r\n" in after


def test_a_key_that_stands_twice_is_left_alone(capsys: pytest.CaptureFixture[str]):
    text = 'train:\n  "per_device_train_batch_size": 8\neval:\n  per_device_train_batch_size: 8\n'
    Path("sft.yaml").write_text(text)
    assert explain("--config", "sft.yaml", "--fix", "--write") in (0, 1)
    assert Path("sft.yaml").read_text().startswith(text)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--fix"], "--fix changes a configuration file; name it with --config FILE"),
        (["--config", "sft.yaml", "--write"], "--write changes the file as --fix shows it; give both"),
        (["--config", "sft.yaml", "--fix", "--json"], "--fix prints a diff, and --json a record; give one of them"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], rule: str, capsys: pytest.CaptureFixture[str]):
    Path("sft.yaml").write_text(LLAMA_FACTORY)
    assert explain(*words) == 2
    assert rule in capsys.readouterr().err


def test_a_key_that_is_not_there_is_added_to_json():
    Path("ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}')
    assert explain("--config", "ds.json", "--fix", "--write") == 0
    after = json.loads(Path("ds.json").read_text())
    assert after == {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}


QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "vocab_size": 151936,
}


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "qwen", "qwen/config.json"])
def test_a_model_is_given_by_its_name_or_its_folder(model: str, capsys: pytest.CaptureFixture[str]):
    Path("qwen").mkdir()
    Path("qwen/config.json").write_text(json.dumps(QWEN))
    assert explain("--model", model) == 0
    assert "Qwen3 8B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--model=Lama 3 8B"], "nor a model whose sizes are known, such as Llama 3 8B"),
        (["--model=oom.log"], "oom.log describes no model"),
        (["--model=Qwen3-8B", "--n_layer=2"], "the configuration of tightfit train has its own model"),
    ],
)
def test_what_is_no_model_is_one_sentence(words: list[str], rule: str, capsys: pytest.CaptureFixture[str]):
    assert explain(*words) == 2
    assert rule in capsys.readouterr().err
