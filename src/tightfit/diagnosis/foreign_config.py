"""Configurations of other programs, told by their keys, and read for what decides a run's memory.

They are not played: a play needs the program itself. Their values count like those that a log prints.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tightfit.config import TrainConfig
from tightfit.config.schema import defaults
from tightfit.oomlog.run_facts import RunFacts, known_names, run_facts_in

_MOST = 1_000_000
"""Characters of a file that are read."""
_PROGRAMS = {
    "torchtune": ("_component_",),
    "axolotl": ("sequence_len", "base_model", "micro_batch_size"),
    "llama_factory": ("finetuning_type", "cutoff_len", "template"),
    "deepspeed": ("zero_optimization", "train_micro_batch_size_per_gpu"),
    "accelerate": ("compute_environment", "distributed_type"),
    "transformers_trainer": ("per_device_train_batch_size", "per_device_eval_batch_size"),
    "model_config": ("architectures", "model_type"),
}
"""Keys of which one shows the program that a file is for; the first program counts."""
_NANOGPTS = frozenset({"n_layer", "n_head", "n_embd", "block_size", "init_from", "eval_iters"})
_KEY = re.compile(r"^[\s{,]*[\"']?([A-Za-z_]\w{1,60})[\"']?\s*[:=]", re.MULTILINE)
_INNER = re.compile(r"[\"']([A-Za-z_]\w{1,60})[\"']\s*:")


class Foreign(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration of another program."""

    program: str
    """A key of the words' table `programs`."""
    text: str


def foreign_in(paths: Sequence[str], keys: Sequence[str]) -> Foreign | None:
    """Return the configuration if a file or a key of the command line is another program's; None if all are ours.

    A file that cannot be read is left to the reader of our own, which reports it.
    """
    texts = [text for text in map(_read, paths) if text is not None]
    texts += [key.removeprefix("--") for key in keys]
    text = "\n".join(texts)
    program = _program(text)
    return Foreign(program=program, text=text) if program else None


def with_foreign(run: RunFacts, given: Foreign) -> RunFacts:
    """Return the facts of a log's run with those of the configuration that was given for it."""
    both = run_facts_in(run.text + "\n" + given.text)
    program = () if given.program == "model_config" else (given.program,)
    others = tuple(name for name in both.frameworks if name not in program)
    return msgspec.structs.replace(both, frameworks=(*program, *others))


def _read(path: str) -> str | None:
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            return file.read(_MOST)
    except OSError:
        return None


def _program(text: str) -> str | None:
    keys = {*_KEY.findall(text), *_INNER.findall(text)}
    if keys & _NANOGPTS:
        return None
    found = next((program for program, signs in _PROGRAMS.items() if keys & set(signs)), None)
    return found or ("other" if keys & (known_names() - defaults(TrainConfig).keys()) else None)
