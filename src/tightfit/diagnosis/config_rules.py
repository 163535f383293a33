"""Remedies for another program's configuration: those that it has already, or refuses, are left out."""

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec.structs import replace

from tightfit.diagnosis.config_programs import ALWAYS, Program, holds, known
from tightfit.diagnosis.config_values import Value, flat, values_in
from tightfit.diagnosis.fix_words import applicability
from tightfit.diagnosis.foreign_config import Foreign
from tightfit.diagnosis.remedies import Remedy, Resized

_LINE = re.compile(
    r"(?P<quote>[\"']?)(?:-{1,2})?(?P<key>[A-Za-z_](?:[\w.-]|\[\])*)(?P=quote)(?P<sign>\s*[:=](?!=)\s*|(?<=[\w])\s+)"
    r"(?P<value>[^#\s].*?)\s*(?:\s#.*)?"
)
"""A line to paste that gives a key a value, in the language of any configuration or as an option."""
_IN_WORDS = re.compile(r"[A-Z]{3,}|[*(]")
"""Marks of a value that a person must fill in, or of a call."""
_OPTIONS = re.compile(r"--[A-Za-z][\w.-]*(?:[= ][^\s-]\S*)?")
_FLAG = re.compile(r"--([A-Za-z][\w.-]*)")
_SPLIT = ("split_general", "split_logged", "split_in_parts")
_HAD = {
    "optimizer_8bit": ("optimizer_8bit",),
    "checkpointing_general": ("checkpointing",),
    "chunked_general": ("chunked_loss",),
    "lora": ("lora",),
    "qlora": ("qlora", "gptq"),
    "fused_attention": ("flash",),
}
"""Remedies that a configuration has already with one of these parts."""
_EIGHT_BIT = re.compile(r"[48][-_]?bit", re.IGNORECASE)


def fitted(remedies: Sequence[Remedy], foreign: Foreign | None) -> tuple[Remedy, ...]:
    """Return the remedies that a configuration does not have yet and that its program takes, with what they need."""
    if foreign is None or foreign.found is None:
        return tuple(remedies)
    entry = known(foreign.program)
    return tuple(found for each in remedies if (found := _fitted(each, foreign, entry)) is not None)


def _fitted(remedy: Remedy, foreign: Foreign, entry: Program) -> Remedy | None:
    assert foreign.found is not None
    parts = foreign.found.parts | {ALWAYS}
    if any(remedy.code in entry.gone.get(part, ()) for part in parts) or _is_had(remedy, foreign):
        return None
    lines = next(
        (each[remedy.code] for part, each in entry.lines.items() if part in parts and remedy.code in each), None
    )
    if lines is not None:
        remedy = replace(remedy, paste=tuple(lines))
    remedy = _in_own_names(_for_model(remedy, foreign, entry), foreign)
    if foreign.found.total and remedy.code in _SPLIT and "accumulation" not in foreign.found.names:
        remedy = replace(remedy, paste=tuple(each for each in remedy.paste if "accum" not in each))
    settings = settings_in(remedy.paste)
    if not settings:
        return remedy
    if all(
        foreign.values.get(path_of(key, foreign.values) or "", _MISSING) == value for key, value in settings.items()
    ):
        return None
    remedy = replace(remedy, paste=(*remedy.paste, *_needed(settings, foreign.values, entry, remedy.paste[0])))
    if not refused(settings_in(remedy.paste), foreign.values, entry):
        return remedy
    return _without_accumulation(remedy, foreign, entry)


_MISSING = object()


