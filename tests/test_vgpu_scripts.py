"""Training scripts in the manner of other libraries and of people in forums run on the virtual GPU as they are."""

import json
import os
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from plays import findings, played

from tightfit.report.dryrun_page import dryrun_page
from tightfit.wording.report import words

SCRIPTS = Path(__file__).parent / "scripts"
MIB = 2**20


PATCHES = {"TIGHTFIT_DRYRUN_FILES": "patches"}
"""The user's files are kept by patches alone, as where the kernel gives no private view."""


def dryrun(
    folder: Path,
    script: str,
    *arguments: str,
    memory: str = "",
    steps: int | None = None,
    environ: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Findings of `tightfit dryrun --json` on an RTX 3060."""
    words: list[object] = ["--gpu", "RTX 3060 12GB"]
    words += ["--memory", memory] if memory else []
    words += ["--steps", steps] if steps else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environ or {})}
    return findings([*words, SCRIPTS / script, *arguments], folder=folder, environ=environment)


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
    found = dryrun(tmp_path, "asked_values.py", environ=PATCHES)
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
    assert found["steps"] == 8, "played on for the evaluation after the training"
    assert found["stopped_because"] == "the script ended"
    assert found["not_played"] == []
    assert found["categories"]["parameters"] == 4 * GPT2_PARAMETERS
    return int(found["peak"]["allocated_bytes"])


@pytest.mark.slow
def test_trainer_peak_is_plausible(trainer_peak: int) -> None:
    logits = TOKENS * 8000 * 4
    per_layer = TOKENS * 256 * 4 * 40  # 34 bytes an activation in half precision are 17 numbers; GELU in parts is more
    assert 16 * GPT2_PARAMETERS + 2 * logits < trainer_peak < 16 * GPT2_PARAMETERS + 4 * logits + 4 * per_layer


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_forum_user_retries_with_half_the_batch(tmp_path: Path) -> None:
    found = dryrun(tmp_path, "forum_user.py", "--batch-size", "400000", steps=2)
    assert (found["outcome"], found["steps"]) == ("fits", 2)
    assert found["caught_failures"] == 4
    assert found["peak"]["reserved_bytes"] <= 0.9 * found["gpu"]["total_bytes"]


GIVES_UP = """
import sys, torch
try:
    torch.nn.Linear(8, 128).cuda()(torch.empty(1 << 22, 8, device="cuda"))
except torch.OutOfMemoryError as error:
    {answer}
"""


FILLS = 'held = [torch.empty(1 << 26, device="cuda") for _ in range(100)]'


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("print(error)", "out_of_memory"),
        ("sys.exit(1)", "out_of_memory"),
        ("raise ValueError('use a smaller batch') from None", "out_of_memory"),
        ("torch.empty(1 << 20, device='cuda')", "fits"),
        ("torch.empty(1 << 20, device='cuda'); sys.exit('no image in the folder')", "error"),
    ],
)
def test_a_script_that_catches_the_error_and_gives_up_did_not_fit(tmp_path: Path, answer: str, outcome: str) -> None:
    (tmp_path / "script.py").write_text(GIVES_UP.format(answer=answer))
    found = played(["--gpu", "A100", "--memory", "2GiB", tmp_path / "script.py"])
    assert found.outcome == outcome
    assert (found.failure and found.failure.line) == (4 if outcome == "out_of_memory" else None)
    assert found.stopped_because.endswith("caught the error and ended") == (outcome == "out_of_memory")


def test_a_script_that_fills_the_card_on_purpose_is_told_so(tmp_path: Path) -> None:
    code = GIVES_UP.replace('torch.nn.Linear(8, 128).cuda()(torch.empty(1 << 22, 8, device="cuda"))', FILLS)
    (tmp_path / "script.py").write_text(code.format(answer="print(error)"))
    found = played(["--gpu", "A100", "--memory", "2GiB", tmp_path / "script.py"])
    verdict = dryrun_page(found, words("en")).verdict
    assert verdict.startswith("FITS on ")
    assert verdict.endswith("It ran out of memory 1 time, which the script caught.")


def test_a_script_that_catches_its_own_error_before_a_model_runs_is_told_so(tmp_path: Path) -> None:
    """A library that is missing here, or a wrong path: the card had room, and nothing is known of the training."""
    lines = ["try:", "    net = torch.nn.Linear(8, 8).cuda()", "    {act}", "except Exception as error: print(error)"]
    for act, is_told in (("raise FileNotFoundError", True), ("net(torch.ones(1, 8, device='cuda'))", False)):
        (tmp_path / "script.py").write_text("import torch\n" + "\n".join(lines).format(act=act))
        found = played(["--gpu", "A100", tmp_path / "script.py"])
        told = "No model was called, and no optimizer step was made."
        assert dryrun_page(found, words("en")).verdict.endswith(told) == is_told


def test_forum_user_fails_at_the_line(tmp_path: Path) -> None:
    found = dryrun(tmp_path, "forum_user.py", "--no-retry", "--batch-size", "200000")
    assert found["outcome"] == "out_of_memory"
    assert found["stopped_because"] == "the device ran out of memory"
    assert found["failure"]["line"] == line_of("forum_user.py", "x = x + F.gelu(layer(x))")
    assert found["failure"]["shape"] == [200_000, 2048]
    assert found["failure"]["tensor_bytes"] == 200_000 * 2048 * 4


OVERWRITES = {
    "open through a link": "with open('latest.pt', 'wb') as file: torch.save({'x': x}, file)",
    "torch.save through a link": "torch.save({'x': x}, 'latest.pt')",
    "Path.write_text through a link": "Path('latest.pt').write_text('new')",
    "open of a link's new name": "os.link('ckpt.pt', 'more.pt'); open('more.pt', 'wb').write(b'new')",
    "after chmod": "os.chmod('ckpt.pt', 0o600); open('ckpt.pt', 'wb').write(b'new')",
    "after Path.touch": "Path('ckpt.pt').touch(); open('ckpt.pt', 'wb').write(b'new')",
    "after another program's touch": "subprocess.run(['touch', 'ckpt.pt']); open('ckpt.pt', 'wb').write(b'new')",
    "shutil.copy": "shutil.copy('new.pt', 'ckpt.pt'); shutil.copy('new.pt', 'ckpt.pt')",
    "shutil.copy2 through a link": "shutil.copy2('new.pt', 'latest.pt'); shutil.copy2('new.pt', 'latest.pt')",
    "shutil.copyfile": "shutil.copyfile('new.pt', 'ckpt.pt')",
    "shutil.move": "shutil.move('new.pt', 'ckpt.pt')",
    "os.replace": "os.replace('new.pt', 'ckpt.pt')",
    "os.replace by keyword": "os.replace(src='new.pt', dst='ckpt.pt')",
    "Path.rename": "Path('new.pt').rename('ckpt.pt')",
    "os.replace of a link": "os.replace('new.pt', 'latest.pt')",
    "os.rename away": "os.rename('ckpt.pt', 'away.pt')",
    "os.remove": "os.remove('ckpt.pt')",
    "Path.unlink of a link": "Path('latest.pt').unlink()",
    "a new link in an old one's place": "os.remove('latest.pt'); os.symlink('new.pt', 'latest.pt')",
    "a new hard link in an old file's place": "os.remove('ckpt.pt'); os.link('new.pt', 'ckpt.pt')",
    "os.truncate": "os.truncate('latest.pt', 0)",
    "os.open": "handle = os.open('latest.pt', os.O_WRONLY | os.O_TRUNC); os.write(handle, b'n'); os.close(handle)",
    "os.open to lock": "import fcntl\n"
    "for name in ('ckpt.pt', 'hard.pt'): fcntl.flock(os.open(name, os.O_RDWR), fcntl.LOCK_EX)",
    "open to read and write": "with open('ckpt.pt', 'r+') as f: assert f.read() == 'old'; f.truncate(0)",
    "numpy.memmap": "m = numpy.memmap('ckpt.pt', mode='r+'); assert bytes(m) == b'old'; m[:] = 0; m.flush()",
    "ndarray.tofile": "numpy.zeros(3).tofile('latest.pt')",
    "from a thread with its own run": "class T(threading.Thread):\n    def run(self): open('ckpt.pt', 'w').write('n')\n"
    "t = T(); t.start(); t.join()",
    "shutil.rmtree": "shutil.rmtree(os.getcwd())",
}


@pytest.mark.parametrize("name", OVERWRITES)
def test_no_file_from_before_is_changed(name: str, tmp_path: Path) -> None:
    names = ("ckpt.pt", "hard.pt", "latest.pt")
    script = tmp_path / "script" / "overwrites.py"
    script.parent.mkdir()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "ckpt.pt").write_text("old")
    (folder / "hard.pt").hardlink_to(folder / "ckpt.pt")
    (folder / "latest.pt").symlink_to("ckpt.pt")
    before = (folder / "ckpt.pt").stat()
    imports = "import os, shutil, subprocess, threading\nfrom pathlib import Path\nimport numpy, torch\n"
    made = "x = torch.ones(4, device='cuda')\nPath('new.pt').write_text('new')\n"
    script.write_text(f"{imports}{made}{OVERWRITES[name]}\n")
    found = findings(["--gpu", "RTX 2060", script], folder=folder, environ={**os.environ, **PATCHES})
    assert found["outcome"] == "fits", found["stopped_because"]
    assert found["not_written"]
    assert [(folder / each).read_text() for each in names] == ["old"] * 3
    assert os.readlink(folder / "latest.pt") == "ckpt.pt"
    after = (folder / "ckpt.pt").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert after.st_mtime_ns == before.st_mtime_ns or "program" in name


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("io.FileIO('latest.pt', 'w')", marks=pytest.mark.slow),
        pytest.param("early_replace('new.pt', 'ckpt.pt')", marks=pytest.mark.slow),
        "posix.truncate('ckpt.pt', 0)",
    ],
)
def test_what_cannot_be_replaced_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_text("old")
    (tmp_path / "latest.pt").symlink_to("ckpt.pt")
    script = tmp_path / "refused.py"
    script.write_text(f"import io, posix\nfrom posix import replace as early_replace\nopen('new.pt', 'w')\n{line}\n")
    words = [sys.executable, "-m", "tightfit", "dryrun", "--gpu", "RTX 2060", "--no-explain", "--json", str(script)]
    environ = {**os.environ, **PATCHES}
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["outcome"] == "error"
    assert "PermissionError: a dry run does not change files from before it" in done.stderr
    assert (tmp_path / "ckpt.pt").read_text() == "old"


def test_names_that_are_no_text_arrive_as_they_are(tmp_path: Path) -> None:
    script, argument = tmp_path / os.fsdecode(b"sc\xff.py"), os.fsdecode(b"old \xfe \xc3\xa9.txt")
    script.write_text(
        f"import sys, torch\nx = torch.ones(1 << 18, device='cuda')\nassert ascii(sys.argv[1]) == {ascii(argument)!r}\n"
    )
    found = findings(["--gpu", "A100", script, argument], folder=tmp_path)
    assert (found["outcome"], found["peak"]["requested_bytes"]) == ("fits", MIB)
    assert found["largest"][0]["file"].endswith("sc\\udcff.py")


@pytest.mark.slow
def test_a_file_saved_just_before_is_from_before(tmp_path: Path) -> None:
    """Plays of a warm process start within milliseconds: 20 of them on files that were made at that moment."""
    script = tmp_path / "script.py"
    script.write_text("import os\nos.remove('saved.txt')\nopen('own.txt', 'w').write('a')\nos.remove('own.txt')\n")
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "saved.txt").write_text("the user's")
        found = findings(["--gpu", "A100", script], folder=folder, environ={**os.environ, **PATCHES})
        assert [Path(each).name for each in found["not_written"]] == ["saved.txt"]
        assert [each.name for each in folder.iterdir()] == ["saved.txt"]


ASKS_ITS_TERMINAL = """
import getpass, os, subprocess, torch

rows, columns = os.popen("stty size", "r").read().split()
torch.ones(int(rows), int(columns), 1 << 10, device="cuda")
for ask in (input, getpass.getpass):
    try:
        raise SystemExit(f"somebody typed {ask()!r}")
    except EOFError:
        pass
subprocess.run(["cat"], check=True, timeout=10)
"""


def test_a_script_on_a_terminal_knows_its_size_and_waits_for_nobody(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(ASKS_ITS_TERMINAL)
    keyboard, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (33, 111))
    words = [sys.executable, "-m", "tightfit", "dryrun", "--json", "--gpu", "RTX 4090", "train.py"]
    done = subprocess.run(words, stdin=terminal, capture_output=True, cwd=tmp_path, timeout=60)
    os.close(keyboard), os.close(terminal)
    found = json.loads(done.stdout)
    assert found["outcome"] == "fits", found["stopped_because"]
    assert found["peak"]["requested_bytes"] == 4 * 33 * 111 * 2**10


def test_a_modules_package_finds_the_card(tmp_path: Path) -> None:
    (tmp_path / "of_mine").mkdir()
    (tmp_path / "of_mine" / "__init__.py").write_text("import torch\nDEVICE = torch.cuda.is_available() and 'cuda'\n")
    (tmp_path / "of_mine" / "train.py").write_text(
        "import of_mine, torch\ntorch.ones(1 << 20, device=of_mine.DEVICE)\n"
    )
    found = findings(["--gpu", "A100", "-m", "of_mine.train"], folder=tmp_path)
    assert (found["outcome"], found["peak"]["allocated_bytes"]) == ("fits", 1 << 22)
    (tmp_path / "of_mine" / "__init__.py").write_text("import nothing_of_the_kind\n")
    assert (
        "nothing_of_the_kind" in findings(["--gpu", "A100", "-m", "of_mine.train"], folder=tmp_path)["stopped_because"]
    )
