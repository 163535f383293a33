"""Checkpoints between nanoGPT's names and Hugging Face's folders, whole, sharded, broken and hostile."""

import errno
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tightfit.errors import CheckpointError
from tightfit.models import conversion as convert
from tightfit.models.conversion import (
    check_state,
    fetch_pretrained,
    load_hugging_face,
    parameter_shapes,
    save_hugging_face,
    strip_prefix,
)
from tightfit.models.model import GPT, GPTConfig

State = dict[str, Tensor]


def tiny(**changes: Any) -> GPTConfig:
    return GPTConfig(**{"block_size": 16, "vocab_size": 67, "n_layer": 2, "n_head": 2, "n_embd": 24, **changes})


def build(config: GPTConfig) -> GPT:
    """A model with biases other than zero, where it has any."""
    torch.manual_seed(0)
    model = GPT(config).init_weights().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def assert_same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in expected.items())


@pytest.fixture
def model() -> GPT:
    return build(tiny())


@pytest.fixture
def folder(tmp_path: Path, model: GPT) -> Path:
    """A good Hugging Face folder, for tests to spoil."""
    save_hugging_face(tmp_path / "good", model.config, model.state_dict())
    return tmp_path / "good"


def edit_config(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors, dots written as __; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


def refused(folder: Path) -> str:
    """The one sentence with which this folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_hugging_face(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# There and back


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_bit_for_bit(tmp_path: Path, bias: bool, activation: Any, dtype: torch.dtype) -> None:
    model = build(tiny(bias=bias, activation=activation, dropout=0.1)).to(dtype)
    save_hugging_face(tmp_path / "model", model.config, model.state_dict())
    config, state = load_hugging_face(tmp_path / "model")
    assert config == model.config
    assert_same(state, model.state_dict())
    GPT(config).load_state_dict(state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_transformers_loads_what_is_saved(tmp_path: Path, bias: bool, activation: Any) -> None:
    from transformers import GPT2LMHeadModel  # seconds that collecting the tests does not need

    model = build(tiny(bias=bias, activation=activation))
    save_hugging_face(tmp_path / "model", model.config, model.state_dict())
    other, report = GPT2LMHeadModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    idx = torch.randint(67, (2, 16))
    with torch.no_grad():
        logits = other.eval()(idx).logits
        torch.testing.assert_close(logits, model.lm_head(model.hidden(idx)), atol=1e-5, rtol=1e-5)
        if not bias:
            assert not any(x.any() for name, x in other.state_dict().items() if name.endswith(".bias"))
    other.save_pretrained(tmp_path / "theirs")
    config, state = load_hugging_face(tmp_path / "theirs")
    assert config == model.config
    assert_same(state, model.state_dict())


def test_biases_trained_elsewhere_are_kept(tmp_path: Path) -> None:
    """The note that a model has no biases travels on with it; it holds only while they are zero."""
    model = build(tiny(bias=False))
    save_hugging_face(tmp_path / "model", model.config, model.state_dict())
    edit_tensors(tmp_path / "model", transformer__ln_f__bias=torch.ones(24))
    config, state = load_hugging_face(tmp_path / "model")
    assert config == tiny(bias=True)
    assert state["transformer.ln_f.bias"].sum() == 24
    assert not state["transformer.h.0.ln_1.bias"].any()


def test_zero_biases_of_others_are_biases(tmp_path: Path) -> None:
    model = GPT(tiny()).init_weights()
    save_hugging_face(tmp_path / "model", model.config, model.state_dict())
    assert load_hugging_face(tmp_path / "model")[0].bias


def test_hub_files_have_no_prefix_and_old_ones_masks(folder: Path, model: GPT) -> None:
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    bare |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    save_file(bare, folder / "model.safetensors")
    assert_same(load_hugging_face(folder)[1], model.state_dict())


def test_shards(folder: Path, model: GPT) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load_hugging_face(folder)[1], model.state_dict())

    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors cannot be read" in refused(folder)


@pytest.mark.parametrize("shard", ["../good/model.safetensors", "/etc/passwd", "model.bin", "", "sub/x.safetensors"])
def test_shards_lie_beside_their_index(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").rename(folder / "elsewhere")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
    assert "only .safetensors files beside it are read" in refused(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"wte.weight": 1}}])
def test_an_index_maps_names_to_files(folder: Path, index: dict[str, Any]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "must map tensors to files under weight_map" in refused(folder)


# What is refused


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_a_pickle_is_never_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    message = refused(folder)
    assert "as a pickle (pytorch_model.bin), which can run code when opened" in message
    assert "convert it to model.safetensors" in message
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "has model_type='llama'; it must be gpt2"),
        ({"model_type": ["gpt2"]}, "has model_type=['gpt2']; it must be gpt2"),
        ({"layer_norm_epsilon": 1e-6}, "has layer_norm_epsilon=1e-06; it must be 1e-05"),
        ({"tie_word_embeddings": False}, "has tie_word_embeddings=False; it must be True"),
        ({"scale_attn_weights": False}, "has scale_attn_weights=False; it must be True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx=True; it must be False"),
        ({"reorder_and_upcast_attn": True}, "has reorder_and_upcast_attn=True; it must be False"),
        ({"add_cross_attention": True}, "has add_cross_attention=True; it must be False"),
        ({"activation_function": "relu"}, "has activation_function='relu'; it must be one of gelu, "),
        ({"activation_function": {}}, "has activation_function={}; it must be one of gelu, "),
        ({"n_inner": 100}, "has n_inner=100; it must be null or 4 * n_embd = 96"),
        ({"n_layer": "2"}, "has n_layer='2'; it must be an integer from 1"),
        ({"n_layer": True}, "has n_layer=True; it must be an integer from 1"),
        ({"n_head": 0}, "has n_head=0; it must be an integer from 1"),
        ({"n_embd": 10**400}, "it must be an integer from 1"),
        ({"n_embd": None}, "has n_embd=None; it must be an integer from 1"),
        ({"n_head": 5}, "cannot be used: n_embd=24 must be a multiple of n_head=5"),
        ({"resid_pdrop": 10**400}, "it must be at least 0 and below 1"),
        ({"resid_pdrop": float("nan")}, "has resid_pdrop=nan; it must be at least 0 and below 1"),
        ({"vocab_size": 68}, "tensor wte.weight has shape (67, 24), but its configuration asks for (68, 24)"),
        ({"n_positions": 2**31 - 1}, "tensor wpe.weight has shape (16, 24), but its configuration asks for"),
        ({"n_layer": 3}, "tensor h.2.ln_1.weight of shape (24,) is missing"),
        ({"n_layer": 2**31 - 1}, "tensor h.2.ln_1.weight of shape (24,) is missing"),
        ({"n_layer": 1}, "tensor 'h.1.attn.c_attn.bias' is no part of a GPT-2 of 1 layers"),
    ],
)
def test_another_model_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    edit_config(folder, **change)
    assert message in refused(folder)


def test_a_missing_setting_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert "config.json has no n_positions; it must be an integer from 1" in refused(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\x80\x04", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"n_embd": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b"[]", "must hold a JSON object, found list"),
        (b'"' + b"x" * 2**20 + b'"', "is larger than 1048576 bytes"),
    ],
)
def test_an_odd_config_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert message in refused(folder)


def test_missing_files_are_named(tmp_path: Path, folder: Path) -> None:
    assert f"{tmp_path}/none/config.json cannot be read: No such file" in refused(tmp_path / "none")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors cannot be read: No such file" in refused(folder)


def test_an_endless_config_is_not_read_to_its_end(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    assert "is larger than 1048576 bytes" in refused(folder)


def test_wrong_tensors_are_named(folder: Path) -> None:
    edit_tensors(folder, transformer__h__0__attn__c_attn__weight=torch.zeros(72, 24))  # nanoGPT's way round
    expected = "tensor h.0.attn.c_attn.weight has shape (72, 24), but its configuration asks for (24, 72)"
    assert expected in refused(folder)
    edit_tensors(folder, transformer__h__0__attn__c_attn__weight=torch.zeros(24, 72, 1))
    assert "has shape (24, 72, 1), but" in refused(folder)
    edit_tensors(folder, transformer__h__0__attn__c_attn__weight=torch.zeros(24, 72, dtype=torch.int32))
    assert "h.0.attn.c_attn.weight must be a tensor of floating-point numbers, found torch.int32" in refused(folder)
    edit_tensors(folder, transformer__h__0__attn__c_attn__weight=None)
    assert "tensor h.0.attn.c_attn.weight of shape (24, 72) is missing" in refused(folder)


def test_spare_and_double_tensors_are_named(folder: Path) -> None:
    edit_tensors(folder, score__weight=torch.zeros(2, 24))
    assert "tensor 'score.weight' is no part of a GPT-2 of 2 layers with bias=True" in refused(folder)
    edit_tensors(folder, score__weight=None, wte__weight=torch.zeros(67, 24))
    assert "tensor 'wte.weight' is there twice" in refused(folder)


def test_an_output_matrix_of_its_own_is_refused(folder: Path) -> None:
    edit_tensors(folder, lm_head__weight=torch.zeros(67, 24))
    assert "lm_head.weight and transformer.wte.weight differ" in refused(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "model.safetensors cannot be read: " in refused(folder)


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}", b"PK\x03\x04" * 9],
)
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    refused(folder)


# Saving


def test_saving_never_touches_what_is_there(folder: Path, model: GPT) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="exists; name a new folder, or remove it first"):
        save_hugging_face(folder, model.config, model.state_dict())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path, model: GPT) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b"):
        save_hugging_face(target, model.config, model.state_dict())
        assert sorted(path.name for path in target.parent.iterdir() if path.name.startswith(".")) == []
        modes = {path.stat().st_mode for path in target.iterdir()}
        assert len(modes) == 1
        assert_same(load_hugging_face(target)[1], model.state_dict())


@pytest.mark.parametrize("failing", ["save_file", "sync_file"])
def test_a_failed_save_leaves_nothing(
    tmp_path: Path, model: GPT, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, failing, fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device"):
        save_hugging_face(tmp_path / "model", model.config, model.state_dict())
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_state_is_not_saved(tmp_path: Path, model: GPT) -> None:
    with pytest.raises(CheckpointError, match=r"tensor transformer.h.2.ln_1.weight of shape \(24,\) is missing"):
        save_hugging_face(tmp_path / "model", tiny(n_layer=3), model.state_dict())
    assert list(tmp_path.iterdir()) == []


# State dicts


@pytest.mark.parametrize("config", [tiny(), tiny(bias=False), GPTConfig(), GPTConfig(bias=False, n_layer=2)])
def test_shapes_are_the_models(config: GPTConfig) -> None:
    with torch.device("meta"):
        state = GPT(config).state_dict()
    assert list(parameter_shapes(config)) == [(name, tuple(x.shape)) for name, x in state.items()]


def test_prefixes_of_wrappers_and_masks_are_removed(model: GPT) -> None:
    state = model.state_dict()
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    wrapped["module._orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    assert_same(strip_prefix(wrapped), dict(state))
    inner = {name.replace("h.0.", "h.0._orig_mod."): tensor for name, tensor in state.items()}
    assert_same(strip_prefix(inner), dict(state))
    assert strip_prefix(torch.compile(model, backend="eager").state_dict()).keys() == state.keys()


def test_ambiguous_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'a.b' is there twice, once as '_orig_mod.a.b'"):
        strip_prefix({"a.b": torch.ones(1), "_orig_mod.a.b": torch.ones(1)})
    with pytest.raises(CheckpointError, match="a tensor's name must be text, got 3"):
        strip_prefix({3: torch.ones(1)})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.wpe.weight": None}, r"tensor transformer.wpe.weight of shape \(16, 24\) is missing"),
        ({"transformer.wpe.weight": [1.0]}, "must be a tensor of floating-point numbers, found list"),
        ({"transformer.wpe.weight": torch.ones(24, 16)}, r"has shape \(24, 16\), but its config.* \(16, 24\)"),
        ({"transformer.wpe.weight": torch.ones(16, 24).long()}, "floating-point numbers, found torch.int64"),
        ({"extra": torch.ones(1)}, "tensor 'extra' is no part of a GPT-2 of 2 layers with bias=True"),
        ({"lm_head.weight": torch.ones(67, 24)}, "differ, but a GPT-2 has one matrix for both"),
    ],
)
def test_broken_states_are_refused(model: GPT, change: dict[str, Any], message: str) -> None:
    check_state(model.config, model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        check_state(model.config, {**model.state_dict(), **change})


def test_a_copy_of_the_tied_matrix_will_do(model: GPT) -> None:
    check_state(model.config, {name: x.clone() for name, x in model.state_dict().items()})


# Pretrained models


def test_a_local_folder_by_path(folder: Path, model: GPT) -> None:
    for path in (folder, str(folder)):
        assert_same(fetch_pretrained(path)[1], model.state_dict())
    with pytest.raises(CheckpointError, match="gpt3 is neither a folder nor one of gpt2, gpt2-medium"):
        fetch_pretrained("gpt3")


@pytest.mark.parametrize("repository", ["models--openai-community--gpt2-medium", "models--gpt2-medium"])
def test_the_cache_is_used_offline(
    folder: Path, model: GPT, tmp_path: Path, repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"
    (tmp_path / "hub" / repository / "refs").mkdir(parents=True)
    (tmp_path / "hub" / repository / "refs" / "main").write_text(commit)
    (tmp_path / "hub" / repository / "snapshots").mkdir()
    folder.rename(tmp_path / "hub" / repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(fetch_pretrained("gpt2-medium")[1], model.state_dict())


def test_without_cache_and_network_it_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()  # a folder of that name in the way is not the model
    with pytest.raises(CheckpointError) as caught:
        fetch_pretrained("gpt2")
    assert "gpt2 is not in the Hugging Face cache, and the Hub gave LocalEntryNotFoundError" in str(caught.value)
    assert "copy config.json and model.safetensors from https://huggingface.co/openai-community/gpt2" in str(
        caught.value
    )
    assert "--init_from=/path/to/folder" in str(caught.value)


def test_without_the_hub_library_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"fetching gpt2-xl needs pip install 'tightfit\[hf\]'"):
        fetch_pretrained("gpt2-xl")
