"""What libraries bring of their own runs on the virtual card: kinds of parameters, and a library of kernels."""

from pathlib import Path

import pytest
from plays import findings

QUANTIZED = """
import ctypes
import torch
from bitsandbytes import cextension

class Packed(torch.nn.Parameter):  # as 4-bit weights are
    def __new__(cls, data, requires_grad=False, scale=None):
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.scale, made.data = scale, data
        return made

    def cuda(self, device=None):
        source = super().cuda(device)
        packed = torch.empty(self.numel() // 2, dtype=torch.uint8, device="cuda")
        cextension.lib.cquantize(ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(packed.data_ptr()))
        self.data, self.scale = packed, torch.ones(16, device="cuda")
        return self

layer = torch.nn.Linear(1024, 1024, bias=False)
layer.weight = Packed(layer.weight.data)
layer.cuda()
weight = layer.weight
assert isinstance(weight, Packed) and isinstance(weight, torch.nn.Parameter) and weight.scale.shape == (16,)
assert weight.is_cuda and weight.dtype == torch.uint8 and not weight.requires_grad
assert torch.cuda.memory_allocated() == 1024 * 512 + 512, "packed, and the scales"
address = cextension.lib.cget_managed_ptr(ctypes.c_size_t(8))
ctypes.c_int64.from_address(address).value = 1
"""


def test_packed_weights_are_quantized_on_the_card(tmp_path: Path) -> None:
    """By a library of kernels that must not run: bitsandbytes' own, here a package of the test."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes/__init__.py").write_text("")
    (tmp_path / "bitsandbytes/cextension.py").write_text("lib = None\n")
    (tmp_path / "train.py").write_text(QUANTIZED)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]
    assert found["peak"]["allocated_bytes"] == 1024 * 1024 * 4 + 1024 * 512 + 512


SAMPLES = """
import torch
weight = torch.empty(64, 64, device="cuda")
torch.nn.init.trunc_normal_(weight, std=0.02, a=-0.06, b=0.06)  # torch draws again what is out of bounds
torch.nn.init.trunc_normal_(weight, a=2.0, b=3.0)
drawn = torch.empty(64, device="cuda").normal_(5.0, 0.1)
assert not ((drawn < 4.5) | (drawn > 5.5)).any()
assert torch.distributed.is_nccl_available()
"""


def test_samples_out_of_bounds_are_not_drawn_for_ever(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SAMPLES)
    found = findings(["--gpu", "A100", "--timeout", "30", tmp_path / "train.py"])
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")


LISTS = """
import torch
losses = [torch.ones(4, device="cuda").sum() for _ in range(3)]
mean = torch.tensor(losses).mean()
assert mean.device.type == "cpu" and mean.dtype == torch.float32
with torch.device("cuda"):
    pairs = torch.tensor([[losses[0], 1.0], (2, losses[1])])
assert pairs.is_cuda and pairs.shape == (2, 2)
halves = torch.as_tensor([each.bfloat16() for each in losses], device="cuda")
assert halves.dtype == torch.bfloat16 and losses[0].new_tensor([losses[1]]).is_cuda
"""


def test_lists_of_the_cards_numbers_become_tensors(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LISTS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]


COMPILES = """
import torch

@torch.compile(backend="cudagraphs")
def doubled(x):
    return x * 2

layer = torch.nn.Linear(8, 8).cuda()
for _ in range(CALLS):
    layer(doubled(torch.ones(8, device="cuda")))
"""


@pytest.mark.parametrize("calls", [0, 1])
def test_a_function_that_is_not_compiled_here_is_named_if_it_is_called(tmp_path: Path, calls: int) -> None:
    """Libraries hand functions to torch.compile as they load, which a script may never call."""
    (tmp_path / "train.py").write_text(COMPILES.replace("CALLS", str(calls)))
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]
    assert any("torch.compile" in each for each in found["not_modelled"]) == bool(calls)


WITH_A_NUMBER = """
import torch

@torch.compile
def scaled(x, by):
    return (x * by).sigmoid().sum()

for step in range(3):
    scaled(torch.ones(64, 64, device="cuda", requires_grad=True), 1.0 + step / 10).backward()
