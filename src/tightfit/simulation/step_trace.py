"""Trace the trainer's own step, through all phases of a run, on a virtual device. Runs in a process of its own."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tightfit.config import TrainConfig
from tightfit.data.batches import micro_batches
from tightfit.models import loss
from tightfit.models.model import GPT, GPTConfig
from tightfit.models.optimizer import plain_state
from tightfit.models.shape import PADDED_VOCAB
from tightfit.simulation.processor import StepWork, trace_on_host
from tightfit.simulation.requests import StepRequest, StepTrace
from tightfit.simulation.speed import Meter
from tightfit.trainer.distributed import World
from tightfit.trainer.hardware import DTYPES, Hardware, choose_hardware, set_process_options
from tightfit.trainer.sample import generate
from tightfit.trainer.setup import build_state, empty_shards, model_options, run_mesh
from tightfit.trainer.step import StepState, evaluation_loss, optimizer_step
from tightfit.vgpu.findings import findings_of
from tightfit.vgpu.records import Phase, Settings
from tightfit.vgpu.session import VirtualSession
from tightfit.wording import say

WIDE = 1 << 50
"""Bytes of the card that a trace runs on: the question is how much a plan takes, not if it fails."""
_SAMPLED = 4
_CHUNKS = 3
"""Chunks of the loss after which the next ones repeat: the first makes the weight's gradient, the second adds to it."""


def trace_step(request: StepRequest) -> StepTrace:
    """Trace a run's phases or its steps alone. The process is spent after it."""
    if not request.gpu:
        os.environ.update(_rank_variables(request))
        return trace_on_host(lambda meter: _run(request, meter), Meter(), processes=request.cards)
    session = VirtualSession(
        Settings(
            gpu=request.gpu,
            memory_bytes=WIDE,
            capability=request.capability,
            context_bytes=0,
            until_stable=False,
        ),
        request.environ,
    )
    meter = Meter()
    os.environ.update(_rank_variables(request))
    with session.active():
        session.device.observer = meter
        works = _run(request, meter)
    found = findings_of(session)
    return StepTrace(
        requested_bytes=found.peak.requested_bytes,
        allocated_bytes=found.peak.allocated_bytes,
        reserved_bytes=found.peak.reserved_bytes,
        phase=found.peak.phase,
        categories=found.categories,
        phases={**found.phases, **({"save": works.saved_from_bytes} if works.saved_from_bytes else {})},
        # plans leave room for NCCL by themselves
        not_modelled=tuple(note for note in found.not_modelled if note != say("vgpu.patches.nccl")),
        parameters=works.parameters,
        pass_kernels=works.one_pass.counts(),
        update_kernels=works.update.counts(),
    )


def _run(request: StepRequest, meter: Meter) -> StepWork:
    """Go through a run; return the work of one pass and of the update alone."""
    config, read = request.config, meter.read
    loss.chunks = partial(_few_chunks, meter)
    hardware = choose_hardware(config)
    set_process_options(hardware, activation_memory_budget=config.activation_memory_budget)
    device = hardware.device
    model, state = _started(request, hardware)
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
    saved_from_bytes = _save(state) if request.whole and request.cards > 1 else 0
    if request.whole and config.sample_at_end:
        with _named_phase("sample"), hardware.autocast():
            generate(model, torch.zeros(1, 1, dtype=torch.int64, device=device), _SAMPLED)
    one_pass = single if double is None else double - single
    update, parameters = single - one_pass, model.count_parameters()
    return StepWork(one_pass=one_pass, update=update, parameters=parameters, saved_from_bytes=saved_from_bytes)


def _rank_variables(request: StepRequest) -> dict[str, str]:
    """Return torchrun's variables for the first process of several; none for a single card."""
    if request.cards == 1:
        return {}
    sizes = {"WORLD_SIZE": request.cards, "LOCAL_WORLD_SIZE": request.cards_per_node}
    return {"RANK": "0", "LOCAL_RANK": "0", **{name: str(size) for name, size in sizes.items()}}


def _started(request: StepRequest, hardware: Hardware) -> tuple[GPT, StepState]:
    """Return the model and the state of a run as the trainer builds them, on one card or on the first of several."""
    config, device = request.config, hardware.device
    if request.cards == 1:
        model = _model(config, device)
        return model, build_state(config, model, None, hardware, World())
    from tightfit.trainer.recovery import Recovery

    world = World(size=request.cards, local_size=request.cards_per_node)
    torch.distributed.init_process_group("nccl")
    mesh = run_mesh(config, world, device)
    shards = None
    if mesh is None:
        model = _model(config, device)
    else:
        shards = empty_shards(config, _shape(config), hardware, mesh)
        model = shards.model
    state = build_state(config, model, None, hardware, world, shards)
    recovery = Recovery(world, device, _ignored, _ignored, enabled=config.recover, sharded=mesh is not None)
    recovery.guard(state)
    return model, state


def _ignored(*what: object) -> None:
    """Take a line of a run's log."""


def _save(state: StepState) -> int:
    """Copy this card's part of weights and moments to the host, as DCP does before it writes; return the card's bytes.

    DCP copies a tensor at a time, so the card holds nothing besides. A copy on each card is saved the same way.
    """
    if not torch.cuda.is_available():  # on the host they are written from where they are
        return 0
    held = torch.cuda.memory_allocated()
    if state.shards is None:
        return held
    states = plain_state(state.optimizer, in_shards=True)["state"]
    assert isinstance(states, Mapping)
    saved: list[object] = [tensor for _, tensor in state.shards.parameters()]
    for tensor in [*saved, *(value for each in states.values() for value in each.values())]:
        if isinstance(tensor, Tensor):
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().to("cpu")
    return held


def _shape(config: TrainConfig) -> GPTConfig:
    return GPTConfig(
        block_size=config.block_size,
        vocab_size=config.vocab_size or PADDED_VOCAB,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        dropout=config.dropout,
        bias=config.bias,
    )


def _model(config: TrainConfig, device: torch.device) -> GPT:
    """The model as `build_model` leaves it on the device, without computing weights on the host first."""
    shape = _shape(config)
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


def _few_chunks(meter: Meter, n: int, rows: int) -> Iterator[slice]:
    """Yield the loss's first chunks and its last; those between repeat, and only their kernels are counted."""
    every = loss.all_chunks(n, rows)
    for chunk in every[:_CHUNKS]:
        before = meter.read()
        yield chunk
    if len(every) > _CHUNKS:
        meter.repeat(meter.read() - before, len(every) - _CHUNKS - 1)
        yield every[-1]


def _named_phase(name: Phase) -> contextlib.AbstractContextManager[None]:
    running = VirtualSession._running
    return running.phases.named(name) if running is not None else contextlib.nullcontext()
