"""Several cards: this process is one rank of a run without its other processes.

torch's own fake process group answers every collective at once. DDP and FSDP2 take their memory on this card (buckets,
gathered and scattered shards) as in a real run. NCCL's memory outside PyTorch's allocator is not modelled.
"""

import dataclasses
import functools
import importlib
import os
import sys
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tightfit.kernels.launch import Kernel
from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.on_import import after_import
from tightfit.vgpu.phases import EnoughSeen

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

R = TypeVar("R")
Hook = Callable[[Any, Any], "torch.futures.Future[Tensor]"]


def prepare_environment(environ: MutableMapping[str, str]) -> int:
    """Set torchrun's variables, for rank 0 unless RANK is given, where WORLD_SIZE is; return that size."""
    try:
        processes = int(environ.get("WORLD_SIZE", "1"))
    except ValueError:
        processes = 1
    if processes > 1:
        for name, value in (
            ("RANK", "0"),
            ("LOCAL_RANK", "0"),
            ("LOCAL_WORLD_SIZE", str(processes)),
            ("MASTER_ADDR", "localhost"),
            ("MASTER_PORT", "29500"),
        ):
            environ.setdefault(name, value)
    return processes


class _Silent:
    """Stands in for DDP's statistics of a step, which need CUDA timers."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _all_reduce(buffer: Tensor, ranks: int) -> Kernel:
    return Kernel(0, buffer.nbytes, str(buffer.dtype).removeprefix("torch."), exchange="all_reduce", ranks=ranks)


def install(device: VirtualDevice, rank: int = 0) -> None:
    """Answer process groups of this process without others. Import after the virtual device is on.

    `rank` is the one that is played; a process that names itself another one ends where it joins the group.
    """
    import torch.distributed as distributed

    if not distributed.is_available():
        return
    played = rank
    usual_group = distributed.init_process_group
    usual_new: Callable[..., object] = distributed.new_group
    names = {}
    """Backends that the script asked for, by the names of their groups; "world" for the first one."""

    def init_process_group(
        backend: object = None,
        init_method: object = None,
        timeout: object = None,
        world_size: int = -1,
        rank: int = -1,
        *args: object,
        **kwargs: object,
    ) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        size = world_size if world_size > 0 else int(os.environ.get("WORLD_SIZE", 1))
        own = rank if rank >= 0 else int(os.environ.get("RANK", 0))
        if own != played % size:
            raise EnoughSeen(f"rank {own}")
        usual_group("fake", store=FakeStore(), rank=own, world_size=size)
        names["world"] = str(backend or "undefined").lower()

    @functools.wraps(usual_new)
    def new_group(
        ranks: object = None, timeout: object = None, backend: object = None, *args: object, **kwargs: object
    ) -> object:
        made = usual_new(ranks, timeout, None, *args, **kwargs)
        name = getattr(made, "group_name", None)  # None for a group without this process
        if backend is not None and name is not None:
            names[name] = str(backend).lower()
        return made

    usual_backend: Callable[..., str] = distributed.get_backend

    def get_backend(group: object = None) -> str:
        """Return the name that the script asked for; torch's own functions read that of the fake group."""
        found = usual_backend(group)
        asked = names.get(getattr(group, "group_name", "world"), names["world"])
        return asked if found == "fake" and ":" not in asked else found

    mesh = importlib.import_module("torch.distributed.device_mesh")
    assign(distributed, distributed.distributed_c10d, mesh, init_process_group=init_process_group, new_group=new_group)
    assign(distributed, distributed.distributed_c10d, monitored_barrier=lambda *args, **kwargs: None)
    assign(distributed.ProcessGroup, monitored_barrier=lambda *args, **kwargs: None)
    assign(distributed, get_backend=get_backend)
    assign(distributed, is_nccl_available=lambda: True)  # its own module would use classes that there are not
    _install_ddp(device)
    _install_batch_norm(device)
    _install_spawn(rank)
    _install_objects()


def _finished(value: R) -> "torch.futures.Future[R]":
    done: torch.futures.Future[R] = torch.futures.Future()
    done.set_result(value)
    return done


