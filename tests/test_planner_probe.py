"""Plans timed for real on this machine's processor."""

from dataclasses import replace
from pathlib import Path

import pytest

from tightfit.config import TrainConfig
from tightfit.planner import probe
from tightfit.planner.candidates import Plan
from tightfit.planner.predict import Prediction
from tightfit.simulation.requests import Failed

SHARE = 6


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prediction(micro_batch: int) -> Prediction:
    plan = Plan(micro_batch=micro_batch, eval_micro_batch=1, loss="full", activation_checkpointing=0, compile=False)
    return Prediction(
        plan=plan, peak_bytes=1, allocated_bytes=1, phase="backward", categories={}, phases={}, pass_s=9.0,
        update_s=9.0, not_modelled=(), parameters=1,
    )  # fmt: skip


def config(data_dir: Path, dataset: str = "tiny") -> TrainConfig:
    return TrainConfig(
        data_dir=str(data_dir), dataset=dataset, device="cpu", n_layer=2, n_head=2, n_embd=32, block_size=32,
        batch_size=SHARE, gradient_accumulation_steps=1, compile=False,
    )  # fmt: skip


@pytest.mark.slow
def test_measured_seconds_take_the_place_of_predicted_ones(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    offered = [prediction(1), prediction(3)]
    found = probe.timed(config(data_dir), offered, SHARE, "cpu", log=said.append)
    assert {each.plan for each in found} == {each.plan for each in offered}
    assert all(0 < each.pass_s < 9 and 0 <= each.update_s < 9 for each in found)
    assert found[0].step_s(SHARE) <= found[1].step_s(SHARE)
    assert [line.split(",")[0] for line in said] == ["tried 1 x 6", "tried 3 x 2"]
    assert "(63.00 predicted)" in said[0], "9 s for each of 6 passes, and 9 for the update"
    # Remembered: no process is started for what was measured before.
    monkeypatch.setattr(probe, "run_once", lambda *request, **options: Failed(error="asked again"))
    assert probe.timed(config(data_dir), offered, SHARE, "cpu", log=said.append) == found


def test_what_cannot_be_timed_is_said_and_left_out(data_dir: Path) -> None:
    said: list[str] = []
    offered = [prediction(1)]
    assert probe.timed(config(data_dir, "missing"), offered, SHARE, "cpu", log=said.append) == offered
    assert "tried 1 x 6: there is no dataset" in said[0]
    assert "missing" in said[0]


def test_auto_is_for_long_runs_on_cuda(data_dir: Path) -> None:
    long = replace(config(data_dir), max_iters=1000)
    assert probe.is_wanted(long, "cuda")
    assert not probe.is_wanted(long, "cpu")
    assert not probe.is_wanted(replace(long, max_iters=999), "cuda")
    assert probe.is_wanted(replace(long, probe="on"), "cpu")
    assert not probe.is_wanted(replace(long, probe="off"), "cuda")
