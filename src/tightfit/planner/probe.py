"""Plans timed on the device itself, a few passes each, in processes of their own: the run's state is not touched.

A model of the card's speed ranks plans; where several fit and the run is long, the device decides between the best.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tightfit.config import TrainConfig, to_dict
from tightfit.planner.predict import Prediction
from tightfit.simulation.cache import Memory
from tightfit.trainer.supervise import LONG_RUN

_TIMEOUT_S = 300
_PASSES = 3
_ROUNDS = 2


def is_wanted(config: TrainConfig, device: str) -> bool:
    """As the key says; by itself on CUDA, for long runs of one process."""
    if config.probe != "auto":
        return config.probe == "on"
    return device == "cuda" and config.max_iters >= LONG_RUN and "RANK" not in os.environ


def timed(
    config: TrainConfig, offered: list[Prediction], share: int, device_name: str, *, say: Callable[[str], object]
) -> list[Prediction]:
    """`offered` with their measured times instead of predicted ones, the fastest first; those that failed left out.

    If none could be timed, they stay as they were.
    """
    found = []
    for prediction in offered:
        measured = _remembered(prediction.plan.applied_to(config), share, device_name)
        if "error" in measured:
            say(f"tried {prediction.plan.micro_batch} x {prediction.plan.passes(share)}: {measured['error']}")
            continue
        better = replace(prediction, pass_s=measured["pass_s"], update_s=measured["update_s"])
        say(
            f"tried {prediction.plan.micro_batch} x {prediction.plan.passes(share)}, "
            f"{'compiled' if prediction.plan.compile else 'not compiled'}: {better.step_s(share):.2f} s a step "
            f"({prediction.step_s(share):.2f} predicted)"
        )
        found.append(better)
    return sorted(found, key=lambda each: each.step_s(share)) or offered


def _remembered(config: TrainConfig, share: int, device_name: str) -> dict[str, Any]:
    keys = {**to_dict(config), "out_dir": "", "max_iters": 0, "share": share}
    memory = Memory({"probe": keys, "device": device_name}, "probes")
    found = memory.read()
    if found is None:
        found = _in_a_process({"config": to_dict(config), "share": share})
        if "error" not in found:
            memory.write(found)
    return found


def _in_a_process(request: dict[str, Any]) -> dict[str, Any]:
    words = [sys.executable, "-c", "from tightfit.planner.probe import main; main()"]
    try:
        done = subprocess.run(words, input=json.dumps(request), capture_output=True, text=True, timeout=_TIMEOUT_S)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {_TIMEOUT_S} s"}
    except (IndexError, ValueError):
        last = (done.stderr.splitlines() or ["no answer"])[-1]
        return {"error": f"it ended with code {done.returncode}: {last[:200]}"}
    return found


def main() -> None:
    """In the process of a probe: a request from standard input, its answer to standard output."""
    request = json.loads(sys.stdin.read())
    print(json.dumps(measure(TrainConfig(**request["config"]), request["share"])))


def measure(config: TrainConfig, share: int) -> dict[str, float]:
    """Seconds of a pass and of an update, of the trainer's own step with the dataset's sequences; weights are new."""
    import torch

    from tightfit.data import open_dataset
    from tightfit.data.batches import Batches, micro_batches
    from tightfit.trainer.distributed import World
    from tightfit.trainer.hardware import choose_hardware
    from tightfit.trainer.setup import build_model, build_state, model_config
    from tightfit.trainer.step import optimizer_step

    hardware = choose_hardware(config)
    dataset = open_dataset(config.dataset, config.data_dir)
    shape = model_config(config, None, dataset, say=lambda line: None)
    state = build_state(config, build_model(config, shape, None, hardware.device), None, hardware, World())
    batches = Batches(dataset, shape.block_size, config.effective_batch, config.seed)
    parts = [part for part in micro_batches(range(share), config.micro_batch) if len(part) == config.micro_batch]

    def seconds(passes: int) -> float:
        began = time.perf_counter()
        pairs = (
            tuple(torch.from_numpy(ids).to(hardware.device) for ids in batches.read("train", 0, part))
            for part in parts[:passes]
        )
        optimizer_step(
            state,
            pairs,  # type: ignore[arg-type]
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
    return {"pass_s": max(pass_s, 1e-9), "update_s": max(0.0, single - pass_s)}
