"""Predict the memory and time of a plan: its trace in the simulation service.

A prediction is only ever of the plan itself: it was traced, on this torch, for this card.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tightfit.config import TrainConfig
from tightfit.errors import DeviceError
from tightfit.gpus import GPU
from tightfit.planner.candidates import Plan
from tightfit.simulation.client import Simulator
from tightfit.simulation.requests import Failed, HostRates, StepRequest, StepTrace
from tightfit.simulation.speed import Rates, Work, host_rates, rates_of
from tightfit.wording import say

_MEMORY_KEYS = (
    *("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "vocab_size"),
    *("dtype", "param_dtype", "compile", "mode", "loss", "optimizer", "offload", "device"),
    *("activation_checkpointing", "activation_memory_budget", "micro_batch", "eval_micro_batch"),
)
"""Keys that decide, as they are, what a step takes."""


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

    def at(self, rates: Rates) -> "Prediction":
        """Return the prediction for a device that has these rates and the same kernels."""
        return replace(self, pass_s=self.pass_work.seconds(rates), update_s=self.update_work.seconds(rates))

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

    def rates(self, *, compiled: bool) -> Rates:
        """Return the device's operations and bytes a second."""
        if self.gpu is not None:
            return rates_of(self.gpu, compiled=compiled)
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
        traces = self._simulator.play([self._request(plan, whole) for plan in plans])
        return [self._prediction(plan, trace) for plan, trace in zip(plans, traces, strict=True)]

    def _prediction(self, plan: Plan, trace: StepTrace | Failed) -> Prediction:
        if isinstance(trace, Failed):
            raise DeviceError(say("planner.predict.untraced", error=trace.error))
        prediction = Prediction(
            plan=plan,
            peak_bytes=trace.reserved_bytes,
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
        )
        return prediction.at(self._target.rates(compiled=plan.compile))

    def _request(self, plan: Plan, whole: bool) -> StepRequest:
        target = self._target
        config = plan.applied_to(self._config)
        # More passes than three take no more memory; the weights that a run starts from matter only in its setup.
        most = plan.micro_batch * 2 + (target.share % plan.micro_batch or plan.micro_batch)
        share = plan.micro_batch if plan.effective_batch else min(target.share, most)
        gpu = target.gpu
        return StepRequest(
            whole=whole,
            config=TrainConfig(
                **{key: getattr(config, key) for key in _MEMORY_KEYS},
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
        )
