"""One trace: the trainer's own step, through all phases of a run, on a virtual device. Runs in a process of its own."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tightfit.config import TrainConfig
from tightfit.data.batches import micro_batches
from tightfit.gpus import resolve_gpu
from tightfit.models.model import GPT, GPTConfig
from tightfit.models.shape import PADDED_VOCAB
from tightfit.simulation.speed import Meter, Rates, Work, host_rates, rates_of
from tightfit.trainer.distributed import World
from tightfit.trainer.hardware import DTYPES, choose_hardware
from tightfit.trainer.sample import generate
from tightfit.trainer.setup import build_state, model_options
from tightfit.trainer.step import StepState, evaluation_loss, optimizer_step
from tightfit.vgpu.findings import findings_of
from tightfit.vgpu.session import Request, VirtualSession

WIDE = 1 << 50
"""Bytes of the card that a trace runs on: what a plan takes is asked, not whether it fails."""
_SAMPLED = 4


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """What is to be traced."""

    whole: bool
    """Whether through all phases, or the steps alone, to see how memory grows."""

    config: dict[str, Any]
    """A TrainConfig with a plan's keys in it."""
    share: int
    """Sequences of a step that this device computes."""
    gpu: str
    """A card's exact name, or "" for the host."""
    capability: tuple[int, int] | None
    """Of a card that the table does not know."""
    environ: dict[str, str]
    """Settings of the allocator."""
    host_flops: dict[str, float]
    host_bandwidth: float


def trace(request: TraceRequest) -> dict[str, Any]:
    """Peaks in bytes, their categories and phases, and the seconds of a step. The process is spent after it."""
    config = TrainConfig(**request.config)
    if not request.gpu:
        from tightfit.simulation.processor import trace_on_host

        on_host = host_rates(request.host_flops, request.host_bandwidth)
        return trace_on_host(lambda read: _run(config, request, read, on_host), Meter())
    gpu, _ = resolve_gpu(request.gpu, memory_bytes=WIDE, capability=request.capability)
    session = VirtualSession(
        Request(
            gpu=request.gpu,
            memory_bytes=WIDE,
            capability=request.capability,
            context_bytes=0,
            until_stable=False,
            environ=request.environ,
        )
    )
    rates, meter = rates_of(gpu, compiled=config.compile is True), Meter()
    with session.active():
        session.device.observer = meter
        works = _run(config, request, meter.read, rates)
    found = findings_of(session)
    return {key: found[key] for key in ("peak", "categories", "phases", "not_modelled")} | works


def _run(config: TrainConfig, request: TraceRequest, read: Callable[[], Work], rates: Rates) -> dict[str, Any]:
    """The course of a run; the work of one pass and of the update alone."""
    hardware = choose_hardware(config)
    device = hardware.device
    model = _model(config, device)
    state = build_state(config, model, None, hardware, World())
    passes = micro_batches(range(request.share), config.micro_batch)
    sizes = [len(part) for part in passes]

    def evaluate() -> None:
        with _named_phase("eval"):
            evaluation_loss(state, _batches([config.eval_micro_batch], config.block_size, device))

    if request.whole:
        evaluate()
    if config.compile is True or config.optimizer == "adamw_8bit":
        _step(config, state, [sizes[0]], device)  # compiles
    before = read()
    _step(config, state, [sizes[0]], device)
    single = read() - before
    double = None
    if len(sizes) > 1:
        _step(config, state, [sizes[0], sizes[0]], device)
        double = read() - before - single
    if request.whole:
        evaluate()
        _step(config, state, [sizes[0]] * min(2, len(sizes)), device)
    if request.whole and config.sample_at_end:
        with _named_phase("sample"), hardware.autocast():
            generate(model, torch.zeros(1, 1, dtype=torch.int64, device=device), _SAMPLED)
    one_pass = single if double is None else double - single
    update = single - one_pass
    return {
        "pass_s": one_pass.seconds(rates),
        "update_s": update.seconds(rates),
        "pass_kernels": one_pass.as_rows(),
        "update_kernels": update.as_rows(),
        "parameters": model.count_parameters(),
    }


def _model(config: TrainConfig, device: torch.device) -> GPT:
    """The model as `build_model` leaves it on the device, without computing weights on the host first."""
    shape = GPTConfig(
        block_size=config.block_size,
        vocab_size=config.vocab_size or PADDED_VOCAB,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        dropout=config.dropout,
        bias=config.bias,
    )
    options = model_options(config)
    with _default_dtype(DTYPES[config.param_dtype]):
        if device.type == "cpu" or config.offloads("optimizer"):  # weights that the step's state moves to the device
            return GPT(shape, **options)
        if config.init_from != "scratch":
            return GPT.on_device(shape, device, **options)
        with torch.device("meta"):
            model = GPT(shape, **options)
    # A tied weight is met twice, and is on the device the second time.
    model._apply(lambda t: t if t.device.type != "meta" else torch.empty_like(t, device=device))  # type: ignore[no-untyped-call]
    return model


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _batches(sizes: list[int], block_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for size in sizes:
        ids = torch.zeros(size, block_size, dtype=torch.int64)
        yield ids.to(device), ids.clone().to(device)


def _step(config: TrainConfig, state: StepState, sizes: list[int], device: torch.device) -> None:
    optimizer_step(
        state,
        _batches(sizes, config.block_size, device),
        passes=len(sizes),
        tokens=config.tokens_per_step,  # the same in each step: another number would be compiled anew
        learning_rate=config.learning_rate,
        grad_clip=config.grad_clip,
        seed_of_pass=(lambda number: number) if config.dropout else None,
    )


def _named_phase(name: Any) -> contextlib.AbstractContextManager[None]:
    running = VirtualSession._running
    return running.phases.named(name) if running is not None else contextlib.nullcontext()
