"""The same trace for training on the processor: what its tensors take in host memory, and how fast this machine is."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from tightfit.allocator.caching import CachingAllocator
from tightfit.config import TrainConfig
from tightfit.kernels.card import Card
from tightfit.models.model import GPT, GPTConfig
from tightfit.simulation.requests import HostRates, StepTrace
from tightfit.simulation.speed import Meter, Work
from tightfit.system import own_bytes
from tightfit.trainer.distributed import World
from tightfit.trainer.hardware import choose_hardware
from tightfit.trainer.setup import build_state
from tightfit.trainer.step import evaluation_loss, optimizer_step
from tightfit.vgpu import patches
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.findings import by_category
from tightfit.vgpu.phases import Phases

_WIDE = 1 << 50
_SIZES, _SLOW_S, _ROUNDS = (256, 1024), 0.02, 3
"""Sides of the square matrices that are multiplied, and seconds above which a larger product is not tried: without
instructions for bfloat16, a product of the larger ones takes seconds, and tells no more."""


@dataclass(frozen=True)
class StepWork:
    """Kernels of a traced step, and the model's parameters."""

    one_pass: Work
    update: Work
    parameters: int
    saved_from_bytes: int = 0
    """Device memory while a run on several cards saves; 0 where that was not played."""


def trace_on_host(run: Callable[[Meter], StepWork], meter: Meter, *, processes: int = 1) -> StepTrace:
    """Trace `run` on virtual host tensors, as the first of `processes`. Sizes in bytes."""
    phases = Phases(lambda: device.roles.mark_all())
    device = VirtualDevice(Card(capability=(8, 0), sm_count=1), CachingAllocator(total_bytes=_WIDE), phases, "cpu")
    patches.install(device)
    if processes > 1:
        patches.process_groups.install(device)
        patches.host.install_storages(device)  # FSDP2 frees and takes the memory of gathered weights
    phases.install()
    device.observer = meter
    with device.mode():
        works = run(meter)
    recorder = device.recorder
    recorder.settle()
    peaks = device.peaks()
    return StepTrace(
        requested_bytes=peaks["requested"],
        allocated_bytes=peaks["allocated"],
        reserved_bytes=peaks["allocated"],
        phase=recorder.peak_phase,
        categories=by_category(recorder.alive_at(recorder.peak_event)),
        phases={str(name): size for name, size in recorder.phase_peaks.items()},
        not_modelled=tuple(device.not_modelled),
        parameters=works.parameters,
        pass_kernels=works.one_pass.counts(),
        update_kernels=works.update.counts(),
    )


def measure_host() -> HostRates:
    """Measure this machine: its memory with all of training loaded and used once, then its rates."""
    _train_once()
    base_bytes = own_bytes()
    flops = {str(dtype).removeprefix("torch."): _flops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    large = torch.ones(1 << 24)
    bandwidth = 2 * large.nbytes / _best(partial(torch.neg, large))
    return HostRates(flops=flops, bandwidth=bandwidth, base_bytes=base_bytes)


def _flops(dtype: torch.dtype) -> float:
    """Floating-point operations a second of matrix products."""
    for size in _SIZES:
        one, other = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        seconds = _best(partial(torch.mm, one, other))
        if seconds > _SLOW_S:
            break
    return 2 * size**3 / seconds


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _train_once() -> None:
    """Load and use everything that a training process loads and uses."""
    from tightfit.trainer.resident import set_process_malloc
    from tightfit.trainer.sample import generate

    set_process_malloc(keep=False)
    config = TrainConfig(device="cpu", n_layer=1, n_head=1, n_embd=64, block_size=64, batch_size=1, vocab_size=4096)
    hardware = choose_hardware(config)
    model = GPT(GPTConfig(block_size=64, vocab_size=4096, n_layer=1, n_head=1, n_embd=64))
    state = build_state(config, model, None, hardware, World())
    ids = torch.zeros(1, 64, dtype=torch.int64)
    for _ in range(2):
        optimizer_step(state, [(ids, ids)], passes=1, tokens=64, learning_rate=0.0, grad_clip=1.0)
    evaluation_loss(state, [(ids, ids)])
    generate(model, ids[:, :1], 2)
