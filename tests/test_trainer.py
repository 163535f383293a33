"""The training loop: the effective batch in any split, when it evaluates and saves, what it prints."""

import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, arguments, column, here, rows, tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tightfit
from tightfit.config import Resolved, TrainConfig
from tightfit.models.model import GPT, GPTConfig
from tightfit.storage import LOCK
from tightfit.trainer import hardware as hardware_module
from tightfit.trainer import loop
from tightfit.trainer.hardware import choose_hardware, native_bfloat16
from tightfit.trainer.loop import RunResult, learning_rate_at, train
from tightfit.trainer.step import StepState, dropout_seed, evaluation_loss

EFFECTIVE_32 = {"batch_size": 32, "max_iters": 20, "lr_decay_iters": 20, "eval_interval": 10}


def run(out_dir: Path, data_dir: Path, **keys: Any) -> str:
    """What a successful run prints."""
    done = here(arguments(out_dir, data_dir, **keys))
    assert (done.code, done.err) == (0, "")
    return done.out


def configured(**keys: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, **keys})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """32 sequences in one pass."""
    out_dir = tmp_path_factory.mktemp("whole")
    printed = run(out_dir, data_dir, **EFFECTIVE_32, micro_batch=32)
    assert "tokens per step: 512, as 1 x 32 sequences of 16" in printed
    return out_dir


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> str:
    return run(tmp_path_factory.mktemp("printed"), data_dir, sample_at_end=40, start="abc", dtype="auto")


class TestEffectiveBatch:
    @pytest.mark.parametrize(
        "split",
        [
            {"micro_batch": 16},
            {"micro_batch": 12},  # 12 + 12 + 8
            {"micro_batch": 1},
            {"batch_size": 16, "gradient_accumulation_steps": 2, "eval_iters": 4},
            pytest.param(
                {"batch_size": 1, "gradient_accumulation_steps": 32, "eval_iters": 64}, marks=pytest.mark.slow
            ),
            {"micro_batch": 12, "loss": "chunked", "activation_checkpointing": 2},
        ],
        ids=lambda split: ",".join(f"{key}={value}" for key, value in split.items()),
    )
    def test_no_split_changes_losses_or_gradient_norms(
        self, whole: Path, tmp_path: Path, data_dir: Path, split: dict[str, Any]
    ) -> None:
        run(tmp_path, data_dir, **EFFECTIVE_32 | split)
        for name in ("loss", "grad_norm", "train_loss", "val_loss"):
            expected = column(whole, name)
            assert len(expected) == (3 if name.endswith("_loss") else 20)
            assert column(tmp_path, name) == pytest.approx(expected, rel=1e-5), name

    def test_the_batch_itself_matters(self, whole: Path, tmp_path: Path, data_dir: Path) -> None:
        """So that the comparison above is not of things that are always equal."""
        run(tmp_path, data_dir, **EFFECTIVE_32 | {"batch_size": 31})
        other = column(tmp_path, "loss")
        assert all(abs(other[step] - loss) > 1e-4 for step, loss in column(whole, "loss").items())

    def test_micro_batch_above_the_effective_batch_is_refused(self, tmp_path: Path, data_dir: Path) -> None:
        done = here(arguments(tmp_path, data_dir, micro_batch=5))
        assert done.code == 2
        assert "micro_batch=5 must not exceed batch_size * gradient_accumulation_steps=4" in done.err

    def test_dropout_seeds_differ_by_step_and_sequence(self) -> None:
        seeds = {dropout_seed(seed, step, first) for seed in (0, 1) for step in range(50) for first in range(12)}
        assert len(seeds) == 2 * 50 * 12
        assert all(0 <= seed < 2**63 for seed in seeds)

    def test_every_pass_of_a_run_has_its_own_dropout(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[int, int, int]] = []

        def recorded(seed: int, step: int, sequence: int) -> int:
            asked.append((seed, step, sequence))
            return dropout_seed(seed, step, sequence)

        monkeypatch.setattr(loop, "dropout_seed", recorded)
        run(tmp_path, data_dir, dropout=0.1, micro_batch=3, max_iters=3, seed=9)
        assert asked == [(9, step, first) for step in range(3) for first in (0, 3)]


