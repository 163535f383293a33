"""Report a run while it runs: lines or a progress bar for people, `metrics.jsonl` and loggers for machines."""

import contextlib
import errno
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tightfit.config import TrainConfig, to_dict
from tightfit.errors import ConfigError
from tightfit.storage import METRICS, writing
from tightfit.trainer.events import Event
from tightfit.trainer.resident import MemoryUse
from tightfit.units import format_bytes, format_count
from tightfit.wording import say


@dataclass
class Sink:
    """A writer of metrics. One that fails is left out from then on; the run goes on."""

    name: str
    write: Callable[[int, Mapping[str, float]], object]
    close: Callable[[], object]
    errors: tuple[type[Exception], ...] = (OSError,)
    """Errors that its library raises for a disk or a network that fails."""
    works: bool = True

    def tried(self, act: Callable[[], object], log: Callable[[str], object]) -> None:
        if not self.works:
            return
        try:
            act()
        except self.errors as error:
            self.works = False
            log(say("trainer.metrics.sink_failed", name=self.name, reason=str(error) or type(error).__name__))


class JsonLines:
    """`metrics.jsonl`: one object a line, `step` first. A resumed run drops the lines that it will write again."""

    def __init__(self, folder: Path, *, from_step: int, evaluated: bool, log: Callable[[str], object]) -> None:
        """Drop lines of training steps from `from_step` on; keep that step's evaluation if it was `evaluated`."""
        self._log, self._complete = log, True
        self.path = folder / METRICS
        found = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        kept = [line for line in found if _is_before(line, from_step, evaluated)]
        with writing(self.path) as part:
            part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed in close)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line; on a full disk 8 KiB wait in the file's buffer, the rest is lost, and this is logged once."""
        self._append(json.dumps({"step": step, **values}))

    def write_event(self, step: int, event: Event) -> None:
        """Write the event's fields as a line, with the key "event"."""
        self._append(json.dumps({"step": step, **msgspec.to_builtins(event)}))

    def _append(self, line: str) -> None:
        try:
            self._file.write(f"{line}\n")
        except OSError as error:
            self._lost(error)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if self._complete:
            self._log(say("trainer.metrics.loses_lines", path=self.path, reason=error.strerror or error))
        self._complete = False


def _is_before(line: str, step: int, evaluated: bool) -> bool:
    try:
        row = json.loads(line)
        at = row["step"]
        if "event" in row:  # it happened, whatever is done again
            return True
        return bool(at < step or (at == step and evaluated and "val_loss" in row))
    except (ValueError, KeyError, TypeError):
        return False  # the cut last line of a killed run


def _tensorboard(folder: Path, first_step: int) -> Sink:
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise ConfigError(say("trainer.metrics.no_tensorboard")) from None
    writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return Sink("TensorBoard", write, writer.close)