def _install_ddp(device: VirtualDevice) -> None:
    """Exchange each bucket in place, or by the script's own hook: the reducer takes one hook, so it gets ours."""
    import torch.distributed as distributed
    from torch.nn.parallel import DistributedDataParallel

    usual: Callable[..., None] = DistributedDataParallel.__init__

    def in_place(
        state: "weakref.ref[DistributedDataParallel]", bucket: "torch._C._distributed_c10d.GradBucket"
    ) -> "torch.futures.Future[Tensor]":
        """Write the sum of a bucket over all processes into it, as NCCL does."""
        module = state()
        if module is not None and module._comm_hooks:
            hook, own_state = module._comm_hooks[0]
            found: torch.futures.Future[Tensor] = hook(own_state, bucket)
            return found
        if device.observer is not None:
            device.observer(_all_reduce(bucket.buffer(), distributed.get_world_size()))
        return _finished(bucket.buffer())

    in_place.__annotations__ = {}  # DDP accepts none or its own types

    def init_ddp(made: DistributedDataParallel, /, *args: object, **kwargs: object) -> None:
        usual(made, *args, **kwargs)
        register: Callable[..., None] = vars(distributed)["_register_comm_hook"]
        register(made.reducer, weakref.ref(made), in_place)
        assign(made, logger=_Silent())

    assign(
        DistributedDataParallel,
        __init__=init_ddp,
        register_comm_hook=_register_comm_hook,
        _register_builtin_comm_hook=_register_builtin,
    )


def _install_batch_norm(device: VirtualDevice) -> None:
    """Let SyncBatchNorm take the statistics of all processes: it would leave out those without a batch."""
    of_all = importlib.import_module("torch.nn.modules._functions").SyncBatchNorm
    usual: Callable[..., object] = of_all.forward

    def forward(*args: object) -> object:
        device.has_whole_lengths = True
        try:
            return usual(*args)
        finally:
            device.has_whole_lengths = False

    assign(of_all, forward=staticmethod(forward))


def _register_comm_hook(module: "DistributedDataParallel", state: object, hook: Hook) -> None:
    """Keep a script's hook for the buckets to come. RuntimeError for a second one, as DDP raises it."""
    module._check_comm_hook(hook)
    if module._comm_hooks:
        raise RuntimeError("register_comm_hook or register_builtin_comm_hook can only be called once.")
    module._comm_hooks.append((hook, state))


def _register_builtin(module: "DistributedDataParallel", comm_hook_type: object) -> None:
    """Register the hook in Python that does as one of the reducer's own."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    halves = "FP16" in str(comm_hook_type)
    module.register_comm_hook(None, default_hooks.fp16_compress_hook if halves else default_hooks.allreduce_hook)


def _install_objects() -> None:
    """Keep the objects of this process in place of those that another one would send."""
    import torch.distributed as distributed

    usual: Callable[..., None] = distributed.broadcast_object_list

    def broadcast_object_list(object_list: list[object], src: int | None = None, *rest: object, **named: Any) -> None:
        if (named.get("group_src") if src is None else src) == distributed.get_rank():
            usual(object_list, src, *rest, **named)

    def recv_object_list(object_list: list[object], src: int | None = None, *_: object, **__: object) -> int:
        return src or 0

    assign(
        distributed,
        distributed.distributed_c10d,
        broadcast_object_list=broadcast_object_list,
        recv_object_list=recv_object_list,
    )
    assign(distributed.Work, is_completed=lambda work: True, is_success=lambda work: True)
    after_import("torch.distributed.checkpoint.default_planner", _accept_own_part)
    after_import("torch.distributed.checkpoint._state_dict_stager", _stage_by_copies)
    after_import("torch.distributed.checkpoint.filesystem", _read_own_parts)
    after_import("torch.distributed.algorithms.join", _give_own_work)
    _install_futures()


def _stage_by_copies(module: ModuleType) -> None:
    """Let `dcp.async_save` copy tensors of the card as wholes: it copies storages, which have no bytes here."""
    stager = module.__dict__["StateDictStager"]
    usual: Callable[..., object] = stager._offload_tensor

    def offload(self: object, tensor: torch.Tensor, memo: dict[int, object], non_blocking: bool = False) -> object:
        if tensor.is_cuda and not is_traceable_wrapper_subclass(tensor):  # as DTensor is, whose part comes by itself
            return memo.setdefault(id(tensor), tensor.detach().cpu())
        return usual(self, tensor, memo, non_blocking)

    assign(stager, _offload_tensor=offload)


def _accept_own_part(planner: ModuleType) -> None:
    """Take a checkpoint's plan as complete: the parts of the other processes are not here."""
    usual: Callable[..., object] = planner.__dict__["_validate_global_plan"]

    def valid(*args: object) -> object:
        """Return the answer that this version of torch takes as valid: an empty list of errors, or True."""
        return [] if isinstance(usual(*args), list) else True

    assign(planner, _validate_global_plan=valid)


