"""Doctor's checks of one run on this machine: keys, dataset, disk. Sizes are lower bounds; a plan predicts more."""

import os
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tightfit.config import PRETRAINED, TrainConfig
from tightfit.errors import DataError
from tightfit.models.shape import (
    CHECKPOINT_BYTES,
    OFFLOADED_BYTES,
    OFFLOADED_DEVICE_BYTES,
    parameter_count,
    state_bytes,
)
from tightfit.storage import BEST
from tightfit.system.checks import Check, Fact
from tightfit.system.machine import Machine, space
from tightfit.system.nvml import GpuMemory

if TYPE_CHECKING:
    from tightfit.data import Dataset

_HEAD_MULTIPLE = 8
"""FlashAttention's kernels pad narrower heads to a multiple of 8."""


def run_checks(machine: Machine, config: TrainConfig | None, prepares_itself: Collection[str]) -> Iterator[Check]:
    """Every check of a run; `prepares_itself` names datasets that training prepares when they are missing."""
    if config is None:
        yield Check(name="config", outcome="not_given", status="unknown")
        return
    dataset, check = _dataset(config, prepares_itself)
    yield check
    parameters = known_parameters(config, dataset.vocab_size if dataset else None)
    yield _disk(config, parameters)
    yield from _config(machine, config, parameters)


def known_parameters(config: TrainConfig, vocab_size: int | None = None) -> int | None:
    """Parameters of the run, with the dataset's `vocab_size`; None if the file of its weights decides."""
    if config.init_from in PRETRAINED:
        return parameter_count(PRETRAINED[config.init_from])
    if config.init_from != "scratch":
        return None
    return parameter_count(replace(config, vocab_size=config.vocab_size or vocab_size or 0))


def _dataset(config: TrainConfig, prepares_itself: Collection[str]) -> "tuple[Dataset | None, Check]":
    folder = Path(config.data_dir) / config.dataset
    facts: dict[str, Fact] = {"folder": str(folder), "dataset": config.dataset}
    if config.dataset in prepares_itself and not (folder / "train.bin").exists():
        return None, Check(name="dataset", outcome="made_by_train", status="ok", facts=facts)
    from tightfit.data import open_dataset  # numpy: only for those who name a run

    try:
        dataset = open_dataset(config.dataset, config.data_dir)
        dataset.validate(block_size=config.block_size, vocab_size=config.vocab_size or None)
    except DataError as error:
        return None, Check(name="dataset", outcome="broken", status="problem", facts={**facts, "error": str(error)})
    vocab = dataset.vocab_size
    facts |= {"train_tokens": len(dataset.train), "val_tokens": len(dataset.val), "vocab_size": vocab or 0}
    passes = config.tokens_per_step * config.max_iters / len(dataset.train)
    found = Check(
        name="dataset", outcome="good" if vocab else "good_without_meta", status="ok", facts={**facts, "passes": passes}
    )
    return dataset, found


def _disk(config: TrainConfig, parameters: int | None) -> Check:
    """Space for the most checkpoints: ckpt.pt, the one before, the one in writing; save_interval adds two last.pt."""
    folder = Path(config.out_dir)
    there, saved = space(folder), folder / BEST
    each = CHECKPOINT_BYTES * parameters if parameters else saved.stat().st_size if saved.is_file() else None
    writable = _nearest(folder)
    if writable.exists() and not (writable.is_dir() and os.access(writable, os.W_OK)):
        return Check(name="disk", outcome="not_writable", status="problem", facts={"folder": str(writable)})
    if there is None or each is None:
        free = there.free_bytes if there else 0
        return Check(name="disk", outcome="size_unknown", status="unknown", facts={"free_bytes": free})
    files = 5 if config.save_interval else 3
    facts: dict[str, Fact] = {"folder": str(folder), "free_bytes": there.free_bytes, "each_bytes": each}
    facts |= {"files": files, "needed_bytes": files * each}
    if there.free_bytes < each:
        return Check(name="disk", outcome="full", status="problem", facts=facts)
    if there.free_bytes < files * each:
        return Check(name="disk", outcome="tight", status="warning", facts=facts)
    return Check(name="disk", outcome="enough", status="ok", facts=facts)


