"""The supervisor: a child that the system kills is started again from its last state, and nothing else is."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, column, command, environment, here, newest, tensors

from tightfit.config import Resolved, TrainConfig, read_config
from tightfit.trainer import supervise as module
from tightfit.trainer.fallback import Settings
from tightfit.trainer.loop import train
from tightfit.trainer.supervise import (
    BEYOND_SAVING,
    MOST_RESTARTS,
    STATUS,
    Status,
    can_be_replaced,
    overrides,
    read_status,
    report_status,
    supervise,
    wants_supervision,
)

KEYS = {"max_iters": 40, "lr_decay_iters": 40, "eval_interval": 20, "save_interval": 5, "micro_batch": 4}
SETTINGS = Settings(micro_batch=4, eval_micro_batch=4, loss="auto", checkpointed_blocks=0)


def saved(step: int, **changed: Any) -> Status:
    """The status of a run that saved this step."""
    usual = {"n_layer": 2, "activation_memory_budget": 1.0, "lossy": {}, "settings": SETTINGS}
    return Status(saved_step=step, **usual | changed)


def started(words: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def child_of(pid: int) -> int:
    """The one process that `pid` has started."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)
    raise AssertionError("the supervisor started no child")


def until(running: "subprocess.Popen[str]", pattern: str) -> str:
    """What it prints up to the line that matches."""
    assert running.stdout is not None
    seen = ""
    for line in running.stdout:
        seen += line
        if re.match(pattern, line):
            return seen
    raise AssertionError(f"ended without {pattern}: {seen}")


class TestRealProcesses:
    def test_a_killed_child_is_replaced_and_the_losses_are_those_of_an_undisturbed_run(
        self, tmp_path: Path, data_dir: Path
    ) -> None:
        assert here(arguments(tmp_path / "plain", data_dir, **KEYS)).code == 0
        path = tmp_path / "killed"
        running = started(arguments(path, data_dir, **KEYS, supervise=True))
        try:
            out = until(running, r"iter 22:")
            resident = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{running.pid}/status").read_text())[1])  # type: ignore[index]
            os.kill(child_of(running.pid), signal.SIGKILL)
            rest, err = running.communicate(timeout=90)
        finally:
            running.kill()
        out += rest
        assert running.returncode == 0, err
        assert resident < 60 * 1024, "kB: torch alone takes 200 MiB"
        assert "supervised: if the system kills this run" in out
        assert "saved every 5 steps" in out
        assert out.count("the training process was ended by SIGKILL") == 1
        assert re.search(r"starting again from step 2[05] with --init_from=resume --micro_batch=2 ", out)
        for name in ("loss", "val_loss"):
            expected = column(tmp_path / "plain", name)
            assert len(expected) == (40 if name == "loss" else 3)
            assert column(path, name) == pytest.approx(expected, rel=1e-6)
        for name, tensor in tensors(newest(tmp_path / "plain")).items():
            torch.testing.assert_close(tensors(newest(path))[name], tensor, rtol=1e-3, atol=2e-5)

    @pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
    def test_a_signal_is_passed_on_once_and_the_child_saves(
        self, tmp_path: Path, data_dir: Path, number: signal.Signals
    ) -> None:
        running = started(arguments(tmp_path, data_dir, **KEYS | {"max_iters": 5000}, supervise=True))
        try:
            until(running, r"iter 10:")
            running.send_signal(number)
            out, err = running.communicate(timeout=60)
        finally:
            running.kill()
        assert running.returncode == 128 + number, err
        assert f"{number.name}: saved step " in out
        assert "starting again" not in out

    def test_a_child_without_its_supervisor_ends(self, tmp_path: Path, data_dir: Path) -> None:
        running = started(arguments(tmp_path, data_dir, **KEYS | {"max_iters": 100_000}, supervise=True))
        until(running, r"iter 10:")
        child = child_of(running.pid)
        running.kill()
        deadline = time.monotonic() + 30
        while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{child}").exists()
        running.communicate()

    def test_a_users_mistake_is_not_tried_again(self, tmp_path: Path, data_dir: Path) -> None:
        running = started(arguments(tmp_path, data_dir, dataset="missing", supervise=True))
        out, err = running.communicate(timeout=60)
        assert running.returncode == 2
        assert err.count("tightfit: ") == 1
        assert "starting again" not in out

    def test_the_parent_never_imports_torch(self, tmp_path: Path, data_dir: Path) -> None:
        program = (
            "import sys\nfrom tightfit.cli.main import main\nfrom tightfit.trainer import supervise\n"
            "supervise._run_child = lambda words, status: 0\n"
            "assert main(sys.argv[1:]) == 0\nassert 'torch' not in sys.modules\n"
        )
        words = arguments(tmp_path, data_dir, supervise=True)
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "supervised" in done.stdout


