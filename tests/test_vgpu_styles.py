"""Ways of training that loops and libraries differ in: where the optimizer steps, and what takes derivatives."""

from pathlib import Path

import pytest
from plays import findings

IN_BACKWARD = """
import torch

model = torch.nn.Sequential(*[torch.nn.Linear(256, 256, bias=False) for _ in range(12)]).cuda()
optimizers = {each: torch.optim.Adam([each], foreach=False) for each in model.parameters()}

def update(parameter):
    optimizers[parameter].step()
    optimizers[parameter].zero_grad()

for parameter in model.parameters():
    parameter.register_post_accumulate_grad_hook(update)
done = []
for step in range(100_000):
    model(torch.ones(4, 256, device="cuda")).sum().backward()
    done.append(step)
torch.ones(1 << 26, device="cuda")
assert len(done) < 20
"""
DERIVATIVES = """
import torch
from torch.func import hessian, jacfwd, jvp

weight = torch.randn(32, 8, device="cuda")
x = torch.randn(8, device="cuda")

def function(x):
    return torch.tanh(weight @ x)

assert hessian(lambda x: function(x).sum())(x).shape == (8, 8)
assert jacfwd(function)(x).shape == (32, 8)
assert [each.shape for each in jvp(function, (x,), (torch.ones_like(x),))] == [(32,), (32,)]
with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
    torch.nn.Conv2d(3, 3, 3).cuda()(torch.ones(1, 3, 8, 8, device="cuda")).sum().backward()
"""
COMPILED_STEP = """
import torch

model = torch.nn.Linear(256, 256, bias=False).cuda()
optimizer = torch.optim.Adam(model.parameters(), capturable=True)
before = torch.cuda.memory_allocated()

@torch.compile
def step():
    optimizer.step()

done = []
for number in range(100_000):
    model(torch.ones(4, 256, device="cuda")).sum().backward()
    step()
    optimizer.zero_grad()
    done.append(number)
torch.ones(1 << 26, device="cuda")
assert torch.cuda.memory_allocated() - before >= 2 * 256 * 256 * 4, "two states"
assert len(done) < 20
"""
BACKENDS = """
import torch

seen = []

def mine(graph, inputs):
    seen.append(graph)
    return graph.forward

def peak(backend):
    layers = torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256)
    model = torch.nn.Sequential(*layers).cuda()
    run = torch.compile(model, backend=backend) if backend else model
    for _ in range(2):  # cuBLAS takes its workspaces in the first
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(torch.ones(4096, 256, device="cuda")).sum().backward()
        model.zero_grad()
    return torch.cuda.max_memory_allocated() - before

eager = peak(None)
assert eager == peak(mine) == peak("eager"), (eager, peak(mine), peak("eager"))
assert len(seen) == 1
assert 0.5 < peak("aot_eager") / eager < 1.5

@torch.compile
def capped(x, weight, targets):
    logits = 30 * torch.tanh(torch.nn.functional.linear(x, weight) / 30)
    return torch.nn.functional.cross_entropy(logits.float().view(-1, 4096), targets)

x = torch.ones(1, 8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
weight = torch.ones(4096, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
before = torch.cuda.memory_allocated()
torch.cuda.reset_peak_memory_stats()
capped(x, weight, torch.zeros(8192, dtype=torch.int64, device="cuda")).backward()
logits = 8192 * 4096 * 2
assert torch.cuda.max_memory_allocated() - before < 1.2 * logits, "their gradient is written over them"
"""
SAFETENSORS = """
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model

model = torch.nn.Linear(256, 256).cuda()
save_file(model.state_dict(), "model.safetensors", metadata={"format": "pt"})
loaded = load_file("model.safetensors")
assert loaded["weight"].shape == (256, 256) and loaded["weight"].device.type == "cpu"
assert load_file("model.safetensors", device="cuda")["bias"].is_cuda
with safe_open("model.safetensors", framework="pt", device=0) as opened:
    assert sorted(opened.keys()) == ["bias", "weight"] and opened.metadata() == {"format": "pt"}
    assert opened.get_tensor("weight").is_cuda
    part = opened.get_slice("weight")
    assert part.get_shape() == [256, 256] and part.get_dtype() == "F32" and part[:8].shape == (8, 256)
save_model(model, "whole.safetensors")
load_model(model, "whole.safetensors")
model.load_state_dict(loaded)
"""
TRAINER = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

class Data(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        tokens = torch.randint(0, 100, (16,))
        return {"input_ids": tokens, "labels": tokens}

class Heard(TrainerCallback):
    seen = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen.append("evaluate")

    def on_save(self, args, state, control, **kwargs):
        self.seen.append("save")

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seen.append("epoch")

arguments = TrainingArguments(
    "out", num_train_epochs=50, per_device_train_batch_size=8, eval_strategy="steps", eval_steps=500, save_steps=500,
    report_to=[], disable_tqdm=True,
)
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=100, n_positions=16))
trainer = Trainer(model, arguments, train_dataset=Data(8005), eval_dataset=Data(16), callbacks=[Heard])
trainer.train()
assert {"evaluate", "save", "epoch"} <= set(Heard.seen), Heard.seen
assert Heard.seen.count("epoch") < 5
"""


FILES_AND_POOLS = """
import os, shutil, torch

