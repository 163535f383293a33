"""What the build of the site adds: figures from benchmarks/, JSON schemas, and the names of the project's files.

A page whose front matter has `figures: true` is a template of benchmarks/figures.py.
"""

import ast
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.figures import figures, table  # noqa: E402
from tightfit.cli.cmd_schema import RECORDS  # noqa: E402

Schema = dict[str, Any]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what `tightfit schema NAME` prints, as a file to load."""
    for name in RECORDS:
        text = json.dumps(schema(name), indent=2) + "\n"
        files.append(File.generated(config, f"schemas/{name}.json", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if not page.meta.get("figures"):
        return markdown
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(markdown).render(figures(), schemas=list(RECORDS), records=records)


def schema(name: str) -> Schema:
    module, record = RECORDS[name]
    return msgspec.json.schema(getattr(importlib.import_module(module), record))


def records(name: str) -> str:
    """Return the records of a schema in Markdown: a table of fields each."""
    parts = []
    for title, record in schema(name)["$defs"].items():
        fields = record.get("properties", {})
        if not fields:
            continue
        meanings = meanings_of(title, set(fields))
        body = [
            [f"`{key}`" + ("" if key in record["required"] else " (optional)"), kind(value), meanings.get(key, "")]
            for key, value in fields.items()
        ]
        width = 3 if any(meanings.values()) else 2
        rows = table(["field", "type", "meaning"][:width], [row[:width] for row in body])
        parts.append(f"### {title} {{#{name}-{title.lower()}}}\n\n{record.get('description', '')}\n\n{rows}\n\n")
    return "".join(parts)


def meanings_of(title: str, fields: set[str]) -> dict[str, str]:
    """Return the sentence under each field of the record with that name and those fields."""
    kinds = [each for each in _structs(msgspec.Struct) if each.__name__ == title]
    found: dict[str, str] = {}
    for each in kinds:
        if set(each.__struct_encode_fields__) == fields:
            for base in reversed(each.__mro__):
                if base not in (object, msgspec.Struct) and base.__module__.startswith("tightfit"):
                    found |= _sentences(base)
    return found


def _structs(base: type) -> Iterator[type]:
    for each in base.__subclasses__():
        yield each
        yield from _structs(each)


def _sentences(record: type) -> dict[str, str]:
    """Return the string below each field of a class, in one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(record))).body[0].body
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def kind(value: Schema) -> str:
    """Return a type in words.

    >>> kind({"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}})
    'list of integer or null'
    """
    if "$ref" in value:
        return str(value["$ref"]).rpartition("/")[2]
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(map(kind, value["anyOf"])))
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    if value.get("type") == "array":
        return f"list of {kind(value['items'])}" if value.get("items") else "list"
    if value.get("type") == "object":
        inner = value.get("additionalProperties")
        return f"object of {kind(inner)}" if isinstance(inner, dict) else "object"
    return str(value.get("type", "any"))
