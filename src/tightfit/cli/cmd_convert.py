"""`tightfit convert`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from tightfit.cli.exits import OK
from tightfit.cli.parser import Parser
from tightfit.errors import CheckpointError


def parser() -> Parser:
    found = Parser(
        "convert",
        "Convert a nanoGPT or tightfit checkpoint (.pt) to a Hugging Face folder, or a folder to a .pt.",
        examples=["tightfit convert out/ckpt.pt gpt2-mine"],
    )
    found.add_argument("source", type=Path, help="a .pt file, or a folder with config.json and safetensors")
    found.add_argument("target", type=Path, help="the folder or .pt file to write; must not exist")
    return found


def run(given: argparse.Namespace, rest: Sequence[str]) -> int:
    if given.target.exists():
        raise CheckpointError(f"{given.target} exists; name a new one, or remove it first")
    from tightfit.models.conversion import load_hugging_face, save_hugging_face
    from tightfit.trainer import checkpoint as ckpt

    if given.source.is_dir():
        if given.target.suffix != ".pt":
            raise CheckpointError(f"{given.target} must end in .pt, since {given.source} is a Hugging Face folder")
        config, weights = load_hugging_face(given.source)
        content = ckpt.Checkpoint(model_config=config, model=weights, optimizer=None, step=0, best_val_loss=math.inf)
        given.target.parent.mkdir(parents=True, exist_ok=True)
        ckpt.save(given.target.parent, content, name=given.target.name)
    else:
        saved = ckpt.load(given.source)
        save_hugging_face(given.target, saved.model_config, saved.model)
    print(f"{given.source} -> {given.target}")
    return OK