weight = torch.ones(1024, 1024, device="cuda")
torch.save({"model": {"weight": weight, "tied": weight}, "halves": [weight.half()]}, "saved.pt")
assert 6 << 20 <= os.path.getsize("saved.pt") < 7 << 20, "a tied weight is written once"
assert os.stat("saved.pt").st_blocks * 512 < 1 << 20
shutil.copy2("saved.pt", "best.pt")
assert os.path.getsize("best.pt") == os.path.getsize("saved.pt") and os.stat("best.pt").st_blocks * 512 < 1 << 20
loaded = [torch.load("best.pt", map_location=where)["halves"][0].device.type for where in (
    None, "cpu", "cuda:0", {"cuda:0": "cpu"}, lambda storage, location: storage, lambda storage, location: None
)]
assert loaded == ["cuda", "cpu", "cuda", "cpu", "cpu", "cuda"], loaded
os.replace("saved.pt", "moved.pt")
assert torch.load("moved.pt")["halves"][0].dtype == torch.float16
pool = torch.cuda.MemPool()
before = torch.cuda.memory_reserved()
with torch.cuda.use_mem_pool(pool):
    torch.empty(4 << 20, dtype=torch.uint8, device="cuda")
torch.cuda.empty_cache()
assert torch.cuda.memory_reserved() == before + (20 << 20), "the pool keeps it"
del pool
torch.cuda.empty_cache()
assert torch.cuda.memory_reserved() == before
"""

KINDS = """
import io, os, torch

bag = torch.nn.EmbeddingBag(1000, 32, mode="mean", sparse=True).cuda()
bag(torch.randint(0, 1000, (20,), device="cuda"), torch.tensor([0, 5, 9], device="cuda")).sum().backward()
assert bag.weight.grad.is_sparse and bag.weight.grad._values().shape == (20, 32)
torch.optim.SGD(bag.parameters(), lr=0.1).step()
lazy = torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.LazyBatchNorm1d()).cuda()
assert lazy(torch.ones(2, 5, device="cuda")).is_cuda and lazy[0].weight.shape == (8, 5) and lazy[0].weight.is_cuda
solved = torch.linalg.lstsq(torch.ones(7, 5, device="cuda"), torch.ones(7, 2, device="cuda"))
assert solved.solution.shape == (5, 2) and solved.residuals.shape == (2,) and solved.rank.numel() == 0
quantized = torch.quantize_per_tensor(torch.ones(4, device="cuda"), 0.1, 0, torch.qint8)
assert quantized.int_repr().dtype == torch.int8
assert torch.cuda.default_generators[0].set_offset(8).get_offset() == 8
scripted = torch.jit.script(torch.nn.Linear(8, 8).cuda())
scripted.save("scripted.pt")
torch.jit.save(torch.jit.freeze(scripted.eval()), held := io.BytesIO())
held.seek(0)
assert torch.jit.load(held, map_location="cuda").weight.is_cuda
assert not torch.jit.load("scripted.pt", "cpu").weight.is_cuda
class Named(torch.nn.Linear):
    save = ()
    def forward(self, x):
        return x if 0 in self.save else super().forward(x)
named = Named(8, 8).cuda()
named.save = [1]
traced = torch.jit.trace(named, torch.ones(2, 8, device="cuda"))
traced.save("traced.pt")
assert named.save == [1] and traced(named(torch.ones(2, 8, device="cuda"))).shape == (2, 8)
layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
encoder = torch.nn.TransformerEncoder(layer, 2).cuda().eval()
with torch.inference_mode():
    mask = torch.tensor([[0] * 7, [0] * 4 + [1] * 3], device="cuda").bool()
    assert encoder(torch.randn(2, 7, 32, device="cuda"), src_key_padding_mask=mask).shape == (2, 7, 32)
nodes = torch.arange(100_000).cuda()
assert int(nodes.max()) == 99_999 and int(nodes[:5].max()) <= 99_999
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # too late
"""
SETTINGS_OF_SCRIPT = """
import torch, os

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "roundup_power2_divisions:4"
held = torch.empty((9 << 20) // 8, dtype=torch.uint8, device="cuda")
assert torch.cuda.memory_allocated() == (5 << 20) // 4, torch.cuda.memory_allocated()
weights = torch.zeros(1 << 18, device="cuda", requires_grad=True)
optimizer = torch.optim.LBFGS([weights], max_iter=20, history_size=10)

def closure():
    optimizer.zero_grad()
    loss = (weights * 1.5 - 1).square().sum()
    loss.backward()
    return loss

optimizer.step(closure)
assert len(optimizer.state[weights]["old_dirs"]) == 10 and optimizer.param_groups[0]["tolerance_grad"] == 1e-7
"""


@pytest.mark.parametrize(
    "code",
    [
        KINDS,
        SETTINGS_OF_SCRIPT,
        IN_BACKWARD,
        DERIVATIVES,
        SAFETENSORS,
        FILES_AND_POOLS,
        pytest.param(COMPILED_STEP, marks=pytest.mark.slow),
        pytest.param(BACKENDS, marks=pytest.mark.slow),
        pytest.param(TRAINER, marks=pytest.mark.slow),
    ],
    ids=[
        "kinds",
        "settings_of_script",
        "in_backward",
        "derivatives",
        "safetensors",
        "files_and_pools",
        "compiled_step",
        "backends",
        "trainer",
    ],
)
def test_a_way_of_training_plays_to_its_end(code: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(code)
    found = findings(["--gpu", "A100", tmp_path / "train.py"], folder=tmp_path)
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert not found["not_played"]
