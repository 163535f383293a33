"""Processes that a script starts play on the same card, or the report says that they did not."""

from pathlib import Path

import pytest
from plays import played

from tightfit.system.private_view import why_there_is_no_view
from tightfit.vgpu.records import Findings

REASON = why_there_is_no_view()
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"no private view here: {REASON}")
MIB = 2**20
CHILD = """
import importlib.util
assert importlib.util.find_spec("torch"), "as libraries ask before they import it"
import torch
kept = torch.ones(1 << 20, device='cuda')
"""


def play(folder: Path, code: str, *command: str) -> Findings:
    (folder / "child.py").write_text(CHILD)
    (folder / "script.py").write_text(code)
    return played(["--gpu", "T4", *(command or ("script.py",))], folder=folder)


def test_a_child_by_subprocess_is_beside_its_parent(tmp_path: Path) -> None:
    code = "import subprocess, sys, torch\nkept = torch.ones(1 << 28, device='cuda')\n"
    found = play(tmp_path, f"{code}subprocess.run([sys.executable, 'child.py'], env={{'A': 'b'}}, check=True)\n")
    assert found.peak.allocated_bytes == 4 * MIB
    assert found.gpu.used_by_others_bytes > 1024 * MIB
    assert any("played on the same card: 1 process" in note for note in found.notes)


@pytest.mark.slow  # a process that loads torch, and waits
def test_a_child_answers_within_the_time_limit_of_all(tmp_path: Path) -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, 'child.py', 'waits'], check=True)\n"
    (tmp_path / "script.py").write_text(code)
    waits = "import sys, time\nwhile 'waits' in sys.argv:\n    time.sleep(0.1)\n    kept + 1\n"
    (tmp_path / "child.py").write_text(CHILD + waits)
    found = played(["--gpu", "T4", "--timeout", "40", "script.py"], folder=tmp_path)
    assert found.outcome == "fits"
    assert found.peak.allocated_bytes in (4 * MIB, 8 * MIB)
    assert found.not_played


@pytest.mark.slow  # a process that loads torch, and waits
def test_a_child_that_is_left_behind_answers(tmp_path: Path) -> None:
    waits = "import os, time\nopen('begun', 'w').close()\nwhile True:\n    time.sleep(0.1)\n    kept + 1\n"
    code = "import os, subprocess, sys, time\nsubprocess.Popen([sys.executable, 'child.py'])\n"
    (tmp_path / "script.py").write_text(f"{code}while not os.path.exists('begun'):\n    time.sleep(0.1)\n")
    (tmp_path / "child.py").write_text(CHILD + waits)
    found = played(["--gpu", "T4", "script.py"], folder=tmp_path)
    assert found.outcome == "fits"
    assert found.peak.allocated_bytes in (4 * MIB, 8 * MIB)


@pytest.mark.slow  # a process that loads torch
def test_a_child_that_is_out_of_memory_decides(tmp_path: Path) -> None:
    command = "import torch; torch.ones(1 << 33, device='cuda')"
    found = play(tmp_path, f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {command!r}])\n")
    assert found.outcome == "out_of_memory"


def test_a_child_that_keeps_our_hook_out_is_said(tmp_path: Path) -> None:
    found = play(tmp_path, "import subprocess, sys\nsubprocess.run([sys.executable, '-I', '-c', 'pass'])\n")
    assert any("NOT PLAYED" in note and "-I -c pass" in note for note in found.notes)
    assert found.not_played


def test_forks_of_multiprocessing_play(tmp_path: Path) -> None:
    code = "import multiprocessing as mp, torch\ndef work(): global kept; kept = torch.ones(1 << 20, device='cuda')\n"
    found = play(tmp_path, f"{code}p = mp.get_context('fork').Process(target=work)\np.start(); p.join()\n")
    assert (found.outcome, found.peak.allocated_bytes) == ("fits", 4 * MIB)


def test_spawned_ranks_are_one(tmp_path: Path) -> None:
    code = "import torch, torch.distributed as dist\ndef work(rank, size):\n"
    code += "    dist.init_process_group('nccl', rank=rank, world_size=size)\n    assert dist.get_world_size() == 4\n"
    code += "    torch.ones(1 << 20, device=rank)\n"
    found = play(tmp_path, f"{code}torch.multiprocessing.spawn(work, (4,), nprocs=4)\n")
    assert (found.outcome, found.peak.allocated_bytes) == ("fits", 4 * MIB)


@pytest.mark.slow  # a process that loads torch
def test_a_shell_script_plays_what_it_starts(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("mkdir out && cd out\ntorchrun --nproc_per_node=2 ../script.py\n")
    code = "import os, torch\nassert os.environ['WORLD_SIZE'] == '2'\nkept = torch.ones(1 << 20, device='cuda')\n"
    found = play(tmp_path, code, "bash", "run.sh")
    assert (found.outcome, found.peak.allocated_bytes) == ("fits", 4 * MIB)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("started", ["threading.Thread(", "mp.get_context('fork').Process("])
def test_what_nobody_waits_for_is_played_to_its_end(started: str, tmp_path: Path) -> None:
    """Python itself waits for threads and processes that are not daemons when a script is over."""
    work = "import time\ndef work():\n    import torch\n    time.sleep(0.2)\n    torch.ones(1 << 20, device='cuda')\n"
    found = play(tmp_path, f"import multiprocessing as mp, threading\n{work}{started}target=work).start()\n")
    assert found.peak.allocated_bytes == 4 * MIB


@pytest.mark.slow  # a process that loads torch
def test_a_model_that_processes_share_takes_its_memory_once(tmp_path: Path) -> None:
    """As Hogwild's: `share_memory` is nothing on a card, and a process that is given tensors opens them."""
    code = """
import torch, torch.multiprocessing as mp
def work(model):
    (gradient,) = torch.autograd.grad(model(torch.ones(1, 1024, device="cuda")).sum(), [model.weight])
    print(torch.cuda.memory_allocated())
if __name__ == "__main__":
    model = torch.nn.Linear(1024, 1024, bias=False).cuda().share_memory()
    assert model.weight.is_shared()
    started = mp.get_context("spawn").Process(target=work, args=(model,))
    started.start()
    started.join()
    assert started.exitcode == 0
"""
    found = play(tmp_path, code)
    assert found.outcome == "fits", found.stopped_because
    assert found.gpu.used_by_others_bytes > 4 * MIB
    assert found.categories["gradients"] == 4 * MIB
    assert "parameters" not in found.categories


ITEMS = """
import torch, torchvision
class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, place):
        return torch.ones(3)
"""


@pytest.mark.slow  # a process that loads torch
def test_torchvision_can_be_imported_in_a_spawned_worker(tmp_path: Path) -> None:
    """Its library may be one for a card, which loads on no other machine; its Python code needs the names."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("from . import extension, ops\n")
    (tmp_path / "torchvision/extension.py").write_text("")
    (tmp_path / "torchvision/ops.py").write_text("import torch\ntorch.ops.torchvision.nms\n")
    (tmp_path / "data.py").write_text(ITEMS)
    code = "import torch, data\nif __name__ == '__main__':\n"
    code += "    loader = torch.utils.data.DataLoader(data.Items(), num_workers=1, multiprocessing_context='spawn')\n"
    code += "    assert len([each.cuda() for each in loader]) == 4\n"
    found = play(tmp_path, code)
    assert found.outcome == "fits", found.stopped_because