class TestDecisions:
    """With a child that is a list of how it ends."""

    def ended(self, monkeypatch: pytest.MonkeyPatch, ends: list[tuple[int, Status | None]]) -> tuple[int, list[Any]]:
        """The exit code, and the words that each child was started with and the lines that were said."""
        told: list[Any] = []
        endings = iter(ends)

        def run_child(words: list[str], status: Path) -> int:
            told.append(words)
            code, last = next(endings)
            if last is not None:
                monkeypatch.setenv(STATUS, str(status))
                report_status(last)
                monkeypatch.delenv(STATUS)
            return code

        monkeypatch.setattr(module, "_run_child", run_child)
        return supervise(["x.py"], TrainConfig(), log=told.append), told

    def test_no_progress_ends_after_the_most_restarts_with_the_childs_code(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code, told = self.ended(monkeypatch, [(-9, saved(40))] * (MOST_RESTARTS + 1))
        assert code == 128 + 9
        assert "with nothing newer saved: this run does not fit; try a smaller --micro_batch" in told[-1]
        assert "ended by SIGKILL" in told[-1]
        assert sum(isinstance(each, list) for each in told) == MOST_RESTARTS + 1

    @pytest.mark.parametrize(("number", "fault"), [(11, "segmentation fault"), (6, "abort"), (7, "bus error")])
    def test_a_crash_is_called_what_it_is(self, monkeypatch: pytest.MonkeyPatch, number: int, fault: str) -> None:
        code, told = self.ended(monkeypatch, [(-number, saved(40))] * (MOST_RESTARTS + 1))
        assert code == 128 + number
        assert f"crashed ({fault}, {signal.Signals(number).name})" in told[2]
        assert "memory is short;" not in told[2]
        assert "4 times with nothing newer saved, so it will happen again" in told[-1]

    def test_a_step_that_hangs_starts_again_with_the_same_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        code, told = self.ended(monkeypatch, [(module.HUNG, saved(40)), (module.HUNG, saved(50)), (0, None)])
        assert code == 0
        assert [each for each in told if isinstance(each, list)] == [["x.py"], *[["x.py", "--init_from=resume"]] * 2]
        assert told[2].startswith("a step of the training process hung; the stack of each thread is printed above; ")

    def test_a_restarted_process_knows_what_the_first_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        half = replace(SETTINGS, micro_batch=2)
        endings = iter([(-9, saved(10, wanted=SETTINGS)), (-9, saved(20, settings=half, wanted=SETTINGS)), (0, None)])
        found = []

        def run_child(words: list[str], status: Path) -> int:
            found.append(module.learnt())
            code, last = next(endings)
            if last is not None:
                monkeypatch.setenv(STATUS, str(status))
                report_status(last)
            return code

        monkeypatch.setattr(module, "_run_child", run_child)
        supervise(["x.py"], TrainConfig(), log=lambda line: None)
        learnt = [module.Learnt(wanted=SETTINGS, failed=failed) for failed in (SETTINGS, half)]
        assert found == [None, *learnt]
        assert module.learnt() is None

    def test_progress_allows_more_restarts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ends: list[tuple[int, Status | None]] = [(-9, saved(step)) for step in range(10, 100, 10)]
        code, told = self.ended(monkeypatch, [*ends, (0, saved(100))])
        assert code == 0
        assert sum(isinstance(each, list) for each in told) == 10

    def test_a_plans_batch_stays_over_all_restarts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second child was given it, so that it tells of no plan of its own."""
        ends = [(-9, saved(10, lossy={"batch_size": 6})), (-9, saved(20)), (0, None)]
        _, told = self.ended(monkeypatch, ends)
        started = [each for each in told if isinstance(each, list)]
        assert [each.count("--batch_size=6") for each in started] == [0, 1, 1]

    def test_a_broken_context_restarts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        code, told = self.ended(monkeypatch, [(BEYOND_SAVING, saved(0)), (1, None)])
        assert code == 1
        assert told[2].startswith("the training process could not continue; starting again from where it began with ")
        assert "--init_from=resume" not in told[3]

    def test_a_child_that_told_nothing_starts_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, told = self.ended(monkeypatch, [(-9, None), (0, None)])
        assert told[3] == ["x.py"]

    def test_without_save_interval_it_says_that_only_evaluations_save(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, told = self.ended(monkeypatch, [(0, None)])
        assert "saved at evaluations only (--save_interval); evaluations are every 2000 steps" in told[0]

    def test_the_least_micro_batch_is_followed_by_other_savings(self) -> None:
        words = overrides(saved(7, settings=replace(SETTINGS, micro_batch=1)))
        assert words == [
            "--init_from=resume", "--micro_batch=1", "--eval_micro_batch=2", "--loss=chunked",
            "--activation_checkpointing=2",
        ]  # fmt: skip

    def test_what_a_plan_changed_of_the_run_itself_stays(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lossy plan's batch, chosen anew by the process that takes over, would be another run's."""
        monkeypatch.setenv(STATUS, str(tmp_path / "status"))
        asked = read_config(TrainConfig, arguments(tmp_path / "out", data_dir, max_iters=2)[1:])
        planned = replace(asked.config, batch_size=3, param_dtype="bfloat16")
        sources = {**asked.sources, "batch_size": "plan", "param_dtype": "plan", "micro_batch": "plan"}
        train(Resolved(planned, sources, []))
        status = read_status(tmp_path / "status")
        assert status is not None
        words = overrides(status)
        assert "--batch_size=3" in words
        assert "--param_dtype=bfloat16" in words
        assert not any(word.startswith(("--block_size", "--optimizer=")) for word in words)

    @pytest.mark.parametrize("code", [0, 1, 2, 3, 130, 143, -signal.SIGINT, -signal.SIGTERM])
    def test_what_is_not_started_again(self, code: int) -> None:
        assert not can_be_replaced(code)

    @pytest.mark.parametrize("code", [BEYOND_SAVING, -signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS])
    def test_what_is(self, code: int) -> None:
        assert can_be_replaced(code)

    def test_when_it_is_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv(STATUS, raising=False)
        monkeypatch.setattr(module, "is_a_file", lambda stream: True)
        assert wants_supervision(TrainConfig(max_iters=1000))
        assert not wants_supervision(TrainConfig(max_iters=999))
        assert wants_supervision(TrainConfig(max_iters=999, supervise=True))
        assert not wants_supervision(TrainConfig(supervise=False))
        assert not wants_supervision(TrainConfig(eval_only=True))
        monkeypatch.setenv("RANK", "0")
        assert not wants_supervision(TrainConfig())
        monkeypatch.delenv("RANK")
        monkeypatch.setenv(STATUS, "file")
        assert not wants_supervision(TrainConfig(supervise=True))

    def test_captured_output_needs_no_child(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RANK", raising=False)
        with contextlib.redirect_stdout(io.StringIO()):
            assert not wants_supervision(TrainConfig())

    def test_a_status_cut_short_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "status").write_text('{"saved_step": 1')
        assert read_status(tmp_path / "status") is None
        assert read_status(tmp_path / "missing") is None
