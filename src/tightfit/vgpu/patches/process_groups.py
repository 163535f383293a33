"""Several cards: this process is rank 0 of a run whose other processes are not there.

torch's own fake process group answers every collective at once; what DDP and FSDP2 take on this card (buckets, gathered
and scattered shards) is taken as in a real run. What NCCL takes outside PyTorch's allocator is not modelled.
"""

import os
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor


def prepare_environment(environ: MutableMapping[str, str]) -> int:
    """Set what torchrun would for rank 0 where WORLD_SIZE is given; returns the number of processes."""
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
    """DDP's statistics of a step, for which there are no CUDA timers."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def install() -> None:
    """Let process groups of this process be answered without others. Import after the virtual device is on."""
    import torch.distributed as distributed
    from torch.nn.parallel import DistributedDataParallel

    if not distributed.is_available():
        return
    usual_group, usual_ddp = distributed.init_process_group, DistributedDataParallel.__init__

    def init_process_group(backend: object = None, *args: Any, **kwargs: Any) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        size = int(os.environ.get("WORLD_SIZE", kwargs.get("world_size", 1)))
        usual_group("fake", store=FakeStore(), rank=0, world_size=size)

    def in_place(state: object, bucket: Any) -> "torch.futures.Future[Tensor]":
        """The sum of a bucket over all processes is written into it, as NCCL does."""
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    in_place.__annotations__ = {}  # DDP accepts none or its own types

    def init_ddp(module: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        usual_ddp(module, *args, **kwargs)
        module.register_comm_hook(None, in_place)
        given: Any = module
        given.logger = _Silent()

    library: Any = distributed
    library.init_process_group = library.distributed_c10d.init_process_group = init_process_group
    ddp: Any = DistributedDataParallel
    ddp.__init__ = init_ddp
