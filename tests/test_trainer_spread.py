"""The sharding of a run: the main process plans, and every process does as it says, or fails with it."""

import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Done, arguments, assert_close, ended, here, torchrun

from tightfit.config import Resolved, TrainConfig, read_config
from tightfit.errors import DeviceError, DoesNotFit, TightfitError
from tightfit.links import Cards
from tightfit.models.model import GPTConfig
from tightfit.planner import fit_cards
from tightfit.planner.fit_cards import plan_spread
from tightfit.planner.planning import Where, named_card, this_host
from tightfit.trainer.distributed import World
from tightfit.trainer.spread import SpreadPlan, agreed_plan, as_planned, with_sharding
from tightfit.units import GIB, MIB

CPU = torch.device("cpu")
TWO = World(0, 2, 0, 2)


class Alone(World):
    """The main process of two, whose other one always answers as it does."""

    def all(self, value: Any) -> list[Any]:
        return [value, value]

    def from_main(self, value: Any) -> Any:
        return value


ALONE = Alone(0, 2, 0, 2)


def resolved(*words: str) -> Resolved[TrainConfig]:
    return read_config(TrainConfig, ["--device=cpu", "--vocab_size=64", "--n_embd=60", "--block_size=16", *words])


class TestAgreement:
    def test_a_run_without_sharding_or_planner_has_no_plan(self) -> None:
        def never(*_: object, **__: object) -> SpreadPlan:
            raise AssertionError

        assert agreed_plan(resolved(), never, ALONE, CPU, log=print) is None
        assert agreed_plan(resolved("--shard=auto"), None, ALONE, CPU, log=print) is None
        assert agreed_plan(resolved("--shard=auto"), never, World(), CPU, log=print) is None

    def test_an_error_of_the_main_process_is_raised_in_all(self) -> None:
        """The others wait for its answer, so an error is one."""

        def nothing_fits(*_: object, **__: object) -> SpreadPlan:
            raise DoesNotFit("too large")

        with pytest.raises(DoesNotFit, match="too large"):
            agreed_plan(resolved("--shard=auto"), nothing_fits, ALONE, CPU, log=print)

        class Other(Alone):
            def from_main(self, value: Any) -> Any:
                assert value is None, "only the main process plans"
                return DoesNotFit("too large")

        with pytest.raises(TightfitError, match="too large"):
            agreed_plan(resolved("--shard=auto"), nothing_fits, Other(1, 2, 1, 2), CPU, log=print)

    def test_without_a_virtual_device_a_rule_chooses(self) -> None:
        def no_device(*_: object, **__: object) -> SpreadPlan:
            raise DeviceError("torch cannot be patched")

        run = resolved("--shard=auto")
        plan = agreed_plan(run, no_device, ALONE, CPU, log=print)
        assert plan is not None
        shape = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, bias=False)
        config, event = with_sharding(as_planned(run, plan).config, plan, shape, ALONE, CPU)
        assert event is not None
        assert (config.shard, event.shard) == ("none", "none")
        assert event.reason.startswith("no plan: torch cannot be patched.")
        assert "Weights, gradients and moments take 4" in event.reason

    def test_its_keys_are_the_plans(self) -> None:
        plan = SpreadPlan(shard="full", reason="", keys={"micro_batch": 3})
        found = as_planned(resolved("--shard=auto"), plan)
        assert (found.config.shard, found.config.micro_batch) == ("full", 3)
        assert (found.sources["shard"], found.sources["micro_batch"]) == ("plan", "plan")
        assert as_planned(resolved("--shard=full"), plan).sources["shard"] == "command line"


