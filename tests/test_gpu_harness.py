"""The programs of benchmarks/gpu: on the virtual card through the same code, and their arithmetic by hand."""

import csv
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import calibrate, fit, hidden, processes, replay, report, speed, tracefile, traces
from benchmarks.gpu.card import read_message
from benchmarks.gpu.grid import EVERYTHING, Case, grid
from benchmarks.gpu.probes import probes
from tightfit.config import TrainConfig
from tightfit.errors import ConfigError, DataError, DeviceError
from tightfit.kernels import operators as kernels
from tightfit.units import MIB

ROOT = Path(__file__).parents[1]

TINY = Case(size="tiny", vocab=512, block=32, steps=2)
CAPPED = Case(size="tiny", vocab=512, block=32, steps=2, act_as="45MiB", others="5MiB", do=EVERYTHING)
RESULTS = ROOT / "benchmarks" / "gpu" / "results"
FIXTURES = sorted(RESULTS.glob("**/traces.zip"))


# The grid


def test_every_case_has_an_id_of_its_own():
    ids = [case.id for case in grid()]
    assert len(set(ids)) == len(ids) > 80
    assert Case().id == "gpt2-b4"
    assert Case(micro_batch=16, compile=True, do=EVERYTHING).id == "gpt2-b16-compile-eval+train+save"


def test_a_case_is_said_by_what_differs_from_the_default():
    assert Case().arguments == ["--size", "gpt2", "--micro-batch", "4"]
    assert CAPPED.arguments[4:] == [
        *("--block", "32", "--vocab", "512", "--steps", "2", "--do", "eval", "train", "save"),
        *("--act-as", "45MiB", "--others", "5MiB"),
    ]  # fmt: skip
    assert Case(compile=True).arguments[-1] == "--compile"
    assert calibrate.without_limit(CAPPED.arguments) == CAPPED.without_limit.arguments


def test_the_most_telling_cases_come_first():
    first = list(grid())[:12]
    assert {case.size for case in first} >= {"gpt2", "gpt2-medium", "gpt2-xl"}
    assert {case.dtype for case in first} == {"bfloat16", "float32"}
    assert any(case.act_as for case in first)
    assert {deed for case in first for deed in case.do} == {"train", "eval", "save", "resume", "hf-trainer"}


def test_an_unknown_id_is_refused():
    with pytest.raises(ConfigError, match="no case has the id gpt2-b5; the nearest is gpt2-b"):
        calibrate.chosen(grid(), ["gpt2-b5"])


# Calibration


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrate") / "calibrate.csv"
    assert calibrate.calibrate([TINY, CAPPED], path, dry=True, jobs=2) == 2
    return path


@pytest.mark.slow
def test_a_dry_row_has_both_sides_and_no_error(calibrated):
    plain, capped = calibrate.read(calibrated)
    assert (plain["id"], plain["measured_outcome"], plain["predicted_outcome"]) == (TINY.id, "fits", "fits")
    # parameters, gradients and AdamW's two moments in float32, and cuBLAS's workspaces of 32 MiB in two threads
    parameters = 512 * 64 + 32 * 64 + 2 * (12 * 64 * 64 + 2 * 64) + 64
    assert int(plain["measured_requested_bytes"]) > 16 * parameters + 64 * MIB
    assert int(plain["measured_requested_bytes"]) <= int(plain["measured_reserved_bytes"])
    assert (plain["gpu"], plain["torch"], plain["dry"]) == ("NVIDIA H200", torch.__version__, "yes")
    assert int(plain["measured_device_used_bytes"]) == (
        int(plain["measured_reserved_bytes"]) + int(plain["measured_context_bytes"])
    )
    assert [plain[f"{kind}_error"] for kind in calibrate.KINDS] == [""] * 4
    assert plain["step_ms"] == plain["predicted_not_modelled"] == ""
    assert capped["measured_outcome"] == capped["predicted_outcome"] == "out_of_memory"
    assert capped["measured_phase"] == "backward"
    assert capped["measured_oom_tried_bytes"] == str(32 * MIB)
    assert int(capped["allowed_bytes"]) == 40 * MIB
    assert int(capped["predicted_need_bytes"]) > 64 * MIB
    assert "40.00 MiB allowed" in capped["measured_message"]


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_stops_in_time(calibrated, capsys):
    before = calibrated.read_text()
    assert calibrate.calibrate([TINY, CAPPED], calibrated, dry=True) == 0
    assert calibrate.calibrate([TINY, Case(), CAPPED], calibrated, dry=True, minutes=0) == 0
    assert "0 minutes are over; 1 cases are left" in capsys.readouterr().out
    assert calibrated.read_text() == before


