"""A plan for a configuration: on a card that is named, on the one that is here, or on this machine's processor."""

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from tightfit.config import Resolved, TrainConfig, batch_split, refuse_processes
from tightfit.data import open_dataset
from tightfit.display import Displayed
from tightfit.errors import ConfigError, DeviceError, TightfitError
from tightfit.gpus import GPU, all_gpus, resolve_gpu
from tightfit.links import Cards, linked_cards, split_count
from tightfit.models.shape import OFFLOADED_BYTES, parameter_count
from tightfit.planner.budget import Budget, device_budget, host_budget
from tightfit.planner.candidates import BOTH, INPUTS, OFFLOAD, Relief, reliefs
from tightfit.planner.layers import may_extend
from tightfit.planner.predict import Predictor, Target, staged_for
from tightfit.planner.search import Choice, Task, choose
from tightfit.planner.shardings import Sharding, choose_sharding, open_shardings, with_sharding
from tightfit.simulation.cache import recall, remember
from tightfit.simulation.client import Progress, Simulator, run_once
from tightfit.simulation.requests import Failed, HostRates, HostRequest
from tightfit.simulation.speed import rates_of
from tightfit.system import gpu_memory, host_memory, spills_to_host
from tightfit.system.cpuinfo import processor_name
from tightfit.system.nvml import GpuMemory
from tightfit.vgpu.card_arguments import check_bytes, described_gpu
from tightfit.wording import say

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
EXPANDABLE = "expandable_segments:True"
"""Segments that grow: what is cached is not lost to fragmentation, so larger micro-batches fit."""
_MEASURING_S = 300
_MUCH_FASTER = 2.5
"""Gain from which its size is worth saying."""
_COMPILES_FROM = (7, 0)
"""Compute capability that Triton needs."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """Device of a plan."""

    gpu: GPU | None
    """None: this machine's processor."""
    budget: Budget
    known: bool = True
    """The table of cards has it."""
    is_here: bool = False
    """It is in this machine."""
    notes: tuple[str, ...] = ()
    cards: Cards = field(default_factory=Cards)
    """Cards of this kind that train together."""


@dataclass(frozen=True, kw_only=True, repr=False)
class PlanResult(Displayed):
    """Plan for one device, with the choice behind it."""

    config: TrainConfig
    where: Where
    choice: Choice
    environ: dict[str, str]
    """Allocator settings that the plan was made with."""
    seconds: float
    traced: int
    """Traces made now; the others were recalled from the cache."""
    notes: list[str] = field(default_factory=list)
    shardings: list[Sharding] = field(default_factory=list)
    """Ways to spread the model over several cards, and how each does."""

    @property
    def is_extended(self) -> bool:
        """True if memory was read off plays of fewer equal blocks."""
        return self.where.cards.count > 1 and may_extend(self.config)


def make_plan(
    resolved: Resolved[TrainConfig],
    where: Where,
    *,
    processes: int = 1,
    log: Callable[[str], object] = lambda text: None,
    progress: Progress | None = None,
) -> PlanResult:
    """Return the fastest plan that fits `where`, for one of `processes` that share the effective batch.

    `progress` hears of the traces done. Nothing runs on the device. DeviceError where the virtual one does not work.
    """
    cards = where.cards
    if cards.count > 1:
        processes = cards.count
        refuse_processes(resolved.config, cards.count, cards.per_node)
    elif resolved.config.shard not in ("none", "auto"):
        raise ConfigError(say("planner.planning.sharded", shard=resolved.config.shard))
    started = time.perf_counter()
    config = with_shape(resolved.config)
    with Simulator(progress=progress) as simulator:
        simulator.will_shard = cards.count > 1
        choice, shardings = _chosen(resolved, config, where, simulator, processes, log)
    return PlanResult(
        config=config,
        where=where,
        choice=choice,
        environ=allocator_settings(where.gpu),
        seconds=time.perf_counter() - started,
        traced=simulator.played,
        notes=[*where.notes, *_emulates(config, where.gpu), *_stages(config, where, choice)],
        shardings=shardings,
    )


def _chosen(
    resolved: Resolved[TrainConfig],
    config: TrainConfig,
    where: Where,
    simulator: Simulator,
    processes: int,
    log: Callable[[str], object],
) -> tuple[Choice, list[Sharding]]:
    """Return the choice for one of `processes`, and on several cards how each sharding does."""
    on_host, cards = where.gpu is None, where.cards
    target = target_of(where, config, processes)
    asked = Resolved(replace(config, device="cpu" if on_host else "cuda"), resolved.sources, resolved.warnings)
    tasks = [
        Task(
            resolved=one,
            predictor=Predictor(one.config, target, simulator),
            budget=where.budget,
            share=target.share,
            compiled=_compiles(config, where.gpu),
            on_host=on_host,
            processes=processes,
            cards=cards,
            log=log,
        )
        for one in (with_sharding(asked, name) for name in open_shardings(asked, cards))
    ]
    if cards.count == 1:
        return choose(tasks[0], _reliefs(tasks[0].resolved, where, processes)), []
    return choose_sharding(tasks, lambda task: _reliefs(task.resolved, where, processes), log=log)


