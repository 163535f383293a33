"""watch: what it shows of several machines and of a run, as a picture, as lines and as CSV, and how it ends."""

import csv
import io
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import fake_nvml
import pytest
from fake_nvml import MIB
from rich.cells import cell_len
from rich.console import Console
from runs import arguments, command, environment, here, process

from tightfit.errors import ConfigError
from tightfit.storage import METRICS
from tightfit.system import nvml
from tightfit.system.nvml import NvmlSession
from tightfit.system.sampling import MetricsTail, Sample, samples
from tightfit.system.watch import CsvLog, watch
from tightfit.system.watch_view import frame, plain_line, sparkline
from tightfit.wording.system import LANGUAGES, words

ROW = {
    "step": 20, "loss": 3.25, "ms": 100.0, "tokens_per_s": 45_000.0, "lr": 1e-3,
    "memory_bytes": 6 * 2**30, "memory_peak_bytes": 7 * 2**30,
}  # fmt: skip


def write_rows(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / METRICS
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def history_of(
    monkeypatch: pytest.MonkeyPatch, name: str, folder: Path | None = None, count: int = 3
) -> "deque[Sample]":
    """Samples of a machine of `fake_nvml`, a second apart."""
    machine = fake_nvml.install(monkeypatch, fake_nvml.MACHINES[name]())
    monkeypatch.setattr(nvml, "spills_to_host", lambda: machine.wsl)
    with NvmlSession() as session:
        moments = samples(folder, session)
        found = [next(moments) for _ in range(count)]
    return deque(replace(each, time=found[0].time + timedelta(seconds=at)) for at, each in enumerate(found))


class TestPicture:
    @pytest.mark.parametrize("language", LANGUAGES)
    @pytest.mark.parametrize("width", [60, 80, 120])
    @pytest.mark.parametrize("machine", fake_nvml.MACHINES)
    def test_no_line_is_wider_than_the_terminal(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, width: int, language: str
    ) -> None:
        write_rows(tmp_path, ROW)
        history = history_of(monkeypatch, machine, tmp_path, count=100)
        picture = frame(history, words(language), interval_s=1, width=width, height=100)
        lines = picture.plain.split("\n")
        assert max(map(cell_len, lines)) <= max(width, cell_len(str(tmp_path)) + 20)
        assert "{" not in picture.plain

    def test_a_desktop_with_a_run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        write_rows(tmp_path, ROW)
        history = history_of(monkeypatch, "rtx3060", tmp_path)
        shown = frame(history, words("en"), interval_s=1, width=100, height=100).plain
        assert "GPU 0  NVIDIA GeForce RTX 3060" in shown
        assert "41 °C  busy 3%" in shown
        assert "918.00 MiB of 12.00 GiB used" in shown  # Xorg's 600 and the driver's 318
        assert "Xorg (pid 1432) 600.00 MiB" in shown
        assert "step 20, loss 3.2500, 45.0K tokens/s" in shown
        assert "memory 6.00 GiB, peak 7.00 GiB" in shown
        assert shown.count("last 2.0s") == 3  # host, card and run

    def test_parts_of_a_card_and_what_is_not_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        history = history_of(monkeypatch, "two_a100_mig")
        shown = frame(history, words("en"), interval_s=1, width=100, height=100).plain
        assert "MIG 3g.20gb: 11.72 GiB of 19.50 GiB used" in shown
        assert "busy" not in shown
        history = history_of(monkeypatch, "wsl_laptop")
        assert "(pid 31), memory unknown" in frame(history, words("en"), interval_s=1, width=100, height=100).plain

    def test_a_low_terminal_gets_bars_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        history = history_of(monkeypatch, "two_a100_mig")
        low = frame(history, words("en"), interval_s=1, width=80, height=10).plain.split("\n")
        assert len(low) < 10
        assert sum("█" in line for line in low) == 3

    @pytest.mark.parametrize(("vendor", "said"), [("amd", "amd-smi shows them"), ("apple", "macOS does not report")])
    def test_other_makers(self, monkeypatch: pytest.MonkeyPatch, vendor: str, said: str) -> None:
        (sample,) = history_of(monkeypatch, "no_driver", count=1)
        shown = frame([replace(sample, vendors=frozenset({vendor}))], words("en"), interval_s=1, width=200, height=99)
        assert said in shown.plain

    def test_a_full_memory_is_a_full_bar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        history = history_of(monkeypatch, "rtx3060", count=1)
        (card,) = history[0].cards.cards
        full = replace(history[0], cards=replace(history[0].cards, cards=(replace(card, free_bytes=0),)))
        shown = frame([full], words("en"), interval_s=1, width=80, height=99)
        (bar,) = [line for line in shown.plain.split("\n") if "12.00 GiB of 12.00 GiB used" in line]
        assert "░" not in bar
        assert any(span.style == "red" for span in shown.spans)

    def test_sparkline_keeps_the_peaks(self) -> None:
        values = [0.1] * 1000
        values[537] = 1.0
        line = sparkline(values, 50)
        assert len(line) == 50
        assert line.count("█") == 1
        assert sparkline([], 10) == ""
        assert sparkline([-1, 2], 10) == "▁█"


class TestMetricsTail:
    def test_waits_then_follows(self, tmp_path: Path) -> None:
        tail = MetricsTail(tmp_path / METRICS)
        assert tail.read() is None
        path = write_rows(tmp_path, {"step": 0, "train_loss": 4.0, "val_loss": 4.0, "lr": 0.0})
        assert tail.read() is None  # an evaluation has no memory
        with path.open("a") as file:
            file.write(json.dumps(ROW) + "\n" + json.dumps(ROW | {"step": 21})[:20])
        found = tail.read()
        assert found is not None
        assert (found.step, found.loss, found.memory_bytes) == (20, 3.25, 6 * 2**30)
        assert found.allocated_bytes is None
        with path.open("a") as file:
            file.write(json.dumps(ROW | {"step": 21})[20:] + "\n")
        assert getattr(tail.read(), "step", None) == 21

    def test_a_resumed_run_replaces_the_file(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path, *({**ROW, "step": step} for step in range(50)))
        tail = MetricsTail(path)
        assert getattr(tail.read(), "step", None) == 49
        (tmp_path / "new").write_text(json.dumps(ROW | {"step": 7}) + "\n")
        os.replace(tmp_path / "new", path)
        assert getattr(tail.read(), "step", None) == 7

    def test_of_a_long_file_only_the_end_is_read(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path, *({**ROW, "step": step} for step in range(20_000)))
        assert path.stat().st_size > 2 * 2**20
        assert getattr(MetricsTail(path).read(), "step", None) == 19_999

    @pytest.mark.parametrize("line", ["[]", "null", '{"step": "x", "memory_bytes": 1}', "\x00\xff", '{"loss": 1}'])
    def test_what_is_no_step_is_passed_over(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / METRICS
        path.write_text(json.dumps(ROW) + "\n" + line + "\n")
        assert getattr(MetricsTail(path).read(), "step", None) == 20

    def test_a_run_that_diverged_is_shown(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path, ROW | {"loss": float("nan"), "memory_peak_bytes": None})
        found = MetricsTail(path).read()
        assert found is not None
        assert found.loss is not None
        assert math.isnan(found.loss)
        assert found.peak_bytes is None

    def test_the_file_is_the_one_that_training_writes(self, tmp_path: Path, data_dir: Path) -> None:
        assert here(arguments(tmp_path / "out", data_dir, max_iters=3)).code == 0
        found = MetricsTail(tmp_path / "out" / METRICS).read()
        assert found is not None
        assert found.step == 2
        assert found.memory_bytes
        assert found.peak_bytes
        assert found.peak_bytes >= found.memory_bytes


class TestCsv:
    def test_rows_of_host_cards_and_run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        write_rows(tmp_path / "out", ROW)
        (sample,) = history_of(monkeypatch, "rtx3060", tmp_path / "out", count=1)
        log = CsvLog(tmp_path / "log.csv")
        log.write(sample)
        with (tmp_path / "log.csv").open(newline="") as file:  # not closed yet: every row is there at once
            found = list(csv.DictReader(file))
        log.close()
        assert [row["device"] for row in found] == ["host", "gpu0", "run"]
        assert all(datetime.fromisoformat(row["time"]) for row in found)
        assert int(found[1]["used_bytes"]) == 918 * MIB
        assert int(found[1]["others_bytes"]) == 600 * MIB
        assert (found[1]["temperature_c"], found[1]["utilisation"]) == ("41", "0.03")
        assert (found[2]["step"], found[2]["loss"], found[2]["allocated_bytes"]) == ("20", "3.25", "")

    def test_a_second_watch_appends(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (sample,) = history_of(monkeypatch, "rtx3060", count=1)
        for _ in range(2):
            log = CsvLog(tmp_path / "log.csv")
            log.write(sample)
            log.close()
        lines = (tmp_path / "log.csv").read_text().splitlines()
        assert [line.startswith("time,") for line in lines] == [True, False, False, False, False]

    def test_another_file_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "notes.csv").write_text("mine\n")
        with pytest.raises(ConfigError, match="exists and is not a log of watch"):
            CsvLog(tmp_path / "notes.csv")
        assert (tmp_path / "notes.csv").read_text() == "mine\n"
        with pytest.raises(ConfigError, match="cannot be written"):
            CsvLog(tmp_path / "nowhere" / "log.csv")

    @pytest.mark.skipif(sys.platform != "linux", reason="ulimit -f")
    def test_a_full_disk_is_one_sentence(self, tmp_path: Path) -> None:
        """In place of a full disk: a limit of 1 KiB on the size of files."""
        words_ = " ".join(command(["watch", "--interval", "0.1", "--log", tmp_path / "log.csv"]))
        done = subprocess.run(
            ["bash", "-c", f"ulimit -f 1; exec {words_}"],
            env=environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert re.fullmatch(r"tightfit: --log=\S+ cannot be written any more \(File too large\); .*\n", done.stderr)
        with (tmp_path / "log.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) >= 5


class TestLoop:
    def test_lines_until_interrupted_with_nvml_started_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = fake_nvml.install(monkeypatch, fake_nvml.rtx3060())
        out, before = io.StringIO(), signal.getsignal(signal.SIGINT)
        threading.Timer(0.35, os.kill, (os.getpid(), signal.SIGINT)).start()
        console = Console(file=out, highlight=False)
        watch(None, interval_s=0.1, once=False, log=None, console=console, words=words("en"))
        assert signal.getsignal(signal.SIGINT) is before
        lines = out.getvalue().splitlines()
        assert 2 <= len(lines) <= 5
        assert all("GPU 0 918.00 MiB / 12.00 GiB, 41 °C, busy 3%" in line for line in lines)
        assert machine.asked == 1

    def test_a_card_that_comes_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = fake_nvml.install(monkeypatch, fake_nvml.mismatch())
        with NvmlSession() as session:
            moments = samples(None, session)
            assert next(moments).cards.failure
            machine.init_error, machine.cards = None, fake_nvml.rtx3060().cards
            assert next(moments).cards.cards

    def test_a_line_is_one_line_in_both_languages(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for language in LANGUAGES:
            (sample,) = history_of(monkeypatch, "rtx3060", tmp_path / "none", count=1)
            line = plain_line(sample, words(language))
            assert "\n" not in line
            assert str(tmp_path / "none" / METRICS) in line


class TestCommand:
    def test_once(self, tmp_path: Path) -> None:
        done = process(["watch", tmp_path, "--once", "--log", tmp_path / "log.csv"])
        assert (done.code, done.err) == (0, "")
        assert f"waiting for the first step in {tmp_path / METRICS}" in done.out
        assert re.search(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", done.out, flags=re.M)
        assert (tmp_path / "log.csv").read_text().startswith("time,device,")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_it_cleanly(self, tmp_path: Path, number: signal.Signals) -> None:
        """In a pipe: a line each interval, the log whole."""
        words_ = command(["watch", tmp_path, "--interval", "0.1", "--log", tmp_path / "log.csv"])
        running = subprocess.Popen(words_, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert running.stdout is not None
        for _ in range(3):
            assert running.stdout.readline()
        running.send_signal(number)
        out, err = running.communicate(timeout=20)
        assert (running.returncode, err) == (0, "")
        assert "Traceback" not in out
        with (tmp_path / "log.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) >= 2

    def test_on_a_terminal(self, tmp_path: Path) -> None:
        """A live picture that is drawn anew, and the cursor back at the end."""
        write_rows(tmp_path, ROW)
        ours, theirs = pty.openpty()
        size = {"COLUMNS": "100", "LINES": "40", "TERM": "xterm-256color"}
        running = subprocess.Popen(
            command(["watch", tmp_path, "--interval", "0.1", "--lang", "ja"]),
            env=environment() | size, stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        until = time.monotonic() + 20
        while shown.count("ステップ 20".encode()) < 3 and time.monotonic() < until:
            shown += os.read(ours, 4096)
        running.send_signal(signal.SIGINT)
        while True:
            try:
                more = os.read(ours, 4096)
            except OSError:  # Linux's way to say that the other side has closed
                break
            if not more:
                break
            shown += more
        os.close(ours)
        assert running.wait(timeout=20) == 0
        text = shown.decode()
        assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
        assert "メモリー 6.00 GiB、最大 7.00 GiB" in text
        assert "Traceback" not in text

    @pytest.mark.parametrize(
        ("arguments_", "said"),
        [
            (["--interval", "0"], "--interval must be from 0.1 to 3600 seconds, got 0"),
            (["--interval", "nan"], "--interval must be from 0.1 to 3600 seconds, got nan"),
            ([__file__], "is a file; name the folder of a run, its out_dir"),
            (["--lang", "fr", "--once"], "--lang must be one of en, ja, got 'fr'"),
            (["--once", "--log", "/nowhere/log.csv"], "--log=/nowhere/log.csv cannot be written"),
        ],
    )
    def test_mistakes(self, arguments_: list[str], said: str) -> None:
        done = here(["watch", *arguments_])
        assert done.code == 2
        assert said in done.err
        assert done.err.count("\n") == 1

    def test_help_comes_without_torch(self) -> None:
        program = (
            "import sys; from tightfit.cli.main import main\n"
            "for words in (['watch', '--help'], ['doctor', '--help'], ['watch', '--once']):\n"
            "    try: main(words)\n"
            "    except SystemExit as end: assert not end.code\n"
            "assert 'torch' not in sys.modules\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment(), check=True, capture_output=True, text=True, timeout=60
        )
        assert "example: tightfit watch" in done.stdout