def test_a_case_that_reaches_no_card_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceError, match=r"gpt2-b4 did not reach a card: .*torch finds no CUDA device here"):
        calibrate.calibrate([Case()], tmp_path / "calibrate.csv")
    assert not (tmp_path / "calibrate.csv").exists()


@pytest.mark.slow
def test_a_dry_row_does_not_stand_for_a_measured_one(calibrated, tmp_path, monkeypatch):
    path = tmp_path / "calibrate.csv"
    calibrate.write(path, calibrate.read(calibrated)[:1])
    measured = calibrate.read(calibrated)[0] | {"dry": "", "measured_seconds": "1"}
    monkeypatch.setattr(calibrate, "measure", lambda case, dry: dict(measured))
    monkeypatch.setattr(calibrate, "predict", lambda arguments, card: {})
    assert calibrate.calibrate([TINY], path) == 1
    assert [(row["id"], row["dry"], row["reserved_error"]) for row in calibrate.read(path)] == [
        (TINY.id, "", "0.000000")
    ]
    assert calibrate.calibrate([TINY], path) == 0


def measured_row(**values: Any) -> dict[str, Any]:
    row = dict.fromkeys(calibrate.FIELDS, "") | {"measured_outcome": "fits", "predicted_outcome": "fits"}
    for kind in calibrate.KINDS:
        row |= {f"measured_{kind}_bytes": "1000", f"predicted_{kind}_bytes": "1000"}
    return {**row, "gpu": "Card", "torch": "2.11.0", "driver": "1", **values}


def test_errors_are_predicted_over_measured():
    row = measured_row(predicted_reserved_bytes="1015", predicted_requested_bytes="990")
    assert calibrate.errors(row)["reserved_error"] == "0.015000"
    assert calibrate.errors(row)["requested_error"] == "-0.010000"
    assert calibrate.errors({**row, "dry": "yes"})["reserved_error"] == ""
    assert calibrate.errors({**row, "predicted_outcome": "out_of_memory"})["reserved_error"] == ""


def test_predicting_again_needs_the_torch_of_the_rows(tmp_path):
    path = tmp_path / "calibrate.csv"
    calibrate.write(path, [measured_row(torch="1.0.0+cu0")])
    with pytest.raises(ConfigError, match=r"was measured with torch 1\.0\.0\+cu0, and this is"):
        calibrate.predict_again(path, jobs=1)


@pytest.mark.slow
def test_predicting_again_keeps_what_was_measured(calibrated, tmp_path):
    path = tmp_path / "calibrate.csv"
    row = calibrate.read(calibrated)[0]
    measured = str(2 * int(row["measured_reserved_bytes"]))
    real = {**row, "dry": "", "measured_reserved_bytes": measured, "predicted_reserved_bytes": "7"}
    calibrate.write(path, [real])
    calibrate.predict_again(path, jobs=1)
    (again,) = calibrate.read(path)
    assert again["measured_reserved_bytes"] == measured
    assert again["predicted_reserved_bytes"] == row["predicted_reserved_bytes"]
    assert float(again["reserved_error"]) == -0.5


def test_the_figures_of_a_message():
    text = (
        "CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity of 11.69 GiB of which 2.68 GiB is "
        "free. Including non-PyTorch memory, this process has 7.04 GiB memory in use. Of the allocated memory 6.78 GiB "
        "is allocated by PyTorch, and 224.90 MiB is reserved by PyTorch but unallocated. If reserved"
    )
    assert read_message(text) == {
        "tried_bytes": round(6.14 * 2**30), "total_bytes": round(11.69 * 2**30), "free_bytes": round(2.68 * 2**30),
        "process_bytes": round(7.04 * 2**30), "allocated_bytes": round(6.78 * 2**30),
        "unallocated_bytes": round(224.90 * MIB),
    }  # fmt: skip
    assert read_message("CUDA out of memory. Tried to allocate 512 bytes.") == {"tried_bytes": 512}


