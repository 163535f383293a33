"""Errors injected in every phase and at random operators: runs end as those that were never disturbed."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import Failing, Same, Trained, at, at_random, once_in_each, trained
from runs import column, newest, rows, tensors
from torch import nn

from tightfit.models.optimizer import build_optimizer
from tightfit.trainer import setup

LOSSES = ("loss", "grad_norm", "train_loss", "val_loss")
SPLIT = {"batch_size": 6, "gradient_accumulation_steps": 2, "micro_batch": 4, "eval_interval": 5, "save_interval": 3}
PHASES = ("setup", "eval", "forward", "loss", "backward", "clip", "optimizer", "save", "sample", "log")
OPTIMIZERS = ("fused", "foreach", "single")


def use_optimizer(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """AdamW with another implementation than the package chooses here."""

    def build(parameters: Iterable[nn.Parameter], **keys: Any) -> torch.optim.Optimizer:
        fused = build_optimizer(parameters, **keys)
        options = {"lr": keys["learning_rate"], "betas": keys["betas"], "foreach": kind == "foreach"}
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in fused.param_groups]
        other = torch.optim.AdamW(groups, fused=False, **options)
        other.state = fused.state
        return other

    if kind != "fused":
        monkeypatch.setattr(setup, "build_optimizer", build)


def assert_same(plain: Path, path: Path, expected: Trained, got: Trained, *, exactly: bool) -> None:
    """The same losses, weights, moments, sequences in the same order; nothing lost, nothing twice."""
    assert got.sequences == expected.sequences
    if exactly:
        assert [row for row in rows(path) if "event" not in row] == rows(plain)
    for name in LOSSES:
        assert column(path, name) == pytest.approx(column(plain, name), rel=1e-6 if name != "grad_norm" else 1e-5)
    one, other = tensors(newest(plain)), tensors(newest(path))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if exactly:
            assert torch.equal(tensor, other[name]), name
        else:  # AdamW divides by the root of small second moments, which magnifies rounding
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Any:
    """Runs one without `recover` and errors, each of them once."""
    known: dict[str, tuple[Path, Trained]] = {}

    def run(optimizer: str, **keys: Any) -> tuple[Path, Trained]:
        name = f"{optimizer} {keys}"
        if name not in known:
            path = tmp_path_factory.mktemp("plain")
            known[name] = path, trained(path, data_dir, recover=False, **keys)
        return known[name]

    return run


@pytest.fixture
def compare(undisturbed: Any, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs one with errors and compares it with the undisturbed one."""

    def compared(
        failing: Failing, *, optimizer: str = "fused", shrinks: bool = False, name: str = "", **keys: Any
    ) -> Trained:
        keys = SPLIT | {"sample_at_end": 3, "start": "a"} | keys
        path = tmp_path / f"path{name}"
        with monkeypatch.context() as patch:
            use_optimizer(patch, optimizer)
            plain, expected = undisturbed(optimizer, **keys)
            got = trained(path, data_dir, failing, fallback=None if shrinks else Same(), **keys)
        assert_same(plain, path, expected, got, exactly=not shrinks)
        events = [row for row in rows(path) if row.get("event") == "recovery"]
        assert len(events) == len(got.failed)
        return got

    return compared


@pytest.mark.parametrize(
    "shrinks", [pytest.param(False, id="split kept", marks=pytest.mark.slow), pytest.param(True, id="split changed")]
)
def test_errors_in_all_phases_of_one_run(compare: Any, shrinks: bool) -> None:
    got = compare(once_in_each(PHASES), shrinks=shrinks)
    assert {phase for phase, _ in got.failed} == set(PHASES)
    assert got.printed.count("(11.77 MiB refused)") == len(PHASES)


@pytest.mark.slow
@pytest.mark.parametrize("shrinks", [False, True], ids=["split kept", "split changed"])
@pytest.mark.parametrize("phase", PHASES)
def test_every_phase(compare: Any, phase: str, shrinks: bool) -> None:
    got = compare(at(phase, 3, 14), shrinks=shrinks)
    expected = 1 if phase in ("setup", "save", "sample") else 2
    assert len(got.failed) >= expected
    assert f"out of memory in {'optimizer' if phase == 'clip' else phase} (11.77 MiB refused)" in got.printed


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_the_update_at_each_of_its_operators(compare: Any, optimizer: str, number: int) -> None:
    got = compare(at("optimizer", *range(number, 100, 37)), optimizer=optimizer, max_iters=4, lr_decay_iters=4)
    assert got.failed


@pytest.mark.parametrize(("optimizer", "dropout"), [("fused", 0.1), ("single", 0.0)])
@pytest.mark.slow
def test_random_operators(compare: Any, dropout: float, optimizer: str) -> None:
    got = compare(at_random(5, 300), optimizer=optimizer, dropout=dropout, max_iters=12, lr_decay_iters=12)
    assert len(got.failed) >= 4


def test_random_operators_and_smaller_settings(compare: Any) -> None:
    got = compare(at_random(6, 300, spared=6000), shrinks=True, max_iters=12, lr_decay_iters=12)
    assert len(got.failed) >= 2
    assert "micro_batch 4 -> 2" in got.printed


@pytest.mark.slow
def test_five_hundred_errors(compare: Any) -> None:
    """Random operators of every phase; optimizers, dropout, accumulation, split kept and changed."""
    failed = 0
    phases: set[str] = set()
    cases = itertools.product(OPTIMIZERS, (0.0, 0.1), (1, 4, 12), (False, True))
    for number, (optimizer, dropout, micro_batch, shrinks) in enumerate(cases):
        if dropout and shrinks:
            continue  # another split draws other masks: it is another run
        keys = {"dropout": dropout, "micro_batch": micro_batch, "max_iters": 60, "lr_decay_iters": 60}
        spared = 6000 if shrinks or micro_batch == 1 else 1500  # a step is of up to 3000 operators
        got = compare(
            at_random(number, 300, spared=spared), optimizer=optimizer, shrinks=shrinks, name=str(number), **keys
        )
        failed += len(got.failed)
        phases |= {phase for phase, _ in got.failed}
    print(f"{failed} errors in {sorted(phases)}")
    assert failed >= 500
    assert {"eval", "forward", "loss", "backward", "optimizer"} <= phases
