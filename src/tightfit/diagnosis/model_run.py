"""The training step to play for a configuration of another program: a causal model, its adapters, its optimizer."""

import json
import re
from collections.abc import Mapping

import msgspec

from tightfit.diagnosis.config_programs import known
from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.foreign_config import Foreign
from tightfit.diagnosis.usual_models import Model
from tightfit.oomlog.run_facts import RunFacts

_FAMILIES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Families of the table of usual models whose sizes alone make their decoder, by Transformers' names."""
_CLOSE = 0.02
"""Share by which the parameters counted from a model's sizes may differ from those that it states."""
_OPTIMIZERS = re.compile(
    r"^(?:adamw?(?:_torch|_hf)?(?:_fused)?|torch\.optim\.AdamW?|sgd|torch\.optim\.SGD|adafactor)$", re.IGNORECASE
)
_EIGHT_BIT = re.compile(r"8[-_]?bit", re.IGNORECASE)
_HALVES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "half": "float16"}
_IN_HALF = frozenset({"axolotl", "torchtune", "swift", "model_config", "named_model"})
"""Programs that keep the weights in the half precision that they compute in."""
_OF_MODEL = frozenset({"model_config", "named_model"})
_PLAYED = _OF_MODEL | {"axolotl", "torchtune", "swift", "llama_factory", "transformers_trainer", "trl"}
"""Programs whose step is Transformers' own, or allocates like it."""
_NOT_IN_STEP = (
    *("qlora", "eight_bit", "gptq", "float8", "other_optimizer", "optimizer_8bit", "in_backward", "host_state"),
    *("host_weights", "selective", "activation_offload", "chunked_loss", "compiled", "other_kernels", "fsdp"),
    *("deepspeed", "spread", "several_models", "frozen", "other_adapter", "saved_modules", "dora"),
)
"""Parts of a configuration that a simulated step does not have, in the order in which they are told."""
_ALL_LINEAR = ("all", "all-linear", "")
_USUAL_TARGETS = ("q_proj", "v_proj")
"""Layers that PEFT adapts in the families of the table where nothing names them."""
_MLP = ("gate_proj", "up_proj", "down_proj")
_OF_ALL = frozenset({"llama_factory", "swift"}) | _OF_MODEL
"""Programs that adapt all linear layers where nothing names them."""
_RANK = 8
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
    "attention_bias",
    "hidden_act",
    "sliding_window",
)
"""Keys of a model's config.json that decide the shapes of its tensors."""


class ModelRun(msgspec.Struct, frozen=True, kw_only=True):
    """A training step on one card. `tightfit.simulation.model_script` takes it as its arguments."""

    name: str
    config: Mapping[str, int | float | bool | str | None]
    batch: int
    accumulation: int
    length: int
    weights: str
    """dtype of the weights."""
    cast: str
    """dtype of autocast; empty without."""
    rank: int
    """Rank of LoRA's adapters; 0 if all parameters are trained."""
    targets: tuple[str, ...] = ()
    """Names of the layers with adapters; empty for all linear ones."""
    optimizer: str
    checkpointing: bool
    batch_name: str
    accumulation_name: str

    def arguments(self) -> tuple[str, ...]:
        """Return the script's arguments; batch and accumulation under the names that the user gave."""
        names = ("config", "length", "weights", "cast", "rank", "targets", "optimizer", "checkpointing")
        options = {name: getattr(self, name) for name in names}
        return (
            json.dumps(options, sort_keys=True),
            f"{self.batch_name}={self.batch}",
            f"{self.accumulation_name}={self.accumulation}",
        )


def parts_not_in_step(foreign: Foreign, run: RunFacts) -> tuple[str, ...]:
    """Return the parts of a configuration that a simulated step does not have; it is played whole or not at all."""
    optimizer = run.texts.get("optimizer", "adamw")
    found = set(foreign.found.parts) if foreign.found is not None else set()
    if _EIGHT_BIT.search(optimizer):
        found.add("optimizer_8bit")
    elif not _OPTIMIZERS.match(optimizer):
        found.add("other_optimizer")
    if re.search(r"[\[(*^$]", run.texts.get("targets", "")):
        found.add("other_adapter")
    return tuple(part for part in _NOT_IN_STEP if part in found)


def can_be_step(foreign: Foreign) -> bool:
    """Return True for a program whose step is one of Transformers."""
    return foreign.program in _PLAYED