def target_of(where: Where, config: TrainConfig, processes: int) -> Target:
    """Return what predictions for one of `processes` on a device rest on."""
    return Target(
        gpu=where.gpu,
        known=where.known,
        share=batch_split(config, processes).share,
        environ=allocator_settings(where.gpu),
        host=measured_host() if where.gpu is None else None,
        cards=where.cards,
    )


def allocator_settings(gpu: GPU | None) -> dict[str, str]:
    """Return the user's settings; without any, those that a plan for a card is made with."""
    environ = {name: os.environ[name] for name in os.environ if name.endswith("_ALLOC_CONF")}
    if gpu and not environ and sys.platform == "linux" and not spills_to_host():
        return {ALLOCATOR: EXPANDABLE}
    return environ


def _emulates(config: TrainConfig, gpu: GPU | None) -> list[str]:
    if gpu is None or gpu.native_bf16 or config.dtype != "bfloat16":
        return []
    products = rates_of(gpu, compiled=False).matmul
    factor = products["float16"] / products["bfloat16"] if gpu.fp32_tflops else 0.0
    if factor < _MUCH_FASTER:
        return [say("planner.planning.emulates", gpu=gpu.name)]
    return [say("planner.planning.emulates_slowly", gpu=gpu.name, factor=factor)]


def _stages(config: TrainConfig, where: Where, choice: Choice) -> list[str]:
    """Return the host memory of saves in the background, which no plan for a card counts on the card."""
    if where.gpu is None or not config.async_save:
        return []
    shard = choice.best.plan.shard if choice.best else config.shard
    each = staged_for(replace(config, shard="full" if shard == "auto" else shard), where.cards)
    copies = 1 if shard == "none" else where.cards.per_node
    return [say("planner.planning.stages", each=each, node=copies * each)]


def named_card(
    text: str,
    *,
    memory_bytes: int | None = None,
    used_by_others_bytes: int = 0,
    capability: tuple[int, int] | None = None,
) -> Where:
    """Return a card by its name, as if it were here. DeviceError for an unknown one."""
    gpu, notes = described_gpu(text, memory_bytes=memory_bytes, used_bytes=used_by_others_bytes, capability=capability)
    return _on_card(gpu, notes, memory_bytes, used_by_others_bytes, is_here=False)


def where_to_plan(
    config: TrainConfig,
    gpu: str | None,
    *,
    memory_bytes: int | None = None,
    used_bytes: int = 0,
    capability: tuple[int, int] | None = None,
    log: Callable[[str], object] = lambda text: None,
) -> Where:
    """Return the card that `gpu` names; without a name the one that is here, or else the processor.

    A count before the name, as in 4x RTX 4090 or 2x8x A100, makes it several cards with their usual links.
    """
    if gpu is not None:
        nodes, per_node, name = split_count(gpu)
        where = named_card(name, memory_bytes=memory_bytes, used_by_others_bytes=used_bytes, capability=capability)
        return with_cards(where, nodes, per_node) if nodes * per_node > 1 else where
    check_bytes("memory_bytes", memory_bytes)
    check_bytes("used_bytes", used_bytes)
    here = None if config.device == "cpu" else card_here(limit_bytes=memory_bytes)
    return here or this_host(memory_bytes, log=log)


def with_cards(where: Where, nodes: int, per_node: int, *, link: str = "", network: str = "") -> Where:
    """Return several of these cards, each with less memory by what NCCL takes. ConfigError for the processor."""
    if where.gpu is None:
        raise ConfigError(say("planner.planning.cards_of_processor"))
    cards = linked_cards(where.gpu, nodes=nodes, per_node=per_node, link=link, network=network)
    return replace(where, cards=cards, budget=replace(where.budget, nccl_bytes=cards.nccl_bytes))


def card_here(index: int = 0, *, limit_bytes: int | None = None) -> Where | None:
    """Return the card of this machine with the memory that others hold now; None if NVML reports no card.

    The plan may use at most `limit_bytes`. The budget's total is the sum of free memory, this process's and the
    others', so it leaves out the driver's reserve even where the driver does not report it.
    """
    card, why = gpu_memory(index)
    if card is None:
        return None
    if card.mig and card.instances:
        return _slice_here(card, limit_bytes)
    usable = card.total_bytes - (card.reserved_bytes or 0)
    gpu, notes = resolve_gpu(card.name, memory_bytes=usable, capability=card.capability)
    used = card.used_by_others_bytes or 0
    total = card.free_bytes + (card.own_bytes or 0) + used
    if limit_bytes is not None:
        total = min(total, limit_bytes + used)
    return _on_card(gpu, [*notes, *filter(None, [why])], total, used, is_here=True)


