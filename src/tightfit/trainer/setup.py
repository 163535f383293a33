"""Build the start of a run: weights, the model's shape, optimizer. Log each departure from the request."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tightfit.config import PRETRAINED, TrainConfig
from tightfit.data import Dataset
from tightfit.errors import ConfigError, DeviceError
from tightfit.models.conversion import fetch_pretrained, pretrained_shape
from tightfit.models.loss import LossKind
from tightfit.models.model import GPT, GPTConfig
from tightfit.models.optimizer import build_optimizer, plain_state, restore_state
from tightfit.models.shape import PADDED_VOCAB
from tightfit.storage import MARKER
from tightfit.trainer import checkpoint as ckpt
from tightfit.trainer.checkpoint import Checkpoint
from tightfit.trainer.distributed import World
from tightfit.trainer.hardware import DTYPES, Hardware, compile_obstacle
from tightfit.trainer.offload import Offload
from tightfit.trainer.step import StepState
from tightfit.trainer.stored import load, load_newest
from tightfit.wording import say

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from tightfit.trainer.sharding import Shards

Log = Callable[[str], object]
"""Takes one line that a person reads."""


def starting_point(init_from: str, out_dir: str, *, log: Log) -> Checkpoint | None:
    """Load the run to resume or the weights at step 0 that `init_from` names; None for scratch."""
    if init_from == "scratch":
        return None
    if init_from == "resume":
        return load_newest(Path(out_dir), log=log)
    path = Path(init_from)
    if _is_checkpoint(init_from):
        saved = load(path)
        return replace(saved, step=0, best_val_loss=math.inf, optimizer=None, scaler=None, evaluated=False)
    config, weights = fetch_pretrained(init_from)
    return Checkpoint(model_config=config, model=weights, optimizer=None, step=0, best_val_loss=math.inf, path=path)


def starting_shape(init_from: str, out_dir: str) -> GPTConfig | None:
    """Return the shape of the weights that `starting_point` gives, with its errors; None for scratch."""
    if init_from != "resume" and init_from != "scratch" and not _is_checkpoint(init_from):
        return pretrained_shape(init_from)
    start = starting_point(init_from, out_dir, log=lambda line: None)
    return None if start is None else start.model_config


def _is_checkpoint(init_from: str) -> bool:
    path = Path(init_from)
    return init_from not in PRETRAINED and (path.suffix == ".pt" or path.is_file() or (path / MARKER).is_file())


def model_config(config: TrainConfig, start: Checkpoint | None, dataset: Dataset, *, log: Log) -> GPTConfig:
    """Return the model's shape: the weights' own where there are some, else the configuration's."""
    if start is None:
        vocab_size = config.vocab_size or dataset.vocab_size or PADDED_VOCAB
        if not config.vocab_size:
            is_known = dataset.vocab_size
            log(say("trainer.setup.vocab_of_dataset" if is_known else "trainer.setup.vocab_of_gpt2", size=vocab_size))
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
        value, asked = getattr(shape, key), getattr(config, key)
        if value != asked:
            log(say("trainer.setup.shape_of_checkpoint", key=key, value=value, path=start.path, asked=asked))
    if (recomputed := config.activation_checkpointing) > shape.n_layer:
        raise ConfigError(
            say("trainer.setup.too_few_blocks", recomputed=recomputed, blocks=shape.n_layer, path=start.path)
        )
    return shape


def build_model(config: TrainConfig, shape: GPTConfig, start: Checkpoint | None, device: torch.device) -> GPT:
    """Build the model on its device, or on the host if `build_state` is to move it.

    New weights come from torch's generator of the host. Saved ones are copied in one by one: the device never holds a
    second set.
    """
    if config.offloads("optimizer"):
        device = torch.device("cpu")
    options = model_options(config)
    if start is None:
        cpu = torch.device("cpu")  # its generator gives the same weights whatever the device
        return GPT.on_device(shape, cpu, **options).init_weights().to(device, DTYPES[config.param_dtype])
    model = GPT.on_device(replace(shape, block_size=start.model_config.block_size), device, **options)
    model.to(DTYPES[config.param_dtype])
    ckpt.restore_model(model, start.model)
    if shape.block_size < model.config.block_size:
        model.crop_block_size(shape.block_size)
    return model


def build_shards(
    config: TrainConfig, shape: GPTConfig, start: Checkpoint | None, hardware: Hardware, mesh: "DeviceMesh"
) -> "Shards":
    """Build this process's part of the model on its device: never the whole, there or on the host.

    New weights are those of `build_model`: each process draws every number from the same seed, one parameter at a time,
    and keeps its part. Saved ones are mapped from the file, and each process reads its own rows. Those that several
    processes saved wait for `build_state`.
    """
    shards = empty_shards(config, shape, hardware, mesh)
    if start is not None and _is_whole_run_in_parts(start):
        return shards
    for name, parameter in shards.parameters():
        if start is None:
            whole = shards.model.init_parameter(name, torch.empty(parameter.shape))
        else:
            whole = start.model[name][: parameter.shape[0]]  # fewer positions than saved
        shards.place(parameter, whole)
    return shards


