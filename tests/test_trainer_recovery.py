"""What counts as out of memory, what is done about it, in one process and in two that must agree."""

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failures import MESSAGE, Failing, Same, at, squeeze, trained, unsqueeze
from runs import arguments, column, environment, here, newest, ranks, rows, tensors, torchrun
from torch import nn

from tightfit.trainer import checkpoint, fallback, loop, out_of_memory, recovery
from tightfit.trainer.atomic import Update
from tightfit.trainer.distributed import World
from tightfit.trainer.fallback import Halving, Settings, least_that_failed
from tightfit.trainer.out_of_memory import Kind, is_out_of_memory, release_frames, requested_bytes
from tightfit.trainer.recovery import BeyondSaving, OutOfMemory, Recovery
from tightfit.trainer.supervise import STATUS

WANTED = Settings(micro_batch=8, eval_micro_batch=8, loss="full", checkpointed_blocks=0)


class OutOfResources(Exception):
    """As Triton's."""


class TestErrors:
    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity of"),
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
            RuntimeError("CUDA driver error: out of memory"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
            RuntimeError(MESSAGE),
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."),
            RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1 GB)"),
            RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
            RuntimeError("XPU out of memory. Tried to allocate 20.00 MiB"),
            RuntimeError("std::bad_alloc"),
            MemoryError(),
            OSError(12, "Cannot allocate memory"),
        ],
        ids=lambda error: str(error)[:30],
    )
    def test_recoverable(self, error: Exception) -> None:
        assert is_out_of_memory(error) is Kind.RECOVERABLE

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("CUDA error: an illegal memory access was encountered"),
            RuntimeError("CUDA error: unspecified launch failure"),
            RuntimeError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
        ],
        ids=str,
    )
    def test_broken(self, error: Exception) -> None:
        assert is_out_of_memory(error) is Kind.BROKEN

    @pytest.mark.parametrize(
        "error",
        [
            OutOfResources("out of resource: shared memory, Required: 262144, Hardware limit: 101376"),
            RuntimeError("CUDA error: device-side assert triggered"),
            RuntimeError("NCCL error: unhandled system error, peer closed"),
            RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
            ValueError("out of memory"),
            OSError(28, "No space left on device"),
        ],
        ids=str,
    )
    def test_other_errors(self, error: Exception) -> None:
        assert is_out_of_memory(error) is None

    def test_numpy_really_out_of_memory(self) -> None:
        with pytest.raises(MemoryError) as caught:
            np.empty(2**60, dtype=np.uint8)
        assert is_out_of_memory(caught.value) is Kind.RECOVERABLE
        assert requested_bytes(caught.value) == 2**60

    def test_torch_really_out_of_memory(self) -> None:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**50, dtype=torch.uint8)
        assert is_out_of_memory(caught.value) is Kind.RECOVERABLE
        assert requested_bytes(caught.value) == 2**50

    def test_the_cause_of_another_error_counts(self) -> None:
        """As the compiler's and the checkpoint writer's."""
        outer = RuntimeError("unexpected pos 64 vs 0")
        outer.__context__ = MemoryError()
        assert is_out_of_memory(outer) is Kind.RECOVERABLE
        compiler = RuntimeError("backend='inductor' raised")
        compiler.inner_exception = torch.OutOfMemoryError("CUDA out of memory.")  # type: ignore[attr-defined]
        assert is_out_of_memory(compiler) is Kind.RECOVERABLE

    def test_a_library_that_cannot_start_is_out_of_memory_on_a_full_device_only(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for free, kind in ((2**20, Kind.RECOVERABLE), (2**34, None)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 2**35))
            assert is_out_of_memory(error) is kind

    def test_the_host_s_library_without_room_for_its_code_is_out_of_memory_on_a_full_host_only(self) -> None:
        """As oneDNN said when the limit of a training process was lowered to what it held."""
        error = RuntimeError("could not create a primitive")
        assert is_out_of_memory(error) is None
        assert is_out_of_memory(RuntimeError("could not create a primitive descriptor for a matmul")) is None
        squeeze(2**24)
        try:
            assert is_out_of_memory(error) is Kind.RECOVERABLE
        finally:
            unsqueeze()

    def test_no_tensor_of_the_functions_that_failed_stays_alive(self) -> None:
        alive = []

        def inner() -> None:
            activation = torch.ones(1000)
            alive.append(weakref.ref(activation))
            try:
                raise MemoryError
            except MemoryError as error:
                raise RuntimeError(MESSAGE) from error

        try:
            inner()
        except RuntimeError as error:
            assert alive[0]() is not None
            release_frames(error)
            kept = error
        assert alive[0]() is None
        assert str(kept) == MESSAGE