def _weights_and_biases(config: TrainConfig) -> Sink:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ConfigError(say("trainer.metrics.no_wandb")) from None
    names = {"project": config.wandb_project, "name": config.wandb_run_name}
    run = wandb.init(**names, config=to_dict(config), dir=config.out_dir)

    def write(step: int, values: Mapping[str, float]) -> None:
        wandb.log({"iter": step, **values}, step=step)

    return Sink("Weights & Biases", write, run.finish, (OSError, wandb.Error))


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Leave it to the reporter: rich's own way ends the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Reporter:
    """Prints a run as it goes and writes its metrics; silent in all processes but the main one."""

    def __init__(self, *, is_main: bool = True) -> None:
        self._console = _Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self._is_main = is_main
        self._sinks: list[Sink] = []
        self._at_end = ExitStack()
        self._lines: JsonLines | None = None
        self._early: list[tuple[int, Event]] = []
        self._progress: Progress | None = None
        self.reader_has_gone = False
        """True once the reader of a pipe that we print to has ended."""

    def start(self, config: TrainConfig, *, first_step: int, evaluated: bool) -> None:
        """Open the sinks and draw the bar; training begins at `first_step`, which may be `evaluated` already."""
        if not self._is_main:
            return
        folder = Path(config.out_dir)
        self._lines = JsonLines(folder, from_step=first_step, evaluated=evaluated, log=self.log)
        self._at_end.callback(self._lines.close)
        for step, event in self._early:
            self._lines.write_event(step, event)
        if config.tensorboard_log:
            self._open(_tensorboard(folder, first_step))
        if config.wandb_log:
            self._open(_weights_and_biases(config))
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn(say("trainer.metrics.left")),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=config.max_iters, completed=first_step, numbers="")
            self._progress.start()
            self._at_end.callback(self._stop_progress, self._progress)

    def _open(self, sink: Sink) -> None:
        self._sinks.append(sink)
        self._at_end.callback(sink.tried, sink.close, self.log)

    def _stop_progress(self, progress: Progress) -> None:
        try:
            progress.stop()
        except OSError as error:
            self._print_no_more(error)

    def log(self, line: str) -> None:
        """Print a line, above the progress bar if there is one; where nobody can read it any more the run goes on."""
        try:
            self._console.print(line, markup=False)
        except OSError as error:
            self._print_no_more(error)

    def _print_no_more(self, error: OSError) -> None:
        """Write to nowhere from now on: the terminal is gone, the reader of the pipe has ended, or the disk is full."""
        self._console.quiet = True
        self.reader_has_gone = error.errno == errno.EPIPE
        if sys.stdout is sys.__stdout__:
            with open(os.devnull, "wb") as nowhere, contextlib.suppress(OSError):
                os.dup2(nowhere.fileno(), 1)

    def step(self, step: int, values: Mapping[str, float], memory: MemoryUse) -> None:
        """Report a training step; `values` as written to metrics.jsonl: loss, ms, tokens_per_s, perhaps mfu."""
        rate = f"{format_count(values['tokens_per_s'])} tok/s"
        held = f"memory {format_bytes(memory.now_bytes)} (peak {format_bytes(memory.peak_bytes)})"
        mfu = f", mfu {values['mfu'] * 100:.2f}%" if "mfu" in values else ""
        if self._progress is not None:
            numbers = f"loss {values['loss']:.4f}, {rate}{mfu}, {held}"
            self._progress.update(self._task, completed=step + 1, numbers=numbers)
        else:
            self.log(f"iter {step}: loss {values['loss']:.4f}, time {values['ms']:.2f}ms{mfu}, {rate}, {held}")
        self._write(step, {**values, "memory_bytes": memory.now_bytes, "memory_peak_bytes": memory.peak_bytes})

    def evaluation(self, step: int, losses: Mapping[str, float], learning_rate: float) -> None:
        """Report an evaluation with nanoGPT's line."""
        self.log(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        self._write(step, {"train_loss": losses["train"], "val_loss": losses["val"], "lr": learning_rate})

    def event(self, step: int, event: Event) -> None:
        """Write an event to metrics.jsonl; before `start` it waits for the file."""
        if self._lines is not None:
            self._lines.write_event(step, event)
        elif self._is_main:
            self._early.append((step, event))

    def close(self) -> None:
        self._at_end.close()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._lines is not None:
            self._lines.write(step, values)
        for sink in self._sinks:
            sink.tried(partial(sink.write, step, values), self.log)


class Stopwatch:
    """Milliseconds for each step between two laps."""

    def __init__(self, waited_s: Callable[[], float] = lambda: 0.0) -> None:
        """`waited_s` returns the seconds so far in which this process waited for others."""
        self._waited_s = waited_s

    def restart(self, step: int) -> None:
        """Start anew, just before step `step`."""
        self._start, self._step, self._waited = time.perf_counter(), step, self._waited_s()

    def lap(self, steps_done: int) -> tuple[float, float]:
        """Return the milliseconds for each step since the last lap or restart, with and without waiting."""
        seconds, steps = time.perf_counter() - self._start, max(1, steps_done - self._step)
        own_s = max(0.0, seconds - (self._waited_s() - self._waited))
        self.restart(steps_done)
        return seconds * 1000 / steps, own_s * 1000 / steps
