"""A training loop for torchrun: several_cards.py ddp|fsdp"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("nccl")
device = f"cuda:{os.environ['LOCAL_RANK']}"
torch.cuda.set_device(device)
model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)]).to(device)
if sys.argv[1] == "fsdp":
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
elif dist.get_world_size() > 1:
    model = DDP(model, device_ids=[int(os.environ["LOCAL_RANK"])])
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for _ in range(100):
    model(torch.randn(32, 1024, device=device)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    total = torch.ones(1, device=device)
    dist.all_reduce(total)
    dist.barrier()
print(f"rank {dist.get_rank()} of {dist.get_world_size()}")
dist.destroy_process_group()
