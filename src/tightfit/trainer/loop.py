"""Run training from the configuration to the last checkpoint: nanoGPT's main path, in execution order."""

import math
import os
import signal
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NoReturn, cast

import msgspec
import torch
from torch import Tensor

from tightfit.config import (
    LOSSY_KEYS,
    Resolved,
    SampleConfig,
    TrainConfig,
    batch_split,
    describe,
    refuse_processes,
    to_dict,
)
from tightfit.data import open_dataset
from tightfit.data.batches import Batches, Purpose
from tightfit.errors import ConfigError, TightfitError
from tightfit.models.loss import LossKind
from tightfit.models.model import GPT, GPTConfig
from tightfit.models.optimizer import SavedOptimizer, plain_state
from tightfit.storage import AGENTS, BEST, LAST, without_temporary_folder, write_aside
from tightfit.system import host_memory
from tightfit.trainer import checkpoint as ckpt
from tightfit.trainer.atomic import reset_scaler
from tightfit.trainer.checkpoint import Checkpoint
from tightfit.trainer.distributed import (
    Agents,
    World,
    agents,
    process_group,
    same_weights,
    was_started_by,
    world_of_environment,
)
from tightfit.trainer.events import PlanEvent
from tightfit.trainer.fallback import Fallback, Halving, Phase, Settings
from tightfit.trainer.feed import Feed
from tightfit.trainer.hardware import Hardware, choose_hardware, set_process_options
from tightfit.trainer.metrics import Reporter, Stopwatch
from tightfit.trainer.out_of_memory import (
    Kind,
    is_out_of_memory,
    release_frames,
    release_memory,
    set_process_warnings,
)
from tightfit.trainer.ranks import Ranks
from tightfit.trainer.recovery import BeyondSaving, OutOfMemory, Recovery, last_line
from tightfit.trainer.resident import memory_use, set_process_malloc
from tightfit.trainer.sample import sample_text
from tightfit.trainer.saving import Saver
from tightfit.trainer.setup import (
    build_model,
    build_shards,
    build_state,
    data_order_changes,
    model_config,
    refuse_other_run,
    refuse_other_text,
    run_mesh,
    starting_point,
)
from tightfit.trainer.signals import handling_signals
from tightfit.trainer.spread import MakePlan, SpreadPlan, agreed_plan, as_planned, with_sharding
from tightfit.trainer.step import StepResult, StepState, dropout_seed, evaluation_loss, optimizer_step
from tightfit.trainer.stored import has_checkpoint, rename_damaged
from tightfit.trainer.supervise import STATUS, Status, learnt, report_status
from tightfit.trainer.watchdog import Pulse, Watchdog
from tightfit.units import GIB
from tightfit.wording import say


@dataclass(frozen=True)
class RunResult:
    """End of a run."""

    step: int
    """Optimizer steps done in total."""
    best_val_loss: float
    stopped_by: signal.Signals | None = None
    """The signal that ended it early, after saving."""


class NotFinite(TightfitError):
    """A loss of nan or inf, in a run that is to stop there; the parameters are those before that step."""

    exit_code = 1


def train(resolved: Resolved[TrainConfig], fallback: Fallback | None = None, plan: MakePlan | None = None) -> RunResult:
    """Train as configured. If the run cannot be done, raise one of this package's errors; nothing is lost.

    `fallback` decides the changes when memory runs out; by default everything is halved. `plan` decides how a model is
    spread over several processes where the configuration has a sharding.
    """
    config = resolved.config
    world = world_of_environment()
    hardware = choose_hardware(config, local_rank=world.local_rank, local_size=world.local_size)
    _refuse(config, world)
    os.environ.update(without_temporary_folder())
    set_process_options(hardware, activation_memory_budget=config.activation_memory_budget)
    if config.recover and hardware.device.type == "cpu":
        set_process_warnings()
    with process_group(world, config.backend, hardware.device) as start:
        reporter = Reporter(is_main=world.is_main)
        with ExitStack() as at_end:
            at_end.callback(reporter.close)
            started_by = agents(world)
            resolved = _restarted(resolved, started_by, world, reporter)
            spread = agreed_plan(resolved, plan, world, hardware.device, log=reporter.log)
            if spread is not None:
                resolved, fallback = as_planned(resolved, spread), spread.fallback
            return _Run(resolved, started_by, world, hardware, reporter, fallback, at_end, spread).execute(start)


