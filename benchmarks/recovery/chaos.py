"""Attack training and preparing, and count losses: kills, signals, errors of the disk, small disks, limits, bits.

    python benchmarks/recovery/chaos.py --minutes 10 --seed 0
    python benchmarks/recovery/chaos.py --only bits cuts --minutes 20

Each attack has a generator of trials; they take turns until the time is over. A trial returns nothing, or a sentence
about a loss, a traceback, a process or a file that was left. The result is a JSON record on standard output.
"""

import argparse
import errno
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
from unittest import mock

import psutil

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from runs import arguments, assert_same_end, command, environment, here, make_dataset, process, tensors

from tightfit.errors import TightfitError
from tightfit.trainer import saving
from tightfit.trainer.stored import load, load_newest

Trials = Iterator[str | None]
KEYS = {"max_iters": 60, "lr_decay_iters": 60, "eval_interval": 20, "save_interval": 3, "dropout": 0.1, "fit": "off"}
MARK = "TIGHTFIT_CHAOS_MARK"
ERRNOS = ("EIO", "ESTALE", "EROFS", "ETIMEDOUT", "EINTR", "EACCES", "EPERM", "ENOSPC", "EDQUOT", "EBUSY")


def _end_of(words: list[str], number: signal.Signals, after_s: float, folder: Path) -> tuple[int, str, str | None]:
    """Send a signal to a command; return its exit code, its errors, and a sentence about what it left."""
    mark, own = os.urandom(8).hex(), folder / "tmp"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    environ = {**environment(), MARK: mark, "TMPDIR": str(own)}
    running = subprocess.Popen(command(words), env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        running.wait(after_s)
    except subprocess.TimeoutExpired:
        running.send_signal(number)
    try:
        _, err = running.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        running.kill()
        return 0, "", f"{number.name}: it went on for 30 s"
    time.sleep(0.5)
    left = [each.pid for each in psutil.process_iter() if _mark_of(each) == mark]
    files = [each for each in os.listdir(own) if each.startswith("tightfit")]
    problem = f"{number.name}: processes {left}, files {files} are left" if left or files else None
    return running.returncode, err.decode(), problem


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(MARK)
    except psutil.Error:
        return None


def kills(folder: Path, draw: random.Random) -> Trials:
    """Kill a run again and again until it has ended: its end is that of a run that was never killed."""
    return _interrupted(folder, draw, [signal.SIGKILL])


def signals(folder: Path, draw: random.Random) -> Trials:
    """Send each signal that ends a process, supervised and not."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU", "SIGSEGV", "SIGABRT")
    return _interrupted(folder, draw, [signal.Signals[name] for name in names])


def _interrupted(folder: Path, draw: random.Random, numbers: list[signal.Signals]) -> Trials:
    words = arguments(folder / "unbroken", folder / "data", **KEYS)
    started = time.monotonic()
    assert process(words).code == 0
    life_s, chain = time.monotonic() - started, 0
    while True:
        chain += 1
        out_dir = folder / f"chain{chain}"
        for _ in range(20):
            number = draw.choice(numbers)
            saved = any(out_dir.glob("*.pt"))
            own = {"init_from": "resume" if saved else "scratch", "supervise": draw.choice([True, False])}
            words = arguments(out_dir, folder / "data", **KEYS | own)
            code, err, problem = _end_of(words, number, draw.uniform(0.3, 1.2) * life_s, folder)
            if code == 0 or "Traceback" in err:
                break
            yield problem
        try:
            if code != 0:
                assert process(arguments(out_dir, folder / "data", **KEYS | {"init_from": "resume"})).code == 0, err
            assert_same_end(folder / "unbroken", out_dir)
        except AssertionError as error:
            yield f"{number.name}: {error}"


def preparing(folder: Path, draw: random.Random) -> Trials:
    """Kill `prepare`: the earlier dataset stays, or the new one is whole."""
    text = folder / "text.txt"
    text.write_text("".join(draw.choice("abcdefgh \n") for _ in range(3_000_000)))
    words = ["prepare", "made", f"--input={text}", f"--data_dir={folder / 'made'}", "--tokenizer=characters"]
    started = time.monotonic()
    assert process(words).code == 0
    life_s, good = time.monotonic() - started, (folder / "made" / "made" / "train.bin").read_bytes()
    while True:
        _, _, problem = _end_of(words, signal.SIGKILL, draw.uniform(0.1, 1.1) * life_s, folder)
        done = process(words)
        same = (folder / "made" / "made" / "train.bin").read_bytes() == good
        yield problem or (None if done.code == 0 and same else f"prepare: {done.err}")


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

        keys = {**KEYS, "max_iters": 24}
        with mock.patch.object(os, call, failing), mock.patch.object(saving, "LAST_WAIT_S", 0.0):
            done = here(arguments(out_dir, folder / "data", **keys))
        wrong = done.code not in (0, 1) or "Traceback" in done.err
        try:
            load_newest(out_dir, log=lambda line: None)
        except TightfitError as error:
            wrong = wrong or first > 8
            done = type(done)(done.code, done.out, f"{done.err} {error}")
        yield f"{name} in {call}: {done.code} {done.err}" if wrong else None
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
            with mock.patch.object(saving, "LAST_WAIT_S", 0.0):
                done = here(arguments(disk / "out", folder / "data", **KEYS))
            wrong = done.code not in (0, 1) or "Traceback" in done.err
            yield f"disk of {size} KiB: {done.err}" if wrong else None
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        for rescued in (*folder.glob("out.rescued-*"), *Path(tempfile.gettempdir()).glob("out.rescued-*")):
            shutil.rmtree(rescued)


def limits(folder: Path, draw: random.Random) -> Trials:
    """Lower the memory that a run may take: it ends by itself, without a traceback."""
    while True:
        most = draw.randrange(300, 3000) * 2**20
        out_dir = folder / "limited"
        ended = subprocess.run(
            command(arguments(out_dir, folder / "data", **KEYS | {"supervise": False})),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=lambda most=most: resource.setrlimit(resource.RLIMIT_DATA, (most, most)),
        )
        started = "parameters:" in ended.stdout  # below that torch itself cannot be loaded
        yield f"limit of {most >> 20} MiB: {ended.stderr[-300:]}" if started and "Traceback" in ended.stderr else None
        shutil.rmtree(out_dir, ignore_errors=True)


def _small_checkpoint(folder: Path) -> Path:
    keys = {**KEYS, "max_iters": 2, "n_layer": 1, "n_embd": 8}
    assert here(arguments(folder / "small", folder / "data", **keys)).code == 0
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


ATTACKS: dict[str, Callable[[Path, random.Random], Trials]] = {
    each.__name__: each for each in (kills, signals, preparing, disk_errors, small_disks, limits, bits, cuts)
}


def _attack(names: list[str], minutes: float, seed: int, root: Path) -> tuple[Counter[str], list[str]]:
    """Let the attacks take turns of equal time."""
    counts, problems, running = Counter[str](), [], {}
    for name in names:
        folder = root / name
        make_dataset(folder / "data" / "tiny")
        running[name] = ATTACKS[name](folder, random.Random(f"{seed}/{name}"))
    end, turn_s = time.monotonic() + minutes * 60, max(5.0, minutes * 60 / len(names) / 4)
    while running and time.monotonic() < end:
        for name, trials in list(running.items()):
            until = min(end, time.monotonic() + turn_s)
            while time.monotonic() < until:
                try:
                    problem = next(trials)
                except StopIteration:
                    del running[name]
                    break
                counts[name] += 1
                if problem:
                    problems.append(f"{name}: {problem}")
                    print(problems[-1], file=sys.stderr, flush=True)
    return counts, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all attacks (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is random (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), help="attacks to make")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        counts, problems = _attack(given.only, given.minutes, given.seed, Path(root))
    record = {"seed": given.seed, "minutes": given.minutes, "trials": dict(counts), "problems": problems}
    print(json.dumps(record, indent=2))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
