"""Questions about a script: the largest value, every card, variants side by side, and what is remembered."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from plays import simulator
from runs import here

from tightfit.allocator.caching import OutOfMemory
from tightfit.allocator.settings import AllocatorSettings
from tightfit.allocator.tape import TapedAllocator, replay
from tightfit.cli.cmd_dryrun import parser
from tightfit.config.knob import (
    Variant,
    accumulation_of,
    find_knob,
    is_batch,
    is_of_training,
    number_in_environment,
)
from tightfit.errors import ConfigError, TightfitError
from tightfit.gpus import all_gpus, context_bytes
from tightfit.questions.asking import Asked
from tightfit.questions.cards import every_card
from tightfit.questions.compare import Comparison, Side, compare, varied
from tightfit.questions.largest import Largest, Search, Trial, largest, unevenness
from tightfit.report.question_pages import compare_page, largest_page
from tightfit.simulation.details import Detail
from tightfit.units import GIB, MIB, format_bytes
from tightfit.vgpu.records import Settings, VirtualCard
from tightfit.wording.report import words

MODEL = """\
from torch import nn
LAYERS = 2
def build(width):
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(LAYERS)])
"""
TRAIN = """\
import argparse, os, torch
from model import build
parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--accumulation", type=int, default=3)
parser.add_argument("--width", type=int, default=1024)
parser.add_argument("--ignored", type=int, default=1)
args = parser.parse_args()
model = build(args.width).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(4):
    x = torch.randn(args.batch_size, 256, args.width, device="cuda")
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
ATTEND = """\
import torch
q = torch.randn(8, 8, 512, 64, device="cuda", dtype=torch.float16, requires_grad=True)
torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
"""
FRAGMENTS = """\
import os, torch
size = int(os.environ.get("BATCH", "4")) * 2**20
kept = []
for _ in range(3):
    large = torch.empty(20 * size, dtype=torch.uint8, device="cuda")
    del large
    kept.append(torch.empty(11 * size, dtype=torch.uint8, device="cuda"))
"""
CONVOLVE = """\
import os, torch
x = torch.randn(int(os.environ.get("BATCH", "32")), 3, 64, 64, device="cuda")
torch.nn.Conv2d(3, 64, 3).cuda()(x).sum().backward()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("script")
    (folder / "train.py").write_text(TRAIN)
    (folder / "model.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def asked(*words: str, memory: int = GIB) -> Asked:
    return Asked.of(simulator(), Settings(gpu="RTX 3060 12GB", memory_bytes=memory), ["train.py", *words])


class TestLargest:
    def test_its_neighbour_was_played_and_fails(self, folder: Path) -> None:
        found = largest(asked(), "batch_size", multiple=8)
        tried = {each.value: each.outcome for each in found.trials}
        assert found.largest is not None
        assert found.largest % 8 == 0
        assert (found.next_value, found.next_outcome) == (found.largest + 8, "out_of_memory")
        assert tried[found.largest] == "fits"
        assert tried[found.largest + 8] == "out_of_memory"
        assert found.effective_batch == found.largest * 3
        assert found.command == ["train.py", f"--batch-size={found.largest}"]
        assert found.plays == len(found.trials) <= 7

    @pytest.mark.parametrize(
        "needed",
        [
            lambda value: 50_000 * value + 10**6,
            lambda value: 50_000 * (value // 50 * 50),
            lambda value: 50_000 * value + 10**7 * (value * 7919 % 97) // 97,
            lambda value: 3 * value**2 + 20_000 * value,
            lambda value: 16 * value**2 // (20 * MIB) * 20 * MIB + MIB,
        ],
        ids=["line", "steps", "noise", "square", "segments"],
    )
    def test_whatever_memory_follows_few_plays_are_made(self, folder: Path, needed: Callable[[int], int]) -> None:
        (one,) = asked().play([asked().request()])

        def at(value: int) -> Detail:
            nbytes = needed(value)
            peak = replace(one.findings.peak, device_bytes=nbytes, allocated_bytes=96 * nbytes // 100)
            outcome = "fits" if nbytes <= one.findings.gpu.total_bytes else "out_of_memory"
            return replace(one, findings=replace(one.findings, outcome=outcome, peak=peak, phases={"forward": nbytes}))

        search = Search("train.py", "rows", lambda values: list(map(at, values)), 1)
        fits, fails = search.run(1024)
        assert fails == fits + 1
        assert (at(fits).findings.outcome, at(fails).findings.outcome) == ("fits", "out_of_memory")
        assert len(search.tried) <= 30

    def test_asked_again_nothing_is_played_until_an_import_changes(self, folder: Path) -> None:
        largest(asked(), "batch_size", multiple=8)
        assert largest(asked(), "batch_size", multiple=8).plays == 0
        (folder / "model.py").write_text(MODEL.replace("LAYERS = 2", "LAYERS = 2  # as before"))
        played = simulator().played
        asked().play([asked().request()])
        assert simulator().played == played + 1
        (folder / "model.py").write_text(MODEL)

    def test_a_value_without_effect_is_a_mistake(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="does not depend on --ignored: 8 and"):
            largest(asked("--width=64"), "ignored", multiple=8)
        with pytest.raises(ConfigError, match=r"does not run with --rows=8: .* own options are --batch-size, --acc"):
            largest(asked("--width=64"), "rows", multiple=8)

    @pytest.mark.parametrize(("period", "rest"), [(2, 0), (7, 5), (16, 15)])
    def test_no_larger_value_that_was_played_fits(self, folder: Path, period: int, rest: int) -> None:
        """Blocks of the cache may let a larger value take less, such as every second one."""
        (one,) = asked().play([asked().request()])

        def at(value: int) -> Detail:
            nbytes = 50_000 * value + (0 if value % period == rest else 60 * MIB)
            peak = replace(one.findings.peak, device_bytes=nbytes, allocated_bytes=50_000 * value)
            outcome = "fits" if nbytes <= one.findings.gpu.total_bytes else "out_of_memory"
            return replace(one, findings=replace(one.findings, outcome=outcome, peak=peak, phases={"forward": nbytes}))

        search = Search("train.py", "rows", lambda values: list(map(at, values)), 1)
        fits, fails = search.run(1024)
        assert fails == fits + 1
        assert fits == max(value for value, each in search.tried.items() if each.findings.outcome == "fits")
        assert search.tried[fails].findings.outcome == "out_of_memory"

    def test_fragments_of_the_cache_are_explained_and_the_setting_is_played(self, folder: Path) -> None:
        """Three segments of 20 BATCH MiB, each of which an 11 BATCH MiB tensor keeps from the next request."""
        (folder / "fragments.py").write_text(FRAGMENTS)
        settings = Settings(gpu="RTX 3060 12GB", memory_bytes=1000 * MIB, context_bytes=30 * MIB)
        found = largest(Asked.of(simulator(), settings, ["fragments.py"]), "BATCH")
        assert (found.largest, found.next_value) == (970 // 60, 970 // 60 + 1)
        failing = next(each for each in found.trials if each.value == 17)
        assert (failing.allocated_bytes, failing.reserved_bytes) == (2 * 11 * 17 * MIB, 2 * 20 * 17 * MIB)
        assert found.expandable is not None
        assert (found.expandable.value, found.expandable.outcome) == (17, "fits")
        remarks = points(found)
        assert any("306.00 MiB are free blocks of its cache" in each for each in remarks)
        assert any("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in each and "fits" in each for each in remarks)
        own = Asked.of(simulator(), settings, ["fragments.py"], {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
        assert largest(own, "BATCH").expandable is None

    def test_convolutions_leave_the_workspaces_of_cudnn_out(self, folder: Path) -> None:
        (folder / "convolve.py").write_text(CONVOLVE)
        settings = Settings(gpu="RTX 3060 12GB", memory_bytes=GIB)
        found = largest(Asked.of(simulator(), settings, ["convolve.py"]), "BATCH", multiple=32)
        assert any("cuDNN's workspaces for convolutions" in each for each in points(found))
        assert not any("cuDNN" in each for each in points(largest(asked(), "batch_size", multiple=8)))


def trial(value: int, outcome: str = "fits", *, reserved: int, allocated: int) -> Trial:
    nbytes = {"device_bytes": reserved * MIB, "allocated_bytes": allocated * MIB, "reserved_bytes": reserved * MIB}
    return Trial(value=value, outcome=outcome, reason="", **nbytes)


def points(found: Largest) -> list[str]:
    return [point for section in largest_page(found, words("en")).sections for point in section.points]


class TestUnevenness:
    """Whether the answer may claim that smaller values fit, from what was played."""

    def found(self, *trials: Trial) -> tuple[str, list[str]]:
        (one,) = asked().play([asked().request()])
        card = one.findings.gpu
        fits = max(each.value for each in trials if each.outcome == "fits")
        after = next(each for each in trials if each.value > fits)
        record = Largest(
            name="bs",
            place="argument",
            file="",
            gpu=card,
            largest=fits,
            next_value=after.value,
            next_outcome=after.outcome,
            multiple=1,
            device_bytes=900 * MIB,
            free_bytes=124 * MIB,
            unevenness=unevenness(trials, fits, 124 * MIB),
            expandable=None,
            effective_batch=None,
            accumulation=None,
            processes=1,
            command=[],
            trials=list(trials),
            not_modelled=[],
            plays=3,
            seconds=1.0,
        )
        return largest_page(record, words("en")).verdict, points(record)

    def test_memory_that_grows_with_the_value(self, folder: Path) -> None:
        small, large = trial(32, reserved=500, allocated=480), trial(60, reserved=900, allocated=870)
        after = trial(61, "out_of_memory", reserved=910, allocated=885)
        verdict, remarks = self.found(small, large, after)
        assert verdict.startswith("LARGEST bs THAT FITS")
        assert not remarks

    def test_a_smaller_value_that_takes_more(self, folder: Path) -> None:
        small, large = trial(59, reserved=940, allocated=800), trial(60, reserved=900, allocated=870)
        verdict, remarks = self.found(small, large, trial(61, "out_of_memory", reserved=910, allocated=885))
        assert verdict.startswith("bs=60 FITS on ")
        assert verdict.endswith(", and 61 does not")
        assert "59 takes 940.00 MiB, and 60 takes 900.00 MiB, because the allocator's cache" in remarks[0]
        small = trial(59, reserved=940, allocated=920)  # its tensors take more, so the cache is not the reason
        _, remarks = self.found(small, large, trial(61, "out_of_memory", reserved=910, allocated=885))
        assert "60 takes 900.00 MiB. A smaller value" in remarks[0]

    def test_a_smaller_value_that_fails(self, folder: Path) -> None:
        small = trial(59, "out_of_memory", reserved=910, allocated=870)
        after = trial(61, "out_of_memory", reserved=910, allocated=885)
        verdict, remarks = self.found(small, trial(60, reserved=900, allocated=870), after)
        assert verdict.startswith("bs=60 FITS on ")
        assert "59 does not fit, and 60 does" in remarks[0]

    def test_a_margin_below_what_the_cache_differs_by(self, folder: Path) -> None:
        small, large = trial(32, reserved=500, allocated=480), trial(60, reserved=900, allocated=870)
        _, remarks = self.found(small, large, trial(61, "out_of_memory", reserved=900, allocated=740))
        assert "30.00 MiB with bs=60 and 160.00 MiB with 61" in remarks[0]
        larger = trial(120, "out_of_memory", reserved=900, allocated=740)  # twice the value, so twice the cache
        assert not self.found(small, large, larger)[1]


class TestCards:
    def test_a_replay_equals_a_play_of_its_own(self, folder: Path) -> None:
        cards = [gpu for gpu in all_gpus() if gpu.name in ("GeForce RTX 3050 6GB", "GeForce RTX 3060 12GB")]
        question = Asked.of(simulator(), Settings(gpu=""), ["train.py", "--batch-size=1100"])
        found = every_card(question, cards)
        assert [row.fits for row in found.rows] == [False, True]
        assert all(row.replayed for row in found.rows)
        small, large = found.rows
        assert small.failure is not None
        settings = Settings(gpu="RTX 3050 6GB")
        (own,) = question.play([question.request(settings=settings)])
        failure = own.findings.failure
        assert failure is not None
        assert (small.failure.line, small.failure.phase) == (failure.line, failure.phase)
        assert (small.failure.requested_bytes, small.failure.free_bytes) == (failure.tensor_bytes, failure.free_bytes)
        assert large.free_bytes == large.total_bytes - large.device_bytes > 0

    def test_one_play_serves_cards_that_answer_alike(self, folder: Path) -> None:
        (folder / "attend.py").write_text(ATTEND)
        names = ("GeForce RTX 3060 12GB", "GeForce RTX 4090", "Tesla T4", "NVIDIA B200")
        cards = [gpu for gpu in all_gpus() if gpu.name in names]
        question = Asked.of(simulator(), Settings(gpu=""), ["attend.py"])
        found = every_card(question, cards)
        assert found.plays == 3, "flash attention on two, none on the T4, and another one on the B200"
        for row in found.rows:
            (own,) = question.play([question.request(settings=Settings(gpu=row.name))])
            assert row.device_bytes == own.findings.needed_bytes, row.name

        again = every_card(question, cards)
        assert (again.rows, again.plays) == (found.rows, 0)

    def test_a_script_that_asks_for_the_capability_is_played_for_each(self, folder: Path) -> None:
        ask = "import torch; torch.empty(2**20 * torch.cuda.get_device_capability()[1], device='cuda')"
        (folder / "ask.py").write_text(ask)
        cards = [gpu for gpu in all_gpus() if gpu.name in ("GeForce RTX 3060 12GB", "GeForce RTX 4090")]
        found = every_card(Asked.of(simulator(), Settings(gpu=""), ["ask.py"]), cards)
        context = {gpu.name: context_bytes(gpu)[0] for gpu in cards}
        taken = {row.name: row.device_bytes - context[row.name] for row in found.rows}
        assert taken == {"GeForce RTX 3060 12GB": 6 * 4 * MIB, "GeForce RTX 4090": 9 * 4 * MIB}

    def test_a_comparison_of_the_capability_takes_one_play_for_each_result(self, folder: Path) -> None:
        compare = "import torch\nif torch.cuda.get_device_capability() >= (8, 0): torch.empty(2**23, device='cuda')"
        (folder / "compare.py").write_text(compare)
        names = ("NVIDIA TITAN RTX", "Tesla T4", "GeForce RTX 3060 12GB", "GeForce RTX 4090", "NVIDIA B200")
        cards = [gpu for gpu in all_gpus() if gpu.name in names]
        found = every_card(Asked.of(simulator(), Settings(gpu=""), ["compare.py"]), cards)
        assert found.plays == 2
        context = {gpu.name: context_bytes(gpu)[0] for gpu in cards}
        taken = {row.name: row.device_bytes - context[row.name] for row in found.rows}
        assert taken == {gpu.name: 32 * MIB if gpu.capability >= (8, 0) else 0 for gpu in cards}

    def test_an_error_that_no_card_decides_on_is_played_on_few(self, folder: Path) -> None:
        (folder / "fail.py").write_text("import torch\ntorch.empty(9 * 2**30, device='cuda')\nimport not_there")
        found = every_card(Asked.of(simulator(), Settings(gpu=""), ["fail.py"]))
        assert found.plays <= 4, "at most two, again with what may have changed"
        small, large = found.rows[0], found.rows[-1]
        assert small.total_bytes < 9 * 2**30 < large.total_bytes
        assert small.failure is not None
        assert small.error is None
        assert large.failure is None
        assert "not_there" in (large.error or "")
        assert not any(row.fits for row in found.rows)


class TestCompare:
    def test_categories_and_lines_that_differ(self, folder: Path) -> None:
        found = compare(asked("--width=256"), ["--batch-size 8", "--batch-size=64"])
        small, large = found.sides
        assert small.device_bytes < large.device_bytes
        assert small.step is not None
        assert large.step is not None
        assert small.step.seconds <= large.step.seconds
        categories = {row.category: row.bytes for row in found.categories}
        assert categories["parameters"][0] == categories["parameters"][1] == 2 * (256 * 256 + 256) * 4
        assert categories["activations"][0] < categories["activations"][1]
        text = (folder / "train.py").read_text().splitlines()
        assert "model(x)" in text[found.lines[0].line - 1]
        places = [(row.file, row.line) for row in found.lines]
        assert len(set(places)) == len(places), "one row for a line"

    def test_variants_that_print_the_same_peak_are_called_equal(self) -> None:
        card = VirtualCard(
            name="RTX 3060", capability="8.6", total_bytes=12 * GIB, used_by_others_bytes=0, context_bytes=0
        )
        sides = [
            Side(
                change=f"--workers={extra}",
                outcome="fits",
                device_bytes=GIB + extra,
                free_bytes=11 * GIB,
                phase="eval",
                reason="",
                step=None,
            )
            for extra in (512, 0)
        ]
        found = Comparison(
            script="train.py",
            gpu=card,
            sides=sides,
            categories=[],
            lines=[],
            other_bytes=[GIB, GIB],
            not_modelled=[],
            plays=2,
            seconds=1.0,
        )
        assert compare_page(found, words("en")).verdict.startswith("ALL VARIANTS NEED THE SAME")

    def test_a_variant_that_fails_does_not_need_least(self, folder: Path) -> None:
        """It fails at its first large request, before it has taken what it needs."""
        both = compare(asked("--width=256", memory=4 * GIB), ["--batch-size=8", "--batch-size=64"])
        less = both.sides[1].device_bytes - both.sides[0].device_bytes
        verdict = compare_page(both, words("en")).verdict
        assert verdict.startswith("--batch-size=8 NEEDS LEAST on ")
        assert verdict.endswith(f", which is {format_bytes(less)} less than --batch-size=64")
        one = compare(asked("--width=256"), ["--batch-size=8", "--batch-size=9000"])
        page = compare_page(one, words("en"))
        assert page.verdict.startswith("ONLY --batch-size=8 FITS on ")
        peaks = page.sections[0].tables[0].rows[1]
        assert peaks[1:] == [
            format_bytes(one.sides[0].device_bytes),
            f"at least {format_bytes(one.sides[1].device_bytes)}",
        ]
        none = compare(asked("--width=256"), ["--batch-size=4000", "--batch-size=9000"])
        assert compare_page(none, words("en")).verdict.startswith("NO VARIANT FITS on ")

    def test_lines_that_differ_are_shown_with_their_source(self, folder: Path) -> None:
        found = compare(asked("--width=256"), ["--batch-size 8", "--batch-size=64"])
        (table,) = compare_page(found, words("en")).sections[2].tables
        assert table.rows[0][0].splitlines()[1].strip() == "model(x).square().mean().backward()"

    def test_asked_again_it_is_played_once_a_file_is_another(self, folder: Path) -> None:
        (folder / "part.py").write_text("SIZE = 4\n")
        (folder / "rows").mkdir()
        (folder / "uses.py").write_text(
            "import os, sys, torch\n"
            "from part import SIZE\n"
            "torch.save(SIZE, 'saved.pt')\n"
            "rows = torch.load('saved.pt') * (1 + len(os.listdir('rows')))\n"
            "kept = torch.ones(rows * int(sys.argv[1]), 1 << 20, device='cuda')\n"
        )
        question = Asked.of(simulator(), Settings(gpu="RTX 3060 12GB"), ["uses.py", "1"])

        def ask() -> tuple[int, int]:
            found = compare(question, ["", "2"])
            return found.plays, found.categories[0].bytes[0]

        assert [ask(), ask()] == [(2, 16 * MIB), (0, 16 * MIB)]
        (folder / "part.py").write_text("SIZE = 8\n")
        assert [ask(), ask()] == [(2, 32 * MIB), (0, 32 * MIB)]
        (folder / "other.txt").write_text("no part of the script")
        assert ask() == (0, 32 * MIB)
        (folder / "rows" / "one").touch()
        (detail,) = question.play([question.request()])
        if detail.findings.protection == "view":
            assert detail.findings.peak.allocated_bytes == 64 * MIB

    def test_an_error_is_remembered_only_where_the_script_runs_otherwise(self, folder: Path) -> None:
        (folder / "fails.py").write_text("import torch; assert torch.cuda.get_device_capability() >= (8, 0)")
        names = ("GeForce RTX 3060 12GB", "Tesla T4")
        cards = [gpu for gpu in all_gpus() if gpu.name in names]
        question = Asked.of(simulator(), Settings(gpu=""), ["fails.py"])
        assert [bool(row.error) for row in every_card(question, cards).rows] == [False, True]
        assert every_card(question, cards).plays == 0
        alone = [gpu for gpu in cards if gpu.name == "Tesla T4"]
        assert every_card(question, alone).plays > 0
        assert every_card(question, alone).plays > 0, "it may run by now"

    def test_one_variant_is_a_mistake(self) -> None:
        with pytest.raises(ConfigError, match="needs two or more variants"):
            compare(asked(), ["--batch-size=8"])


class TestKnob:
    @pytest.mark.parametrize(
        ("words", "name", "after"),
        [
            (["train.py", "--bs", "8"], "bs", ["train.py", "--bs", "9"]),
            (["train.py", "--batch_size=8"], "batch-size", ["train.py", "--batch_size=9"]),
            (["train.py", "data.bs=8"], "data.bs", ["train.py", "data.bs=9"]),
            (["BS=8", "python", "train.py"], "BS", ["BS=9", "python", "train.py"]),
            (["other.py"], "batch_size", ["other.py", "--batch_size=9"]),
        ],
    )
    def test_words(self, words: list[str], name: str, after: list[str], tmp_path: Path) -> None:
        variant = Variant(tuple(words), {})
        assert list(find_knob(variant, name).set(variant, 9).words) == after

    def test_a_variable(self) -> None:
        variant = Variant(("train.py",), {"BATCH": "4"})
        assert find_knob(variant, "BATCH").set(variant, 9).environ == {"BATCH": "9"}

    @pytest.mark.parametrize(
        ("file", "text", "after"),
        [
            ("c.yaml", "train:\n  batch_size: 8  # of one card\nval:\n  batch_size: 2\n", "batch_size: 9  # of"),
            ("c.json", '{"train": {\n  "batch_size": 8\n}}\n', '"batch_size": 9\n'),
            ("c.toml", "[train]\nbatch_size = 8\n[val]\nbatch_size = 2\n", "batch_size = 9\n[val]"),
        ],
    )
    def test_a_key_of_a_file(self, file: str, text: str, after: str, tmp_path: Path) -> None:
        path = tmp_path / file
        path.write_text(text)
        variant = Variant(("train.py", f"--config={path}"), {})
        name = "train.batch_size" if file != "c.json" else "batch_size"
        knob = find_knob(variant, name)
        assert knob.number == 8
        assert after in knob.set(variant, 9).replaced[str(path)]
        assert path.read_text() == text

    def test_a_variable_that_the_script_reads(self, tmp_path: Path) -> None:
        script = tmp_path / "train.py"
        script.write_text("import os\nsize = int(os.environ.get('BATCH_SIZE', '32'))\nwork = os.getenv('WORKERS')\n")
        variant = Variant((str(script),), {})
        assert find_knob(variant, "BATCH_SIZE").number == 32
        assert find_knob(variant, "BATCH_SIZE").set(variant, 9).environ == {"BATCH_SIZE": "9"}
        knob = number_in_environment(variant, is_batch)
        assert knob is not None
        assert knob.name == "BATCH_SIZE"

    def test_a_constant_of_the_script(self, tmp_path: Path) -> None:
        script = tmp_path / "train.py"
        text = "BATCH_SIZE = 48  # samples\nEPOCHS: int = 2\ndef main():\n    BATCH_SIZE = 3\n"
        script.write_text(text)
        variant = Variant((str(script),), {})
        knob = find_knob(variant, "BATCH_SIZE")
        assert (knob.kind, knob.number) == ("file", 48)
        assert knob.set(variant, 9).replaced == {str(script): text.replace("48", "9")}
        assert find_knob(variant, "EPOCHS").number == 2
        script.write_text(f"{text}exec(open('configurator.py').read())\n")
        assert find_knob(variant, "BATCH_SIZE").kind == "added"

    def test_two_keys_of_a_name_are_a_mistake(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_text("train:\n  bs: 8\nval:\n  bs: 2\n")
        with pytest.raises(ConfigError, match=r"2 keys of .* end in bs; name one with its path, such as train\.bs"):
            find_knob(Variant(("train.py", str(path)), {}), "bs")

    def test_a_key_of_training_is_found_beside_one_of_evaluation(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_text("train:\n  bs: 8\nval:\n  bs: 2\n")
        assert find_knob(Variant(("train.py", str(path)), {}), "bs", is_wanted=is_of_training).number == 8

    def test_accumulation_of_a_scripts_own_text(self, tmp_path: Path) -> None:
        script = tmp_path / "train.py"
        script.write_text("batch_size = 12\ngradient_accumulation_steps = 5 * 8\n")
        assert accumulation_of(Variant((str(script),), {})) == 40
        assert accumulation_of(Variant((str(script), "--gradient_accumulation_steps=2"), {})) == 2

    def test_a_change_of_several_words(self) -> None:
        variant = varied(Variant(("train.py", "--bs", "8", "--flag"), {}), "--bs 2 --compile=True")
        assert variant.words == ("train.py", "--bs", "2", "--flag", "--compile=True")


class TestFiles:
    def test_the_script_finds_another_value_and_the_file_stays(self, folder: Path) -> None:
        (folder / "rows.json").write_text('{\n  "rows": 4\n}\n')
        (folder / "rows.py").write_text(
            "import json, torch\nkept = torch.ones(json.load(open('rows.json'))['rows'], 1 << 20, device='cuda')\n"
        )
        question = Asked.of(simulator(), Settings(gpu="RTX 3060 12GB"), ["rows.py", "rows.json"])
        variant = find_knob(question.variant, "rows").set(question.variant, 6)
        try:
            (detail,) = question.play([question.request(variant)])
        except TightfitError as error:
            assert "can only be replaced for a play in a private view" in str(error)  # noqa: PT017
            pytest.skip("this machine allows no private view")
        assert detail.findings.peak.allocated_bytes == 6 * 4 * MIB
        assert '"rows": 4' in (folder / "rows.json").read_text()


class TestTape:
    def test_a_replay_on_the_same_device_repeats_the_run(self) -> None:
        facts = {"total_bytes": GIB, "used_by_others": 0, "context_bytes": 100 * MIB}
        taped = TapedAllocator(**facts)
        blocks = [taped.malloc(size * MIB) for size in (3, 50, 7, 200)]
        taped.free(blocks[1])
        taped.record_stream(blocks[2], 1)
        taped.free(blocks[2])
        taped.synchronize()
        taped.malloc(49 * MIB, stream=1)
        taped.empty_cache()
        with pytest.raises(OutOfMemory):
            taped.malloc(GIB)
        again = replay(taped.tape, **facts, settings=AllocatorSettings())
        assert again.peak_reserved_bytes == taped.peak_reserved_bytes
        assert again.failed_request == 5
        assert replay(taped.tape, **{**facts, "total_bytes": 4 * GIB}, settings=AllocatorSettings()).error is None
        assert (
            replay(taped.tape, **{**facts, "total_bytes": GIB // 4}, settings=AllocatorSettings()).failed_request == 3
        )

    def test_a_program_that_reads_its_free_memory_is_not_replayed(self) -> None:
        taped = TapedAllocator(total_bytes=GIB)
        assert taped.is_replayable
        taped.mem_get_info()
        assert not taped.is_replayable


class TestCommand:
    def test_variants_end_where_the_command_begins(self) -> None:
        options, _ = parser().read(["--gpu", "A100", "--compare", "--a=1", "b=2 --c", "train.py", "--json"])
        assert (options.compare, options.script, options.arguments) == (["--a=1", "b=2 --c"], "train.py", ["--json"])

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["train.py"], "--gpu"),
            (["--gpu=A100", "--multiple=8", "train.py"], "--multiple belongs to --largest"),
            (["--all-gpus", "--gpu=A100", "train.py"], "--gpu does not go with --all-gpus"),
            (["--gpu=A100", "--largest=bs", "--all-gpus", "train.py"], "are several questions"),
            (["--gpu=A100", "--largest=bs", "--html=a.html", "train.py"], "--html does not go with --largest"),
            (["--gpu=A100", "--largest=b s", "train.py"], "'b s' is no name"),
            (["--gpu=A100", "--largest=batch_size", "--multiple=0", "train.py"], "must be at least 1, got 0"),
            (["--gpu=A100", "--compare", "--a=1", "train.py"], "needs two or more variants"),
            (["--gpu=A100", "--compare", "--a='1", "--a=2", "train.py"], "cannot be read as words"),
        ],
    )
    def test_mistakes(self, words: list[str], says: str, folder: Path) -> None:
        done = here(["dryrun", *words])
        assert done.code == 2
        assert says in done.err
        assert done.err.count("\n") == 1

    def test_the_answer_in_both_languages(self, folder: Path) -> None:
        words = ["dryrun", "--gpu=RTX 3060 12GB", "--memory=1GiB", "--largest=batch_size", "--multiple=8"]
        done = here([*words, "train.py"])
        assert done.code == 0, done.err
        assert "THAT FITS on GeForce RTX 3060 12GB" in done.out
        assert "batch-size × 3 passes × 1 process" in done.out
        japanese = here([*words, "--lang=ja", "train.py"])
        assert "に収まる batch-size の最大値" in japanese.out
        record = json.loads(here([*words, "--json", "train.py"]).out)
        assert record["plays"] == 0
