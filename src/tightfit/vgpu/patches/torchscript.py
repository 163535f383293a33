"""TorchScript: scripted and traced code plays as the Python that it comes from, and its files hold that."""

import copy
import functools
import sys
from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType

import torch
from torch import Tensor, nn

from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.on_import import after_import
from tightfit.vgpu.patches.checkpoints import File
from tightfit.wording import say

_DERIVATIVES = "torch._decomp.decompositions_for_jvp"
_WRITERS = ("torch.utils.tensorboard.writer", "tensorboardX.writer")
"""Modules with a `SummaryWriter`, which draws the graph of a model that it traces."""


def install(device: VirtualDevice) -> None:
    """Play scripted and traced code as Python: TorchScript's own interpreter wants a driver.

    torch itself scripts the derivatives of forward mode, of which it only wants the graph.
    """
    state = torch.jit._state
    state.disable()

    def noted(usual: Callable[..., object], before: Callable[..., None] | None = None) -> Callable[..., object]:
        @functools.wraps(usual)
        def as_python(*args: object, **options: object) -> object:
            asker = sys._getframe(1).f_globals.get("__name__", "")
            if asker != _DERIVATIVES:
                if before is not None:
                    before(*args, **options)
                made = usual(*args, **options)
                if asker.partition(".")[0] == "torch":
                    return _with_save(made)
                if isinstance(made, FunctionType):
                    return _noted_when_called(made, device)
                device.note(say("vgpu.patches.torchscript"))
                return _with_save(made)
            state.enable()
            try:
                return usual(*args, **options)
            finally:
                state.disable()

        return as_python

    assign(torch.jit, script=noted(torch.jit.script), trace=noted(torch.jit.trace, before=_run_once))
    for writer in _WRITERS:
        after_import(writer, _change_writer)
    _install_files()


def _run_once(
    func: Callable[..., object],
    example_inputs: object = None,
    *rest: object,
    example_kwarg_inputs: Mapping[str, object] | None = None,
    **options: object,
) -> None:
    """Run what is traced on its example, as the tracer does."""
    if example_inputs is not None or example_kwarg_inputs is not None:
        several = example_inputs or () if not isinstance(example_inputs, (Tensor, dict)) else (example_inputs,)
        assert isinstance(several, (tuple, list))
        func(*several, **(example_kwarg_inputs or {}))


def _change_writer(module: ModuleType) -> None:
    """Let a writer of TensorBoard run the model, and draw no graph of it."""

    def add_graph(self: object, model: nn.Module, input_to_model: object = None, *args: object, **rest: object) -> None:
        modes = [(each, each.training) for each in model.modules()]
        model.eval()
        try:
            _run_once(model, input_to_model)
        finally:
            for each, is_training in modes:
                each.training = is_training

    assign(module.__dict__["SummaryWriter"], add_graph=add_graph)


def _noted_when_called(function: FunctionType, device: VirtualDevice) -> Callable[..., object]:
    """Note the first call of a scripted function: libraries script many of which a run may call none."""

    @functools.wraps(function)
    def called(*args: object, **options: object) -> object:
        device.note(say("vgpu.patches.torchscript"))
        return function(*args, **options)

    return called


def _with_save(made: object) -> object:
    """Give a module the method `save`; one with an attribute of that name keeps it, and a copy has the method."""
    if not isinstance(made, nn.Module):
        return made
    played = made
    if hasattr(made, "save"):
        played = copy.copy(made)
        played.__dict__["forward"] = made.forward
    played.__dict__["save"] = lambda file, *args, **options: torch.jit.save(made, file)
    return played


def _install_files() -> None:
    """Save and load a scripted module as any other object of the script."""
    usual: Callable[..., object] = torch.jit.load

    def save(m: object, f: File, *args: object, **options: object) -> None:
        torch.save(m, f)

    @functools.wraps(usual)
    def load(f: File, map_location: object = None, *args: object, **options: object) -> object:
        try:
            found = torch.load(f, weights_only=False)
        except RuntimeError:  # a real archive, of which torch.load leaves TorchScript to torch.jit.load
            return usual(f, map_location, *args, **options)
        if not isinstance(found, nn.Module):
            return found
        copied = copy.deepcopy(found)
        return copied.to(map_location) if isinstance(map_location, (str, torch.device)) else copied

    def unchanged(mod: object, *args: object, **options: object) -> object:
        return mod

    assign(torch.jit, save=save, load=load, freeze=unchanged, optimize_for_inference=unchanged)
