"""A remedy as a change of the configuration file that was given."""

import ast
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.render import effects, shown_remedies
from tightfit.diagnosis.statements import Sentences
from tightfit.storage import as_diff
from tightfit.wording.diagnosis import words

Value = bool | int | float | str
_LINE = re.compile(r"""(?P<quote>["']?)(?P<key>[A-Za-z_]\w*)(?P=quote)\s*[:=](?!=)\s*(?P<value>[^#\s].*?)\s*(?:#.*)?""")
"""A line to paste that gives a key a value, in the language of any configuration."""
_IN_WORDS = re.compile(r"[A-Z]{3,}|[/*(]")
"""Marks of a value that a person must fill in, or of a call."""


class ConfigFix(msgspec.Struct, frozen=True, kw_only=True):
    """A changed configuration file."""

    path: str
    title: str
    effects: str
    """Its effects on the result and the time, in words."""
    before: str
    after: str

    @property
    def diff(self) -> str:
        """The change as a unified diff, which `patch` takes."""
        return as_diff(self.path, self.before, self.after)


def config_fix(found: Explanation, path: str) -> ConfigFix | None:
    """Return the first of the shown remedies that the file's own keys can carry; None without one.

    OSError or UnicodeDecodeError if the file cannot be read as text.
    """
    before = Path(path).read_bytes().decode()
    told = words(found.language)
    for remedy in shown_remedies(found):
        settings = _settings(remedy.paste)
        after = _changed(before, settings, _LANGUAGES.get(Path(path).suffix.lower(), _set_in_python))
        if settings and after is not None and after != before:
            title = Sentences(found, told).title(remedy)
            notes = told("units", "separator").join(effects(remedy, told))
            return ConfigFix(path=path, title=title, effects=notes, before=before, after=after)
    return None


def _settings(lines: Sequence[str]) -> dict[str, Value]:
    """Return the keys and values of lines to paste; nothing if one of them is something else."""
    matches = [_LINE.fullmatch(line) for line in lines]
    found = {match["key"]: match["value"] for match in matches if match is not None}
    if len(found) < len(lines) or any(_IN_WORDS.search(value) for value in found.values()):
        return {}
    return {key: _value(text) for key, text in found.items()}


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


def _changed(text: str, settings: dict[str, Value], put: Callable[[str, str, Value], str | None]) -> str | None:
    for key, value in settings.items():
        changed = put(text, key, value)
        if changed is None:
            return None
        text = changed
    return text


def _set_in_python(text: str, key: str, value: Value) -> str | None:
    """Replace the last value that a Python configuration gives a key, or add a line."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError):
        return None
    given = [
        each.value
        for each in statements
        if isinstance(each, ast.Assign) and [key] == [getattr(target, "id", None) for target in each.targets]
    ]
    if not given:
        return _with_line(text, f"{key} = {value!r}")
    old = given[-1]
    last = old.end_lineno or old.lineno
    lines = text.encode().splitlines(keepends=True)  # as the offsets count bytes
    head, tail = lines[old.lineno - 1][: old.col_offset], lines[last - 1][old.end_col_offset :]
    lines[old.lineno - 1 : last] = [head + repr(value).encode() + tail]
    return b"".join(lines).decode()


def _set_in_yaml(text: str, key: str, value: Value) -> str | None:
    """Replace the value on the one line that gives it, at any depth, or add a line at the end."""
    is_plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value)
    written = str(value) if is_plain else json.dumps(value)
    start = rf"^[ -]*[\"']?{key}[\"']?[ ]*:"
    if re.search(start, text, re.MULTILINE) is None:
        return _with_line(text, f"{key}: {written}")
    return _replaced(text, rf"({start}[ ]+)([^\s#&*|>\[{{][^#\n]*?)(?=[ ]*\r?$|[ ]+#)", written)


def _set_in_json(text: str, key: str, value: Value) -> str | None:
    """Replace the one value of a key, at any depth, or add it first; None if the file is then no JSON."""
    written = json.dumps(value)
    if f'"{key}"' in text:
        after = _replaced(text, rf'("{key}"\s*:\s*)("[^"\\\n]*"|[\w.+-]+)(?=\s*[,}}])', written)
    else:
        after = re.sub(r"^\s*\{(\s*)", lambda start: f'{start[0]}"{key}": {written},{start[1] or " "}', text, count=1)
    try:
        json.loads(after or "")
    except ValueError:
        return None
    return after


def _replaced(text: str, pattern: str, new: str) -> str | None:
    """Replace the second group of a pattern; None if the pattern does not match exactly once."""
    found = list(re.finditer(pattern, text, re.MULTILINE))
    if len(found) != 1:
        return None
    start, end = found[0].span(2)
    return text[:start] + new + text[end:]


def _with_line(text: str, line: str) -> str:
    newline = "\r\n" if "\r\n" in text else "\n"
    return f"{text}{'' if not text or text.endswith(newline) else newline}{line}{newline}"


_LANGUAGES = {".json": _set_in_json, ".yaml": _set_in_yaml, ".yml": _set_in_yaml}
