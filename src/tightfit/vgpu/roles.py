"""Roles of tensors on the virtual GPU: parameters, gradients, optimizer states, logits, activations."""

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tightfit.kernels.temporaries import Arguments
from tightfit.vgpu.phases import Phases
from tightfit.vgpu.recorder import Recorder
from tightfit.vgpu.records import Category, Phase

aten = torch.ops.aten


class Roles:
    """Chooses the category of each new tensor, and corrects it when the script shows the tensor's use."""

    def __init__(self, recorder: Recorder, phases: Phases, where: torch.device) -> None:
        self._recorder, self._phases, self._where = recorder, phases, where
        phases.after_forward = self._mark_own_parameters

    def category(self, tensor: Tensor, func: OpOverload, args: Arguments, phase: Phase) -> Category:
        """Return the category of a result of `func`, by its shape, its source and the phase."""
        if phase == "compile":  # a candidate that Inductor times
            return "workspace"
        by_vocabulary = tensor.dim() >= 2 and tensor.shape[-1] == self._phases.vocabulary
        if by_vocabulary and tensor.is_floating_point() and not (args and self._is_parameter(args[0])):
            is_weight = phase == "backward" and func is aten.embedding_dense_backward.default
            return "gradients" if tensor.dim() == 2 and is_weight else "logits"
        if phase == "backward":
            return "gradients"
        if phase in ("setup", "optimizer"):  # parameters and states are marked later
            return "other"
        if func is aten._to_copy.default and self._is_parameter(args[0]):
            return "cast copies"
        return "activations"

    def _is_parameter(self, source: object) -> bool:
        held = self._recorder.of_storage(source) if isinstance(source, FakeTensor) else None
        return held is not None and held.category == "parameters"

    def mark_all(self) -> None:
        """Mark the parameters, gradients and optimizer states of all modules and optimizers."""
        for module in list(self._phases.modules):
            for tensor in (*module.parameters(), *module.buffers()):
                self._mark_with_gradient(tensor)
        for optimizer in list(self._phases.optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._mark_with_gradient(parameter)
            for state in optimizer.state.values():
                for value in state.values() if isinstance(state, dict) else ():
                    if isinstance(value, Tensor):
                        self._mark_parts(value, "optimizer state")

    def mark_parameter(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            self._mark(tensor, "parameters")

    def _mark_with_gradient(self, parameter: Tensor) -> None:
        self._mark(parameter, "parameters")
        if parameter.grad is not None:
            self._mark(parameter.grad, "gradients")

    def _mark_own_parameters(self, module: nn.Module) -> None:
        """Mark weights that FSDP gathered or a script moved here: they may go before the next step."""
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_leaf:
                self._mark_with_gradient(parameter)
            else:
                self.mark_parameter(parameter)

    def _mark_parts(self, tensor: Tensor, category: Category) -> None:
        """Mark a tensor, or the parts of a library's own tensor class, such as codes and their scales."""
        if not isinstance(tensor, FakeTensor) and is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            for name in names:
                self._mark_parts(getattr(tensor, name), category)
        else:
            self._mark(tensor, category)

    def _mark(self, tensor: Tensor, category: Category) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)  # this card's shard of a distributed one
        if isinstance(tensor, FakeTensor) and tensor.fake_device.type == self._where.type:
            self._recorder.mark(tensor, category)