class TestWhen:
    """What happens at which step."""

    @pytest.mark.parametrize(("max_iters", "interval", "evaluated"), [(10, 4, [0, 4, 8, 10]), (8, 4, [0, 4, 8])])
    def test_exactly_max_iters_updates_and_evaluations_at_0_each_interval_and_the_end(
        self, tmp_path: Path, data_dir: Path, max_iters: int, interval: int, evaluated: list[int]
    ) -> None:
        run(tmp_path, data_dir, max_iters=max_iters, eval_interval=interval)
        assert list(column(tmp_path, "loss")) == list(range(max_iters))
        assert list(column(tmp_path, "val_loss")) == evaluated
        saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
        assert saved["iter_num"] == max_iters
        assert {float(state["step"]) for state in saved["optimizer"]["state"].values()} == {max_iters}

    def test_no_steps_at_all(self, tmp_path: Path, data_dir: Path) -> None:
        run(tmp_path, data_dir, max_iters=0)
        assert list(column(tmp_path, "val_loss")) == [0]
        assert not column(tmp_path, "loss")

    def test_eval_only_prints_losses_and_writes_nothing(self, tmp_path: Path, data_dir: Path) -> None:
        printed = run(tmp_path / "new", data_dir, eval_only=True)
        assert re.search(r"^step 0: train loss 4\.\d{4}, val loss 4\.\d{4}$", printed, re.M)
        assert "iter 0" not in printed
        assert not (tmp_path / "new").exists()

    def test_eval_only_of_a_run_leaves_its_files_alone(self, tmp_path: Path, data_dir: Path) -> None:
        run(tmp_path, data_dir)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        printed = run(tmp_path, data_dir, init_from="resume", eval_only=True)
        at_end = next(row for row in rows(tmp_path) if row["step"] == 12)
        assert f"step 12: train loss {at_end['train_loss']:.4f}, val loss {at_end['val_loss']:.4f}" in printed
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_log_interval(self, tmp_path: Path, data_dir: Path) -> None:
        printed = run(tmp_path, data_dir, log_interval=5)
        assert re.findall(r"^iter (\d+):", printed, re.M) == ["0", "5", "10"]
        assert list(column(tmp_path, "loss")) == [0, 5, 10]

    def test_the_best_stays_in_ckpt_and_the_end_is_resumable(self, tmp_path: Path, data_dir: Path) -> None:
        """With a rate that spoils the model after its first steps, and always_save_checkpoint off."""
        keys = {
            "always_save_checkpoint": False,
            "eval_interval": 4,
            "warmup_iters": 4,
            "learning_rate": 3.0,
            "grad_clip": 0,
        }
        run(tmp_path, data_dir, **keys | {"learning_rate": 1e-2, "max_iters": 4})
        good = torch.load(tmp_path / "ckpt.pt", weights_only=True)
        printed = run(tmp_path, data_dir, **keys, init_from="resume")
        values = column(tmp_path, "val_loss")
        assert min(values[8], values[12]) > values[4]
        assert f"resuming {tmp_path / 'ckpt.pt'} at step 4" in printed
        best, last = (torch.load(tmp_path / name, weights_only=True) for name in ("ckpt.pt", "last.pt"))
        assert (best["iter_num"], last["iter_num"]) == (4, 12)
        assert best["best_val_loss"] == last["best_val_loss"] == pytest.approx(values[4])
        assert all(torch.equal(best["model"][name], good["model"][name]) for name in good["model"])
        printed = run(tmp_path, data_dir, **keys | {"max_iters": 13}, init_from="resume")
        assert f"resuming {tmp_path / 'last.pt'} at step 12" in printed

    def test_a_new_run_in_a_used_folder_moves_the_old_files(self, tmp_path: Path, data_dir: Path) -> None:
        run(tmp_path, data_dir)
        old = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != LOCK}
        printed = run(tmp_path, data_dir, max_iters=3, seed=5)
        assert f"{tmp_path} holds an earlier run; its files are now in {tmp_path / 'previous'}" in printed
        assert {path.name: path.read_bytes() for path in (tmp_path / "previous").iterdir()} == old
        assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["iter_num"] == 3

    def test_runs_that_end_before_they_save_do_not_replace_what_was_moved(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a run whose first step is out of memory, started again and again."""
        run(tmp_path, data_dir)
        saved = (tmp_path / "ckpt.pt").read_bytes()

        def fail(*_: object, **__: object) -> None:
            raise tightfit.DoesNotFit("no memory")

        monkeypatch.setattr(loop, "optimizer_step", fail)
        for _ in range(2):
            assert here(arguments(tmp_path, data_dir)).code == 1
        assert (tmp_path / "previous" / "ckpt.pt").read_bytes() == saved

    def test_one_model_in_two_runs_is_the_same_and_a_seed_makes_another(self, tmp_path: Path, data_dir: Path) -> None:
        for name, seed in (("one", 1), ("same", 1), ("other", 2)):
            run(tmp_path / name, data_dir, max_iters=2, seed=seed)
        one, same, other = (tensors(tmp_path / name / "ckpt.pt") for name in ("one", "same", "other"))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


class TestPrinted:
    def test_lines_are_nanogpts(self, printed: str) -> None:
        steps = re.findall(r"^iter (\d+): loss \d\.\d{4}, time \d+\.\d\dms, .* tok/s, memory .*$", printed, re.M)
        assert steps == [str(step) for step in range(12)]
        evaluations = re.findall(r"^step (\d+): train loss \d\.\d{4}, val loss \d\.\d{4}$", printed, re.M)
        assert evaluations == ["0", "12"]

    def test_the_configuration_comes_first_with_its_sources(self, printed: str) -> None:
        assert "n_layer = 2 (command line)" in printed
        assert printed.index("n_layer = 2") < printed.index("step 0:")
        assert "weight_decay" not in printed  # a default

    def test_choices_have_their_reasons(self, printed: str) -> None:
        assert "vocab_size: 64, the dataset's" in printed
        assert re.search(r"^compile: False, because on processors", printed, re.M)
        assert re.search(r"^dtype: (bfloat16|float32), because this processor", printed, re.M)
        assert re.search(r"^parameters: 27\.3K; tokens per step: 64, as 1 x 4 sequences of 16$", printed, re.M)

    def test_japanese_but_for_nanogpts_lines(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TIGHTFIT_LANG", "ja")
        printed = run(tmp_path, data_dir, max_iters=2)
        assert "vocab_size: 64、データセットの語彙数です" in printed
        assert "1 ステップのトークン数: 64（長さ 16 のシーケンスを 4 本ずつ 1 回）" in printed
        assert re.search(r"^iter 1: loss \d\.\d{4}, time ", printed, re.M)
        assert f"{tmp_path / 'ckpt.pt'} のステップ 2 から再開します" in run(tmp_path, data_dir, init_from="resume")

    def test_a_sample_ends_the_run(self, printed: str) -> None:
        after = printed.split("step 12:")[1].split("\n", 1)[1]
        assert after.startswith("abc")
        assert len(after.removesuffix("\n")) == 43

    def test_metrics_are_json_and_name_their_units(self, tmp_path: Path, data_dir: Path) -> None:
        run(tmp_path, data_dir, max_iters=1)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert set(lines[0]) == {"step", "train_loss", "val_loss", "lr"}
        assert set(lines[1]) == {
            "step", "loss", "grad_norm", "lr", "ms", "tokens_per_s", "memory_bytes", "memory_peak_bytes",
        }  # fmt: skip
        assert lines[1]["tokens_per_s"] == pytest.approx(64 / lines[1]["ms"] * 1000)
        assert lines[1]["memory_peak_bytes"] >= lines[1]["memory_bytes"] > 50 * 2**20

    def test_no_clipping_means_no_gradient_norm(self, tmp_path: Path, data_dir: Path) -> None:
        run(tmp_path, data_dir, max_iters=1, grad_clip=0)
        assert not column(tmp_path, "grad_norm")


class TestSchedule:
    def test_by_hand(self) -> None:
        """Warm-up over 2 of 3 steps' thirds, the top, half way down a cosine, the bottom, and after it."""
        config = configured(learning_rate=1.0, min_lr=0.2, warmup_iters=2, lr_decay_iters=10)
        expected = {0: 1 / 3, 1: 2 / 3, 2: 1.0, 4: 0.2 + 0.4 * (1 + 2**-0.5), 6: 0.6, 10: 0.2, 11: 0.2, 1000: 0.2}
        assert {step: learning_rate_at(config, step) for step in expected} == pytest.approx(expected)

    def test_rises_then_falls(self) -> None:
        config = configured(learning_rate=1.0, min_lr=0.0, warmup_iters=30, lr_decay_iters=100)
        rates = [learning_rate_at(config, step) for step in range(120)]
        assert rates[:31] == sorted(rates[:31])
        assert rates[30:] == sorted(rates[30:], reverse=True)
        assert max(rates) == 1.0

    def test_without_decay_it_is_constant(self) -> None:
        config = configured(decay_lr=False, learning_rate=0.5)
        assert {learning_rate_at(config, step) for step in (0, 1, 10**6)} == {0.5}

    def test_the_run_uses_it(self, tmp_path: Path, data_dir: Path) -> None:
        run(tmp_path, data_dir)
        config = configured()
        expected = [learning_rate_at(config, step) for step in range(12)]
        assert [row["lr"] for row in rows(tmp_path) if "loss" in row] == expected
        saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
        assert [group["lr"] for group in saved["optimizer"]["param_groups"]] == [expected[-1]] * 2


class TestHardware:
    def test_float16_on_a_processor_becomes_float32_and_says_why(self, tmp_path: Path, data_dir: Path) -> None:
        printed = run(tmp_path, data_dir, max_iters=1, dtype="float16")
        assert "dtype: float32, because no processor trains in float16 at speed" in printed

    def test_nothing_is_explained_that_was_asked_for(self) -> None:
        config = configured(device="cpu", dtype="float32", compile=False)
        assert choose_hardware(config).reasons == ()

    @pytest.mark.parametrize("asked", ["auto", "bfloat16"])
    def test_bfloat16_where_the_processor_has_it(self, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
        monkeypatch.setattr(hardware_module, "processor_flags", lambda: {"avx512_bf16"})
        chosen = choose_hardware(configured(dtype=asked))
        assert chosen.dtype == torch.bfloat16
        assert any("natively (avx512_bf16)" in reason for reason in chosen.reasons) == (asked == "auto")

    @pytest.mark.parametrize("asked", ["auto", "bfloat16"])
    def test_float32_where_it_has_not(self, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
        monkeypatch.setattr(hardware_module, "processor_flags", lambda: {"avx2"})
        chosen = choose_hardware(configured(dtype=asked))
        assert chosen.dtype == torch.float32
        assert "dtype: float32, because this processor has no bfloat16 instructions" in chosen.reasons

    def test_device_auto_says_what_it_found(self) -> None:
        chosen = choose_hardware(configured(device="auto"))
        assert chosen.reasons[0].startswith(f"device: {chosen.device}, because")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
    def test_cuda_that_is_not_there_is_refused(self, tmp_path: Path, data_dir: Path) -> None:
        done = here(arguments(tmp_path / "new", data_dir, device="cuda"))
        assert done.code == 2
        assert re.fullmatch(r"tightfit: device=cuda, but .*; use --device=cpu, .*\n", done.err)
        assert not (tmp_path / "new").exists()

    def test_compile_without_a_compiler_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        with pytest.raises(tightfit.DeviceError, match="needs a C\\+\\+ compiler for processors, and none is found"):
            choose_hardware(configured(compile=True))

    @pytest.mark.skipif(not native_bfloat16(), reason="this processor has no bfloat16")
    def test_bfloat16_learns_about_as_float32(self, tmp_path: Path, data_dir: Path) -> None:
        for dtype in ("float32", "bfloat16"):
            run(tmp_path / dtype, data_dir, max_iters=30, lr_decay_iters=30, dtype=dtype)
        exact, low = (column(tmp_path / dtype, "val_loss")[30] for dtype in ("float32", "bfloat16"))
        assert low == pytest.approx(exact, abs=0.05)
        assert exact < 3.5  # from 4.16


class TestEvaluation:
    @pytest.mark.parametrize("size", [1, 3, 8])
    def test_the_evaluation_micro_batch_changes_no_loss(self, tmp_path: Path, data_dir: Path, size: int) -> None:
        for name, keys in (("own", {"eval_micro_batch": size}), ("usual", {})):
            run(tmp_path / name, data_dir, max_iters=2, **keys)
        for name in ("train_loss", "val_loss"):
            assert column(tmp_path / "own", name) == pytest.approx(column(tmp_path / "usual", name), rel=1e-6)

    def test_the_last_micro_batch_may_be_smaller(self, tmp_path: Path, data_dir: Path) -> None:
        """8 sequences as 3 + 3 + 2: the mean is over tokens, not over micro-batches."""
        run(tmp_path, data_dir, max_iters=0, eval_micro_batch=3)
        run(tmp_path / "one", data_dir, max_iters=0, eval_micro_batch=1)
        assert column(tmp_path, "val_loss") == pytest.approx(column(tmp_path / "one", "val_loss"), rel=1e-6)

    def test_no_more_than_one_micro_batch_of_logits_is_alive(self) -> None:
        """The peak over four micro-batches is that of one alone."""
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=640, n_layer=1, n_head=1, n_embd=8), loss="full")
        model.init_weights()
        peaks = []
        for count in (1, 4):
            with _LiveLogits(vocab_size=640) as live:
                total, tokens = evaluation_loss(_state(model), _micro_batches(count))
            peaks.append(live.peak)
            assert tokens == count * 2 * 16
            assert total / tokens == pytest.approx(6.46, abs=0.05)  # ln 640, an untrained model
            assert live.now == 0
        assert peaks[0] == peaks[1] >= 2 * 16 * 640

    def test_dropout_is_off_and_the_mode_comes_back(self) -> None:
        model = GPT(GPTConfig(block_size=16, vocab_size=640, n_layer=1, n_head=1, n_embd=8, dropout=0.5))
        model.init_weights()
        state = _state(model)
        losses = {evaluation_loss(state, _micro_batches(1))[0] for _ in range(3)}
        assert len(losses) == 1
        assert model.training


class TestPython:
    def test_train_as_a_function(self, tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        result = tightfit.train(**TINY | {"out_dir": str(tmp_path), "data_dir": str(data_dir), "max_iters": 2})
        assert isinstance(result, RunResult)
        assert (result.step, result.stopped_by) == (2, None)
        assert result.best_val_loss == pytest.approx(min(column(tmp_path, "val_loss").values()))
        assert "max_iters = 2 (call)" in capsys.readouterr().out

    def test_a_config_object_and_the_inner_function_agree(self, tmp_path: Path, data_dir: Path) -> None:
        config = configured(out_dir=str(tmp_path / "one"), data_dir=str(data_dir), max_iters=2)
        one = tightfit.train(config)
        sources = dict.fromkeys(vars(config), "test")
        assert train(Resolved(configured(**vars(config) | {"out_dir": str(tmp_path / "two")}), sources, ())) == one


def _state(model: nn.Module) -> StepState:
    return StepState(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        autocast=lambda: torch.autocast("cpu", enabled=False),
    )


def _micro_batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randint(640, (2, 16), generator=draw), torch.randint(640, (2, 16), generator=draw)


class _LiveLogits(TorchDispatchMode):
    """Counts the elements of living tensors whose last axis is the vocabulary, at each operation of torch."""

    def __init__(self, *, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.peak = vocab_size, 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def now(self) -> int:
        storages = [seen() for seen in self._seen.values()]
        return sum(storage.nbytes() // 4 for storage in storages if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size:
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.now)
        return result
