"""A value of a command that a question changes: an argument, a variable, or a key of a configuration file."""

import ast
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tightfit.errors import ConfigError
from tightfit.wording import say

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""Variable with the settings of PyTorch's allocator."""
EXPANDABLE = "expandable_segments:True"
_FILES = (".yaml", ".yml", ".json", ".toml")
_BATCH = re.compile(r"(.*[._])?((micro|mini)_?)?(batch(_?size)?|bs?|batch_size_per_.*)")
_NOT_TRAINING = re.compile(r"eval|test|valid|val[_.]|generation|sample")
_VARIABLES = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\()\s*['"](\w+)['"](?:\s*,\s*['"]?(\w+))?""")
_SETS_NAMES = re.compile(r"configurator|hydra|absl|HfArgumentParser|\b(?:fire|typer|click)\b|\bexec\(|\bglobals\(\)")
"""Signs of a script whose constants are also its options."""
_ACCUMULATION = re.compile(r"(.*[._])?((gradient|grad)_?)?accum(ulation)?(_?steps|_?iter)?|accumulate_grad_batches")


@dataclass(frozen=True)
class Variant:
    """A command, its variables and the texts of its files."""

    words: tuple[str, ...]
    environ: Mapping[str, str]
    replaced: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Knob:
    """A value of a command, and the place where it stands."""

    name: str
    """Name as the command writes it."""
    kind: Literal["argument", "environment", "file", "added"]
    value: str | None
    """Text as given; None where the script's default holds and is not known."""
    place: int = -1
    """Index of the word with it."""
    file: str = ""
    span: tuple[int, int] = (0, 0)

    @property
    def number(self) -> int | None:
        """The value as a whole number above 0, if it is one."""
        return int(self.value) if self.value and self.value.isdecimal() and int(self.value) > 0 else None

    def set(self, variant: Variant, value: object) -> Variant:
        """Return the variant with another value."""
        words = list(variant.words)
        if self.kind == "environment":
            return replace(variant, environ={**variant.environ, self.name: str(value)})
        if self.kind == "file":
            text = text_of(variant, self.file)
            start, end = self.span
            return replace(variant, replaced={**variant.replaced, self.file: f"{text[:start]}{value}{text[end:]}"})
        if self.kind == "added":
            words.append(f"{self.name}={value}")
        else:
            option, equals, _ = words[self.place].partition("=")
            words[self.place] = f"{option}={value}" if equals else str(value)
        return replace(variant, words=tuple(words))


def find_knob(variant: Variant, name: str, *, is_wanted: Callable[[str], bool] = lambda path: True) -> Knob:
    """Return the value called `name`; one that stands nowhere is added to the command's end.

    ConfigError for a name that several keys of a file have, those aside that `is_wanted` refuses by their path.
    """
    bare = _plain(name)
    if not bare or not re.fullmatch(r"[\w.]+", bare):
        raise ConfigError(say("config.knob.no_name", name=name))
    found = _in_words(variant.words, bare) or _in_environment(variant, name.strip())
    found = found or _in_files(variant, bare, is_wanted) or _constant(variant, bare)
    return found or _added(variant.words, bare)


def with_expandable_segments(variant: Variant) -> Variant | None:
    """Return the variant with the allocator's setting against fragments; None if the user has set the allocator."""
    given = {*variant.environ, *(word.partition("=")[0] for word in variant.words)}
    if not given.isdisjoint((ALLOCATOR, "PYTORCH_ALLOC_CONF")):
        return None
    return replace(variant, environ={**variant.environ, ALLOCATOR: EXPANDABLE})


def number_in_words(words: Sequence[str], is_wanted: Callable[[str], bool]) -> Knob | None:
    """Return the first argument with a whole number above 0 and a name that is wanted.

    >>> number_in_words(["--lr", "1", "--bs", "8"], is_batch)
    Knob(name='--bs', kind='argument', value='8', place=3, file='', span=(0, 0))
    """
    named = (_in_words(words, _plain(word.partition("=")[0])) for word in words if is_wanted(word.partition("=")[0]))
    return _first_number(named)


def number_in_environment(variant: Variant, is_wanted: Callable[[str], bool]) -> Knob | None:
    """Return the first variable that the script reads with a whole number above 0 and a name that is wanted."""
    named = (_in_environment(variant, name) for name in _variables(variant.words) if is_wanted(name.lower()))
    return _first_number(named)


def _first_number(knobs: Iterable[Knob | None]) -> Knob | None:
    return next((knob for knob in knobs if knob is not None and knob.number is not None), None)


def options_of(words: Sequence[str]) -> list[str]:
    """Return the options that the texts of a command's scripts name, in their order.

    >>> options_of(["train.py"])
    []
    """
    texts = "\n".join(map(read_text, _scripts(words)))
    return list(dict.fromkeys(re.findall(r"""['"](--?[A-Za-z][\w-]*)['"]""", texts)))


def is_of_training(path: str) -> bool:
    """Return False for a key of an evaluation, such as `valid.batch_size`."""
    return _NOT_TRAINING.search(path) is None


def accumulation_of(variant: Variant) -> int | None:
    """Return the passes of a step that the command, its files or its script name; None if nothing names them."""
    if (knob := number_in_words(variant.words, is_accumulation)) is not None:
        return knob.number
    for text in map(read_text, _scripts(variant.words)):
        for key, number in _defaults(text):
            if is_accumulation(key):
                return number
    return None


def is_accumulation(name: str) -> bool:
    """Return True for the name of the passes of a step."""
    return _ACCUMULATION.fullmatch(_plain(name).lower()) is not None


