"""The same small training, driven by each library as its documentation says."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.recovery.watch import ACCUMULATION, EVAL_INTERVAL, Watch
from tightfit.data.meta import Meta
from tightfit.models.model import GPT, GPTConfig

VOCAB, BLOCK, LAYERS, HEADS, WIDTH = 64, 16, 2, 2, 32
MICRO_BATCH, STEPS = 8, 20
EFFECTIVE_BATCH = MICRO_BATCH * ACCUMULATION
EVAL_BATCHES, LEARNING_RATE, SEED = 4, 1e-2, 0


def make_dataset(folder: Path) -> None:
    draw, characters = np.random.default_rng(SEED), "".join(chr(48 + number) for number in range(VOCAB))
    counts = {"train": (STEPS * EFFECTIVE_BATCH + 1) * BLOCK, "val": (EVAL_BATCHES * MICRO_BATCH + 1) * BLOCK}
    folder.mkdir(parents=True)
    for split, count in counts.items():
        draw.integers(0, VOCAB, count).astype("<u2").tofile(folder / f"{split}.bin")
    tokenizer = {"kind": "characters", "characters": characters}
    meta = Meta(vocab_size=VOCAB, tokenizer=tokenizer, train_tokens=counts["train"], val_tokens=counts["val"])
    (folder / "meta.json").write_text(meta.to_json())


class Sequences(Dataset):
    """The blocks of a file, as inputs and targets."""

    def __init__(self, path: Path, count: int) -> None:
        self._tokens, self._count = torch.from_numpy(np.fromfile(path, dtype="<u2").astype(np.int64)), count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        ids = self._tokens[number * BLOCK : (number + 1) * BLOCK + 1]
        return {"input_ids": ids[:-1], "labels": ids[1:]}


class MeanLoss(nn.Module):
    """The same GPT, called as transformers calls its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        shape = GPTConfig(block_size=BLOCK, vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH)
        self.gpt = GPT(shape).init_weights()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.gpt(input_ids, labels, scale=1.0 / labels.numel())}


def datasets(folder: Path) -> tuple[Sequences, Sequences]:
    train = Sequences(folder / "data" / "random" / "train.bin", STEPS * EFFECTIVE_BATCH)
    return train, Sequences(folder / "data" / "random" / "val.bin", EVAL_BATCHES * MICRO_BATCH)


def transformers_epoch(watch: Watch, folder: Path) -> None:
    _transformers(watch, folder, num_train_epochs=1)


def transformers_steps(watch: Watch, folder: Path) -> None:
    _transformers(watch, folder, max_steps=STEPS)