def _slice_here(card: GpuMemory, limit_bytes: int | None) -> Where:
    """Return the MIG instance that CUDA_VISIBLE_DEVICES names, else the first one, which CUDA uses."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    part = next((each for each in card.instances if each.uuid == chosen), card.instances[0])
    gpu, notes = resolve_gpu(card.name, memory_bytes=part.total_bytes, capability=card.capability)
    used = part.total_bytes - part.free_bytes
    total = part.total_bytes if limit_bytes is None else min(part.total_bytes, limit_bytes + used)
    return _on_card(gpu, notes, total, used, is_here=True)


def _on_card(gpu: GPU, notes: Iterable[str], total: int | None, used_by_others: int, *, is_here: bool) -> Where:
    return Where(
        gpu=gpu,
        budget=device_budget(gpu, total_bytes=total, used_by_others_bytes=used_by_others),
        known=any(each.name == gpu.name for each in all_gpus()),
        is_here=is_here,
        notes=tuple(notes),
    )


def this_host(
    memory_bytes: int | None = None, *, processes: int = 1, log: Callable[[str], object] = lambda text: None
) -> Where:
    """Return this machine's processor, with `memory_bytes` or the tightest limit of a process started here.

    `processes` like this one share the memory that the machine and control groups have left.
    """
    log(say("planner.planning.measuring"))
    host, base = host_memory(), measured_host().base_bytes
    resident = base["resident"]
    own = host.used_by_this_process_bytes
    wholes = [
        (limit.limit_bytes if limit.source in base else limit.left_bytes // processes + own, limit.source)
        for limit in host.limits
    ]
    wholes.append((host.available_bytes // processes + own, say("planner.planning.free_memory")))
    if memory_bytes is not None:
        wholes.append((memory_bytes, say("planner.planning.as_given")))
    whole, source = min(wholes, key=lambda each: each[0] - base.get(each[1], resident))
    return Where(
        gpu=None,
        budget=host_budget(
            whole, base_bytes=resident, reserved_bytes=max(0, base.get(source, resident) - resident), source=source
        ),
    )


def measured_host() -> HostRates:
    """Return rates of this machine's processor and the memory of a loaded torch; cached on disk."""
    processor = f"{processor_name()} {os.cpu_count()} {os.environ.get('OMP_NUM_THREADS', '')}"
    request = HostRequest(processor=processor)
    if (found := recall(request)) is not None:
        return found
    measured = run_once(request, timeout_s=_MEASURING_S)
    if isinstance(measured, Failed):
        raise DeviceError(say("planner.planning.not_measured", error=measured.error))
    remember(request, measured)
    return measured


def _reliefs(resolved: Resolved[TrainConfig], where: Where, processes: int) -> list[Relief]:
    """List changes that make room; of offloads, for a card that is here, those that its host has memory for."""
    if where.gpu is None:
        return reliefs(resolved, offloads=[])
    free = host_memory().budget_bytes if where.is_here else None
    has_room = free is None or free > OFFLOADED_BYTES * parameter_count(resolved.config)
    offloads = [INPUTS, OFFLOAD, BOTH] if has_room and processes == 1 else [INPUTS]
    return reliefs(resolved, offloads=offloads, may_use_8bit=can_compile(where.gpu) and _is_installed("torchao"))


def _compiles(config: TrainConfig, gpu: GPU | None) -> bool:
    if isinstance(config.compile, bool):
        return config.compile
    return can_compile(gpu)


def can_compile(gpu: GPU | None) -> bool:
    """Return True if torch.compile has a compiler for this card, here."""
    return gpu is not None and gpu.capability >= _COMPILES_FROM and _is_installed("triton")


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def with_shape(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the run's shape: from its starting weights, else from itself and the dataset.

    CheckpointError for weights that cannot be used.
    """
    if config.init_from != "scratch":
        from tightfit.trainer.setup import starting_shape  # imports torch

        own = starting_shape(config.init_from, config.out_dir)
        assert own is not None, "only a run from scratch has none"
        shape = {key: getattr(own, key) for key in ("n_layer", "n_head", "n_embd", "bias", "vocab_size")}
        return replace(config, block_size=min(config.block_size, own.block_size), **shape)
    if config.vocab_size:
        return config
    try:
        found = open_dataset(config.dataset, config.data_dir).vocab_size
    except TightfitError:
        found = None
    return replace(config, vocab_size=found or 0)
