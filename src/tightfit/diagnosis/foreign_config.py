"""Configurations of other programs, told by their keys, and read for what decides a run's memory.

Their values count like those that a log prints. `model_play` plays the model that they train.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from tightfit.config import TrainConfig
from tightfit.config.schema import defaults
from tightfit.diagnosis.config_programs import Found, file_of_no_training, found_in, known, program_of
from tightfit.diagnosis.config_values import Value, kind_of, values_in, without_comments
from tightfit.diagnosis.framework_words import frameworks
from tightfit.diagnosis.usual_models import all_models, named_in
from tightfit.diagnosis.yaml_errors import first_error
from tightfit.errors import ConfigError
from tightfit.oomlog.run_facts import RunFacts, known_names, quantity_of, run_facts_in
from tightfit.wording import say, term

_MOST = 1_000_000
"""Characters of a file that are read."""
_NANOGPTS = frozenset({"n_layer", "n_head", "n_embd", "block_size", "init_from", "eval_iters"})
_EXAMPLES = ("Llama 3.1 8B", "Qwen2.5 7B")
_KEY = re.compile(r"^[\s{,]*[\"']?([A-Za-z_]\w{1,60})[\"']?\s*[:=]", re.MULTILINE)
_INNER = re.compile(r"[\"']([A-Za-z_]\w{1,60})[\"']\s*:")


class Foreign(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration of another program."""

    program: str
    """A key of the words' table `programs`."""
    text: str
    """Its text without comments."""
    values: Mapping[str, Value] = msgspec.field(default_factory=dict)
    """The values by their paths."""
    found: Found | None = None
    """The run that it describes; None for a model alone."""
    kind: str = "yaml"
    """The language of its files: json, toml, yaml or python."""

    def line(self, path: str, value: int) -> str:
        """Return a line that gives a key a number in the configuration's language."""
        written = {"json": f'"{path}": {value}', "toml": f"{path} = {value}", "python": f"{path} = {value}"}
        return written.get(self.kind, f"{path}: {value}")

    def has(self, part: str) -> bool:
        return self.found is not None and part in self.found.parts


def foreign_in(paths: Sequence[str], keys: Sequence[str]) -> Foreign | None:
    """Return the configuration if a file or a key of the command line is another program's; None if all are ours.

    A file that cannot be read is left to the reader of our own, which reports it. ConfigError for a file that no
    training reads, for JSON that ends too early, for JSON that no program is known by and that has an error, and for
    YAML with a mistake.
    """
    read = [(path, text) for path in paths if (text := _read(path)) is not None]
    each_values = [values_in(path, text) for path, text in read]
    options = _of_options(keys)
    values = {name: value for each in (*each_values, options) for name, value in each.items()}
    text = "\n".join([*(without_comments(*each) for each in read), *(key.removeprefix("--") for key in keys)])
    program = program_of(values) or _unnamed(values, text, [kind_of(*each) for each in read])
    for path, each in read:
        _check_json(path, each, is_known=program is not None)
        _check_yaml(path, each)
        _check_toml(path, each)
    for (path, each), inner in zip(read, each_values, strict=True):
        _check_kind(path, each, inner, is_known=program is not None)
    if program is None:
        return None
    if program == "deepspeed":  # which leaves what is "auto" to the Trainer's arguments
        each_values = [{name: each for name, each in known.items() if each != "auto"} for known in each_values]
        values = {name: each for name, each in values.items() if each != "auto"}
    each_values += _named_files(values, [path for path, _ in read])
    kind = kind_of(*read[-1]) if read else "yaml"
    return Foreign(program=program, text=text, values=values, found=_found(program, values, each_values), kind=kind)


def _named_files(values: Mapping[str, Value], paths: Sequence[str]) -> list[dict[str, Value]]:
    """Return the values of the file of DeepSpeed's that a configuration names, where it is there."""
    named = values.get("deepspeed")
    if not isinstance(named, str) or not named.endswith(".json"):
        return []
    folders = ["", *(str(Path(path).parent) for path in paths)]
    text = next((text for folder in folders if (text := _read(str(Path(folder, named)))) is not None), None)
    return [values_in(named, text)] if text is not None else []


