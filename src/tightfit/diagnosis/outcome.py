"""The end of a play: its peak or its failure, and the time of a step."""

from collections.abc import Mapping, Sequence

import msgspec

from tightfit.config import TrainConfig
from tightfit.diagnosis.named_card import Card
from tightfit.gpus import resolve_gpu
from tightfit.simulation.requests import LoopPlay, Moment, StepTrace
from tightfit.simulation.speed import LAUNCH_S, Work, rates_of
from tightfit.vgpu.records import Failure, Findings, LargeTensor

PLAYED_STEPS = 2
"""Steps of a play; the second is the first with optimizer state."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a play. Sizes in bytes."""

    fits: bool
    device_bytes: int
    """Peak of this process with its context; at a failure, with the request."""
    phase: str
    """Phase of the peak, or of the failure."""
    failure: Failure | None = None
    """None where it fits, and for tightfit's trainer, which is traced on a card wide enough for it."""
    error: str = ""
    """Reason why the script ended early, if it was not memory."""
    steps: int = 0
    """Optimizer steps that the script took."""
    place: Moment | None = None
    """Part of nanoGPT's loop that it ended in; None before the first, and for any other program."""
    categories: Mapping[str, int]
    """Bytes by category."""
    largest: tuple[LargeTensor, ...] = ()
    step_s: float | None = None
    """Predicted seconds of a step; None if none was played to its end."""
    launch_s: float = 0.0
    """Seconds of a pass that launch its kernels; a smaller pass takes as many."""
    not_modelled: tuple[str, ...]
    """Operators in the play without a model of their memory."""

    @classmethod
    def of_step(cls, trace: StepTrace, card: Card, config: TrainConfig) -> "Outcome":
        """Return the outcome of tightfit's own trainer."""
        device_bytes = trace.reserved_bytes + card.context_bytes
        rates = rates_of(resolve_gpu(card.name)[0], compiled=config.compile is True)
        pass_s, update_s = Work.of(trace.pass_kernels).seconds(rates), Work.of(trace.update_kernels).seconds(rates)
        return cls(
            fits=device_bytes <= card.room_bytes,
            device_bytes=device_bytes,
            phase=trace.phase,
            categories=trace.categories,
            step_s=pass_s * config.gradient_accumulation_steps + update_s,
            not_modelled=trace.not_modelled,
        )

    @classmethod
    def of_loop(cls, play: LoopPlay, *, accumulation: int) -> "Outcome":
        """Return the outcome of nanoGPT's loop, with the seconds of a step of `accumulation` passes."""
        step_s, launch_s = _times(play.course, accumulation)
        place = play.course[-1] if play.course else None
        found = outcome_of_findings(play.findings)
        return msgspec.structs.replace(found, place=place, step_s=step_s, launch_s=launch_s)

    @property
    def iteration(self) -> int:
        """Iteration of the evaluation that it ended in, from 0."""
        return self.place.iteration or 0 if self.place else 0

    @property
    def in_evaluation(self) -> bool:
        return self.place is not None and self.place.part == "eval"


def _times(course: Sequence[Moment], accumulation: int) -> tuple[float | None, float]:
    """Return the seconds of a step of all its passes, and those of a pass that launch its kernels."""
    last = [each for each in course if each.step == PLAYED_STEPS - 1]
    passes = [each for each in last if each.part == "pass"]
    update = next((each for each in last if each.part == "update"), None)
    end = next((each for each in last if each.part == "stepped"), None)
    if not passes or update is None or end is None:
        return None, 0.0
    one = (update.seconds - passes[0].seconds) / len(passes)
    kernels = (update.kernels - passes[0].kernels) / len(passes)
    return one * accumulation + end.seconds - update.seconds, min(one, kernels * LAUNCH_S)


def outcome_of_findings(found: Findings) -> Outcome:
    """Return the outcome of any script."""
    return Outcome(
        fits=found.outcome == "fits",
        device_bytes=found.needed_bytes,
        phase=found.failure.phase if found.failure else found.peak.phase,
        failure=found.failure,
        error=found.stopped_because if found.outcome == "error" else "",
        steps=found.steps,
        categories=found.categories,
        largest=tuple(found.largest),
        not_modelled=tuple(found.not_modelled),
    )


def card_of_findings(found: Findings) -> Card:
    """Return the card that a dry run was given."""
    major, minor = found.gpu.capability.split(".")
    return Card(
        name=found.gpu.name,
        capability=(int(major), int(minor)),
        total_bytes=found.gpu.total_bytes,
        used_bytes=found.gpu.used_by_others_bytes,
        context_bytes=found.gpu.context_bytes,
        how_named="given",
        total_stated=True,
    )
