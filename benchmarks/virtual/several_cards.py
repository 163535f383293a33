"""Published runs on several cards against the virtual GPU: memory of a card and time of a step, to CSV.

usage: python benchmarks/virtual/several_cards.py [--only WORD] [--row NUMBER]

results/several_cards.csv holds the rows: who measured what, on which cards and links. Each is played as the first of
its cards by players/llama_fsdp2.py, a Llama of ours with the choices that torchtitan publishes: not torchtitan itself.
Models of more than 16 blocks are played with 4 and 6 of them, as a plan is (tightfit.planner.layers), and whole where
memory was measured. `measured` is in GiB, reserved or allocated (`metric`), and tokens a second
for each card; `bandwidth_gbps` is that of the cards' memory where it is not the usual. `torch` is the version whose
RMSNorm is played, `keeps_logits` that the logits outlive the backward pass, as torchtitan had it until June 2024.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from row_files import Row, read_rows, write_rows

HERE = Path(__file__).parent
TABLE = HERE / "results" / "several_cards.csv"
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
WIDE = 1 << 50
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--row", type=int)
    parser.add_argument("--layers", type=int, default=0)
    options = parser.parse_args()
    rows = read_rows(TABLE)
    if options.row is not None:
        print(json.dumps(play(rows[options.row], options.layers)))
        return
    for number, row in enumerate(rows):
        if options.only in ",".join(row.values()):
            predict(number, row)
            print(row["model"], row["cards"], row["memory_error"], row["rate_error"], flush=True)
            write_rows(TABLE, rows)
    print(summary(rows, "memory_error"), summary(rows, "rate_error"), sep="\n")


def play(row: Row, layers: int) -> dict[str, object]:
    """Play a row's run with `layers` blocks in this process, which is spent after it."""
    from msgspec import to_builtins
    from players.llama_fsdp2 import train

    from tightfit.links import split_count
    from tightfit.simulation.speed import Meter
    from tightfit.vgpu.findings import findings_of
    from tightfit.vgpu.records import Settings
    from tightfit.vgpu.session import VirtualSession

    nodes, per_node, name = split_count(f"{row['cards']}x {row['card']}")
    sizes = {"WORLD_SIZE": nodes * per_node, "LOCAL_WORLD_SIZE": per_node, "RANK": 0, "LOCAL_RANK": 0}
    os.environ.update({key: str(value) for key, value in sizes.items()})
    settings = Settings(gpu=name, memory_bytes=WIDE, context_bytes=0, until_stable=False)
    session, meter = VirtualSession(settings, ALLOCATOR if row["expandable"] == "yes" else {}), Meter()
    with session.active():
        session.device.observer = meter
        start, middle, end = train(
            row["model"],
            layers=layers,
            cards=nodes * per_node,
            batch=int(row["batch"]),
            length=int(row["length"]),
            checkpointing=row["checkpointing"],
            compiled=row["compile"] == "yes",
            torch_version=row["torch"],
            keeps_logits=row["keeps_logits"] == "yes",
            read=meter.read,
        )
    found = findings_of(session)
    kernels = {"pass_kernels": (middle - start).counts(), "update_kernels": (end - middle).counts()}
    return {
        "requested_bytes": found.peak.requested_bytes,
        "allocated_bytes": found.peak.allocated_bytes,
        "reserved_bytes": found.peak.reserved_bytes,
        "phase": found.peak.phase,
        "categories": found.categories,
        "phases": found.phases,
        "not_modelled": (),
        "parameters": 0,
        **{key: to_builtins(value) for key, value in kernels.items()},
    }


def predict(number: int, row: Row) -> None:
    """Write the predicted memory and rate of a row, and their errors, into it."""
    import msgspec
    from players.llama_fsdp2 import SHAPES

    from tightfit.gpus import resolve_gpu
    from tightfit.links import linked_cards, split_count
    from tightfit.planner.layers import PLAYED_LAYERS, extended
    from tightfit.simulation.requests import StepTrace
    from tightfit.simulation.speed import Work, rates_of, step_time

    command = [sys.executable, __file__, f"--row={number}"]
    blocks = SHAPES[row["model"]].layers
    # A line misses what more blocks leave unused: 2.0 of 79.2 GiB in one row.
    counts = (blocks,) if row["measured_gib"] else PLAYED_LAYERS
    plays = [subprocess.Popen([*command, f"--layers={layers}"], stdout=subprocess.PIPE, text=True) for layers in counts]
    outputs = [play.communicate()[0] for play in plays]
    if any(play.returncode for play in plays):
        return
    played = [msgspec.convert(json.loads(output.splitlines()[-1]), StepTrace) for output in outputs]
    trace = extended(played, blocks) if len(played) > 1 else played[0]
    nodes, per_node, name = split_count(f"{row['cards']}x {row['card']}")
    gpu = resolve_gpu(name)[0]
    if row["bandwidth_gbps"]:  # of the cards that were measured, where their source gives it
        gpu = replace(gpu, bandwidth_gbps=float(row["bandwidth_gbps"]))
    cards = linked_cards(gpu, nodes=nodes, per_node=per_node, network=row["network"])
    rates = rates_of(gpu, compiled=row["compile"] == "yes", cards=cards)
    time = step_time(Work.of(trace.pass_kernels), Work.of(trace.update_kernels), rates)
    rate = int(row["batch"]) * int(row["length"]) / (time.pass_s + time.update_s)
    found_bytes = trace.reserved_bytes if row["metric"] == "reserved" else trace.allocated_bytes
    row["predicted_gib"], row["predicted_rate"] = f"{found_bytes / GIB:.2f}", f"{rate:.0f}"
    row["waiting_s"] = f"{time.waiting_s:.3f}"
    for measured, predicted, error in (
        ("measured_gib", "predicted_gib", "memory_error"),
        ("measured_rate", "predicted_rate", "rate_error"),
    ):
        row[error] = f"{float(row[predicted]) / float(row[measured]) - 1:.4f}" if row[measured] else ""


def summary(rows: list[Row], key: str) -> str:
    """Return the number of rows with an error of this kind, their median and their worst."""
    errors = sorted(abs(float(row[key])) for row in rows if row[key])
    if not errors:
        return f"{key}: no rows"
    return f"{key}: {len(errors)} rows, median {statistics.median(errors):.1%}, worst {errors[-1]:.1%}"


if __name__ == "__main__":
    main()