# Traces


def entry(action: str, address: int, size: int, stream: int = 7) -> dict[str, Any]:
    return {"action": action, "device_free" if action == "oom" else "addr": address, "size": size, "stream": stream}


BASE = 0x7F00_0000_0000
BY_HAND = [
    entry("segment_alloc", BASE, 20 * MIB),  # for up to 10 MiB a segment of 20
    entry("alloc", BASE, 3 * MIB),
    entry("alloc", BASE + 3 * MIB, 2 * MIB),
    entry("free_requested", BASE, 3 * MIB),
    entry("free_completed", BASE, 3 * MIB),
    entry("alloc", BASE, 2 * MIB),  # the hole is the best fit
    entry("segment_alloc", BASE - 2**30, 30 * MIB),
    entry("alloc", BASE - 2**30, 29 * MIB),
    entry("oom", 5 * MIB, 60 * MIB),
]
LIMIT = {"total_bytes": 1000 * MIB, "allowed_bytes": 100 * MIB}


def snapshot(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"device_traces": [[], list(entries)]}


def test_a_trace_is_numbers_of_allocations_and_places():
    trace = tracefile.compact(snapshot(BY_HAND))
    found = [(tracefile.KINDS[row[0]], *row[1:]) for row in tracefile.rows(trace)]
    assert found == [
        ("segment_alloc", 20 * MIB, 0, 0, 0, 0),
        ("alloc", 3 * MIB, 0, 0, 0, 0),
        ("alloc", 2 * MIB, 0, 1, 0, 3 * MIB),
        ("free_requested", 3 * MIB, 0, 0, 0, 0),
        ("free_completed", 3 * MIB, 0, 0, 0, 0),
        ("alloc", 2 * MIB, 0, 2, 0, 0),
        ("segment_alloc", 30 * MIB, 0, 1, 0, 0),
        ("alloc", 29 * MIB, 0, 3, 1, 0),
        ("oom", 60 * MIB, 0, 0, 0, 0),
    ]


def test_a_trace_from_the_middle_is_refused():
    with pytest.raises(DataError, match="lies in no segment of the trace; record from the process's first"):
        tracefile.compact(snapshot(BY_HAND[1:]))
    with pytest.raises(DataError, match="'segment_map', which is not followed"):
        tracefile.compact(snapshot([entry("segment_map", BASE, 2 * MIB)]))


def test_the_replay_makes_the_same_segments_and_places():
    again = replay.replay(tracefile.compact(snapshot(BY_HAND)), **LIMIT)
    assert (again.segments.equal, again.places.equal) == (True, True)
    assert again.segments.expected == 3
    assert again.peak_reserved_bytes == 50 * MIB


def test_the_replay_tells_where_a_card_differs():
    other = [dict(each) for each in BY_HAND]
    other[6]["size"] = 32 * MIB  # PyTorch takes 30 MiB for 29
    again = replay.replay(tracefile.compact(snapshot(other)), **LIMIT)
    assert again.segments.difference == (
        f"event 1: ('segment_alloc', {32 * MIB}, 0) on the card, ('segment_alloc', {30 * MIB}, 0) here"
    )
    other = [dict(each) for each in BY_HAND]
    other[5]["addr"] = BASE + 5 * MIB
    assert not replay.replay(tracefile.compact(snapshot(other)), **LIMIT).places.equal
    room = replay.replay(tracefile.compact(snapshot(BY_HAND)), total_bytes=1000 * MIB)
    assert "('oom', " in room.segments.difference


def test_a_block_that_another_stream_used_comes_back_later():
    entries = [
        *BY_HAND[:4],
        entry("alloc", BASE + 5 * MIB, 3 * MIB),  # the first 3 MiB are not free yet
        entry("free_completed", BASE, 3 * MIB),
        entry("alloc", BASE, 3 * MIB),
    ]
    assert replay.replay(tracefile.compact(snapshot(entries)), **LIMIT).places.equal


def test_a_cache_that_the_script_emptied():
    freed = [entry(action, BASE, 30 * MIB) for action in ("free_requested", "free_completed", "segment_free")]
    entries = [entry("segment_alloc", BASE, 30 * MIB), entry("alloc", BASE, 30 * MIB), *freed]
    assert replay.replay(tracefile.compact(snapshot(entries)), **LIMIT).segments.equal


