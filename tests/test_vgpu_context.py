"""The virtual GPU from Python: as a context of one's own process, and for a function."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from warm import in_process

import tightfit
from tightfit.errors import ConfigError, DeviceError
from tightfit.units import MIB


def test_torch_says_what_the_card_would() -> None:
    said = in_process("""
        import tightfit
        with tightfit.VirtualGPU("RTX 3060 12GB", memory_bytes=12 << 30, used_bytes=1 << 30, context_bytes=0):
            import torch
            print(torch.cuda.is_available(), torch.cuda.device_count(), torch.cuda.get_device_name())
            print(torch.cuda.get_device_capability(), torch.cuda.get_device_properties(0).multi_processor_count)
            x = torch.zeros(1 << 20, device="cuda")
            print(x.device, x.is_cuda, torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
            print(torch.cuda.mem_get_info())
            del x
            print(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved())
            torch.cuda.empty_cache()
            print(torch.cuda.memory_reserved(), torch.accelerator.current_accelerator())
            print("GPU reserved memory" in torch.cuda.memory_summary())
    """)
    assert said.splitlines() == [
        "True 1 NVIDIA GeForce RTX 3060",
        "(8, 6) 28",
        f"cuda:0 True {4 * MIB} {20 * MIB}",
        f"({(11 << 30) - 20 * MIB}, {12 << 30})",
        f"0 {4 * MIB} {20 * MIB}",
        "0 cuda",
        "True",
    ]


def test_memory_runs_out_and_can_be_caught() -> None:
    said = in_process("""
        import tightfit
        with tightfit.VirtualGPU("RTX 3060 12GB", memory_bytes=1 << 30, context_bytes=0) as gpu:
            import torch
            try:
                torch.empty(3 << 28, device="cuda")
            except torch.OutOfMemoryError as error:
                print(str(error)[:73])
            torch.empty(1 << 20, device="cuda")
        found = gpu.findings()
        print(found.outcome, found.caught_failures, found.peak.reserved_bytes)
    """)
    assert said.splitlines() == [
        "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacit",
        f"fits 1 {20 * MIB}",
    ]


def test_optimizers_built_before_the_move_train_what_was_moved() -> None:
    """On a card `module.to` keeps each parameter the object that it was."""
    said = in_process("""
        import tightfit
        with tightfit.VirtualGPU("A100") as gpu:
            import torch
            model = torch.nn.Linear(256, 256)
            model.tied = model.weight
            before = [id(p) for p in model.parameters()]
            optimizer = torch.optim.Adam(model.parameters())
            model.to("cuda")
            print(before == [id(p) for p in model.parameters()], model.weight.device, model.tied is model.weight)
            for _ in range(2):
                model(torch.zeros(8, 256, device="cuda")).sum().backward()
                print(model.weight.grad.device)
                optimizer.step()
        print(gpu.findings().categories["optimizer state"] >= 8 * (256 * 256 + 256))
    """)
    assert said.splitlines() == ["True cuda:0 True", "cuda:0", "cuda:0", "True"]


def test_the_lines_within_run_to_their_end() -> None:
    """A script is stopped when its steps repeat; one's own lines are not."""
    said = in_process("""
        import tightfit
        with tightfit.VirtualGPU("A100"):
            import torch
            model = torch.nn.Linear(8, 8, device="cuda")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(20):
                model(torch.zeros(2, 8, device="cuda")).sum().backward()
                optimizer.step()
            print(step)
    """)
    assert said == "19\n"


def test_values_that_are_known_are_true() -> None:
    said = in_process("""
        import tightfit
        with tightfit.VirtualGPU("A100") as gpu:
            import torch
            mask = torch.ones(4, 8, dtype=torch.long).to("cuda")
            print(bool((mask == 1).all()), torch.arange(5, device="cuda").sum().item(), mask.sum().item())
            print(torch.full((3,), 2.5, device="cuda")[1].item(), torch.tensor([3, 1, 2], device="cuda").tolist())
            print(gpu.findings().made_up_values)
            x = torch.randn(100, device="cuda")
            print(bool(torch.isnan(x).any()), bool(torch.isfinite(x).all()), x.cpu().shape)
            print(sum(each.times for each in gpu.findings().made_up_values) > 0)
    """)
    assert said.splitlines() == ["True 10 32", "2.5 [3, 1, 2]", "[]", "False True torch.Size([100])", "True"]


def test_a_model_larger_than_the_host() -> None:
    """70 billion parameters, 280 GB in float32, in a process of less than 1.5 GiB."""
    said = in_process("""
        import tightfit
        with tightfit.VirtualGPU("H200", memory_bytes=1 << 40) as gpu:
            import torch
            from torch import nn
            layers = nn.ModuleList(nn.Linear(8192, 8192 * 13) for _ in range(80))
            for layer in layers:
                nn.init.normal_(layer.weight)
            layers.to("cuda")
            print(round(gpu.findings().categories["parameters"] / 4e9, 1))
        peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print(int(peak.split()[1]) < 1.5 * 2**20)
    """)
    assert said.splitlines() == ["69.8", "True"]


def allocate() -> None:
    import torch

    torch.empty(1 << 20, device="cuda")


def test_a_function_is_run_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from test_vgpu_context import allocate as importable

    found = tightfit.dryrun(importable, gpu="A100")
    assert (found.outcome, found.peak.requested_bytes) == ("fits", 4 * MIB)
    import torch

    assert not torch.cuda.is_available()


def test_a_process_has_one() -> None:
    said = in_process("""
        import tightfit
        with tightfit.VirtualGPU("A100"):
            pass
        try:
            with tightfit.VirtualGPU("H200"):
                pass
        except tightfit.DeviceError as error:
            print(error)
    """)
    assert said.startswith("this process already has a virtual NVIDIA A100-SXM4-40GB, and a process has one; use ")


def test_what_cannot_be_run() -> None:
    with pytest.raises(ConfigError, match=r"cannot be sent to another process .*lock"):
        tightfit.dryrun(lambda lock: None, threading.Lock(), gpu="A100")
    with pytest.raises(ConfigError, match=r"missing\.py is not a file"):
        tightfit.dryrun("missing.py", gpu="A100")
    with pytest.raises(DeviceError, match="Voodoo 2"):
        tightfit.VirtualGPU("Voodoo 2")


def test_pinned_memory_is_had_without_a_driver() -> None:
    said = in_process("""
        import tightfit
        with tightfit.VirtualGPU("RTX 3060 12GB", context_bytes=0):
            import torch
            made = [torch.empty(4, pin_memory=True), torch.zeros(4, pin_memory=True), torch.rand(4, pin_memory=True)]
            made += [torch.full((4,), 2.0, pin_memory=True), torch.ones(4).new_empty(4, pin_memory=True)]
            print(len(made), float(made[3].sum()), {str(one.device) for one in made})
            large = torch.empty(1 << 30, pin_memory=True)  # 4 GiB, of which nothing is written
            large.copy_(torch.zeros(1 << 30, device="cuda"), non_blocking=True)
            x = torch.ones(1 << 20, device="cuda", requires_grad=True)
            before = torch.cuda.memory_allocated()
            with torch.autograd.graph.save_on_cpu(pin_memory=True):
                y = x.sin().exp()
            print((torch.cuda.memory_allocated() - before) >> 20)
            y.sum().backward()
            print(x.grad.shape)
    """)
    assert said.splitlines() == ["5 8.0 {'cpu'}", "4", "torch.Size([1048576])"], "the result alone is on the card"


@pytest.mark.parametrize(
    ("last_line", "code"),
    [
        pytest.param("pass", 0, id="end", marks=pytest.mark.slow),
        pytest.param("raise ValueError('the script failed')", 1, id="exception", marks=pytest.mark.slow),
        pytest.param("sys.exit(3)", 3, id="sys.exit", marks=pytest.mark.slow),
        pytest.param("    sys.exit(3)", 3, id="sys.exit on the device"),
        pytest.param("    torch.empty(1 << 40, device='cuda')", 1, id="out of memory", marks=pytest.mark.slow),
    ],
)
def test_interpreter_exits_normally(last_line: str, code: int, tmp_path: Path) -> None:
    """Exit codes stay, `atexit` runs and output is flushed; freed memory is overwritten, so that using it shows."""
    script = tmp_path / "exits.py"
    program = """
        import atexit, sys
        import torch
        import tightfit

        atexit.register(print, "atexit ran")
        with tightfit.VirtualGPU("RTX 2060") as gpu:
            model = torch.nn.Linear(8, 8, device="cuda")
            optimizer = torch.optim.AdamW(model.parameters())
            model(torch.randn(8, 8, device="cuda")).sum().backward()
            optimizer.step()
            print("trained")
    """
    script.write_text(textwrap.dedent(program) + last_line + "\n")
    environ = {**os.environ, "MALLOC_PERTURB_": "85", "PYTHONMALLOC": "malloc"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == ["trained", "atexit ran"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads' states from /proc")
@pytest.mark.slow
def test_exit_waits_for_the_threads_of_autograd() -> None:
    """A thread of that name is still at work when the program ends: without the wait, its last line never comes."""
    said = in_process("""
        import ctypes, threading, time
        import tightfit
        with tightfit.VirtualGPU("RTX 2060"):
            pass

        def work():
            ctypes.CDLL(None).prctl(15, b"pt_autograd_7", 0, 0, 0)  # PR_SET_NAME
            started.set()
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                pass
            print("let go", flush=True)
            threading.Event().wait()

        started = threading.Event()
        threading.Thread(target=work, daemon=True).start()
        started.wait()
    """)
    assert said == "let go\n"


@pytest.mark.slow
def test_fifty_processes_end_with_their_own_code() -> None:
    program = """
        import sys, torch, tightfit
        with tightfit.VirtualGPU("RTX 2060"), torch.autograd.graph.save_on_cpu(pin_memory=True):
            torch.ones(1 << 20, device="cuda", requires_grad=True).sin().exp().sum().backward()
        sys.exit(7)
    """
    runs = [subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=120) for _ in range(50)]
    assert [run.returncode for run in runs] == [7] * 50
