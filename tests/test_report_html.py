"""The HTML report: what is in it, that no peak is lost where it is shortened, that nothing in it can run, refusals."""

import dataclasses
import json
import math
import os
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from runs import arguments, here, process

from tightfit.cli import cmd_train as train_command
from tightfit.config import TrainConfig
from tightfit.diagnosis.cause_records import Limit, PrivatePools, Request
from tightfit.diagnosis.culprit import Culprit
from tightfit.diagnosis.explaining import explain
from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.named_card import Card
from tightfit.diagnosis.remedies import Change, Figures, Remedy, ShorterBlock, SplitBatch
from tightfit.errors import ConfigError, DataError
from tightfit.gpus import find_gpu
from tightfit.planner.budget import Budget
from tightfit.planner.candidates import Plan
from tightfit.planner.lines import Estimate
from tightfit.planner.planning import PlanResult, Where
from tightfit.planner.predict import Prediction
from tightfit.planner.search import Choice
from tightfit.planner.survey import CardRow
from tightfit.report.bars import Part, parts_table
from tightfit.report.dryrun_page import dryrun_page
from tightfit.report.html import explanation_report, findings_report, run_report
from tightfit.report.page import render, write
from tightfit.report.plan_page import cards_page, plan_page
from tightfit.report.runs import read_run
from tightfit.report.series import curve, highest
from tightfit.report.terminal import page_text
from tightfit.report.timeline_picture import CATEGORY_COLOURS, PHASE_COLOURS
from tightfit.units import GIB, MIB
from tightfit.vgpu.records import Findings, read_findings
from tightfit.wording.diagnosis import words as explain_words
from tightfit.wording.kinds import words as kind_words
from tightfit.wording.report import LANGUAGES, locale_language, words

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028'\"&{{ 7*7 }}"
SETTINGS = {"micro_batch": 8, "eval_micro_batch": 8, "loss": "auto", "checkpointed_blocks": 0}