class TestHalving:
    def test_the_way_down_by_hand(self) -> None:
        fallback, now, path = Halving(6, 12, WANTED), WANTED, []
        while (smaller := fallback.smaller(now, "backward", None)) is not None:
            path.append(now.changes_to(smaller))
            now = smaller
        assert path == [
            "micro_batch 8 -> 4", "micro_batch 4 -> 2", "micro_batch 2 -> 1", "loss full -> chunked",
            "checkpointed_blocks 0 -> 2", "checkpointed_blocks 2 -> 3", "checkpointed_blocks 3 -> 6",
        ]  # fmt: skip

    def test_evaluations_shrink_alone(self) -> None:
        fallback, now, path = Halving(6, 12, WANTED), WANTED, []
        while (smaller := fallback.smaller(now, "eval", None)) is not None:
            path.append(now.changes_to(smaller))
            now = smaller
        assert path[-2:] == ["eval_micro_batch 2 -> 1", "loss full -> chunked"]
        assert now.micro_batch == 8

    def test_a_micro_batch_above_the_share_is_halved_from_the_share(self) -> None:
        smaller = Halving(6, 3, WANTED).smaller(WANTED, "forward", None)
        assert smaller is not None
        assert smaller.micro_batch == 1

    @pytest.mark.parametrize("wanted", [WANTED, replace(WANTED, micro_batch=5, loss="auto", checkpointed_blocks=3)])
    @pytest.mark.parametrize("depth", range(1, 8))
    def test_growing_ends_at_what_was_wanted_and_never_needs_what_failed(self, wanted: Settings, depth: int) -> None:
        fallback, now = Halving(6, 12, wanted), wanted
        for _ in range(depth):
            now = fallback.smaller(now, "backward", None) or now
        ends = {}
        for failed in (frozenset[Settings](), frozenset({least_that_failed(wanted, "backward")})):
            grown = now
            for _ in range(20):
                larger = fallback.larger(grown, failed)
                if larger is None:
                    break
                assert larger.needs_as_much_as(grown)
                assert larger != grown
                assert not any(larger.needs_as_much_as(one) for one in failed)
                grown = larger
            ends[failed] = grown
        assert ends[frozenset()] == wanted
        assert all(end != wanted for failed, end in ends.items() if failed)

    def test_an_evaluation_that_failed_keeps_training_from_nothing(self) -> None:
        failed = frozenset({least_that_failed(WANTED, "eval")})
        now = replace(WANTED, micro_batch=2, eval_micro_batch=4)
        assert Halving(6, 12, WANTED).larger(now, failed) == replace(now, micro_batch=4)


class TestUpdate:
    """The one part that is finished instead of undone, with every operator of it failing once."""

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize(("scaled", "infinite"), [(False, False), (True, False), (True, True)])
    def test_each_operator(self, fused: bool, scaled: bool, infinite: bool) -> None:
        expected, count = _updated(fused, scaled, infinite, fails_at=0)
        assert count > 4
        for number in range(1, count + 1):
            found, _ = _updated(fused, scaled, infinite, fails_at=number)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected), number

    def test_a_half_done_update_is_not_begun_again(self) -> None:
        """What the test above rests on: the second group's kernel fails, the first one's is not repeated."""
        model, optimizer, scaler = _small(fused=True, scaled=False)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        update = Update(optimizer, scaler)
        kernels = []

        def second(_number: int, name: str, _phase: str) -> bool:
            kernels.append(name)
            return "_fused_adamw_" in name and sum("_fused_adamw_" in each for each in kernels) == 2

        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(RuntimeError, match="can't allocate"), _everywhere(second):
            update.go_on()
        changed = [not torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True)]
        assert changed == [True, False]
        assert update.has_written
        update.go_on()
        assert [float(state["step"]) for state in optimizer.state.values()] == [1.0, 1.0]


