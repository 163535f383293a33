"""torchao's AdamW in a run: what it keeps, that nothing of it is lost, and what a plan says of it."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import Same, at, trained
from runs import arguments, column, here, process

from tightfit.config import TrainConfig, read_config
from tightfit.errors import CheckpointError, ConfigError, DeviceError
from tightfit.models.model import GPT, GPTConfig
from tightfit.models.optimizer import build_optimizer, parts_of, plain_state, restore_state
from tightfit.planner.candidates import Plan
from tightfit.planner.planning import make_plan, named_card
from tightfit.planner.predict import Prediction, Predictor, Target
from tightfit.simulation.client import Simulator
from tightfit.trainer.hardware import compile_obstacle
from tightfit.units import MIB

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
WIDE: dict[str, Any] = {"n_embd": 64, "optimizer": "adamw_8bit"}
"""Matrices of 4096 numbers and more are narrowed, vectors are not."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are generated take 5 s for each shape; the function that they are made of computes the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def eight_bit(model: GPT) -> torch.optim.Optimizer:
    return build_optimizer(
        model.parameters(), weight_decay=0.1, learning_rate=1e-2, betas=(0.9, 0.95), kind="adamw_8bit"
    )


def test_a_run_learns_as_with_32_bits_but_not_the_same(tmp_path: Path, data_dir: Path) -> None:
    assert here(arguments(tmp_path / "plain", data_dir, n_embd=64)).code == 0
    assert here(arguments(tmp_path / "narrow", data_dir, **WIDE)).code == 0
    plain, narrow = column(tmp_path / "plain", "loss"), column(tmp_path / "narrow", "loss")
    assert plain != narrow
    assert narrow == pytest.approx(plain, rel=0.01)
    assert narrow[11] < 0.9 * narrow[0]


def test_a_run_that_was_taken_up_is_the_run_that_was_not(tmp_path: Path, data_dir: Path) -> None:
    assert here(arguments(tmp_path / "whole", data_dir, **WIDE)).code == 0
    part = tmp_path / "part"
    assert here(arguments(part, data_dir, **WIDE, max_iters=6)).code == 0
    assert here(arguments(part, data_dir, **WIDE, init_from="resume")).code == 0
    assert column(part, "loss") == column(tmp_path / "whole", "loss")


@pytest.mark.parametrize(("first", "then"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_a_run_changes_from_one_to_the_other(tmp_path: Path, data_dir: Path, first: str, then: str) -> None:
    assert here(arguments(tmp_path / "whole", data_dir, n_embd=64)).code == 0
    part = tmp_path / "part"
    assert here(arguments(part, data_dir, n_embd=64, optimizer=first, max_iters=6)).code == 0
    assert here(arguments(part, data_dir, n_embd=64, optimizer=then, init_from="resume")).code == 0
    assert column(part, "loss") == pytest.approx(column(tmp_path / "whole", "loss"), rel=0.01)


def test_a_checkpoint_holds_plain_tensors_and_comes_back_bit_for_bit() -> None:
    shape = GPTConfig(block_size=32, vocab_size=256, n_layer=1, n_head=2, n_embd=128)
    model = GPT(shape).init_weights()
    optimizer = eight_bit(model)
    for seed in (1, 2):
        ids = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(seed))
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = plain_state(optimizer)
    leaves = [v for each in saved["state"].values() for value in each.values() for v in _leaves(value)]
    assert all(type(leaf) is torch.Tensor for leaf in leaves)
    assert sum(leaf.nbytes for leaf in leaves) < 0.3 * sum(8 * p.numel() for p in model.parameters())
    other = eight_bit(model)
    restore_state(other, saved, "a file")
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        for key in mine:
            pairs = zip(parts_of(mine[key]).values(), parts_of(theirs[key]).values(), strict=True)
            assert all(torch.equal(one, two) for one, two in pairs)


ZEROS = torch.zeros(64, 64)
PARTS = {"codes": ZEROS.to(torch.uint8), "scale": torch.zeros(16), "qmap": torch.zeros(256)}
MALFORMED = {
    "sparse": ZEROS.to_sparse(),
    "without numbers": ZEROS.to("meta"),
    "complex": ZEROS.to(torch.complex64),
    "of another shape": torch.zeros(64, 65),
    "a word": "moments",
    "codes of 4 TiB": {**PARTS, "codes": torch.zeros(1, dtype=torch.uint8).expand(2**42)},
    "codes without numbers": {**PARTS, "codes": PARTS["codes"].to("meta")},
    "no scale": {"codes": PARTS["codes"], "qmap": PARTS["qmap"]},
    "scales that do not divide": {**PARTS, "scale": torch.zeros(17)},
    "a sparse map": {**PARTS, "qmap": PARTS["qmap"].to_sparse()},
}


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("what", MALFORMED)
def test_a_strangers_moments_are_refused_in_a_sentence(kind: str, what: str) -> None:
    optimizer = one_matrix(kind)
    saved = plain_state(optimizer)
    saved["state"][0]["exp_avg"] = MALFORMED[what]
    with pytest.raises(CheckpointError, match="the optimizer's exp_avg of parameter 0 is missing or misshapen"):
        restore_state(optimizer, saved, "a file")


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_odd_but_sound_moments_are_taken(kind: str) -> None:
    optimizer = one_matrix(kind)
    saved = plain_state(optimizer)
    turned = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)).t().requires_grad_()
    for value in (turned, {**PARTS, "codes": PARTS["codes"].t(), "qmap": torch.ones(256), "scale": torch.ones(16)}):
        saved["state"][0]["exp_avg_sq"] = value
        restore_state(optimizer, saved, "a file")
        own = optimizer.state_dict()["state"][0]["exp_avg_sq"]
        wanted = value if isinstance(value, torch.Tensor) else torch.ones(64, 64)
        assert not own.requires_grad
        assert torch.allclose(own if kind == "adamw" else own.dequantize(), wanted.detach(), rtol=0.1, atol=0.01)


