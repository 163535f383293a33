"""Which plan is chosen, by peaks that these tests make up: what is looked at, in which order, and that it ends."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tightfit.config import TrainConfig, read_config
from tightfit.planner.candidates import BOTH, INPUTS, OFFLOAD, Plan, Relief, reliefs
from tightfit.planner.planning import named_card
from tightfit.planner.predict import Prediction
from tightfit.planner.search import Choice, Task, choose
from tightfit.units import GIB

BUDGET = named_card("RTX 3060 12GB").budget
"""11.4 GiB."""
Peak = Callable[[Plan, bool], float]


class MadeUp:
    """Stands for the predictor: a peak in GiB for each plan, whole or of its steps alone."""

    def __init__(self, config: TrainConfig, peak: Peak) -> None:
        self._config, self._peak = config, peak

    def expect_compiled(self, expected: bool) -> None: ...

    def predict(self, plans: Sequence[Plan], *, whole: bool = True) -> list[Prediction]:
        return [self._predicted(plan, round(self._peak(plan, whole) * GIB)) for plan in plans]

    def _predicted(self, plan: Plan, peak: int) -> Prediction:
        plan.applied_to(self._config)  # a configuration that its own checks refuse is none
        return Prediction(
            plan=plan, peak_bytes=peak, allocated_bytes=peak, phase="backward", categories={}, phases={}, pass_s=1.0,
            update_s=0.1, not_modelled=(), parameters=1,
        )  # fmt: skip


def chosen(peak: Peak, *words: str, processes: int = 1, offloads: Sequence[Relief] = (INPUTS, OFFLOAD, BOTH)) -> Choice:
    resolved = read_config(TrainConfig, [*words, "--vocab_size=50304"])
    predictor: Any = MadeUp(resolved.config, peak)
    share = -(-resolved.config.effective_batch // processes)
    task = Task(
        resolved=resolved,
        predictor=predictor,
        budget=BUDGET,
        share=share,
        compiled=False,
        on_host=False,
        processes=processes,
    )
    return choose(task, reliefs(resolved, offloads=offloads, may_use_8bit=True))


def just_too_much(plan: Plan, whole: bool) -> float:
    """20 MiB more than there is, but for plans that keep the optimizer elsewhere or narrow."""
    relieved = plan.offload != "none" or plan.optimizer != "adamw" or plan.param_dtype != "float32"
    return (8 if relieved else BUDGET.bytes / GIB + 0.02) + 0.1 * (plan.micro_batch - 1)


@pytest.mark.parametrize(
    ("words", "offload"),
    [
        ((), "activations"),
        (("--mode=max-autotune",), "optimizer"),
        (("--mode=reduce-overhead",), "optimizer"),
        (("--activation_checkpointing=0",), "optimizer"),
        (("--activation_checkpointing=6",), "activations"),
    ],
)
def test_offloads_that_other_keys_forbid_are_not_looked_at(words: tuple[str, ...], offload: str) -> None:
    best = chosen(just_too_much, *words).best
    assert best is not None
    assert best.plan.offload == offload


def test_a_narrow_optimizer_stays_on_the_device() -> None:
    choice = chosen(lambda plan, whole: 20.0, "--optimizer=adamw_8bit", "--allow=block_size")
    assert choice.best is None
    assert choice.least is not None
    assert choice.least.plan.optimizer == "adamw_8bit"


def test_lossy_changes_that_are_allowed_come_first() -> None:
    def peak(plan: Plan, whole: bool) -> float:
        return 20.0 if plan.is_exact else 8.0

    best = chosen(peak, "--allow=bf16_parameters", offloads=()).best
    assert best is not None
    assert best.plan.param_dtype == "bfloat16"
    none_allowed = chosen(peak, offloads=())
    assert none_allowed.best is None
    assert none_allowed.lossy is not None
    assert none_allowed.lossy.relief is not None
    assert none_allowed.lossy.relief.name == "8bit_optimizer"


@pytest.mark.parametrize(("sequences", "processes", "wanted"), [(9, 8, 8), (100, 64, 64), (64, 1, 1), (6, 2, 2)])
def test_a_step_of_one_pass_has_sequences_for_every_process(sequences: int, processes: int, wanted: int) -> None:
    def peak(plan: Plan, whole: bool) -> float:
        return (11.0 if plan.effective_batch else 12.0) + plan.micro_batch - 1

    words = (f"--batch_size={sequences}", "--gradient_accumulation_steps=1", "--allow=effective_batch")
    best = chosen(peak, *words, processes=processes, offloads=()).best
    assert best is not None
    assert best.plan.keys()["batch_size"] == wanted
    assert best.plan.keys()["gradient_accumulation_steps"] == 1


def test_the_least_plan_is_offered_though_its_lines_were_never_traced() -> None:
    """All logits seem to fit by the steps alone, and the evaluation shows that they do not."""

    def peak(plan: Plan, whole: bool) -> float:
        return 8.0 if plan.loss == "chunked" else 20.0 if whole else 9.0

    choice = chosen(peak, "--batch_size=1", "--gradient_accumulation_steps=1")
    assert choice.best is not None
    assert choice.line is not None
    assert (choice.best.plan.loss, choice.best.plan.is_exact) == ("chunked", True)
