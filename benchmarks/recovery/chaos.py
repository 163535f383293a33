"""Attack training and preparing, and count losses: kills, signals, refused memory, failing disks, damaged files.

    python benchmarks/recovery/chaos.py --minutes 60 --seed 0
    python benchmarks/recovery/chaos.py --only bits cuts --minutes 20

Each attack has a generator of trials, and a number of them that is a full attack; they take turns until all are full or
the time is over. A trial returns nothing, or a sentence about a loss, a traceback, a process or a file that was left.
The result is a JSON record on standard output.
"""

import argparse
import contextlib
import errno
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from failures import MESSAGE, Failing, Same, at_random, trained
from forked import Forked, ranks
from inputs import hostile_files, mistakes
from runs import arguments, assert_close, assert_same_end, make_dataset, newest, rows, tensors

from tightfit.cli.main import main as main_of_tightfit
from tightfit.errors import TightfitError
from tightfit.trainer import saving
from tightfit.trainer.stored import load, load_newest

Trials = Iterator[str | None]
Program = Callable[[list[str]], int]
Keys = dict[str, Any]
KEYS: Keys = {"max_iters": 60, "lr_decay_iters": 60, "eval_interval": 20, "save_interval": 3, "fit": "off"}
KEYS |= {"dropout": 0.1, "compile": False}
SPLIT: Keys = {"batch_size": 6, "gradient_accumulation_steps": 2, "micro_batch": 3, "sample_at_end": 3, "start": "a"}
VARIANTS: tuple[Keys, ...] = (
    {"dropout": 0.0},
    {"dropout": 0.1},
    {"dtype": "float16"},  # with its scaler
    {"dtype": "float16", "dropout": 0.0, "grad_clip": 0.0},
    {"loss": "chunked"},
    {"activation_checkpointing": 2},
    {"micro_batch": 1},
    {"compile": True, "dropout": 0.0},
)
MARK = "TIGHTFIT_CHAOS_MARK"
LOAD_S = 8.0
"""Seconds that a process which loads torch takes until it trains."""
TURN_S = 30.0
"""Seconds for which an attack goes on before the next one has its turn."""
STOPPING = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
ENDS_S = 15.0
"""Seconds for a supervised run to save and end after its supervisor was killed."""
END = object()
ERRNOS = ("EIO", "ESTALE", "EROFS", "ETIMEDOUT", "EINTR", "EACCES", "EPERM", "ENOSPC", "EDQUOT", "EBUSY")


def _train(words: list[str]) -> int:
    """Run a command in a forked process."""
    torch.set_num_threads(1)
    return main_of_tightfit(words)


def _train_without_waiting(words: list[str]) -> int:
    with mock.patch.object(saving, "LAST_WAIT_S", 0.0):
        return _train(words)


def _started(words: list[str], folder: Path, train: Program = _train, **environ: str) -> tuple[Forked, Path]:
    err = folder / "errors.txt"
    err.unlink(missing_ok=True)
    return Forked(lambda: train(words), folder / "output.txt", err, **environ), err


def _ended(words: list[str], folder: Path, train: Program = _train) -> tuple[int, str]:
    """Run a command to its end; return its exit code and its errors."""
    running, err = _started(words, folder, train)
    return running.wait(), err.read_text(errors="replace")


