"""Trainers of libraries, asked to evaluate and to end when their steps repeat, as they would later by themselves."""

import functools
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

from tightfit.vgpu.assign import assign
from tightfit.vgpu.on_import import after_import
from tightfit.vgpu.phases import Phases

_LIGHTNING = "loops/training_epoch_loop.py"
FILES = ("transformers/trainer.py", f"lightning/pytorch/{_LIGHTNING}", f"pytorch_lightning/{_LIGHTNING}")
"""Files of the training loops that answer."""
_ENGINE = "ignite/engine/engine.py"
"""File of an engine whose loop is a generator; what evaluates is called at the end of an epoch, or of all."""


def ends_when_asked(file: str) -> bool:
    """Return True for a file of a trainer that ends by itself; the loop of others has to be left."""
    return file.endswith(FILES[0])


def is_engine(frame: FrameType | None) -> bool:
    """Return True if a step runs in an engine of Ignite."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(_ENGINE):
            return True
        frame = frame.f_back
    return False


def install(phases: Phases) -> None:
    """Let the trainers of transformers, Lightning and Ignite hear what `phases.asked` has for them."""
    after_import("ignite.engine.engine", lambda module: _change_ignite(module, phases))
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


def _change_ignite(module: ModuleType, phases: Phases) -> None:
    engine, events = module.__dict__["Engine"], module.__dict__["Events"]
    usual: Callable[..., None] = engine._fire_event

    @functools.wraps(usual)
    def fire_event(self: Any, event_name: object, *args: object, **options: object) -> None:
        """`Any`: the library's own engine."""
        usual(self, event_name, *args, **options)
        if event_name is events.ITERATION_COMPLETED and phases.is_asked("epoch"):
            self.terminate_epoch()
        if event_name is events.ITERATION_COMPLETED and phases.is_asked("end"):
            self.terminate()
        if event_name is events.DATALOADER_STOP_ITERATION and self.state.epoch_length == _length(self.state.dataloader):
            self.terminate_epoch()  # else it takes the batches that were left out from the loader's next run

    assign(engine, _fire_event=fire_event)


def _length(items: object) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None
