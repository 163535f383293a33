"""Plans for several cards: what is played, what is read off lines, and the fastest sharding that fits."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from runs import here

import tightfit
from tightfit.config import Resolved, TrainConfig, read_config
from tightfit.errors import ConfigError
from tightfit.gpus import resolve_gpu
from tightfit.kernels.launch import Kernel
from tightfit.links import linked_cards
from tightfit.models.shape import parameter_count
from tightfit.planner.candidates import Relief
from tightfit.planner.layers import PLAYED_LAYERS, extended, may_extend, with_layers
from tightfit.planner.plan_record import plan_record
from tightfit.planner.planning import (
    ALLOCATOR,
    EXPANDABLE,
    PlanResult,
    Where,
    make_plan,
    named_card,
    where_to_plan,
    with_cards,
)
from tightfit.planner.predict import Predictor, Target, staged_for
from tightfit.planner.search import least_bytes
from tightfit.planner.shardings import in_order, open_shardings
from tightfit.planner.smallest import smallest_set
from tightfit.simulation.client import Simulator
from tightfit.simulation.dry_run import script_request
from tightfit.simulation.requests import HostRates, StepTrace
from tightfit.simulation.speed import KernelCount, Work, rates_of, step_time
from tightfit.units import MIB
from tightfit.vgpu.records import Settings

TINY = ("--n_layer=2", "--n_head=2", "--n_embd=128", "--block_size=128", "--vocab_size=512", "--compile=False")
pytestmark = pytest.mark.usefixtures("own_cache")
FOUR = linked_cards(resolve_gpu("RTX 3060 12GB")[0], nodes=1, per_node=4)
NOTHING = Relief(name="", keys={})


def resolved(*arguments: str) -> Resolved[TrainConfig]:
    return read_config(TrainConfig, [*TINY, *arguments])


def plan_of(*arguments: str, gpu: str) -> PlanResult:
    asked = resolved(*arguments)
    return make_plan(asked, where_to_plan(asked.config, gpu))


def trace(layers: int, **changes: Any) -> StepTrace:
    """Trace of a made-up model: 100 bytes of its own, and 10 for each block."""
    kernels = (
        KernelCount(kernel=Kernel(5, 50, "bfloat16"), count=3 * layers),
        KernelCount(kernel=Kernel(0, 7 + 4 * layers, "float32"), count=1),
        KernelCount(kernel=Kernel(0, 9, "float32"), count=2),
    )
    own = StepTrace(
        requested_bytes=100 + 10 * layers,
        allocated_bytes=100 + 10 * layers,
        reserved_bytes=128 + 12 * layers,
        phase="loss",
        categories={"parameters": 10 * layers, "logits": 100},
        phases={"loss": 100 + 10 * layers, "backward": 60 + 15 * layers},
        not_modelled=(),
        parameters=5 + 2 * layers,
        pass_kernels=kernels,
        update_kernels=(),
    )
    return msgspec.structs.replace(own, **changes)


class TestLayers:
    def test_everything_lies_on_a_line_and_the_peak_may_move(self) -> None:
        found = extended([trace(each) for each in PLAYED_LAYERS], 32)
        assert found.phases == {"loss": 420, "backward": 540}
        assert (found.allocated_bytes, found.phase) == (540, "backward")
        assert found.reserved_bytes == 540 + 28 + 2 * max(PLAYED_LAYERS)  # a line would give 512
        assert found.parameters == 69
        assert found.categories == {"parameters": 320, "logits": 100}

    def test_kernels_of_blocks_are_more_and_those_of_all_parameters_larger(self) -> None:
        found = extended([trace(each) for each in PLAYED_LAYERS], 32)
        counts = {(each.kernel.nbytes, each.kernel.dtype): each.count for each in found.pass_kernels}
        assert counts == {(50, "bfloat16"): 96, (7 + 4 * 32, "float32"): 1, (9, "float32"): 2}

    def test_only_equal_parts_of_deep_models(self) -> None:
        deep = replace(resolved().config, n_layer=32)
        assert [may_extend(replace(deep, activation_checkpointing=n)) for n in (0, 8, 16, 32)] == [1, 0, 1, 1]
        assert not may_extend(resolved().config)
        half = with_layers(replace(deep, activation_checkpointing=16), 6)
        assert (half.n_layer, half.activation_checkpointing) == (6, 3)

    @pytest.mark.slow
    @pytest.mark.parametrize("shard", ["full", "optimizer"])
    def test_a_play_of_all_blocks_takes_what_the_line_says(self, shard: str) -> None:
        config = replace(resolved().config, n_layer=18, shard=shard, micro_batch=2, batch_size=8, device="cuda")
        where = with_cards(named_card("RTX 3060 12GB"), 1, 4)
        target = Target(gpu=where.gpu, known=True, share=4, environ={ALLOCATOR: EXPANDABLE}, cards=where.cards)
        with Simulator() as simulator:
            predictor = Predictor(config, target, simulator)
            plan = make_least(config)
            played, line = simulator.play([predictor._request(plan, True)])[0], predictor.predict([plan])[0]
        assert isinstance(played, StepTrace)
        assert line.allocated_bytes == pytest.approx(played.allocated_bytes, rel=0.002)
        # so small a model is rounded up: a segment grows by 2 MiB
        assert line.peak_bytes == pytest.approx(played.reserved_bytes, abs=8 * MIB)
        assert line.parameters == played.parameters
        for kind, found, counts in (
            ("pass", line.pass_work, played.pass_kernels),
            ("update", line.update_work, played.update_kernels),
        ):
            rates = target.rates(compiled=False)
            assert found.seconds(rates) == pytest.approx(Work.of(counts).seconds(rates), rel=0.02), kind


def make_least(config: TrainConfig) -> Any:
    from tightfit.planner.candidates import Plan

    return Plan(
        micro_batch=2, eval_micro_batch=2, loss="full", activation_checkpointing=0, compile=False, shard=config.shard
    )


class TestTime:
    RATES = replace(rates_of(resolve_gpu("RTX 3060 12GB")[0], compiled=False, cards=FOUR), host_s=0.0, launch_s=0.0)

    def work(self, *kernels: Kernel) -> Work:
        return Work.of([KernelCount(kernel=each, count=1) for each in kernels])

    def test_a_sum_after_backward_is_waited_for(self) -> None:
        compute, summed = Kernel(10**12, 0, "bfloat16"), Kernel(0, 10**8, "float32", exchange="all_reduce", ranks=4)
        time = step_time(self.work(compute), self.work(summed), self.RATES, overlaps=False)
        assert time.update_s == pytest.approx(self.RATES.seconds(summed))
        assert time.waiting_s == time.update_s

    def test_backward_hides_a_sum_but_for_its_end(self) -> None:
        compute, part = Kernel(10**13, 0, "bfloat16"), Kernel(0, 10**7, "float32", exchange="all_reduce", ranks=4)
        summed = Work.of([KernelCount(kernel=part, count=10)])
        time = step_time(self.work(compute), summed, self.RATES)
        assert time.pass_s == pytest.approx(self.RATES.seconds(compute))
        assert time.waiting_s == pytest.approx(self.RATES.seconds(part))

    def test_more_than_the_computation_hides_is_waited_for(self) -> None:
        compute, part = Kernel(10**9, 0, "bfloat16"), Kernel(0, 10**9, "bfloat16", exchange="all_gather", ranks=4)
        time = step_time(self.work(compute), self.work(), self.RATES)
        gathered = Work.of([KernelCount(kernel=part, count=4)])
        longer = step_time(gathered, self.work(), self.RATES)
        assert time.waiting_s == 0.0
        assert longer.pass_s == pytest.approx(5 * self.RATES.seconds(part))  # the first one hides nothing, either


class TestShardings:
    def test_which_are_compared(self) -> None:
        nodes = replace(FOUR, nodes=2, per_node=2)
        assert open_shardings(resolved(), FOUR) == ["none", "optimizer", "full"]
        assert open_shardings(resolved("--shard=auto"), nodes) == ["none", "optimizer", "hybrid", "full"]
        assert open_shardings(resolved("--shard=none"), FOUR) == ["none"]
        assert open_shardings(resolved("--shard=full"), FOUR) == ["full"]
        assert open_shardings(resolved("--offload=activations"), FOUR) == ["none"]

    def test_least_bytes(self) -> None:
        config = resolved().config
        count = parameter_count(config)
        found = [
            least_bytes(replace(config, shard=shard), NOTHING, cards=FOUR) for shard in ("none", "optimizer", "full")
        ]
        assert found == [16 * count, 4 * count + 2 * count, 4 * count]
        apart = replace(FOUR, nodes=2, per_node=2)
        assert least_bytes(replace(config, shard="hybrid"), NOTHING, cards=apart) == 8 * count


class TestRefusals:
    def test_more_cards_than_sequences(self) -> None:
        with pytest.raises(ConfigError, match="8 processes"):
            plan_of("--batch_size=2", "--gradient_accumulation_steps=1", gpu="8x T4")

    def test_sharding_on_one_card(self) -> None:
        with pytest.raises(ConfigError, match="shard=full spreads a model over several cards; name how many"):
            plan_of("--shard=full", gpu="T4")

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--gpu=2x T4", "--cards=2"], "--gpu='2x T4' already names how many cards"),
            (["--gpu=T4", "--cards=some"], "cards must be a number such as 4"),
            (["--gpu=T4", "--link=PCIe 3.0 x8"], "--link and --network are for several cards"),
            (["--gpu=2x T4", "--link=string"], "'string' is not a known link"),
            (["--all-gpus", "--cards=2"], "--cards"),
        ],
    )
    def test_on_the_command_line(self, words: list[str], said: str) -> None:
        done = here(["plan", *TINY, *words])
        assert done.code == 2
        assert said in done.err
        assert "Traceback" not in done.err

    @pytest.mark.parametrize("words", [["--cards=.."], ["--link=PCIe 3.0 x8"]])
    def test_it_is_told_before_anything_is_measured(self, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tightfit.planner.planning.where_to_plan", lambda *given, **named: pytest.fail("measured"))
        done = here(["plan", *words])
        assert (done.code, done.err.count("\n")) == (2, 1)


class TestDryrun:
    SCRIPT = Path(__file__).parent / "scripts" / "several_cards.py"

    def test_a_count_beside_a_launcher_is_refused(self) -> None:
        done = here(["dryrun", "--gpu=4x T4", "--", "torchrun", "--nproc_per_node=4", str(self.SCRIPT), "ddp"])
        assert done.code == 2
        assert "torchrun says by itself how many processes there are; name the card 'T4' instead of '4x T4'" in done.err

    def test_it_is_the_same_from_python_and_in_every_question(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "3")
        request = script_request(self.SCRIPT, ["fsdp"], Settings(gpu="2x4x A100 80GB", rank=7))
        assert request.settings.gpu == "A100 80GB"
        assert (request.environ["WORLD_SIZE"], request.environ["LOCAL_WORLD_SIZE"]) == ("8", "4")
        assert os.environ["WORLD_SIZE"] == "3"
        with pytest.raises(ConfigError, match="name the card 'T4' instead of '4x T4'"):
            tightfit.dryrun("torchrun", "--nproc_per_node=4", self.SCRIPT, gpu="4x T4")

    @pytest.mark.slow
    def test_a_count_makes_the_script_one_of_several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        done = here(["dryrun", "--json", "--no-explain", "--gpu=4x A100", str(self.SCRIPT), "fsdp"])
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert "memory that NCCL takes for its buffers, outside PyTorch's allocator" in found["not_modelled"]
        assert "WORLD_SIZE" not in os.environ


@pytest.mark.slow
class TestPlan:
    SMALL = ("--batch_size=8", "--gradient_accumulation_steps=2")

    def test_each_sharding_is_compared_and_the_fastest_named(self) -> None:
        result = plan_of(*self.SMALL, gpu="4x RTX 3060 12GB")
        best = result.choice.best
        assert best is not None
        assert result.choice.share == 4
        fitting = [each for each in result.shardings if each.is_traced and each.step_s is not None]
        assert best.step_s(4) == min(each.step_s for each in fitting if each.step_s is not None)
        record = plan_record(result)
        assert record.cards is not None
        assert [each.shard for each in record.cards.shardings] == ["none", "optimizer", "full"]
        assert record.cards.launch == "torchrun --nproc_per_node=4 -m tightfit train"
        assert record.budget.nccl_bytes > 0
        assert record.cards.phases.keys() >= {"eval", "forward", "backward", "optimizer", "save"}
        assert record.cards.phases["save"] < record.cards.phases["backward"]

    def test_more_cards_never_need_more_of_each(self) -> None:
        peaks = []
        for count in (2, 4, 8):
            best = plan_of(*self.SMALL, "--shard=full", "--micro_batch=1", gpu=f"{count}x T4").choice.best
            assert best is not None
            peaks.append(best.allocated_bytes)
        assert peaks == sorted(peaks, reverse=True)

    def test_the_smallest_number_of_cards(self) -> None:
        model = ("--n_layer=3", "--n_embd=2048", "--n_head=16", "--block_size=128", "--vocab_size=512")
        words = ["plan", "--json", *model, "--compile=False", "--batch_size=8", "--gradient_accumulation_steps=1"]
        done = here([*words, "--gpu=T4", "--memory=2GiB", "--cards=auto"])
        assert done.code == 0, done.err
        cards = json.loads(done.out)["cards"]
        few = here([*words, f"--gpu={cards['per_node'] - 1}x T4", "--memory=2GiB", "--shard=full"])
        assert few.code == 1


HOST = HostRates(flops={"float32": 1e9, "bfloat16": 1e9}, bandwidth=1e9, base_bytes={})


class TestStaging:
    """The copy of weights and moments that `async_save` makes: 12 bytes a parameter."""

    def test_of_each_process(self) -> None:
        config = replace(resolved("--async_save=True").config)
        count, apart = parameter_count(config), replace(FOUR, nodes=2, per_node=2)
        found = [staged_for(replace(config, shard=shard), apart) for shard in ("none", "optimizer", "hybrid", "full")]
        assert found == [12 * count, 3 * count, 6 * count, 3 * count]
        assert staged_for(replace(config, async_save=False), apart) == 0

    def test_on_the_host_it_is_part_of_the_peak(self) -> None:
        words = ("--batch_size=2", "--gradient_accumulation_steps=1", "--micro_batch=1", "--device=cpu", "--loss=full")
        peaks = []
        for own in ((), ("--async_save=True",)):
            config = resolved(*words, *own).config
            target = Target(gpu=None, known=True, share=2, host=HOST)
            with Simulator() as simulator:
                predictor = Predictor(config, target, simulator)
                peaks.append(predictor._prediction(make_least(config), trace(2)).peak_bytes)
        assert peaks[1] - peaks[0] == 12 * parameter_count(config)


def test_the_smallest_number_of_processors_is_no_question() -> None:
    here_alone = Where(gpu=None, budget=named_card("T4").budget)
    with pytest.raises(ConfigError, match="several cards need a card: name one with --gpu"):
        smallest_set(read_config(TrainConfig, []), here_alone)


def test_explain_takes_a_number_of_cards() -> None:
    found = tightfit.explain("CUDA out of memory. Tried to allocate 2.00 GiB", gpu="4x RTX 3060 12GB")
    assert found.facts is not None
    with pytest.raises(tightfit.TightfitError, match="'RTX 9999' is not in the table"):
        tightfit.explain("CUDA out of memory. Tried to allocate 2.00 GiB", gpu="4x RTX 9999")


def test_of_shardings_that_promise_nearly_the_same_the_least_exchange_comes_first() -> None:
    promised: Any = [(1.01, "none", None), (1.00, "optimizer", None), (1.20, "hybrid", None), (1.05, "full", None)]
    assert [name for _, name, _ in in_order(promised)] == ["none", "optimizer", "full", "hybrid"]