def _found(program: str, values: Mapping[str, Value], files: Sequence[Mapping[str, Value]]) -> Found | None:
    """Return what the configurations have: those of the program itself before those of its launcher."""
    if program == "model_config":
        return None
    if not known(program).numbers:
        return _by_usual_names(values)
    found = found_in(program, values)
    for each in files:
        other = program_of(each)
        if other not in (None, program):
            found = found.over(found_in(other or "", each))
    return found


_PLACES = ("batch_size", "eval_batch_size", "accumulation", "length", "image")
"""Quantities that are read under any of their usual names."""
_EVALUATES = re.compile(r"(?:^|[._])(?:e?val|valid|validation|evaluation|test|infer|inference|predict)", re.IGNORECASE)


def _by_usual_names(values: Mapping[str, Value]) -> Found:
    """Return the numbers of a program whose keys are not known, under the names that many programs use.

    A quantity that stands in two places is read, and left alone by a fix.
    """
    places: dict[str, list[str]] = {}
    for path, value in values.items():
        quantity = quantity_of(path.rpartition(".")[2])
        if quantity in _PLACES and _is_positive(value) and not _EVALUATES.search(path):
            places.setdefault(quantity, []).append(path)
    numbers = {name: value for name, paths in places.items() if isinstance(value := values[paths[-1]], int)}
    return Found(numbers=numbers, names={name: paths[0] for name, paths in places.items() if len(paths) == 1}, texts={})


