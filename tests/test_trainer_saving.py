"""Saves and resumes where folders, files or losses are broken: nothing is lost, and nothing ends in a traceback."""

import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, column, command, environment, here, make_dataset, tensors

from tightfit.errors import CheckpointError
from tightfit.foreign import reads_in_bounds
from tightfit.storage import LOCK, OWNER, owning
from tightfit.trainer import checkpoint as ckpt
from tightfit.trainer import saving, watchdog
from tightfit.trainer.metrics import Reporter
from tightfit.trainer.stored import load, load_newest


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "LAST_WAIT_S", 0.0)


def after_steps(monkeypatch: pytest.MonkeyPatch, acts: Mapping[int, Callable[[], object]]) -> None:
    usual = Reporter.step

    def step(self: Reporter, number: int, *others: Any) -> None:
        usual(self, number, *others)
        acts.get(number, lambda: None)()

    monkeypatch.setattr(Reporter, "step", step)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, data_dir: Path) -> None:
    out_dir = tmp_path / "out"
    with owning(out_dir):
        for init_from in ("scratch", "resume"):
            done = here(arguments(out_dir, data_dir, init_from=init_from, fit="off"))
            assert done.code == 2
            assert f"{out_dir} belongs to a run that is still going (process {os.getpid()} of" in done.err
    assert [each.name for each in out_dir.iterdir()] == [LOCK]
    (out_dir / OWNER).write_text("[]")  # of a process that died: its lock died with it
    assert here(arguments(out_dir, data_dir, max_iters=2, fit="off")).code == 0
    assert not (out_dir / OWNER).exists()


