"""Several cards: this process is one rank of a run without its other processes.

torch's own fake process group answers every collective at once. DDP and FSDP2 take their memory on this card (buckets,
gathered and scattered shards) as in a real run. NCCL's memory outside PyTorch's allocator is not modelled.
"""

import os
import sys
from collections.abc import Callable, MutableMapping, Sequence

import torch
from torch import Tensor

from tightfit.kernels.launch import Kernel
from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.phases import EnoughSeen


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
    from torch.nn.parallel import DistributedDataParallel

    if not distributed.is_available():
        return
    played = rank
    usual_group, usual_ddp = distributed.init_process_group, DistributedDataParallel.__init__

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

    def in_place(state: object, bucket: "torch._C._distributed_c10d.GradBucket") -> "torch.futures.Future[Tensor]":
        """Write the sum of a bucket over all processes into it, as NCCL does."""
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        if device.observer is not None:
            device.observer(_all_reduce(bucket.buffer(), distributed.get_world_size()))
        return done

    in_place.__annotations__ = {}  # DDP accepts none or its own types

    def init_ddp(module: DistributedDataParallel, *args: object, **kwargs: object) -> None:
        usual: Callable[..., None] = usual_ddp
        usual(module, *args, **kwargs)
        module.register_comm_hook(None, in_place)
        assign(module, logger=_Silent())

    assign(distributed, distributed.distributed_c10d, init_process_group=init_process_group)
    assign(distributed, is_nccl_available=lambda: True)  # its own module would use classes that there are not
    assign(DistributedDataParallel, __init__=init_ddp)
    _install_spawn(rank)


def _install_spawn(rank: int) -> None:
    """Let `torch.multiprocessing.spawn` play one of its processes, in this one."""
    import torch.multiprocessing as processes

    def spawn(
        fn: Callable[..., object], args: Sequence[object] = (), nprocs: int = 1, *others: object, **kwargs: object
    ) -> None:
        fn(rank % max(1, nprocs), *args)

    assign(processes, sys.modules["torch.multiprocessing.spawn"], spawn=spawn)