def test_requests_that_one_side_lacks_are_named():
    whole, part = (tracefile.compact(snapshot(BY_HAND[:n])) for n in (8, 5))
    compared, only = replay.compare_requests(whole, part)
    assert (compared.expected, compared.got, compared.same) == (5, 3, 3)
    assert only == f"1 x {29 * MIB} only on the card; 1 x {2 * MIB} only on the card"
    assert replay.compare_requests(whole, whole) == (replay.Comparison(5, 5, 5, ""), "")


@pytest.mark.slow
def test_a_dry_trace_is_recorded_once_and_replays(tmp_path):
    traces.record([CAPPED], tmp_path, dry=True)
    traces.record([CAPPED], tmp_path, dry=True)
    assert tracefile.names(tmp_path / "traces.zip") == [CAPPED.id]
    with pytest.raises(ConfigError, match=r"traces\.zip is of a dry run; give another folder"):
        traces.record([CAPPED], tmp_path)
    with open(tmp_path / "traces.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["segments_equal"], row["places_equal"], row["requests_equal"]) == ("yes", "yes", "")
    assert row["measured_reserved_bytes"] == row["replayed_reserved_bytes"]
    facts, trace = tracefile.read(tmp_path / "traces.zip", CAPPED.id)
    assert tracefile.KINDS.index("oom") in trace["kind"]
    trace["size"][trace["kind"].index(tracefile.KINDS.index("alloc"))] += 100 * MIB
    assert not traces.replayed(facts, trace).segments.equal


@pytest.mark.skipif(not FIXTURES, reason=f"no trace of a real card is in {RESULTS} yet")
@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in FIXTURES for name in tracefile.names(path)],
    ids=lambda value: value.parent.name if isinstance(value, Path) else value,
)
def test_the_simulation_makes_the_segments_of_a_real_card(path, name):
    facts, trace = tracefile.read(path, name)
    assert not facts["dry"], "a dry run is no measurement"
    again = traces.replayed(facts, trace)
    assert again.segments.difference == ""
    assert again.peak_reserved_bytes == facts["reserved_bytes"]


# Hidden bytes


def test_every_operator_of_the_table_has_a_probe():
    assert {f"aten::{probe.operator}" for probe in probes()} == set(kernels.ROWS)


@pytest.mark.slow
def test_dry_probes_say_what_the_table_says():
    rows = hidden.probe(["sum", "_softmax_backward_data"], dry=True)
    assert not [row for row in rows if row["measured_error"] or row["table_error"] or row["difference_bytes"] != ""]
    by = {(row["operator"], row["variant"], row["shape"], row["dtype"]): row for row in rows}
    # the product of gradient and output: 64 * 1024 * 4
    assert by["_softmax_backward_data", "", "64x1024", "float32"]["measured_extra_bytes"] == 262_144
    # 768 columns, 4 to a thread, in 768 / 4 / 32 = 6 groups of 32 x 4 threads; 16 rows a thread leave 4096 / 4 / 16 =
    # 64 blocks a group, which 132 SMs have room for: 4 bytes * 768 * 64 * 32 * 4 of partial sums, 6 counters of 4
    assert by["sum", "dim 0", "4096x768", "float32"]["measured_extra_bytes"] == 25_165_848
    assert by["sum", "dim 1", "64x1024", "float32"]["measured_extra_bytes"] == 0


def test_a_difference_needs_a_measurement():
    found = {"operator": "mm", "variant": "", "shape": "1", "dtype": "float32", "error": "", "extra_bytes": 5}
    assert hidden.row_of(found, {**found, "extra_bytes": 12}, dry=False)["difference_bytes"] == 7
    assert hidden.row_of(found, {**found, "extra_bytes": 12}, dry=True)["difference_bytes"] == ""
    assert hidden.row_of({**found, "error": "no kernel"}, found, dry=False)["difference_bytes"] == ""


# Speed

LIKE_NANOGPT = """import torch
for step in range(4):
    torch.ones(1000, device="cuda").sum()
    print(f"iter {step}: loss 1.0000, time {10 + step}.00ms, mfu 1.00%")
"""


