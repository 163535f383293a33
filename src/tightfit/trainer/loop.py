"""A run from its configuration to its last checkpoint: nanoGPT's main path, in execution order."""

import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tightfit.config import LOSSY_KEYS, Resolved, TrainConfig, batch_split, describe, to_dict
from tightfit.data import Dataset, open_dataset
from tightfit.data.batches import Batches, Purpose, micro_batches, read_ahead
from tightfit.errors import ConfigError, DoesNotFit
from tightfit.models.loss import LossKind
from tightfit.models.model import GPT, GPTConfig
from tightfit.models.optimizer import plain_state
from tightfit.storage import BEST, CHECKPOINTS, LAST, METRICS, PREVIOUS
from tightfit.trainer import checkpoint as ckpt
from tightfit.trainer.atomic import reset_scaler
from tightfit.trainer.checkpoint import Checkpoint
from tightfit.trainer.distributed import World, process_group, same_weights, world_of_environment
from tightfit.trainer.hardware import Hardware, choose_hardware
from tightfit.trainer.metrics import Reporter, Stopwatch
from tightfit.trainer.recovery import BeyondSaving, Fallback, Halving, OutOfMemory, Recovery, Settings
from tightfit.trainer.resident import keep_freed_memory, memory_use, return_freed_memory
from tightfit.trainer.sample import sample_text
from tightfit.trainer.setup import build_model, build_state, data_order_changes, model_config, starting_point
from tightfit.trainer.step import Phase, StepResult, StepState, dropout_seed, evaluation_loss, optimizer_step
from tightfit.trainer.supervise import STATUS, report_status
from tightfit.units import format_count


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    step: int
    """Optimizer steps done in all."""
    best_val_loss: float
    stopped_by: signal.Signals | None = None
    """The signal that ended it early, after saving."""