def one_matrix(kind: str) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    return build_optimizer([parameter], weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.95), kind=kind)


def _leaves(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("phase", ["backward", "optimizer"])
def test_an_update_that_ran_out_of_memory_ends_with_the_same_bits(tmp_path: Path, data_dir: Path, phase: str) -> None:
    trained(tmp_path / "plain", data_dir, **WIDE, max_iters=4)
    got = trained(tmp_path / "part", data_dir, at(phase, 150), fallback=Same(), **WIDE, max_iters=4)
    assert got.failed
    assert column(tmp_path / "part", "loss") == column(tmp_path / "plain", "loss")


@pytest.mark.slow  # each shape of a weight is compiled for the virtual card, seconds for each
def test_a_plan_gives_its_state_the_bytes_that_it_has(own_cache: Path) -> None:
    """The state of a plan's step on a virtual card, against that of an optimizer made here."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 128, "block_size": 64, "vocab_size": 512}
    config = TrainConfig(**shape, optimizer="adamw_8bit", batch_size=2, gradient_accumulation_steps=1, device="cuda")
    plan = Plan(
        micro_batch=2,
        eval_micro_batch=2,
        loss="full",
        activation_checkpointing=0,
        compile=False,
        optimizer="adamw_8bit",
    )
    where = named_card("RTX 4090")
    target = Target(gpu=where.gpu, known=True, share=2)
    with Simulator() as simulator:
        predictor = Predictor(config, target, simulator)
        found = predictor.predict([plan])[0]
    optimizer = eight_bit(GPT(GPTConfig(**shape, bias=False)))
    tensors = [t for each in optimizer.state.values() for k, v in each.items() if k != "step" for t in _parts(v)]
    assert found.categories["optimizer state"] == pytest.approx(sum(t.nbytes for t in tensors), rel=0.05)
    assert _is_in_512_byte_blocks(found, [t.nbytes for t in tensors])


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(parts_of(tensor).values())


def _is_in_512_byte_blocks(found: Prediction, sizes: list[int]) -> bool:
    return found.categories["optimizer state"] in (sum(sizes), sum(-(-size // 512) * 512 for size in sizes))


@pytest.mark.slow
def test_a_dry_run_knows_its_state(tmp_path: Path) -> None:
    """Two moments of 1024 x 1024 codes, 4096 float32 scales and a map of 256 float32 each."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom torchao.optim import AdamW8bit\n"
        "model = torch.nn.Linear(1024, 1024, bias=False).cuda()\noptimizer = AdamW8bit(model.parameters())\n"
        "for _ in range(2):\n    model(torch.randn(8, 1024).cuda()).sum().backward()\n    optimizer.step()\n"
    )
    done = process(["dryrun", "--gpu", "RTX 4090", "--json", script])
    assert done.code == 0
    assert json.loads(done.out)["categories"]["optimizer state"] == 2 * (1024 * 1024 + 4096 * 4 + 256 * 4)


def test_it_cannot_be_offloaded_and_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="offload=optimizer works with optimizer=adamw only"):
        TrainConfig(optimizer="adamw_8bit", offload="optimizer")
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"needs torchao.*tightfit\[gpu\]"):
        eight_bit(GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8)))


def test_it_is_compiled_so_that_it_is_refused_where_nothing_can_be(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "C++ compiler" in compile_obstacle(torch.device("cpu"))
    with pytest.raises(DeviceError, match=r"optimizer=adamw_8bit needs torch\.compile"):
        trained(tmp_path / "out", data_dir, **WIDE)


@pytest.mark.slow
def test_a_plan_names_it_first_and_uses_it_if_allowed(own_cache: Path) -> None:
    """13.7M parameters, whose weights, gradients and moments take 210 MiB, on a card with 202 MiB for all of it."""
    keys = ["--n_layer=16", "--n_head=4", "--n_embd=256", "--vocab_size=4096", "--block_size=256", "--batch_size=4"]
    card = named_card("RTX 3060 12GB", memory_bytes=320 * MIB)
    for allowed in ("", "8bit_optimizer"):
        resolved = read_config(TrainConfig, [*keys, "--compile=False", "--offload=none", f"--allow={allowed}"])
        choice = make_plan(resolved, card).choice
        found = choice.best if allowed else choice.lossy and choice.lossy.best
        assert found is not None
        assert found.plan.optimizer == "adamw_8bit"
        assert not found.plan.is_exact
        assert (choice.best is None) == (not allowed)