def model_run_of(foreign: Foreign, evidence: Evidence) -> ModelRun | None:
    """Return the step to play; None where the model or the batch is not known, or the step is not one of one card."""
    run, numbers = evidence.run, evidence.run.numbers
    config = _config_in(foreign.text) or _config_of(evidence.model)
    batch, length = numbers.get("batch_size"), numbers.get("length")
    is_divided = {"qlora", "four_bit", "quantized_4", "quantized_8"} & run.signs or numbers.get("world_size", 1) > 1
    is_divided = is_divided or numbers.get("zero_stage", 0) > 0 or "fsdp" in run.signs
    is_whole = can_be_step(foreign) and not is_divided and not parts_not_in_step(foreign, run)
    if config is None or not batch or not length or not is_whole:
        return None
    half, optimizer = _half_of(foreign, evidence), run.texts.get("optimizer", "adamw").lower()
    weights = _HALVES.get(run.texts.get("weights", ""))
    keeps_half = bool(half) and (foreign.program in _IN_HALF or "lora" in run.signs or weights is not None)
    has_lora = "lora" in run.signs
    return ModelRun(
        name=evidence.model.name if evidence.model is not None else str(config["model_type"]),
        config=config,
        batch=batch,
        accumulation=numbers.get("accumulation", 1),
        length=length,
        weights=half if keeps_half and half else "float32",
        cast=_cast_of(foreign, half),
        rank=numbers.get("lora_rank", _RANK) if has_lora else 0,
        targets=_targets(foreign, run) if has_lora else (),
        optimizer="sgd" if "sgd" in optimizer else "adafactor" if "adafactor" in optimizer else "adamw",
        checkpointing=foreign.has("checkpointing") if foreign.found is not None else "checkpointing" in run.signs,
        batch_name=run.names.get("batch_size", "batch_size").lstrip("-"),
        accumulation_name=run.names.get("accumulation", "gradient_accumulation_steps").lstrip("-"),
    )


def _targets(foreign: Foreign, run: RunFacts) -> tuple[str, ...]:
    """Return the names of the layers with adapters; none where all linear layers have one."""
    named = run.texts.get("targets", "")
    if foreign.has("all_linear") or named in _ALL_LINEAR:
        is_all = foreign.has("all_linear") or named != "" or foreign.program in _OF_ALL
        return () if is_all else _USUAL_TARGETS
    names = tuple(each.strip().replace("output_proj", "o_proj") for each in named.split(","))
    return (*names, *_MLP) if foreign.has("mlp_adapters") else names


def _cast_of(foreign: Foreign, half: str | None) -> str:
    """Return the dtype of autocast; empty for a program that computes in that of its weights."""
    if foreign.program in _OF_MODEL or foreign.program == "torchtune" or foreign.found is None:
        return ""
    named = foreign.found.texts.get("cast") if known(foreign.program).texts.get("cast") else half
    return _HALVES.get(named or "", "")


def _half_of(foreign: Foreign, evidence: Evidence) -> str | None:
    """Return the half precision that the configuration names, or None."""
    named = _HALVES.get(evidence.run.texts.get("dtype", "").lower().replace("torch.", ""))
    if named or "half" not in evidence.run.signs:
        return named
    return "float16" if re.search(r"\bfp16\W{1,8}(?:enabled\W{1,5})?[Tt]rue", foreign.text) else "bfloat16"


def _config_in(text: str) -> dict[str, int | float | bool | str | None] | None:
    """Return the sizes in a model's config.json that stands in the text, for a decoder that Transformers knows."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"^\{", text, re.MULTILINE):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except ValueError:
            continue
        classes = found.get("architectures") or [""]
        if found.get("model_type") and "ForCausalLM" in str(classes[0]) and "quantization_config" not in found:
            kept = {name: value for name, value in found.items() if _is_size(name, value)}
            return {"model_type": str(found["model_type"]), **kept}
    return None


def _is_size(name: str, value: object) -> bool:
    """Return True for a plain value that may decide a shape; names of classes and of files are left out."""
    return name in _SIZES or (isinstance(value, int | float) and not isinstance(value, bool) and "token" not in name)


def _config_of(model: Model | None) -> dict[str, int | float | bool | str | None] | None:
    """Return the configuration of a usual decoder by its sizes, if these make the parameters that it states."""
    counted = model.counted if model is not None else None
    if model is None or counted is None or model.family not in _FAMILIES or not model.parameters or not model.gated:
        return None
    if abs(counted - model.parameters) > _CLOSE * model.parameters:
        return None
    return {
        "model_type": _FAMILIES[model.family],
        "hidden_size": model.hidden,
        "intermediate_size": model.inner,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": 131072,
    }