"""


@pytest.mark.slow
def test_a_number_that_changes_is_compiled_anew(tmp_path: Path) -> None:
    """Dynamo traces such a function a second time, as an error within Inductor asks it to."""
    script = tmp_path / "train.py"
    script.write_text(WITH_A_NUMBER)
    assert findings(["--gpu", "A100", script])["not_modelled"] == []


PREFETCHES = """
import torch

side, layer = torch.cuda.Stream(), torch.nn.Linear(1024, 1024).cuda()
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

def fetch():
    with torch.cuda.stream(side):
        batch = torch.empty(4 << 20, dtype=torch.uint8, device="cuda")
    batch.record_stream(torch.cuda.current_stream())

reserved = []
for _ in range(20):
    for _ in range(5):
        fetch()
        WAIT
    layer(torch.ones(8, 1024, device="cuda")).mean().backward()
    optimizer.step()
    reserved.append(torch.cuda.memory_reserved() >> 20)
assert reserved[2] == reserved[-1], reserved
"""
EVENT = "event = torch.cuda.Event(); event.record(); event.synchronize()"


@pytest.mark.parametrize("wait", ["pass", EVENT, "layer.weight.sum().item()", "side.synchronize()"])
def test_memory_that_waits_for_a_stream_comes_back(tmp_path: Path, wait: str) -> None:
    """As in FSDP, which waits for an event, and in loops that copy the next batch on a stream of its own."""
    (tmp_path / "train.py").write_text(PREFETCHES.replace("WAIT", wait))
    found = findings(["--gpu", "A100", "--steps", "20", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]
    assert found["peak"]["reserved_bytes"] < 110 << 20


ENGINE = """
class Events:
    ITERATION_COMPLETED, DATALOADER_STOP_ITERATION, EPOCH_COMPLETED, COMPLETED = range(4)

class State:
    pass

class Engine:
    def __init__(self, process):
        self.process, self.handlers, self.state = process, {}, State()
        self.ends_epoch = self.ends = False

    def _fire_event(self, event_name):
        for handler in self.handlers.get(event_name, []):
            handler()

    def terminate_epoch(self):
        self.ends_epoch = True

    def terminate(self):
        self.ends = True

    def _epoch(self):
        batches = iter(self.state.dataloader)
        self.ends_epoch = False
        for number in range(self.state.epoch_length):
            try:
                batch = next(batches)
            except StopIteration:
                self._fire_event(Events.DATALOADER_STOP_ITERATION)
                if self.ends_epoch:
                    return
                batches = iter(self.state.dataloader)
                batch = next(batches)
            self.process(batch)
            self._fire_event(Events.ITERATION_COMPLETED)
            yield
            if self.ends_epoch or self.ends:
                return

    def run(self, loader, epochs):
        self.state.dataloader, self.state.epoch_length = loader, len(loader)
        for _ in range(epochs):
            for _ in self._epoch():
                pass
            self._fire_event(Events.EPOCH_COMPLETED)
            if self.ends:
                break
        self._fire_event(Events.COMPLETED)
"""
TRAINED_BY_ENGINE = """
import torch
from ignite.engine.engine import Engine, Events

model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters())

def step(batch):
    optimizer.zero_grad()
    model(batch[0].cuda()).sum().backward()
    optimizer.step()

@torch.no_grad()
def judge(batch):
    model(torch.ones(1 << 16, 64, device="cuda"))

loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(16 * 1000, 64)), batch_size=16)
trainer, evaluator = Engine(step), Engine(judge)
trainer.handlers[Events.COMPLETED] = [lambda: evaluator.run(loader, 1)]
trainer.run(loader, 50)
torch.ones(1 << 28, device="cuda")
"""


def test_an_engine_is_asked_for_its_end(tmp_path: Path) -> None:
    """Ignite's, of which a short one is here: its loop is a generator, and handlers of its end evaluate."""
    (tmp_path / "ignite/engine").mkdir(parents=True)
    (tmp_path / "ignite/engine/engine.py").write_text(ENGINE)
    (tmp_path / "train.py").write_text(TRAINED_BY_ENGINE)
    found = findings(["--gpu", "A100", "--timeout", "30", tmp_path / "train.py"])
    assert (found["outcome"], found["stopped_because"], found["not_played"]) == ("fits", "the script ended", [])
    assert found["phases"]["eval"] > (1 << 16) * 64 * 4
    assert found["steps"] < 100
    assert found["peak"]["allocated_bytes"] >= 4 << 28
