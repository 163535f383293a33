"""Plans: that they fit, keep what is the user's, and are what a real run then takes."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_nvml
import numpy as np
import pytest
from fake_nvml import FakeMachine, Process

from tightfit.config import Resolved, TrainConfig, read_config
from tightfit.planner import planning as make
from tightfit.planner.budget import Budget
from tightfit.planner.candidates import Plan
from tightfit.planner.planned_fallback import PlannedFallback
from tightfit.planner.planning import PlanResult, card_here, make_plan, named_card
from tightfit.planner.predict import Prediction
from tightfit.planner.search import Choice, Line
from tightfit.planner.sentences import nothing_fits
from tightfit.trainer.fallback import Settings
from tightfit.units import GIB, MIB

ROOT = Path(__file__).parents[1]
STORY = str(ROOT / "configs" / "train_openwebtext.py")
CARD, TOTAL, USED = "RTX 3060 12GB", round(11.69 * GIB), 2 * GIB
pytestmark = pytest.mark.usefixtures("own_cache")


def plan_of(*arguments: str, gpu: str = CARD, memory: int = TOTAL, used: int = USED) -> PlanResult:
    resolved: Resolved[TrainConfig] = read_config(TrainConfig, list(arguments))
    return make_plan(resolved, named_card(gpu, memory_bytes=memory, used_by_others_bytes=used))


class TestStory:
    """GPT-2 124M, 64 x 1024 tokens a step, on a 12 GB RTX 3060 of which others use 2 GiB; not compiled, to be quick."""

    CONFIG = (STORY, "--compile=False")

    def test_a_plan_fits_and_keeps_the_batch(self) -> None:
        result = plan_of(*self.CONFIG)
        best = result.choice.best
        assert best is not None
        assert best.peak_bytes <= result.where.budget.bytes < TOTAL - USED
        assert result.config.effective_batch == 64
        assert result.config.tokens_per_step == 65_536
        assert 1 <= best.plan.micro_batch < 64
        assert result.choice.request is not None
        assert result.choice.request.peak_bytes > 50 * GIB  # 64 at once, with (65536, 50304) float32 logits and more
        for each in result.choice.offered:
            assert each.peak_bytes <= result.where.budget.bytes

    def test_it_is_remembered(self) -> None:
        first, again = plan_of(*self.CONFIG), plan_of(*self.CONFIG)
        assert again.traced == 0
        assert again.choice.best == first.choice.best

    @pytest.mark.slow
    def test_more_memory_never_gives_a_slower_plan(self) -> None:
        seconds = []
        for total in (6 * GIB, 9 * GIB, TOTAL):
            best = plan_of(*self.CONFIG, memory=total).choice.best
            assert best is not None
            seconds.append(best.step_s(64))
        assert seconds == sorted(seconds, reverse=True)

    @pytest.mark.slow
    def test_a_fixed_micro_batch_is_obeyed_or_refused(self) -> None:
        config = (*self.CONFIG, "--n_layer=1")
        obeyed = plan_of(*config, "--micro_batch=2").choice.best
        assert obeyed is not None
        assert obeyed.plan.micro_batch == 2
        refused = plan_of(*config, "--micro_batch=48", "--loss=full", "--activation_checkpointing=0").choice
        assert refused.best is None

    def test_a_real_card_took_more_than_the_plan_lets_it(self) -> None:
        """The log of the story: 6.78 GiB allocated when 6.14 GiB were refused, in the first evaluation, by batch 64."""
        best = plan_of(*self.CONFIG).choice.best
        assert best is not None
        assert best.phases["eval"] < 6.78 * GIB


class TestCompiled:
    """A model of which not four sequences fit a card with all that backward needs, so narrow that many passes cost
    more, by their launches, than recomputing does."""

    MODEL = ("--n_layer=6", "--n_head=4", "--n_embd=128", "--vocab_size=512", "--batch_size=16")

    def plan(self, *arguments: str) -> Plan:
        pytest.importorskip("triton")
        best = plan_of(*self.MODEL, "--gradient_accumulation_steps=1", *arguments, memory=230 * MIB, used=0).choice.best
        assert best is not None
        assert best.plan.compile
        return best.plan

    @pytest.mark.slow
    def test_where_memory_is_short_it_keeps_a_share_of_what_backward_needs(self) -> None:
        plan = self.plan()
        assert plan.activation_checkpointing == 0
        assert plan.activation_memory_budget < 1
        assert plan.micro_batch == 4

    @pytest.mark.slow
    def test_with_dropout_blocks_are_recomputed_instead(self) -> None:
        plan = self.plan("--dropout=0.1")
        assert plan.activation_checkpointing > 0
        assert plan.activation_memory_budget == 1
        assert plan.micro_batch == 4


@pytest.mark.slow
def test_too_large_a_model_is_refused_with_the_numbers() -> None:
    width, layers = 6400, 2
    model = (f"--n_layer={layers}", "--n_head=50", f"--n_embd={width}", "--vocab_size=50304", "--batch_size=1")
    result = plan_of(*model, "--compile=False", "--offload=none", used=0)
    assert result.choice.best is None
    assert result.choice.lossy is None
    least = result.choice.least
    assert least is not None
    parameters = 12 * layers * width**2 + (50_304 + 1024) * width  # and a few layer norms
    assert least.peak_bytes > 4 * 4 * parameters  # weights, gradients and two moments in float32
    assert least.plan.activation_checkpointing == layers
    assert least.plan.micro_batch == 1


class TestReliefs:
    """16M parameters, whose weights, gradients and moments take 253 MiB, on a card that has 331 MiB for all of it."""

    MODEL = ("--n_layer=4", "--n_head=4", "--n_embd=256", "--vocab_size=50304", "--block_size=256", "--batch_size=4")
    MEMORY = 449 * MIB

    @pytest.fixture(autouse=True)
    def _without_torchao(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Moments of 8 bits are in test_optimizer_8bit: their traces take half a minute each."""
        monkeypatch.setattr(make, "_is_installed", lambda name: name != "torchao")

    def _plan(self, *arguments: str) -> PlanResult:
        return plan_of(*self.MODEL, "--compile=False", *arguments, memory=self.MEMORY, used=0)

    @pytest.mark.slow
    def test_the_optimizer_goes_to_the_host_where_nothing_else_fits(self) -> None:
        result = self._plan()
        best = result.choice.best
        assert best is not None
        assert best.plan.offload == "optimizer"
        assert best.plan.is_exact
        assert best.plan.param_dtype == "float32"
        assert best.peak_bytes <= result.where.budget.bytes < 335 * MIB
        assert "optimizer state" not in best.categories
        assert best.categories["parameters"] < 80 * MIB, "64 MiB of embeddings, and two bytes of each block's weight"

    @pytest.mark.slow
    def test_a_lossy_change_is_named_and_made_only_if_allowed(self) -> None:
        refused = self._plan("--offload=none")
        assert refused.choice.best is None
        assert refused.choice.lossy is not None
        text = "\n".join(nothing_fits(refused))
        assert "With --allow=bf16_parameters it would fit: " in text
        assert "It is lossy: updates smaller than 1/256 of a weight are lost" in text
        allowed = self._plan("--offload=none", "--allow=bf16_parameters").choice.best
        assert allowed is not None
        assert allowed.plan.param_dtype == "bfloat16"
        assert not allowed.plan.is_exact
        assert allowed.plan.keys()["param_dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_smaller_effective_batch_saves_the_gradients_of_the_pass_before() -> None:
    """6.7M parameters, whose gradients take 26 MiB, on a card that has 160 MiB for all of it."""
    model = ("--n_layer=8", "--n_head=4", "--n_embd=256", "--vocab_size=512", "--batch_size=8", "--compile=False")
    keys = (*model, "--gradient_accumulation_steps=2", "--offload=none", "--allow=effective_batch")
    best = plan_of(*keys, memory=277 * MIB, used=0).choice.best
    assert best is not None
    assert best.plan.effective_batch == best.plan.micro_batch < 16
    assert best.plan.keys()["batch_size"] == best.plan.micro_batch
    assert best.plan.keys()["gradient_accumulation_steps"] == 1
    assert best.plan.passes(16) == 1
    assert not best.plan.is_exact


@pytest.mark.slow
def test_gpt2_xl_on_twelve_gigabytes() -> None:
    result = plan_of("--n_layer=48", "--n_head=25", "--n_embd=1600", "--vocab_size=50304", used=0)
    best = result.choice.best
    assert best is not None
    assert best.plan.is_exact
    assert best.plan.offload == "optimizer"
    assert best.peak_bytes <= result.where.budget.bytes
    assert result.config.effective_batch == 480


def test_the_command_says_so_for_people_and_machines(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tightfit", "plan", STORY, "--compile=False", "--gpu", CARD]
    words += ["--memory=11.69GiB", "--used=2GiB"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "11.69 GiB" in text
    assert re.search(r"PLAN: \d+ sequences at once, \d+ passes a step", text)
    found = json.loads(subprocess.run([*words, "--json"], capture_output=True, text=True, check=True).stdout)
    assert found["best"]["fits"] is True
    assert found["best"]["peak_bytes"] <= found["budget"]["bytes"]
    assert found["tokens_per_step"] == 65_536
    wrong = subprocess.run([*words[:-3], "GTX 9999"], capture_output=True, text=True)
    assert wrong.returncode == 2
    page = tmp_path / "nowhere" / "page.html"
    nowhere = subprocess.run([*words, f"--html={page}"], capture_output=True, text=True)
    assert nowhere.returncode == 2
    assert nowhere.stderr.count("\n") == 1  # before anything was traced
    assert "GTX 9999" in wrong.stderr


class TestOnTheHost:
    """A real training run in a process that the kernel limits."""

    MODEL = ("--n_layer=4", "--n_head=4", "--n_embd=256", "--vocab_size=50304", "--block_size=128", "--device=cpu")
    RUN = ("--batch_size=64", "--gradient_accumulation_steps=1", "--max_iters=1", "--eval_iters=1", "--loss=full")

    def _train(self, folder: Path, *arguments: str, limit: int) -> subprocess.CompletedProcess[str]:
        data = folder / "data" / "ids"
        data.mkdir(parents=True, exist_ok=True)
        ids = np.random.default_rng(0).integers(0, 50_257, 100_000, dtype=np.uint16)
        for split in ("train", "val"):
            ids.tofile(data / f"{split}.bin")
        words = [sys.executable, "-m", "tightfit", "train", f"--data_dir={folder / 'data'}", "--dataset=ids"]
        words += [*self.MODEL, *self.RUN, f"--out_dir={folder / 'out'}", "--supervise=False", *arguments]
        return subprocess.run(
            words,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )

    @pytest.mark.slow
    def test_it_trains_within_a_limit_that_stops_what_was_asked(self, tmp_path: Path) -> None:
        limit = 1400 * MIB
        literal = self._train(tmp_path, "--fit=off", "--recover=False", limit=limit)
        assert literal.returncode != 0
        assert "can't allocate memory" in literal.stderr
        assert "Traceback" not in literal.stderr
        explanation = (tmp_path / "out" / "explanation.txt").read_text()
        assert explanation.startswith("Problem\n")
        assert explanation.splitlines()[1] in literal.stdout, "it is printed, too"
        fitted = self._train(tmp_path, limit=limit)
        assert fitted.returncode == 0, fitted.stdout + fitted.stderr
        assert "plan: " in fitted.stdout
        assert "out of memory" not in fitted.stdout  # the plan held: nothing had to be recovered
        assert "step 1: " in fitted.stdout

    @pytest.mark.slow
    def test_what_cannot_fit_is_said_before_anything_starts(self, tmp_path: Path) -> None:
        small = ("--n_layer=1", "--n_embd=64", "--vocab_size=512")
        done = self._train(tmp_path, "--memory=300MiB", *small, limit=8 * GIB)
        assert done.returncode == 1
        assert "NOTHING FITS" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()


def test_the_fallback_uses_what_was_measured() -> None:
    plan = Plan(micro_batch=16, eval_micro_batch=16, loss="full", activation_checkpointing=0, compile=False)
    best = Prediction(
        plan=plan,
        peak_bytes=9 * GIB,
        allocated_bytes=9 * GIB,
        phase="backward",
        categories={"parameters": GIB, "optimizer state": 2 * GIB, "gradients": GIB, "activations": 5 * GIB},
        phases={},
        pass_s=1.0,
        update_s=0.1,
        not_modelled=(),
        parameters=1,
    )
    line = Line(
        start=5.0 * GIB,
        per_sequence=GIB / 4,
        saved_per_block=0.0,
        pass_start_s=0.0,
        pass_s=1.0,
        pass_s_per_block=0.0,
        update_s=0.0,
    )
    choice = Choice(best=best, offered=[best], line=line, share=64)
    budget = Budget(total_bytes=13 * GIB, used_by_others_bytes=0, context_bytes=GIB, margin_bytes=0, text="")
    fallback = PlannedFallback.of(choice, n_layer=12, budget=budget, on_host=True)
    assert fallback.predicted_peak_bytes == 10 * GIB, "with what the process takes besides its tensors"
    now = Settings(micro_batch=16, eval_micro_batch=16, loss="full", checkpointed_blocks=0)
    # 3 GiB stay; a step takes 2 GiB and 0.25 GiB a sequence. Of 4.3 GiB free 3% are left alone: (4.17 - 2) / 0.25 = 8.
    assert fallback.smaller(now, "backward", round(4.3 * GIB)) == Settings(
        micro_batch=8, eval_micro_batch=8, loss="full", checkpointed_blocks=0
    )
    # Where not even one has room, it halves.
    halved = fallback.smaller(now, "backward", GIB)
    assert halved is not None
    assert halved.micro_batch == 8
    # Once others have left, the plan as it was; not where it failed with as much memory.
    assert fallback.larger(replace(now, micro_batch=1), frozenset()) == now
    step = fallback.larger(replace(now, micro_batch=1), frozenset({now}))
    assert step is not None
    assert step.micro_batch == 2
    assert not fallback.is_tight


def test_a_budget_is_what_is_left() -> None:
    budget = Budget(total_bytes=100, used_by_others_bytes=30, context_bytes=20, margin_bytes=5, text="")
    assert budget.bytes == 45
    assert Budget(total_bytes=10, used_by_others_bytes=30, context_bytes=0, margin_bytes=0, text="").bytes == 0


class TestCardHere:
    """The budget on a card that NVML reports: what is free, and what this process itself has."""

    def _budget(self, monkeypatch: pytest.MonkeyPatch, machine: FakeMachine, limit_bytes: int | None = None) -> Budget:
        fake_nvml.install(monkeypatch, machine)
        where = card_here(limit_bytes=limit_bytes)
        assert where is not None
        assert where.is_here
        return where.budget

    def _rtx3060(self, *processes: Process) -> FakeMachine:
        machine = fake_nvml.rtx3060()
        machine.cards[0].processes = list(processes)
        return machine

    def test_the_driver_s_reserve_is_taken_off_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """12,288 MiB, of which the driver keeps 318 and others use 1,000; the context takes 52, the margin 124."""
        budget = self._budget(monkeypatch, self._rtx3060(Process(7, "python", 1000)))
        assert budget.total_bytes == (12288 - 318) * MIB
        assert budget.used_by_others_bytes == 1000 * MIB
        assert budget.bytes + budget.context_bytes + budget.margin_bytes == (12288 - 318 - 1000) * MIB

    def test_programs_that_nvml_does_not_list_are_others_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = self._rtx3060(Process(7, "python", 600))
        machine.cards[0].other_used_mib = 400
        assert self._budget(monkeypatch, machine).used_by_others_bytes == 1000 * MIB

    def test_this_process_s_own_memory_is_no_other_s(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own = Process(os.getpid(), "python", 300)
        budget = self._budget(monkeypatch, self._rtx3060(Process(7, "python", 1000), own))
        assert (budget.total_bytes, budget.used_by_others_bytes) == ((12288 - 318) * MIB, 1000 * MIB)

    @pytest.mark.parametrize("reserve", [0, 251])
    def test_a_driver_that_does_not_report_its_reserve(self, monkeypatch: pytest.MonkeyPatch, reserve: int) -> None:
        """NVML's first memory call counts the reserve as used; it never counts as another program's."""
        machine = fake_nvml.t4()
        machine.cards[0].untold_reserve_mib = reserve
        budget = self._budget(monkeypatch, machine)
        assert budget.used_by_others_bytes == 5120 * MIB
        assert budget.total_bytes == (15109 - reserve) * MIB
        machine.cards[0].processes_supported = False
        budget = self._budget(monkeypatch, machine)
        assert budget.used_by_others_bytes == 0
        assert budget.total_bytes == (15109 - 5120 - reserve) * MIB

    def test_a_limit_is_for_this_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        budget = self._budget(monkeypatch, self._rtx3060(Process(7, "python", 1000)), limit_bytes=4 * GIB)
        assert (budget.total_bytes, budget.used_by_others_bytes) == (4 * GIB + 1000 * MIB, 1000 * MIB)


def test_a_mig_slice_is_planned_with_its_own_memory(monkeypatch: pytest.MonkeyPatch):
    fake_nvml.install(monkeypatch, fake_nvml.two_a100_mig())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first = card_here()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-4f2c6f0a-0000-5000-8000-000000000002")
    second = card_here()
    assert first is not None
    assert second is not None
    assert first.budget.total_bytes == second.budget.total_bytes == 19968 * MIB
    assert (first.budget.used_by_others_bytes, second.budget.used_by_others_bytes) == (37 * MIB, 12000 * MIB)
