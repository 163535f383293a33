"""The main job, shown in 90 seconds: a failure explained, a plan for a card that is not here, and a run that survives.

`make demo` runs it. It measures how fast this machine trains beside its other work, and chooses model and steps by
that. What can run at once does; the screen shows it in its order. The undisturbed run and the one that loses memory are
the same command; only the second has a memory limit of the kernel's, which is lowered in mid-run until the kernel has
refused it memory. All files are in a temporary folder.
"""

import ast
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil

from tightfit.cli.progress import shown
from tightfit.units import MIB

ROOT = Path(__file__).parents[1]
PLAN = ["plan", "configs/train_openwebtext.py", "--gpu", "RTX 3060 12GB", "--memory", "11.69GiB", "--used", "2GiB"]
EXPLAIN = ["explain", "benchmarks/story.log"]
TEXT_CHARACTERS = 130_000
VOCABULARY = 2048
"""Tokens of the demo's text: many are whole words, so that a model writes words after seconds of training."""
LIMIT_BYTES = 1024 * MIB
"""The kernel's limit for the run that loses memory; it holds a third of it before its first step."""
QUICK_S, LOADED_S = 90.0, 150.0
"""Seconds that the demo may take: on a free machine, and where other programs use more than BUSY of the cores."""
BUSY = 0.5
END_S = 14.0
"""Seconds kept for what follows the training."""
SLOW_S = 1.3
"""Seconds of `explain` that show a slow machine: 0.5 on a core of 2024. Its plan is traced without torch.compile."""
TRAIN_S = 30.0
SLOWER = 1.3
"""Ratio of a step under the limit to a measured one: memory that is given back is cleared before it comes again."""
LOST_AT = 0.6
"""Share of the steps, and of the time for them, after which memory is taken away."""
REFUSAL_S = 6.0
"""Seconds before a lower limit is measured and tried."""


@dataclass(frozen=True)
class Size:
    """A model, and the sequences of its steps."""

    n_layer: int
    n_embd: int
    batch_size: int
    cost: float
    """FLOPs of a step, as a multiple of MIDDLE's."""

    def words(self) -> list[str]:
        return [f"--n_layer={self.n_layer}", f"--n_embd={self.n_embd}", f"--batch_size={self.batch_size}"]


SMALL, MIDDLE, LARGE = Size(1, 64, 4, 0.4), Size(1, 128, 4, 1.0), Size(2, 192, 8, 5.5)
FEWEST, FEW, ENOUGH, MOST = 60, 150, 350, 700
"""Steps: fewer than FEW ask for a smaller model; a larger one is chosen where it gets ENOUGH."""
TIMED_STEPS = 20


@dataclass
class Job:
    """A command of tightfit that runs in the background, with the lines that it has printed so far."""

    words: list[str]
    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        words = [sys.executable, "-m", "tightfit", *self.words]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        streams = ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        self._readers = [threading.Thread(target=_collect, args=each, daemon=True) for each in streams]
        for reader in self._readers:
            reader.start()

    @property
    def is_done(self) -> bool:
        return self.process.poll() is not None and not any(reader.is_alive() for reader in self._readers)

    @property
    def step(self) -> int:
        """Return the last step in its lines."""
        found = (re.match(r"(?:iter|step) (\d+): ", line) for line in reversed(list(self.lines)))
        return next((int(each[1]) for each in found if each), 0)

    def after_last_step(self) -> list[str]:
        """Return the sample that a run prints after its last step."""
        last = max((number for number, line in enumerate(self.lines) if line.startswith("step ")), default=-1)
        return self.lines[last + 1 :]

    def has_more_than(self, lines: int) -> bool:
        """Return True if more lines are there, or none will come."""
        return self.is_done or len(self.lines) > lines

    def command(self) -> str:
        return "$ tightfit " + " ".join(f'"{word}"' if " " in word else word for word in self.words)


def _collect(stream: Iterable[str], lines: list[str]) -> None:
    for line in stream:
        lines.append(line.rstrip("\n"))