def _in_own_names(remedy: Remedy, foreign: Foreign) -> Remedy:
    """Return a smaller batch or a shorter length under the key that the configuration has for it.

    Versions of a program have several names for one; other programs have none in the tables of words.
    """
    assert foreign.found is not None
    numbers, names = foreign.found.numbers, foreign.found.names
    quantity = "length" if remedy.code == "shorter_length" else "batch_size" if remedy.code in _SPLIT else None
    path = names.get(quantity or "")
    size = remedy.change.size if isinstance(remedy.change, Resized) else None
    is_own = any(
        path_of(key, foreign.values) == path and size in (None, value)
        for key, value in settings_in(remedy.paste).items()
    )
    if path is None or (is_own and quantity == "batch_size") or foreign.kind == "python":
        return replace(remedy, paste=tuple(_filled(line, foreign.values) for line in remedy.paste))
    if quantity == "length":
        return replace(remedy, paste=(foreign.line(path, max(numbers["length"] // 2, 1)),))
    if not isinstance(remedy.change, Resized):
        return remedy
    lines = [foreign.line(path, remedy.change.size)]
    if (other := names.get("accumulation")) is not None:
        return replace(remedy, paste=(*lines, foreign.line(other, remedy.change.passes)))
    if foreign.found.total:  # the program accumulates by itself
        return replace(remedy, paste=tuple(lines))
    rest = remedy.paste[1:] or tuple(_OPTIONS.findall(remedy.paste[0])[1:] if remedy.paste else ())
    return replace(remedy, paste=(*lines, *rest))


_HALF = "HALF"


def _filled(line: str, values: Mapping[str, Value]) -> str:
    """Return a line with half of the number that the configuration gives its key.

    >>> _filled("data.max_response_length=HALF", {"data.max_response_length": 1024})
    'data.max_response_length=512'
    """
    match = _LINE.fullmatch(line)
    path = path_of(match["key"], values) if match is not None and match["value"] == _HALF else None
    number = values[path] if path is not None else None
    is_number = isinstance(number, int) and not isinstance(number, bool) and number > 1
    return line.replace(_HALF, str(number // 2)) if is_number and isinstance(number, int) else line


def _for_model(remedy: Remedy, foreign: Foreign, entry: Program) -> Remedy:
    """Return a remedy with the recipe of the configuration's model in its commands; without them where it has none."""
    assert foreign.found is not None
    recipe = entry.recipe
    if recipe is None or not any(recipe.usual in line for line in remedy.paste):
        return remedy
    named = re.fullmatch(recipe.of, foreign.found.texts.get("model", ""), re.IGNORECASE)
    size = named[2].upper().replace("_", ".") if named is not None else ""
    if named is None or float(size.removesuffix("B")) > recipe.most:
        return replace(remedy, paste=())
    return replace(remedy, paste=tuple(line.replace(recipe.usual, f"{named[1]}/{size}") for line in remedy.paste))


def _is_had(remedy: Remedy, foreign: Foreign) -> bool:
    assert foreign.found is not None
    is_eight_bit = remedy.code == "optimizer_8bit" and _EIGHT_BIT.search(foreign.found.texts.get("optimizer", ""))
    return bool(is_eight_bit) or any(part in foreign.found.parts for part in _HAD.get(remedy.code, ()))


def _without_accumulation(remedy: Remedy, foreign: Foreign, entry: Program) -> Remedy | None:
    """Return a divided batch as a smaller one where its program refuses to accumulate; None for another remedy."""
    if remedy.code not in _SPLIT:
        return None
    lines = tuple(each for each in remedy.paste if "accum" not in each)
    if not lines or refused(settings_in(lines), foreign.values, entry):
        return None
    code = "smaller_batch"
    return replace(remedy, code=code, reason=code, paste=lines, exact=False, applicability=applicability(code))


def refused(settings: Mapping[str, Value], values: Mapping[str, Value], entry: Program) -> bool:
    """Return True if a configuration with these settings is one that its program raises for, and was not before."""
    after = {**values, **{path_of(key, values) or key: value for key, value in settings.items()}}
    return any(
        all(holds(each, after) for each in pair) and not all(holds(each, values) for each in pair)
        for pair in entry.refuses
    )


def _needed(settings: Mapping[str, Value], values: Mapping[str, Value], entry: Program, like: str) -> Iterator[str]:
    """Yield lines for the settings that others need and a configuration does not have, written like another line."""
    match = _LINE.fullmatch(like)
    sign = match["sign"] if match is not None else ": "
    for condition, needs in entry.needs.items():
        if not holds(condition, settings):
            continue
        for key, value in needs.items():
            if settings.get(key, values.get(path_of(key, values) or "", False)) != value:
                yield f"{key}{sign}{value if '=' in sign else json.dumps(value)}"


def path_of(key: str, values: Iterable[str]) -> str | None:
    """Return the path of a key in a configuration: itself, or the only one that ends so; None for none or several."""
    paths = list(values)
    for name in dict.fromkeys((key, key.replace("-", "_"), key.replace("_", "-"))):
        if name in paths:
            return name
        found = [path for path in paths if path.endswith(f".{name}")]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def settings_in(lines: Sequence[str]) -> dict[str, Value]:
    """Return the keys and values of lines to paste; nothing if one of them is something else.

    >>> settings_in(["--train.micro_batch_size 4"]), settings_in(['"zero_optimization": {"stage": 3}'])
    ({'train.micro_batch_size': 4}, {'zero_optimization.stage': 3})
    """
    if any(line.startswith(" ") or line.endswith(":") for line in lines):
        return {key: value for key, value in values_in("x.yaml", "\n".join(lines)).items() if value is not None}
    found: dict[str, Value] = {}
    for line in lines:
        several = _OPTIONS.findall(line)
        for each in several if "".join(several) == line.replace(" --", "--") else [line]:
            setting = dict(_in_json(each)) or dict(_in_line(each))
            if not setting:
                return {}
            found |= setting
    return found


def _in_json(line: str) -> Iterator[tuple[str, Value]]:
    """Yield the values of a line of JSON with braces."""
    if line.startswith('"') and "{" in line:
        try:
            yield from flat(json.loads(f"{{{line}}}"))
        except ValueError:
            return


def _in_line(line: str) -> Iterator[tuple[str, Value]]:
    if (flag := _FLAG.fullmatch(line)) is not None:
        yield flag[1], True
        return
    match = _LINE.fullmatch(line)
    if (
        match is not None
        and match["value"][0] not in "[{("
        and not _IN_WORDS.search(match["value"])
        and _is_setting(match, line)
    ):
        yield match["key"], _value(match["value"])


def _is_setting(match: re.Match[str], line: str) -> bool:
    """Return True unless a line is words of a command: only an option has its value behind a space."""
    return bool(match["sign"].strip()) or line.startswith("--")


def _value(text: str) -> Value:
    """Read a value as Python, JSON or YAML writes it.

    >>> [_value(text) for text in ("4", "'bfloat16'", "true", "adamw_8bit")]
    [4, 'bfloat16', True, 'adamw_8bit']
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, bool | int | float | str) else text