def empty_shards(config: TrainConfig, shape: GPTConfig, hardware: Hardware, mesh: "DeviceMesh") -> "Shards":
    """Return this process's part of a model on its device, with values not yet set."""
    from tightfit.trainer.sharding import Shards

    def build() -> GPT:
        with torch.device("meta"):
            return GPT(shape, **model_options(config)).to(DTYPES[config.param_dtype])

    keeps, mode = config.shard == "optimizer", config.mode if hardware.compile else None
    shards = Shards(build, mesh, hardware.dtype, keeps_weights=keeps, compile_mode=mode)
    shards.allocate(hardware.device)
    return shards


def run_mesh(config: TrainConfig, world: World, device: torch.device) -> "DeviceMesh | None":
    """Return the processes over which the model is spread, None if each has a copy; all processes call this."""
    if config.shard == "none" or world.size == 1:
        return None
    from tightfit.trainer.sharding import shard_mesh  # FSDP2 takes more than a second to import

    is_hybrid = config.shard == "hybrid"
    return shard_mesh(world, device, (config.shard_size or world.local_size) if is_hybrid else world.size)


def _is_whole_run_in_parts(start: Checkpoint) -> bool:
    return start.optimizer is not None and start.path is not None and start.path.is_dir()


class ModelOptions(TypedDict):
    """The keywords of GPT's constructor."""

    loss: LossKind
    checkpointed_blocks: int
    inputs_on_host: bool


def model_options(config: TrainConfig) -> ModelOptions:
    """Return the part of a configuration that decides how the model computes."""
    return {
        "loss": cast(LossKind, config.loss),
        "checkpointed_blocks": config.activation_checkpointing,
        "inputs_on_host": config.offloads("activations"),
    }


def build_state(
    config: TrainConfig,
    model: GPT,
    start: Checkpoint | None,
    hardware: Hardware,
    world: World,
    shards: "Shards | None" = None,
) -> StepState:
    """Build the optimizer and scaler as they were saved; compile and wrap the model as the run needs it."""
    _refuse_without_compiler(config, hardware)
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
        if shards and _is_whole_run_in_parts(start):
            from tightfit.trainer.parts import read_parts

            read_parts(start, dict(shards.parameters()), plain_state(optimizer, in_shards=True))
        else:
            restore_state(optimizer, start.optimizer, start.path, shards.place if shards else Tensor.copy_)
        if start.scaler:
            scaler.load_state_dict(dict(start.scaler))
    if hardware.compile and not shards:
        model.compile_parts(config.mode)
    called: nn.Module = model
    # FSDP2 sums gradients, or with `recover` trainer.recovery does, when all processes have theirs
    averages = world.size > 1 and not config.recover and not shards
    if averages:
        ids = [hardware.device.index] if hardware.device.type == "cuda" else None
        called = DistributedDataParallel(called, device_ids=ids)
    return StepState(
        model=called,
        optimizer=optimizer,
        scaler=scaler,
        autocast=hardware.autocast,
        processes=world.size if averages else 1,
        offload=offload,
        shards=shards,
    )


def _refuse_without_compiler(config: TrainConfig, hardware: Hardware) -> None:
    if config.optimizer == "adamw_8bit" and (obstacle := compile_obstacle(hardware.device)):
        raise DeviceError(say("trainer.setup.8bit_needs_compiler", obstacle=obstacle))
    if config.activation_memory_budget < 1 and not hardware.compile:
        raise ConfigError(say("trainer.setup.budget_needs_compile", budget=config.activation_memory_budget))


def refuse_other_run(config: TrainConfig, start: Checkpoint, dataset: Dataset) -> None:
    """ConfigError if a resumed run would go on with a shorter context, or with a vocabulary that is too small."""
    own = start.model_config
    if config.block_size < own.block_size and start.optimizer is not None:
        sizes = {"asked": config.block_size, "size": own.block_size}
        raise ConfigError(say("trainer.setup.shorter", path=start.path, **sizes))
    if dataset.vocab_size and dataset.vocab_size > own.vocab_size:
        sizes = {"asked": dataset.vocab_size, "size": own.vocab_size}
        raise ConfigError(say("trainer.setup.vocabulary", path=start.path, folder=dataset.folder, **sizes))


def refuse_other_text(config: TrainConfig, start: Checkpoint, dataset: Dataset) -> None:
    """ConfigError if the dataset of this name now holds another text than the one that the run was trained on."""
    for file in (dataset.train, dataset.val):
        known = start.data.get(file.path.stem)
        if known is not None and start.config.get("dataset") == config.dataset and known != file.digest():
            raise ConfigError(say("trainer.setup.other_text", file=file.path, path=start.path))


def data_order_changes(config: TrainConfig, start: Checkpoint) -> list[str]:
    """List the keys that decide each step's sequences and differ from the saved run's, as "key was -> now"."""
    saved = start.config
    keys = ("dataset", "seed", "batch_size", "gradient_accumulation_steps", "block_size")
    return [f"{k} {saved[k]} -> {getattr(config, k)}" for k in keys if k in saved and saved[k] != getattr(config, k)]
