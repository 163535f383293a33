"""Attack runs whose model is spread over processes, and count losses, hangs and wrong ends.

    python benchmarks/recovery/shards.py --seed 0 --write

`kills`: a run is killed, resumed by 1, 2, 3 or 4 processes in turn and with another sharding, and killed again; parts
of checkpoints are cut, disks are full. `same`: the same with as many processes each time; its end has the same bits.
`errors`: out-of-memory errors at random operators of one rank. `losses`: one rank gets SIGKILL or SIGSTOP, the others
must end and torchrun restart all. `agents`: two torchrun agents of one run on loopback, one of which is lost and comes
back. Each prints what it found; `--write` adds it to results/shards.json.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from failures import at_random
from forked import Forked, ranks
from runs import arguments, column, environment, make_dataset

from tightfit.cli.main import main as main_of_tightfit
from tightfit.errors import CheckpointError
from tightfit.trainer.parts import in_memory
from tightfit.trainer.stored import has_checkpoint, load, load_newest

RESULTS = Path(__file__).parent / "results" / "shards.json"
KEYS: dict[str, Any] = {
    "batch_size": 6,
    "gradient_accumulation_steps": 2,
    "micro_batch": 2,
    "max_iters": 40,
    "lr_decay_iters": 40,
    "eval_interval": 20,
    "eval_iters": 2,
    "save_interval": 3,
    "fit": "off",
    "compile": False,
}
HANG_S = 90.0
"""Seconds without a line of its log after which a run counts as one that waits for ever."""
NOTICED_S = 5.0
"""Seconds of a step after which the watchdog looks who stopped, in place of its usual 300."""
SHARDINGS = ("full", "optimizer")
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torch 2.13: without it, an agent that stays rank 0 does not publish its address again, and new ones wait in vain."""


@dataclass
class Found:
    """Result of an attack."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Seconds from a loss to its end, where it is timed."""
    end: float = 0.0
    """Time at which no further trial begins."""

    def goes_on(self, done: int, count: int) -> bool:
        """Return True if another trial is to begin, and print what was found so far."""
        print(dict(self.counts), file=sys.stderr, flush=True)
        return done < count and len(self.problems) < 5 and time.monotonic() < self.end

    def problem(self, text: str) -> None:
        self.problems.append(text)
        print("PROBLEM", text, file=sys.stderr, flush=True)


@dataclass
class Started:
    """Processes of one run and what started them: torchrun, or a fork."""

    running: "subprocess.Popen[bytes] | Forked"
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = HANG_S) -> bool:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.running.poll() is None and text not in self.text():
            time.sleep(0.02)
        return text in self.text()

    def ended(self) -> int | None:
        """Return the exit code; None for a run that hangs, which is then killed."""
        while True:
            try:
                return self.running.wait(1.0)
            except subprocess.TimeoutExpired:
                if time.time() - self.log.stat().st_mtime > HANG_S:
                    self.kill()
                    return None

    def kill(self) -> None:
        """Kill the agent and its processes, which have process groups of their own, at one moment."""
        with_children = [psutil.Process(self.running.pid)]
        with_children += with_children[0].children(recursive=True)
        for each in with_children:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.running.wait()

    def rank(self, rank: int) -> int | None:
        """Return the process id of a rank of this agent."""
        for each in psutil.Process(self.running.pid).children(recursive=True):
            try:
                if each.environ().get("RANK") == str(rank):
                    return each.pid
            except psutil.Error:
                continue
        return None


