"""Checkpoints: exact resumes, nanoGPT's format both ways, damage, full disks."""

import contextlib
import dataclasses
import errno
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    TINY,
    VOCAB,
    arguments,
    assert_same_end,
    column,
    command,
    environment,
    here,
    newest,
    process,
    rows,
    tensors,
)

from tightfit.config import TrainConfig
from tightfit.data import open_dataset
from tightfit.data.batches import Batches
from tightfit.errors import CheckpointError, DoesNotFit
from tightfit.models.model import GPT, GPTConfig
from tightfit.storage import LOCK, METRICS
from tightfit.trainer import checkpoint as ckpt
from tightfit.trainer import saving
from tightfit.trainer.checkpoint import Checkpoint, save
from tightfit.trainer.hardware import native_bfloat16
from tightfit.trainer.loop import learning_rate_at
from tightfit.trainer.metrics import Reporter
from tightfit.trainer.stored import load, load_newest

NANOGPT_KEYS = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
NANOGPT_ARGS = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}

needs_bfloat16 = pytest.mark.skipif(not native_bfloat16(), reason="this processor has no bfloat16")
VARIANTS = [
    pytest.param({}, id="float32"),
    pytest.param({"dropout": 0.2}, id="dropout"),
    pytest.param({"batch_size": 2, "gradient_accumulation_steps": 3, "dropout": 0.1}, id="accumulation"),
    pytest.param({"batch_size": 7, "micro_batch": 3, "eval_interval": 5, "prefetch": 0}, id="uneven"),
    pytest.param({"dtype": "bfloat16", "dropout": 0.1, "activation_checkpointing": 1}, id="bf16", marks=needs_bfloat16),
    pytest.param({"always_save_checkpoint": False, "eval_interval": 2, "learning_rate": 0.5}, id="keep-best"),
]


class Crash(BaseException):
    """What a run cannot catch."""


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """`act` when step `number` has been made and logged."""
    usual = Reporter.step

    def step(self: Reporter, step: int, *others: Any) -> None:
        usual(self, step, *others)
        if step == number:
            monkeypatch.setattr(Reporter, "step", usual)
            act()

    monkeypatch.setattr(Reporter, "step", step)


def crash() -> None:
    raise Crash


def successful(words: list[str]) -> str:
    done = here(words)
    assert (done.code, done.err) == (0, "")
    return done.out


def saved_run(folder: Path, data_dir: Path, **keys: Any) -> Path:
    successful(arguments(folder, data_dir, **keys))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """An unbroken run of 12 steps with evaluations at 0, 4, 8 and 12; not to be written to."""
    return saved_run(tmp_path_factory.mktemp("finished"), data_dir, eval_interval=4)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


