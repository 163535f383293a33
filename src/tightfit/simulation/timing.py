"""The trainer's step timed on this machine's device, with the dataset's sequences and new weights.

Runs in a process of its own: the run's state is not touched.
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from tightfit.data import open_dataset
from tightfit.data.batches import Batches, micro_batches
from tightfit.simulation.requests import Timing, TimingRequest
from tightfit.trainer.distributed import World
from tightfit.trainer.hardware import choose_hardware, set_process_options
from tightfit.trainer.setup import build_model, build_state, model_config
from tightfit.trainer.step import optimizer_step

_PASSES = 3
_ROUNDS = 2


def time_step(request: TimingRequest) -> Timing:
    """Measure the seconds of a pass and of an update."""
    config = request.config
    hardware = choose_hardware(config)
    set_process_options(hardware, activation_memory_budget=config.activation_memory_budget)
    torch.manual_seed(config.seed)
    dataset = open_dataset(config.dataset, config.data_dir)
    shape = model_config(config, None, dataset, log=lambda line: None)
    state = build_state(config, build_model(config, shape, None, hardware.device), None, hardware, World())
    batches = Batches(dataset, shape.block_size, config.effective_batch, config.seed)
    parts = micro_batches(range(request.share), config.micro_batch)
    parts = [part for part in parts if len(part) == config.micro_batch]

    def pairs(passes: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts[:passes]:
            inputs, targets = batches.read("train", 0, part)
            yield torch.from_numpy(inputs).to(hardware.device), torch.from_numpy(targets).to(hardware.device)

    def seconds(passes: int) -> float:
        began = time.perf_counter()
        optimizer_step(
            state,
            pairs(passes),
            passes=passes,
            tokens=config.tokens_per_step,
            learning_rate=0.0,
            grad_clip=config.grad_clip,
            seed_of_pass=(lambda number: number) if config.dropout else None,
        )
        if hardware.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    most = min(_PASSES, len(parts))
    seconds(most)  # compiles, and loads kernels
    several = min(seconds(most) for _ in range(_ROUNDS))
    single = min(seconds(1) for _ in range(_ROUNDS)) if most > 1 else several
    pass_s = (several - single) / (most - 1) if most > 1 else several
    return Timing(pass_s=max(pass_s, 1e-9), update_s=max(0.0, single - pass_s))
