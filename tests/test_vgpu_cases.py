"""What programs do on a card runs on the virtual one: many features in one process."""

import csv
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from plays import findings
from warm import in_process

SCRIPTS = Path(__file__).parent / "scripts"
FEATURES = (
    *("data_of_anything", "streams_and_events", "old_names", "pinned_and_pickled", "default_device", "second_card"),
    *("graphs", "one_card_of_many", "smi", "recurrent", "losses_and_layouts", "values_hold", "unknown_operator"),
    *("kernels_in_python", "caught_failures_keep_nothing", "types_are_refused", "sparse_elements_are_kept"),
    *("pinned_memory_is_known", "captures_do_not_wait", "counts_add_up", "positions_that_differ"),
    *("tokens_come_from_a_file", "sparse_rows_multiply", "views_change_in_place"),
    *("arguments_by_name", "copies_on_the_host_take_no_memory", "kinds_of_tensors_stay"),
    "marked_places_bound_a_mask",
)


ON_CARD = "import tightfit\nwith tightfit.VirtualGPU('RTX 3090') as gpu:\n"


def run_on_card(code: str, **environ: str) -> str:
    program = ON_CARD + code
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@functools.cache
def failures() -> dict[str, str]:
    script = SCRIPTS / "on_a_card.py"
    out = in_process(ON_CARD + f"    import runpy\n    runpy.run_path({str(script)!r}, run_name='__main__')")
    found: dict[str, str] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_runs_as_on_a_card(feature: str) -> None:
    assert failures()[feature] == ""


def test_no_feature_is_left_out() -> None:
    assert set(failures()) == set(FEATURES)


SHARDED = """
    import torch, torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    dist.init_process_group("nccl")
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.register_buffer("scale", torch.ones(64))
        def forward(self, x):
            return self.layer(x) * self.scale[None]
    x = torch.randn(8, 64, device="cuda")
    whole = Scaled()
    fully_shard(whole)
    whole(x).sum().backward()
    FullyShardedDataParallel(nn.Linear(64, 64).cuda())(x).sum().backward()
    with torch.device("meta"):
        late = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])
    for layer in late:
        fully_shard(layer)
    fully_shard(late)
    late.to_empty(device="cuda")
    for layer in late:
        layer.reset_parameters()
    optimizer = torch.optim.AdamW(late.parameters())
    on_host = dist.new_group(backend="gloo")
    on_host.monitored_barrier()
    assert (dist.get_backend(), dist.get_backend(on_host), dist.get_world_size(on_host)) == ("nccl", "gloo", 2)
    nn.parallel.DistributedDataParallel(module=nn.Linear(64, 64).cuda(), process_group=on_host)(x).sum().backward()
    for _ in range(2):
        late(x).sum().backward()
        optimizer.step()
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(64)).cuda()
    norm(x).sum().backward()
    assert not any("length of a result" in note for note in gpu.findings().notes)
    print(sum(weight.to_local().numel() for weight in late.parameters()), sum(w.numel() for w in late.parameters()))
"""


def test_shards_of_buffers_of_meta_models_and_of_fsdp1_and_groups_on_the_host() -> None:
    local, whole = map(int, run_on_card(SHARDED, WORLD_SIZE="2").split())
    assert local == whole // 2


ONE_OF_FOUR = """
    import torch, torch.distributed as dist
    from torch import nn
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel
    init_device_mesh("cuda", (4,))  # joins the group by itself
    x = torch.randn(8, 3, 8, device="cuda")
    gathered = [torch.empty(8, device="cuda") for _ in range(4)]
    dist.all_gather(gathered, x[0, 0])
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert work.is_completed()
    names = ["id", 3]
    dist.broadcast_object_list(names, src=1)
    layers = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8))).cuda()
    model = DistributedDataParallel(layers, device_ids=[0], static_graph=True, gradient_as_bucket_view=True)
    model.register_comm_hook(None, fp16_compress_hook)
    for _ in range(2):
        model(x).sum().backward()
    print(len(dict(model.named_parameters())))
"""


@pytest.mark.slow
def test_one_of_four_processes_does_as_it_would_among_them() -> None:
    assert run_on_card(ONE_OF_FOUR, WORLD_SIZE="4").split() == ["4"]


