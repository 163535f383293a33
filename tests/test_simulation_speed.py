"""The model of speed: each rate by hand once, and what a card's kernels take on another."""

from collections import Counter
from dataclasses import replace

import msgspec
import pytest
import torch

from tightfit.config import TrainConfig, read_config
from tightfit.gpus import GPU, all_gpus, resolve_gpu
from tightfit.kernels.cost import kernel_of
from tightfit.kernels.launch import Kernel
from tightfit.planner import survey as every
from tightfit.planner.budget import device_budget
from tightfit.planner.planning import make_plan, named_card
from tightfit.planner.survey import CardRow, every_card
from tightfit.simulation import processor
from tightfit.simulation.speed import LAUNCH_S, KernelCount, Rates, Work, rates_of
from tightfit.units import MIB


def card(name: str) -> GPU:
    return resolve_gpu(name)[0]


def seconds(name: str, kernel: Kernel, *, compiled: bool = False) -> float:
    return rates_of(card(name), compiled=compiled).seconds(kernel) - LAUNCH_S


class TestRates:
    def test_a_matrix_product_of_a_geforce_that_nobody_measured(self) -> None:
        # 25.5 TFLOP/s at the rated clock, 1.06 of that for the real one, 0.9 of that in a model.
        assert seconds("RTX 3060 12GB", Kernel(10**12, 0, "bfloat16")) == pytest.approx(1 / (25.5 * 1.06 * 0.9))

    def test_fused_attention_takes_the_time_of_its_products_and_of_its_exponentials(self) -> None:
        products, rest = 1 / (25.5 * 1.06 * 0.9), 1 / (6.3 * 12.74)
        kernel = Kernel(10**12, 0, "bfloat16", is_attention=True)
        assert seconds("RTX 3060 12GB", kernel) == pytest.approx(products + rest)

    def test_an_a5000_attends_about_as_fast_as_it_was_measured(self) -> None:
        # 56.5 TFLOP/s against 66.9; 16 x 1024 tokens, heads of 64, forward and backward: https://github.com/gpu-mode/ring-attention/issues/10.
        rate = 1 / seconds("RTX A5000", Kernel(10**12, 0, "float16", is_attention=True))
        assert rate == pytest.approx(66.9, rel=0.2)  # the card of the measurement was not measured in products

    def test_what_has_room_in_the_cache_moves_faster(self) -> None:
        mib = 2**20
        inside, beyond = (seconds("RTX 4070", Kernel(0, size * mib, "float32")) / size for size in (36, 37))
        assert beyond == pytest.approx(mib / (504e9 * 0.66))
        assert beyond / inside == pytest.approx(2.5)
        assert seconds("RTX 3060 12GB", Kernel(0, 36 * mib, "float32")) == pytest.approx(36 * mib / (360e9 * 0.66))

    def test_a_measurement_that_cannot_be_of_this_card_is_not_used(self) -> None:
        throttled = card("RTX 3080 12GB")
        assert throttled.measured_bf16_tflops == 24.94, "the table still has it"
        assert rates_of(throttled, compiled=True).matmul["bfloat16"] == pytest.approx(61.3e12 * 1.06 * 0.9)

    @pytest.mark.parametrize(("name", "tflops"), [("Tesla T4", 2.46 * 0.9), ("RTX 2060", 6.45 * 0.57 * 0.9)])
    def test_bfloat16_where_it_is_emulated_is_slow(self, name: str, tflops: float) -> None:
        found = rates_of(resolve_gpu(name)[0], compiled=False)
        assert found.matmul["bfloat16"] == pytest.approx(tflops * 1e12)
        assert found.matmul["float16"] > 5 * found.matmul["bfloat16"]

    def test_no_card_of_the_table_is_without_a_rate(self) -> None:
        for gpu in all_gpus():
            rates = rates_of(gpu, compiled=True)
            assert rates.bandwidth > 50e9, gpu.name
            assert all(0 < rates.attention[dtype] < rates.matmul[dtype] for dtype in rates.matmul), gpu.name


def test_a_described_card_has_the_units_of_its_generation() -> None:
    turing, pascal = (resolve_gpu("mine", memory_bytes=8 << 30, capability=each)[0] for each in ((7, 5), (6, 1)))
    assert rates_of(turing, compiled=False).matmul["float16"] == pytest.approx(25e12 * 0.75)
    assert rates_of(pascal, compiled=False).matmul["float16"] == pytest.approx(12.5e12 * 0.75)


