"""Pipelines, distributed checkpoints and uneven inputs: one process of several is played without the others."""

import os
from pathlib import Path

from plays import findings
from warm import in_process

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


def test_ddp_finds_no_timer_that_would_ask_the_driver() -> None:
    """In a build of torch with CUDA, the reducer's timers record CUDA's events; the host's stand for them."""
    said = in_process("""
        import ctypes, pathlib, torch, torch.distributed as dist
        from tightfit.vgpu.patches import backend
        def step():
            module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
            for _ in range(2):
                module(torch.ones(2, 8)).sum().backward()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        print(step())
        (library,) = (pathlib.Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")
        backend._forget_timers(ctypes.CDLL(str(library)))
        try:
            step()
        except RuntimeError as error:  # DDP's log asks for the timer; a play has none
            print("timer_" in str(error))
    """)
    assert said.split() == ["None", "True"]


OBJECTS = """
import pickle, torch, torch.distributed as distributed

distributed.init_process_group("nccl")
ranks = distributed.get_world_size()

def gathered(data):  # as in DETR, and in many scripts from before `all_gather_object`
    sent = torch.frombuffer(bytearray(pickle.dumps(data)), dtype=torch.uint8).to("cuda")
    own = torch.tensor([sent.numel()], device="cuda")
    sizes = [torch.tensor([0], device="cuda") for _ in range(ranks)]
    distributed.all_gather(sizes, own)
    longest = max(int(each.item()) for each in sizes)
    parts = [torch.empty((longest,), dtype=torch.uint8, device="cuda") for _ in range(ranks)]
    distributed.all_gather(parts, sent)
    return [pickle.loads(each.cpu().numpy().tobytes()[: int(size.item())]) for each, size in zip(parts, sizes)]

assert gathered({"boxes": [1, 2, 3]}) == [{"boxes": [1, 2, 3]}] * ranks
assert gathered(list(range(100_000))) == [list(range(100_000))] * ranks, "more than 64 KiB"
found = [torch.empty(3, dtype=torch.int64, device="cuda") for _ in range(ranks)]
distributed.gather(torch.arange(3, device="cuda"), found)
assert all(each.tolist() == [0, 1, 2] for each in found)
uneven = [torch.empty(3 + rank, dtype=torch.int64, device="cuda") for rank in range(ranks)]
distributed.all_gather(uneven, torch.arange(3, device="cuda"))
assert uneven[0].tolist() == [0, 1, 2]
many = [torch.empty(1 << 18, device="cuda") for _ in range(ranks)]
before = torch.cuda.memory_allocated()
work = distributed.all_gather(many, many[0], async_op=True)
stacked = torch.cuda.memory_allocated() - before
work.wait()
assert (stacked, torch.cuda.memory_allocated()) == (ranks << 20, before), "NCCL gathers into one tensor"
torch.cuda.reset_peak_memory_stats()
distributed.reduce_scatter(many[0], many)
assert torch.cuda.max_memory_allocated() - before == ranks << 20
"""


def test_objects_that_processes_send_as_bytes_are_those_of_this_process(tmp_path: Path) -> None:
    script = tmp_path / "objects.py"
    script.write_text(OBJECTS)
    found = findings(["--gpu", "A100", script], environ={"WORLD_SIZE": "4"})
    assert found["outcome"] == "fits", found["stopped_because"]
    assert any("objects.py" in each["file"] for each in found["made_up_values"]), "the others were made up"
