"""Optimizer state in host memory: the same step, whatever is where."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from failures import Same, at, trained
from runs import arguments, column, here

from tightfit.config import TrainConfig, read_config
from tightfit.errors import ConfigError
from tightfit.models.model import GPT, GPTConfig
from tightfit.planner.candidates import Plan
from tightfit.planner.planning import ALLOCATOR, EXPANDABLE, make_plan, named_card
from tightfit.planner.predict import Prediction, Predictor, Target
from tightfit.simulation.client import Simulator
from tightfit.trainer.distributed import World
from tightfit.trainer.hardware import Hardware
from tightfit.trainer.setup import build_model, build_state
from tightfit.trainer.step import StepResult, StepState, optimizer_step

SHAPE = GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=32, bias=True)
CPU = torch.device("cpu")


def steps(
    offload: str, dtype: torch.dtype, checkpointed: int = 0, *, compiled: bool = False
) -> tuple[GPT, StepState, list[StepResult]]:
    config = TrainConfig(offload=offload, compile=compiled, activation_checkpointing=checkpointed)
    torch.manual_seed(config.seed)
    model = build_model(config, SHAPE, None, CPU)
    hardware = Hardware(device=CPU, dtype=dtype, compile=compiled, reasons=())
    state = build_state(config, model, None, hardware, World())
    ids = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(5))
    passes = [(ids[i : i + 2, :-1], ids[i : i + 2, 1:]) for i in (0, 2)]
    results = [optimizer_step(state, passes, passes=2, tokens=128, learning_rate=1e-2, grad_clip=0.5) for _ in range(3)]
    return model, state, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("checkpointed", "compiled"), [(0, False), (2, False), (0, True)])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_three_steps_end_bit_for_bit_as_those_without_it(
    dtype: torch.dtype, checkpointed: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # kernels take 20 s more
    plain, plain_state, expected = steps("none", dtype, checkpointed, compiled=compiled)
    model, state, found = steps("optimizer", dtype, checkpointed, compiled=compiled)
    assert [float(each.loss) for each in found] == [float(each.loss) for each in expected]
    assert [float(each.grad_norm) for each in found] == [float(each.grad_norm) for each in expected]
    assert state.offload is not None
    weights = state.offload.full_weights(model)
    assert weights.keys() == plain.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    moments, theirs = (each.optimizer.state_dict()["state"] for each in (state, plain_state))
    assert all(torch.equal(moments[number][key], theirs[number][key]) for number in theirs for key in theirs[number])


def test_the_device_holds_two_bytes_of_a_blocks_weight_and_no_gradient() -> None:
    model, state, _ = steps("optimizer", torch.bfloat16)
    matrix = model.transformer["h"][0].mlp.c_fc.weight
    assert matrix.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32
    assert all(parameter.grad is None for parameter in model.parameters())
    assert state.offload is not None
    assert torch.equal(matrix, state.offload.masters[matrix].bfloat16()), "the updated weight came back"


@pytest.mark.parametrize(("first", "then"), [("optimizer", "none"), ("none", "optimizer")])
def test_a_run_is_taken_up_with_or_without_it(tmp_path: Path, data_dir: Path, first: str, then: str) -> None:
    """The checkpoint holds the full weights and moments, wherever they were."""
    plain, part = tmp_path / "plain", tmp_path / "part"
    assert here(arguments(plain, data_dir)).code == 0
    assert here(arguments(part, data_dir, max_iters=6, offload=first)).code == 0
    assert here(arguments(part, data_dir, init_from="resume", offload=then)).code == 0
    assert column(part, "loss") == column(plain, "loss")


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_a_step_that_ran_out_of_memory_is_undone_with_it_too(tmp_path: Path, data_dir: Path, phase: str) -> None:
    plain, part = tmp_path / "plain", tmp_path / "part"
    trained(plain, data_dir)
    got = trained(part, data_dir, at(phase, 200 if phase != "optimizer" else 20), fallback=Same(), offload="optimizer")
    assert got.failed
    assert column(part, "loss") == column(plain, "loss")


def test_a_word_that_is_no_way_of_offloading_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"offload must be one of none, optimizer, activations, .*, got 'disk'"):
        TrainConfig(offload="disk")


class TestActivations:
    """6 blocks that pass 4096 x 64 float32 numbers, 1 MiB, to each other; no card computes here, so none differs."""

    KEYS: ClassVar[dict[str, Any]] = {
        "n_layer": 6, "n_head": 1, "n_embd": 64, "block_size": 4096, "vocab_size": 512, "dtype": "bfloat16",
        "batch_size": 2, "gradient_accumulation_steps": 1, "compile": False,
    }  # fmt: skip
    INPUT_BYTES = 4096 * 64 * 4

    def _least(self, *offloads: str) -> list[Prediction]:
        each = Plan(
            micro_batch=1,
            eval_micro_batch=1,
            loss="chunked",
            activation_checkpointing=self.KEYS["n_layer"],
            compile=False,
        )
        target = Target(
            gpu=named_card("RTX 4090").gpu,
            known=True,
            share=2,
            environ={ALLOCATOR: EXPANDABLE},
        )
        with Simulator() as simulator:
            predictor = Predictor(TrainConfig(**self.KEYS, device="cuda"), target, simulator)
            return predictor.predict([replace(each, offload=offload) for offload in offloads])

    @pytest.mark.slow
    def test_a_card_holds_one_blocks_input_instead_of_all(self, own_cache: None) -> None:
        plain, moved = self._least("none", "activations")
        saved = plain.allocated_bytes - moved.allocated_bytes
        assert 5 * self.INPUT_BYTES <= saved <= 6 * self.INPUT_BYTES
        assert moved.pass_s > plain.pass_s, "what is moved takes its time"

    @pytest.mark.slow
    def test_a_plan_moves_them_where_nothing_else_fits_and_only_there(self, own_cache: None) -> None:
        for missing, offload in ((2 * self.INPUT_BYTES, "activations"), (-2 * self.INPUT_BYTES, "none")):
            wanted = self._least("none")[0].peak_bytes - missing
            where = named_card("RTX 4090")
            held = where.budget.margin_bytes + where.budget.bytes - wanted
            where = replace(where, budget=replace(where.budget, margin_bytes=held))
            assert where.budget.bytes == wanted
            words = [f"--{key}={value}" for key, value in self.KEYS.items()]
            choice = make_plan(read_config(TrainConfig, words), where).choice
            assert choice.best is not None
            assert choice.best.plan.offload == offload
            assert choice.best.plan.is_exact
            assert choice.best.peak_bytes <= where.budget.bytes

    def test_without_recomputed_blocks_there_is_nothing_to_move(self, tmp_path: Path, data_dir: Path) -> None:
        done = here(arguments(tmp_path, data_dir, offload="activations", fit="off"))
        assert done.code == 2
        assert "no block is recomputed; set --activation_checkpointing" in done.err

    def test_a_run_that_surely_fits_recomputes_its_blocks_for_it(self, tmp_path: Path, data_dir: Path) -> None:
        done = here(arguments(tmp_path, data_dir, offload="activations", max_iters=2))
        assert done.code == 0
        assert "plan: unchanged" in done.out
        assert "activation_checkpointing = 2 (plan)" in done.out

    def test_cuda_graphs_cannot_record_it(self) -> None:
        with pytest.raises(ConfigError, match="CUDA graphs, which mode=reduce-overhead uses"):
            TrainConfig(offload="activations", mode="reduce-overhead")

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="a real card is needed")
    def test_on_a_card_the_losses_are_those_without_it(self, tmp_path: Path, data_dir: Path) -> None:
        keys = {"device": "cuda", "dtype": "bfloat16", "activation_checkpointing": 2, "fit": "off", "compile": False}
        for offload in ("none", "activations"):
            assert here(arguments(tmp_path / offload, data_dir, **{**keys, "offload": offload})).code == 0
        assert column(tmp_path / "none", "loss") == column(tmp_path / "activations", "loss")
