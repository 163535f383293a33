"""What public training programs do beside training runs as on a card, and long evaluations are cut short."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import psutil
import pytest
from msgspec.structs import replace
from plays import findings, played

from tightfit.simulation.client import Simulator
from tightfit.simulation.dry_run import dryrun_script
from tightfit.simulation.requests import ScriptRequest
from tightfit.vgpu.records import Findings, Place, Settings

LIBRARIES = """
import os, subprocess, sys, torch
from torch import nn

asked = "import os, torch; print(torch.cuda.device_count(), os.environ.get('CUDA_VISIBLE_DEVICES'))"
assert os.environ.get("CUDA_VISIBLE_DEVICES") is None, "some read its first number"
assert subprocess.check_output([sys.executable, "-c", asked]) == b"1 None\\n"

@torch.jit.script
def shifted(x: torch.Tensor) -> torch.Tensor:
    return x + torch.tensor([1.0]).to(x.device)

layer = nn.Linear(300, 300)
kind = type(layer.weight)  # as libraries do that fill a model weight by weight
frozen = kind(torch.ones(300, 300), requires_grad=False).to("cuda")
weight = kind(torch.ones(300, 300, device="cuda"))
assert isinstance(weight, nn.Parameter) and weight.requires_grad
assert frozen.is_cuda and not frozen.requires_grad
layer._parameters["weight"] = weight
layer.cuda()
shifted(layer(torch.ones(2, 300, device="cuda"))).sum().backward()
assert weight.grad.shape == (300, 300)
"""
EVALUATIONS = """
import contextlib, torch
from torch.utils.data import DataLoader, TensorDataset

model = torch.nn.Linear(8, 8).cuda()
data = TensorDataset(torch.randn(16 * 60 + 5, 8))
counted, sizes, kept = [], [], []

@torch.no_grad()
def estimate():
    losses = torch.zeros(900)
    for k in range(900):
        losses[k] = model(torch.randn(16, 8, device="cuda")).mean().item()
        counted.append(k)
    return losses.mean()

def sample(x):
    with torch.no_grad():
        for k in reversed(range(900)):
            x = model(x)
            counted.append(k)
    return x

@torch.no_grad()
def denoise(x, callback=None):
    with contextlib.nullcontext():
        for k, time in enumerate(torch.arange(60, device="cuda")):
            x = model(x)
            counted.append(k)
            if callback is not None and k == 30:
                x = callback(x)
    return x

@torch.no_grad()
def rare():
    for k in range(20):
        out = model(torch.randn(16, 8, device="cuda"))
        if k == 15:
            large = out.repeat(1 << 16, 1)
    return large

@torch.no_grad()
def evaluate():
    for (batch,) in DataLoader(data, 16):
        model(batch.cuda())
        sizes.append(len(batch))

@torch.no_grad()
def predict():
    for (batch,) in DataLoader(data, 16):
        kept.append(model(batch.cuda()))
    return torch.cat(kept)

estimate(), evaluate(), sample(torch.ones(2, 8, device="cuda")), denoise(torch.ones(2, 8, device="cuda"))
called = len(counted)
assert denoise(torch.ones(2, 8, device="cuda"), lambda x: x + 1).shape == (2, 8)
assert called + 30 < len(counted) < called + 60
del counted[called:]
assert predict().shape == (16 * 60 + 5, 8)
assert rare().shape == (16 << 16, 8)
assert len(counted) < 40, counted
assert len(sizes) < 20 and sizes[-1] == 5, sizes
"""
DETECTION = """
import torch
from torchvision.ops import boxes

data = torch.rand(1000, 4, device="cuda")
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_allocated()
chosen = torch.ops.torchvision.nms(data, data[:, 0], 0.5)
assert chosen.dtype == torch.int64 and 0 < len(chosen) <= 1000
assert data[chosen].shape[1] == 4
assert torch.cuda.max_memory_allocated() - before >= 1000 * 16 * 8, "a word for each box and 64 others"
"""
SAVING = """
import torch

class Checkpointer:
    def save(self, model):
        return torch.cat([each.flatten().repeat(100) for each in model.parameters()])

model = torch.nn.Linear(256, 256, bias=False).cuda()
optimizer = torch.optim.SGD(model.parameters())
for step in range(1000):
    model(torch.ones(4, 256, device="cuda")).sum().backward()
    optimizer.step()
