"""Time plans on the device itself, a few passes each, in processes of their own: the run's state is not touched.

A model of the card's speed ranks plans; where several fit and the run is long, the device decides between the best.
"""

import os
from collections.abc import Callable
from dataclasses import replace

from tightfit.config import TrainConfig
from tightfit.planner.predict import Prediction
from tightfit.simulation.cache import recall, remember
from tightfit.simulation.client import run_once
from tightfit.simulation.requests import Failed, Timing, TimingRequest
from tightfit.trainer.supervise import LONG_RUN
from tightfit.wording import say

_TIMEOUT_S = 300


def is_wanted(config: TrainConfig, device: str) -> bool:
    """Return the key's answer; for auto, True on CUDA for long runs of one process."""
    if config.probe != "auto":
        return config.probe == "on"
    return device == "cuda" and config.max_iters >= LONG_RUN and "RANK" not in os.environ


def timed(
    config: TrainConfig, offered: list[Prediction], share: int, device_name: str, *, log: Callable[[str], object]
) -> list[Prediction]:
    """Return `offered` with measured times, the fastest first, without those that failed.

    If none could be timed, return them as they were.
    """
    found = []
    for prediction in offered:
        name = f"{prediction.plan.micro_batch} x {prediction.plan.passes(share)}"
        measured = _timing(prediction.plan.applied_to(config), share, device_name)
        if isinstance(measured, Failed):
            log(say("planner.probe.failed", name=name, error=measured.error))
            continue
        better = replace(prediction, pass_s=measured.pass_s, update_s=measured.update_s)
        log(
            say(
                "planner.probe.timed",
                name=name,
                how=say("planner.sentences.compiled" if prediction.plan.compile else "planner.sentences.not_compiled"),
                measured=better.step_s(share),
                predicted=prediction.step_s(share),
            )
        )
        found.append(better)
    return sorted(found, key=lambda each: each.step_s(share)) or offered


def _timing(config: TrainConfig, share: int, device_name: str) -> Timing | Failed:
    """Time one plan, or recall its time on this device."""
    request = TimingRequest(config=replace(config, out_dir="out", max_iters=0), share=share, device_name=device_name)
    found: Timing | Failed | None = recall(request)
    if found is None:
        found = run_once(request, timeout_s=_TIMEOUT_S)
        if isinstance(found, Timing):
            remember(request, found)
    return found