def is_batch(name: str) -> bool:
    """Return True for the name of a batch size.

    >>> [is_batch(each) for each in ("--per_device_train_batch_size", "-b", "--batchSize", "eval_batch_size")]
    [True, True, True, False]
    """
    plain = re.sub(r"(per_device_|per_gpu_)?(train_)?", "", _plain(name).lower(), count=1)
    return _BATCH.fullmatch(plain) is not None and _NOT_TRAINING.search(plain) is None


def _plain(name: str) -> str:
    return name.strip().lstrip("-+").replace("-", "_")


def _in_words(words: Sequence[str], bare: str) -> Knob | None:
    for place in reversed(range(len(words))):
        option, equals, value = words[place].partition("=")
        if _plain(option) != bare:
            continue
        if equals:
            return Knob(option, "argument", value, place)
        if option.startswith("-") and place + 1 < len(words):
            return Knob(option, "argument", words[place + 1], place + 1)
    return None


def _in_environment(variant: Variant, name: str) -> Knob | None:
    if name in variant.environ:
        return Knob(name, "environment", variant.environ[name])
    read = _variables(variant.words)
    return Knob(name, "environment", read[name]) if name in read else None


def _variables(words: Sequence[str]) -> dict[str, str | None]:
    """Return the variables that a command's scripts read, with their defaults."""
    found = (each for path in _scripts(words) for each in _VARIABLES.finditer(read_text(path)))
    return {each[1]: each[2] for each in found}


def _constant(variant: Variant, bare: str) -> Knob | None:
    """Return a constant of the script, unless one of its options has the same name."""
    for path in _scripts(variant.words):
        text = text_of(variant, path)
        if _SETS_NAMES.search(text) or bare in map(_plain, options_of([path])):
            continue
        places = list(re.finditer(rf"^{re.escape(bare)}[ ]*(?::[^=\n]*)?=[ ]*(\d+)[ ]*(?:#.*)?$", text, re.MULTILINE))
        if places:
            return Knob(bare, "file", places[-1][1], file=path, span=places[-1].span(1))
    return None


def _in_files(variant: Variant, bare: str, is_wanted: Callable[[str], bool]) -> Knob | None:
    for word in variant.words:
        path = word.rpartition("=")[2]
        if path.endswith(_FILES) and os.path.isfile(path):
            spans = list(_keys(text_of(variant, path), bare, is_wanted))
            if len(spans) > 1:
                raise ConfigError(say("config.knob.several", name=bare, file=path, count=len(spans)))
            for key, value, span in spans:
                return Knob(key, "file", value, file=path, span=span)
    return None


def _keys(text: str, bare: str, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Yield each key of YAML, JSON or TOML that ends a path with `bare`, with its value and that value's place."""
    path: list[tuple[int, str]] = []
    key = re.compile(r'^([ \t]*(?:- )?)(?:"([\w.-]+)"|([\w.-]+))[ \t]*[:=][ \t]*("?)([^\s",#{\[]*)', re.MULTILINE)
    table = ""
    for found in re.finditer(r"^\[([\w.-]+)\]|" + key.pattern, text, re.MULTILINE):
        if found[1] is not None:
            table = found[1].replace("-", "_")
            continue
        indent = len(found[2])
        path = [each for each in path if each[0] < indent]
        name = found[3] or found[4]
        whole = ".".join(filter(None, [table, *(part for _, part in path), name.replace("-", "_")]))
        if found[6] and (whole == bare or whole.endswith(f".{bare}")) and is_wanted(whole):
            yield name, found[6], found.span(6)
        path.append((indent, name.replace("-", "_")))


def _added(words: Sequence[str], bare: str) -> Knob:
    """Return an option in the form that the script's text shows, with the default that stands there."""
    form, value = f"--{bare}", None
    for text in map(read_text, _scripts(words)):
        if "hydra" in text and f"--{bare}" not in text:
            form = bare
        elif f"--{bare.replace('_', '-')}" in text:
            form = f"--{bare.replace('_', '-')}"
        value = next((str(number) for name, number in _defaults(text) if _plain(name) == bare), value)
    return Knob(form, "added", value)


def _scripts(words: Sequence[str]) -> list[str]:
    """Return the Python files of a command, the last one first: a configuration stands behind its script."""
    return [word for word in reversed(words) if word.endswith(".py") and os.path.isfile(word)]


def _defaults(text: str) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers that a script gives its names, and its options' defaults."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                if (number := _product(value)) is not None:
                    yield name, number
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    number = _product(value)
                    if isinstance(key, ast.Constant) and isinstance(key.value, str) and number is not None:
                        yield key.value, number
            case ast.Call(func=ast.Attribute(attr="add_argument" | "option"), args=names, keywords=keywords):
                default = next((each.value for each in keywords if each.arg == "default"), None)
                if default is not None and (number := _product(default)) is not None:
                    texts = (each.value for each in names if isinstance(each, ast.Constant))
                    yield from ((text, number) for text in texts if isinstance(text, str))


def _product(value: ast.expr) -> int | None:
    """Return a whole number above 0, or a product of such, as `5 * 8`."""
    match value:
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int(number)) if number > 0:
            return number
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            one, other = _product(left), _product(right)
            return one * other if one and other else None
    return None


def text_of(variant: Variant, path: str) -> str:
    """Return the text of a file as the variant has it."""
    text = variant.replaced.get(path)
    return read_text(path) if text is None else text


def read_text(path: str) -> str:
    """Return the text of a file, with its own line ends; bytes that are no text come back as they were."""
    return Path(path).read_bytes().decode("utf-8", "surrogateescape")