Checkpointer().save(model)
"""
SAVED_FROM_HOST = """
import torch
model = torch.nn.Linear(1024, 1024, bias=False).cuda()
optimizer = torch.optim.SGD(model.parameters())
model(torch.ones(4, 1024, device="cuda")).sum().backward()
optimizer.step()
torch.save(model.cpu().state_dict(), "model.pt")
model.cuda()
output = model(torch.ones(4, 1024, device="cuda"))
largest = torch.empty(4096, 1024, device="cuda")
del largest, output
optimizer.zero_grad()
"""
WAITING_IN_DEL = """
import time, torch
torch.nn.Linear(8, 8).cuda()(torch.ones(1, 8, device="cuda")).sum().backward()

class Loader:
    def __del__(self):  # as a DataLoader's iterator, which joins its workers
        for _ in range(60):
            time.sleep(0.1)

loader = Loader()
del loader
while True:
    time.sleep(0.05)
"""
WAITING = """
import time, torch
torch.nn.Linear(8, 8).cuda()(torch.ones(1, 8, device="cuda")).sum().backward()
print("waiting", flush=True)
while True:
    time.sleep(0.05)
"""


def written(folder: Path, code: str) -> Path:
    script = folder / "program.py"
    script.write_text(code)
    return script


def test_scripted_functions_and_parameters_made_by_their_type_run(tmp_path: Path) -> None:
    found = findings(["--gpu", "A100", written(tmp_path, LIBRARIES)])
    assert found["outcome"] == "fits", found["stopped_because"]
    assert any("TorchScript" in each for each in found["not_modelled"])


def test_a_scripted_function_that_nothing_calls_is_not_a_limit(tmp_path: Path) -> None:
    """timm and others script functions as they are imported, which most models never call."""
    code = "import torch\n@torch.jit.script\ndef f(x: torch.Tensor) -> torch.Tensor:\n    return x + 1\n"
    found = findings(["--gpu", "A100", written(tmp_path, code + "torch.ones(8, device='cuda')\n")])
    assert not any("TorchScript" in each for each in found["not_modelled"])
    found = findings(["--gpu", "A100", written(tmp_path, code + "f(torch.ones(8, device='cuda'))\n")])
    assert any("TorchScript" in each for each in found["not_modelled"])


def test_a_long_evaluation_is_cut_short_where_its_iterations_repeat(tmp_path: Path) -> None:
    found = findings(["--gpu", "A100", written(tmp_path, EVALUATIONS)])
    assert found["outcome"] == "fits", found["stopped_because"]
    assert found["peak"]["allocated_bytes"] >= (16 << 16) * 8 * 4, "the rare line was left out"
    assert sum("trains nothing" in each for each in found["notes"]) == 4


@pytest.mark.parametrize("loads", [True, False])
def test_boxes_are_suppressed(tmp_path: Path, loads: bool) -> None:
    """By an operator that torchvision's own library defines, if it loads; here a package of the test does."""
    (tmp_path / "torchvision/ops").mkdir(parents=True)
    (tmp_path / "torchvision/__init__.py").write_text(
        "import torch\nlibrary = torch.library.Library('torchvision', 'FRAGMENT')\n"
        + "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n" * loads
    )
    (tmp_path / "torchvision/ops/boxes.py").write_text(f"def _assert_has_ops(): assert {loads}\n")
    script = written(tmp_path, DETECTION + "boxes._assert_has_ops()\n")
    found = findings(["--gpu", "A100", script])
    assert found["outcome"] == "fits", found["stopped_because"]


