"""Remedies beside another program's configuration: without what it has already, and without what it refuses."""

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec.structs import replace

from tightfit.diagnosis.config_programs import ALWAYS, Program, holds, known
from tightfit.diagnosis.config_values import Value, flat, values_in
from tightfit.diagnosis.fix_words import applicability
from tightfit.diagnosis.foreign_config import Foreign
from tightfit.diagnosis.remedies import Remedy

_LINE = re.compile(
    r"(?P<quote>[\"']?)(?:-{1,2})?(?P<key>[A-Za-z_][\w.-]*)(?P=quote)(?P<sign>\s*[:=](?!=)\s*|(?<=[\w])\s+)"
    r"(?P<value>[^#\s].*?)\s*(?:\s#.*)?"
)
"""A line to paste that gives a key a value, in the language of any configuration or as an option."""
_IN_WORDS = re.compile(r"[A-Z]{3,}|[/*(]")
"""Marks of a value that a person must fill in, or of a call."""
_OPTIONS = re.compile(r"--[A-Za-z][\w.-]*(?:[= ][^\s-]\S*)?")
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
    if key in paths:
        return key
    found = [path for path in paths if path.endswith(f".{key}")]
    return found[0] if len(found) == 1 else None


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
    match = _LINE.fullmatch(line)
    if match is not None and not _IN_WORDS.search(match["value"]) and _is_setting(match, line):
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