def train(resolved: Resolved[TrainConfig], fallback: Fallback | None = None) -> RunResult:
    """Train as configured. Raises this package's errors for what cannot be done, with nothing lost.

    `fallback` decides what changes when memory runs out; by default everything is halved.
    """
    config = resolved.config
    world = world_of_environment()
    hardware = choose_hardware(config, local_rank=world.local_rank, local_size=world.local_size)
    if config.effective_batch < world.size:
        raise ConfigError(
            f"batch_size * gradient_accumulation_steps = {config.effective_batch} sequences a step cannot be "
            f"shared by {world.size} processes; start at most {config.effective_batch}"
        )
    if config.offloads("optimizer") and world.size > 1:
        raise ConfigError(
            f"offload={config.offload} is for one process, and this run has {world.size}; set --offload=none"
        )
    if config.offloads("activations") and not config.activation_checkpointing:
        raise ConfigError(
            "offload=activations moves the inputs of recomputed blocks, and none is recomputed; "
            "set activation_checkpointing"
        )
    with process_group(world, config.backend, hardware.device):
        reporter = Reporter(is_main=world.is_main)
        try:
            return _Run(resolved, world, hardware, reporter, fallback).execute()
        finally:
            reporter.close()


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up over `warmup_iters`, then half a cosine down to `min_lr` at `lr_decay_iters`.

    >>> config = TrainConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=1, lr_decay_iters=3, max_iters=3)
    >>> [round(learning_rate_at(config, step), 3) for step in range(5)]
    [0.5, 1.0, 0.5, 0.0, 0.0]
    """
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step > config.lr_decay_iters:
        return config.min_lr
    done = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)


class _Run:
    """One run in one process; `execute` is the path, the rest its parts."""

    def __init__(
        self,
        resolved: Resolved[TrainConfig],
        world: World,
        hardware: Hardware,
        reporter: Reporter,
        fallback: Fallback | None,
    ) -> None:
        config = resolved.config
        self.config, self.world, self.hardware, self.reporter = config, world, hardware, reporter
        self.folder = Path(config.out_dir)
        self.lossy = {key: getattr(config, key) for key in LOSSY_KEYS if resolved.sources[key] == "plan"}
        """What a plan changed of the run itself, which a process that takes over must not choose anew."""
        say = reporter.say
        for key, value, source in describe(resolved):
            say(f"{key} = {value!r} ({source})")
        self.recovery = Recovery(world, hardware.device, say, reporter.event, enabled=config.recover)
        dataset = self._open_dataset()
        beginning: Phase = "resume" if config.init_from == "resume" else "setup"
        start = self.recovery.tried(beginning, self._starting_point)
        shape = model_config(config, start, dataset, say=say)
        if world.is_main:
            dataset.validate(block_size=shape.block_size, vocab_size=shape.vocab_size)
        for reason in hardware.reasons:
            say(reason)
        self.batches = Batches(dataset, shape.block_size, config.effective_batch, config.seed)
        self.dataset = dataset
        # On the CPU a reading thread only takes cores from the step: a small model was 3% slower with it.
        self.prefetch = 0 if hardware.device.type == "cpu" else config.prefetch
        self.step, self.best_val_loss, self.evaluated = 0, math.inf, False
        self.model, self.state = self.recovery.tried(beginning, partial(self._build, shape, start))
        if hardware.device.type == "cpu":
            roomy = fallback is None or not fallback.is_tight
            if not (roomy and keep_freed_memory(self.model.count_parameters())) and fallback is not None:
                return_freed_memory()  # as the plan was predicted
        if world.size > 1 and config.recover:
            same_weights(self.model.parameters())
        if start is not None and config.init_from == "resume":
            self._resume(start)
        self.first_step = self.saved_step = self.recovery.step = self.step
        self.tokens_per_step = config.effective_batch * shape.block_size
        self.mine = world.share(config.effective_batch)
        self.split = batch_split(config, world.size)
        self.settings = self._wanted_settings()
        self._split_step(self.settings.micro_batch)
        if fallback is not None and fallback.predicted_peak_bytes is not None:
            told = {"event": "plan", "predicted_peak_bytes": fallback.predicted_peak_bytes, **asdict(self.settings)}
            reporter.event(self.step, told)
        self.recovery.watch(self, fallback or Halving(shape.n_layer, len(self.mine), self.settings))
        say(
            f"parameters: {format_count(self.model.count_parameters())}; tokens per step: {self.tokens_per_step:,}, "
            f"as {len(self.passes)} x {len(self.passes[0])} sequences of {shape.block_size}"
            + (f" on each of {world.size} processes" if world.size > 1 else "")
        )

    def _starting_point(self) -> Checkpoint | None:
        start = starting_point(self.config.init_from, self.config.out_dir, say=self.reporter.say)
        self.recovery.agree()
        return start

    def _build(self, shape: GPTConfig, start: Checkpoint | None) -> tuple[GPT, StepState]:
        model = build_model(self.config, shape, start, self.hardware.device)
        state = build_state(self.config, model, start, self.hardware, self.world)
        self.recovery.guard(state)
        self.recovery.agree()
        return model, state

    def _wanted_settings(self) -> Settings:
        config = self.config
        return Settings(
            micro_batch=self.split.micro_batch,
            eval_micro_batch=self.split.eval_micro_batch,
            loss=config.loss,
            checkpointed_blocks=config.activation_checkpointing,
        )

    def use_settings(self, settings: Settings) -> None:
        """Run every pass from the next one on with `settings`; a compiled model compiles again by itself."""
        self.settings = settings
        self.model.loss_kind = cast(LossKind, settings.loss)
        self.model.checkpointed_blocks = settings.checkpointed_blocks
        self._split_step(settings.micro_batch)

    def _split_step(self, micro_batch: int) -> None:
        """Run the steps from this one on in passes of so many sequences."""
        self.passes = micro_batches(self.mine, micro_batch)
        self._read_on()
        self._report_status()

    def _read_on(self) -> None:
        """Read from the step that is next, whatever was read ahead before."""
        self.reads = read_ahead(self._reads(), self.prefetch)

    def execute(self) -> RunResult:
        config, world = self.config, self.world
        if config.eval_only:
            self._evaluate(_Stop())
            return self._result()
        if world.is_main:
            with ckpt.folder_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                if config.init_from != "resume":
                    _set_aside(self.folder, say=self.reporter.say)
                self.reporter.start(config, first_step=self.step, evaluated=self.evaluated)
        with _signals() as stop:
            try:
                result = self._loop(stop)
            except OutOfMemory as error:
                self._save_before_the_end()
                if error.of_all:  # torchrun ends the others' saving when one is gone
                    world.any(False, self.hardware.device)
                if self.step > self.first_step and STATUS in os.environ:
                    # It did fit: what is lost to fragments and to the compilers' leftovers a new process has again.
                    raise BeyondSaving(f"{error}; a new process may have room for it") from error
                raise
        if result.stopped_by is None and config.sample_at_end and world.is_main:
            self.recovery.tried("sample", self._sample, alone=True)
        return result

    def _loop(self, stop: "_Stop") -> RunResult:
        config = self.config
        watch = Stopwatch()
        watch.restart(self.step)
        while True:
            self.recovery.step, last = self.step, self.step >= config.max_iters
            if not self.evaluated and (last or self.step % config.eval_interval == 0):
                if self._evaluate(stop):
                    self._save_after_evaluation()
                watch.restart(self.step)
            if self.world.any(stop.by is not None, self.hardware.device):
                self._save(LAST, last_chance=True)
                number = stop.by or signal.SIGTERM
                self.reporter.say(
                    f"{number.name}: saved step {self.step} in {self.folder}; continue with --init_from=resume"
                )
                return self._result(number)
            if last:
                return self._result()
            result = self.recovery.tried("forward", self._train_step, undo=self._undo_step)
            self.step, self.evaluated = self.step + 1, False
            if (self.step - 1) % config.log_interval == 0:
                self._log(result, watch)
            self.recovery.step_done()
            if config.save_interval and self.step % config.save_interval == 0:
                self._save(LAST)

    def _train_step(self) -> StepResult:
        config, step = self.config, self.step
        return optimizer_step(
            self.state,
            (self._to_device(next(self.reads)) for _ in self.passes),
            passes=len(self.passes),
            tokens=self.tokens_per_step,
            learning_rate=learning_rate_at(config, step),
            grad_clip=config.grad_clip,
            seed_of_pass=(lambda number: dropout_seed(config.seed, step, self.passes[number].start))
            if config.dropout
            else None,
        )

    def _undo_step(self) -> None:
        """All that a step leaves before its update: gradients, what the scaler noted of them, data read ahead."""
        self.state.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)  # of weights whose optimizer is on the host
        reset_scaler(self.state.optimizer, self.state.scaler)
        self._read_on()

    def _evaluate(self, stop: "_Stop") -> bool:
        """Mean losses of both splits, printed and kept; False if a signal cut it short."""
        sums = self.world.sum(self.recovery.tried("eval", partial(self._evaluation_sums, stop)), self.hardware.device)
        if self.world.any(stop.by is not None, self.hardware.device):
            return False
        losses = {"train": sums[0] / sums[1], "val": sums[2] / sums[3]}
        self.reporter.evaluation(self.step, losses, learning_rate_at(self.config, self.step))
        self.evaluated = True
        self.improved = losses["val"] < self.best_val_loss
        self.best_val_loss = min(self.best_val_loss, losses["val"])
        return True

    def _evaluation_sums(self, stop: "_Stop") -> list[float]:
        """Summed loss and tokens of this process's share: of the training split, then of the other."""
        mine = self.world.share(self.split.eval_sequences)
        sums: list[float] = []
        purposes: tuple[Purpose, ...] = ("evaluate train", "evaluate val")
        for purpose in purposes:
            parts = micro_batches(mine, self.settings.eval_micro_batch)
            tasks = (partial(self._read, purpose, self.step, part) for part in parts)
            wanted = (self._to_device(pair) for pair in read_ahead(tasks, self.prefetch))
            sums += evaluation_loss(self.state, _until(stop, wanted))
        self.recovery.agree()
        return sums

    def _save_after_evaluation(self) -> None:
        """nanoGPT's rule, and the end of a run is never lost."""
        if self.step == 0:
            return
        if self.improved or self.config.always_save_checkpoint:
            self._save(BEST)
        elif self.step >= self.config.max_iters:
            self._save(LAST)

    def _save(self, name: str, *, last_chance: bool = False) -> None:
        """A full disk does not end a run that can go on: it is said, and the last good checkpoint stays."""
        if not self.world.is_main:
            return
        try:
            self.recovery.tried("save", partial(self._write_checkpoint, name), alone=True)
        except DoesNotFit as error:
            if last_chance or self.step >= self.config.max_iters:
                raise
            self.reporter.say(f"{error}; training goes on")
        self._report_status()

    def _write_checkpoint(self, name: str) -> None:
        offload = self.state.offload
        content = Checkpoint(
            model_config=self.model.config,
            model=offload.full_weights(self.model) if offload else self.model.state_dict(),
            optimizer=plain_state(self.state.optimizer),
            step=self.step,
            best_val_loss=self.best_val_loss,
            config=to_dict(self.config),
            scaler=self.state.scaler.state_dict(),
            evaluated=self.evaluated,
        )
        ckpt.save(self.folder, content, name=name)
        self.saved_step = self.step

    def _save_before_the_end(self) -> None:
        """What was trained is not lost with a run that no longer fits."""
        if self.step > max(self.first_step, self.saved_step):
            self._save(LAST, last_chance=True)
            self.reporter.say(f"saved step {self.step} in {self.folder}; continue with --init_from=resume")

    def _report_status(self) -> None:
        """For the supervisor, if there is one: what to start again from, and with less than what."""
        if self.world.is_main:
            layers = self.model.config.n_layer
            budget = self.config.activation_memory_budget
            report_status(
                saved_step=self.saved_step,
                n_layer=layers,
                activation_memory_budget=budget,
                lossy=self.lossy,
                **asdict(self.settings),
            )

    def _resume(self, start: Checkpoint) -> None:
        self.step, self.best_val_loss, self.evaluated = start.step, start.best_val_loss, start.evaluated
        self.reporter.say(f"resuming {start.path} at step {start.step}")
        if changes := data_order_changes(self.config, start):
            self.reporter.say(f"the data order changes from here on: {', '.join(changes)}")

    def _log(self, result: StepResult, watch: Stopwatch) -> None:
        numbers = self.recovery.tried("log", lambda: _as_floats(result), alone=True)
        pressed = self.recovery.is_pressed()
        loss, presses = self.world.sum([numbers["loss"], float(pressed)], self.hardware.device)
        if presses:
            self.recovery.relieve()
        ms = watch.lap(self.step)
        rate = self.tokens_per_step / ms * 1000
        values = {
            **numbers,
            "loss": loss,
            "ms": ms,
            "tokens_per_s": rate,
            "lr": learning_rate_at(self.config, self.step - 1),
        }
        if peak := self.hardware.peak_flops:
            flops = self.model.flops_per_token(self.batches.block_size)
            values["mfu"] = flops * rate / (peak * self.world.size)
        self.reporter.step(self.step - 1, values, memory_use(self.hardware.device))

    def _open_dataset(self) -> Dataset:
        return open_dataset(self.config.dataset, self.config.data_dir)

    def _reads(self) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
        for step in range(self.step, self.config.max_iters):
            for part in self.passes:
                yield partial(self._read, "train", step, part)

    def _read(self, purpose: Purpose, step: int, sequences: range) -> tuple[Tensor, Tensor]:
        inputs, targets = (torch.from_numpy(ids) for ids in self.batches.read(purpose, step, sequences))
        if self.hardware.device.type == "cuda":
            return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets

    def _to_device(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        device = self.hardware.device
        return pair[0].to(device, non_blocking=True), pair[1].to(device, non_blocking=True)

    def _sample(self) -> None:
        text = sample_text(
            self.model,
            self.dataset,
            start=self.config.start,
            max_new_tokens=self.config.sample_at_end,
            seed=self.config.seed,
            hardware=self.hardware,
        )
        self.reporter.say(text)

    def _result(self, stopped_by: signal.Signals | None = None) -> RunResult:
        return RunResult(self.step, self.best_val_loss, stopped_by)


@dataclass
class _Stop:
    """A signal that asked the run to end, if one came."""

    by: signal.Signals | None = None


@contextmanager
def _signals() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM asks for a stop after the current step; a second one has its usual effect."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    usual = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, _frame: object) -> None:
        stop.by = signal.Signals(number)
        for each, handler in usual.items():
            signal.signal(each, handler)

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _as_floats(result: StepResult) -> dict[str, float]:
    """Waits for the device."""
    norm = {} if result.grad_norm is None else {"grad_norm": float(result.grad_norm)}
    return {"loss": float(result.loss), **norm}


def _until(stop: _Stop, pairs: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for pair in pairs:
        if stop.by is not None:
            return
        yield pair


def _set_aside(folder: Path, *, say: Callable[[str], object]) -> None:
    """Move what an earlier run left in `folder` into its `previous/`, in place of what that holds.

    A run that ended before it saved anything replaces nothing, and a move cut short is finished by the next.
    """
    previous, moving = folder / PREVIOUS, folder / f".{PREVIOUS}.moving"
    left = [folder / name for name in (*CHECKPOINTS, METRICS) if (folder / name).exists()]
    if any(path.name in CHECKPOINTS for path in left):
        moving.mkdir(exist_ok=True)
        for path in left:
            path.replace(moving / path.name)
    if moving.exists():
        shutil.rmtree(previous, ignore_errors=True)
        moving.rename(previous)
        say(f"{folder} holds an earlier run; its files are now in {previous}")