def test_torchvision_is_imported_where_its_library_does_not_load(tmp_path: Path) -> None:
    """Its package gives a meaning to operators of that library, right after it tried to load it."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("from . import extension\nfrom . import _meta_registrations\n")
    (tmp_path / "torchvision/extension.py").write_text("")
    (tmp_path / "torchvision/_meta_registrations.py").write_text(
        "import torch\n"
        + "".join(
            f"@torch.library.register_fake('torchvision::{name}')\n"
            f"def meta_{name}(dets, scores, iou_threshold): return dets.new_empty(0, dtype=torch.long)\n"
            for name in ("nms", "qnms")
        )
    )
    found = findings(["--gpu", "A100", written(tmp_path, "import torchvision, torch\ntorch.ones(8, device='cuda')\n")])
    assert found["outcome"] == "fits", found["stopped_because"]


def test_saving_by_a_library_after_the_loop_is_played(tmp_path: Path) -> None:
    found = findings(["--gpu", "A100", written(tmp_path, SAVING)])
    assert found["outcome"] == "fits"
    assert found["steps"] < 20
    assert found["peak"]["allocated_bytes"] >= 2 * 256 * 256 * 4 * 100


def test_a_script_that_puts_nothing_on_the_card_is_told_so(tmp_path: Path) -> None:
    told = "the script put nothing on the card"
    found = findings(["--gpu", "A100", written(tmp_path, "def main():\n    raise SystemExit('never called')\n")])
    assert (found["outcome"], found["peak"]["allocated_bytes"]) == ("fits", 0)
    assert any(told in each for each in found["notes"])
    found = findings(["--gpu", "A100", written(tmp_path, "import torch\ntorch.ones(8, device='cuda')\n")])
    assert not any(told in each for each in found["notes"])


DRAWN = """
import torch
from torch.utils.tensorboard import SummaryWriter

net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(), torch.nn.ReLU()).cuda()
writer = SummaryWriter("runs")
writer.add_graph(net, torch.rand(1 << 16, 64, device="cuda"))
assert net.training
writer.close()
"""


def test_a_model_that_tensorboard_draws_runs_once(tmp_path: Path) -> None:
    found = findings(["--gpu", "A100", written(tmp_path, DRAWN)], folder=tmp_path)
    assert found["outcome"] == "fits", found["stopped_because"]
    rows = found["peak"]["requested_bytes"] - found["categories"].get("workspace", 0)
    assert rows == (64 * 64 + 64) * 4 + 3 * (64 << 16) * 4, "weights, input, product, and its positive part"


OWN_KERNELS = """
from torch.utils.cpp_extension import load_inline
import torch

kernel = "__global__ void scan() {}"
try:
    load_inline(name="fast_scan", cpp_sources="", cuda_sources=kernel)
except RuntimeError:
    torch.ones(1 << 20, device="cuda")
load_inline(name="only_scan", cpp_sources="", cuda_sources=kernel)
"""


def test_cuda_code_of_the_scripts_own_is_refused_in_a_sentence(tmp_path: Path) -> None:
    found = findings(["--gpu", "A100", written(tmp_path, OWN_KERNELS)])
    assert "CUDA code of its own, only_scan" in found["stopped_because"]
    assert "line 10" in found["stopped_because"]
    assert found["peak"]["requested_bytes"] == 4 << 20, "the code for a machine without a compiler"
    assert any("fast_scan: not compiled" in each for each in found["not_modelled"])


FAILS_BY_ITS_CODE = """
import torch

model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())
for step in range(2000):
    model(torch.ones(4, 8, device="cuda")).sum().backward()
    optimizer.step()
torch.ones(8, device="cuda").sum(normalize=True)
"""


def test_a_wrong_call_is_told_at_once(tmp_path: Path) -> None:
    """No iteration that was passed over can cause it: they are not played for it."""
    found = findings(["--gpu", "A100", written(tmp_path, FAILS_BY_ITS_CODE)])
    assert found["outcome"] == "error"
    assert found["steps"] < 200


class Answers:
    """A simulator with prepared answers."""

    def __init__(self, *answers: Findings) -> None:
        self._answers = list(answers)

    def play(self, requests: list[ScriptRequest]) -> list[Findings]:
        return [self._answers.pop(0) for _ in requests]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ("ValueError: expected sequence of length 6 at dim 1 (got 4)", "fits"),
        ("RuntimeError: Could not infer dtype of NoneType", "fits"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'best.pt'", "fits"),
        ("RuntimeError: no such font", "error"),
    ],
)
def test_errors_of_iterations_that_were_passed_over_are_no_verdict(error: str, outcome: str, tmp_path: Path) -> None:
    """The examples of OGB make a tensor of the lists that their epochs fill; in time, not all can be played."""
    script = written(tmp_path, "import torch\ntorch.ones(8, device='cuda')\n")
    whole = replace(played(["--gpu", "A100", script]), not_played=[Place(file="train.py", line=7)])
    failed = replace(whole, outcome="error", is_shortened=True, stopped_because=f"the script failed: {error}")
    found = dryrun_script(script, [], Settings(gpu="A100"), simulator=cast("Simulator", Answers(failed, whole)))
    assert found.outcome == outcome
    assert error in found.stopped_because
    assert bool(found.not_played)


CHECKED_FOR_NAN = """
import torch