class Demo:
    """One demonstration. Its jobs end with it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, dict[str, Job]()
        self.started, self.seconds = time.monotonic(), QUICK_S
        self.size, self.steps = MIDDLE, ENOUGH
        self.has_limit = hasattr(resource, "prlimit")
        """Only Linux lowers the limit of another process."""
        self.step_s = 0.0
        """Measured seconds of a step of the middle size."""
        self.limit_mib = 0
        """Limit at which the kernel refused memory; 0 before it did."""

    def run(self) -> int:
        """Show all parts. Return 1 if one of them did not come about."""
        self._look_around()
        compiles = self._explain()
        self._start("plan", [*PLAN, *([] if compiles else ["--compile=False"])])
        self._measure()
        whole = self._start("undisturbed", self._training("undisturbed"))
        limited = self._start("limited", self._training("limited"))
        if self.has_limit:
            resource.prlimit(limited.process.pid, resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
            threading.Thread(target=self._lose_memory, args=(limited,), daemon=True).start()
        threading.Thread(target=self._stop_in_time, args=((whole, limited),), daemon=True).start()
        self._plan(compiles)
        self._show_runs(whole, limited)
        same = self._compare(whole, limited)
        self._sample(whole, limited)
        print(f"\n# That took {self._elapsed():.0f} s.")
        return 0 if same and (self.limit_mib or not self.has_limit) else 1

    def end(self) -> None:
        """Kill what still runs; each command's own processes end with it."""
        for job in self.jobs.values():
            job.process.kill()
        for job in self.jobs.values():
            job.process.wait()

    # The parts

    def _look_around(self) -> None:
        """Measure what other programs leave."""
        with shown("looking what other programs leave"):
            busy = psutil.cpu_percent(interval=0.5) / 100
        self.seconds = LOADED_S if busy > BUSY else QUICK_S
        print(f"# {_cores()} cores, {busy:.0%} in use by others: this takes at most about {self.seconds:.0f} s.\n")

    def _explain(self) -> bool:
        """Show the explanation; return True if this machine is fast enough to trace a compiled plan."""
        print("# 1. nanoGPT's GPT-2 124M died in estimate_loss on an RTX 3060. What its log alone shows:")
        began = time.monotonic()
        job = self._start("explanation", EXPLAIN)
        self._wait("reading the log", lambda: job.is_done)
        seconds = time.monotonic() - began
        self._print_all(job)
        print(f"\n# {seconds:.1f} s. With --config it also plays the run and every fix; the plan below plays less.\n")
        return seconds < SLOW_S

    def _measure(self) -> None:
        """Prepare the text, time some steps of the middle size, and choose the model and its steps."""
        text = self.folder / "manual.txt"
        text.write_text("\n\n".join(_prose())[:TEXT_CHARACTERS], encoding="utf-8")
        words = [f"--input={text}", "--tokenizer=bpe", f"--vocab_size={VOCABULARY}", f"--data_dir={self.folder}"]
        prepared = self._start("text", ["prepare", "manual", *words])
        self._wait("preparing the text", lambda: prepared.is_done)
        self._check(prepared)
        self.steps, began = TIMED_STEPS, self._elapsed()
        timed = self._start("timing", [*self._training("timing"), "--eval_iters=1", "--sample_at_end=0"])
        self._wait("measuring how fast this machine trains", lambda: timed.is_done)
        self._check(timed)
        self.step_s = statistics.median(row["ms"] for row in self._rows("timing") if row.get("ms")) / 1000
        startup_s = self._elapsed() - began - TIMED_STEPS * self.step_s
        room_s = min(TRAIN_S, self._deadline_s() - self._elapsed() - startup_s)
        self.size, self.steps = _chosen(room_s / (self.step_s * SLOWER))

    def _plan(self, compiles: bool) -> None:
        job = self.jobs["plan"]
        print("# 2. The fastest plan for that run on that card, traced here without it:")
        if not compiles:
            print("#    This machine is slow: the plan is traced without torch.compile, which takes half as long.")
        self._wait("planning", lambda: job.is_done)
        self._print_all(job)
        print()

    def _show_runs(self, whole: Job, limited: Job) -> None:
        limit = f"The kernel lets the second have {LIMIT_BYTES // MIB} MiB, and less in mid-run."
        print(f"# 3. A GPT learns Python's manual, twice at once. {limit if self.has_limit else ''}")
        rate = f"{self.step_s * 1000:.0f} ms for a step of {MIDDLE.batch_size} x 64 tokens, beside the plan"
        print(f"#    Measured: {rate}. So it gets {self.steps} steps of {self.size.batch_size} x 64.")
        print(limited.command())
        printed = 0
        while not (limited.is_done and printed == len(limited.lines)):
            self._wait("training", partial(limited.has_more_than, printed))
            for line in limited.lines[printed:]:
                printed += 1
                if re.match(r"(parameters|iter|step|SIG)", line):
                    print(f"  {line}", flush=True)
        self._wait("training", lambda: whole.is_done)
        if not self.has_limit:
            print("# This system has no prlimit, so no memory was taken away.")
        elif not self.limit_mib:
            print("# The kernel never refused the run memory, so it had nothing to survive.")

    def _compare(self, whole: Job, limited: Job) -> bool:
        """Print how far the losses of both runs are apart, before and after the kernel refused memory."""
        lost = next((row["step"] for row in self._rows("limited") if row.get("event") == "recovery"), self.steps + 1)
        one, other = self._losses("undisturbed"), self._losses("limited")
        steps = sorted(one.keys() & other.keys())
        if not steps:
            print("\n".join(["# One of the runs failed:", *whole.errors, *limited.errors]))
            return False
        apart = {step: abs(one[step] - other[step]) for step in steps}
        before = max((apart[step] for step in steps if step < lost), default=0.0)
        after = max((apart[step] for step in steps if step >= lost), default=0.0)
        last = steps[-1]
        print(f"# Loss of step {last}: {one[last]:.6f} undisturbed, {other[last]:.6f} here; of step 0: {other[0]:.6f}.")
        if self.limit_mib:
            print(
                f"# The losses of both runs differ by at most {before:.1g} before the kernel refused memory (at a limit"
            )
            print(f"# of {self.limit_mib} MiB), and by {after:.1g} after it, when steps were added up in other pieces.")
        print()
        return True

    def _sample(self, whole: Job, limited: Job) -> None:
        print("# 4. What the model writes that lost its memory in mid-run:")
        text = limited.after_last_step()
        if limited.process.returncode:  # the time was over, so it saved its weights and wrote nothing
            words = [f"--out_dir={self.folder / 'limited'}", f"--data_dir={self.folder}", "--start=The "]
            drawn = self._start("sample", ["sample", *words, "--num_samples=1", "--max_new_tokens=80", "--device=cpu"])
            self._wait("drawing a sample", lambda: drawn.is_done)
            text = drawn.lines
        print("\n".join(f"  {line}" for line in text if line.strip("- ")))
        if text == whole.after_last_step():
            print("# The undisturbed model writes the same, letter for letter.")

    # The runs

    def _training(self, name: str) -> list[str]:
        """Return the command of a run; memory is not planned, so that the kernel's refusal comes as a surprise."""
        return [
            *("train", "--fit=off", "--device=cpu", "--dtype=float32", "--supervise=False", "--dataset=manual"),
            *(f"--data_dir={self.folder}", f"--out_dir={self.folder / name}"),
            *(*self.size.words(), "--n_head=4", "--block_size=64", "--gradient_accumulation_steps=1", "--dropout=0.0"),
            *("--learning_rate=5e-3", "--min_lr=1e-4", "--beta2=0.99", f"--warmup_iters={min(20, self.steps // 4)}"),
            *(f"--max_iters={self.steps}", f"--lr_decay_iters={self.steps}", f"--log_interval={self.steps // 20}"),
            *(f"--eval_interval={self.steps}", "--eval_iters=4", "--sample_at_end=80", "--start=The "),
        ]

    def _lose_memory(self, limited: Job) -> None:
        """Lower the limit to between the least and the most that the run holds, until the kernel has refused memory."""
        deadline = self._deadline_s()
        began = self._elapsed()
        late = began + LOST_AT * (deadline - began)
        while not limited.is_done and limited.step < LOST_AT * self.steps:
            if limited.step and self._elapsed() > late:
                break
            time.sleep(0.02)
        try:
            while not self.limit_mib and not limited.is_done:
                held = [_held_bytes(limited.process.pid) for _ in range(400)]
                limit = (min(held) + max(held)) // 2
                resource.prlimit(limited.process.pid, resource.RLIMIT_DATA, (limit, LIMIT_BYTES))
                lowered = time.monotonic()
                while time.monotonic() < lowered + REFUSAL_S and not self.limit_mib:
                    time.sleep(0.02)
                    if any(": out of memory in " in line for line in list(limited.lines)):
                        self.limit_mib = limit // MIB
                resource.prlimit(limited.process.pid, resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
        except ProcessLookupError:
            pass  # it has ended

    def _stop_in_time(self, runs: Iterable[Job]) -> None:
        """Ask both runs to end when the time for them is over and memory was lost; each saves what it has learned."""
        while self._elapsed() < self._deadline_s() or (self.has_limit and not self.limit_mib):
            time.sleep(0.1)
        for run in runs:
            run.process.send_signal(signal.SIGINT)

    # What they share

    def _start(self, name: str, words: list[str]) -> Job:
        self.jobs[name] = job = Job(words)
        return job

    def _wait(self, text: str, is_over: Callable[[], bool]) -> None:
        """Show what runs until `is_over`."""
        with shown(text) as progress:
            while not is_over():
                progress.stage(f"{text} [{self._running()}]")
                time.sleep(0.05)

    def _running(self) -> str:
        """Describe the jobs that run now."""
        found = []
        for name, job in self.jobs.items():
            if job.is_done:
                continue
            said = re.sub(r"^tightfit: | \(\d+ s\)$", "", job.errors[-1]) if job.errors else ""
            now = f"step {job.step} of {self.steps}" if job.step else said
            found.append(f"{name}: {now}" if now else name)
        return "; ".join(found)

    def _print_all(self, job: Job) -> None:
        print(job.command())
        self._check(job)
        print("\n".join(job.lines), flush=True)

    def _check(self, job: Job) -> None:
        if job.process.returncode:
            sys.exit("\n".join([job.command(), *job.lines[-5:], *job.errors]))

    def _rows(self, name: str) -> list[dict[str, Any]]:
        file = self.folder / name / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def _losses(self, name: str) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in self._rows(name) if "loss" in row and "event" not in row}

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _deadline_s(self) -> float:
        return self.seconds - END_S


