"""Training speed and peak memory on a GPU: this trainer against nanoGPT's train.py, losses, checkpointing, in turn.

    git clone https://github.com/karpathy/nanoGPT
    PYTHONPATH=src python -m benchmarks.gpu.speed --out results-of-my-card --nanogpt nanoGPT --minutes 7

GPT-2 124M on random tokens. Whole programs are started fresh, one of each in a round, as many rounds as the time
allows; a step's time is the median of what the program prints, without its first steps. Rates are also given as a
share of the card's own matrix product in bfloat16, measured first. Memory of whole programs is what NVML reports for
the card, less what it reported before. One row a run, in speed.csv.
"""

import argparse
import csv
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import processes
from benchmarks.gpu.calibrate import DRY_CARD, WORKLOAD, read
from benchmarks.gpu.grid import Case
from tightfit.config import TrainConfig
from tightfit.errors import ConfigError, DeviceError, TightfitError
from tightfit.models.shape import flops_per_token

FIELDS = (
    "round", "name", "dry", "step_ms", "tokens_per_s", "share_of_matmul", "peak_bytes", "peak_kind", "seconds", "error",
    "gpu", "torch", "cuda", "driver", "date",
)  # fmt: skip
CEILINGS = processes.HERE / "ceilings.py"
_UNCOUNTED_STEPS = 5
_POLL_S = 0.05
_TRAINER = "import sys\nfrom tightfit.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    block: int = 1024
    batch: int = 12
    vocab: int = 50304
    steps: int = 25

    @property
    def flops_per_token(self) -> int:
        """Forward and backward, as PaLM's appendix B counts them; recomputation does not count."""
        config = TrainConfig(
            n_layer=self.layers, n_head=self.heads, n_embd=self.width, vocab_size=self.vocab, bias=False
        )
        return flops_per_token(config, self.block)


@dataclass(frozen=True)
class Program:
    """One thing that is timed."""

    name: str
    run: Callable[[], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for speed.csv and ceilings.csv")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT; without it, it is left out")
    parser.add_argument("--minutes", type=float, default=7.0, help="no run is started after so long")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="programs whose names contain this")
    parser.add_argument("--dry", action="store_true", help="a virtual H200 in the card's place; its times mean nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    compare(
        Model(), options.out, nanogpt=options.nanogpt, rounds=options.rounds, minutes=options.minutes,
        only=options.only, dry=options.dry,
    )  # fmt: skip


def compare(
    model: Model, out: Path, *, nanogpt: Path | None, rounds: int, minutes: float, only: str = "", dry: bool = False
) -> None:
    """Measure the limits, then all programs in turn; rounds are counted on from those that the CSV has."""
    ends = time.monotonic() + 60 * minutes
    limits = ceilings(dry=dry, small=model.width < 256)
    _append(out / "ceilings.csv", {**limits, "dry": "yes" if dry else ""})
    with tempfile.TemporaryDirectory(prefix="tightfit-gpu-") as folder:
        _make_dataset(Path(folder, "data", "random"))
        programs = [*whole_programs(model, Path(folder), nanogpt, dry=dry), *_steps(model, dry=dry)]
        programs = [program for program in programs if only in program.name]
        first = 1 + max((int(row["round"]) for row in read(out / "speed.csv")), default=-1)
        for number in range(first, first + rounds):
            for program in programs:
                if time.monotonic() >= ends:
                    print(f"{minutes:g} minutes are over, in round {number}", flush=True)
                    return
                found = program.run()
                _append(out / "speed.csv", row_of(number, program.name, found, model, limits, dry=dry))


def ceilings(*, dry: bool, small: bool = False) -> dict[str, Any]:
    """Facts of the card and its measured limits, TFLOP/s and GB/s."""
    words = ["--side", "64", "--copy-bytes", "4096", "--calls", "2"] if small else []
    ran = (
        processes.run_on_virtual(CEILINGS, words, {"gpu": DRY_CARD}) if dry else processes.run_on_card(CEILINGS, words)
    )
    if ran.figures is None:
        raise DeviceError(f"the card's limits could not be measured: {ran.last_line}")
    facts = ran.figures
    limits = {name: "" if dry else round(value, 2) for name, value in facts["ceilings"].items()}
    return {name: facts[name] for name in ("gpu", "torch", "cuda", "driver")} | limits


def whole_programs(model: Model, folder: Path, nanogpt: Path | None, *, dry: bool) -> Iterator[Program]:
    keys = {
        "dataset": "random", "n_layer": model.layers, "n_head": model.heads, "n_embd": model.width,
        "block_size": model.block, "batch_size": model.batch, "gradient_accumulation_steps": 1,
        "max_iters": model.steps, "eval_iters": 1, "eval_interval": 100_000, "log_interval": 1, "device": "cuda",
        "dtype": "bfloat16", "warmup_iters": 2, "lr_decay_iters": 100_000,
    }  # fmt: skip
    trainer = folder / "trainer.py"
    trainer.write_text(_TRAINER)
    if nanogpt is not None:
        source = nanogpt.resolve()
        if not (source / "train.py").is_file():
            raise ConfigError(f"{nanogpt} has no train.py; give a checkout of karpathy/nanoGPT")
        # nanoGPT reads configurator.py from the working folder
        (folder / "configurator.py").write_bytes((source / "configurator.py").read_bytes())
    for compiled in (False, True):
        said = "compiled" if compiled else "eager"
        words = [f"--{key}={value}" for key, value in {**keys, "compile": compiled}.items()]
        if nanogpt is not None:
            yield Program(f"nanogpt {said}", _program(source / "train.py", words, folder, dry=dry))
        # At the same batch as nanoGPT: no plan is made.
        yield Program(f"tightfit {said}", _program(trainer, ["train", *words, "--fit=off"], folder, dry=dry))


