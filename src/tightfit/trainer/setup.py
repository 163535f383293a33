"""What a run starts from: the weights, the model's shape, the optimizer. Every departure from the request is said."""

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tightfit.config import PRETRAINED, TrainConfig
from tightfit.data import Dataset
from tightfit.errors import ConfigError, DeviceError
from tightfit.models.conversion import fetch_pretrained, pretrained_shape
from tightfit.models.model import GPT, GPTConfig
from tightfit.models.optimizer import build_optimizer, restore_state
from tightfit.models.shape import PADDED_VOCAB
from tightfit.trainer import checkpoint as ckpt
from tightfit.trainer.checkpoint import Checkpoint
from tightfit.trainer.distributed import World
from tightfit.trainer.hardware import DTYPES, Hardware, compile_obstacle
from tightfit.trainer.offload import Offload
from tightfit.trainer.step import StepState

Say = Callable[[str], object]


def starting_point(init_from: str, out_dir: str, *, say: Say) -> Checkpoint | None:
    """What `init_from` names: a run to resume, or weights at step 0; None for scratch."""
    if init_from == "scratch":
        return None
    if init_from == "resume":
        return ckpt.load_newest(Path(out_dir), say=say)
    path = Path(init_from)
    if _is_checkpoint(init_from):
        saved = ckpt.load(path)
        return replace(saved, step=0, best_val_loss=math.inf, optimizer=None, scaler=None, evaluated=False)
    config, weights = fetch_pretrained(init_from)
    return Checkpoint(model_config=config, model=weights, optimizer=None, step=0, best_val_loss=math.inf, path=path)


def starting_shape(init_from: str, out_dir: str) -> GPTConfig | None:
    """The shape of the weights that `starting_point` gives, with its errors; None for scratch."""
    if init_from != "resume" and init_from != "scratch" and not _is_checkpoint(init_from):
        return pretrained_shape(init_from)
    start = starting_point(init_from, out_dir, say=lambda line: None)
    return None if start is None else start.model_config


def _is_checkpoint(init_from: str) -> bool:
    return init_from not in PRETRAINED and (Path(init_from).suffix == ".pt" or Path(init_from).is_file())


def model_config(config: TrainConfig, start: Checkpoint | None, dataset: Dataset, *, say: Say) -> GPTConfig:
    """The model's shape: the weights' own where there are some, else the configuration's."""
    if start is None:
        vocab_size = config.vocab_size or dataset.vocab_size or PADDED_VOCAB
        if not config.vocab_size:
            whose = "the dataset's" if dataset.vocab_size else "GPT-2's 50257 rounded up to a multiple of 64"
            say(f"vocab_size: {vocab_size}, {whose}")
        return GPTConfig(
            block_size=config.block_size,
            vocab_size=vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            dropout=config.dropout,
            bias=config.bias,
        )
    own = start.model_config
    shape = replace(own, dropout=config.dropout, block_size=min(config.block_size, own.block_size))
    for key in ("n_layer", "n_head", "n_embd", "block_size", "bias"):
        if getattr(shape, key) != getattr(config, key):
            say(f"{key}: {getattr(shape, key)}, as in {start.path} (the configuration says {getattr(config, key)})")
    if config.activation_checkpointing > shape.n_layer:
        raise ConfigError(
            f"activation_checkpointing={config.activation_checkpointing} is more than the {shape.n_layer} blocks "
            f"of {start.path}; set {shape.n_layer} to recompute all of them"
        )
    return shape


def build_model(config: TrainConfig, shape: GPTConfig, start: Checkpoint | None, device: torch.device) -> GPT:
    """The model on its device, or on the host if `build_state` is to move it.

    Saved weights are copied in one by one: no second set of them is made there.
    """
    if config.offloads("optimizer"):
        device = torch.device("cpu")
    options = model_options(config)
    if start is None:
        torch.manual_seed(config.seed)
        cpu = torch.device("cpu")  # its generator gives the same weights whatever the device
        return GPT.on_device(shape, cpu, **options).init_weights().to(device, DTYPES[config.param_dtype])
    model = GPT.on_device(replace(shape, block_size=start.model_config.block_size), device, **options)
    model.to(DTYPES[config.param_dtype])
    ckpt.restore_model(model, start.model)
    if shape.block_size < model.config.block_size:
        model.crop_block_size(shape.block_size)
    return model


def model_options(config: TrainConfig) -> dict[str, Any]:
    """What of a configuration is the model's way to compute, as GPT's constructor takes it."""
    return {
        "loss": config.loss,
        "checkpointed_blocks": config.activation_checkpointing,
        "inputs_on_host": config.offloads("activations"),
    }


def build_state(
    config: TrainConfig, model: GPT, start: Checkpoint | None, hardware: Hardware, world: World
) -> StepState:
    """Optimizer and scaler as they were saved; the model compiled and wrapped as the run needs it."""
    if config.optimizer == "adamw_8bit" and (obstacle := compile_obstacle(hardware.device)):
        raise DeviceError(f"optimizer=adamw_8bit is compiled, and {obstacle}; use --optimizer=adamw")
    offload = Offload(model, hardware.device, hardware.dtype) if config.offloads("optimizer") else None
    optimizer = build_optimizer(
        offload.masters.values() if offload else model.parameters(),
        weight_decay=config.weight_decay,
        learning_rate=config.learning_rate,
        betas=(config.beta1, config.beta2),
        kind=config.optimizer,
    )
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
    if start is not None and start.optimizer is not None:
        restore_state(optimizer, start.optimizer, start.path)
        if start.scaler:
            scaler.load_state_dict(dict(start.scaler))
    called: nn.Module = model
    if hardware.compile:
        functorch: Any = importlib.import_module("torch._functorch.config")
        functorch.activation_memory_budget = config.activation_memory_budget  # read when something is compiled
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        dynamo.specialize_float = True  # the loss's factor stays; as an input it would be a tensor of the host
        model.compile_parts(config.mode)
    elif config.activation_memory_budget < 1:
        raise ConfigError(
            f"activation_memory_budget={config.activation_memory_budget:g} is for compiled steps, and this one is not "
            "compiled; use --compile=True, or activation_checkpointing"
        )
    if world.size > 1 and not config.recover:  # else trainer.recovery exchanges gradients, when all have theirs
        ids = [hardware.device.index] if hardware.device.type == "cuda" else None
        called = DistributedDataParallel(called, device_ids=ids)
    processes = world.size if isinstance(called, DistributedDataParallel) else 1
    return StepState(
        model=called,
        optimizer=optimizer,
        scaler=scaler,
        autocast=hardware.autocast,
        processes=processes,
        offload=offload,
    )


def data_order_changes(config: TrainConfig, start: Checkpoint) -> list[str]:
    """Keys that decide which sequences are in a step and differ from the saved run's, as "key was, now is"."""
    saved = start.config
    keys = ("dataset", "seed", "batch_size", "gradient_accumulation_steps", "block_size")
    return [f"{k} {saved[k]} -> {getattr(config, k)}" for k in keys if k in saved and saved[k] != getattr(config, k)]
