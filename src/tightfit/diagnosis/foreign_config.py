"""Configurations of other programs, told by their keys, and read for what decides a run's memory.

Their values count like those that a log prints. `model_play` plays the model that they train.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tightfit.config import TrainConfig
from tightfit.config.schema import defaults
from tightfit.diagnosis.usual_models import all_models, named_in
from tightfit.diagnosis.yaml_errors import first_error
from tightfit.errors import ConfigError
from tightfit.oomlog.run_facts import RunFacts, known_names, run_facts_in
from tightfit.wording import say, term

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
_EXAMPLES = ("Llama 3.1 8B", "Qwen2.5 7B")
_KEY = re.compile(r"^[\s{,]*[\"']?([A-Za-z_]\w{1,60})[\"']?\s*[:=]", re.MULTILINE)
_INNER = re.compile(r"[\"']([A-Za-z_]\w{1,60})[\"']\s*:")


class Foreign(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration of another program."""

    program: str
    """A key of the words' table `programs`."""
    text: str


def foreign_in(paths: Sequence[str], keys: Sequence[str]) -> Foreign | None:
    """Return the configuration if a file or a key of the command line is another program's; None if all are ours.

    A file that cannot be read is left to the reader of our own, which reports it. ConfigError for JSON that ends too
    early, for JSON that no program is known by and that has an error, and for YAML with a certain mistake.
    """
    read = [(path, text) for path in paths if (text := _read(path)) is not None]
    text = "\n".join([*(text for _, text in read), *(key.removeprefix("--") for key in keys)])
    program = _program(text)
    for path, each in read:
        _check_json(path, each, is_known=program is not None)
        _check_yaml(path, each)
    return Foreign(program=program, text=text) if program else None


def with_foreign(run: RunFacts, given: Foreign) -> RunFacts:
    """Return the facts of a log's run with those of the configuration that was given for it."""
    both = run_facts_in(run.text + "\n" + given.text)
    program = () if given.program == "model_config" else (given.program,)
    others = tuple(name for name in both.frameworks if name not in program)
    return msgspec.structs.replace(both, frameworks=(*program, *others))


def with_model(given: Foreign | None, model: str) -> Foreign:
    """Add a model to another program's configuration: by its name, its config.json or the folder of that.

    ConfigError if it is none of them.
    """
    path = Path(model, "config.json") if Path(model).is_dir() else Path(model)
    if path.is_file():
        text = _read(str(path)) or ""
        if _program(text) != "model_config":
            raise ConfigError(say("explain.foreign_config.no_model_in", path=path))
    elif next(named_in(model), None) is not None:
        text = f"model_name_or_path: {model}"
    else:
        near = difflib.get_close_matches(model, [each.name for each in all_models()], n=3, cutoff=0.3)
        raise ConfigError(say("explain.foreign_config.unknown_model", model=model, near=", ".join(near or _EXAMPLES)))
    program = given.program if given else "model_config"
    return Foreign(program=program, text=text + "\n" + given.text if given else text)


def _read(path: str) -> str | None:
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            return file.read(_MOST)
    except OSError:
        return None


def _check_json(path: str, text: str, *, is_known: bool) -> None:
    """Raise ConfigError if a file that starts like JSON ends too early; if its program is unknown, for any error."""
    if not text.lstrip("\ufeff \t\r\n").startswith("{") or len(text) >= _MOST:
        return
    try:
        json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        rest = text[error.pos :]
        is_open = error.msg.startswith("Unterminated string") and "\n" not in rest.rstrip()
        if is_open or not rest.strip():
            line = len(text.rstrip().splitlines())
            raise ConfigError(say("explain.foreign_config.json_cut", path=path, line=line)) from None
        if not is_known:
            where, reason = error.lineno, error.msg
            raise ConfigError(say("explain.foreign_config.json_error", path=path, line=where, reason=reason)) from None
    except RecursionError:  # left to the reader of our own
        return


def _check_yaml(path: str, text: str) -> None:
    """Raise ConfigError for the first certain mistake of a YAML file."""
    if Path(path).suffix.lower() not in (".yaml", ".yml") or len(text) >= _MOST:
        return
    if (error := first_error(text)) is not None:
        reason = term("explain.yaml", error.reason)
        raise ConfigError(say("explain.foreign_config.yaml_error", path=path, line=error.line, reason=reason))


def _program(text: str) -> str | None:
    keys = {*_KEY.findall(text), *_INNER.findall(text)}
    if keys & _NANOGPTS:
        return None
    found = next((program for program, signs in _PROGRAMS.items() if keys & set(signs)), None)
    return found or ("other" if keys & (known_names() - defaults(TrainConfig).keys()) else None)