class _everywhere(Failing):
    """Counts operators of code that is no run's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen["all"] += 1
        if self._chooses(self.seen["all"], str(func), ""):
            raise RuntimeError(MESSAGE)
        return func(*args, **(kwargs or {}))


def _small(*, fused: bool, scaled: bool) -> tuple[nn.Module, torch.optim.AdamW, torch.amp.GradScaler]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=fused, foreach=False)
    for parameter in model.parameters():
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros(()), **zeros}
    return model, optimizer, torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0, growth_interval=2)


def _updated(fused: bool, scaled: bool, infinite: bool, *, fails_at: int) -> tuple[dict[str, torch.Tensor], int]:
    """All tensors after three updates, and the operators of the second, which fails at one of them."""
    model, optimizer, scaler = _small(fused=fused, scaled=scaled)
    count = 0
    for step in range(3):
        loss = model(torch.arange(3.0) + step).square().sum() * (float("inf") if infinite and step == 1 else 1.0)
        scaler.scale(loss).backward()
        if scaled:
            scaler.unscale_(optimizer)
        update = Update(optimizer, scaler)
        failing = _everywhere(lambda number, _name, _phase, step=step: step == 1 and number == fails_at)
        with failing:
            for _ in range(2):
                with contextlib.suppress(RuntimeError):
                    update.go_on()
                    break
        count = failing.seen["all"] if step == 1 else count
        assert all(parameter.grad is None for parameter in model.parameters())
    found = dict(model.state_dict())
    for number, state in enumerate(optimizer.state.values()):
        found |= {f"{number} {key}": value for key, value in state.items()}
    return found | {f"scaler {key}": torch.tensor(value) for key, value in scaler.state_dict().items()}, count


class TestRuns:
    def test_the_line_and_the_event(self, tmp_path: Path, data_dir: Path) -> None:
        got = trained(tmp_path, data_dir, at("backward", 200), micro_batch=4)
        assert "out of memory in backward (11.77 MiB refused): micro_batch 4 -> 2; it runs again" in got.printed
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        (event,) = [json.loads(line) for line in lines if "event" in line]
        assert 0 < event["step"] < 12
        assert 0 <= event.pop("seconds_lost") < 60
        before = {"micro_batch": 4, "eval_micro_batch": 4, "loss": "auto", "checkpointed_blocks": 0}
        assert event == {
            "step": event["step"], "event": "recovery", "phase": "backward", "kind": "recoverable",
            "before": before, "after": before | {"micro_batch": 2}, "requested_bytes": 12_345_678,
        }  # fmt: skip

    def test_events_survive_a_resume(self, tmp_path: Path, data_dir: Path) -> None:
        trained(tmp_path, data_dir, at("backward", 200), save_interval=3, max_iters=8)
        trained(tmp_path, data_dir, init_from="resume")
        assert [row["event"] for row in rows(tmp_path) if "event" in row] == ["recovery"]
        assert list(column(tmp_path, "loss")) == list(range(12))

    def test_settings_grow_back_and_not_to_what_failed(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """8 fails whenever it is tried; 4 is wanted again after 2 was enough for a while."""
        monkeypatch.setattr(fallback, "PATIENCE", 5)
        usual, tried = loop.optimizer_step, []

        def step(state: Any, *args: Any, **keys: Any) -> Any:
            size = run_of(state).settings.micro_batch
            tried.append(size)
            if size == 8 or (size == 4 and len(tried) == 2):
                raise RuntimeError(MESSAGE)
            return usual(state, *args, **keys)

        def run_of(state: Any) -> Any:
            return state.guard.run

        monkeypatch.setattr(loop, "optimizer_step", step)
        monkeypatch.setattr(recovery, "free_bytes", lambda device: 1000)
        keys = {"batch_size": 8, "max_iters": 30, "lr_decay_iters": 30}
        got = trained(tmp_path, data_dir, **keys)
        assert tried == [8, 4] + [2] * 30
        assert "micro_batch 2 -> 4" not in got.printed  # 4 failed as well
        tried.clear()
        free = iter([1000] * 2 + [5000] * 100)
        monkeypatch.setattr(recovery, "free_bytes", lambda device: next(free))
        got = trained(tmp_path / "more", data_dir, **keys)
        # far more is free: it grows to 4 after 5 steps and to 8 after 5 more, fails there, and then waits for 10
        assert tried == [8, 4] + [2] * 5 + [4] * 5 + [8] + [4] * 20
        assert got.sequences.keys() >= {("train", step) for step in range(30)}

    def test_others_taking_memory_is_noticed(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gib, margin = 2**30, fallback.MARGIN_BYTES
        rooms = iter([(4 * gib, 6 * gib), (margin // 2, 6 * gib)] + [(margin // 2, 2 * gib)] * 100)
        monkeypatch.setattr(recovery, "room_bytes", lambda device: next(rooms))
        monkeypatch.setattr(recovery, "free_bytes", lambda device: gib)
        got = trained(tmp_path, data_dir, micro_batch=4)
        assert got.printed.count("other processes take memory") == 1
        assert "step 2: other processes take memory, 128.00 MiB is free: micro_batch 4 -> 2" in got.printed
        (event,) = [row for row in rows(tmp_path) if "event" in row]
        assert (event["event"], event["before"]["micro_batch"], event["after"]["micro_batch"]) == ("pressure", 4, 2)

    @pytest.mark.parametrize(
        ("fails_at", "is_supervised", "code"),
        [
            (5, True, 75),
            pytest.param(5, False, 1, marks=pytest.mark.slow),
            pytest.param(0, True, 1, marks=pytest.mark.slow),
        ],
    )
    def test_nothing_smaller_ends_in_one_sentence_with_the_state_saved(
        self,
        tmp_path: Path,
        data_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
        fails_at: int,
        is_supervised: bool,
        code: int,
    ) -> None:
        """The supervisor starts another process, which may have room for what fitted this one before."""
        if is_supervised:
            monkeypatch.setenv(STATUS, str(tmp_path / "status"))
        usual, attempts = loop.optimizer_step, []

        def step(state: Any, *args: Any, **keys: Any) -> Any:
            if state.guard.run.step == fails_at:
                attempts.append(state.guard.run.settings)
                raise RuntimeError(MESSAGE)
            return usual(state, *args, **keys)

        monkeypatch.setattr(loop, "optimizer_step", step)
        done = here(arguments(tmp_path, data_dir, micro_batch=2))
        assert done.code == code
        assert done.err.count("\n") == 1
        assert f"tightfit: step {fails_at}: " in done.err
        assert "needs 11.77 MiB more than there is with micro_batch=1" in done.err
        assert "nothing smaller is left; try a shorter block_size" in done.err
        assert ("a new process may have room for it" in done.err) == (code == 75)
        assert (f"saved step {fails_at} in {tmp_path}" in done.out) == (fails_at > 0)
        assert len(attempts) == len(set(attempts)) + recovery.MOST_TRIES - 1
        monkeypatch.setattr(loop, "optimizer_step", usual)
        assert here(arguments(tmp_path, data_dir, init_from="resume" if fails_at else "scratch")).code == 0
        trained(tmp_path / "plain", data_dir)
        assert column(tmp_path, "loss") == pytest.approx(column(tmp_path / "plain", "loss"), rel=1e-6)

    def test_a_thread_that_onednn_spoiled_is_left_for_another(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its assembler never clears the error, so nothing that the same thread tries again can succeed."""
        usual, threads = loop.optimizer_step, []
        main = threading.get_ident()

        def step(state: Any, *args: Any, **keys: Any) -> Any:
            threads.append(threading.get_ident())
            if len(threads) > 4 and threading.get_ident() == main:
                raise RuntimeError("could not create a primitive")
            return usual(state, *args, **keys)

        monkeypatch.setattr(loop, "optimizer_step", step)
        monkeypatch.setattr(out_of_memory, "_host_is_full", lambda: True)
        trained(tmp_path, data_dir)
        assert threads[:5] == [main] * 5
        assert main not in threads[5:]
        monkeypatch.setattr(loop, "optimizer_step", usual)
        trained(tmp_path / "plain", data_dir)
        assert column(tmp_path, "loss") == pytest.approx(column(tmp_path / "plain", "loss"), rel=1e-6)

    def test_tries_with_nothing_smaller_wait_for_memory_to_come_back(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waited: list[float] = []
        monkeypatch.setattr(recovery.time, "sleep", waited.append)
        usual, attempts = loop.optimizer_step, []

        def step(state: Any, *args: Any, **keys: Any) -> Any:
            attempts.append(state.guard.run.step)
            if attempts.count(5) in (1, 2, 3) and attempts[-1] == 5:
                raise RuntimeError(MESSAGE)
            return usual(state, *args, **keys)

        monkeypatch.setattr(loop, "optimizer_step", step)
        monkeypatch.setattr(loop, "Halving", lambda *args: Same())
        trained(tmp_path, data_dir)
        assert [each for each in waited if each] == [0.5, 1.0, 2.0]

    def test_recover_off_raises_what_it_was(self, tmp_path: Path, data_dir: Path) -> None:
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
            trained(tmp_path, data_dir, at("forward", 5), recover=False)

    def test_an_error_that_is_no_memory_error_is_not_survived(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def step(*args: Any, **keys: Any) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(loop, "optimizer_step", step)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            trained(tmp_path, data_dir)

    def test_a_broken_context_after_an_error_of_memory_asks_for_a_new_process(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        errors = iter([MESSAGE, "CUDA error: an illegal memory access was encountered"])

        def step(*args: Any, **keys: Any) -> Any:
            raise RuntimeError(next(errors))

        monkeypatch.setattr(loop, "optimizer_step", step)
        with pytest.raises(BeyondSaving, match=r"illegal memory access .* --init_from=resume") as caught:
            trained(tmp_path, data_dir)
        assert caught.value.exit_code == 75

    def test_a_save_without_memory_leaves_the_last_good_checkpoint_and_training_goes_on(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usual, calls = checkpoint.torch.save, []

        def save(*args: Any, **keys: Any) -> None:
            calls.append(args)
            if 2 <= len(calls) <= 1 + recovery.MOST_TRIES:
                args[1].write(b"half")
                raise MemoryError
            usual(*args, **keys)

        monkeypatch.setattr(checkpoint.torch, "save", save)
        seen = []

        def say(self: Any, line: str) -> None:
            if "training goes on" in line:
                seen.append(torch.load(newest(tmp_path), weights_only=True)["iter_num"])

        monkeypatch.setattr(loop.Reporter, "log", say)
        trained(tmp_path, data_dir, save_interval=3)
        assert seen == [3]
        assert torch.load(newest(tmp_path), weights_only=True)["iter_num"] == 12

    def test_a_resume_without_memory_does_not_take_an_older_checkpoint(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trained(tmp_path, data_dir, max_iters=6, save_interval=2)
        usual, calls = checkpoint.torch.load, []

        def load(*args: Any, **keys: Any) -> Any:
            calls.append(args)
            if len(calls) == 1:
                raise MemoryError
            return usual(*args, **keys)

        monkeypatch.setattr(checkpoint.torch, "load", load)
        got = trained(tmp_path, data_dir, at("setup", 5), init_from="resume")
        assert "at step 6" in got.printed
        assert "damaged" not in got.printed
        assert got.printed.count("out of memory in resume") == 2
        trained(tmp_path / "plain", data_dir)
        assert column(tmp_path, "loss") == column(tmp_path / "plain", "loss")

    @pytest.mark.slow
    def test_no_activation_outlives_its_step(self, tmp_path: Path, data_dir: Path) -> None:
        """At the moment of the retry no more storages live than at the end of an ordinary step."""
        counts: list[tuple[bool, int]] = []

        class Watching(Failing):
            pass

        failing = Watching(lambda number, _name, phase: phase == "backward" and number in (100, 300, 500))
        usual = Recovery._go_back

        def go_back(self: Any, *args: Any) -> None:
            counts.append((True, _living_floats()))
            usual(self, *args)

        usual_done = Recovery.step_done

        def step_done(self: Any) -> None:
            counts.append((False, _living_floats()))
            usual_done(self)

        patch = pytest.MonkeyPatch()
        with patch.context() as at_work:
            at_work.setattr(Recovery, "_go_back", go_back)
            at_work.setattr(Recovery, "step_done", step_done)
            trained(tmp_path, data_dir, failing, fallback=Same(), max_iters=6)
        after_errors = [count for failed, count in counts if failed]
        assert len(after_errors) == 3
        assert max(after_errors) <= max(count for failed, count in counts if not failed)


def _living_floats() -> int:
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # other tests leave fake ones behind
    tensors = [item for item in gc.get_objects() if type(item) in plain and item.dtype == torch.float32]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class TestRealAllocations:
    @pytest.mark.slow
    def test_a_lowered_limit(self, tmp_path: Path, data_dir: Path) -> None:
        """The C library really refuses: once until the error is noticed, and once until the end of the run."""
        program = textwrap.dedent("""\
            import sys
            from pathlib import Path
            from failures import Same, squeeze, trained, unsqueeze
            from tightfit.trainer import loop, recovery

            out, data = Path(sys.argv[1]), Path(sys.argv[2])
            keys = dict(n_embd=128, n_head=2, block_size=128, batch_size=32, eval_iters=1, max_iters=4)
            trained(out / "plain", data, recover=False, **keys)
            usual, usual_report = loop._Run._train_step, recovery.Recovery._report

            def train_step(self):
                if self.step == 2 and not self.recovery._tries:
                    squeeze(48 * 2**20)
                return usual(self)

            def report(self, *args):
                unsqueeze()
                return usual_report(self, *args)

            loop._Run._train_step, recovery.Recovery._report = train_step, report
            print(trained(out / "once", data, fallback=Same(), **keys).printed)
            recovery.Recovery._report = usual_report
            print(trained(out / "always", data, **keys).printed)
            """)
        (tmp_path / "program.py").write_text(program)
        done = _python([str(tmp_path / "program.py"), str(tmp_path), str(data_dir)])
        assert done.returncode == 0, done.stderr
        once, always = done.stdout.split("n_layer = 2")[1:]
        assert re.search(r"step 2: out of memory in \w+ \(.* refused\): memory released, settings as they were", once)
        assert "step 2: out of memory in " in always
        assert "micro_batch 32 -> 16" in always
        plain = tmp_path / "plain"
        assert column(tmp_path / "once", "loss") == column(plain, "loss")
        weights = tensors(newest(tmp_path / "once"))
        assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors(newest(plain)).items())
        for name in ("loss", "val_loss"):
            assert column(tmp_path / "always", name) == pytest.approx(column(plain, name), rel=1e-6)

    def test_a_reserve_is_there_when_nothing_else_is(self, tmp_path: Path) -> None:
        (tmp_path / "program.py").write_text(
            textwrap.dedent("""\
            import mmap
            import resource
            from tightfit.system import own_bytes
            from tightfit.trainer.resident import Reserve

            def can_have(mib):
                try:
                    mmap.mmap(-1, mib * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
                except OSError:
                    return False
                return True

            def limit_to(spare_mib):
                limit = own_bytes()["RLIMIT_DATA"] + spare_mib * 2**20
                resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))

            reserve = Reserve()
            limit_to(8)
            found = [can_have(24)]
            reserve.release()
            found.append(can_have(24))
            reserve.take()
            found.append(can_have(24))
            reserve.release()
            limit_to(16)  # less than it wants
            reserve.take()
            found.append(can_have(12))
            print(found)
            """)
        )
        done = _python([str(tmp_path / "program.py")])
        assert done.stdout.strip() == "[False, True, False, True]", done.stderr


def _python(words: list[str], timeout: float = 100) -> "subprocess.CompletedProcess[str]":
    variables = environment() | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(
        [sys.executable, *words], env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )


class TestTwoProcesses:
    @pytest.mark.parametrize(
        ("trials", "shard"),
        [
            (1, "none"),
            pytest.param(100, "none", marks=pytest.mark.slow),
            *(pytest.param(40, shard, marks=pytest.mark.slow) for shard in ("full", "optimizer")),
        ],
    )
    def test_one_fails_at_random_and_nobody_hangs(
        self, tmp_path: Path, data_dir: Path, trials: int, shard: str
    ) -> None:
        program = [str(Path(__file__).parent / "failing_pair.py"), str(tmp_path), str(data_dir), str(trials), shard]
        running = (ranks if trials == 1 else torchrun)(2, program)
        try:
            out, err = running.communicate(timeout=60 + (6 if shard == "none" else 15) * trials)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.communicate()
        assert running.returncode == 0, err[-3000:]
        assert f"{trials} trials, " in out
        assert all(int(words.split()[-2]) >= trials // 2 for words in out.splitlines() if " failures" in words)

    @pytest.mark.slow
    def test_an_error_within_an_agreement_ends_both(self, tmp_path: Path, data_dir: Path) -> None:
        """Between the sum over both processes and its result the other one goes on: going back would hang them."""
        program = tmp_path / "program.py"
        program.write_text(
            textwrap.dedent("""\
            import os, sys
            from pathlib import Path
            from failures import Failing, trained
            from tightfit.trainer.recovery import BeyondSaving

            reads = 0

            def chooses(number, name, phase):
                global reads
                reads += phase == "forward" and "_local_scalar_dense" in name
                return reads == 3 and os.environ["RANK"] == "1"

            try:
                trained(Path(sys.argv[1]), Path(sys.argv[2]), Failing(chooses), max_iters=6)
            except BeyondSaving as error:
                print(f"process {os.environ['RANK']}: {error}", flush=True)
            """)
        )
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
        done = _python([*words, str(tmp_path / "out"), str(data_dir)], timeout=60)
        assert "process 1: step 1: the processes could not agree" in done.stdout
        assert "process 0: step 1: the exchange of gradients failed" in done.stdout

    def test_one_process_agrees_with_itself(self) -> None:
        lines: list[str] = []
        alone = Recovery(World(), torch.device("cpu"), lines.append, lambda step, values: None)
        alone.agree()
        answers = iter([MemoryError(), 7])

        def work() -> int:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        assert alone.tried("setup", work) == 7
        assert lines == ["step 0: out of memory in setup: memory released, settings as they were; it runs again"]

    @pytest.mark.slow
    def test_the_same_error_again_and_again_is_the_end(self) -> None:
        alone = Recovery(World(), torch.device("cpu"), lambda line: None, lambda step, values: None)
        calls = []

        def work() -> None:
            calls.append(1)
            raise MemoryError

        with pytest.raises(OutOfMemory, match="step 0: setup needs more memory than there is"):
            alone.tried("setup", work)
        assert len(calls) == recovery.MOST_TRIES

    def test_the_end_is_told_in_the_words_that_name_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Errors that follow from the same shortage name a thread, or a primitive."""
        monkeypatch.setattr(recovery, "WAIT_S", 0.0)
        alone = Recovery(World(), torch.device("cpu"), lambda line: None, lambda step, values: None)
        refusal = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
        errors = iter([RuntimeError(refusal), *[RuntimeError("can't start new thread")] * recovery.MOST_TRIES])

        def work() -> None:
            raise next(errors)

        with pytest.raises(OutOfMemory) as caught:
            alone.tried("setup", work)
        assert refusal in caught.value.message
