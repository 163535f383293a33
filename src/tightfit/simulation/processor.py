"""The same trace for training on the processor: what its tensors take in host memory, and how fast this machine is."""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tightfit.allocator.caching import CachingAllocator
from tightfit.config import TrainConfig
from tightfit.kernels.operators import Card
from tightfit.models.model import GPT, GPTConfig
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
_SIZE, _ROUNDS = 1024, 3


def trace_on_host(run: Callable[[Callable[[], Work]], dict[str, Any]], meter: Meter) -> dict[str, Any]:
    """What `run` takes on virtual host tensors, in bytes."""
    phases = Phases(lambda: device.mark_roles())
    device = VirtualDevice(Card(capability=(8, 0), sm_count=1), CachingAllocator(total_bytes=_WIDE), phases, "cpu")
    patches.install(device)
    phases.install()
    device.observer = meter
    with device.mode():
        works = run(meter.read)
    recorder = device.recorder
    recorder.settle()
    peaks = device.peaks()
    return {
        "peak": {
            "requested_bytes": peaks["requested"],
            "allocated_bytes": peaks["allocated"],
            "reserved_bytes": peaks["allocated"],
            "phase": recorder.peak_phase,
        },
        "categories": by_category(recorder.alive_at(recorder.peak_event)),
        "phases": dict(recorder.phase_peaks),
        "not_modelled": device.not_modelled,
    } | works


def measure_host() -> dict[str, Any]:
    """FLOP/s of matrix products by dtype, and bytes/s of a large addition, of this machine now."""
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        one, other = torch.ones(_SIZE, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
        flops[str(dtype).removeprefix("torch.")] = 2 * _SIZE**3 / _best(partial(torch.mm, one, other))
    large = torch.ones(1 << 24)
    return {"flops": flops, "bandwidth": 2 * large.nbytes / _best(partial(torch.neg, large))}


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def print_measurements() -> None:
    """For a process of its own: its memory with all of training loaded and used once, then the rates, as JSON."""
    from tightfit.trainer.resident import return_freed_memory
    from tightfit.trainer.sample import generate

    return_freed_memory()
    config = TrainConfig(device="cpu", n_layer=1, n_head=1, n_embd=64, block_size=64, batch_size=1, vocab_size=4096)
    hardware = choose_hardware(config)
    model = GPT(GPTConfig(block_size=64, vocab_size=4096, n_layer=1, n_head=1, n_embd=64))
    state = build_state(config, model, None, hardware, World())
    ids = torch.zeros(1, 64, dtype=torch.int64)
    for _ in range(2):
        optimizer_step(state, [(ids, ids)], passes=1, tokens=64, learning_rate=0.0, grad_clip=1.0)
    evaluation_loss(state, [(ids, ids)])
    generate(model, ids[:, :1], 2)
    base = own_bytes()
    print(json.dumps(measure_host() | {"base_bytes": base}))