def _read_own_parts(module: ModuleType) -> None:
    """Leave what other processes would have written as it is: their part of a checkpoint is not in its folder."""
    reader = module.__dict__["FileSystemReader"]
    usual: Callable[..., object] = reader.read_data

    def read_data(self: Any, plan: Any, planner: object) -> object:  # torch's own objects
        there = [each for each in plan.items if each.storage_index in self.storage_data]
        return usual(self, dataclasses.replace(plan, items=there), planner)

    assign(reader, read_data=read_data)


def _give_own_work(module: ModuleType) -> None:
    """Give `Join` torch's own handle of its collective, which C++ takes."""
    join = module.__dict__["Join"]
    usual: Callable[[object], object] = join.notify_join_context

    def notify_join_context(joinable: object) -> object:
        work = usual(joinable)
        return work.own if isinstance(work, _Work) else work

    assign(join, notify_join_context=staticmethod(notify_join_context))


class _Work:
    """Handle of a collective, with a future of its result."""

    def __init__(self, work: Any, result: list[Tensor], held: Tensor | None = None) -> None:
        self.own, self._result, self._held = work, result, held

    def get_future(self) -> "torch.futures.Future[list[Tensor]]":
        return _finished(self._result)

    def wait(self, *args: object) -> object:
        self._held = None
        return self.own.wait(*args)

    def __getattr__(self, name: str) -> object:
        return getattr(self.own, name)


def _install_futures() -> None:
    import torch.distributed as distributed

    usual: Callable[..., object] = distributed.all_reduce

    @functools.wraps(usual)
    def all_reduce(tensor: Tensor, *args: object, **kwargs: object) -> object:
        work = usual(tensor, *args, **kwargs)
        return None if work is None else _Work(work, [tensor])

    assign(distributed, distributed.distributed_c10d, all_reduce=all_reduce)
    usual_gather: Callable[..., object] = distributed.all_gather
    usual_scatter: Callable[..., object] = distributed.reduce_scatter

    @functools.wraps(usual_gather)
    def all_gather(tensor_list: list[Tensor], tensor: Tensor, *args: object, **kwargs: object) -> object:
        stacked = _stacked(tensor_list)
        work = usual_gather(tensor_list, tensor, *args, **kwargs)
        return None if work is None else _Work(work, tensor_list, stacked)

    @functools.wraps(usual_scatter)
    def reduce_scatter(output: Tensor, input_list: list[Tensor], *args: object, **kwargs: object) -> object:
        stacked = _stacked(input_list)
        work = usual_scatter(output, input_list, *args, **kwargs)
        return None if work is None else _Work(work, [output], stacked)

    assign(distributed, distributed.distributed_c10d, all_gather=all_gather, reduce_scatter=reduce_scatter)


def _stacked(tensors: list[Tensor]) -> Tensor | None:
    """Take what NCCL's stacked copy of a list takes until the call is waited for; unlike sizes it does not stack."""
    if not tensors or not all(isinstance(each, Tensor) and each.is_cuda for each in tensors):
        return None
    shape = tensors[0].shape
    alike = all(each.shape == shape for each in tensors)
    return tensors[0].new_empty((len(tensors), *shape)) if alike else None


def _install_spawn(rank: int) -> None:
    """Let `torch.multiprocessing.spawn` play one of its processes, in this one."""
    import torch.multiprocessing as processes

    def spawn(
        fn: Callable[..., object], args: Sequence[object] = (), nprocs: int = 1, *others: object, **kwargs: object
    ) -> None:
        fn(rank % max(1, nprocs), *args)

    assign(processes, sys.modules["torch.multiprocessing.spawn"], spawn=spawn)