def test_a_folder_that_no_run_can_use_is_told_before_anything_is_planned(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tightfit.planner.fit.fit", lambda *args, **kwargs: pytest.fail("it was planned"))
    (tmp_path / "file").touch()
    done = here(arguments(tmp_path / "file" / "out", data_dir, fit="auto"))
    assert (done.code, done.err.count("cannot be written (Not a directory); set another")) == (2, 1)
    (tmp_path / "taken").mkdir()
    with owning(tmp_path / "taken"):
        done = here(arguments(tmp_path / "taken", data_dir, fit="auto"))
    assert (done.code, done.err.count("belongs to a run that is still going")) == (2, 1)


@pytest.mark.parametrize("code", ["EIO", "ESTALE", "EROFS", "ETIMEDOUT", "EINTR", "EACCES", "EFBIG"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_disk(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, code: str, call: str
) -> None:
    """The disk fails from step 1 to 2 and from 5 to 6: of the saves at 2, 4, 6 and 8 the first and the third fail."""
    usual, number = getattr(os, call), getattr(errno, code)

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    breaks, mends = (partial(monkeypatch.setattr, os, call, now) for now in (fails, usual))
    after_steps(monkeypatch, {0: breaks, 2: mends, 4: breaks, 6: mends})
    done = here(arguments(tmp_path / "out", data_dir, save_interval=2, max_iters=9, fit="off"))
    assert (done.code, done.err) == (0, "")
    assert re.findall(r"last\.pt could not be written \((.*)\)(.*); training goes on", done.out) == [
        (os.strerror(number), ""),
        (os.strerror(number), "; the last good checkpoint is kept"),
    ]
    assert load_newest(tmp_path / "out", log=pytest.fail).step == 9


@pytest.mark.parametrize("way", ["removed", "moved", "a file", "last.pt is a folder", "forbidden"])
def test_a_folder_that_is_not_what_it_was(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    out_dir = tmp_path / "out"

    def change() -> None:
        if way in ("removed", "a file"):
            shutil.rmtree(out_dir)
        if way == "moved":
            out_dir.rename(tmp_path / "elsewhere")
        if way == "a file":
            out_dir.touch()
        if way == "last.pt is a folder":
            (out_dir / "last.pt" / "within").mkdir(parents=True)
        if way == "forbidden":
            usual = ckpt.writing
            monkeypatch.setattr(ckpt, "writing", lambda path, **how: usual(_forbidden(path, out_dir), **how))

    after_steps(monkeypatch, {2: change})
    done = here(arguments(out_dir, data_dir, save_interval=4, max_iters=6, fit="off"))
    if way in ("a file", "forbidden"):
        (place,) = tmp_path.glob("out.rescued-*")
        assert done.code == 1
        assert f"The state of step 6 is in {place} instead: continue from there with" in done.err
    else:
        assert (done.code, done.err) == (0, "")
        place = out_dir
    assert load_newest(place, log=pytest.fail).step == 6


def _forbidden(path: Path, folder: Path) -> Path:
    if path.parent == folder:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return path


def test_tensorboard_on_a_full_disk(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    done = here(arguments(tmp_path, data_dir, tensorboard_log=True, max_iters=3, fit="off"))
    assert (done.code, done.err) == (0, "")
    assert done.out.count("TensorBoard cannot be written any more ([Errno 28] No space left on device)") == 1
    assert list(column(tmp_path, "loss")) == [0, 1, 2]


def test_a_pipe_without_a_reader_ends_the_run_saved(tmp_path: Path, data_dir: Path) -> None:
    words = command(arguments(tmp_path, data_dir, max_iters=10**6, supervise=False, fit="off"))
    run = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stderr is not None
    while "iter 2" not in run.stdout.readline():
        pass
    run.stdout.close()
    assert run.wait(30) == 128 + signal.SIGPIPE
    assert run.stderr.read() == ""
    run.stderr.close()
    assert load_newest(tmp_path, log=pytest.fail).step > 2


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """The checkpoint of a run of three steps."""
    folder = tmp_path_factory.mktemp("small")
    assert here(arguments(folder, data_dir, max_iters=3, n_layer=1, fit="off")).code == 0
    return folder / "ckpt.pt"


def _directory_bits(small: Path, tmp_path: Path, *, every: int) -> None:
    """Flip bits of the zip directory: the checkpoint is refused as damaged, or read as it was."""
    good, expected, path = small.read_bytes(), tensors(small), tmp_path / "flipped.pt"
    start = good.index(b"PK\x01\x02")
    for bit in range(0, 8 * (len(good) - start), every):
        flipped = bytearray(good)
        flipped[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = load(path)
        except CheckpointError:
            continue
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.model.items())


def test_bits_of_a_zip_directory(small: Path, tmp_path: Path) -> None:
    _directory_bits(small, tmp_path, every=211)


@pytest.mark.slow
def test_every_bit_of_a_zip_directory(small: Path, tmp_path: Path) -> None:
    _directory_bits(small, tmp_path, every=1)


def test_a_small_file_that_claims_many_weights(small: Path, tmp_path: Path) -> None:
    content = torch.load(small, weights_only=True)
    content["model_args"] |= {"vocab_size": 2**18, "n_embd": 2**18}
    content["model"] = {name: torch.zeros(1).expand(2**18, 2**18) for name in content["model"]}
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"its tensors claim .* it was not read"):
        load(tmp_path / "ckpt.pt")


def test_a_pickle_that_would_never_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightfit.foreign.PICKLE_S", 1)
    nested = b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s."  # a key (t, t) of depth 60: its hash takes 2**60 steps
    assert not reads_in_bounds(nested)
    assert not reads_in_bounds(b"\x80\x02]r\xff\xff\xff\x7f.")  # a memo of 2**31 entries
    assert reads_in_bounds(b"\x80\x02}.")
    assert reads_in_bounds(b"no pickle")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sampling_from_weights_that_are_no_numbers(small: Path, tmp_path: Path, value: float, data_dir: Path) -> None:
    content = torch.load(small, weights_only=True)
    content["model"]["transformer.wpe.weight"][0, 0] = value
    torch.save(content, tmp_path / "ckpt.pt")
    done = here(["sample", f"--out_dir={tmp_path}", f"--data_dir={data_dir}", "--device=cpu", "--num_samples=1"])
    assert done.code == 2
    assert f"{tmp_path}/ckpt.pt cannot be used: transformer.wpe.weight holds nan or inf" in done.err


def test_a_resume_with_another_text_context_or_vocabulary(tmp_path: Path, data_dir: Path) -> None:
    data, out_dir = tmp_path / "data", tmp_path / "out"
    make_dataset(data / "tiny")
    assert here(arguments(out_dir, data, max_iters=2, fit="off")).code == 0
    resumed = {"init_from": "resume", "max_iters": 3, "fit": "off"}
    shorter = here(arguments(out_dir, data, block_size=8, **resumed))
    assert shorter.code == 2
    assert "block_size=8 is smaller than the 16 of" in shorter.err
    shutil.rmtree(data)
    make_dataset(data / "tiny", seed=1)
    other = here(arguments(out_dir, data, **resumed))
    assert other.code == 2
    assert f"{data}/tiny/train.bin is not the text that {out_dir}/ckpt.pt was trained on" in other.err
    meta = data / "tiny" / "meta.json"
    meta.write_text(meta.read_text().replace('"vocab_size": 64', '"vocab_size": 99'))
    larger = here(arguments(out_dir, data, **resumed))
    assert larger.code == 2
    assert "has 99 ids, but the model of" in larger.err


@pytest.mark.parametrize("on_nan", ["warn", "skip", "stop"])
def test_a_loss_of_nan(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, on_nan: str) -> None:
    """The loss of step 3 is nan."""
    from tightfit.trainer import step as steps

    usual, calls = steps._backward, iter(range(100))

    def backward(*given: Any) -> torch.Tensor:
        total = usual(*given)
        return total * math.nan if next(calls) == 3 else total

    monkeypatch.setattr(steps, "_backward", backward)
    done = here(arguments(tmp_path, data_dir, on_nan=on_nan, max_iters=6, fit="off", log_interval=6))
    found = [line for line in (done.out + done.err).splitlines() if "the loss is nan or inf" in line]
    assert len(found) == 1
    assert found[0].removeprefix("tightfit: ").startswith("step 3: ")
    assert done.code == (on_nan == "stop")
    assert load_newest(tmp_path, log=pytest.fail).step == (3 if on_nan == "stop" else 6)


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_memory_that_runs_out_between_steps(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], place: str
) -> None:
    usual = getattr(Reporter, place)

    def fails(self: Reporter, step: int, *others: Any) -> None:
        if step >= 4:
            raise kind("out of memory")
        usual(self, step, *others)

    monkeypatch.setattr(Reporter, place, fails)
    done = here(arguments(tmp_path, data_dir, max_iters=6, eval_interval=5, fit="off"))
    assert done.code == 1
    assert "Traceback" not in done.err
    assert load_newest(tmp_path, log=pytest.fail).step == 5


def test_a_closed_terminal_loses_nothing(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite itself may run under nohup
    try:
        after_steps(monkeypatch, {3: lambda: signal.raise_signal(signal.SIGHUP)})
        done = here(arguments(tmp_path, data_dir, fit="off"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (done.code, done.err) == (128 + signal.SIGHUP, "")
    assert load_newest(tmp_path, log=pytest.fail).step == 4


def test_under_nohup_a_closed_terminal_changes_nothing(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        after_steps(monkeypatch, {3: lambda: signal.raise_signal(signal.SIGHUP)})
        assert here(arguments(tmp_path, data_dir, fit="off")).code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_step_that_hangs_is_noticed_with_every_threads_stack(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "POLL_S", 0.01)
    monkeypatch.setattr(watchdog, "LEAST_S", 0.1)
    lines: list[str] = []
    found = watchdog.Watchdog(lines.append, ends=False)
    for number in range(3):
        with found.step(number):
            time.sleep(0.01)
    assert lines == []
    with found.step(3):
        deadline = time.monotonic() + 20
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
    found.close()
    assert len(lines) == 1
    assert re.match(r"step 3 has taken \d+ s and hangs \(usually 0\.\d s; the limit is 20 times that", lines[0])
    stacks = capfd.readouterr().err
    assert "test_trainer_saving.py" in stacks
    assert stacks.count("hread 0x") >= 2


def test_a_process_that_stops_while_all_save_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Between two steps any time may pass, as long as all processes are alive."""
    monkeypatch.setattr(watchdog, "POLL_S", 0.01)
    monkeypatch.setattr(watchdog, "LEAST_S", 0.05)
    codes: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)

    class Others:
        looked = 0

        def beat(self) -> None:
            pass

        def silent(self) -> list[str]:
            self.looked += 1
            return ["process 1 on there"] if self.looked > 2 else []

    found = watchdog.Watchdog(print, ends=True, pulse=Others())  # type: ignore[arg-type]
    deadline = time.monotonic() + 20
    while not codes and time.monotonic() < deadline:
        time.sleep(0.01)
    found.close()
    assert set(codes) == {watchdog.HUNG}
    assert "no sign of life from process 1 on there; all processes end" in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_that_hangs_is_started_again(tmp_path: Path, data_dir: Path) -> None:
    """A real supervisor, and a step that sleeps in the first process only."""
    program = (
        "import os, sys, time\nfrom tightfit.trainer import loop, watchdog\n"
        "watchdog.LEAST_S, watchdog.POLL_S = 0.5, 0.05\nusual = loop._Run._train_step\n"
        "def step(self):\n    if self.step == 5 and self.first_step == 0: time.sleep(60)\n    return usual(self)\n"
        "loop._Run._train_step = step\n"
    )
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nif 'train' in sys.orig_argv and 'TIGHTFIT_STATUS' in __import__('os').environ:\n"
        f"    exec({program!r})\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    words = command(arguments(tmp_path / "out", data_dir, save_interval=2, max_iters=8, fit="off", supervise=True))
    done = subprocess.run(
        words, env={**environment(), "PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step 5 has taken" in done.stdout
    assert "starting again from step 4 with --init_from=resume\n" in done.stdout
    assert "in step" in done.stderr
    assert load_newest(tmp_path / "out", log=pytest.fail).step == 8