@pytest.mark.slow
def test_dry_speed_runs_whole_programs_in_turn(tmp_path):
    theirs = tmp_path / "nanoGPT"
    theirs.mkdir()
    (theirs / "train.py").write_text(LIKE_NANOGPT)
    (theirs / "configurator.py").touch()
    model = speed.Model(layers=2, heads=2, width=64, block=32, batch=4, steps=3)
    speed.compare(model, tmp_path, nanogpt=theirs, rounds=1, minutes=5, only="t eager", dry=True)
    rows = calibrate.read(tmp_path / "speed.csv")
    assert [(row["name"], row["error"], row["dry"]) for row in rows] == [
        ("nanogpt eager", "", "yes"),
        ("tightfit eager", "", "yes"),
    ]
    assert {row["tokens_per_s"] for row in rows} == {""}, "nothing was computed, so there is no speed"
    (limits,) = calibrate.read(tmp_path / "ceilings.csv")
    assert (limits["gpu"], limits["bfloat16_tflops"]) == ("NVIDIA H200", "")


@pytest.mark.slow
def test_a_dry_fit_measures_the_plan_and_the_advice_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny = TrainConfig(
        batch_size=8, gradient_accumulation_steps=1, block_size=32, n_layer=2, n_head=2, n_embd=64, vocab_size=512,
        dtype="bfloat16", compile=False,
    )  # fmt: skip
    for _ in range(2):
        fit.measure(tmp_path / "fit.csv", minutes=5, most=2, dry=True, config=tiny)
    rows = calibrate.read(tmp_path / "fit.csv")
    assert [(row["role"], row["outcome"], row["dry"], row["step_ms"]) for row in rows] == [
        ("plan", "fits", "yes", ""),
        ("advice", "fits", "yes", ""),
    ]
    assert rows[1]["candidate"] == "b4-full-eager"
    assert int(rows[0]["predicted_reserved_bytes"]) > 0
    names = [name for _, name in fit.candidates(TrainConfig(), fit._plan(tiny, dry=True))]
    assert len(names) == len(set(names)) >= 72


def test_a_rate_is_a_share_of_the_limit():
    model = speed.Model(batch=12, block=1024)
    # 12 * 12 * 768**2 + 50304 * 768 + 25 norms of 768 = 123,587,328 weights; times 6, and attention
    assert model.flops_per_token == 6 * 123_587_328 + 113_246_208
    limits = {"gpu": "", "torch": "", "cuda": "", "driver": "", "bfloat16_tflops": 854.770176}
    found = {"times": [900.0] * 5 + [12.288], "peak_bytes": 1, "peak_kind": "nvml", "seconds": 1, "error": ""}
    row = speed.row_of(0, "x", found, model, limits, dry=False)
    assert row["tokens_per_s"] == 1_000_000  # 12,288 tokens in 12.288 ms
    assert row["share_of_matmul"] == 1.0  # 854,654,976 FLOPs a token


def test_a_folder_without_train_py_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no train\.py; give a checkout of karpathy/nanoGPT"):
        list(speed.whole_programs(speed.Model(), tmp_path, tmp_path, dry=True))


# The report


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    """Errors of 0.1%, -0.2% and 3%; of six verdicts three right, one wrong and two too near; one dry row."""
    rows = [
        measured_row(id="a", predicted_reserved_bytes="1001"),
        measured_row(id="b", predicted_reserved_bytes="998"),
        measured_row(id="c", predicted_reserved_bytes="1030", predicted_not_modelled="a graph was run eagerly"),
        measured_row(id="dry", predicted_reserved_bytes="1900", dry="yes"),
    ]
    verdicts = [("fits", "fits", 900), ("out_of_memory", "out_of_memory", 1100), ("fits", "out_of_memory", 1011)]
    verdicts += [("out_of_memory", "fits", 992), ("fits", "fits", 1008), ("fits", "fits", 500)]
    for number, (measured, predicted, need) in enumerate(verdicts):
        outcomes = {"measured_outcome": measured, "predicted_outcome": predicted}
        limits = {"allowed_bytes": "1000", "predicted_need_bytes": str(need)}
        rows.append(measured_row(id=f"limit {number}", **outcomes, **limits))
    rows = [{**row, **(calibrate.errors(row) if row["id"] in "abc" else {})} for row in rows]
    calibrate.write(tmp_path / "calibrate.csv", rows)
    return tmp_path