class TestExactResume:
    @pytest.mark.parametrize("keys", VARIANTS)
    def test_stopped_by_signals_again_and_again(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
    ) -> None:
        unbroken = saved_run(tmp_path / "unbroken", data_dir, **keys)
        stopped = tmp_path / "stopped"
        init_from = "scratch"
        for step, number in ((0, signal.SIGTERM), (3, signal.SIGINT), (4, signal.SIGTERM), (10, signal.SIGINT)):
            after_step(monkeypatch, step, lambda number=number: signal.raise_signal(number))
            done = here(arguments(stopped, data_dir, **keys, init_from=init_from))
            assert done.code == 128 + number
            assert f"{number.name}: saved step {step + 1} in {stopped}; continue with --init_from=resume" in done.out
            init_from = "resume"
        successful(arguments(stopped, data_dir, **keys, init_from="resume"))
        assert_same_end(unbroken, stopped)

    @pytest.mark.parametrize("keys", VARIANTS)
    @pytest.mark.parametrize("crash_at", [3, 6, pytest.param(11, marks=pytest.mark.slow)])
    def test_crashed_after_a_save_of_save_interval(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], crash_at: int
    ) -> None:
        unbroken = saved_run(tmp_path / "unbroken", data_dir, **keys)
        crashed = tmp_path / "crashed"
        after_step(monkeypatch, crash_at, crash)
        with pytest.raises(Crash):
            here(arguments(crashed, data_dir, **keys, save_interval=3))
        printed = successful(arguments(crashed, data_dir, **keys, init_from="resume", save_interval=3))
        resumed_at = int(re.findall(r"^resuming .* at step (\d+)$", printed, re.M)[0])
        assert crash_at - 3 <= resumed_at <= crash_at
        assert f"iter {resumed_at}:" in printed
        assert f"iter {resumed_at - 1}:" not in printed
        assert_same_end(unbroken, crashed)

    def test_stopped_during_an_evaluation(
        self, tmp_path: Path, data_dir: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usual, reads = Batches.read, []

        def read(self: Batches, purpose: Any, step: int, sequences: range) -> Any:
            if purpose == "evaluate val" and step == 4 and not reads:
                reads.append(step)
                os.kill(os.getpid(), signal.SIGTERM)  # this is the reading thread
            return usual(self, purpose, step, sequences)

        monkeypatch.setattr(Batches, "read", read)
        done = here(arguments(tmp_path, data_dir, eval_interval=4))
        assert done.code == 143
        assert "SIGTERM: saved step 4" in done.out
        assert "step 4: train loss" not in done.out
        printed = successful(arguments(tmp_path, data_dir, eval_interval=4, init_from="resume"))
        assert "step 4: train loss" in printed
        assert_same_end(finished, tmp_path)

    def test_a_run_that_is_done_has_nothing_more_to_do(self, copy: Path, data_dir: Path, finished: Path) -> None:
        printed = successful(arguments(copy, data_dir, eval_interval=4, init_from="resume"))
        assert "step 12 of 12: nothing is left to train; set a larger --max_iters to go on" in printed
        assert "iter " not in printed.split("resuming")[1]
        assert_same_end(finished, copy)

    def test_a_longer_run_goes_on_where_the_shorter_ended(self, tmp_path: Path, data_dir: Path) -> None:
        """With a rate that does not depend on max_iters, 8 and then 4 more steps are 12 steps."""
        saved_run(tmp_path / "whole", data_dir)
        saved_run(tmp_path / "parts", data_dir, max_iters=8)
        successful(arguments(tmp_path / "parts", data_dir, init_from="resume"))
        whole, parts = (tensors(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        assert column(tmp_path / "whole", "loss") == column(tmp_path / "parts", "loss")
        assert list(column(tmp_path / "parts", "val_loss")) == [0, 8, 12]

    @pytest.mark.slow
    def test_real_processes_stopped_by_real_signals(self, tmp_path: Path, data_dir: Path) -> None:
        keys = {"max_iters": 150, "lr_decay_iters": 150, "dropout": 0.1, "log_interval": 1}
        unbroken = saved_run(tmp_path / "unbroken", data_dir, **keys)
        stopped = tmp_path / "stopped"
        init_from, before = "scratch", 0
        for number, step in ((signal.SIGINT, 20), (signal.SIGTERM, 80)):
            words = arguments(stopped, data_dir, **keys, init_from=init_from)
            code, out = _interrupted(words, number, after=f"iter {step}:")
            assert code == 128 + number
            assert re.search(rf"^{number.name}: saved step \d+ in ", out, re.M)
            saved_at = torch.load(stopped / "last.pt", weights_only=True)["iter_num"]
            assert before <= step < saved_at < 150
            init_from, before = "resume", saved_at
        done = process(arguments(stopped, data_dir, **keys, init_from="resume"))
        assert (done.code, done.err) == (0, "")
        assert_same_end(unbroken, stopped)

    def test_a_second_signal_ends_it_at_once(self, tmp_path: Path, data_dir: Path) -> None:
        keys = {"eval_iters": 100_000, "eval_interval": 5, "max_iters": 10}
        running = subprocess.Popen(
            command(arguments(tmp_path, data_dir, **keys)), env=environment(), stdout=subprocess.PIPE, text=True
        )
        with running:
            assert running.stdout is not None
            while not running.stdout.readline().startswith("parameters:"):
                pass
            deadline = time.monotonic() + 20
            while running.poll() is None and time.monotonic() < deadline:
                running.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            assert running.returncode in (143, -signal.SIGTERM)

    def test_what_changes_the_data_order_is_said(self, copy: Path, data_dir: Path) -> None:
        keys = {"init_from": "resume", "max_iters": 14, "batch_size": 5, "seed": 3}
        printed = successful(arguments(copy, data_dir, **keys))
        assert "the data order changes from here on: seed 1337 -> 3, batch_size 4 -> 5" in printed


class TestMetrics:
    def test_a_cut_last_line_and_later_steps_go(
        self, tmp_path: Path, data_dir: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        after_step(monkeypatch, 9, crash)
        with pytest.raises(Crash):
            here(arguments(tmp_path, data_dir, eval_interval=4))
        with open(tmp_path / METRICS, "a") as file:
            file.write('{"step": 10, "lo')
        successful(arguments(tmp_path, data_dir, eval_interval=4, init_from="resume"))
        assert rows(tmp_path) == rows(finished)

    @pytest.mark.parametrize("line", ["[]", "1", "{}", '{"step": "x"}', '{"step": null}', "\x00\xff", '{"step": {}}'])
    def test_lines_that_are_no_rows_go_too(self, copy: Path, data_dir: Path, finished: Path, line: str) -> None:
        with open(copy / METRICS, "a", encoding="latin-1") as file:
            file.write(line + "\n")
        successful(arguments(copy, data_dir, eval_interval=4, init_from="resume"))
        assert rows(copy) == rows(finished)


class TestNanoGPT:
    def test_ours_has_its_keys(self, finished: Path) -> None:
        content = torch.load(finished / "ckpt.pt", weights_only=True)
        assert set(content) == NANOGPT_KEYS | {"tightfit"}
        assert set(content["model_args"]) == NANOGPT_ARGS
        assert content["iter_num"] == 12
        assert content["best_val_loss"] == min(column(finished, "val_loss").values())
        assert content["config"]["n_layer"] == 2

    def test_its_reader_gets_along_with_ours(self, finished: Path) -> None:
        """Its order of parameters, an optimizer of its kind: what its train.py and sample.py do on resume."""
        content = torch.load(finished / "ckpt.pt", map_location="cpu", weights_only=True)
        assert list(content["model"]) == [*_names(bias=False), "lm_head.weight"]
        parameters = {name: torch.nn.Parameter(content["model"][name].clone()) for name in _names(bias=False)}
        optimizer = _nanogpt_adamw(parameters)
        optimizer.load_state_dict(content["optimizer"])
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        optimizer.step()

    def test_its_checkpoint_goes_on_with_its_step_and_moments(self, tmp_path: Path, data_dir: Path) -> None:
        """Three steps made by hand, saved as nanoGPT saves; the fourth is made here and by hand, and compared."""
        config = TrainConfig(**{**TINY, "data_dir": str(data_dir), "max_iters": 4, "bias": True})
        model = GPT(GPTConfig(block_size=16, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=32)).init_weights()
        optimizer = _nanogpt_adamw(dict(model.named_parameters()))
        for step in range(3):
            _step_by_hand(model, optimizer, config, step)
        content = {
            "model": {f"_orig_mod.{name}": tensor.clone() for name, tensor in model.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "model_args": {
                "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16,
                "bias": True, "vocab_size": VOCAB, "dropout": 0.0,
            },
            "iter_num": 3,
            "best_val_loss": torch.tensor(3.9),
            "config": {"dataset": "tiny", "batch_size": 4, "gradient_accumulation_steps": 1, "compile": True},
        }  # fmt: skip
        torch.save(content, tmp_path / "ckpt.pt")
        _step_by_hand(model, optimizer, config, 3)

        printed = successful(arguments(tmp_path, data_dir, max_iters=4, bias=True, init_from="resume"))
        assert f"resuming {tmp_path / 'ckpt.pt'} at step 3" in printed
        assert list(column(tmp_path, "loss")) == [3]
        saved = torch.load(newest(tmp_path), weights_only=True)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(saved["model"][name], tensor, rtol=1e-5, atol=1e-6)
        for number, state in optimizer.state_dict()["state"].items():
            for key, tensor in state.items():
                torch.testing.assert_close(saved["optimizer"]["state"][number][key], tensor, rtol=1e-4, atol=1e-7)
        assert saved["best_val_loss"] <= 3.9 + 1e-6

    def test_shapes_other_than_configured_are_said(self, copy: Path, data_dir: Path) -> None:
        keys = {"init_from": "resume", "n_layer": 3, "n_embd": 64, "max_iters": 13}
        printed = successful(arguments(copy, data_dir, **keys))
        assert f"n_layer: 2, as in {copy / 'ckpt.pt'} (the configuration says 3)" in printed
        assert "n_embd: 32, as in" in printed


class TestStartFromFile:
    def test_weights_from_a_path_begin_at_step_0(self, finished: Path, tmp_path: Path, data_dir: Path) -> None:
        source = finished / "ckpt.pt"
        printed = successful(arguments(tmp_path, data_dir, init_from=source, max_iters=2))
        assert "resuming" not in printed
        assert column(tmp_path, "val_loss")[0] == pytest.approx(column(finished, "val_loss")[12], rel=0.05)
        assert list(column(tmp_path, "loss")) == [0, 1]

    def test_a_smaller_block_size_crops_the_positions(self, finished: Path, tmp_path: Path, data_dir: Path) -> None:
        successful(arguments(tmp_path, data_dir, init_from=finished / "ckpt.pt", block_size=10, max_iters=0))
        successful(arguments(tmp_path / "run", data_dir, init_from=finished / "ckpt.pt", block_size=10, max_iters=2))
        saved = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
        assert saved["model_args"]["block_size"] == 10
        assert saved["model"]["transformer.wpe.weight"].shape == (10, 32)

    def test_a_larger_block_size_is_not_to_be_had(self, finished: Path, tmp_path: Path, data_dir: Path) -> None:
        printed = successful(arguments(tmp_path, data_dir, init_from=finished / "ckpt.pt", block_size=20, max_iters=1))
        assert f"block_size: 16, as in {finished / 'ckpt.pt'} (the configuration says 20)" in printed

    def test_its_own_folder_may_be_the_source(self, copy: Path, data_dir: Path, finished: Path) -> None:
        successful(arguments(copy, data_dir, init_from=copy / "ckpt.pt", max_iters=1))
        assert (copy / "previous" / "ckpt.pt").read_bytes() == (finished / "ckpt.pt").read_bytes()


class TestSave:
    def test_the_one_before_is_kept_and_nothing_else(self, copy: Path) -> None:
        assert {path.name for path in copy.iterdir()} == {"ckpt.pt", "ckpt.prev.pt", METRICS, LOCK}
        steps = [torch.load(copy / name, weights_only=True)["iter_num"] for name in ("ckpt.pt", "ckpt.prev.pt")]
        assert steps == [12, 8]

    def test_round_trip(self, finished: Path, tmp_path: Path) -> None:
        first = load(finished / "ckpt.pt")
        save(tmp_path, first)
        second = load(tmp_path / "ckpt.pt")
        for field in dataclasses.fields(Checkpoint):
            if field.name not in ("model", "optimizer", "path"):
                assert getattr(first, field.name) == getattr(second, field.name)
        assert first.evaluated
        expected = tensors(finished / "ckpt.pt")
        assert all(torch.equal(expected[name], tensor) for name, tensor in tensors(tmp_path / "ckpt.pt").items())

    def test_a_new_ckpt_removes_older_resume_points(self, finished: Path, tmp_path: Path) -> None:
        content = load(finished / "ckpt.pt")
        for step in (1, 2):
            save(tmp_path, dataclasses.replace(content, step=step), name="last.pt")
        assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "last.prev.pt"}
        save(tmp_path, dataclasses.replace(content, step=3))
        assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt"}

    @pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
    def test_a_crash_at_any_moment_leaves_a_whole_one(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
    ) -> None:
        """Ends `save` before each of its changes to the folder, in turn; the third save is begun each time."""
        content = load(finished / "ckpt.pt")

        def no_links(*_: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        if not links:
            monkeypatch.setattr(os, "link", no_links)
        for moment in range(20):
            folder = tmp_path / str(moment)
            folder.mkdir()
            for step in (1, 2):
                save(folder, dataclasses.replace(content, step=step))
            with monkeypatch.context() as patch:
                third = dataclasses.replace(content, step=3)
                ended = _crash_before_change(patch, moment, partial(save, folder, third))
            found = load_newest(folder, log=pytest.fail)
            assert found.step in ((3,) if ended else (2, 3))
            if ended:
                break
        assert moment >= 3

    def test_a_move_to_previous_that_was_cut_is_finished(self, copy: Path, data_dir: Path, finished: Path) -> None:
        (copy / ".previous.moving").mkdir()
        (copy / "ckpt.pt").rename(copy / ".previous.moving" / "ckpt.pt")
        successful(arguments(copy, data_dir, max_iters=1))
        assert {path.name for path in (copy / "previous").iterdir()} == {path.name for path in finished.iterdir()} - {
            LOCK
        }
        assert not (copy / ".previous.moving").exists()


class TestDamage:
    """A damaged ckpt.pt is noticed, said, and replaced by the one before it."""

    SIZES = (0, 1, 4, 100, 0.1, 0.5, 0.9, -1000, -100, -22, -1)

    @pytest.mark.parametrize("cut", SIZES)
    def test_cut(self, copy: Path, data_dir: Path, finished: Path, cut: float) -> None:
        size = (copy / "ckpt.pt").stat().st_size
        os.truncate(copy / "ckpt.pt", int(cut * size) if isinstance(cut, float) else cut % size)
        self._resumes_from_previous(copy, data_dir, finished)

    @pytest.mark.parametrize("part", [0.0, 0.2, 0.4, 0.6, 0.8, 0.95])
    def test_one_bit_flipped(self, copy: Path, data_dir: Path, finished: Path, part: float) -> None:
        """At these parts of each record's bytes; zip's own headers are not covered by checksums, contents are."""
        with zipfile.ZipFile(copy / "ckpt.pt") as archive:
            record = max(archive.infolist(), key=lambda record: record.file_size)
            length = len(archive.read(record))
            end = (*(other.header_offset for other in archive.infolist()), archive.start_dir)
            start = min(offset for offset in end if offset > record.header_offset) - length
        _flip(copy / "ckpt.pt", int(start - 200 + part * length))
        self._resumes_from_previous(copy, data_dir, finished)

    def test_any_flipped_bit_is_noticed_or_harmless(self, copy: Path) -> None:
        """Over the whole file, zip headers and padding too: either refused by name, or the same content is read."""
        good = (copy / "ckpt.pt").read_bytes()
        expected = tensors(copy / "ckpt.pt")
        refused = 0
        offsets = [*range(0, len(good), len(good) // 120), *range(len(good) - 60, len(good), 2)]
        for number, offset in enumerate(offsets):
            path = copy / "flipped.pt"
            path.write_bytes(good)
            _flip(path, offset, bit=number % 8)
            try:
                found = load(path)
            except CheckpointError:
                refused += 1
            else:
                assert found.step == 12
                read = tensors(path)
                assert all(torch.equal(read[name], expected[name]) for name in expected)
        assert refused > len(offsets) / 2

    def test_none_whole(self, copy: Path, data_dir: Path) -> None:
        for name in ("ckpt.pt", "ckpt.prev.pt"):
            os.truncate(copy / name, 5000)
        done = here(arguments(copy, data_dir, init_from="resume"))
        assert done.code == 2
        assert re.fullmatch(
            rf"tightfit: {copy} holds no checkpoint to resume: .*ckpt\.pt \(4\.88 KiB\) is cut or damaged; "
            r".*ckpt\.prev\.pt \(4\.88 KiB\) is cut or damaged; start anew with --init_from=scratch\n",
            done.err,
        )

    def _resumes_from_previous(self, folder: Path, data_dir: Path, finished: Path) -> None:
        printed = successful(arguments(folder, data_dir, eval_interval=4, init_from="resume"))
        assert re.search(
            rf"^{folder}/ckpt\.pt \(.*\) is cut or damaged; using {folder}/ckpt\.prev\.pt of step 8 instead$",
            printed,
            re.M,
        )
        assert_same_end(finished, folder)


class TestStrangeContents:
    """Checkpoints that hold plain values of the wrong kind: one sentence each, whatever the field."""

    CHANGES = (
        ("iter_num", "twelve"),
        ("iter_num", -1),
        ("iter_num", True),
        ("iter_num", 10**400),
        ("best_val_loss", "low"),
        ("best_val_loss", torch.zeros(2)),
        ("best_val_loss", None),
        ("best_val_loss", 10**400),
        ("model", []),
        ("model", {}),
        ("model", {1: 2}),
        ("model_args", {}),
        ("model_args", {"n_layer": 10**9}),
        ("optimizer", {"state": {}}),
        ("optimizer", {"state": None}),
        ("optimizer", {"state": dict.fromkeys(range(16))}),
        ("optimizer", {"state": {number: {} for number in range(16)}}),
        ("optimizer", {"state": {number: {"step": "x"} for number in range(16)}}),
        ("optimizer", {"state": {number: {"step": 10**400} for number in range(16)}}),
        ("tightfit", {"format": 2}),
        ("tightfit", {"format": 1, "scaler": 3}),
        ("config", {"seed": "x"}),
    )

    @pytest.mark.parametrize(("key", "value"), CHANGES, ids=lambda value: repr(value)[:30])
    def test_is_refused_or_harmless(self, copy: Path, data_dir: Path, key: str, value: object) -> None:
        content = torch.load(copy / "ckpt.pt", weights_only=True)
        if key == "model_args" and value:
            value = content[key] | value
        (copy / "ckpt.prev.pt").unlink()
        torch.save(content | {key: value}, copy / "ckpt.pt")
        done = here(arguments(copy, data_dir, init_from="resume", max_iters=13))
        if done.code == 2:
            assert re.fullmatch(r"tightfit: .+\n", done.err)
            assert len(done.err) < 500
        else:
            assert (done.code, done.err) == (0, "")
            assert all(math.isfinite(loss) for loss in column(copy, "loss").values())

    def test_a_model_as_large_as_it_claims_is_not_built(self, copy: Path) -> None:
        content = torch.load(copy / "ckpt.pt", weights_only=True)
        content["model_args"]["n_layer"] = 10**15
        torch.save(content, copy / "ckpt.pt")
        started = time.monotonic()
        with pytest.raises(CheckpointError):
            load(copy / "ckpt.pt")
        assert time.monotonic() - started < 2


class TestFullDisk:
    @pytest.fixture
    def disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A real file system of 2 MiB; a checkpoint here takes a third of one."""
        folder = tmp_path / "disk"
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(saving, "LAST_WAIT_S", 0.0)
        mount = shutil.which("mount")
        made = mount and subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
        )
        if not made or made.returncode:
            pytest.skip("mounting a small file system is not permitted here")
        yield folder
        subprocess.run(["umount", "-l", folder], check=True)

    def test_the_run_goes_on_and_the_last_good_one_stays(
        self, disk: Path, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Full from step 5 to step 10: the save at 8 fails, the one at 12 does not."""
        unbroken = saved_run(tmp_path / "unbroken", data_dir, eval_interval=4)
        filler = disk / "filler"
        after_step(monkeypatch, 5, lambda: _fill(filler, leave=20_000))
        usual = ckpt.save

        def observed(folder: Path, checkpoint: Checkpoint, *, name: str = "ckpt.pt", is_last: bool) -> None:
            try:
                usual(folder, checkpoint, name=name, is_last=is_last)
            except DoesNotFit:
                assert load_newest(folder, log=pytest.fail).step == 4
                assert not list(folder.glob(".*writing"))
                filler.unlink()
                raise

        monkeypatch.setattr(ckpt, "save", observed)
        printed = successful(arguments(disk / "out", data_dir, eval_interval=4))
        assert re.findall(r"^.*disk is full.*$", printed, re.M) == [
            f"{disk / 'out' / 'ckpt.pt'} could not be written: it takes 327.93 KiB and the disk is full; the last good "
            "checkpoint is kept. Free space, or set another --out_dir; training goes on, and the next try is in 60 s "
            "at the latest"
        ]
        assert_same_end(unbroken, disk / "out")

    def test_nothing_left_at_all(
        self, disk: Path, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not one byte for metrics.jsonl either: the run goes on, and its end says what was lost."""
        after_step(monkeypatch, 5, lambda: _fill(disk / "filler", leave=0))
        done = here(arguments(disk / "out", data_dir, eval_interval=4, max_iters=99))
        assert done.code == 1
        assert "iter 98:" in done.out
        assert done.out.count(f"{disk / 'out' / METRICS} may lose lines from here on (No space left") == 1
        assert re.fullmatch(
            r"tightfit: .*ckpt\.pt could not be written: .* the disk is full; .* step 99 .*\n", done.err
        )
        (rescued,) = tmp_path.glob("out.rescued-*")
        assert load_newest(rescued, log=pytest.fail).step == 99
        assert load_newest(disk / "out", log=pytest.fail).step == 4
        (disk / "filler").unlink()
        successful(arguments(disk / "out", data_dir, eval_interval=4, max_iters=99, init_from="resume"))
        assert list(column(disk / "out", "loss")) == list(range(99))

    def test_stopped_by_a_signal_without_room(
        self, disk: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It does not say that it saved."""
        after_step(monkeypatch, 5, lambda: (_fill(disk / "filler", leave=0), signal.raise_signal(signal.SIGTERM)))
        done = here(arguments(disk / "out", data_dir, eval_interval=4))
        assert done.code == 1
        assert "saved step" not in done.out
        assert re.fullmatch(r"tightfit: .*last\.pt could not be written: .* the disk is full; .*\n", done.err)

    def test_room_for_two_files_only(self, disk: Path, data_dir: Path) -> None:
        """In 900 KB two checkpoints have room: the new one replaces the oldest."""
        _fill(disk / "filler", leave=900_000)
        done = here(arguments(disk / "out", data_dir, eval_interval=4))
        assert (done.code, done.err) == (0, "")
        assert load_newest(disk / "out", log=pytest.fail).step == 12

    def test_a_damaged_one_is_given_up_and_not_the_one_before(
        self, disk: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out_dir = disk / "out"
        successful(arguments(out_dir, data_dir, eval_interval=4))
        os.truncate(out_dir / "ckpt.pt", 5000)
        after_step(monkeypatch, 10, lambda: _fill(disk / "filler", leave=0))
        monkeypatch.setattr(saving, "LAST_WAIT_S", 0.0)
        done = here(arguments(out_dir, data_dir, eval_interval=4, max_iters=14, init_from="resume"))
        assert done.code == 1
        assert load_newest(out_dir, log=pytest.fail).step == 8
        assert f"{out_dir / 'ckpt.pt'} is now called ckpt.pt.damaged" in done.out

    def test_full_from_the_start(self, disk: Path, data_dir: Path) -> None:
        _fill(disk / "filler", leave=0)
        done = here(arguments(disk / "out", data_dir))
        assert done.code == 1
        assert re.fullmatch(r"tightfit: .*disk is full.*\n", done.err)


def _interrupted(words: list[str], number: signal.Signals, *, after: str) -> tuple[int, str]:
    """Exit code and output of a process that gets a signal once a line begins with `after`."""
    running = subprocess.Popen(command(words), env=environment(), stdout=subprocess.PIPE, text=True)
    lines = []
    with running:
        assert running.stdout is not None
        for line in running.stdout:
            lines.append(line)
            if line.startswith(after):
                running.send_signal(number)
    return running.returncode, "".join(lines)


def _names(*, bias: bool) -> list[str]:
    """Parameters in the order of nanoGPT's modules."""
    kinds = ("weight", "bias") if bias else ("weight",)
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    blocks = [f"transformer.h.{layer}.{part}.{kind}" for layer in range(2) for part in parts for kind in kinds]
    ends = [f"transformer.ln_f.{kind}" for kind in kinds]
    return ["transformer.wte.weight", "transformer.wpe.weight", *blocks, *ends]


def _nanogpt_adamw(parameters: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
    """Matrices with decay, then vectors without, each in the order of the modules."""
    ordered = [parameters[name] for name in _names(bias="transformer.ln_f.bias" in parameters)]
    groups = [
        {"params": [p for p in ordered if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in ordered if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def _step_by_hand(model: GPT, optimizer: torch.optim.AdamW, config: TrainConfig, step: int) -> None:
    batches = Batches(open_dataset("tiny", config.data_dir), config.block_size, 4, config.seed)
    inputs, targets = map(torch.from_numpy, batches.read("train", step, range(4)))
    (model(inputs, targets) / targets.numel()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(config, step)
    optimizer.step()
    optimizer.zero_grad()


def _crash_before_change(patch: pytest.MonkeyPatch, moment: int, act: Callable[[], object]) -> bool:
    """Whether `act` came to its end before its change number `moment` to a folder, before which it crashes."""
    count = iter(range(1000))

    def counted(usual: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **keys: Any) -> Any:
            if next(count) == moment:
                raise Crash
            return usual(*args, **keys)

        return change

    for name in ("replace", "link", "unlink", "fsync"):
        patch.setattr(os, name, counted(getattr(os, name)))
    try:
        act()
    except Crash:
        return False
    return True


def _flip(path: Path, offset: int, *, bit: int = 3) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def _fill(path: Path, *, leave: int) -> None:
    """Write zeros until the disk is full, then give `leave` bytes back."""
    size = 0
    with open(path, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                size += file.write(bytes(4096))
        assert shutil.disk_usage(path.parent).free == 0
        file.truncate(max(0, size - leave))
