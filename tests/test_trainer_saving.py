"""Saves in folders that are taken, moved, full or broken: nothing is lost, and nothing ends in a traceback."""

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from runs import arguments, column, command, environment, here

from tightfit.storage import LOCK, OWNER, owning
from tightfit.trainer import checkpoint as ckpt
from tightfit.trainer import saving
from tightfit.trainer.checkpoint import load_newest
from tightfit.trainer.metrics import Reporter


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


@pytest.mark.parametrize("code", ["EIO", "ESTALE", "EROFS", "ETIMEDOUT", "EINTR", "EACCES"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_disk(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, code: str, call: str
) -> None:
    """The disk fails from step 3 to step 7: the save at 4 fails, the one at 8 does not."""
    usual, number = getattr(os, call), getattr(errno, code)

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    acts = {3: lambda: monkeypatch.setattr(os, call, fails), 6: lambda: monkeypatch.setattr(os, call, usual)}
    after_steps(monkeypatch, acts)
    done = here(arguments(tmp_path / "out", data_dir, save_interval=4, max_iters=9, fit="off"))
    assert (done.code, done.err) == (0, "")
    assert (
        done.out.count(f"last.pt could not be written ({os.strerror(number)}); the last good checkpoint is kept;") == 1
    )
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