torch.autograd.set_detect_anomaly(True)
weights = torch.rand(8, 8, device="cuda", requires_grad=True)
(weights @ weights).relu().sum().backward()
"""


def test_what_autograd_reads_by_itself_is_no_answer_to_the_script(tmp_path: Path) -> None:
    found = findings(["--gpu", "A100", written(tmp_path, CHECKED_FOR_NAN)])
    assert (found["outcome"], found["made_up_values"]) == ("fits", [])


MASKS_OF_THE_HOST = """
import torch

class Merged(torch.nn.Linear):
    def __init__(self):
        super().__init__(256, 768)
        chosen = self.weight.new_zeros((768,), dtype=torch.bool).view(3, -1)
        chosen[[True, False, True], :] = True
        self.chosen = chosen.view(-1)
        found = self.weight[self.weight > 0], self.weight.nonzero(), self.weight.unique()
        assert {each.device.type for each in (chosen, *found)} == {"cpu"}

layer = Merged().cuda()
assert int(layer.chosen.sum()) == 512, "the positions are data of the host"
rows = torch.zeros(8, 768, device="cuda")
rows[:, layer.chosen.cuda()] = torch.ones(8, 512, device="cuda")
"""


def test_masks_on_parameters_of_the_host_stay_there(tmp_path: Path) -> None:
    """loralib's MergedLinear makes one."""
    found = findings(["--gpu", "A100", written(tmp_path, MASKS_OF_THE_HOST)])
    assert found["outcome"] == "fits", found["stopped_because"]


CAUGHT_AND_ENDED = """
import sys, torch

try:
    {}
except Exception as error:
    print("Error executing job with overrides: []")
    sys.exit(1)
"""


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("raise KeyError('lr')", "KeyError: 'lr'"),
        ("import argparse; argparse.ArgumentParser().parse_args(['-x'])", "unrecognized arguments: -x"),
        ("raise RuntimeError('<urlopen error [Errno -3] Temporary failure in name resolution>')", "network"),
    ],
)
def test_the_error_is_told_for_which_a_script_ended_itself(line: str, why: str, tmp_path: Path) -> None:
    """Hydra prints errors, and ends the script by its own."""
    found = findings(["--gpu", "A100", written(tmp_path, CAUGHT_AND_ENDED.format(line))])
    assert found["outcome"] == "error"
    assert why in found["stopped_because"]


def test_gradients_that_come_back_with_a_model_are_gradients(tmp_path: Path) -> None:
    """BERT-pytorch saves its model from the host, and then tests it."""
    found = findings(["--gpu", "A100", written(tmp_path, SAVED_FROM_HOST)])
    weights = 1024 * 1024 * 4
    assert (found["categories"]["parameters"], found["categories"]["gradients"]) == (weights, weights)


@pytest.mark.slow
def test_a_script_that_waits_as_an_object_dies_is_ended_after_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tightfit", "--lang", "en", "dryrun", "--gpu", "A100", "--timeout", "1"]
    ended = subprocess.run(
        [*command, str(written(tmp_path, WAITING_IN_DEL))], capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.startswith("FITS AS FAR AS IT WAS PLAYED"), ended.stdout
    assert "Exception ignored" not in ended.stderr


@pytest.mark.parametrize("to_all", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_interrupted_play_tells_what_it_saw(to_all: bool, tmp_path: Path) -> None:
    """Also where a batch system sends its signal to all processes of a job, and `timeout` twice to the command."""
    command = [sys.executable, "-m", "tightfit", "--lang", "en", "dryrun", "--gpu", "A100", "--no-explain"]
    play = subprocess.Popen(
        [*command, str(written(tmp_path, WAITING))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert play.stderr is not None
    for line in play.stderr:
        if "waiting" in line:
            break
    processes = psutil.Process(play.pid).children(recursive=True) if to_all else []
    for each in (*processes, play):
        each.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    play.send_signal(signal.SIGTERM)
    out, _ = play.communicate(timeout=60)
    assert out.startswith("FITS AS FAR AS IT WAS PLAYED"), out
    assert "it was interrupted" in out
    unbroken = "".join(out.split())
    assert re.search(r"notplayed:\S*program\.py:[456]", unbroken), out  # the lines that tell and wait