def _transformers(watch: Watch, folder: Path, **length: int) -> None:
    """`auto_find_batch_size`; but for what the task fixes and `save_strategy`, its defaults."""
    from transformers import Trainer, TrainingArguments

    train, val = datasets(folder)
    trainer = Trainer(
        model=MeanLoss(),
        args=TrainingArguments(
            output_dir=str(folder / "out"),
            auto_find_batch_size=True,
            per_device_train_batch_size=MICRO_BATCH,
            per_device_eval_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            **length,
            learning_rate=LEARNING_RATE,
            eval_strategy="steps",
            eval_steps=EVAL_INTERVAL,
            prediction_loss_only=True,
            save_strategy="no",
            seed=SEED,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=val,
    )
    watch.counter = lambda: trainer.state.global_step
    trainer.train()


def accelerate_docs(watch: Watch, folder: Path) -> None:
    """As accelerate's guide to memory has it: everything is built within the decorated function."""
    _accelerate(watch, folder, rebuild=True)


def accelerate_example(watch: Watch, folder: Path) -> None:
    """As accelerate's examples/by_feature/memory.py has it: model and optimizer outlive an attempt."""
    _accelerate(watch, folder, rebuild=False)


def _accelerate(watch: Watch, folder: Path, *, rebuild: bool) -> None:
    from accelerate import Accelerator
    from accelerate.utils import find_executable_batch_size, set_seed

    set_seed(SEED)
    train, val = datasets(folder)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    model: Any = None
    optimizer: Any = None
    done = 0
    watch.counter = lambda: done

    def build() -> None:
        nonlocal model, optimizer
        model = MeanLoss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def evaluate(loader: Any) -> None:
        model.eval()
        with torch.no_grad():
            for batch in loader:
                model(**batch)
        model.train()

    @find_executable_batch_size(starting_batch_size=MICRO_BATCH)
    def attempt(batch_size: int) -> None:
        nonlocal model, optimizer, done
        if rebuild:
            accelerator.free_memory()
            build()
        loader, val_loader = DataLoader(train, batch_size, shuffle=True), DataLoader(val, MICRO_BATCH)
        model, optimizer, loader, val_loader = accelerator.prepare(model, optimizer, loader, val_loader)
        model.train()
        done = 0
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
                if done % EVAL_INTERVAL == 0:
                    evaluate(val_loader)

    if not rebuild:
        build()
    attempt()


def lightning(watch: Watch, folder: Path) -> None:
    """`Tuner.scale_batch_size`, told not to go above the micro-batch that is wanted, then `fit`."""
    import lightning as L
    from lightning.pytorch.tuner import Tuner

    train, val = datasets(folder)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size, self.model = MICRO_BATCH, MeanLoss()

        def training_step(self, batch: dict[str, Tensor], _number: int) -> Tensor:
            return self.model(**batch)["loss"]

        def validation_step(self, batch: dict[str, Tensor], _number: int) -> None:
            self.model(**batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)

        def train_dataloader(self) -> DataLoader:
            return DataLoader(train, self.batch_size, shuffle=True)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(val, MICRO_BATCH)

    L.seed_everything(SEED)
    module = Module()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATION,
        val_check_interval=EVAL_INTERVAL * ACCUMULATION,
        default_root_dir=folder / "out",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    watch.stage, watch.counter = "search", lambda: trainer.global_step
    Tuner(trainer).scale_batch_size(module, init_val=MICRO_BATCH // 4, max_val=MICRO_BATCH)
    watch.stage = "train"
    trainer.fit(module)


def tightfit(watch: Watch, folder: Path) -> None:
    """The command `tightfit train`, in this process."""
    from tightfit.cli.main import main

    keys = {
        "dataset": "random", "data_dir": folder / "data", "out_dir": folder / "out", "n_layer": LAYERS,
        "n_head": HEADS, "n_embd": WIDTH, "block_size": BLOCK, "batch_size": MICRO_BATCH, "dropout": 0.0,
        "gradient_accumulation_steps": ACCUMULATION, "micro_batch": MICRO_BATCH, "max_iters": STEPS,
        "eval_interval": EVAL_INTERVAL, "eval_iters": EVAL_BATCHES, "log_interval": 1, "warmup_iters": 0,
        "learning_rate": LEARNING_RATE, "decay_lr": False, "device": "cpu", "dtype": "float32", "seed": SEED,
        "compile": False,
    }  # fmt: skip
    code = main(["train", *(f"--{key}={value}" for key, value in keys.items())])
    metrics = folder / "out" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    watch.counters = [row["step"] for row in rows if "ms" in row]
    if code:
        raise RuntimeError(f"exit code {code}")


@dataclass(frozen=True)
class Tool:
    """One way to survive."""

    name: str
    package: str
    drive: Callable[[Watch, Path], None]
    failures: tuple[str, ...] = ("backward", "optimizer", "evaluation")


TOOLS = {
    "transformers-epoch": Tool("transformers auto_find_batch_size, one epoch", "transformers", transformers_epoch),
    "transformers-steps": Tool("transformers auto_find_batch_size, 20 steps", "transformers", transformers_steps),
    "accelerate-docs": Tool("accelerate decorator, model built inside", "accelerate", accelerate_docs),
    "accelerate-example": Tool("accelerate decorator, model built outside", "accelerate", accelerate_example),
    "lightning": Tool(
        "Lightning, batch size finder, then fit",
        "lightning",
        lightning,
        ("backward", "optimizer", "evaluation", "search"),
    ),
    "tightfit": Tool("tightfit train", "tightfit", tightfit),
}