def _nearest(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    return next((each for each in (folder, *folder.absolute().parents) if each.exists()), folder)


def _config(machine: Machine, config: TrainConfig, parameters: int | None) -> Iterator[Check]:
    found = [
        *_device_findings(machine, config),
        *_size_findings(machine, config, parameters),
        *_schedule_findings(config),
    ]
    if not found:
        facts = {"parameters": parameters or 0, "sequences": config.effective_batch, "tokens": config.tokens_per_step}
        outcome = "sane" if parameters else "sane_size_unknown"
        found = [Check(name="config", outcome=outcome, status="ok", facts=facts)]
    yield from found


def _device_findings(machine: Machine, config: TrainConfig) -> Iterator[Check]:
    devices = len(machine.torch.devices) if machine.torch else 0
    if config.device.startswith("cuda:") and (number := int(config.device.removeprefix("cuda:"))) >= max(devices, 1):
        yield Check(name="config", outcome="no_such_card", status="problem", facts={"number": number, "count": devices})
    if config.device == "mps" and not (machine.torch and machine.torch.mps):
        yield Check(name="config", outcome="no_mps", status="problem")
    if config.n_embd // config.n_head % _HEAD_MULTIPLE and config.init_from == "scratch":
        facts = {"n_embd": config.n_embd, "n_head": config.n_head, "width": config.n_embd // config.n_head}
        yield Check(name="config", outcome="narrow_heads", status="warning", facts=facts)


def _size_findings(machine: Machine, config: TrainConfig, parameters: int | None) -> Iterator[Check]:
    """Weights, gradients and moments against the memory there is; activations come on top."""
    if parameters is None:
        return
    facts = {"parameters": parameters, "state_bytes": parameters * state_bytes(config)}
    card, budget = _chosen_card(machine, config), machine.host.budget_bytes
    if card is None:
        if config.device in ("auto", "cpu") and facts["state_bytes"] > budget:
            yield Check(
                name="config", outcome="too_large_for_host", status="problem", facts={**facts, "budget": budget}
            )
        return
    free, total = card
    has_host = budget > parameters * OFFLOADED_BYTES
    is_open = config.offload == "none" and config.fit == "auto" and config.optimizer == "adamw"
    if facts["state_bytes"] > total and is_open and has_host and parameters * OFFLOADED_DEVICE_BYTES < free:
        yield Check(name="config", outcome="offloads", status="warning", facts={**facts, "total_bytes": total})
    elif facts["state_bytes"] > total:
        yield Check(name="config", outcome="too_large", status="problem", facts={**facts, "total_bytes": total})
    elif facts["state_bytes"] > free:
        yield Check(name="config", outcome="too_large_now", status="problem", facts={**facts, "free_bytes": free})
    if parameters * 4 > budget:  # a new model is made on the host, then moved
        yield Check(name="config", outcome="host_too_small", status="problem", facts={**facts, "budget": budget})


def _chosen_card(machine: Machine, config: TrainConfig) -> tuple[int, int] | None:
    """Free and usable bytes of the card, or MIG part, that has most; None for a run on no card."""
    if config.device in ("cpu", "mps"):
        return None
    sizes = [
        (part.free_bytes, part.total_bytes)
        for card in machine.cards.cards
        for part in (card.instances or (_usable(card),))
    ]
    return max(sizes, default=None)


def _usable(card: GpuMemory) -> GpuMemory:
    """The card without the driver's reserve."""
    return replace(card, total_bytes=card.total_bytes - (card.reserved_bytes or 0))


def _schedule_findings(config: TrainConfig) -> Iterator[Check]:
    if not config.decay_lr:
        return
    if config.warmup_iters > config.max_iters:
        facts: dict[str, float] = {"warmup_iters": config.warmup_iters, "max_iters": config.max_iters}
        yield Check(name="config", outcome="only_warmup", status="warning", facts=facts)
    if config.min_lr > config.learning_rate:
        facts = {"min_lr": config.min_lr, "learning_rate": config.learning_rate}
        yield Check(name="config", outcome="rising_rate", status="warning", facts=facts)