def test_the_report_counts_by_hand(by_hand):
    rows = calibrate.read(by_hand / "calibrate.csv")
    found = report.errors_of(rows, "reserved")
    assert found is not None
    assert (found.count, found.worst, found.worst_id) == (3, 0.03, "c")
    assert found.median == pytest.approx(0.002)
    verdicts = report.verdicts_of(rows)
    assert (verdicts.right, verdicts.wrong, verdicts.near) == (3, ("limit 2",), 2)
    text = report.markdown(by_hand)
    assert "| reserved | 3 | 0.20% | +3.00% | c |" in text
    assert "Target for reserved: median 0.5%, worst 2%: missed." in text
    assert "further than 1% from the limit: 3 right, 1 wrong (limit 2); 2 nearer." in text
    assert "1 rows of dry runs are left out: nothing was measured in them." in text
    assert "| c | 1000 bytes | 1.01 KiB | +3.00% |" in text
    assert "Predicted with something left out, as the prediction itself says: c." in text
    assert "1900" not in text


def test_the_picture_names_the_worst(by_hand):
    pytest.importorskip("matplotlib")
    assert report.picture(calibrate.read(by_hand / "calibrate.csv"), by_hand / "report.svg")
    assert (by_hand / "report.svg").stat().st_size > 5000
    assert not report.picture([measured_row(dry="yes", reserved_error="0.1")], by_hand / "none.svg")


def test_speed_is_compared_round_by_round(tmp_path):
    fields = dict.fromkeys(speed.FIELDS, "") | {"gpu": "Card", "tokens_per_s": "100", "share_of_matmul": "0.5"}
    times = {"nanogpt eager": (30, 20, 50), "tightfit eager": (10, 10)}
    with open(tmp_path / "speed.csv", "w", newline="") as file:
        table = csv.DictWriter(file, speed.FIELDS)
        table.writeheader()
        for name, each in times.items():
            for number, ms in enumerate(each):
                table.writerow({**fields, "name": name, "round": number, "step_ms": ms})
    text = report.markdown(tmp_path)
    assert "tightfit against nanoGPT, eager: 2.50x the speed (2.00 to 3.00, 2 rounds)." in text
    assert "| nanogpt eager | 3 | 30.0 (20.0 to 50.0) | 100 | 50.0% |" in text


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has none of calibrate\.csv, traces\.csv"):
        report.markdown(tmp_path)


# The README


def commands() -> list[str]:
    text = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line]


def test_the_readmes_commands_exist_and_are_short(monkeypatch, capsys):
    programs = {}
    for command in commands():
        assert len(command) <= 2000
        if match := re.search(r"-m benchmarks\.gpu\.(\w+)(.*)", command):
            programs[match[1]] = programs.get(match[1], "") + match[2]
    assert set(programs) == {"calibrate", "traces", "hidden", "speed", "fit", "report"}
    for name, words in programs.items():
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"benchmarks.gpu.{name}").main()
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert not [option for option in re.findall(r"--[a-z-]+", words) if option not in shown]
    ids = {case.id for case in grid()}
    text = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    assert f"{len(ids)} configurations" in text
    assert f"record of {len(traces.cases())} of them" in text
    given = re.search(r"--only ([^\n]+)", "\n".join(commands()))
    assert given is not None
    assert set(given[1].split()) <= ids


# A real card


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_a_real_row(tmp_path):
    case = Case(micro_batch=2, steps=2)
    assert calibrate.calibrate([case], tmp_path / "calibrate.csv", jobs=1) == 1
    (row,) = calibrate.read(tmp_path / "calibrate.csv")
    assert (row["measured_outcome"], row["predicted_outcome"], row["dry"]) == ("fits", "fits", "")
    assert abs(float(row["reserved_error"])) < report.WORST_TARGET
    traces.record([case], tmp_path)
    facts, trace = tracefile.read(tmp_path / "traces.zip", case.id)
    assert traces.replayed(facts, trace).segments.difference == ""


def test_a_program_that_hangs_is_killed_with_its_children():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    status, _, err = processes.run([sys.executable, "-c", code], timeout_s=1)
    assert status == -9
    assert "killed after 1 seconds" in err
