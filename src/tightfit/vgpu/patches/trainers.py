"""Trainers of libraries, asked to evaluate and to end when their steps repeat, as they would later by themselves."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tightfit.vgpu.assign import assign
from tightfit.vgpu.patches.on_import import after_import
from tightfit.vgpu.phases import Phases

_LIGHTNING = "loops/training_epoch_loop.py"
FILES = ("transformers/trainer.py", f"lightning/pytorch/{_LIGHTNING}", f"pytorch_lightning/{_LIGHTNING}")
"""Files of the training loops that answer."""


def ends_when_asked(file: str) -> bool:
    """Return True for a file of a trainer that ends by itself; the loop of others has to be left."""
    return file.endswith(FILES[0])


def install(phases: Phases) -> None:
    """Let the trainers of transformers and Lightning hear what `phases.asked` has for them."""
    after_import("transformers.trainer_callback", lambda module: _change_transformers(module, phases))
    for package in ("lightning.pytorch", "pytorch_lightning"):
        after_import(f"{package}.loops.training_epoch_loop", lambda module: _change_lightning(module, phases))


def _change_transformers(module: ModuleType, phases: Phases) -> None:
    flow = module.__dict__["DefaultFlowCallback"]
    usual: Callable[..., Any] = flow.on_step_end

    @functools.wraps(usual)
    def on_step_end(self: object, args: Any, state: Any, control: Any, **rest: object) -> object:
        """`Any`: the library's own objects."""
        if phases.is_asked("end"):
            state.global_step = max(state.global_step, state.max_steps)
        control = usual(self, args, state, control, **rest)
        if phases.is_asked("evaluation"):
            last = state.max_steps
            if args.eval_strategy == "steps" and max(state.eval_steps, args.eval_delay) <= last:
                control.should_evaluate = True
            if args.save_strategy == "steps" and 0 < state.save_steps <= last:
                control.should_save = True
        return control

    assign(flow, on_step_end=on_step_end)


def _change_lightning(module: ModuleType, phases: Phases) -> None:
    loop = module.__dict__["_TrainingEpochLoop"]
    usual: Callable[..., bool] = loop._should_check_val_fx

    @functools.wraps(usual)
    def should_check(self: Any, *args: object) -> bool:
        """`Any`: the library's own loop."""
        asked = phases.is_asked("evaluation")
        return usual(self, *args) or (asked and self._should_check_val_epoch())

    assign(loop, _should_check_val_fx=should_check)
