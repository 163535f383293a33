"""A configuration file with other values, its comments and its order kept: JSON, TOML, YAML and Python."""

import ast
import json
import re
from collections.abc import Callable, Mapping

from tightfit.diagnosis.config_rules import path_of
from tightfit.diagnosis.config_values import Place, Value, bare_line, kind_of, places_in, values_in


def edited(path: str, text: str, settings: Mapping[str, Value]) -> str | None:
    """Return a file's text with these settings; None if they cannot be set for certain, each in one place."""
    kind = kind_of(path, text)
    put = _IN[kind]
    before = values_in(path, text)
    wanted = dict(before)
    for key, value in settings.items():
        name = path_of(key, before) or key
        if name == key and any(each.endswith(f".{key}") for each in before):
            return None
        changed = put(text, name, value)
        if changed is None:
            return None
        text = changed
        wanted[name] = value
    return text if kind == "python" or _is_same(values_in(path, text), wanted) else None


def _is_same(found: Mapping[str, Value], wanted: Mapping[str, Value]) -> bool:
    """Return True if a changed file has the values that it should; a part that was empty may have some now."""
    return {name: value for name, value in found.items() if value is not None} == {
        name: value for name, value in wanted.items() if value is not None
    }


def _in_python(text: str, key: str, value: Value) -> str | None:
    """Replace the last value that a Python configuration gives a key, or add a line."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError):
        return None
    if "." in key:
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


def _in_yaml(text: str, path: str, value: Value) -> str | None:
    """Replace the value of a path, or add a line at the end of its part."""
    is_plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value)
    written = str(value) if is_plain else json.dumps(value)
    places = places_in("yaml", text)
    if path in places:
        return _replaced(text, places[path], written)
    parent, _, name = path.rpartition(".")
    line = f"{name}: {written}"
    if not parent:
        return _with_line(text, line)
    if parent not in places:
        return None if "." in parent else _with_line(text, f"{parent}:", f"  {line}")
    part = places[parent][-1]
    inner = [each[0] for child, each in places.items() if child.rpartition(".")[0] == parent]
    if not inner:
        return None
    if part.kind == "flow":
        end = len(text[: part.end - 1].rstrip())
        return f"{text[:end]}, {line}{text[end:]}"
    return _inserted(text, _last(text, part.end), " " * inner[0].column + line)


def _in_toml(text: str, path: str, value: Value) -> str | None:
    """Replace the value of a path, or add a line to its section."""
    written = json.dumps(value)
    places = places_in("toml", text)
    if path in places:
        return _replaced(text, places[path], written)
    section, _, name = path.rpartition(".")
    inner = [each[-1] for child, each in places.items() if child.rpartition(".")[0] == section]
    if inner:
        last = max(inner, key=lambda place: place.start)
        return _inserted(text, last.end, " " * last.column + f"{name} = {written}") if last.kind else None
    return _with_line(text, "", f"[{section}]", f"{name} = {written}") if section else None


def _in_json(text: str, path: str, value: Value) -> str | None:
    """Replace the one value of a path, or add it to its part; the caller compares the values."""
    name, written = path.rpartition(".")[2], json.dumps(value)
    pattern = rf'("{re.escape(name)}"\s*:\s*)("[^"\\\n]*"|[\w.+-]+)(?=\s*[,}}\]])'
    found = list(re.finditer(pattern, text))
    for match in found:
        changed = text[: match.start(2)] + written + text[match.end(2) :]
        if _has(changed, path, value) and (path in values_in("x.json", text)):
            return changed
    parts, known = path.split("."), values_in("x.json", text)
    depth = max(each for each in range(len(parts)) if not each or _is_part(".".join(parts[:each]), known))
    entry = written
    for each in reversed(parts[depth + 1 :]):
        entry = f'{{"{each}": {entry}}}'
    opening = rf'"{re.escape(parts[depth - 1])}"\s*:\s*\{{' if depth else r"^\s*\{"
    return _first_in(text, opening, f'"{parts[depth]}": {entry}')


def _is_part(path: str, values: Mapping[str, Value]) -> bool:
    return any(each.startswith(f"{path}.") for each in values)


def _has(text: str, path: str, value: Value) -> bool:
    found = values_in("x.json", text)
    return path in found and found[path] == value


def _first_in(text: str, opening: str, entry: str) -> str | None:
    """Add an entry behind the one opening brace that a pattern finds."""
    found = list(re.finditer(opening + r"(\s*)(\}?)", text))
    if len(found) != 1:
        return None
    space, brace = found[0].groups()
    behind = "" if brace else f",{space or ' '}"
    return f"{text[: found[0].start(1)]}{space}{entry}{behind}{text[found[0].start(2) :]}"


def _replaced(text: str, places: list[Place], written: str) -> str | None:
    """Replace a plain value that stands in one place; a key without one gets it."""
    if len(places) != 1 or places[0].kind != "plain":
        return None
    _, start, end, _ = places[0]
    return text[:start] + " " * (start == end) + written + text[end:]


def _last(text: str, end: int) -> int:
    """Return the end of the last line before a character that is more than a comment."""
    lines = text[:end].splitlines(keepends=True)
    while lines and not bare_line(lines[-1]):
        lines.pop()
    return len("".join(lines).rstrip())


def _inserted(text: str, behind: int, line: str) -> str:
    """Insert a line below the one that has a character."""
    newline = _newline(text)
    head, end, rest = text[behind:].partition("\n")
    return text[:behind] + head + (end or newline) + line + newline + rest


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _with_line(text: str, *lines: str) -> str:
    newline = _newline(text)
    head = "" if not text or text.endswith(newline) else newline
    return text + head + "".join(line + newline for line in lines)


_IN: Mapping[str, Callable[[str, str, Value], str | None]] = {
    "json": _in_json,
    "toml": _in_toml,
    "yaml": _in_yaml,
    "python": _in_python,
}