def _program(script: Path, words: Sequence[str], folder: Path, *, dry: bool) -> Callable[[], dict[str, Any]]:
    """Run a training script; its steps' times are read from what it prints."""

    def run() -> dict[str, Any]:
        started = time.monotonic()
        command = [sys.executable, str(script), *words]
        if dry:
            command = processes.dryrun_command(script, words, {"gpu": DRY_CARD})
        with _peak_of_card() as peak:
            code, out, err = processes.run(command, timeout_s=300, cwd=folder, virtual=dry)
        text = err if dry else out
        times = [float(ms) for ms in re.findall(r"^iter \d+: .*?time ([\d.]+)ms", text, re.MULTILINE)]
        ended = processes.Ran(None, None, err or out, round(time.monotonic() - started, 2))
        return {
            "times": times, "peak_bytes": peak[0] or "", "peak_kind": "nvml" if peak[0] else "",
            "seconds": ended.seconds, "error": "" if code == 0 and times else ended.last_line,
        }  # fmt: skip

    return run


def _steps(model: Model, *, dry: bool) -> Iterator[Program]:
    """The trainer's step alone, with each loss and each level of checkpointing."""
    size = next(name for name, shape in _sizes().items() if shape == (model.layers, model.heads, model.width))
    base = Case(size=size, micro_batch=model.batch, block=model.block, vocab=model.vocab, steps=model.steps)
    for compiled in (False, True):
        said = "compiled" if compiled else "eager"
        for loss in ("full", "chunked", *(("liger",) if processes.has_liger() else ())):
            yield Program(f"loss {loss} {said}", _step(replace(base, loss=loss, compile=compiled), dry=dry))
        for blocks in (0, model.layers // 2, model.layers):
            case = replace(base, checkpointing=blocks, compile=compiled)
            yield Program(f"checkpointing {blocks} {said}", _step(case, dry=dry))


def _step(case: Case, *, dry: bool) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        if dry:
            ran = processes.run_on_virtual(WORKLOAD, case.arguments, {"gpu": DRY_CARD})
        else:
            ran = processes.run_on_card(WORKLOAD, case.arguments)
        figures = ran.figures or {}
        error = "" if figures.get("outcome") == "fits" else ran.last_line
        return {
            "times": figures.get("step_ms", []), "peak_bytes": figures.get("reserved_bytes", ""),
            "peak_kind": "reserved", "seconds": ran.seconds, "error": error,
        }  # fmt: skip

    return run


def row_of(
    number: int, name: str, found: dict[str, Any], model: Model, limits: dict[str, Any], *, dry: bool
) -> dict[str, Any]:
    """A dry run has no speed: nothing was computed."""
    row = {column: limits[column] for column in ("gpu", "torch", "cuda", "driver")}
    row |= {column: found[column] for column in ("peak_bytes", "peak_kind", "seconds", "error")}
    row |= {"round": number, "name": name, "dry": "yes" if dry else ""}
    row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    times = found["times"][_UNCOUNTED_STEPS:] or found["times"][1:]
    if times and not dry:
        ms = statistics.median(times)
        rate = model.batch * model.block / ms * 1000
        share = rate * model.flops_per_token / (limits["bfloat16_tflops"] * 1e12)
        row |= {"step_ms": round(ms, 3), "tokens_per_s": round(rate), "share_of_matmul": round(share, 4)}
    return row


@contextmanager
def _peak_of_card() -> Iterator[list[int]]:
    """The most that the card's used memory grew by in the lines within, by NVML; 0 without it."""
    from benchmarks.gpu.card import used_by_nvml  # imports torch

    peak, before, over = [0], used_by_nvml(), threading.Event()

    def watch() -> None:
        while before is not None and not over.wait(_POLL_S):
            peak[0] = max(peak[0], (used_by_nvml() or 0) - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _sizes() -> dict[str, tuple[int, int, int]]:
    from benchmarks.gpu.workload import SIZES  # imports torch

    return SIZES


def _make_dataset(folder: Path) -> None:
    """Random tokens: the work does not depend on what they say."""
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, 50257, 2_000_000).astype(np.uint16)
    tokens.tofile(folder / "train.bin")
    tokens[:200_000].tofile(folder / "val.bin")


def _append(path: Path, row: dict[str, Any]) -> None:
    rows = [*read(path), row]
    fields = FIELDS if path.name == "speed.csv" else tuple(row)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, fields)
        table.writeheader()
        table.writerows(rows)
    shown = ("name", "step_ms", "tokens_per_s", "share_of_matmul", "peak_bytes", "error")
    print(", ".join(f"{name} {row[name]}" for name in shown if row.get(name)) or row, flush=True)


if __name__ == "__main__":
    try:
        main()
    except TightfitError as error:
        sys.exit(str(error))
