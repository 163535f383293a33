"""The plan's choice against every other candidate and the public advice, on a card that acts as a small one.

    PYTHONPATH=src python -m benchmarks.gpu.fit --out results-of-my-card --minutes 7

GPT-2 124M, 64 x 1024 tokens a step in bfloat16, on 11.69 GiB of which others have 2 GiB. Each candidate is measured in
a fresh process for whole steps: its rate, its peak, or where it runs out. The plan and the advice come first, then the
others from the likeliest on. One row a candidate, in fit.csv; a candidate that has a row is not measured again.
"""

import argparse
import csv
import statistics
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.calibrate import DRY_CARD, WORKLOAD, read
from tightfit.config import Resolved, TrainConfig
from tightfit.errors import TightfitError
from tightfit.planner.candidates import Plan
from tightfit.planner.planning import PlanResult, Where, make_plan, named_card

FIELDS = (
    "candidate", "role", "dry", "outcome", "step_ms", "peak_reserved_bytes", "predicted_step_ms",
    "predicted_reserved_bytes", "seconds", "error", "gpu", "torch", "cuda", "driver", "date",
)  # fmt: skip
CARD, TOTAL, OTHERS = "RTX 3060 12GB", "11.69GiB", "2GiB"
EFFECTIVE, BLOCK, STEPS = 64, 1024, 4
ADVICE = Plan(micro_batch=4, eval_micro_batch=4, loss="full", activation_checkpointing=0, compile=False)
"""What is told to everybody: batch 4, accumulation 16, compile off."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for fit.csv")
    parser.add_argument("--minutes", type=float, default=7.0, help="no candidate is started after so long")
    parser.add_argument("--only", type=int, default=0, help="measure so many candidates at most; 0: all")
    parser.add_argument("--dry", action="store_true", help="a virtual H200 in the card's place; its times mean nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    measure(options.out / "fit.csv", minutes=options.minutes, most=options.only, dry=options.dry)


def measure(path: Path, *, minutes: float, most: int = 0, dry: bool = False, config: TrainConfig | None = None) -> None:
    """Measure the plan, the advice, then the others, each once."""
    ends = time.monotonic() + 60 * minutes
    config = config or TrainConfig(
        batch_size=EFFECTIVE, gradient_accumulation_steps=1, block_size=BLOCK, vocab_size=50304, dtype="bfloat16"
    )
    chosen = _plan(config, dry=dry)
    done = {row["candidate"] for row in read(path)}
    for role, plan in candidates(config, chosen)[: most or None]:
        if _name(plan) in done:
            continue
        if time.monotonic() >= ends:
            print(f"{minutes:g} minutes are over", flush=True)
            return
        _append(path, _row(config, role, plan, chosen, dry=dry))


def candidates(config: TrainConfig, chosen: PlanResult) -> list[tuple[str, Plan]]:
    """Roles and plans, the most telling first: larger micro-batches and less recomputing are likelier to be fast."""
    best = chosen.choice.best
    found = [("plan", best.plan)] if best is not None else []
    found.append(("advice", ADVICE))
    for compiled, blocks, size, loss in product(
        (True, False), (0, config.n_layer // 2, config.n_layer), (8, 4, 16, 2, 32, 64), ("full", "chunked")
    ):
        plan = replace(ADVICE, micro_batch=size, eval_micro_batch=size, loss=loss, compile=compiled)
        found.append(("other", replace(plan, activation_checkpointing=blocks)))
    names = [_name(plan) for _, plan in found]
    return [each for number, each in enumerate(found) if names[number] not in names[:number]]


def _plan(config: TrainConfig, *, dry: bool) -> PlanResult:
    """As for the small card, but with the kernels of the card that is there."""
    from tightfit.config.sizes import parse_bytes

    name = DRY_CARD if dry else _card_name()
    small = named_card(CARD, memory_bytes=parse_bytes(TOTAL), used_by_others_bytes=parse_bytes(OTHERS))
    here = named_card(name)
    where = Where(gpu=here.gpu, budget=small.budget, known=here.known)
    return make_plan(Resolved(config, dict.fromkeys(vars(config), "default"), ()), where)


def _card_name() -> str:
    import torch

    return torch.cuda.get_device_name(0)


def _row(config: TrainConfig, role: str, plan: Plan, chosen: PlanResult, *, dry: bool) -> dict[str, Any]:
    words = [
        f"--micro-batch={plan.micro_batch}", f"--accumulation={plan.passes(config.effective_batch)}",
        f"--block={config.block_size}", f"--vocab={config.vocab_size}", f"--loss={plan.loss}",
        f"--checkpointing={plan.activation_checkpointing}", f"--steps={STEPS}", f"--act-as={TOTAL}",
        f"--others={OTHERS}", f"--size={_size(config)}", *(["--compile"] if plan.compile else []),
    ]  # fmt: skip
    ran = (
        processes.run_on_virtual(WORKLOAD, words, {"gpu": DRY_CARD}) if dry else processes.run_on_card(WORKLOAD, words)
    )
    figures = ran.figures or {"outcome": "error"}
    row = {column: figures.get(column, "") for column in ("outcome", "gpu", "torch", "cuda", "driver")}
    row |= {"candidate": _name(plan), "role": role, "dry": "yes" if dry else "", "seconds": ran.seconds}
    row |= {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    row["peak_reserved_bytes"] = figures.get("reserved_bytes", "")
    times = figures.get("step_ms", [])[1:]
    if times and not dry:
        sequences = plan.micro_batch * plan.passes(config.effective_batch)  # the last pass is a full one here
        row["step_ms"] = round(statistics.median(times) * config.effective_batch / sequences, 2)
    if row["outcome"] == "error":
        row["error"] = ran.last_line
    for each in (*chosen.choice.offered, *chosen.choice.refused):
        if each.plan == plan:
            row["predicted_reserved_bytes"] = each.peak_bytes
            row["predicted_step_ms"] = round(1000 * each.step_s(config.effective_batch), 2)
    return row


def _size(config: TrainConfig) -> str:
    from benchmarks.gpu.workload import SIZES

    return next(name for name, shape in SIZES.items() if shape == (config.n_layer, config.n_head, config.n_embd))


def _name(plan: Plan) -> str:
    words = [f"b{plan.micro_batch}", plan.loss, "compiled" if plan.compile else "eager"]
    return "-".join([*words, *([f"c{plan.activation_checkpointing}"] if plan.activation_checkpointing else [])])


def _append(path: Path, row: dict[str, Any]) -> None:
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, restval="")
        if is_new:
            table.writeheader()
        table.writerow(row)
    print(", ".join(f"{name} {row[name]}" for name in FIELDS[:8] if row.get(name)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except TightfitError as error:
        sys.exit(str(error))