def start(processes: int, program: list[str], log: Path, *launch: str) -> Started:
    """Start a run with torchrun."""
    words = ["-m", "torch.distributed.run", *launch, f"--nproc_per_node={processes}", *program]
    with open(log, "wb") as file:
        running = subprocess.Popen(
            [sys.executable, *words],
            env={**environment(), **(OWN_STORE if "--nnodes=1:2" in launch else {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Started(running, log)


def forked(
    processes: int,
    words: list[str],
    log: Path,
    *,
    refused: tuple[int, int] | None = None,
    file_bytes: int | None = None,
) -> Started:
    """Fork the processes of a run without torchrun, which loads torch in each of them.

    `refused` (rank, seed) refuses allocations of a rank; `file_bytes` makes its disk full for any larger file.
    """
    log.write_bytes(b"")

    def train() -> int:
        torch.set_num_threads(1)
        if file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        if refused is None or os.environ["RANK"] != str(refused[0]):
            return main_of_tightfit(words)
        with at_random(refused[1], 60, spared=12000, allocating_only=True) as failing:
            code = main_of_tightfit(words)
        print("FAILED", json.dumps(failing.failed), flush=True)
        return code

    return Started(Forked(lambda: ranks(processes, train), log), log)


def unbroken(folder: Path, processes: int = 1, **keys: Any) -> Path:
    """Make the run that nothing disturbs."""
    make_dataset(folder / "data" / "tiny")
    out_dir = folder / "unbroken"
    words = arguments(out_dir, folder / "data", **KEYS | keys)
    code = forked(processes, words, folder / "unbroken.log").ended()
    assert code == 0, (folder / "unbroken.log").read_text()
    return out_dir


def difference(one: Path, other: Path) -> float:
    """Return the largest relative difference of weights and moments at the end of two runs, 0 for the same bits."""
    first, second = (in_memory(load_newest(folder, log=lambda line: None)) for folder in (one, other))
    assert first.step == second.step, f"steps {first.step} and {second.step}"
    largest = 0.0
    for name, tensor in first.model.items():
        scale = float(tensor.abs().max()) or 1.0
        largest = max(largest, float((tensor - second.model[name]).abs().max()) / scale)
    return largest


def losses_differ(one: Path, other: Path) -> float:
    """Return the largest relative difference of the losses of two runs, step by step."""
    largest = 0.0
    for name in ("loss", "val_loss"):
        first, second = column(one, name), column(other, name)
        assert first.keys() == second.keys(), f"{name}: {sorted(first.keys() ^ second.keys())}"
        largest = max([largest, *(abs(second[step] / first[step] - 1) for step in first)])
    return largest


def kills(found: Found, folder: Path, draw: random.Random, count: int) -> None:
    """Kill whole runs at random moments, and resume each with another number of processes and another sharding."""
    _killed(found, folder, draw, count, processes=(1, 2, 3, 4), shardings=SHARDINGS, reference=1)


def same(found: Found, folder: Path, draw: random.Random, count: int) -> None:
    """Kill and resume with as many processes and the same sharding: the end has the same bits."""
    _killed(found, folder, draw, count, processes=(2,), shardings=("full",), reference=2)


def _killed(
    found: Found,
    folder: Path,
    draw: random.Random,
    count: int,
    *,
    processes: tuple[int, ...],
    shardings: tuple[str, ...],
    reference: int,
) -> None:
    chain = 0
    expected = unbroken(folder, reference, shard="none" if reference == 1 else shardings[0])
    while found.goes_on(found.counts["kills"], count):
        chain += 1
        out_dir, turn = folder / f"chain{chain}", draw.randrange(4)
        while True:
            turn += 1
            number, shard = processes[turn % len(processes)], shardings[turn % len(shardings)]
            saved = has_checkpoint(out_dir)
            own = {"init_from": "resume" if saved else "scratch", "shard": "none" if number == 1 else shard}
            words = arguments(out_dir, folder / "data", **KEYS | own)
            last = found.counts["kills"] >= count or time.monotonic() > found.end
            small = None if last or draw.random() > 0.2 else draw.choice([32, 64]) << 10
            run = forked(number, words, folder / "log.txt", file_bytes=small)
            if not last and _killed_at_random(run, draw):
                found.counts["kills"] += 1
                found.counts[f"kills of {number} processes"] += 1
                found.counts["with a full disk"] += small is not None
                found.counts["with a cut part"] += draw.random() < 0.2 and _cut(out_dir, draw)
                continue
            code = run.ended()
            if code is None:
                found.problem(f"chain {chain}: a run of {number} processes waits for ever: {run.text()[-2000:]}")
                break
            if code == 0:
                found.counts["chains"] += 1
                _compare(found, f"chain {chain}", expected, out_dir, exact=len(processes) == 1)
                break
            if small is None:
                found.problem(f"chain {chain}: a run of {number} processes failed: {run.text()[-2000:]}")
                break


def _compare(found: Found, name: str, expected: Path, out_dir: Path, *, exact: bool) -> None:
    try:
        worst = difference(expected, out_dir)
        losses = losses_differ(expected, out_dir)
    except AssertionError as error:
        found.problem(f"{name}: {error}")
        return
    if worst > (0.0 if exact else 1e-3) or losses > (0.0 if exact else 1e-5):
        found.problem(f"{name}: weights differ by {worst:.2e}, losses by {losses:.2e}")
    found.counts["same bits at the end"] += worst == 0.0


def _killed_at_random(run: Started, draw: random.Random) -> bool:
    """Kill a run at a random moment of its training, or of a save; return False if it ended first."""
    kind = draw.random()
    if kind < 0.1:
        time.sleep(draw.uniform(0, 6))
    else:
        run.wait_for("parameters:")
        if kind < 0.5:
            time.sleep(draw.uniform(0, 3))
        else:  # while a checkpoint is written
            run.wait_for(f"iter {3 * draw.randrange(1, 12)}:", 20)
            time.sleep(draw.uniform(0, 0.15))
    if run.running.poll() is not None:
        return False
    run.kill()
    return True


def _cut(out_dir: Path, draw: random.Random) -> bool:
    """Cut a part of the newest checkpoint if an older one that is whole is left."""
    steps = {}
    for place in out_dir.glob("*.dcp"):
        with contextlib.suppress(CheckpointError):  # it was cut before
            steps[load(place).step] = place
    if len(steps) < 2:
        return False
    part = draw.choice([each for each in steps[max(steps)].iterdir() if each.suffix == ".distcp"])
    os.truncate(part, draw.randrange(part.stat().st_size))
    return True


def errors(found: Found, folder: Path, draw: random.Random, count: int) -> None:
    """Refuse allocations of one rank at random operators, under `full`: losses stay those of one process."""
    number = 0
    keys = {"eval_interval": 10, "save_interval": 7, "sample_at_end": 4, "max_iters": 60, "lr_decay_iters": 60}
    expected = unbroken(folder, **keys)
    while found.goes_on(found.counts["errors"], count):
        number += 1
        out_dir, refused = folder / f"out{number}", (draw.randrange(2), draw.randrange(10**6))
        words = arguments(out_dir, folder / "data", **KEYS | keys, shard="full")
        run = forked(2, words, folder / "log.txt", refused=refused)
        code = run.ended()
        text = run.text()
        if code is None:
            found.problem(f"run {number}, rank and seed {refused}: it waits for ever: {text[-2000:]}")
            continue
        failed = json.loads(re.findall(r"FAILED (.*)", text)[-1]) if "FAILED" in text else []
        found.counts["errors"] += len(failed)
        found.counts.update(f"in {phase}" for phase, _ in failed)
        found.counts["runs"] += 1
        if code:
            found.problem(f"run {number}, rank and seed {refused}: exit code {code}: {text[-3000:]}")
            continue
        try:
            worst = losses_differ(expected, out_dir)
        except AssertionError as error:
            found.problem(f"run {number}, rank and seed {refused}: {error}")
            continue
        if worst > 1e-5:
            found.problem(f"run {number}, rank and seed {refused}: losses differ by {worst:.2e}")
        shutil.rmtree(out_dir)


LOST = """\
import sys
from tightfit.cli.main import main
from tightfit.trainer import watchdog

watchdog.LEAST_S = watchdog.FIRST_S = {noticed}
sys.exit(main())
"""


def losses(found: Found, folder: Path, draw: random.Random, count: int) -> None:
    """Kill one rank, or stop it, two kills for each stop: all end in time, the line names it, torchrun restarts all."""
    expected, program = unbroken(folder, 2, shard="full"), folder / "program.py"
    program.write_text(LOST.format(noticed=NOTICED_S))
    for number in range(count):
        if not found.goes_on(number, count):
            break
        how = signal.SIGSTOP if number % 3 == 2 else signal.SIGKILL
        out_dir, rank = folder / f"out{number}", draw.randrange(2)
        words = [str(program), *arguments(out_dir, folder / "data", **KEYS, shard="full")]
        run = start(2, words, folder / "log.txt", "--standalone", "--max-restarts=1")
        run.wait_for(f"iter {draw.randrange(1, 35)}:")
        process = run.rank(rank)
        if process is None:
            run.kill()
            continue
        time.sleep(draw.uniform(0, 0.1))
        os.kill(process, how)
        lost_at = time.monotonic()
        if not run.wait_for("started this run's processes again", 60):
            found.problem(f"trial {number}: {how.name} of rank {rank} was not noticed: {run.text()[-2000:]}")
            run.kill()
            continue
        found.seconds.append(round(time.monotonic() - lost_at, 1))
        found.counts[how.name] += 1
        code, text = run.ended(), run.text()
        line = f"no sign of life from process {rank} on {socket.gethostname()}"
        if how is signal.SIGSTOP and line not in text:
            found.problem(f"trial {number}: rank {rank} is not named: {text[-2000:]}")
        if how is signal.SIGKILL and f"(exitcode: -9) local_rank: {rank} " not in text:
            found.problem(f"trial {number}: rank {rank} is not named: {text[-2000:]}")
        if code:
            found.problem(f"trial {number}: exit code {code} after {how.name} of rank {rank}: {text[-2000:]}")
            continue
        _compare(found, f"trial {number}", expected, out_dir, exact=True)
        shutil.rmtree(out_dir)


def agents(found: Found, folder: Path, draw: random.Random, count: int) -> None:
    """Run two agents with one process each: undisturbed, then with one that is lost and comes back."""
    keys = {"max_iters": 300, "lr_decay_iters": 300, "eval_interval": 100, "save_interval": 10}
    expected = unbroken(folder, **keys)
    for number in range(count):
        lost = number > 0
        out_dir = folder / f"out{number}"
        program = ["-m", "tightfit", *arguments(out_dir, folder / "data", **KEYS | keys, shard="full")]
        nodes = "--nnodes=1:2" if lost else "--nnodes=2"
        launch = (nodes, "--max-restarts=5", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{29600 + number}")
        launch += (f"--rdzv_id=run{number}", "--rdzv_conf=last_call_timeout=3,join_timeout=60")
        first, second = (start(1, program, folder / f"agent{each}.log", *launch) for each in (1, 2))
        if lost:
            _lose_and_rejoin(found, folder, (first, second), program, launch, draw)
        codes = first.ended(), second.ended()
        if codes[0] != 0 or (not lost and codes[1] != 0):
            found.problem(f"trial {number}: exit codes {codes}: {first.text()[-2500:]}")
            continue
        found.counts["two agents, one of them lost and back" if lost else "two agents, undisturbed"] += 1
        _compare(found, f"trial {number}", expected, out_dir, exact=False)


def _lose_and_rejoin(
    found: Found,
    folder: Path,
    pair: tuple[Started, Started],
    program: list[str],
    launch: tuple[str, ...],
    draw: random.Random,
) -> None:
    """Kill the second agent with its process, wait for the first to go on alone, and start the second anew."""
    first, second = pair
    _wait_in(pair, f"iter {draw.randrange(10, 40)}:", 1)
    second.kill()
    if not _wait_in((first,), "processes again", 1):
        found.problem(f"the remaining agent did not go on: {first.text()[-2500:]}")
        return
    _wait_in((first,), "sequences of 16\n", 1)
    back = start(1, program, folder / "agent3.log", *launch)
    found.counts["agents that came back"] += 1
    before = pair[0].text().count("on each of 2 processes") + pair[1].text().count("on each of 2 processes")
    found.counts["restarts with both"] += _wait_in((*pair, back), "on each of 2 processes", before + 1)
    if (code := back.ended()) != 0:
        found.problem(f"the agent that came back ended with {code}: {back.text()[-2500:]}")


def _wait_in(runs: tuple[Started, ...], text: str, times: int) -> bool:
    """Wait until the logs have a text so many times together; return False after 90 s."""
    end = time.monotonic() + HANG_S
    while time.monotonic() < end:
        if sum(run.text().count(text) for run in runs) >= times:
            return True
        time.sleep(0.1)
    return False


ATTACKS: dict[str, tuple[Callable[[Found, Path, random.Random, int], None], int]] = {
    "kills": (kills, 60),
    "same": (same, 40),
    "errors": (errors, 100),
    "losses": (losses, 30),
    "agents": (agents, 3),
}
"""Each with the trials of a full attack."""


def _attack(names: list[str], count: int, seed: int, minutes: float) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names:
        attack, usual = ATTACKS[name]
        began = time.monotonic()
        found = Found(end=began + 60 * minutes)
        with tempfile.TemporaryDirectory(prefix="shards-") as root:
            attack(found, Path(root), random.Random(f"{seed}/{name}"), count or usual)
        record: dict[str, Any] = {"seed": seed, "minutes": round((time.monotonic() - began) / 60, 1)}
        record |= {"trials": dict(found.counts), "problems": found.problems}
        if found.seconds:
            record["seconds_to_restart"] = {"median": sorted(found.seconds)[len(found.seconds) // 2]}
            record["seconds_to_restart"]["longest"] = max(found.seconds)
        yield name, record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--count", type=int, default=0, help="trials of each attack (those of a full one)")
    parser.add_argument("--minutes", type=float, default=60.0, help="time of each attack (%(default)s)")
    parser.add_argument("--write", action="store_true", help=f"add the result to {RESULTS.name}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for name, record in _attack(given.only, given.count, given.seed, given.minutes):
        print(name, json.dumps(record, indent=2), flush=True)
        failed = failed or bool(record["problems"])
        if given.write:
            before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps({**before, name: {"torch": torch.__version__, **record}}, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