class TestPlan:
    def test_a_small_run_is_not_traced(self) -> None:
        found = plan_spread(resolved("--shard=auto"), TWO, [None, None], log=print)
        assert found.shard == "none"
        assert "A copy in each process needs at most" in found.reason
        asked = plan_spread(resolved("--shard=full"), TWO, [None, None], log=print)
        assert (asked.shard, asked.reason) == ("full", "As asked.")

    def test_the_fullest_card_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fit_cards, "card_here", lambda index, limit_bytes: named_card("RTX 3090"))
        config = replace(resolved().config, device="cuda")
        free = [20 * GIB, 17 * GIB, None, 19 * GIB]
        where = fit_cards._where(config, World(0, 4, 0, 2), free)
        assert (where.cards.nodes, where.cards.per_node) == (2, 2)
        assert where.budget.total_bytes == named_card("RTX 3090").budget.total_bytes - 3 * GIB
        assert where.budget.nccl_bytes > 0
        uneven = fit_cards._where(config, World(0, 3, 0, 2), free[:3])
        assert (uneven.cards.nodes, uneven.cards.per_node) == (3, 1)

    def test_processes_share_the_memory_of_their_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one = fit_cards._where(resolved().config, World(), [None])
        four = fit_cards._where(resolved().config, World(0, 4, 0, 4), [None] * 4)
        assert four.cards == Cards(per_node=4)
        assert four.budget.total_bytes < 0.4 * one.budget.total_bytes
        given = this_host(700 * MIB, processes=4)
        assert given.budget.total_bytes == 700 * MIB  # of each process

    @pytest.mark.slow
    @pytest.mark.usefixtures("own_cache")
    @pytest.mark.parametrize(
        ("room_mib", "shard", "why"),
        [
            (40, "none", "none takes 26.55 MiB"),
            (24, "optimizer", "none does not fit (at least 24.33 MiB); optimizer takes 21.50 MiB"),
            (20, "full", "The only one that fits."),
            (5, "", ""),
        ],
    )
    def test_peaks_decide(self, monkeypatch: pytest.MonkeyPatch, room_mib: int, shard: str, why: str) -> None:
        """Of a model of 1.6M parameters, on a processor with so much memory for the tensors of each process."""
        budget = replace(named_card("T4").budget, total_bytes=room_mib * MIB, context_bytes=0, margin_bytes=0)
        where = Where(gpu=None, budget=budget, cards=Cards(per_node=2))
        monkeypatch.setattr(fit_cards, "_where", lambda *_: where)
        words = ("--n_layer=2", "--n_embd=256", "--n_head=4", "--memory=1GiB", "--batch_size=2", "--compile=False")
        run = resolved(*words, "--gradient_accumulation_steps=1", "--loss=chunked", "--shard=auto", "--dtype=float32")
        if not shard:
            with pytest.raises(DoesNotFit):
                plan_spread(run, TWO, [None, None], log=print)
            return
        found = plan_spread(run, TWO, [None, None], log=print)
        assert found.shard == shard
        assert why in found.reason
        assert found.keys.get("shard", "none") == shard
        assert found.fallback is not None
        assert found.fallback.predicted_peak_bytes is not None


LARGE = {"n_embd": 512, "n_head": 8, "n_layer": 4, "max_iters": 2, "compile": False, "eval_iters": 1}


@pytest.mark.slow
class TestRuns:
    def run(self, out_dir: Path, data_dir: Path, program: list[str], **keys: object) -> Done:
        return ended(torchrun(2, [*program, *arguments(out_dir, data_dir, **{"shard": "auto"} | keys)]))

    def test_two_processes_choose_as_planned(self, tmp_path: Path, data_dir: Path) -> None:
        done = self.run(tmp_path / "two", data_dir, ["-m", "tightfit"], **LARGE, memory="600MiB")
        assert done.code == 0, done.err
        assert "none does not fit (at least 192" in done.out
        rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
        (chosen,) = [row for row in rows if row.get("event") == "sharding"]
        assert chosen["shard"] in ("optimizer", "full")
        assert f"shard: {chosen['shard']}. {chosen['reason']}" in done.out
        assert here(arguments(tmp_path / "one", data_dir, **LARGE)).code == 0
        assert_close(tmp_path / "one", tmp_path / "two")
        predicted = next(row["predicted_peak_bytes"] for row in rows if row.get("event") == "plan")
        assert predicted == pytest.approx(max(row.get("memory_peak_bytes", 0) for row in rows), rel=0.03)

    def test_where_nothing_fits_all_end(self, tmp_path: Path, data_dir: Path) -> None:
        done = self.run(tmp_path / "two", data_dir, ["-m", "tightfit"], **LARGE, memory="450MiB")
        assert done.code != 0
        assert done.err.count("NOTHING FITS that leaves the result as it is") == 2

    def test_a_bug_in_the_plan_ends_all(self, tmp_path: Path, data_dir: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(
            textwrap.dedent("""\
            import sys
            from tightfit.cli.main import main
            from tightfit.planner import fit_cards

            def broken(*_, **__):
                raise ValueError("a bug")

            fit_cards.plan_spread = broken
            sys.exit(main())
            """)
        )
        done = self.run(tmp_path / "two", data_dir, [str(program)])
        assert done.code != 0
        assert "a bug" in done.err