def _end_of(words: list[str], number: signal.Signals, after_s: float, folder: Path) -> tuple[int, str, str | None]:
    """Send a signal to a command; return its exit code, its errors, and a sentence about what it left."""
    mark, own = os.urandom(8).hex(), folder / "tmp"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    running, err = _started(words, folder, TMPDIR=str(own), **{MARK: mark})
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(after_s)
    running.send_signal(number)
    if number in STOPPING:
        time.sleep(0.2)
        running.send_signal(signal.SIGCONT)
    try:
        running.wait(60)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
        return 0, "", f"{number.name}: it went on for 60 s"
    end = time.monotonic() + ENDS_S
    while (left := _marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    files = [each for each in os.listdir(own) if each.startswith("tightfit")]
    problem = f"{number.name}: processes {left}, files {files} are left" if left or files else None
    return running.wait(), err.read_text(errors="replace"), problem


def _marked(mark: str) -> list[int]:
    return [each.pid for each in psutil.process_iter() if _mark_of(each) == mark]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(MARK)
    except psutil.Error:
        return None


def kills(folder: Path, draw: random.Random) -> Trials:
    """Kill a run again and again until it has ended: its end is that of a run that was never killed."""
    return _interrupted(folder, draw, itertools.repeat(signal.SIGKILL))


def signals(folder: Path, draw: random.Random) -> Trials:
    """Send each signal that can be caught, in turn."""
    caught = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
    named = [number for number in caught if isinstance(number, signal.Signals)]
    return _interrupted(folder, draw, itertools.cycle(named))


def _interrupted(folder: Path, draw: random.Random, numbers: Iterator[signal.Signals]) -> Trials:
    """One run in five is supervised: its second process loads torch anew."""
    started = time.monotonic()
    code, err = _ended(arguments(folder / "unbroken", folder / "data", **KEYS), folder)
    assert code == 0, err
    life_s, chain = time.monotonic() - started, 0
    while True:
        chain += 1
        out_dir, code = folder / f"chain{chain}", 1
        while code:
            number, supervised = next(numbers), draw.random() < 0.2
            saved = any(out_dir.glob("*.pt"))
            own = {"init_from": "resume" if saved else "scratch", "supervise": supervised}
            words = arguments(out_dir, folder / "data", **KEYS | own)
            after_s = draw.uniform(0.05, 1.1) * (life_s + (LOAD_S if supervised else 0))
            code, err, problem = _end_of(words, number, after_s, folder)
            if "Traceback" in err:
                problem = f"{number.name}: {err[-2000:]}"
            yield problem
        try:
            assert_same_end(folder / "unbroken", out_dir)
        except AssertionError as error:
            yield f"chain {chain}, {number.name}: {error}"
        shutil.rmtree(out_dir, ignore_errors=True)


def preparing(folder: Path, draw: random.Random) -> Trials:
    """Kill `prepare`: the earlier dataset stays, or the new one is whole."""
    text = folder / "text.txt"
    text.write_text("".join(draw.choice("abcdefgh \n") for _ in range(3_000_000)))
    words = ["prepare", "made", f"--input={text}", f"--data_dir={folder / 'made'}", "--tokenizer=characters"]
    started = time.monotonic()
    assert _ended(words, folder)[0] == 0
    life_s, made = time.monotonic() - started, folder / "made" / "made" / "train.bin"
    good = made.read_bytes()
    while True:
        if draw.random() < 0.5:
            shutil.rmtree(made.parent)
        _, _, problem = _end_of(words, signal.SIGKILL, draw.uniform(0.0, 1.1) * life_s, folder)
        code, err = _ended(words, folder)
        same = code == 0 and made.read_bytes() == good
        yield problem or (None if same else f"prepare: {err}")


def errors(folder: Path, draw: random.Random) -> Trials:
    """Refuse memory at random operators of one or two processes: the end has the bits of an undisturbed run."""
    plain: dict[str, Path] = {}
    for number in itertools.count():
        processes, keys = draw.choice([1, 1, 2]), SPLIT | draw.choice(VARIANTS)
        name = f"{processes} of {sorted(keys.items())}"
        if name not in plain:
            plain[name] = folder / f"plain{number}"
            code, err, _ = _refused(plain[name], folder, processes, keys, None)
            assert code == 0, err
        out_dir = folder / f"refused{number}"
        code, err, failed = _refused(out_dir, folder, processes, keys, draw.randrange(10**6))
        problem = f"{name}: exit code {code}: {err[-2000:]}" if code else None
        if not code:
            try:
                _assert_same_losses(plain[name], out_dir)
            except AssertionError as error:
                problem = f"{name}, {failed} errors: {error}"
        yield from [problem, *[None] * (failed - 1)] if failed or problem else []
        shutil.rmtree(out_dir, ignore_errors=True)


def _refused(out_dir: Path, folder: Path, processes: int, keys: Keys, seed: int | None) -> tuple[int, str, int]:
    """Train with refused allocations; return the exit code, the errors printed and the number of refusals."""
    told = folder / "refusals.txt"
    told.unlink(missing_ok=True)

    def train() -> int:
        torch.set_num_threads(1)
        failing: Refusing | Failing | None = None
        if seed is not None and os.environ.get("RANK", "0") == str(seed % processes):
            several = processes > 1
            failing = (
                Refusing(seed)
                if keys.get("compile")
                else at_random(seed, 60, spared=6000 if several else 1500, allocating_only=several)
            )
        trained(out_dir, folder / "data", failing, fallback=Same(), **KEYS | keys)
        if failing is not None:
            told.write_text(str(len(failing.failed)))
        return 0

    out = folder / "log.txt"
    out.unlink(missing_ok=True)
    kernels = str(folder / "kernels")
    program = train if processes == 1 else lambda: ranks(processes, train)
    code = Forked(program, out, TORCHINDUCTOR_CACHE_DIR=kernels).wait()
    return code, out.read_text(errors="replace"), int(told.read_text()) if told.exists() else 0


class Refusing(contextlib.AbstractContextManager["Refusing"]):
    """Refuses allocations of compiled graphs, where `Failing` would keep torch from compiling."""

    def __init__(self, seed: int) -> None:
        self.failed: list[str] = []
        self._draw, self._since = random.Random(seed), 0

    def __enter__(self) -> "Refusing":
        guards = importlib.import_module("torch._C._dynamo.guards")
        usual = guards._empty_strided_cpu

        def allocate(*given: object) -> torch.Tensor:
            self._since += 1
            if self._since > 800 and self._draw.randrange(40) == 0:
                self._since = 0
                self.failed.append("empty_strided_cpu")
                raise RuntimeError(MESSAGE)
            return usual(*given)

        guards._empty_strided_cpu = allocate
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing: the process ends."""


def _assert_same_losses(one: Path, other: Path) -> None:
    logged, expected = ([row for row in rows(folder) if "event" not in row] for folder in (other, one))
    assert logged == expected, "other losses"
    first, second = (tensors(newest(folder)) for folder in (one, other))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, {different[0]} among them"


def disk_errors(folder: Path, draw: random.Random) -> Trials:
    """Raise an error from a random call to the disk on, for a while or for ever."""
    for trial in range(10**6):
        name, call, forever = draw.choice(ERRNOS), draw.choice(["fsync", "replace"]), draw.random() < 0.3
        first, out_dir = draw.randrange(4, 24), folder / f"errno{trial}"
        calls, usual, number = iter(range(10**6)), getattr(os, call), getattr(errno, name)
        last = 10**6 if forever else first + draw.randrange(1, 6)

        def failing(*given: object, usual=usual, calls=calls, span=(first, last), number=number, **named: object):
            if span[0] <= next(calls) < span[1]:
                raise OSError(number, os.strerror(number))
            return usual(*given, **named)

        def train(words: list[str], call=call, failing=failing) -> int:
            with mock.patch.object(os, call, failing), mock.patch.object(saving, "LAST_WAIT_S", 0.0):
                return _train(words)

        words = arguments(out_dir, folder / "data", **KEYS | {"max_iters": 24})
        code, err = _ended(words, folder, train)
        wrong = code not in (0, 1) or "Traceback" in err
        try:
            load_newest(out_dir, log=lambda line: None)
        except TightfitError as error:
            wrong, err = wrong or first > 8, f"{err} {error}"
        yield f"{name} in {call}: {code} {err}" if wrong else None
        shutil.rmtree(out_dir, ignore_errors=True)


def small_disks(folder: Path, draw: random.Random) -> Trials:
    """Train on disks of random sizes; the last good state is there, or the sentence that says so."""
    disk = folder / "disk"
    disk.mkdir()
    while True:
        size = draw.randrange(100, 1600)
        mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        if subprocess.run(mounted, capture_output=True, check=False).returncode:
            return
        try:
            code, err = _ended(arguments(disk / "out", folder / "data", **KEYS), folder, _train_without_waiting)
            wrong = code not in (0, 1) or "Traceback" in err
            yield f"disk of {size} KiB: {err}" if wrong else None
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        for rescued in (*folder.glob("out.rescued-*"), *Path(tempfile.gettempdir()).glob("out.rescued-*")):
            shutil.rmtree(rescued)


def limits(folder: Path, draw: random.Random) -> Trials:
    """Lower the memory that a run may take: it ends with the losses of one without a limit, or with one sentence.

    Below 8 MiB more than Python and torch take, not even the command begins.
    """
    keys = KEYS | {"n_embd": 128, "block_size": 128, "batch_size": 16, "max_iters": 6, "dropout": 0.0}
    code, err = _ended(arguments(folder / "unlimited", folder / "data", **keys), folder)
    assert code == 0, err
    for number in itertools.count():
        out_dir, spare = folder / f"limited{number}", draw.randrange(8, 80) * 2**20

        def train(words: list[str], spare: int = spare) -> int:
            most = psutil.Process().memory_info().data + spare
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
            return _train(words)

        code, err = _ended(arguments(out_dir, folder / "data", **keys), folder, train)
        problem = None
        if code not in (0, 1, 2) or "Traceback" in err:
            problem = f"limit of {spare >> 20} MiB more: exit code {code}: {err[-2000:]}"
        elif code == 0:
            try:
                assert_close(folder / "unlimited", out_dir)
            except AssertionError as error:
                problem = f"limit of {spare >> 20} MiB more: {error}"
        yield problem
        shutil.rmtree(out_dir, ignore_errors=True)


def _small_checkpoint(folder: Path) -> Path:
    keys = {**KEYS, "max_iters": 2, "n_layer": 1, "n_embd": 8}
    assert _ended(arguments(folder / "small", folder / "data", **keys), folder)[0] == 0
    return folder / "small" / "ckpt.pt"


def _is_read_as_it_was(path: Path, expected: dict) -> str | None:
    try:
        found = load(path)
    except TightfitError:
        return None
    same = all((tensor == expected[name]).all() for name, tensor in found.model.items())
    return None if same else "altered weights were read"


def bits(folder: Path, draw: random.Random) -> Trials:
    """Flip each bit of a checkpoint's zip directory, in random order."""
    source = _small_checkpoint(folder)
    good, expected, path = source.read_bytes(), tensors(source), folder / "flipped.pt"
    start = good.index(b"PK\x01\x02")
    for bit in draw.sample(range(8 * (len(good) - start)), 8 * (len(good) - start)):
        flipped = bytearray(good)
        flipped[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        yield _is_read_as_it_was(path, expected)


def cuts(folder: Path, draw: random.Random) -> Trials:
    """Cut a checkpoint at each tenth byte, in random order."""
    source = _small_checkpoint(folder)
    good, expected, path = source.read_bytes(), tensors(source), folder / "cut.pt"
    places = range(0, len(good), 10)
    for place in draw.sample(places, len(places)):
        path.write_bytes(good[:place])
        yield _is_read_as_it_was(path, expected)


ATTACKS: dict[str, tuple[Callable[[Path, random.Random], Trials], int]] = {
    "kills": (kills, 150),
    "preparing": (preparing, 50),
    "signals": (signals, 66),
    "errors": (errors, 200),
    "limits": (limits, 60),
    "disk_errors": (disk_errors, 40),
    "small_disks": (small_disks, 12),
    "mistakes": (mistakes, 300),
    "hostile_files": (hostile_files, 60),
    "bits": (bits, 10**6),
    "cuts": (cuts, 10**6),
}
"""Each with the trials of a full attack; bits and cuts end by themselves, when none is left."""


def _attack(names: list[str], minutes: float, seed: int, root: Path) -> tuple[Counter[str], list[str], list[str]]:
    """Let the attacks take turns; return their trials, the problems, and the attacks that are not full."""
    counts, problems, running = Counter[str](), [], {}
    for name in names:
        folder = root / name
        make_dataset(folder / "data" / "tiny")
        running[name] = ATTACKS[name][0](folder, random.Random(f"{seed}/{name}"))
    end = time.monotonic() + minutes * 60
    while running and time.monotonic() < end:
        for name, trials in list(running.items()):
            until = min(end, time.monotonic() + TURN_S)
            while name in running and time.monotonic() < until:
                problem = next(trials, END)
                if problem is END or counts[name] >= ATTACKS[name][1]:
                    del running[name]
                    break
                counts[name] += 1
                if problem:
                    problems.append(f"{name}: {problem}")
                    print(problems[-1], file=sys.stderr, flush=True)
            print(f"{name}: {counts[name]} trials", file=sys.stderr, flush=True)
    return counts, problems, list(running)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all attacks (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is random (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), help="attacks to make")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        counts, problems, unfinished = _attack(given.only, given.minutes, given.seed, Path(root))
    minutes = round((time.monotonic() - started) / 60, 1)
    record = {"seed": given.seed, "minutes": minutes, "trials": dict(counts), "not full": unfinished}
    print(json.dumps(record | {"problems": problems}, indent=2))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