class Outline(HTMLParser):
    """What a reader of the page's structure meets: tags with their attributes, and the text outside of scripts."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text, self.scripts = "", [""]
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def data_of(html: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)


def a_run(folder: Path, *, steps: int = 40, extra: tuple[dict, ...] = (), tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    rows: list[dict] = []
    for step in range(steps):
        if step % 10 == 0:
            rows.append({"step": step, "train_loss": 5 - step / 20, "val_loss": 5.1 - step / 20, "lr": 1e-3})
        now = {"memory_bytes": GIB + step * MIB, "memory_peak_bytes": GIB + step * MIB}
        rows.append({"step": step, "loss": 5 - step / 19, "ms": 10.0, "tokens_per_s": 4000.0 + step, **now})
    text = "".join(json.dumps(row) + "\n" for row in (*rows, *extra))
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


def a_timeline(count: int = 400, seed: int = 1) -> dict:
    """Moments of a run in which everything moves at random."""
    steps = np.random.default_rng(seed).integers(-8 * MIB, 8 * MIB, (3, count))
    rows = abs(steps.cumsum(axis=1)) + MIB
    names = ("parameters", "activations", "logits")
    total = rows.sum(axis=0)
    return {
        "event_count": count,
        "events": list(range(count)),
        "category_bytes": {name: row.tolist() for name, row in zip(names, rows, strict=True)},
        "reserved_bytes": (total + 20 * MIB).tolist(),
        "phases": [{"event": 0, "phase": "setup"}, {"event": count // 4, "phase": "forward"}],
        "peak": {"event": int(total.argmax()), "phase": "forward", "allocated_bytes": int(total.max())},
        "failures": [],
        "tensors": [],
        "total_bytes": 12 * GIB,
        "used_by_others_bytes": GIB,
        "context_bytes": 300 * MIB,
    }


def tensor(start: int, end: int | None, nbytes: int, category: str = "activations", **more) -> dict:
    made = {"shape": [64, nbytes], "dtype": "bfloat16", "operator": "aten::mm", "phase": "forward"}
    place = {"file": "/home/somebody/secret/deep/down/model.py", "line": 7, "function": "GPT.forward"}
    return {"from_event": start, "to_event": end, "bytes": nbytes, "category": category, **made, **place, **more}


def findings(timeline: dict | None = None, **changes) -> Findings:
    largest = [{key: v for key, v in tensor(0, 1, 5 * MIB, "logits").items() if "event" not in key}]
    found = {
        "outcome": "fits",
        "gpu": {
            "name": "GeForce RTX 3060 12GB",
            "capability": "8.6",
            "total_bytes": 12 * GIB,
            "used_by_others_bytes": GIB,
            "context_bytes": 300 * MIB,
        },
        "torch": "2.13",
        "not_played": [],
        "peak": {
            "requested_bytes": GIB,
            "allocated_bytes": GIB,
            "reserved_bytes": 2 * GIB,
            "device_bytes": 2 * GIB + 300 * MIB,
            "phase": "forward",
        },
        "categories": {"logits": 3 * GIB, "parameters": GIB},
        "categories_by_phase": {"logits": {"forward": 3 * GIB}, "parameters": {"setup": GIB}},
        "phases": {"setup": GIB, "forward": 4 * GIB},
        "largest": largest,
        "failure": None,
        "caught_failures": 0,
        "steps": 2,
        "seconds": 1.5,
        "stopped_because": "2 steps were asked for",
        "made_up_values": [{"what": "item", "times": 4, "file": "train.py", "line": 9}],
        "not_written": ["out/ckpt.pt"],
        "not_modelled": ["something rare"],
        "never_modelled": ["kernels of Triton"],
        "notes": ["a note"],
    }
    return msgspec.convert({**found, "timeline": timeline, **changes}, Findings)


def test_the_first_lines_of_a_dry_run_name_its_made_up_answers_and_the_free_blocks_of_the_cache() -> None:
    peak = {"allocated_bytes": 7 * GIB, "reserved_bytes": 11 * GIB, "requested_bytes": 7 * GIB, "phase": "forward"}
    with_gap = findings(peak={**peak, "device_bytes": 12 * GIB})
    head, _, _ = page_text(dryrun_page(with_gap, words("en"))).partition("\n\n")
    assert re.search(r"Highest reserved +11.00 GiB +at least 4.00 GiB of it in free blocks of the cache", head)
    assert re.search(r"Made-up answers +4 +mostly at train.py:9", head)
    without = findings(peak={**peak, "reserved_bytes": 8 * GIB, "device_bytes": 9 * GIB}, made_up_values=[])
    head, _, _ = page_text(dryrun_page(without, words("en"))).partition("\n\n")
    assert "free blocks" not in head
    assert "Made-up" not in head


LOG = """Traceback (most recent call last):
  File "/home/me/{file}", line 184, in {function}
    {source}
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity of 11.69 GiB of \
which 2.68 GiB is free. Including non-PyTorch memory, this process has 7.04 GiB memory in use. Of the allocated \
memory 6.78 GiB is allocated by PyTorch, and 224.90 MiB is reserved by PyTorch but unallocated.
"""
EVIL_LOG = LOG.format(file=f"{EVIL[:60]}/train.py", function=EVIL[:60], source=f"logits = '{EVIL}'")
PLAIN_LOG = LOG.format(file="model.py", function="forward", source="logits = self.lm_head(x)")
ROOM = 9 * GIB


def a_remedy(code: str, verdict: str, device_bytes: int | None, **more) -> Remedy:
    figures = Figures(device_bytes=device_bytes, room_bytes=ROOM, phase="forward", requested_bytes=GIB, free_bytes=MIB)
    changes = {
        "split": SplitBatch(size=4, passes=16, effective=64, step_s=None),
        "shorter_block": ShorterBlock(half=512, block_size=1024),
    }
    reason = "fits" if verdict == "fits" else "too_much"
    usual = {"exact": True, "label": "simulated", "reason": reason}
    usual |= {"change": changes.get(code, Change()), "figures": figures}
    return Remedy(code=code, verdict=verdict, device_bytes=device_bytes, **{**usual, **more})


def a_plan(*, fits: bool = True, note: str = "a note", category: str = "inputs") -> PlanResult:
    config = TrainConfig(compile=True)
    plan = Plan(micro_batch=7, eval_micro_batch=7, loss="full", activation_checkpointing=0, compile=True)
    categories = {"logits": 4 * GIB, category: 4, "parameters": GIB, "gradients": 2 * GIB}
    traced = Prediction(
        plan=plan, peak_bytes=9 * GIB, allocated_bytes=8 * GIB, phase="backward", categories=categories, phases={},
        pass_s=33.76 * 7 / 480, update_s=0.0, not_modelled=(), parameters=1,
    )  # fmt: skip
    choice = Choice(
        best=traced if fits else None,
        offered=[traced] if fits else [],
        refused=[] if fits else [traced],
        least=None if fits else traced,
        request=Estimate(plan=dataclasses.replace(plan, micro_batch=480), peak_bytes=20 * GIB, step_s=1.0),
        share=480,
    )
    total, text = (12 if fits else 7) * GIB, "1.00 GiB for the context"
    budget = Budget(total_bytes=total, used_by_others_bytes=0, context_bytes=GIB, margin_bytes=GIB, text=text)
    where = Where(gpu=find_gpu("GeForce RTX 3060 12GB"), budget=budget)
    return PlanResult(config=config, where=where, choice=choice, environ={}, seconds=1.0, traced=1, notes=[note])


def plan_report(result: PlanResult, *, lang: str = "en") -> str:
    return render(plan_page(result, words(lang)), lang=lang)


def an_explanation(log: str = PLAIN_LOG, lang: str = "en", text: str = "train.py") -> Explanation:
    """As of a run that was played, with every kind of fix; `text` is where a log or a user says something."""
    return replace(
        explain(log, lang=lang),
        card=Card(
            name="GeForce RTX 3060 12GB", capability=(8, 6), total_bytes=12 * GIB, used_bytes=3 * GIB,
            context_bytes=GIB, how_named="assumed", total_stated=True,
        ),
        culprit=Culprit(
            label="simulated", tensor="logits", shape=(65_536, 50_304), dtype="bfloat16", bytes=6 * GIB,
            operator="mm", phase="eval", file=text, line=184, function=text, source=text,
            categories={"parameters": GIB, "logits": 4 * GIB, "optimizer state": 0, text: MIB},
        ),
        causes=(
            Limit(code="limited", label="measured", allowed_bytes=GIB),
            PrivatePools(code="private_pools", label="simulated", pool_bytes=GIB),
            Request(code="tensor_not_told", label="likely", requested_bytes=GIB),
        ),
        remedies=(
            a_remedy("split", "fits", 5 * GIB, saved_bytes=2 * GIB, slowdown=0.05, paste=("batch_size = 4", "x = 1")),
            a_remedy("chunked_loss", "fits", 6 * GIB, slowdown=0.001, paste=("tightfit train CONFIG --loss=chunked",)),
            a_remedy("shorter_block", "does_not_fit", 24 * GIB, exact=False, saved_bytes=-GIB, label="likely"),
            a_remedy("empty_cache", "no_effect", None, reason="empty_cache_unstated", slowdown=28.0),
        ),
        played="config",
        config_names=(text,),
        not_modelled=(text, "kernels of Triton"),
    )  # fmt: skip


FAILURE = {
    **{key: value for key, value in tensor(0, 1, 6 * GIB, "logits").items() if "event" not in key},
    "requested_bytes": 6 * GIB,
    "free_bytes": 2 * GIB,
    "allocated_bytes": 7 * GIB,
    "reserved_bytes": 8 * GIB,
    "tensor_bytes": 6 * GIB,
    "total_bytes": 12 * GIB,
    "process_bytes": 8 * GIB,
    "message": "CUDA out of memory. Tried to allocate 6.00 GiB.",
}


class TestSeries:
    def test_a_short_curve_is_kept_as_it_is(self) -> None:
        found = curve([(step, step * 0.5) for step in range(2000)])
        assert (found.x[-1], found.mean[-1], found.low, found.points) == (1999, 999.5, None, 2000)

    @pytest.mark.parametrize("seed", range(5))
    def test_spans_hold_every_extreme(self, seed: int) -> None:
        dice = random.Random(seed)
        points = [(2 * step, dice.gauss(0, 1)) for step in range(dice.choice((2001, 5000, 33_333)))]
        points[dice.randrange(len(points))] = (points[-1][0], 1e6)
        points.sort()
        found = curve(points)
        values = [value for _, value in points]
        assert found.low is not None
        assert found.high is not None
        assert len(found.x) == 1000
        assert found.x == sorted(found.x)
        assert max(found.high) == 1e6
        assert min(found.low) == pytest.approx(min(values), rel=1e-5)
        assert all(low <= mean <= high for low, mean, high in zip(found.low, found.mean, found.high, strict=True))
        spans = np.array_split(np.array(values), 1000)
        assert sum(map(len, spans)) == found.points

    def test_what_is_no_number_is_left_out_and_counted(self) -> None:
        found = curve([(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)])
        assert (found.x, found.mean, found.not_finite) == ([0, 3], [1, 2], 2)
        assert curve([]).x == []
        assert curve([(0, math.nan)]).x == []

    def test_highest_keeps_the_step_of_each_peak(self) -> None:
        points = [(step, 5.0) for step in range(50_000)]
        points[31_234] = (31_234, 9.0)
        found = highest(points)
        assert found.x[found.mean.index(9)] == 31_234


class TestRun:
    def test_everything_that_the_folder_says(self, tmp_path: Path) -> None:
        recovery = {"event": "recovery", "phase": "backward", "kind": "recoverable", "requested_bytes": GIB}
        change = {"before": SETTINGS, "after": {**SETTINGS, "micro_batch": 4}, "seconds_lost": 1.25}
        extra = (
            {"step": 12, **recovery, **change},
            {"step": 30, "event": "growth", "before": change["after"], "after": SETTINGS},
            {"step": 31, "event": "comet", "seen": EVIL},
            {"step": 5, "event": "plan", "predicted_peak_bytes": 2 * GIB},
            {"step": 0, "event": "config", "config": {"batch_size": 12, "note": EVIL, "ratio": 0.1}},
        )
        html = run_report(a_run(tmp_path / "my run", extra=extra))
        seen = Outline(html)
        for words_ in (
            "Training run my run", "3.6000", "at step 30", "2.00 GiB", "1.04 GiB", "Recoveries from lack of memory",
            "recovery from lack of memory", "backward", "micro_batch 8 → 4", "micro_batch 4 → 8", "1.2s lost",
            "comet", "batch_size", "0.1",
        ):  # fmt: skip
            assert words_ in seen.text, words_
        charts = data_of(html)["charts"]
        assert charts.keys() == {"loss", "rate", "memory"}
        assert [row["key"] for row in charts["loss"]["series"]] == ["loss", "train_loss", "val_loss"]
        predicted = charts["memory"]["series"][-1]
        assert (predicted["key"], predicted["x"], predicted["y"]) == ("predicted", [5, 39], [2 * GIB, 2 * GIB])
        assert charts["loss"]["marks"] == [12, 30, 31]

    def test_alternatives_of_a_plan_whatever_their_columns(self, tmp_path: Path) -> None:
        rows = [
            {"name": "best", "keys": {"micro_batch": 4}, "peak_bytes": 6 * GIB, "step_s": 1.02, "fits": True},
            {"name": "smaller", "exact": False, "host_bytes": 3 * GIB, "why": "less"},
        ]
        for plan in ({"alternatives": rows, "best": {"peak_bytes": GIB}}, {"offered": rows, "peak_bytes": GIB}):
            text = Outline(run_report(a_run(tmp_path / "run"), plan=plan)).text
            for words_ in ("micro_batch=4", "6.00 GiB", "1.02 s", "yes", "no", "host_bytes", "3.00 GiB", "less"):
                assert words_ in text, words_
        (tmp_path / "run" / "plan.json").write_text(json.dumps({"alternatives": rows, "peak_bytes": GIB}))
        assert "smaller" in run_report(tmp_path / "run", lang="ja")

    def test_a_plan_as_the_command_prints_it(self) -> None:
        text = Outline(html := plan_report(a_plan(note="a < note"))).text
        for words_ in (
            "PLAN: 7 sequences at once, 69 passes a step, all logits kept", "10.00 GiB", "GeForce RTX 3060 12GB",
            "9.00 GiB", "--micro_batch=7", "micro_batch=7, eval_micro_batch=7, loss=full", "33.8s a step", "a < note",
            "phase of the peak", "logits 4.00 GiB, gradients 2.00 GiB, parameters 1.00 GiB",
            "As asked, 480 at once with all their logits: about 20.00 GiB, which does not fit.",
        ):  # fmt: skip
            assert words_ in text, words_
        assert "Memory of the card at the plan's peak" in text
        assert "PyTorch's cache, reserved and unallocated" in text, "what is reserved beyond the tensors"
        assert len(re.findall('class="limit"', html)) == 8, "seven parts of memory, a plan"

    def test_a_plan_in_a_terminal(self) -> None:
        lines = page_text(plan_page(a_plan(), words("en"))).splitlines()
        assert lines[0].startswith("PLAN: 7 sequences at once")
        pasted = "    --micro_batch=7 --eval_micro_batch=7 --loss=full --activation_checkpointing=0 --compile=True"
        assert pasted in lines
        assert "GeForce RTX 3060 12GB: 12.00 GiB, of which the plan may take 10.00 GiB" in lines
        assert max(map(len, lines)) <= 110

    def test_a_survey_names_its_columns(self) -> None:
        fits = CardRow(
            gpu="A", memory_bytes=GIB, fits=True, micro_batch=3, blocks=0, compile=True, emulates=False, offload=True,
            needs_bytes=MIB, step_s=1.0, tokens_per_s=2e3,
        )  # fmt: skip
        small = dataclasses.replace(fits, gpu="B", fits=False, micro_batch=0, step_s=None, tokens_per_s=None)
        text = page_text(cards_page([fits, small], words("en")))
        assert text.startswith("1 of 2 cards run this configuration\n")
        assert re.search(r"card +memory +at once +recomputed +tokens/s", text)
        assert re.search(r"A +1.00 GiB +3 +2.00K +optimizer on the host", text)
        assert "does not fit: 1.00 MiB at least" in text

    def test_the_configuration_comes_from_the_checkpoint(self, data_dir: Path, tmp_path: Path) -> None:
        assert here(arguments(tmp_path / "out", data_dir, eval_interval=4)).code == 0
        text = Outline(run_report(tmp_path / "out")).text
        assert re.search(r"eval_interval\s+4\s", text)
        assert "validation" in text.lower()

    def test_the_cut_last_line_of_a_killed_run_is_left_out_and_said(self, tmp_path: Path) -> None:
        text = Outline(run_report(a_run(tmp_path / "run", tail='{"step": 40, "lo'))).text
        assert "could not be read and are left out: 1, the first at 45" in text

    def test_a_run_that_diverged(self, tmp_path: Path) -> None:
        extra = ({"step": 40, "loss": math.nan}, {"step": 41, "loss": math.inf}, {"step": 42, "loss": 10**400})
        html = run_report(a_run(tmp_path / "run", extra=extra))
        assert "Training loss (logged steps): not finite (NaN or infinity) and not drawn: 2." in html
        assert data_of(html)["charts"]["loss"]["series"][0]["x"][-1] == 39

    def test_only_non_numbers(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": NaN, "val_loss": NaN, "memory_bytes": Infinity}\n')
        seen = Outline(run_report(tmp_path))
        assert "Training loss (logged steps): not finite (NaN or infinity) and not drawn: 1." in seen.text
        assert not seen.all("script"), "there is nothing to draw"

    def test_a_hundred_thousand_steps_become_spans(self, tmp_path: Path) -> None:
        html = run_report(a_run(tmp_path / "run", steps=100_000))
        assert len(html) < 1_000_000
        row = data_of(html)["charts"]["loss"]["series"][0]
        assert len(row["x"]) == len(row["low"]) == len(row["high"]) == 1000
        assert "100,000 points are drawn as 1,000 spans" in html


GARBAGE = {
    "empty": b"",
    "blank": b"\n\n\n",
    "binary": bytes(range(256)) * 40,
    "cut": b'{"step": 0, "lo',
    "another": b"5\n[1, 2]\nnull\n",
    "no step": b'{"loss": 3.0}\n{"step": -1, "loss": 2}\n{"step": "x", "loss": 2}\n{"step": true, "loss": 2}\n',
    "no numbers": b'{"step": 0, "loss": "high"}\n{"step": 1, "event": 7}\n',
    "deep": b"[" * 100_000 + b"\n",
}


class TestRefusals:
    @pytest.mark.parametrize("name", GARBAGE)
    def test_a_file_without_a_step(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_bytes(GARBAGE[name])
        done = here(["report", str(tmp_path)])
        assert done.code == 2
        assert re.fullmatch(r"tightfit: .*metrics\.jsonl holds no line that can be read[^\n]*\n", done.err)
        assert not (tmp_path / "report.html").exists()

    def test_folders_and_files_that_are_not_there(self, tmp_path: Path) -> None:
        for folder, words_ in ((tmp_path, "no metrics.jsonl in"), (tmp_path / "absent", "is not a folder")):
            done = here(["report", str(folder)])
            assert (done.code, done.err.count("\n")) == (2, 1)
            assert words_ in done.err
        (tmp_path / "metrics.jsonl").mkdir()
        assert here(["report", str(tmp_path)]).code == 2

    def test_options_that_cannot_be_used(self, tmp_path: Path) -> None:
        run = str(a_run(tmp_path / "run"))
        (tmp_path / "bad.json").write_text("{")
        (tmp_path / "list.json").write_text("[]")
        (tmp_path / "other.json").write_text('{"timeline": {"events": [1]}}')
        (tmp_path / "plain.json").write_bytes(msgspec.json.encode(findings()))
        for options, words_ in (
            (["--lang", "fr"], "must be one of en, ja, got 'fr'"),
            (["--plan", str(tmp_path / "absent.json")], "absent.json cannot be read"),
            (["--plan", str(tmp_path / "bad.json")], "bad.json is not JSON"),
            (["--dryrun", str(tmp_path / "list.json")], "list.json has no findings of a dry run"),
            (["--dryrun", str(tmp_path / "other.json")], "no findings of a dry run"),
            (["--dryrun", str(tmp_path / "plain.json")], "has no timeline"),
            (["--out", str(tmp_path / "absent" / "x.html")], "cannot be written (No such file or directory)"),
            (["--out", str(tmp_path)], "cannot be written"),
        ):
            done = here(["report", run, *options])
            assert (done.code, done.err.count("\n")) == (2, 1), done.err
            assert words_ in done.err
        assert not list(tmp_path.glob(".*")), "nothing is left half written"

    def test_functions_raise_this_packages_errors(self, tmp_path: Path) -> None:
        for content in (b"{}", b"\xff", b'{"timeline": {"total_bytes": 1' + b"0" * 400 + b"}}"):
            (tmp_path / "other.json").write_bytes(content)
            with pytest.raises(DataError, match=r"other\.json has no findings of a dry run"):
                read_findings(tmp_path / "other.json")
        with pytest.raises(ConfigError, match="must be one of en, ja"):
            findings_report(findings(), lang="de")


class TestDryRun:
    def test_a_run_that_fits(self) -> None:
        html = findings_report(findings(a_timeline()))
        text = Outline(html).text
        for words_ in (
            "Dry run on GeForce RTX 3060 12GB",
            "FITS on GeForce RTX 3060 12GB,",
            "Left over",
            "75.0%",
            "logits",
            "kernels of Triton",
            "something rare",
            "4 answers made up",
            "a note",
            "not written: out/ckpt.pt",
            "deep/down/model.py:7",
        ):
            assert words_ in text, words_
        assert "somebody" not in html, "a page may be sent to others"
        chart = data_of(html)["charts"]["timeline"]
        assert [row["key"] for row in chart["rows"]] == ["parameters", "activations", "logits"]

    def test_a_run_that_does_not_fit(self) -> None:
        timeline = {**a_timeline(), "failures": [{"event": 300, "requested_bytes": 6 * GIB, "free_bytes": 2 * GIB}]}
        html = findings_report(findings(timeline, outcome="out_of_memory", failure=FAILURE))
        text = Outline(html).text
        for words_ in (
            "DOES NOT FIT on",
            "asked for 6.00 GiB",
            "2.00 GiB were free",
            "CUDA out of memory",
            "GPT.forward",
        ):
            assert words_ in text, words_
        chart = data_of(html)["charts"]["timeline"]
        assert (chart["failed"], chart["mark"]) == (True, 299)

    def test_tensors_with_their_lines(self) -> None:
        own = tensor(5, 90, 3 * MIB, file=__file__, line=1)
        html = findings_report(findings({**a_timeline(), "tensors": [tensor(0, None, MIB), own]}))
        found = data_of(html)["charts"]["timeline"]["tensors"]
        assert (found["from"], found["to"]) == ([0, 5], [None, 90])
        assert found["texts"][found["what"][1]] == f"64 × {3 * MIB} bfloat16"
        assert found["texts"][found["source"][1]].startswith('"""The HTML report')
        assert "test_report_html.py:1 in GPT.forward" in found["texts"][found["place"][1]]

    def test_without_a_timeline_there_is_no_script(self) -> None:
        seen = Outline(findings_report(findings()))
        assert not seen.all("script")
        assert "75.0%" in seen.text
        for empty in (a_timeline(1), {**a_timeline(), "events": [], "category_bytes": {}, "event_count": 0}):
            findings_report(findings(empty))

    def test_a_plan_that_does_not_fit(self) -> None:
        text = Outline(plan_report(a_plan(fits=False))).text
        assert "NOTHING FITS that leaves the result as it is." in text
        assert "The least is 9.00 GiB (7 sequences at once, 69 passes a step" in text
        assert "4.00 GiB too much: logits 4.00 GiB, parameters 1.00 GiB, gradients 2.00 GiB." in text
        assert "A card with 11.00 GiB or more would do." in text