@pytest.mark.slow
def test_a_plan_says_that_bfloat16_is_emulated(own_cache: None) -> None:
    words = ["--n_layer=1", "--n_head=1", "--n_embd=64", "--vocab_size=256", "--block_size=64", "--compile=False"]
    resolved = read_config(TrainConfig, [*words, "--dtype=bfloat16"])
    assert make_plan(resolved, named_card("Tesla T4")).notes[-1] == (
        "Tesla T4 only emulates dtype=bfloat16; with --dtype=float16 its matrix products are 17 times faster"
    )


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_causal_mask_spares_attention_half(is_causal: bool) -> None:
    operator = torch.ops.aten._scaled_dot_product_flash_attention.default
    query = torch.empty(2, 3, 256, 64, dtype=torch.bfloat16, device="meta")
    found = kernel_of(
        operator, (query, query, query, 0.0, is_causal), {}, operator(query, query, query, 0.0, is_causal)
    )
    assert found is not None
    assert found.is_attention
    assert found.flops == 2 * 3 * 4 * 256 * 256 * 64 // (2 if is_causal else 1)  # two products of 2 x 256 x 256 x 64


class TestWork:
    SMALL, LARGE = Kernel(1, 2, "float32"), Kernel(10**12, 5, "bfloat16", is_attention=True, place="device")

    def test_it_comes_back_from_json(self) -> None:
        work = Work(Counter({self.SMALL: 3, self.LARGE: 1}))
        written = msgspec.json.encode(work.counts())
        assert Work.of(msgspec.json.decode(written, type=tuple[KernelCount, ...])) == work
        assert work.launches == 4

    def test_what_two_passes_take_less_one_is_the_other(self) -> None:
        both, one = Work(Counter({self.SMALL: 6, self.LARGE: 1})), Work(Counter({self.SMALL: 3, self.LARGE: 1}))
        assert both - one == Work(Counter({self.SMALL: 3}))

    def test_many_small_kernels_wait_for_the_host(self) -> None:
        rates = Rates(matmul={"float32": 1e12}, attention={"float32": 1e12}, bandwidth=1e12, launch_s=1e-6, host_s=9e-6)
        assert Work(Counter({self.SMALL: 1000})).seconds(rates) == pytest.approx(9e-3)


class TestEveryCard:
    """A small model on four cards of three compute capabilities."""

    CARDS = ("Tesla T4", "GeForce RTX 3060 12GB", "GeForce RTX 3090", "NVIDIA A100-SXM4-40GB")
    MODEL = ("--n_layer=2", "--n_head=4", "--n_embd=256", "--vocab_size=8192", "--block_size=512", "--compile=False")
    MODEL += ("--batch_size=64", "--gradient_accumulation_steps=8", "--dtype=bfloat16")

    @pytest.fixture(autouse=True)
    def _four_cards(self, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(every, "all_gpus", lambda: tuple(card(name) for name in self.CARDS))

    def rows(self, *words: str) -> dict[str, CardRow]:
        found = every_card(read_config(TrainConfig, [*self.MODEL, *words]))
        return {row.gpu: row for row in found}

    @pytest.mark.slow
    def test_it_says_what_a_plan_for_a_card_says(self) -> None:
        rows = self.rows()
        assert set(rows) == set(self.CARDS)
        assert all(row.fits and not row.compile for row in rows.values())
        assert {name for name, row in rows.items() if row.emulates} == {"Tesla T4"}
        rates = [rows[name].tokens_per_s or 0 for name in self.CARDS]
        assert rates == sorted(rates), "each is a faster card"
        name = "GeForce RTX 3090"  # it has the kernels of the RTX 3060, and was not traced itself
        best = make_plan(read_config(TrainConfig, list(self.MODEL)), named_card(name)).choice.best
        assert best is not None
        assert rows[name].step_s == pytest.approx(best.step_s(512), rel=0.05)
        assert rows[name].micro_batch == pytest.approx(best.plan.micro_batch, rel=0.15)

    @pytest.mark.slow
    def test_a_step_of_few_sequences_is_not_promised_to_a_card_that_lacks_the_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(every, "all_gpus", lambda: (card("RTX 3060 12GB"),))
        monkeypatch.setattr(every, "device_budget", lambda gpu: replace(device_budget(gpu), total_bytes=600 * MIB))
        words = ("--batch_size=2", "--gradient_accumulation_steps=1", "--n_embd=1024", "--offload=none")
        (row,) = self.rows(*words).values()
        assert not row.fits
        assert row.needs_bytes > 600 * MIB

    @pytest.mark.slow
    def test_a_micro_batch_that_was_set_is_obeyed(self) -> None:
        free, fixed = (self.rows(*words)["NVIDIA A100-SXM4-40GB"] for words in ((), ("--micro_batch=2",)))
        assert fixed.micro_batch == 2
        assert (fixed.step_s or 0) > (free.step_s or 0)


@pytest.mark.parametrize(("seconds", "side"), [(0.5, 256), (0.001, 1024)])
def test_a_processor_that_is_slow_in_a_format_is_measured_with_small_products(
    monkeypatch: pytest.MonkeyPatch, seconds: float, side: int
) -> None:
    """Without instructions for bfloat16, four products of 1024 x 1024 took nine seconds."""
    monkeypatch.setattr(processor, "_best", lambda work: seconds)
    assert processor._flops(torch.bfloat16) == 2 * side**3 / seconds
