"""Pipelines, distributed checkpoints and uneven inputs: one process of several is played without the others."""

import os
from pathlib import Path

from plays import findings

PIPELINE = """
import torch, torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

dist.init_process_group("nccl")
rank, card = dist.get_rank(), torch.device("cuda")
stage = PipelineStage(torch.nn.Linear(64, 64).cuda(), rank, 2, card{inputs})
schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=torch.nn.functional.mse_loss)
for _ in range(2):
    if rank == 0:
        schedule.step(torch.randn(8, 64, device="cuda"))
    else:
        schedule.step(target=torch.randn(8, 64, device="cuda"), losses=[])
"""
INPUTS = ', input_args=torch.randn(2, 64, device="cuda", requires_grad=True)'
CHECKPOINT = """
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

dist.init_process_group("cpu:gloo,cuda:nccl")
net = fully_shard(torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 8)))
optimizer = torch.optim.AdamW(net.parameters())
net(torch.randn(4, 256, device="cuda")).sum().backward(), optimizer.step()
model_state, optimizer_state = get_state_dict(net, optimizer)
dcp.save({"m": model_state, "o": optimizer_state}, checkpoint_id="one")
dcp.async_save({"m": model_state, "plain": torch.ones(4, device="cuda")}, checkpoint_id="two").result()
before = torch.cuda.memory_allocated()
dcp.load({"m": model_state, "o": optimizer_state}, checkpoint_id="one")
assert torch.cuda.memory_allocated() == before
set_state_dict(net, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8).cuda())
with Join([model]):
    model(torch.randn(2, 8, device="cuda")).sum().backward()
host = torch.ones(4, device="cuda").untyped_storage().cpu()
assert host.nbytes() == 16 and host.device.type == "cpu"
"""


def played(code: str, folder: Path, rank: int = 0) -> tuple[str, str]:
    (folder / "train.py").write_text(code)
    environ = {**os.environ, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    words = ["--gpu", "A100", "--rank", rank, folder / "train.py"]
    found = findings(words, folder=folder, environ=environ)
    return found["outcome"], found["stopped_because"]


def test_a_pipeline_stage_answers_what_it_can(tmp_path: Path) -> None:
    """The first stage has the shapes that it asks for; the second one names them as missing, or is given them."""
    assert played(PIPELINE.format(inputs=""), tmp_path)[0] == "fits"
    assert played(PIPELINE.format(inputs=INPUTS), tmp_path, rank=1)[0] == "fits"
    outcome, reason = played(PIPELINE.format(inputs=""), tmp_path, rank=1)
    assert outcome == "error"
    assert "pass input_args to PipelineStage" in reason


def test_distributed_checkpoints_and_join_play(tmp_path: Path) -> None:
    assert played(CHECKPOINT, tmp_path)[0] == "fits"