def _refuse(config: TrainConfig, world: World) -> None:
    if config.shard != "none" and "RANK" not in os.environ:
        raise ConfigError(say("trainer.loop.shard_alone", shard=config.shard))
    refuse_processes(config, world.size, world.local_size)
    if config.offloads("activations") and not config.activation_checkpointing:
        raise ConfigError(say("trainer.loop.nothing_to_offload"))


def _restarted(
    resolved: Resolved[TrainConfig], started_by: Agents, world: World, reporter: Reporter
) -> Resolved[TrainConfig]:
    """Resume the run if torchrun restarted its processes: with their own arguments they would begin it anew."""
    config, folder = resolved.config, Path(resolved.config.out_dir)
    goes_on = world.is_main and was_started_by(folder, started_by) and has_checkpoint(folder)
    if config.init_from == "resume" or config.eval_only or not world.from_main(goes_on):
        return resolved
    reporter.log(say("trainer.loop.restarted", folder=folder))
    return replace(resolved, config=replace(config, init_from="resume"))


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Warm up linearly over `warmup_iters`, then follow half a cosine down to `min_lr` at `lr_decay_iters`.

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
        started_by: Agents,
        world: World,
        hardware: Hardware,
        reporter: Reporter,
        fallback: Fallback | None,
        at_end: ExitStack,
        spread: SpreadPlan | None,
    ) -> None:
        config, self._at_end = resolved.config, at_end
        self.config, self.world, self.hardware, self.reporter = config, world, hardware, reporter
        self.folder, self.agents = Path(config.out_dir), started_by
        self.lossy = {key: getattr(config, key) for key in LOSSY_KEYS if resolved.sources[key] == "plan"}
        """Keys that a plan set although they change the result; a process that takes over must not choose them anew."""
        for key, value, source in describe(resolved):
            reporter.log(f"{key} = {value!r} ({source})")
        if world.is_main and config.init_from == "resume" and self.folder.is_dir():
            self._take_folder()
        sharded = config.shard != "none" and world.size > 1
        self.recovery = Recovery(
            world, hardware.device, reporter.log, reporter.event, enabled=config.recover, sharded=sharded
        )
        self.saver = Saver(self.folder, self._write_checkpoint, reporter.log)
        self.dataset = open_dataset(config.dataset, config.data_dir)
        self.step, self.best_val_loss, self.evaluated = 0, math.inf, False
        self.stopped_by: signal.Signals | None = None
        self._unread: list[tuple[int, Tensor]] = []
        self.digests: Mapping[str, object] = {}
        self._is_not_finite = False
        beginning: Phase = "resume" if config.init_from == "resume" else "setup"
        start = self.recovery.tried(beginning, self._starting_point)
        shape = self._shape(start)
        self._choose_sharding(shape, spread)
        self.model, self.state = self.recovery.tried(beginning, partial(self._build, shape, start))
        self._set_process_malloc(fallback)
        if self.state.shards:
            self.state.shards.same_weights()
        elif world.size > 1 and config.recover:
            same_weights(self.model.parameters())
        if start is not None and config.init_from == "resume":
            self._resume(start)
        self.ranks = Ranks(world, reporter.log, reporter.event)
        self.first_step = self.saver.saved_step = self.recovery.step = self.step
        if config.async_save:
            from tightfit.trainer.staging import BackgroundSaves  # DCP takes a second to import

            self.background = BackgroundSaves(world, in_parts=self.state.shards is not None)
            self.saver.begin = self._begin_checkpoint
            at_end.callback(self.saver.finish)
        self._begin(shape, fallback)

    def _choose_sharding(self, shape: GPTConfig, plan: SpreadPlan | None) -> None:
        """Choose where configuration and plan leave it open, and connect the processes accordingly."""
        world = self.world
        self.config, event = with_sharding(self.config, plan, shape, world, self.hardware.device)
        if event is not None:
            self.reporter.log(say("trainer.loop.shard_chosen", shard=event.shard, reason=event.reason))
            self.reporter.event(self.step, event)
        if plan and plan.line:
            self.reporter.log(plan.line)
        self.mesh = run_mesh(self.config, world, self.hardware.device)
        if self.mesh:
            self.saver.agreed = world.from_main

    def _starting_point(self) -> Checkpoint | None:
        start = starting_point(self.config.init_from, self.config.out_dir, log=self.reporter.log)
        resumed = start if self.config.init_from == "resume" and self.world.is_main else None
        if resumed is not None:
            refuse_other_run(self.config, resumed, self.dataset)
        self.recovery.agree()
        if resumed is not None:
            rename_damaged(Path(self.config.out_dir), log=self.reporter.log)
        return start

    def _build(self, shape: GPTConfig, start: Checkpoint | None) -> tuple[GPT, StepState]:
        torch.manual_seed(self.config.seed)
        shards = build_shards(self.config, shape, start, self.hardware, self.mesh) if self.mesh else None
        model = shards.model if shards else build_model(self.config, shape, start, self.hardware.device)
        state = build_state(self.config, model, start, self.hardware, self.world, shards)
        self.recovery.guard(state)
        self.recovery.agree()
        return model, state

    def _shape(self, start: Checkpoint | None) -> GPTConfig:
        """Return the model's shape, which the dataset has to suit."""
        shape = model_config(self.config, start, self.dataset, log=self.reporter.log)
        if self.world.is_main:
            self.dataset.validate(block_size=shape.block_size, vocab_size=shape.vocab_size)
            if start is not None and self.config.init_from == "resume":
                refuse_other_text(self.config, start, self.dataset)
            self.digests = {file.path.stem: file.digest() for file in (self.dataset.train, self.dataset.val)}
        for reason in self.hardware.reasons:
            self.reporter.log(reason)
        return shape

    def _set_process_malloc(self, fallback: Fallback | None) -> None:
        """Let the C library keep freed memory if there is room for it; else return it, as a plan was predicted.

        Kept memory is fragmented: GPT-2 124M would hold 150 MiB more. So models with over 1 GiB of float32
        parameters, gradients and moments do not keep it, and no model does where less than 1 GiB is left.
        """
        if self.hardware.device.type != "cpu":
            return
        has_room = self.model.count_parameters() * 16 <= GIB and host_memory().budget_bytes >= GIB
        # a model in shards allocates and frees its gathered weights all the time, and is there to save memory
        keeps = has_room and not self.state.shards and not (fallback and fallback.is_tight)
        keeps = keeps and set_process_malloc(keep=True)
        if not keeps:
            set_process_malloc(keep=False)

    def _begin(self, shape: GPTConfig, fallback: Fallback | None) -> None:
        """Split the steps as configured, and print how."""
        config, world = self.config, self.world
        self.batches = Batches(self.dataset, shape.block_size, config.effective_batch, config.seed)
        self.tokens_per_step = config.effective_batch * shape.block_size
        share = world.share(config.effective_batch)
        self.feed = Feed(
            self.batches,
            self.hardware.device,
            share=share,
            steps=config.max_iters,
            prefetch=config.prefetch,
            in_step_with=world.size if self.state.shards else 1,
        )
        split = batch_split(config, world.size)
        self.eval_sequences = split.eval_sequences
        self.settings = Settings(
            micro_batch=split.micro_batch,
            eval_micro_batch=split.eval_micro_batch,
            loss=config.loss,
            checkpointed_blocks=config.activation_checkpointing,
        )
        before = learnt()
        self.wanted = before.wanted if before else self.settings
        self._split_step()
        if fallback is not None and (peak := fallback.predicted_peak_bytes) is not None:
            self.reporter.event(self.step, PlanEvent(predicted_peak_bytes=peak, **asdict(self.settings)))
        if before or fallback is None:
            fallback = Halving(shape.n_layer, len(share), self.wanted)
        self.recovery.watch(self, fallback, failed=before.failed if before else None)
        begins = say(
            "trainer.loop.begins",
            parameters=self.model.count_parameters(),
            tokens=self.tokens_per_step,
            passes=len(self.feed.passes),
            sequences=len(self.feed.passes[0]),
            block_size=shape.block_size,
            each=say("trainer.loop.each_process", processes=world.size) if world.size > 1 else "",
        )
        self.reporter.log(begins)

    def use_settings(self, settings: Settings) -> None:
        """Run every pass from the next one on with `settings`; a compiled model compiles again by itself."""
        self.settings = settings
        self.model.loss_kind = cast(LossKind, settings.loss)
        self.model.checkpointed_blocks = settings.checkpointed_blocks
        self._split_step()

    def _split_step(self) -> None:
        self.feed.split(self.settings.micro_batch, step=self.step)
        self._report_status()

    def execute(self, start: str) -> RunResult:
        """Train to the end; `start` is the name of this start of the processes."""
        config, world = self.config, self.world
        if config.eval_only:
            self._evaluate()
            return self._result()
        if world.is_main:
            self._start_folder()
        shares = self.state.shards is not None and "MASTER_PORT" in os.environ
        pulse = Pulse(world, start) if shares else None
        # torchrun waits for all of its processes: one that stopped would keep the others waiting
        self.watchdog = Watchdog(self.reporter.log, ends=STATUS in os.environ or shares, pulse=pulse)
        self._at_end.callback(self.watchdog.close)
        with handling_signals(_ending_signals(), self._stop, once=True):
            try:
                result = self._loop()
            except NotFinite:
                self._save_before_the_end()
                raise
            except OutOfMemory as error:
                self._end_without_memory(error)
            except (MemoryError, RuntimeError, OSError) as error:  # between two steps: in a log, in metrics
                if not config.recover or is_out_of_memory(error) is not Kind.RECOVERABLE:
                    raise
                message = last_line(error)
                release_frames(error)
                release_memory(self.hardware.device)
                found = OutOfMemory(say("trainer.loop.between_steps", step=self.step, reason=message))
                found.message, found.settings = message, self.settings
                self._end_without_memory(found)
        if result.stopped_by is None and config.sample_at_end and self.state.shards:
            self.recovery.tried("sample", self._sample, undo=self._undo_pass)
        elif result.stopped_by is None and config.sample_at_end and world.is_main:
            self.recovery.tried("sample", self._sample, alone=True)
        return result

    def _end_without_memory(self, error: OutOfMemory) -> NoReturn:
        """Save, and raise `error`, or leave the rest of the run to a new process of the supervisor."""
        if error.of_all or not self.state.shards:  # a model in shards takes all of them to save
            self._save_before_the_end()
        if error.of_all:  # torchrun ends the others' saving when one process ends
            self.world.any(False, self.hardware.device)
        if self.step > self.first_step and STATUS in os.environ:
            # It did fit: a new process has the memory lost to fragments and the compilers' leftovers.
            raise BeyondSaving(say("trainer.loop.room_in_new_process", error=error)) from error
        raise error

    def _take_folder(self) -> None:
        """Hold `out_dir` until the end of the run."""
        if not self.config.eval_only:
            self._at_end.enter_context(ckpt.own_folder(self.folder))

    def _start_folder(self) -> None:
        """Put the folder in order, and write the run's first lines."""
        with ckpt.folder_errors(self.folder):
            if self.config.init_from != "resume":
                self._take_folder()
                ckpt.set_aside(self.folder, log=self.reporter.log)
            if self.agents.names:
                write_aside(self.folder / AGENTS, msgspec.json.encode(self.agents))
            self.reporter.start(self.config, first_step=self.step, evaluated=self.evaluated)

    def _stop(self, number: signal.Signals) -> None:
        """Ask for a stop after the current step; a second signal has its usual effect."""
        self.stopped_by = number

    def _loop(self) -> RunResult:
        config = self.config
        watch = Stopwatch(lambda: self.recovery.waited_s)
        watch.restart(self.step)
        while True:
            self.recovery.step, last = self.step, self.step >= config.max_iters
            if not self.evaluated and (last or self.step % config.eval_interval == 0):
                if self._evaluate():
                    self._save_after_evaluation()
                watch.restart(self.step)
            if self.world.any(self.stopped_by is not None, self.hardware.device):
                self._save(LAST, is_last=True)
                self.stopped_by = self.stopped_by or signal.SIGTERM
                saved = say("trainer.loop.saved", step=self.step, folder=self.folder)
                self.reporter.log(f"{self.stopped_by.name}: {saved}")
                return self._result()
            if last:
                return self._result()
            with self.watchdog.step(self.step):
                result = self.recovery.tried("forward", self._train_step, undo=self._undo_step)
            self.step, self.evaluated = self.step + 1, False
            self._report_not_finite(result)
            if (self.step - 1) % config.log_interval == 0:
                self._log(result, watch)
            self.recovery.step_done()
            if self.reporter.reader_has_gone:  # as a shell's `| head` ends other programs, but nothing is lost
                self.stopped_by = self.stopped_by or getattr(signal, "SIGPIPE", signal.SIGTERM)
            if self.saver.poll():
                self._report_status()
            if self._save_is_due() or (config.save_interval and self.step % config.save_interval == 0):
                self._save(LAST)

    def _save_is_due(self) -> bool:
        """Return True if a save failed and it is time for the next try; processes that save together agree on it."""
        due = self.saver.is_due()
        return self.world.any(due, self.hardware.device) if self.state.shards else due

    def _report_not_finite(self, result: StepResult) -> None:
        """Log the first of several steps with a loss that is not finite: at once, or at the next line on a device."""
        self._unread.append((self.step - 1, result.loss))
        if self.hardware.device.type != "cpu" and (self.step - 1) % self.config.log_interval:
            return
        unread, self._unread = self._unread, []
        bad = [step for step, loss in unread if not math.isfinite(float(loss))]
        if bad and self.config.on_nan == "warn" and not self._is_not_finite:
            self.reporter.log(say("trainer.loop.nan", step=bad[0]))
        self._is_not_finite = bool(bad)

    def _train_step(self) -> StepResult:
        config, step = self.config, self.step
        return optimizer_step(
            self.state,
            self.feed.of_step(),
            passes=len(self.feed.passes),
            tokens=self.tokens_per_step,
            learning_rate=learning_rate_at(config, step),
            grad_clip=config.grad_clip,
            seed_of_pass=(lambda number: dropout_seed(config.seed, step, self.feed.passes[number].start))
            if config.dropout
            else None,
            accepts=self._accepts,
        )

    def _accepts(self, result: StepResult) -> bool:
        """Return False for a step without a finite loss that is to be skipped; NotFinite for one to stop at."""
        if self.config.on_nan == "warn":  # reported when the loss is read: waiting for it here would cost time
            return True
        finite = bool(torch.isfinite(result.loss))
        if not self.world.any(not finite, self.hardware.device):
            return True
        if self.config.on_nan == "stop":
            raise NotFinite(say("trainer.loop.stops_at_nan", step=self.step, saved=self.folder))
        self.reporter.log(say("trainer.loop.skips_nan", step=self.step))
        return False

    def _undo_step(self) -> None:
        """Drop everything a step leaves before its update: gradients, the scaler's notes, data read ahead."""
        self.state.optimizer.zero_grad(set_to_none=True)
        self._undo_pass()
        self.model.zero_grad(set_to_none=True)  # of weights whose optimizer is on the host
        reset_scaler(self.state.optimizer, self.state.scaler)
        self.feed.restart(self.step)

    def _undo_pass(self) -> None:
        """Drop the leftovers of a forward or backward pass that failed; only a model in shards keeps any."""
        if self.state.shards:
            self.model = self.state.model = self.state.shards.rebuild()
            self.state.shards.sums_each_pass = True

    def _evaluate(self) -> bool:
        """Print and keep the mean losses of both splits; return False if a signal cut the evaluation short."""
        found = self.recovery.tried("eval", self._evaluation_sums, undo=self._undo_pass)
        sums = self.world.sum(found, self.hardware.device)
        if self.world.any(self.stopped_by is not None, self.hardware.device):
            return False
        losses = {"train": sums[0] / sums[1], "val": sums[2] / sums[3]}
        self.reporter.evaluation(self.step, losses, learning_rate_at(self.config, self.step))
        self.evaluated = True
        self.improved = losses["val"] < self.best_val_loss
        self.best_val_loss = min(self.best_val_loss, losses["val"])
        return True

    def _evaluation_sums(self) -> list[float]:
        """Return the summed loss and the tokens of this process's share: of the training split, then of the other."""
        share = self.world.share(self.eval_sequences)
        sums: list[float] = []
        purposes: tuple[Purpose, ...] = ("evaluate train", "evaluate val")
        for purpose in purposes:
            wanted = self.feed.of_evaluation(
                purpose, self.step, share, self.settings.eval_micro_batch, sequences=self.eval_sequences
            )
            sums += evaluation_loss(self.state, takewhile(lambda _: not self._stops(), wanted))
        self.recovery.agree()
        return sums

    def _stops(self) -> bool:
        """Return True after a signal that ends the run; processes that share a model stop at the same pass."""
        stops = self.stopped_by is not None
        return self.recovery.agree(stops=stops) if self.state.shards else stops

    def _save_after_evaluation(self) -> None:
        """Save by nanoGPT's rule, and always at the end of a run."""
        if self.step == 0:
            return
        if self.improved or self.config.always_save_checkpoint:
            self._save(BEST)
        elif self.step >= self.config.max_iters:
            self._save(LAST)

    def _save(self, name: str, *, is_last: bool = False) -> None:
        """Save a checkpoint, at the end of the run with all means. The last good checkpoint stays."""
        if not self.world.is_main and not self.state.shards:
            return
        save = self.saver.save_last if is_last or self.step >= self.config.max_iters else self.saver.save
        save(name, self.step)
        self._report_status()

    def _begin_checkpoint(self, folder: Path, name: str) -> "Future[None]":
        """Copy the state, and write the copy in the background."""
        return self.background.begin(
            folder, self.recovery.tried("save", self._staged, alone=not self.state.shards), name
        )

    def _staged(self) -> Checkpoint:
        staged = self.background.staged(self._present_state())
        if self.state.shards:
            self.recovery.agree()
        return staged

    def _write_checkpoint(self, folder: Path, name: str, *, is_last: bool) -> None:
        write = partial(self._write_state, folder, name, is_last=is_last)
        self.recovery.tried("save", write, alone=not self.state.shards)

    def _write_state(self, folder: Path, name: str, *, is_last: bool) -> None:
        content = self._present_state()
        if not self.state.shards:
            ckpt.save(folder, content, name=name, is_last=is_last)
            return
        from tightfit.trainer.parts import save_parts  # DCP takes a second to import

        self.recovery.agree()
        save_parts(folder, content, self.world, name=name, is_last=is_last)
        self.recovery.agree()

    def _present_state(self) -> Checkpoint:
        """Return the run's state, its tensors those of the run; of a model in shards this process's part."""
        if shards := self.state.shards:
            return self._content(dict(shards.parameters()), plain_state(self.state.optimizer, in_shards=True))
        offload = self.state.offload
        weights = offload.full_weights(self.model) if offload else self.model.state_dict()
        return self._content(weights, plain_state(self.state.optimizer))

    def _content(self, weights: Mapping[str, Tensor], optimizer: SavedOptimizer) -> Checkpoint:
        return Checkpoint(
            model_config=self.model.config,
            model=weights,
            optimizer=optimizer,
            step=self.step,
            best_val_loss=self.best_val_loss,
            config=to_dict(self.config),
            scaler=self.state.scaler.state_dict(),
            evaluated=self.evaluated,
            data=self.digests,
        )

    def _save_before_the_end(self) -> None:
        """Save the steps since the last checkpoint, before a run ends that no longer fits."""
        if self.step > max(self.first_step, self.saver.saved_step):
            self._save(LAST, is_last=True)
            self.reporter.log(say("trainer.loop.saved", step=self.step, folder=self.folder))

    def _report_status(self) -> None:
        """Write the state for the supervisor, if there is one."""
        if self.world.is_main:
            status = Status(
                saved_step=self.saver.saved_step,
                n_layer=self.model.config.n_layer,
                activation_memory_budget=self.config.activation_memory_budget,
                lossy=self.lossy,
                settings=self.settings,
                wanted=self.wanted,
            )
            report_status(status)

    def _resume(self, start: Checkpoint) -> None:
        self.step, self.best_val_loss, self.evaluated = start.step, start.best_val_loss, start.evaluated
        self.reporter.log(say("trainer.loop.resumes", path=start.path, step=start.step))
        if self.step >= self.config.max_iters:
            self.reporter.log(say("trainer.loop.nothing_left", step=self.step, steps=self.config.max_iters))
        elif changes := data_order_changes(self.config, start):
            self.reporter.log(say("trainer.loop.data_order_changes", changes=", ".join(changes)))

    def _log(self, result: StepResult, watch: Stopwatch) -> None:
        numbers = self.recovery.tried("log", lambda: _as_floats(result), alone=True)
        pressed = self.recovery.is_pressed()
        ms, own_ms = watch.lap(self.step)
        memory = memory_use(self.hardware.device)
        own = [numbers["loss"], float(pressed), *self.ranks.parts(own_ms, memory.peak_bytes)]
        with self.recovery.waiting():
            loss, presses, *ranks = self.world.sum(own, self.hardware.device)
        if presses:
            self.recovery.relieve()
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
        self.reporter.step(self.step - 1, values, memory)
        self.ranks.note(self.step - 1, ranks)

    def _sample(self) -> None:
        config = self.config
        wanted = SampleConfig(start=config.start, max_new_tokens=config.sample_at_end, seed=config.seed)
        text = sample_text(self.model, self.dataset, wanted, self.hardware)
        if self.state.shards:  # all draw the same text, since each has a part of the model
            self.recovery.agree()
        self.reporter.log(text)

    def _result(self) -> RunResult:
        return RunResult(self.step, self.best_val_loss, self.stopped_by)


def _ending_signals() -> list[signal.Signals]:
    """Return the signals that end a run after its step; not SIGHUP where `nohup` made it ignored."""
    found = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    return found if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN else [*found, hangup]


def _as_floats(result: StepResult) -> dict[str, float]:
    """Return the numbers on the host, after waiting for the device."""
    norm = {} if result.grad_norm is None else {"grad_norm": float(result.grad_norm)}
    return {"loss": float(result.loss), **norm}
