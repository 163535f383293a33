"""`tightfit convert`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from tightfit.cli.exits import OK
from tightfit.cli.parser import Parser
from tightfit.errors import CheckpointError
from tightfit.storage import MARKER
from tightfit.wording import say


def parser() -> Parser:
    found = Parser(
        "convert",
        say("cli.convert.about"),
        examples=["tightfit convert out/ckpt.pt gpt2-mine"],
    )
    found.add_argument("source", type=Path, help=say("cli.convert.source"))
    found.add_argument("target", type=Path, help=say("cli.convert.target"))
    return found


def run(given: argparse.Namespace, rest: Sequence[str]) -> int:
    if given.target.exists():
        raise CheckpointError(say("cli.convert.exists", target=given.target))
    from tightfit.models.conversion import load_hugging_face, save_hugging_face
    from tightfit.trainer.checkpoint import Checkpoint, load_file, save

    if (given.source / MARKER).is_file():
        _convert_parts(given.source, given.target)
    elif given.source.is_dir():
        if given.target.suffix != ".pt":
            raise CheckpointError(say("cli.convert.not_pt", target=given.target, source=given.source))
        config, weights = load_hugging_face(given.source)
        content = Checkpoint(model_config=config, model=weights, optimizer=None, step=0, best_val_loss=math.inf)
        given.target.parent.mkdir(parents=True, exist_ok=True)
        save(given.target.parent, content, name=given.target.name)
    else:
        saved = load_file(given.source)
        save_hugging_face(given.target, saved.model_config, saved.model)
    print(f"{given.source} -> {given.target}")
    return OK


def _convert_parts(source: Path, target: Path) -> None:
    """Make a checkpoint file, with the state of the run, or a Hugging Face folder from what several processes saved."""
    from tightfit.models.conversion import save_hugging_face
    from tightfit.trainer.checkpoint import save
    from tightfit.trainer.parts import in_memory, load_parts

    saved = load_parts(source)
    if target.suffix == ".pt":
        target.parent.mkdir(parents=True, exist_ok=True)
        save(target.parent, in_memory(saved), name=target.name)
    else:
        save_hugging_face(target, saved.model_config, saved.model)
