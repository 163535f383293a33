"""The training step to play for a configuration of another program: a causal model, its adapters, its optimizer."""

import json
import re
from collections.abc import Mapping

import msgspec

from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.foreign_config import Foreign
from tightfit.diagnosis.usual_models import Model

_FAMILIES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Families of the table of usual models whose sizes alone make their decoder, by Transformers' names."""
_CLOSE = 0.02
"""Share by which the parameters counted from a model's sizes may differ from those that it states."""
_OPTIMIZERS = re.compile(r"^(?:adamw?(?:_torch)?(?:_fused)?|torch\.optim\.AdamW?|sgd|adafactor)$", re.IGNORECASE)
_HALVES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "half": "float16"}
_IN_HALF = frozenset({"axolotl", "torchtune", "swift", "model_config"})
"""Programs that keep the weights in the half precision that they compute in."""
_CHECKPOINTS = frozenset({"llama_factory", "swift"})
"""Programs that recompute activations unless told not to."""
_NO_CHECKPOINTS = re.compile(r"disable_gradient_checkpointing\W{1,3}[Tt]rue|gradient_checkpointing\W{1,3}[Ff]alse")
_DIVIDES = re.compile(
    r"^[\s{,\"']*(?:deepspeed|fsdp)\w*[\"']?\s*[:=](?!\s*[\"']?(?:null|none|false|[\"'])?[\"']?,?\s*$)"
    r"|distributed_type\W{1,4}(?:DEEPSPEED|FSDP)",
    re.IGNORECASE | re.MULTILINE,
)
"""Keys under which a job is divided by DeepSpeed or FSDP, with a value."""
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
    optimizer: str
    checkpointing: bool
    batch_name: str
    accumulation_name: str

    def arguments(self) -> tuple[str, ...]:
        """Return the script's arguments; batch and accumulation under the names that the user gave."""
        names = ("config", "length", "weights", "cast", "rank", "optimizer", "checkpointing")
        options = {name: getattr(self, name) for name in names}
        return (
            json.dumps(options, sort_keys=True),
            f"{self.batch_name}={self.batch}",
            f"{self.accumulation_name}={self.accumulation}",
        )


def model_run_of(foreign: Foreign, evidence: Evidence) -> ModelRun | None:
    """Return the step to play; None where the model or the batch is not known, or the step is not one of one card."""
    run, numbers = evidence.run, evidence.run.numbers
    config = _config_in(foreign.text) or _config_of(evidence.model)
    batch, length = numbers.get("batch_size"), numbers.get("length")
    optimizer = run.texts.get("optimizer", "adamw").lower()
    is_divided = {"qlora", "four_bit", "quantized_4", "quantized_8"} & run.signs or numbers.get("world_size", 1) > 1
    is_divided = is_divided or numbers.get("zero_stage", 0) > 0 or "fsdp" in run.signs
    is_divided = is_divided or _DIVIDES.search(foreign.text) is not None
    if config is None or not batch or not length or is_divided or not _OPTIMIZERS.match(optimizer):
        return None
    half = _half_of(foreign, evidence)
    keeps_half = bool(half) and (foreign.program in _IN_HALF or "lora" in run.signs)
    return ModelRun(
        name=evidence.model.name if evidence.model is not None else str(config["model_type"]),
        config=config,
        batch=batch,
        accumulation=numbers.get("accumulation", 1),
        length=length,
        weights=half if keeps_half and half else "float32",
        cast=half if half and foreign.program not in ("torchtune", "model_config") else "",
        rank=numbers.get("lora_rank", _RANK) if "lora" in run.signs else 0,
        optimizer="sgd" if "sgd" in optimizer else "adafactor" if "adafactor" in optimizer else "adamw",
        checkpointing=_checkpoints(foreign, evidence),
        batch_name=run.names.get("batch_size", "batch_size").lstrip("-"),
        accumulation_name=run.names.get("accumulation", "gradient_accumulation_steps").lstrip("-"),
    )


def _half_of(foreign: Foreign, evidence: Evidence) -> str | None:
    """Return the half precision that the configuration names, or None."""
    named = _HALVES.get(evidence.run.texts.get("dtype", "").lower().replace("torch.", ""))
    if named or "half" not in evidence.run.signs:
        return named
    return "float16" if re.search(r"\bfp16\W{1,8}(?:enabled\W{1,5})?[Tt]rue", foreign.text) else "bfloat16"


def _checkpoints(foreign: Foreign, evidence: Evidence) -> bool:
    if _NO_CHECKPOINTS.search(foreign.text):
        return False
    return "checkpointing" in evidence.run.signs or foreign.program in _CHECKPOINTS


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
