"""Asks for values and shapes that depend on data, where the answers are known: it checks them itself."""

import io
import os
import shutil

import torch
import torch.nn.functional as F

# What came from the host is known, and what operators make of it.
lengths = torch.tensor([3, 1, 2]).to("cuda")
assert lengths.max().item() == 3
assert lengths.tolist() == [3, 1, 2]
mask = torch.arange(3, device="cuda")[None] < lengths[:, None]
assert mask.sum().item() == 6
assert not mask.all()
assert mask[1].tolist() == [True, False, False]
assert mask.nonzero().shape == (6, 2)
assert torch.randn(3, 3, device="cuda")[mask].shape == (6,)
assert torch.repeat_interleave(torch.arange(3, device="cuda"), lengths).tolist() == [0, 0, 0, 1, 2, 2]
assert torch.unique(torch.tensor([2, 1, 2], device="cuda")).tolist() == [1, 2]
assert torch.ones(64, 1024, dtype=torch.long).to("cuda").all()
mask[0, 0] = False
assert mask.sum().item() == 5
assert torch.bincount(lengths, minlength=2).tolist() == [0, 0, 0, 0] or torch.bincount(lengths).shape == (4,)

# What is not known has the largest shape that it can have.
x = torch.randn(100, 8, device="cuda", requires_grad=True)
before = torch.cuda.memory_allocated()
places = (x > 0).nonzero()
assert places.shape == (800, 2)
assert torch.cuda.memory_allocated() - before == 800 * 2 * 8 + (-800 * 2 * 8) % 512
picked = x[(x > 0).any(dim=1)]
assert picked.shape == (100, 8)
picked.sum().backward()
assert x.grad.shape == x.shape
assert torch.masked_select(x, x > 0).shape == (800,)
with torch.no_grad():
    x[x < 0] = 0.0
    x[x[:, 0] > 1] = torch.ones(5, 8, device="cuda")

# A made-up value stays the same, and what follows from it agrees.
loss = F.mse_loss(x, torch.zeros_like(x))
assert loss.item() == loss.item() == float(loss)
assert (loss > 1.0) == (loss.item() > 1.0)
assert not torch.isnan(loss)
assert torch.isfinite(x).all()
assert f"{loss:.2f}" == f"{loss.item():.2f}"
total = torch.zeros((), device="cuda")
total += loss.detach()
assert total.item() == loss.item()

# Written in place, a value is no longer what it was.
flag = torch.zeros(2, device="cuda")
flag[0] = 1.0
assert flag.tolist() == [1.0, 0.0]
counters = [torch.zeros((), device="cuda") for _ in range(2)]
torch._foreach_add_(counters, torch.randn((), device="cuda").item())

# What is saved can be loaded again, and the files from before stay.
torch.save({"x": x, "step": 3}, "best.pt")
loaded = torch.load("best.pt", map_location="cuda")
assert loaded["x"].shape == x.shape
assert loaded["x"].is_cuda
assert loaded["step"] == 3
buffer = io.BytesIO()
torch.save([x], buffer)
buffer.seek(0)
assert torch.load(buffer)[0].shape == x.shape
with open("best.pt", "w") as file:
    file.write("written over")
os.remove("log.txt")
os.replace("best.pt", "log.txt")
shutil.rmtree("runs")
with open("new.txt", "w") as file:
    file.write("new")
os.makedirs("checkpoint-1")
torch.save({"x": x}, "checkpoint-1/model.pt")
with open("checkpoint-1/config.json", "w") as file:
    file.write("{}")
assert x.data_ptr() != loss.data_ptr()
with torch.inference_mode():
    y = torch.ones(3, device="cuda") * 2
assert y[0].item() == 2.0
