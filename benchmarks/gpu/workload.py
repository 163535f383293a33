"""One configuration of a training step on one GPU, for a few steps: what it took, as JSON.

    PYTHONPATH=src python -m benchmarks.gpu.workload --size gpt2 --micro-batch 4 --json figures.json

It is made of the trainer's own parts, on random tokens. Under `tightfit.dryrun` the same script, unmodified, gives the
prediction. Out of memory is a result: it is written, and then raised.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import card
from tightfit.config import TrainConfig
from tightfit.config.sizes import parse_bytes
from tightfit.models.model import GPT, GPTConfig
from tightfit.models.optimizer import build_optimizer
from tightfit.trainer import checkpoint as ckpt
from tightfit.trainer.checkpoint import Checkpoint
from tightfit.trainer.distributed import World
from tightfit.trainer.hardware import Hardware, choose_hardware, set_process_options
from tightfit.trainer.setup import build_model, build_state
from tightfit.trainer.step import StepState, dropout_seed, evaluation_loss, optimizer_step

SIZES = {
    "tiny": (2, 2, 64),
    "6x384": (6, 6, 384),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
"""n_layer, n_head, n_embd."""
DEEDS = ("train", "eval", "save", "resume", "hf-trainer")


def main() -> None:
    options = _parser().parse_args()
    others = card.used_by_nvml() or 0  # before this process has a context
    card.require()
    if options.act_as:  # before anything is allocated
        allowed = parse_bytes(options.act_as) - parse_bytes(options.others)
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    if options.trace:
        torch.cuda.memory._record_memory_history(context=None)
    run = _Run(options, others)
    try:
        run.execute()
        run.found["outcome"] = "fits"
    except torch.OutOfMemoryError as error:
        run.failed(error)
        raise
    finally:
        run.write()


class _Run:
    """The configuration's parts, and what they took."""

    def __init__(self, options: argparse.Namespace, others: int) -> None:
        self.options, self.others = options, others
        self.phase = "setup"
        self.found: dict[str, Any] = {"outcome": "error", "step_ms": [], "loss": None}
        self.generator = torch.Generator().manual_seed(0)
        torch.cuda.synchronize()  # makes the context
        self.context_start = self._context()

    def execute(self) -> None:
        do = self.options.do
        if "hf-trainer" in do:
            self._hf_trainer()
            return
        self.config, self.shape = _config(self.options), _shape(self.options)
        self.hardware = choose_hardware(self.config)
        set_process_options(self.hardware)
        torch.manual_seed(self.config.seed)
        with tempfile.TemporaryDirectory(prefix="tightfit-gpu-") as folder:
            start = self._checkpoint_of_the_host(Path(folder)) if "resume" in do else None
            self.phase = "resume" if start else "setup"
            self.model = build_model(self.config, self.shape, start, self.hardware.device)
            self.state = _state(self.options, self.config, self.model, start, self.hardware)
            deeds: dict[str, Callable[[], None]] = {
                "train": self._train,
                "eval": self._evaluate,
                "save": lambda: self._save(Path(folder)),
            }
            for deed in do:
                if deed in deeds:
                    self.phase = deed
                    deeds[deed]()

    def _train(self) -> None:
        options, config = self.options, self.config
        for step in range(options.steps):
            torch.cuda.synchronize()
            started = time.perf_counter()
            result = optimizer_step(
                self.state,
                self._batches(options.accumulation),
                passes=options.accumulation,
                tokens=options.accumulation * options.micro_batch * options.block,
                learning_rate=config.learning_rate,
                grad_clip=config.grad_clip,
                seed_of_pass=(lambda number, step=step: dropout_seed(0, step, number)) if options.dropout else None,
            )
            self.found["loss"] = float(result.loss)
            torch.cuda.synchronize()
            self.found["step_ms"].append(round((time.perf_counter() - started) * 1000, 3))

    def _evaluate(self) -> None:
        evaluation_loss(self.state, self._batches(2))

    def _save(self, folder: Path) -> None:
        ckpt.save(folder, _content(self.config, self.model, self.state.optimizer))

    def _checkpoint_of_the_host(self, folder: Path) -> Checkpoint:
        """A checkpoint that never was on the card, so that what is measured is the resuming alone."""
        model = build_model(self.config, self.shape, None, torch.device("cpu"))
        optimizer = build_optimizer(model.parameters(), weight_decay=0.1, learning_rate=1e-4, betas=(0.9, 0.95))
        ckpt.save(folder, _content(self.config, model, optimizer))
        return ckpt.load_file(folder / ckpt.BEST)

    def _batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random tokens, moved to the card as the trainer moves them."""
        options = self.options
        for _ in range(count):
            shape = (options.micro_batch, options.block)
            pair = (torch.randint(0, options.vocab, shape, generator=self.generator).pin_memory() for _ in range(2))
            inputs, targets = (host.to("cuda", non_blocking=True) for host in pair)
            yield inputs, targets

    def _hf_trainer(self) -> None:
        """transformers' GPT-2 under its Trainer."""
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

        options = self.options
        layers, heads, width = SIZES[options.size]
        rate = options.dropout
        model = GPT2LMHeadModel(
            GPT2Config(
                n_layer=layers, n_head=heads, n_embd=width, vocab_size=options.vocab, n_positions=options.block,
                resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate, use_cache=False,
            )
        )  # fmt: skip
        count = options.steps * options.micro_batch * options.accumulation
        tokens = torch.randint(0, options.vocab, (count, options.block), generator=self.generator)
        self.phase = "train"
        with tempfile.TemporaryDirectory(prefix="tightfit-gpu-") as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=options.micro_batch,
                gradient_accumulation_steps=options.accumulation,
                gradient_checkpointing=options.checkpointing > 0,
                bf16=options.dtype == "bfloat16",
                fp16=options.dtype == "float16",
                optim="adamw_torch_fused" if options.optimizer == "fused" else "adamw_torch",
                torch_compile=options.compile,
                max_steps=options.steps,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            rows = [{"input_ids": row, "labels": row} for row in tokens]
            result = Trainer(model=model, args=arguments, train_dataset=rows).train()
        self.found["loss"] = result.training_loss

    def failed(self, error: torch.OutOfMemoryError) -> None:
        """Keep what an out-of-memory error says and where it came from."""
        phase = _phase_of(error.__traceback__) if self.phase == "train" else self.phase
        message = str(error)
        self.found |= {"outcome": "out_of_memory", "phase": phase, "message": message}
        self.found["failure"] = card.read_message(message)

    def write(self) -> None:
        used, source = card.device_used_bytes()
        self.found |= card.peaks() | card.facts()
        self.found |= {
            "device_used_bytes": used - self.others,
            "others_bytes": self.others,
            "used_source": source,
            "context_start_bytes": self.context_start,
            "context_bytes": self._context(),
            "allowed_bytes": _allowed_bytes(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if self.options.trace:
            from benchmarks.gpu.tracefile import compact

            torch.cuda.synchronize()
            Path(self.options.trace).write_text(json.dumps(compact(torch.cuda.memory._snapshot())))
        if self.options.json:
            Path(self.options.json).write_text(json.dumps(self.found))

    def _context(self) -> int:
        """Bytes of this process outside PyTorch's allocator."""
        return card.device_used_bytes()[0] - self.others - torch.cuda.memory_reserved()


def _config(options: argparse.Namespace) -> TrainConfig:
    layers, heads, width = SIZES[options.size]
    return TrainConfig(
        device="cuda",
        dtype=options.dtype,
        compile=options.compile,
        loss=options.loss,
        activation_checkpointing=options.checkpointing,
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        block_size=options.block,
        batch_size=options.micro_batch,
        gradient_accumulation_steps=options.accumulation,
        vocab_size=options.vocab,
        dropout=options.dropout,
    )


def _shape(options: argparse.Namespace) -> GPTConfig:
    layers, heads, width = SIZES[options.size]
    return GPTConfig(
        n_layer=layers, n_head=heads, n_embd=width, block_size=options.block, vocab_size=options.vocab,
        dropout=options.dropout, bias=False,
    )  # fmt: skip


def _state(
    options: argparse.Namespace, config: TrainConfig, model: GPT, start: Checkpoint | None, hardware: Hardware
) -> StepState:
    """The trainer's own, whose optimizer is fused; or with torch's other two kinds of AdamW, which it does not use."""
    if options.optimizer == "fused":
        return build_state(config, model, start, hardware, World())
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), foreach=options.optimizer == "foreach"
    )
    return StepState(
        model=torch.compile(model) if hardware.compile else model,  # type: ignore[arg-type]
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cuda", enabled=hardware.dtype == torch.float16),
        autocast=hardware.autocast,
    )


