"""AdamW as nanoGPT sets it up: matrices decay, vectors do not. Its moments in 32 bits or, by torchao, in 8."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, TypedDict, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tightfit.errors import CheckpointError, ConfigError
from tightfit.wording import say

Saved: TypeAlias = Tensor | float | dict[str, Tensor]
"""An entry of a parameter's saved state: the step, a moment, or the parts of an 8-bit moment."""


class Group(TypedDict):
    """A parameter group, as torch's optimizers take it."""

    params: list[nn.Parameter]
    weight_decay: float


class SavedOptimizer(TypedDict):
    """An optimizer's `state_dict`, in plain numbers and tensors."""

    state: dict[int, dict[str, Saved]]
    """Entries of each parameter, by its number."""
    param_groups: list[dict[str, bool | float | list[int] | tuple[float, float] | None]]
    """Parameter numbers and settings of each group."""


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    weight_decay: float,
    learning_rate: float,
    betas: tuple[float, float],
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW with nanoGPT's two groups, in its order, so that its optimizer states load.

    `kind` is "adamw": fused on CPU and CUDA, one pass over parameters, gradients and moments, elsewhere torch's own
    choice; or "adamw_8bit": torchao's (Dettmers et al. 2021, arXiv 2110.02861), compiled. ConfigError if it is missing.
    The moments exist at once, not from the first step on: a run that starts has its full size, and long-lived
    memory does not end up between short-lived blocks (GPT-2 124M on the CPU: 200 MiB less at the peak).
    """
    parameters = [p for p in parameters if p.requires_grad]
    groups: list[Group] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if kind == "adamw_8bit":
        return _eight_bit(groups, learning_rate, betas)
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    optimizer = torch.optim.AdamW(map(dict, groups), lr=learning_rate, betas=betas, fused=True if fused else None)
    for parameter in parameters:
        on_device = parameter.device if fused else torch.device("cpu")
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=on_device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def _eight_bit(groups: list[Group], learning_rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao warns of unrelated kernels that it could not load
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ConfigError(say("models.optimizer.no_torchao")) from None
    finally:
        logging.disable(before)
    eight_bit = AdamW8bit(groups, lr=learning_rate, betas=betas)
    optimizer: torch.optim.Optimizer = eight_bit
    new_moment: Callable[[Tensor, bool], Tensor] = eight_bit._new_buffer
    for parameter in (p for group in groups for p in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": new_moment(parameter, True),
            "exp_avg_sq": new_moment(parameter, False),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of the next update; a rate held in a tensor is filled in place, since compiled code reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def parts_of(tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensors that hold a state tensor: itself, or the codes, scales and map of an 8-bit one."""
    if not is_traceable_wrapper_subclass(tensor):
        return {"": tensor}
    names, _ = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}


def plain_state(optimizer: torch.optim.Optimizer, *, in_shards: bool = False) -> SavedOptimizer:
    """Return a `state_dict` with each 8-bit moment as a mapping of its parts; moments in shards stay so."""
    saved = optimizer.state_dict()
    plain = (lambda value: value) if in_shards else _plain
    state = {number: {k: plain(v) for k, v in each.items()} for number, each in saved["state"].items()}
    groups = [{k: float(v) if isinstance(v, Tensor) else v for k, v in g.items()} for g in saved["param_groups"]]
    return {"state": state, "param_groups": groups}


@torch.no_grad()
def restore_state(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, object],
    source: object,
    place: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """Copy moments into an optimizer with state, one tensor at a time: memory never holds them twice.

    Moments of 8 bits become those of 32 and the other way round. `place` copies a whole tensor into the optimizer's.
    CheckpointError if `saved` is of another model.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = saved.get("state")
    if not isinstance(states, Mapping) or set(states) != set(range(len(parameters))):
        raise CheckpointError(say("models.optimizer.other_model", source=source))
    for number, parameter in enumerate(parameters):
        state = states[number]
        for key, tensor in optimizer.state[parameter].items():
            value = state.get(key) if isinstance(state, Mapping) else None
            if not _copy(value, tensor, place):
                raise CheckpointError(say("models.optimizer.misshapen", source=source, key=key, number=number))


def _plain(value: Tensor | float) -> Saved:
    if not isinstance(value, Tensor):
        return value
    parts = parts_of(value)
    return parts.get("", parts)


def _copy(value: object, tensor: Tensor, place: Callable[[Tensor, Tensor], object]) -> bool:
    """Copy `value`, of either width, into `tensor`; return False if it does not fit."""
    if isinstance(value, int) and abs(value) < 2**63:  # the step, in checkpoints of older versions of torch
        value = torch.tensor(value)
    own = {"": tensor} if place is not Tensor.copy_ else parts_of(tensor)
    if isinstance(value, Mapping):
        is_same = all(_is_plain(value.get(name), part.shape, part.dtype) for name, part in own.items())
        if is_same and torch.equal(value["qmap"], own["qmap"].cpu()):
            own["codes"].copy_(value["codes"])
            own["scale"].copy_(value["scale"])
            return True
        value = _widened(value, tensor.shape)
    if not _is_plain(value, tensor.shape):
        return False
    if "" in own:
        place(tensor, value)
        return True
    host = tensor.to("cpu")  # narrowed there, where there is room for it
    host.copy_(value.float().contiguous())
    for name, part in parts_of(host).items():
        own[name].copy_(part)
    return True


def _is_plain(value: object, shape: torch.Size, dtype: torch.dtype | None = None) -> TypeGuard[Tensor]:
    """Return True for a dense tensor of real numbers on the host with this shape; files may hold other kinds."""
    return (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
        and (dtype is None or value.dtype == dtype)
    )


def _widened(parts: Mapping[str, object], shape: torch.Size) -> Tensor | None:
    """Widen 8-bit moments to 32 bits: the map's entry for each code, times the scale of its block."""
    codes, scale, entries = (parts.get(name) for name in ("codes", "scale", "qmap"))
    if not _is_plain(codes, shape, torch.uint8) or not _is_plain(entries, torch.Size([256]), torch.float32):
        return None
    if not isinstance(scale, Tensor) or not _is_plain(scale, scale.shape, torch.float32) or scale.dim() != 1:
        return None
    if not len(scale) or shape.numel() % len(scale):
        return None
    return (entries[codes.int()].reshape(len(scale), -1) * scale[:, None]).reshape(shape)