@pytest.mark.slow
def test_torchs_own_operator_samples_are_played_or_refused(tmp_path: Path) -> None:
    pytest.importorskip("expecttest")  # torch's samples need it
    sweep = Path(__file__).parents[1] / "benchmarks" / "virtual" / "operator_sweep.py"
    words = [sys.executable, str(sweep), "--out", str(tmp_path / "operators.csv"), "--samples", "1"]
    subprocess.run(words, check=False, capture_output=True)
    with (tmp_path / "operators.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    outcomes = Counter(row["outcome"] for row in rows)
    assert len(rows) > 2000
    assert outcomes["equal"] > 0.97 * len(rows)
    assert outcomes["differs"] <= 6  # statistics of normalisation, in another shape or type on a card
    assert outcomes["crashed"] <= 2, [row for row in rows if row["outcome"] == "crashed"]


TWO_OPTIMIZERS = """
import torch
first = torch.nn.Linear(256, 128, bias=False).cuda()
second = torch.nn.Linear(128, 64, bias=False).cuda()
optimizers = [torch.optim.SGD(first.parameters()), torch.optim.Adam(second.parameters())]
for step in range(100_000):
    second(first(torch.ones(4, 256, device="cuda"))).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
torch.ones(1 << 28, device="cuda")
"""
LONG_TRAINING = """
import torch
model = torch.nn.Linear(1024, 1024).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(10**9):
    model(torch.randn(64, 1024, device="cuda")).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad():
    model(torch.randn(2**19, 1024, device="cuda"))
"""

PLAIN_TRAINING = """
import torch
weight = torch.randn(512, 512, device="cuda", requires_grad=True)
for step in range(10**9):
    (weight @ weight).mean().backward()
    with torch.no_grad():
        weight -= 0.1 * weight.grad
        weight.grad = None
"""


def test_repeating_steps_are_left_for_the_evaluation(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LONG_TRAINING)
    found = findings(["--gpu", "RTX 3090", "--memory", "3GiB", tmp_path / "train.py"])
    assert found["outcome"] == "out_of_memory"
    assert found["failure"]["line"] == 10
    assert found["steps"] < 10


def test_steps_of_several_optimizers_repeat_in_rounds(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TWO_OPTIMIZERS)
    found = findings(["--gpu", "RTX 3090", tmp_path / "train.py"])
    assert found["peak"]["allocated_bytes"] >= 1 << 30
    assert found["steps"] < 20
    assert not found["not_played"]


IN_BACKWARD = """
import torch
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(6))).cuda()
for weight in model.parameters():
    optimizer = torch.optim.SGD([weight])
    weight.register_post_accumulate_grad_hook(lambda weight, optimizer=optimizer: optimizer.step())
for step in range(3):
    model(torch.ones(4, 64, device="cuda")).sum().backward()
torch.ones(1 << 28, device="cuda")
"""


def test_steps_within_a_backward_pass_are_no_rounds(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(IN_BACKWARD)
    found = findings(["--gpu", "RTX 3090", tmp_path / "train.py"])
    assert found["stopped_because"] == "the script ended"
    assert found["peak"]["allocated_bytes"] >= 1 << 30


COMPILED_FOR_SEVERAL = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("nccl")
hooks = len(torch.nn.modules.module._global_forward_hooks)
layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(3)))
model = DistributedDataParallel(torch.compile(layers.cuda()), device_ids=[0], bucket_cap_mb=1)
for _ in range(2):  # a graph for each of the gradients' buckets
    model(torch.zeros(8, 512, device="cuda")).sum().backward()
    assert len(torch.nn.modules.module._global_forward_hooks) == hooks, "one that is left is compiled next time"
with torch.no_grad():
    for rows in (3, 5):  # views, of which Dynamo makes its own
        model(torch.zeros(8, 512, device="cuda")[-rows:])
"""


@pytest.mark.slow
def test_a_compiled_model_stays_compiled_under_ddp(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "train.py").write_text(COMPILED_FOR_SEVERAL)
    found = findings(["--gpu", "RTX 3090", tmp_path / "train.py"], environ={**os.environ, "WORLD_SIZE": "2"})
    assert found["outcome"] == "fits"
    assert not [each for each in found["not_modelled"] if "compile" in each]


def test_steps_without_an_optimizer_repeat_too(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PLAIN_TRAINING)
    found = findings(["--gpu", "RTX 3090", tmp_path / "train.py"])
    assert found["outcome"] == "fits"
    assert found["steps"] < 20


@pytest.mark.slow
def test_a_function_is_compiled_twice(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "twice.py"
    script.write_text(
        "import torch\nf = lambda x: x.sin() + 1\nfor _ in range(2):\n    f = torch.compile(f)\n"
        "    f(torch.ones(3, device='cuda'))\n"
    )
    assert findings(["--gpu", "T4", script])["outcome"] == "fits"