def _content(config: TrainConfig, model: GPT, optimizer: torch.optim.Optimizer) -> Checkpoint:
    return Checkpoint(
        model_config=model.config,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        step=1,
        best_val_loss=10.0,
        config=vars(config),
    )


def _phase_of(trace: TracebackType | None) -> str:
    """Forward, loss, backward or optimizer, by the lines that an error came through, outermost first."""
    for frame in traceback.extract_tb(trace):
        if frame.name == "backward" and frame.filename.endswith("torch/_tensor.py"):
            return "backward"
        if "torch/optim/" in frame.filename or frame.name == "clip_grad_norm_":
            return "optimizer"
        if frame.filename.endswith("gpt/loss.py"):
            return "loss"
    return "forward"


def _allowed_bytes() -> int:
    """What a memory fraction lets PyTorch reserve; 0 without a limit."""
    fraction = torch.cuda.get_per_process_memory_fraction()
    total: int = torch.cuda.get_device_properties(0).total_memory
    return 0 if fraction == 1 else round(fraction * total)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences in a forward pass")
    parser.add_argument("--accumulation", type=int, default=1, help="forward passes for each step")
    parser.add_argument("--block", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--loss", choices=("auto", "full", "chunked", "liger"), default="auto")
    parser.add_argument("--checkpointing", type=int, default=0, help="blocks that are recomputed in backward")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--optimizer", choices=("fused", "foreach", "loop"), default="fused")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--do", nargs="+", choices=DEEDS, default=["train"], help="in this order; resume is the start")
    parser.add_argument("--act-as", help="let the card act as one of this size, such as 11.69GiB")
    parser.add_argument("--others", default="0", help="of which others, and this process's context, take so much")
    parser.add_argument("--trace", help="file for the allocator's compact trace")
    parser.add_argument("--json", help="file for the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
