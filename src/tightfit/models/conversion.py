"""GPT-2 checkpoints between nanoGPT's names and Hugging Face's folders, and the checks that both must pass.

Both name a model's tensors alike. Hugging Face stores the four matrices of a block as (in, out) where nanoGPT
has (out, in), leaves the tied `lm_head.weight` out, and always has biases. Nothing here is unpickled, and all
shapes are compared with the configuration before a model is built.
"""

import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from reprlib import repr as brief

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tightfit.config import PRETRAINED
from tightfit.errors import CheckpointError, ConfigError
from tightfit.models.hub import CONFIG, WEIGHTS, download, read_json, read_tensors, tensor_names
from tightfit.models.model import GPT2_VOCAB, GPTConfig
from tightfit.storage import sync_file
from tightfit.wording import say

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TIED = "lm_head.weight", "transformer.wte.weight"
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")
"""Causal masks, which older versions of both programs keep as buffers."""
_WRAPPERS = {"_orig_mod", "module"}
"""Parts of names that torch.compile and DistributedDataParallel add."""
_WITHOUT_BIAS = {"bias": False}
"""Under `tightfit` in config.json: the biases are there for transformers only. Believed if they are all 0."""
_EXACT_GELU = ("gelu", "gelu_python")
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
_FIXED = {
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
"""Settings of transformers' GPT2Config that the model here has no choice in, at their defaults there."""


def parameter_shapes(config: GPTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor in nanoGPT's state dict, in order; lazy: `config` may be a stranger's."""
    c = config.n_embd
    yield "transformer.wte.weight", (config.vocab_size, c)
    yield "transformer.wpe.weight", (config.block_size, c)
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        yield from _layer(f"{block}.ln_1", (c,), config.bias)
        yield from _layer(f"{block}.attn.c_attn", (3 * c, c), config.bias)
        yield from _layer(f"{block}.attn.c_proj", (c, c), config.bias)
        yield from _layer(f"{block}.ln_2", (c,), config.bias)
        yield from _layer(f"{block}.mlp.c_fc", (4 * c, c), config.bias)
        yield from _layer(f"{block}.mlp.c_proj", (c, 4 * c), config.bias)
    yield from _layer("transformer.ln_f", (c,), config.bias)
    yield "lm_head.weight", (config.vocab_size, c)


def check_state(config: GPTConfig, state_dict: Mapping[str, object]) -> None:
    """Raise CheckpointError unless `state_dict` holds exactly the floating-point tensors of a GPT of `config`."""
    names = set()
    for name, shape in parameter_shapes(config):
        _checked(state_dict, name, shape)
        names.add(name)
    for name in state_dict:
        if name not in names:
            raise _not_of(config, name)
    head, embedding = (_checked(state_dict, name, (config.vocab_size, config.n_embd)) for name in _TIED)
    if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
        raise CheckpointError(say("models.conversion.untied", head=_TIED[0], embedding=_TIED[1]))


def strip_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return nanoGPT's plain names: drop the prefixes of torch.compile and DDP, and old versions' attention masks."""

    def plain(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in _WRAPPERS)

    return _renamed(state_dict, plain)


def load_hugging_face(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Load the GPT-2 of a local Hugging Face folder: `config.json` and safetensors, whole or in shards.

    Dropout is the folder's `resid_pdrop`; whoever trains sets their own. CheckpointError for a folder that is
    incomplete, broken, pickled, or of a model that computes something else.
    """
    config, has_biases = _read_config(folder / CONFIG)
    tensors = _renamed(read_tensors(folder), lambda name: name.removeprefix("transformer."))
    if "wte.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["wte.weight"])
    state = {}
    for name, shape in parameter_shapes(config):
        theirs = name.removeprefix("transformer.")
        transposed = name.endswith(_TRANSPOSED)
        tensor = _checked(tensors, theirs, shape[::-1] if transposed else shape)
        state[name] = tensor.t().contiguous() if transposed else tensor
        del tensors[theirs]
    if tensors:
        raise _not_of(config, min(tensors))
    biases = [name for name in state if name.endswith(".bias")]
    if not has_biases and not any(state[name].any() for name in biases):
        config = replace(config, bias=False)
        for name in biases:
            del state[name]
    check_state(config, state)
    return config, state


def save_hugging_face(folder: Path, config: GPTConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Write a new folder that transformers' GPT2LMHeadModel loads; it appears whole or not at all.

    A model without biases gets zeros, and a note in `config.json` by which `load_hugging_face` removes them.
    """
    check_state(config, state_dict)
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(say("models.conversion.exists", folder=folder))
    work = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        work.mkdir(parents=True)
        save_file(_their_tensors(config, state_dict), work / WEIGHTS, metadata={"format": "pt"})
        (work / CONFIG).write_text(_their_config(config))
        shutil.copymode(work / CONFIG, work / WEIGHTS)  # safetensors lets only the owner read
        for path in (work / WEIGHTS, work / CONFIG):
            sync_file(path)
        work.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(say("models.conversion.unwritable", folder=folder, reason=error)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fetch_pretrained(name_or_path: str | Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Load OpenAI's GPT-2 of that name, from the Hugging Face cache or its Hub, or a local folder's model."""
    name = str(name_or_path)
    return load_hugging_face(download(name) if name in PRETRAINED else _folder(name))


def pretrained_shape(name_or_path: str | Path) -> GPTConfig:
    """Return the shape of the model that `fetch_pretrained` loads, without reading any weights."""
    name = str(name_or_path)
    if name in PRETRAINED:
        return GPTConfig(**asdict(PRETRAINED[name]), activation="gelu_tanh")
    folder = _folder(name)
    config, has_biases = _read_config(folder / CONFIG)
    found = (re.match(r"(?:transformer\.)?h\.([0-9]{1,6})\.", each) for each in tensor_names(folder))
    blocks = len({int(each[1]) for each in found if each})
    if blocks != config.n_layer:
        raise CheckpointError(say("models.conversion.blocks", folder=folder, blocks=blocks, n_layer=config.n_layer))
    return replace(config, bias=has_biases)


def _folder(name: str) -> Path:
    if not Path(name).is_dir():
        raise CheckpointError(say("models.conversion.no_folder", name=name, known=", ".join(PRETRAINED)))
    return Path(name)


def _layer(name: str, weight: tuple[int, ...], bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", weight
    if bias:
        yield f"{name}.bias", weight[:1]


def _not_of(config: GPTConfig, name: object) -> CheckpointError:
    return CheckpointError(say("models.conversion.no_part", name=brief(name), layers=config.n_layer, bias=config.bias))


def _checked(tensors: Mapping[str, object], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(say("models.conversion.missing", name=name, shape=str(shape)))
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
        found = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CheckpointError(say("models.conversion.no_floats", name=name, found=found))
    if tensor.is_meta or tensor.layout is not torch.strided:
        sentence = say("models.conversion.empty" if tensor.is_meta else "models.conversion.sparse", name=name)
        raise CheckpointError(sentence)
    if tuple(tensor.shape) != shape:
        found = str(tuple(tensor.shape))
        raise CheckpointError(say("models.conversion.other_shape", name=name, found=found, shape=str(shape)))
    return tensor


def _renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(say("models.conversion.no_name", name=brief(name)))
        new = rename(name)
        if new in renamed:
            raise CheckpointError(say("models.conversion.twice", name=brief(new), alias=brief(name)))
        if not new.endswith(_MASKS):
            renamed[new] = tensor
    return renamed


def _read_config(path: Path) -> tuple[GPTConfig, bool]:
    """Return the shape in a config.json, and False if its biases are there for transformers only."""
    settings = read_json(path)

    def wrong(name: str, rule: object) -> CheckpointError:
        if name not in settings:
            return CheckpointError(say("models.conversion.no_setting", path=path, name=name, rule=rule))
        found = f"{name}={brief(settings[name])}"
        return CheckpointError(say("models.conversion.other_setting", path=path, found=found, rule=rule))

    def size(name: str) -> int:
        value = settings.get(name)
        if type(value) is not int or not 0 < value < 2**31:
            raise wrong(name, say("models.conversion.size_rule"))
        return value

    for name, fixed in {"model_type": "gpt2", **_FIXED}.items():
        if settings.get(name, _FIXED.get(name)) != fixed:
            raise wrong(name, fixed)
    activation, dropout = settings.get("activation_function", "gelu_new"), settings.get("resid_pdrop", 0.1)
    if activation not in _EXACT_GELU + _TANH_GELU:
        known = ", ".join(_EXACT_GELU + _TANH_GELU)
        raise wrong("activation_function", say("models.conversion.choice_rule", known=known))
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise wrong("resid_pdrop", say("models.conversion.fraction_rule"))
    try:
        config = GPTConfig(
            block_size=size("n_positions"),
            vocab_size=size("vocab_size"),
            n_layer=size("n_layer"),
            n_head=size("n_head"),
            n_embd=size("n_embd"),
            dropout=float(dropout),
            activation="gelu" if activation in _EXACT_GELU else "gelu_tanh",
        )
    except ConfigError as error:
        raise CheckpointError(say("models.conversion.unusable", path=path, reason=error)) from None
    if settings.get("n_inner") not in (None, 4 * config.n_embd):
        raise wrong("n_inner", say("models.conversion.width_rule", width=4 * config.n_embd))
    return config, settings.get("tightfit") != _WITHOUT_BIAS


def _their_tensors(config: GPTConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name, shape in parameter_shapes(replace(config, bias=True)):
        if name == _TIED[0]:
            continue
        if name in state_dict:
            tensor = state_dict[name]
            tensors[name] = (tensor.t() if name.endswith(_TRANSPOSED) else tensor).contiguous()
        else:
            tensors[name] = torch.zeros(shape, dtype=state_dict[name.removesuffix("bias") + "weight"].dtype)
    return tensors


def _their_config(config: GPTConfig) -> str:
    end_of_text = GPT2_VOCAB - 1 if config.vocab_size >= GPT2_VOCAB else None
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        **_FIXED,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        **({} if config.bias else {"tightfit": _WITHOUT_BIAS}),
    }
    return json.dumps(settings, indent=2) + "\n"
