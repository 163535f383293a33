"""Training scripts in the manner of other libraries and of people in forums run on the virtual GPU as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
MIB = 2**20


def dryrun(folder: Path, script: str, *arguments: str, memory: str = "", steps: int | None = None) -> dict[str, Any]:
    """Findings of `tightfit dryrun --json` on an RTX 3060; the script's own output is shown if the test fails."""
    words = [sys.executable, "-m", "tightfit", "dryrun", "--gpu", "RTX 3060 12GB", "--json"]
    words += ["--memory", memory] if memory else []
    words += ["--steps", str(steps)] if steps else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*words, str(SCRIPTS / script), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    print(done.stderr[-4000:])
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["outcome"] == "fits" else 1)
    return found


def line_of(script: str, text: str) -> int:
    lines = (SCRIPTS / script).read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if text in line)


def counted(found: dict[str, Any], script: str) -> set[int]:
    """The script's lines for which something was made up; nothing was made up for no line."""
    assert all(Path(each["file"]).name == script for each in found["made_up_values"])
    return {each["line"] for each in found["made_up_values"]}


def test_asked_values(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for name in ("best.pt", "log.txt", "runs/old.txt"):
        (tmp_path / name).write_text("old")
    found = dryrun(tmp_path, "asked_values.py")
    assert found["outcome"] == "fits", found["stopped_because"]
    assert {"best.pt", "a buffer in memory", "log.txt", "runs"} <= set(found["not_written"])
    for name in ("best.pt", "log.txt", "runs/old.txt"):
        assert (tmp_path / name).read_text() == "old"
    assert (tmp_path / "new.txt").read_text() == "new"
    assert not (tmp_path / "checkpoint-1").exists(), "a folder without its weights looks like a checkpoint"
    lines = counted(found, "asked_values.py")
    for text in ("places = (x", "picked = x[", "masked_select(x", "not torch.isnan", "isfinite", "(loss > 1.0)"):
        assert line_of("asked_values.py", text) in lines
    for text in ("lengths.max", "mask.sum().item() == 6", "repeat_interleave", "flag.tolist", "64, 1024"):
        assert line_of("asked_values.py", text) not in lines


# transformers

GPT2_PARAMETERS = 8000 * 256 + 256 * 256 + 4 * (12 * 256**2 + 13 * 256) + 2 * 256
TOKENS = 8 * 256


@pytest.fixture(scope="module")
def trainer_peak(tmp_path_factory: pytest.TempPathFactory) -> int:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found = dryrun(tmp_path_factory.mktemp("hf"), "hf_trainer.py")
    assert found["outcome"] == "fits"
    assert found["steps"] == 4
    assert found["stopped_because"].startswith("steps 2 to 4 made the same allocations")
    assert found["categories"]["parameters"] == 4 * GPT2_PARAMETERS
    return int(found["peak"]["allocated_bytes"])


def test_trainer_peak_is_plausible(trainer_peak: int) -> None:
    logits = TOKENS * 8000 * 4
    per_layer = TOKENS * 256 * 4 * 40  # 34 bytes an activation in half precision are 17 numbers; GELU in parts is more
    assert 16 * GPT2_PARAMETERS + 2 * logits < trainer_peak < 16 * GPT2_PARAMETERS + 4 * logits + 4 * per_layer


def test_trainer_checkpointing_needs_less(trainer_peak: int, tmp_path: Path) -> None:
    found = dryrun(tmp_path, "hf_trainer.py", "--gradient-checkpointing")
    assert found["outcome"] == "fits"
    saved = trainer_peak - found["peak"]["allocated_bytes"]
    assert saved > 3 * TOKENS * 256 * 4 * 16, "three layers' activations, 16 numbers an element at least"


@pytest.mark.slow
def test_trainer_bf16_needs_less(trainer_peak: int, tmp_path: Path) -> None:
    found = dryrun(tmp_path, "hf_trainer.py", "--bf16")
    assert found["outcome"] == "fits"
    assert found["peak"]["allocated_bytes"] < trainer_peak
    assert found["categories"]["parameters"] == 4 * GPT2_PARAMETERS


def test_trainer_evaluates_and_saves(trainer_peak: int, tmp_path: Path) -> None:
    found = dryrun(tmp_path, "hf_trainer.py", steps=100)
    assert found["outcome"] == "fits"
    assert (found["steps"], found["stopped_because"]) == (8, "the script ended")
    assert found["phases"]["eval"] > 12 * GPT2_PARAMETERS
    assert {"hf-out/checkpoint-4/optimizer.pt", "hf-out/model.safetensors"} <= set(found["not_written"])
    assert not (tmp_path / "hf-out").exists()
    assert counted(found, "hf_trainer.py") == {
        line_of("hf_trainer.py", "trainer.train("),
        line_of("hf_trainer.py", "print(trainer.evaluate"),
    }


@pytest.mark.slow
def test_trainer_fails_at_its_line(trainer_peak: int, tmp_path: Path) -> None:
    found = dryrun(tmp_path, "hf_trainer.py", memory=f"{trainer_peak - 100 * MIB}")
    assert found["outcome"] == "out_of_memory"
    assert Path(found["failure"]["file"]).name == "hf_trainer.py"
    assert found["failure"]["line"] == line_of("hf_trainer.py", "trainer.train(")
    assert found["failure"]["phase"] in ("loss", "backward")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--optim", "adamw_torch_fused"], ["--bf16", "--accumulation", "2"]])
def test_trainer_llama(arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    found = dryrun(tmp_path, "hf_trainer.py", "--model", "llama", "--gradient-checkpointing", *arguments, steps=5)
    assert (found["outcome"], found["steps"]) == ("fits", 5)


@pytest.mark.slow
def test_trainer_resumes(tmp_path: Path) -> None:
    """From a checkpoint of a real run on the host, which is left as it was."""
    pytest.importorskip("accelerate")
    real = [sys.executable, str(SCRIPTS / "hf_trainer.py"), "--batch-size", "1", "--max-steps", "4"]
    subprocess.run(real, cwd=tmp_path, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = dryrun(tmp_path, "hf_trainer.py", "--batch-size", "1", "--max-steps", "8", "--resume", steps=100)
    assert (found["outcome"], found["steps"]) == ("fits", 4)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# accelerate


def test_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    found = dryrun(tmp_path, "accelerate_loop.py", "--mixed-precision", "fp16", steps=100)
    parameters = 64 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 + 1
    assert found["outcome"] == "fits"
    assert (found["steps"], found["stopped_because"]) == (16, "the script ended")
    assert found["peak"]["allocated_bytes"] > 16 * parameters
    assert found["categories"]["optimizer state"] == pytest.approx(8 * parameters, rel=1e-3)
    assert "accelerate-state/optimizer.bin" in found["not_written"]
    assert list(tmp_path.iterdir()) == []
    assert line_of("accelerate_loop.py", "correct +=") in counted(found, "accelerate_loop.py")


# Lightning


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    found = dryrun(tmp_path, "lightning_loop.py", "--precision", "16-mixed", steps=100)
    parameters = 2 * (784 * 512 + 512 * 3) + 2 * 512 + 3 + 784
    assert found["outcome"] == "fits"
    assert (found["steps"], found["stopped_because"]) == (16, "the script ended")
    assert found["categories"]["parameters"] == 4 * parameters
    assert 16 * parameters < found["peak"]["allocated_bytes"] < 20 * parameters + 32 * MIB
    assert found["phases"]["eval"] > 4 * parameters
    assert "a buffer in memory" in found["not_written"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# plain PyTorch


def block_parameters(channels_in: int, channels_out: int) -> int:
    return 10 * channels_in * channels_out + 9 * channels_out**2 + 4 * channels_out


CONVNET_PARAMETERS = block_parameters(3, 64) + block_parameters(64, 128) + block_parameters(128, 256) + 2570
CONVNET_BUFFERS = 4 * 4 * (64 + 128 + 256) + 6 * 8
FIRST_LAYER = 64 * 32 * 32 * 2
"""Bytes of one image after the first convolution, in half precision."""


def test_convnet(tmp_path: Path) -> None:
    found = dryrun(tmp_path, "convnet.py", steps=100)
    assert found["outcome"] == "fits"
    assert (found["steps"], found["stopped_because"]) == (12, "the script ended"), "the loss stays above 1 so long"
    assert found["categories"]["parameters"] == 4 * CONVNET_PARAMETERS + CONVNET_BUFFERS
    assert found["categories"]["optimizer state"] == pytest.approx(4 * CONVNET_PARAMETERS, rel=0.01)
    peak = found["peak"]["allocated_bytes"]
    assert 12 * CONVNET_PARAMETERS < peak < 14 * CONVNET_PARAMETERS + 64 * 15 * FIRST_LAYER
    assert found["not_written"] == ["convnet.pt", "convnet.pt"]
    assert line_of("convnet.py", "torch.isnan(loss)") in counted(found, "convnet.py")


def test_convnet_resumes(tmp_path: Path) -> None:
    """From a checkpoint that a real run on the host wrote."""
    real = f"""
import runpy, sys, torch
sys.argv[1:] = []
model = runpy.run_path({str(SCRIPTS / "convnet.py")!r})["ConvNet"]()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model(torch.randn(2, 3, 32, 32)).sum().backward()
optimizer.step()
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=1000)
content = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=torch.amp.GradScaler("cpu"))
torch.save({{name: each.state_dict() for name, each in content.items()}} | {{"step": 1}}, "convnet.pt")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", real], cwd=tmp_path, check=True, env=environment, capture_output=True)
    before = (tmp_path / "convnet.pt").read_bytes()
    found = dryrun(tmp_path, "convnet.py", "--max-steps", "3", steps=100)
    assert (found["outcome"], found["steps"]) == ("fits", 2), "steps 2 and 3: the first was in the checkpoint"
    assert found["phases"]["resume"] >= 8 * CONVNET_PARAMETERS
    assert (tmp_path / "convnet.pt").read_bytes() == before


@pytest.mark.slow
def test_convnet_fails_in_its_first_layers(tmp_path: Path) -> None:
    found = dryrun(tmp_path, "convnet.py", "--batch-size", "512", memory="300MiB")
    assert found["outcome"] == "out_of_memory"
    failure = found["failure"]
    assert Path(failure["file"]).name == "convnet.py"
    first, last = line_of("convnet.py", "out = F.relu"), line_of("convnet.py", "return F.relu")
    assert first <= failure["line"] <= last
    assert failure["shape"] == [512, 64, 32, 32]
    assert found["steps"] == 0


FORUM_PARAMETERS = 5000 * 2048 + 4 * (2048**2 + 2048) + 2048 * 1000 + 1000


def test_forum_user(tmp_path: Path) -> None:
    found = dryrun(tmp_path, "forum_user.py", steps=100)
    assert found["outcome"] == "fits"
    assert (found["steps"], found["caught_failures"]) == (6, 0)
    peak = found["peak"]["allocated_bytes"]
    assert peak > 20 * FORUM_PARAMETERS, "Adam's 16 bytes a parameter and the average's 4"
    assert peak < 20 * FORUM_PARAMETERS + 4096 * 4 * (14 * 2048 + 25 * 1000) + 300 * MIB
    lines = counted(found, "forum_user.py")
    for text in ("kept = logits[keep]", "torch.nonzero(~hits)", "torch.unique(", "if not torch.isfinite"):
        assert line_of("forum_user.py", text) in lines


def test_forum_user_retries_with_half_the_batch(tmp_path: Path) -> None:
    found = dryrun(tmp_path, "forum_user.py", "--batch-size", "400000", steps=2)
    assert (found["outcome"], found["steps"]) == ("fits", 2)
    assert found["caught_failures"] == 4
    assert found["peak"]["reserved_bytes"] <= 0.9 * found["gpu"]["total_bytes"]


def test_forum_user_fails_at_the_line(tmp_path: Path) -> None:
    found = dryrun(tmp_path, "forum_user.py", "--no-retry", "--batch-size", "200000")
    assert found["outcome"] == "out_of_memory"
    assert found["stopped_because"] == "the device ran out of memory"
    assert found["failure"]["line"] == line_of("forum_user.py", "x = x + F.gelu(layer(x))")
    assert found["failure"]["shape"] == [200_000, 2048]
    assert found["failure"]["tensor_bytes"] == 200_000 * 2048 * 4