def _is_positive(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _of_options(keys: Sequence[str]) -> dict[str, Value]:
    """Return the values of keys of the command line: --key=value, or --key and its value behind it."""
    found: dict[str, Value] = {}
    name = ""
    for word in keys:
        if word.startswith("--"):
            name, sign, value = word.removeprefix("--").partition("=")
            found[name] = value if sign else True
        elif name:
            found[name] = word
    return found


def with_foreign(run: RunFacts, given: Foreign) -> RunFacts:
    """Return the facts of a log's run with those of the configuration that was given for it."""
    both = run_facts_in(run.text + "\n" + given.text)
    program = (given.program,) if given.program in frameworks() else ()
    others = tuple(name for name in both.frameworks if name not in program)
    both = msgspec.structs.replace(both, frameworks=(*program, *others))
    if given.found is None:
        return both
    found = given.found.with_accumulation(given.found.numbers.get("world_size") or run.numbers.get("world_size"))
    is_known = bool(known(given.program).numbers)
    rest = {name: number for name, number in both.numbers.items() if name not in _OF_PROGRAMS}
    texts, model = dict(found.texts), next(named_in(found.texts.get("model", "")), None)
    if model is not None:  # its sizes are known, without adapters
        rest.pop("parameters", None)
        texts["model"] = model.name if "_" in texts["model"] else texts["model"]  # the name of a function
    of_log = {name: number for name, number in run.numbers.items() if name in _OF_PROGRAMS}
    return msgspec.structs.replace(
        both,
        numbers=rest | of_log | dict(found.numbers),
        names={**run.names, **{name: path.rpartition(".")[2] for name, path in found.names.items()}},
        texts={**run.texts, **texts} if is_known else both.texts,
        signs=(both.signs - _DECIDED) | run.signs | _signs_of(given.program, found) if is_known else both.signs,
    )


_OF_PROGRAMS = frozenset(
    {"batch_size", "eval_batch_size", "accumulation", "length", "world_size", "zero_stage", "image"}
)
"""Quantities that stand where their program has them, and nowhere else in its configuration."""
_SIGNS = {
    "lora": ("lora",),
    "qlora": ("lora", "qlora"),
    "eight_bit": ("quantized_8",),
    "checkpointing": ("checkpointing",),
    "deepspeed": ("deepspeed",),
    "fsdp": ("fsdp",),
    "full_shard": ("full_shard",),
    "flash": ("flash",),
    "half": ("half",),
    "in_backward": ("in_backward",),
    "host_state": ("host_state",),
    "host_weights": ("host_weights",),
}
"""Signs of a run that a part of a configuration is."""
_DECIDED = frozenset({"four_bit", *(sign for signs in _SIGNS.values() for sign in signs)})
_OF_PART = frozenset({"lora", "qlora", "frozen", "other_adapter", "gptq"})
"""Parts beside which not all parameters are trained."""


def _signs_of(program: str, found: Found) -> frozenset[str]:
    signs = {sign for part in found.parts for sign in _SIGNS.get(part, ())}
    if "16" in found.texts.get("dtype", ""):
        signs.add("half")
    if "model" in found.texts and known(program).trains_all and not found.parts & _OF_PART:
        signs.add("all_trained")
    return frozenset(signs)


def with_model(given: Foreign | None, model: str) -> Foreign:
    """Add a model to another program's configuration: by its name, its config.json or the folder of that.

    ConfigError if it is none of them.
    """
    path = Path(model, "config.json") if Path(model).is_dir() else Path(model)
    if path.is_file():
        text = _read(str(path)) or ""
        if program_of(values_in(str(path), text)) != "model_config":
            raise ConfigError(say("explain.foreign_config.no_model_in", path=path))
    elif next(named_in(model), None) is not None:
        text = f"model_name_or_path: {model}"
    else:
        near = difflib.get_close_matches(model, [each.name for each in all_models()], n=3, cutoff=0.3)
        raise ConfigError(say("explain.foreign_config.unknown_model", model=model, near=", ".join(near or _EXAMPLES)))
    if given is not None:
        found = given.found if path.is_file() else _with_name(given.found, model)
        return msgspec.structs.replace(given, text=text + "\n" + given.text, found=found)
    return Foreign(program="model_config" if path.is_file() else "named_model", text=text)


def _with_name(found: Found | None, model: str) -> Found | None:
    """Return what a configuration has, with the model that the user names instead of its own."""
    return found and msgspec.structs.replace(found, texts={**found.texts, "model": model})


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
    """Raise ConfigError for the first mistake of a YAML file."""
    if Path(path).suffix.lower() not in (".yaml", ".yml") or len(text) >= _MOST:
        return
    if (error := first_error(text)) is not None:
        reason = term("explain.yaml", error.reason)
        raise ConfigError(say("explain.foreign_config.yaml_error", path=path, line=error.line, reason=reason))


def _unnamed(values: Mapping[str, Value], text: str, kinds: Sequence[str]) -> str | None:
    """Return `other` for a configuration of no known program that has what decides a run's memory."""
    if all(kind == "python" for kind in kinds):
        keys = {*_KEY.findall(text), *_INNER.findall(text)}
        return "other" if keys & (known_names() - defaults(TrainConfig).keys()) and not keys & _NANOGPTS else None
    keys = {part.removesuffix("[]") for path in values for part in path.split(".")}
    return "other" if keys & (known_names() | _NANOGPTS) else None


def _check_kind(path: str, text: str, values: Mapping[str, Value], *, is_known: bool) -> None:
    """Raise ConfigError for a file that no training reads, and for one of which no key is known."""
    kind = file_of_no_training(values)
    if kind is not None:
        what = term("explain.files", kind)
        raise ConfigError(say("explain.foreign_config.no_training", path=path, what=what))
    language = kind_of(path, text)
    if not is_known and language != "python":
        raise ConfigError(say("explain.foreign_config.no_key", path=path, language=_LANGUAGES[language]))


def _check_toml(path: str, text: str) -> None:
    """Raise ConfigError for an error in a TOML file."""
    if Path(path).suffix.lower() != ".toml" or len(text) >= _MOST:
        return
    try:
        tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(say("explain.foreign_config.toml_error", path=path, reason=error)) from None
    except RecursionError:
        return


_LANGUAGES = {"json": "JSON", "yaml": "YAML", "toml": "TOML"}
