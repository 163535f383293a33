"""FakeGPU's published measurements of real cards, its own errors beside ours, to results/fakegpu.csv.

    git clone https://github.com/FanBB2333/FakeGPU   (commit 7d5cf83)
    pip install transformers==5.12.1 peft            (beside tightfit)
    python benchmarks/virtual/fakegpu.py FakeGPU MODELS [--rows 0 1 2]

Its worker scripts (verification/qwen_*_memory_worker.py) are played unmodified, those of several ranks as rank 0.
MODELS is a folder for Qwen3.5 0.8B and 2B in their published shapes with weights of zero, made if it is empty; it takes
7 GB. Measured: the largest peak of torch.cuda.max_memory_allocated of its phases, to 0.001 GiB, as the repository's
docs/llm-sft-memory-estimation.md prints it. The RTX PRO 5000 is played as an RTX PRO 6000, which has the same chip.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from row_files import Row, read_rows, write_rows

TABLE = Path(__file__).parent / "results" / "fakegpu.csv"
SHAPES = {"0.8B": (1024, 3584), "2B": (2048, 6144)}
"""Width and hidden width."""
CARDS = {"RTX PRO 5000": "NVIDIA RTX PRO 6000 Blackwell Workstation", "RTX 3090 Ti": "RTX 3090 Ti"}
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--rows", type=int, nargs="+")
    options = parser.parse_args()
    for name in SHAPES:
        if not (options.models / name).exists():
            make_model(name, options.models / name)
    rows = read_rows(TABLE)
    for number in options.rows or range(len(rows)):
        row = rows[number]
        found = play(row, options.checkout, options.models.absolute())
        row["predicted_bytes"] = str(found)
        row["error_pct"] = f"{100 * (found / GIB / float(row['measured_gib']) - 1):+.3f}"
        print(number, row["script"], row["args"], row["ranks"], row["error_pct"], flush=True)
        write_rows(TABLE, rows)


def make_model(name: str, folder: Path) -> None:
    """Write a Qwen3.5 in its published shape with weights of zero."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    width, hidden = SHAPES[name]
    config = Qwen3_5TextConfig(
        vocab_size=248320,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        tie_word_embeddings=True,
        max_position_embeddings=262144,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(folder)


def play(row: Row, checkout: Path, models: Path) -> int:
    """Return the bytes of a row's peak, as the script itself prints them."""
    ranks = {"WORLD_SIZE": row["ranks"], "LOCAL_WORLD_SIZE": row["ranks"], "RANK": "0", "LOCAL_RANK": "0"}
    words = ["--gpu", CARDS[row["card"]], "--torch", row["torch"], f"verification/{row['script']}"]
    words += ["--model-dir", str(models / row["model"]), *row["args"].split()]
    words += ["--report-dir", "reports"] if row["ranks"] != "1" else ["--mode", "real", "--output", "report.json"]
    done = subprocess.run(
        [sys.executable, "-m", "tightfit", "dryrun", "--json", *words],
        cwd=checkout,
        env={**os.environ, **(ranks if row["ranks"] != "1" else {})},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["outcome"] == "fits"
    return int(re.findall(r'"overall_peak_bytes": (\d+)', done.stderr)[-1])


if __name__ == "__main__":
    main()
