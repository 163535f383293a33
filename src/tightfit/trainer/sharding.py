"""Spread a model over the processes of a run with FSDP2: each keeps a part of weights, gradients and moments.

Groups. A block's attention and MLP are one group, gathered in autocast's dtype. Everything else is the root's group and
stays in its own dtype: the embedding, which is also the output projection, the positions and all layer norms. That is
what autocast computes with: it casts the operands of matrix products, while the residual stream and the layer norms
are float32. One policy for whole blocks would round both. So a sharded step computes with the same numbers as one
process, up to the order of sums. Gradients are summed in float32 and go to float32 weights.

Failures. FSDP2 has collectives in forward and backward, and a process that fails there would leave the others waiting.
So all processes agree before each collective, through FSDP2's own hooks for custom collectives, and a collective starts
on all of them or on none. A failed pass leaves gathered weights, half-summed gradients, hooks and states in FSDP2's
modules. They are not repaired: `rebuild` makes new modules around the same shards and drops the old ones. FSDP2's own
`reset_iter_state`, of torch 2.13, keeps the gradients of earlier passes that were not yet summed.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tightfit.models.model import GPT
from tightfit.trainer.distributed import World
from tightfit.trainer.recovery import exchanging
from tightfit.wording import say

# Newer names of the same functions; the older ones warn.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


def shard_mesh(world: World, device: torch.device, shard_size: int) -> DeviceMesh:
    """Return the processes of a run as rows of `shard_size` that share a copy of the model; all call this together."""
    # A linear layer returns a view, which is only added to the residual stream, and never changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if shard_size == world.size:
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    copies = world.size // shard_size
    return init_device_mesh(device.type, (copies, shard_size), mesh_dim_names=("replicate", "shard"))


@dataclass
class Shards:
    """A model with its parameters spread over processes by their first axis, as `torch.chunk` splits it."""

    build: Callable[[], GPT]
    """Makes the whole model on the meta device, where nothing is allocated."""
    mesh: DeviceMesh
    dtype: torch.dtype
    """Dtype of matrix products under autocast."""
    keeps_weights: bool = False
    """True: gathered weights stay until the end of a step, as ZeRO-2 has them (Rajbhandari et al. 2020, arXiv
    1910.02054): one gathering a step. False: for a block's passes only, as ZeRO-3."""
    compile_mode: str | None = None
    """torch.compile's mode; None: not compiled."""
    agree: Callable[[], object] = lambda: None
    """Called before each collective; raises if another process failed."""
    sums_each_pass: bool = False
    """True: gradients are summed over processes in every pass, and no process holds those of the whole model from one
    pass to the next. False: once a step, which takes less time."""
    model: GPT = field(init=False)
    _parameters: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.model = self._wrapped()

    def _wrapped(self) -> GPT:
        model = self.build()
        low = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.transformer["h"]:
            parts = [block.attn, block.mlp]
            fully_shard(parts, mesh=self.mesh, mp_policy=low, reshard_after_forward=not self.keeps_weights)
        fully_shard(model, mesh=self.mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(_AgreedAllGather(self))  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(_AgreedReduceScatter(self))  # type: ignore[arg-type]
                module.set_force_sum_reduction_for_comms(True)  # the loss is divided by all tokens; gloo only sums
                module.set_gradient_divide_factor(1.0)
        if self.compile_mode is not None:
            model.compile_parts(self.compile_mode, around_hooks=False)
        return model

    def allocate(self, device: torch.device) -> None:
        """Allocate this process's parts, with their values not yet set."""
        self.model.to_empty(device=device)
        self._parameters = dict(self.model.named_parameters())

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return each parameter of this process, by its name in the model."""
        return self._parameters.items()

    def rebuild(self) -> GPT:
        """Drop all that a failed pass left, and return a new model around the same parts."""
        new = self._wrapped()
        new.loss_kind, new.checkpointed_blocks = self.model.loss_kind, self.model.checkpointed_blocks
        tied = {"lm_head.weight": self._parameters["transformer.wte.weight"]}
        new.load_state_dict(self._parameters | tied, assign=True)
        self.model = new.train(self.model.training)
        return self.model

    def begin_pass(self, *, is_last: bool) -> None:
        """Sum the gradients over processes in this pass if it is the last one of a step, or if each is to."""
        self.model.set_requires_gradient_sync(is_last or self.sums_each_pass)  # type: ignore[operator]
        if self.keeps_weights:
            self.model.set_reshard_after_backward(is_last)  # type: ignore[operator]

    def end_evaluation(self) -> None:
        """Drop the gathered weights that were kept for a backward pass."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def same_weights(self) -> None:
        """Copy the weights of the first copy of the model to all others, as `trainer.distributed.same_weights`."""
        if self.mesh.ndim == 2:
            for parameter in self._parameters.values():
                assert isinstance(parameter, DTensor)
                distributed.broadcast(parameter.to_local(), group=self.mesh.get_group("replicate"), group_src=0)

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to the norm `limit`; return the norm of the whole gradient before."""
        gradients = [p.grad.to_local() for p in self._parameters.values() if isinstance(p.grad, DTensor)]
        square = nn.utils.get_total_norm(gradients).square()
        self.agree()
        with _exchanging():
            distributed.all_reduce(square, group=self.mesh.get_group("shard"))
        norm = square.sqrt()
        torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))  # as torch's clip_grad_norm_
        return norm

    @torch.no_grad()
    def place(self, tensor: Tensor, whole: Tensor) -> None:
        """Copy this process's part of `whole` into `tensor`, or all of `whole` if `tensor` is not spread."""
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            first = min(self.mesh.get_local_rank("shard") * self._rows(tensor), whole.shape[0])
            local.copy_(whole[first : first + local.shape[0]])
        else:
            tensor.copy_(whole)

    def _rows(self, tensor: DTensor) -> int:
        """Rows of each part but the last ones, which may have fewer."""
        return -(-tensor.shape[0] // self.mesh["shard"].size())


class _Allocates:
    """Part of FSDP2's interface for collectives of one's own: the memory of a collective."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AgreedAllGather(_Allocates):
    """FSDP2's all-gather, once all processes are ready for it."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: distributed.ProcessGroup, async_op: bool = False
    ) -> distributed.Work | None:
        self._shards.agree()
        with _exchanging():
            work: distributed.Work | None = _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        return work


class _AgreedReduceScatter(_Allocates):
    """FSDP2's reduce-scatter, once all processes are ready for it."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: distributed.ProcessGroup,
        op: distributed.ReduceOp,
        async_op: bool = False,
    ) -> distributed.Work | None:
        self._shards.agree()
        with _exchanging():
            work: distributed.Work | None = _reduce_scatter(
                output_tensor, input_tensor, group=group, op=op, async_op=async_op
            )
        return work


def _exchanging() -> AbstractContextManager[None]:
    return exchanging(lambda error: say("trainer.sharding.exchange_failed", reason=error))
