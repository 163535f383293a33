"""This package's own trainer on a GPT of 2 layers: evaluation, steps of two passes, a checkpoint."""

import sys
import tempfile
from pathlib import Path

import numpy as np

from tightfit.cli.main import main

keys = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 256,
    "block_size": 256,
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_iters": 2,
    "eval_interval": 2,
    "eval_iters": 1,
    "device": "cuda",
    "dtype": "bfloat16",
    "compile": False,
    "fit": "off",
    "dataset": "bytes",
    "sample_at_end": 0,
}
with tempfile.TemporaryDirectory() as folder:
    data = Path(folder, "data", "bytes")
    data.mkdir(parents=True)
    for name in ("train", "val"):
        (np.arange(20_000) % 256).astype(np.uint16).tofile(data / f"{name}.bin")
    words = [f"--{key}={value}" for key, value in keys.items()]
    sys.exit(main(["train", *words, f"--data_dir={data.parent}", f"--out_dir={folder}/out", *sys.argv[1:]]))