def _held_bytes(process: int) -> int:
    time.sleep(0.002)
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    held = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    return next(held, 0)  # nothing of a process that has ended


def _chosen(steps: float) -> tuple[Size, int]:
    """Return the model, and its steps, for the time of so many steps of the middle size."""
    size = LARGE if steps >= ENOUGH * LARGE.cost else MIDDLE if steps >= FEW else SMALL
    return size, int(min(MOST, max(FEWEST, steps / size.cost))) // 20 * 20


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prose() -> Iterator[str]:
    """Yield paragraphs without code of Python's manual, or of its library's docstrings where that is missing."""
    seen = set[str]()
    for text in _texts():
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            plain = sum(each.isalpha() or each in " ,.'()-" for each in words) > 0.97 * len(words)
            if len(words) > 120 and words[0].isupper() and words.endswith(".") and plain and words not in seen:
                seen.add(words)
                yield words


def _texts() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics

        yield from topics.values()
    except ImportError:
        for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    yield ast.get_docstring(node) or ""


def _ended(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    os.chdir(ROOT)
    # One thread for each run: both have a core on the smallest machine, and their sums the same order on every one.
    os.environ |= {"OMP_NUM_THREADS": "1", "TIGHTFIT_LANG": "en"}
    signal.signal(signal.SIGTERM, _ended)
    with tempfile.TemporaryDirectory(prefix="tightfit-demo-") as folder:
        demo = Demo(Path(folder))
        try:
            return demo.run()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        finally:
            demo.end()


if __name__ == "__main__":
    sys.exit(main())
