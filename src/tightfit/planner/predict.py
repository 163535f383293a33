"""Predict the memory and time of a plan: its trace in the simulation service.

A prediction is only ever of the plan itself: it was traced, on this torch, for this card.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from tightfit.config import TrainConfig
from tightfit.errors import DeviceError
from tightfit.gpus import GPU
from tightfit.links import Cards
from tightfit.models.shape import parameter_count, staged_bytes
from tightfit.planner.candidates import Plan
from tightfit.planner.layers import PLAYED_LAYERS, extended, may_extend, with_layers
from tightfit.simulation.client import Simulator
from tightfit.simulation.requests import Failed, HostRates, StepRequest, StepTrace
from tightfit.simulation.speed import Rates, Work, host_rates, rates_of, step_time
from tightfit.wording import say

_MEMORY_KEYS = (
    *("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "vocab_size"),
    *("dtype", "param_dtype", "compile", "mode", "loss", "optimizer", "offload", "device"),
    *("activation_checkpointing", "activation_memory_budget", "micro_batch", "eval_micro_batch"),
)
"""Keys that decide, as they are, what a step takes."""
_CARD_KEYS = ("shard", "shard_size", "recover")
"""Keys that do so, besides, on several cards."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Memory that one plan takes, and the seconds of its step."""

    plan: Plan
    peak_bytes: int
    """Reserved by PyTorch's allocator at most; on the host what tensors hold."""
    allocated_bytes: int
    phase: str
    """Phase of the peak."""
    categories: dict[str, int]
    phases: dict[str, int]
    """Highest allocated bytes of each phase."""
    pass_s: float
    """Seconds of one forward and backward pass."""
    update_s: float
    """Seconds of clipping and the optimizer."""
    not_modelled: tuple[str, ...]
    parameters: int
    pass_work: Work = field(default_factory=Work)
    """Kernels of a pass."""
    update_work: Work = field(default_factory=Work)
    overlaps: bool = True
    """Cards exchange while they compute."""
    waiting_s: float = 0.0
    """Seconds that one pass and the update wait for other cards."""

    def at(self, rates: Rates) -> "Prediction":
        """Return the prediction for a device that has these rates and the same kernels."""
        time = step_time(self.pass_work, self.update_work, rates, overlaps=self.overlaps)
        return replace(self, pass_s=time.pass_s, update_s=time.update_s, waiting_s=time.waiting_s)

    def step_s(self, share: int) -> float:
        """Seconds of a step over `share` sequences."""
        return self.pass_s * share / self.plan.micro_batch + self.update_s


@dataclass(frozen=True, kw_only=True)
class Target:
    """Device that plans are predicted for."""

    gpu: GPU | None
    """None for the host."""
    known: bool
    """The table of cards has it."""
    share: int
    """Sequences of a step on this device."""
    environ: dict[str, str] = field(default_factory=dict)
    """The allocator's settings."""
    host: HostRates | None = None
    """This machine's own rates, for plans on the host."""
    cards: Cards = field(default_factory=Cards)
    """Cards that train together."""

    def rates(self, *, compiled: bool) -> Rates:
        """Return the device's operations and bytes a second."""
        if self.gpu is not None:
            return rates_of(self.gpu, compiled=compiled, cards=self.cards if self.cards.count > 1 else None)
        assert self.host is not None, "the host was measured"
        return host_rates(self.host.flops, self.host.bandwidth)


class Predictor:
    """Predicts plans of one configuration on one device."""

    def __init__(self, config: TrainConfig, target: Target, simulator: Simulator) -> None:
        self._config, self._target, self._simulator = config, target, simulator

    def expect_compiled(self, expected: bool) -> None:
        """Load the compiler while plans that need none are traced."""
        self._simulator.will_compile = expected

    def predict(self, plans: Sequence[Plan], *, whole: bool = True) -> list[Prediction]:
        """Predict `plans`, in their order: all phases of a run, or the steps alone.

        DeviceError where the virtual device does not work.
        """
        requests = [self._requests(plan, whole) for plan in plans]
        traces = iter(self._simulator.play([each for several in requests for each in several]))
        found = []
        for plan, several in zip(plans, requests, strict=True):
            played = [_answered(next(traces)) for _ in several]
            whole_trace = played[0] if len(played) == 1 else extended(played, self._config.n_layer)
            found.append(self._prediction(plan, whole_trace))
        return found

    def _requests(self, plan: Plan, whole: bool) -> list[StepRequest]:
        """Return the plays of a plan: its own, or, of a deep model on several cards, two of fewer equal blocks."""
        request = self._request(plan, whole)
        if self._target.cards.count == 1 or not may_extend(request.config):
            return [request]
        return [msgspec.structs.replace(request, config=with_layers(request.config, n)) for n in PLAYED_LAYERS]

    def _prediction(self, plan: Plan, trace: StepTrace) -> Prediction:
        config = plan.applied_to(self._config)
        # On the host the copy that a save in the background writes lies beside the tensors.
        staged = staged_for(config, self._target.cards) if self._target.gpu is None else 0
        prediction = Prediction(
            plan=plan,
            peak_bytes=trace.reserved_bytes + staged,
            allocated_bytes=trace.allocated_bytes,
            phase=trace.phase,
            categories=trace.categories,
            phases=trace.phases,
            pass_s=0.0,
            update_s=0.0,
            not_modelled=trace.not_modelled,
            parameters=trace.parameters,
            pass_work=Work.of(trace.pass_kernels),
            update_work=Work.of(trace.update_kernels),
            overlaps=plan.shard != "none" or not self._config.recover,
        )
        return prediction.at(self._target.rates(compiled=plan.compile))

    def _request(self, plan: Plan, whole: bool) -> StepRequest:
        target = self._target
        config = plan.applied_to(self._config)
        # More passes than three take no more memory; the weights that a run starts from matter only in its setup.
        most = plan.micro_batch * 2 + (target.share % plan.micro_batch or plan.micro_batch)
        share = plan.micro_batch if plan.effective_batch else min(target.share, most)
        gpu, cards = target.gpu, target.cards
        keys = _MEMORY_KEYS + (_CARD_KEYS if cards.count > 1 else ())
        return StepRequest(
            whole=whole,
            config=TrainConfig(
                **{key: getattr(config, key) for key in keys},
                batch_size=share,
                gradient_accumulation_steps=1,
                init_from="scratch" if config.init_from == "scratch" else "resume",
                grad_clip=float(config.grad_clip > 0),
                sample_at_end=int(config.sample_at_end > 0),
                fit="off",
            ),
            share=share,
            gpu=gpu.name if gpu else "",
            capability=gpu.capability if gpu and not target.known else None,
            environ=target.environ,
            cards=cards.count,
            cards_per_node=cards.per_node,
        )


def staged_for(config: TrainConfig, cards: Cards) -> int:
    """Return the host memory that `async_save` takes for the part of one card or process; 0 without it.

    Where each has a copy of the model, the first one saves it.
    """
    if not config.async_save:
        return 0
    return staged_bytes(config) * parameter_count(config) // cards.parts(config.shard, config.shard_size)


def _answered(trace: StepTrace | Failed) -> StepTrace:
    if isinstance(trace, Failed):
        raise DeviceError(say("planner.predict.untraced", error=trace.error))
    return trace