class TestExplanation:
    @pytest.mark.parametrize("lang", LANGUAGES)
    def test_everything_that_was_found(self, lang: str) -> None:
        found = an_explanation(lang=lang)
        html = explanation_report(found)
        text, said = Outline(html).text, explain_words(lang)
        assert f'<html lang="{lang}">' in html
        titles = ("problem", "cause", "fixes", "expected", "arithmetic")
        labels = [said("labels", each.label) for each in found.causes]
        verdicts = [said("verdicts", each.verdict) for each in found.remedies]
        figures = ("6.14 GiB", "2.68 GiB", "3.46 GiB", "5.00 GiB", "2.00 GiB", "+5%", "±0%", "×29", "24.00 GiB")
        for words_ in (
            *(said("titles", title) for title in titles), *labels, *verdicts, *figures, "−1.00 GiB",
            said("effects", "exact"), said("effects", "lossy"), "kernels of Triton", "logits = self.lm_head(x)",
            "GeForce RTX 3060 12GB", "tightfit plan train.py",
        ):  # fmt: skip
            assert words_ in text, words_
        assert re.findall(r'class="label">([^<]*)<', html) == labels
        as_text = Outline(html).text
        assert all(sentence["sentence"] in as_text for sentence in msgspec.to_builtins(found.to_json())["causes"])

    def test_lines_to_paste_stand_there_to_the_letter(self) -> None:
        html = explanation_report(an_explanation())
        blocks = [Outline(each).text for each in re.findall(r"<pre [^>]*data-copy[^>]*>.*?</pre>", html, re.DOTALL)]
        assert blocks == ["batch_size = 4\nx = 1", "tightfit train train.py --loss=chunked"]

    def test_bars_follow_each_other_up_to_what_did_not_fit(self) -> None:
        html = explanation_report(an_explanation())
        memory = html.partition('<section id="memory"')[2].partition("</section>")[0]
        spans = [
            (float(start), float(width)) for start, width in re.findall(r"left: ([\d.]+)%; width: ([\d.]+)%", memory)
        ]
        assert len(spans) == 7, "others, outside, three categories, the cache, the request"
        for (start, width), (following, _) in pairwise(spans):
            assert following == pytest.approx(start + width, abs=0.02)
        assert sum(spans[-1]) == pytest.approx(100, abs=0.02)
        (limit,) = set(re.findall(r'class="limit" style="left: ([\d.]+)%"', memory))
        sizes = 3 + 1 + 4 + 1 + 1 / 1024 + 224.9 / 1024 + 6.14
        assert float(limit) == pytest.approx(100 * 12 / sizes, abs=0.01)

    def test_fixes_are_drawn_against_the_card(self) -> None:
        html = explanation_report(an_explanation())
        table = html.partition('class="barred toned"')[2].partition("</table>")[0]
        whole = (3 + 24) / 100
        expected = [(3, "others"), (5, "good"), (3, "others"), (6, "good"), (3, "others"), (24, "alarm")]
        found = re.findall(r"width: ([\d.]+)%; background-color: var\(--(\w+)\)", table)
        assert [(round(float(width) * whole, 1), colour) for width, colour in found] == expected

    def test_parts_of_nothing_are_left_out_and_a_small_one_is_no_zero(self) -> None:
        table = parts_table(
            "a", [Part("x", GIB, "--c"), Part("y", 0, "--c"), Part("z", 9, "--c")], 2 * GIB, words("en")
        )
        assert table.rows == [["x", "1.00 GiB", "50.0%"], ["z", "9 bytes", "< 0.1%"]]
        assert table.limit == 1

    @pytest.mark.parametrize("lang", LANGUAGES)
    def test_less_known_is_less_said(self, lang: str) -> None:
        said = explain_words(lang)
        for log, words_, sections in (
            (
                PLAIN_LOG,
                said("expected", "unchecked_elsewhere"),
                {"problem", "memory", "cause", "fixes", "expected", "arithmetic"},
            ),
            ("torch.OutOfMemoryError: CUDA out of memory.", said("causes", "unstated"), {"problem", "cause", "fixes"}),
            (
                "step 10\nKilled\n",
                kind_words(lang)("problem", "host_killed"),
                {"problem", "cause", "fixes", "expected"},
            ),
            ("iter 0: loss 3.0\n", kind_words(lang)("nothing", "nothing", evidence=""), set()),
            ("", kind_words(lang)("nothing", "empty", evidence=""), set()),
        ):
            seen = Outline(explanation_report(explain(log, lang=lang)))
            assert words_ in seen.text
            assert sections <= {each["id"] for each in seen.all("section") if "id" in each}

    def test_a_log_cannot_bring_tags_or_script(self) -> None:
        for found in (explain(EVIL_LOG), an_explanation(EVIL_LOG, text="<script>alert(3)</script>")):
            assert found.facts is not None
            assert any("<script>" in frame.file for frame in found.facts.frames)
            seen = Outline(explanation_report(found))
            assert len(seen.all("script")) == 1, "the one that copies"
            assert "<script>alert(1)</script>" in seen.text
            assert not seen.all("img")


