"""Times and peaks of the processes of a run: who is slow is named, and the report shows all of them."""

import json
import textwrap
from pathlib import Path

import pytest
from runs import arguments, ended, here, torchrun

from tightfit.report.runs import read_run
from tightfit.trainer.distributed import World
from tightfit.trainer.events import Event, RanksEvent, StragglerEvent
from tightfit.trainer.metrics import Stopwatch
from tightfit.trainer.ranks import Ranks, stragglers
from tightfit.units import GIB


class Three(World):
    """The first of three processes on two machines."""

    def all(self, value: object) -> list:  # type: ignore[type-arg,override]
        return ["one", "one", "two"]


class TestRanks:
    def test_one_process_has_none(self) -> None:
        ranks = Ranks(World(), print, lambda step, event: pytest.fail("nothing to tell"))
        assert ranks.parts(10.0, 5) == []
        ranks.note(0, [])

    def test_the_sum_of_all_parts_is_a_line(self) -> None:
        events: list[Event] = []
        ranks = Ranks(Three(1, 3), print, lambda step, event: events.append(event))
        assert ranks.parts(7.5, GIB) == [0.0, 7.5, 0.0, 0.0, float(GIB), 0.0]
        ranks.note(4, [1.0, 7.5, 2.0, GIB, GIB, 2 * GIB])
        expected = RanksEvent(own_ms=[1.0, 7.5, 2.0], peak_bytes=[GIB, GIB, 2 * GIB], hosts=["one", "one", "two"])
        assert events == [expected]

    def test_one_that_is_slow_for_a_while_is_named_once(self) -> None:
        lines: list[str] = []
        events: list[Event] = []
        ranks = Ranks(Three(0, 3), lines.append, lambda step, event: events.append(event))
        for step in range(30):
            ranks.note(step, [100.0, 110.0, 180.0, 1, 1, 1])
        (line,) = lines
        assert line.startswith("process 2 on two is slow: a step takes it 180 ms without waiting, the others 105 ms")
        (named,) = [each for each in events if isinstance(each, StragglerEvent)]
        assert (named.rank, named.host) == (2, "two")

    def test_a_slow_moment_is_no_straggler(self) -> None:
        assert stragglers([[10.0, 11.0], [10.0, 99.0], [10.0, 11.0], [10.0, 12.0]]) == []
        assert stragglers([[10.0, 10.0, 16.0]] * 10) == [2]
        assert stragglers([[10.0, 10.0, 14.0]] * 10) == []


def test_time_without_waiting() -> None:
    waited = [3.0]
    watch = Stopwatch(lambda: waited[0])
    watch.restart(0)
    waited[0] += 1000.0
    ms, own_ms = watch.lap(2)
    assert ms > 0.0
    assert own_ms == 0.0  # it cannot have waited longer than it ran


class TestReport:
    def lines(self, folder: Path, *rows: dict[str, object]) -> Path:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def row(self, step: int, own_ms: list[float], hosts: list[str], peak: int = GIB) -> dict[str, object]:
        peaks = [peak] * len(hosts)
        return {"step": step, "event": "ranks", "own_ms": own_ms, "peak_bytes": peaks, "hosts": hosts}

    def test_median_and_highest(self, tmp_path: Path) -> None:
        rows = [self.row(step, [10.0 + step, 20.0], ["one", "two"], (2 - step % 2) * GIB) for step in range(3)]
        alone = self.row(0, [5.0], ["one"])
        run = read_run(self.lines(tmp_path, alone, *rows, {"step": 3, "loss": 1.0}))
        assert [(each.host, each.own_ms, each.peak_bytes) for each in run.ranks] == [
            ("one", 11.0, 2 * GIB),
            ("two", 20.0, 2 * GIB),
        ]
        assert run.events == []

    @pytest.mark.parametrize("broken", [{"hosts": 3}, {"own_ms": [1.0]}, {"peak_bytes": ["a", "b"]}, {"own_ms": None}])
    def test_lines_that_are_not_whole_are_left_out(self, tmp_path: Path, broken: dict[str, object]) -> None:
        row = self.row(0, [1.0, 2.0], ["one", "two"]) | broken
        assert read_run(self.lines(tmp_path, row, {"step": 3, "loss": 1.0})).ranks == []

    def test_it_has_a_table(self, tmp_path: Path) -> None:
        self.lines(tmp_path, self.row(0, [10.0, 25.0], ["one", "two"]), {"step": 0, "loss": 1.0})
        done = here(["report", tmp_path])
        assert done.code == 0, done.err
        page = (tmp_path / "report.html").read_text()
        assert "own time of a step" in page
        assert "25.0 ms" in page
        assert "2.50" in page


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["full", "none"])
def test_a_slow_process_of_two(tmp_path: Path, data_dir: Path, shard: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""\
        import os, sys, time
        from tightfit.cli.main import main
        from tightfit.trainer import loop

        usual = loop._Run._train_step

        def step(run):
            if os.environ["RANK"] == "1":
                time.sleep(0.5)
            return usual(run)

        loop._Run._train_step = step
        sys.exit(main())
        """)
    )
    keys = {"max_iters": 14, "log_interval": 1, "fit": "off", "shard": shard}
    done = ended(torchrun(2, [str(program), *arguments(tmp_path / "out", data_dir, **keys)]))
    assert done.code == 0, done.err
    assert done.out.count("process 1 on ") == 1
    assert "is slow: a step takes it" in done.out
    first, second = read_run(tmp_path / "out").ranks
    assert second.own_ms > 500.0 > 2 * first.own_ms
    assert min(first.peak_bytes, second.peak_bytes) > 50 * 2**20