class TestExplainCommand:
    def test_it_writes_the_page_beside_the_text(self, tmp_path: Path) -> None:
        (tmp_path / "oom.log").write_text(EVIL_LOG)
        for lang in LANGUAGES:
            page = tmp_path / f"{lang}.html"
            done = here(["explain", tmp_path / "oom.log", "--lang", lang, "--html", page])
            assert (done.code, done.err) == (0, "")
            assert done.out.startswith(explain_words(lang)("titles", "problem"))
            html = page.read_text(encoding="utf-8")
            assert f'<html lang="{lang}">' in html
            assert "6.14 GiB" in Outline(html).text
        done = here(["explain", tmp_path / "oom.log", "--json", f"--html={tmp_path / 'json.html'}"])
        assert json.loads(done.out)["kind"] == "cuda_out_of_memory"
        assert (tmp_path / "json.html").exists()

    def test_a_place_where_nothing_can_be_written_is_told_first(self, tmp_path: Path) -> None:
        for page, words_ in ((tmp_path / "absent" / "a.html", "there is no folder"), (tmp_path, "it is a folder")):
            done = here(["explain", tmp_path / "no log, which is never read", "--html", page])
            assert (done.code, done.out) == (2, "")
            assert words_ in done.err


class TestTrainCommand:
    def test_the_page_is_written_when_training_ends(self, data_dir: Path, tmp_path: Path) -> None:
        page = tmp_path / "page.html"
        done = here([*arguments(tmp_path / "out", data_dir), "--html", page])
        assert (done.code, done.err) == (0, "")
        assert re.fullmatch(r".*page\.html: \d+ kB; open it in a browser", done.out.splitlines()[-1])
        html = page.read_text(encoding="utf-8")
        assert data_of(html)["charts"].keys() == {"loss", "rate", "memory"}
        assert "page.html" not in html, "it is no key of the configuration"

    def test_what_the_plan_predicted_is_beside_what_was_measured(self, tmp_path: Path) -> None:
        told = {"step": 0, "event": "plan", "predicted_peak_bytes": 2 * GIB, **SETTINGS}
        run = read_run(a_run(tmp_path / "run", extra=(told,)))
        assert run.predicted == [(0, 2 * GIB)]
        assert not run.events, "it is no trouble"
        html = run_report(tmp_path / "run")
        series = data_of(html)["charts"]["memory"]["series"]
        assert [each["key"] for each in series] == ["memory_bytes", "memory_peak_bytes", "predicted"]
        assert (series[-1]["x"], series[-1]["y"]) == ([0, 39], [2 * GIB, 2 * GIB])
        assert "+92.7% against what was measured" in Outline(html).text

    @pytest.mark.filterwarnings("ignore")
    def test_a_run_that_ended_for_want_of_memory(
        self, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tightfit.trainer import loop

        def fail(*_: object) -> None:
            a_run(tmp_path / "out")
            (tmp_path / "out" / "metrics.jsonl").write_text("")
            raise MemoryError("Unable to allocate 6.14 GiB for an array with shape (65536, 50304)")

        monkeypatch.setattr(loop, "train", fail)
        done = here([*arguments(tmp_path / "out", data_dir), f"--html={tmp_path / 'page.html'}"])
        assert done.code == 1
        text = Outline((tmp_path / "page.html").read_text(encoding="utf-8")).text
        assert words("en")("run", "failed") in text
        assert re.search(r"n_embd\s+32\s", text), "no checkpoint tells it"
        assert "Why it ended" in text
        assert "6.14 GiB" in text
        with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
            file.write('{"step": 99, "loss": 1.0}\n')
        os.utime(tmp_path / "out" / "explanation.txt", (1, 1))
        assert "Why it ended" not in run_report(tmp_path / "out"), "it has gone on since"

    def test_a_run_that_ended_so_before_its_first_step(self, tmp_path: Path) -> None:
        (tmp_path / "explanation.txt").write_text(f"問題\n{EVIL}", encoding="utf-8")
        for metrics in (None, ""):
            if metrics is not None:
                (tmp_path / "metrics.jsonl").write_text(metrics)
                os.utime(tmp_path / "metrics.jsonl", (1, 1))
            seen = Outline(run_report(tmp_path))
            assert "Training ended for want of memory." in seen.text
            assert EVIL.replace("\u2028", "") in seen.text.replace("\u2028", "")
            assert not seen.all("figure")

    def test_a_run_before_is_not_shown_for_one_that_did_not_begin(
        self, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tightfit.trainer import loop

        def refuse(*_: object) -> None:
            raise DataError("there is no text")

        monkeypatch.setattr(loop, "train", refuse)
        done = here([*arguments(a_run(tmp_path / "out"), data_dir), "--html", tmp_path / "page.html"])
        assert (done.code, done.err) == (2, "tightfit: there is no text\n")
        assert not (tmp_path / "page.html").exists()

    def test_the_supervisor_writes_it_and_the_child_does_not(
        self, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: list[str] = []

        def run(words_: list[str], _config: object) -> int:
            given.extend(words_)
            a_run(tmp_path / "out")
            return 137

        monkeypatch.setattr(train_command, "supervise", run)
        done = here([*arguments(tmp_path / "out", data_dir, supervise=True), "--html", tmp_path / "page.html"])
        assert done.code == 137
        assert not any("html" in word for word in given)
        assert done.out.count("open it in a browser") == 1

    @pytest.mark.slow
    def test_supervised_for_real(self, data_dir: Path, tmp_path: Path) -> None:
        words_ = arguments(tmp_path / "out", data_dir, supervise=True)
        done = process([*words_, "--html", tmp_path / "page.html"])
        assert (done.code, done.err) == (0, "")
        assert done.out.count("open it in a browser") == 1
        assert "memory" in data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["charts"]

    def test_one_process_of_several_writes(
        self, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(train_command, "_run", lambda *_: 0)
        a_run(tmp_path / "out")
        for rank, is_written in (("1", False), ("0", True)):
            monkeypatch.setenv("RANK", rank)
            assert here([*arguments(tmp_path / "out", data_dir), "--html", tmp_path / "page.html"]).code == 0
            assert (tmp_path / "page.html").exists() == is_written

    def test_mistakes_are_told_before_training(self, data_dir: Path, tmp_path: Path) -> None:
        for page, words_ in (
            (["--html"], "--html needs a value; write --html=page.html"),
            (["--html="], "--html needs a value; write --html=page.html"),
            (["--html", str(tmp_path / "absent" / "page.html")], "there is no folder"),
        ):
            done = here([*arguments(tmp_path / "out", data_dir), *page])
            assert (done.code, done.out) == (2, "")
            assert words_ in done.err
        assert not (tmp_path / "out").exists()
        options, rest = train_command.parser().read(["a.py", "--html", "x", "--lr=1", "--html=y"])
        assert (options.html, rest) == ("y", ["a.py", "--lr=1"])

    def test_a_disk_that_fails_at_the_end_changes_no_exit_code(
        self, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(train_command, "_run", lambda *_: 0)
        done = here([*arguments(tmp_path / "out", data_dir), "--html", tmp_path / "page.html"])
        assert done.code == 0
        assert re.fullmatch(r"tightfit: --html: .* is not a folder[^\n]*\n", done.err)


def pages() -> Iterator[tuple[str, str]]:
    timeline = {**a_timeline(), "tensors": [tensor(0, None, MIB, function=EVIL, operator=EVIL, dtype=EVIL, file=EVIL)]}
    evil = findings(timeline, notes=[EVIL], stopped_because=EVIL, not_modelled=[EVIL])
    largest = msgspec.structs.replace(evil.largest[0], function=EVIL, operator=EVIL, file=EVIL)
    evil = msgspec.structs.replace(evil, gpu=msgspec.structs.replace(evil.gpu, name=EVIL), largest=[largest])
    for lang in LANGUAGES:
        yield lang, findings_report(evil, lang=lang)
        yield lang, plan_report(a_plan(note=EVIL, category=EVIL), lang=lang)
        yield lang, explanation_report(an_explanation(EVIL_LOG, lang, EVIL))
        yield lang, explanation_report(explain(EVIL_LOG, lang=lang))
        yield lang, explanation_report(explain("all is well", lang=lang))


@pytest.fixture(scope="module")
def all_pages(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    evil = (
        {"step": 3, "event": EVIL, EVIL: EVIL},
        {"step": 0, "event": "config", "config": {EVIL: EVIL, "x": [EVIL]}},
    )
    folder = a_run(tmp_path_factory.mktemp("evil") / "run<b>&", extra=evil)
    return [*pages(), *((lang, run_report(folder, lang=lang)) for lang in LANGUAGES)]


class TestPage:
    def test_nothing_that_is_shown_can_run(self, all_pages: list[tuple[str, str]]) -> None:
        for _, html in all_pages:
            seen = Outline(html)
            assert not seen.all("img")
            assert len(seen.all("script")) in (0, 1, 3)
            assert all(name[:2] != "on" for _, attributes in seen.tags for name in attributes)
            assert "49" not in re.findall(r"alert\(2\)>.{0,4}49", html)
            if "charts" in html and seen.all("script"):
                json.loads(seen.scripts[1])

    def test_nothing_is_loaded(self, all_pages: list[tuple[str, str]]) -> None:
        for _, html in all_pages:
            seen = Outline(html)
            for _, attributes in seen.tags:
                assert "src" not in attributes
                assert attributes.get("href", "#").startswith(("#", "data:")), attributes
            (policy,) = (each["content"] for each in seen.all("meta") if each.get("http-equiv"))
            assert policy.startswith("default-src 'none'")
            assert "url(" not in html.partition("<body>")[0]
            assert "@import" not in html

    def test_landmarks_headings_and_names(self, all_pages: list[tuple[str, str]]) -> None:
        for lang, html in all_pages:
            seen = Outline(html)
            assert seen.all("html") == [{"lang": lang}]
            for landmark in ("header", "main", "footer", "h1", "title"):
                assert len(seen.all(landmark)) == 1, landmark
            names = [each["id"] for _, each in seen.tags if "id" in each]
            assert len(names) == len(set(names))
            for section in seen.all("section"):
                assert section.get("aria-label") or section["aria-labelledby"] in names
            assert len(seen.all("table")) == len(seen.all("caption"))
            assert len(seen.all("figure")) == len(seen.all("details")) - bool(seen.all("figure"))
            for block in seen.all("pre"):
                assert block.get("aria-labelledby", names[0]) in names
            assert all("scope" in each for each in seen.all("th"))
            for link in seen.all("a"):
                assert link["href"][1:] in names

    def test_the_licence_of_the_charts_goes_with_them(self, all_pages: list[tuple[str, str]]) -> None:
        folder = files("tightfit.report") / "vendor" / "uplot-1.6.32"
        licence = (folder / "LICENSE").read_text()
        assert "MIT License" in licence
        assert "v1.6.32" in (folder / "uPlot.iife.min.js").read_text()[:100]
        for _, html in all_pages:
            seen = Outline(html)
            assert not seen.all("figure") or "Copyright (c) 2022 Leon Sorokin" in seen.text

    def test_it_is_written_whole(self, tmp_path: Path) -> None:
        write("<p>\u635f\u5931", tmp_path / "a.html")
        write("<p>2", tmp_path / "a.html")
        assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
        assert (tmp_path / "a.html").read_text() == "<p>2"

    def test_names_that_are_not_text(self, tmp_path: Path) -> None:
        odd = findings({**a_timeline(), "tensors": [tensor(0, 9, 9, file="\udcff")]}, notes=["b\udcff"])
        write(findings_report(odd), tmp_path / "a.html")

    def test_control_characters_are_not_shown(self) -> None:
        html = findings_report(findings(notes=["a\x1b[31m\x9bb\u202ec\td\ne"]))
        assert "a[31mbc\td\ne" in html


class TestWords:
    def test_both_languages_say_the_same_with_the_same_fields(self) -> None:
        english, japanese = (dict(words(lang).sentences()) for lang in LANGUAGES)
        assert english == japanese

    def test_japanese_is_japanese(self) -> None:
        for key, _ in words("ja").sentences():
            table, _, name = key.partition(".")
            text = words("ja").table(table)[name]
            assert re.search("[぀-ヿ一-鿿]", text) or key in ("page.separator", "outcome.card"), key

    def test_every_sentence_is_used(self) -> None:
        source = "".join(
            path.read_text(encoding="utf-8")
            for path in Path(str(files("tightfit.report"))).rglob("*")
            if path.suffix in (".py", ".html", ".js") and "vendor" not in path.parts
        )
        by_name = ("outcome.", "event.", "phase.", "category.", "plan_column.", "series.")
        for key, _ in words("en").sentences():
            name = key.partition(".")[2]
            assert key.startswith(by_name) or f'"{name}"' in source or f"words.{name}" in source, key

    def test_every_category_and_phase_has_a_word(self) -> None:
        for lang in LANGUAGES:
            assert words(lang).table("category").keys() == CATEGORY_COLOURS.keys()
            assert words(lang).table("phase").keys() >= PHASE_COLOURS.keys()

    @pytest.mark.parametrize(
        ("environ", "expected"),
        [({"LANG": "ja_JP.UTF-8"}, "ja"), ({"LANG": "ja_JP.UTF-8", "LC_ALL": "C"}, "en"), ({"LANG": "de_DE"}, "en")],
    )
    def test_the_language_of_the_locale(self, environ: dict, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        assert locale_language() == expected


class TestCommand:
    def test_it_writes_beside_the_metrics(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LC_ALL", "ja_JP.UTF-8")
        run = a_run(tmp_path / "run")
        done = here(["report", str(run)])
        assert (done.code, done.err) == (0, "")
        assert re.fullmatch(r".*report\.html: \d+ kB。ブラウザーで開いてください\n", done.out)
        assert '<html lang="ja">' in (run / "report.html").read_text(encoding="utf-8")

    def test_with_a_dry_run_and_a_plan(self, tmp_path: Path) -> None:
        run = a_run(tmp_path / "run")
        (tmp_path / "dry.json").write_bytes(msgspec.json.encode(findings(a_timeline())))
        (tmp_path / "plan.json").write_text(json.dumps({"predicted_peak_bytes": GIB}))
        words_ = ["--dryrun", str(tmp_path / "dry.json"), "--plan", str(tmp_path / "plan.json"), "--lang", "en"]
        done = here(["report", str(run), *words_, "--out", str(tmp_path / "r.html")])
        assert done.code == 0, done.err
        charts = data_of((tmp_path / "r.html").read_text(encoding="utf-8"))["charts"]
        assert charts.keys() == {"loss", "rate", "memory", "timeline"}

    def test_reading_a_run_needs_no_torch(self, tmp_path: Path) -> None:
        import subprocess
        import sys

        script = (
            "import sys; from tightfit.report.html import run_report;"
            f"run_report({str(a_run(tmp_path / 'run'))!r}); assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", script], check=True)

    def test_a_run_is_read_in_the_order_of_its_steps(self, tmp_path: Path) -> None:
        rows = [{"step": step, "loss": float(step)} for step in (3, 1, 2, 1)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert read_run(tmp_path).curves["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
