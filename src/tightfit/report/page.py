"""Render sections, tables and charts as one HTML file that loads nothing.

All text goes through Jinja2's escaping; the charts' data is JSON in which no tag can begin. A content security policy
in the file itself allows the scripts below by their hashes and nothing that would be loaded.
"""

import base64
import errno
import hashlib
import json
import os
import re
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tightfit.errors import DataError, DoesNotFit
from tightfit.report.sections import Page, Section
from tightfit.report.timeline_picture import CATEGORY_COLOURS, DARK_CATEGORY_COLOURS, PHASE_COLOURS
from tightfit.storage import write_aside
from tightfit.wording import say
from tightfit.wording.report import words

_CHARTS = "uplot-1.6.32"
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""Characters that would mean something to HTML, or end a line of JavaScript; in JSON they only occur in strings."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Of terminals, and such as turn the direction of what follows: a log or a file name may have them."""


def render(page: Page, *, lang: str) -> str:
    """Return the page as HTML. ConfigError for an unknown language."""
    said = words(lang)
    charts = {each.id: msgspec.to_builtins(each.chart.spec) for each in page.sections if each.chart}
    scripts = [_asset(f"vendor/{_CHARTS}/uPlot.iife.min.js"), _charts_script()] if charts else []
    if any(each.code or each.advice for each in page.sections):
        scripts.append(_asset("templates/copy.js"))
    licence = _asset(f"vendor/{_CHARTS}/LICENSE")
    html = _environment().get_template("page.html").render(
        page=page,
        lang=lang,
        t=said,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("tightfit"),
        has_charts=bool(charts),
        data=Markup(_json({"charts": charts, "words": dict(said.table("js"))})),
        scripts=[Markup(each) for each in scripts],
        hashes=[_hash(each) for each in scripts],
        licence=licence,
        styles=Markup(_asset(f"vendor/{_CHARTS}/uPlot.min.css") + _asset("templates/page.css")),
        light_colours={_slug(name): colour for name, colour in CATEGORY_COLOURS.items()},
        dark_colours={_slug(name): colour for name, colour in DARK_CATEGORY_COLOURS.items()},
        phase_colours={_slug(name): colour for name, colour in PHASE_COLOURS.items()},
    )  # fmt: skip
    return _encodable(html)


def fragment(page: Page, sections: Sequence[Section], *, unfolded: Collection[str], lang: str) -> str:
    """Return these sections of a page for a notebook.

    Notebooks remove scripts and style sheets and have a theme of their own, so all style is inline, text takes the
    theme's colours, and bars stand on a light strip. JupyterLab's sanitizer lets every tag and property here pass.
    """
    template = _environment().get_template("notebook.html")
    return _encodable(
        template.render(page=page, sections=sections, unfolded=unfolded, lang=lang, colours=_light_colours())
    )


def _encodable(html: str) -> str:
    """Replace a lone surrogate, as in a file name that is not UTF-8."""
    return html.encode("utf-8", "replace").decode()


@cache
def _light_colours() -> dict[str, str]:
    """Return the style sheet's colours for light pages, by custom property."""
    root = _asset("templates/page.css").partition("}")[0]
    named = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", root))
    return named | {f"--c-{_slug(name)}": colour for name, colour in CATEGORY_COLOURS.items()}


def write(html: str, path: str | os.PathLike[str]) -> None:
    """Write a report, replacing an older one only by a whole one. DataError or DoesNotFit if it cannot be written."""
    goal = Path(path)
    try:
        write_aside(goal, html)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DoesNotFit(say("cli.report.disk_full", goal=goal)) from None
        raise DataError(say("cli.report.not_written", goal=goal, reason=error.strerror)) from None


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise DataError before the work starts if its report could not be written later."""
    goal = Path(path)
    if not goal.parent.is_dir():
        raise DataError(say("cli.report.no_folder", goal=goal, folder=goal.parent))
    if goal.is_dir():
        raise DataError(say("cli.report.is_a_folder", goal=goal, file=goal / "report.html"))


def _shown(value: object) -> object:
    """Remove control characters from text; leave Markup as it is."""
    return _CONTROL.sub("", value) if type(value) is str else value


def _json(value: object) -> str:
    """Encode JSON so that it may stand in a script element.

    >>> _json({"line": "</script>"})
    '{"line":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, escape in _UNSAFE.items():
        text = text.replace(character, escape)
    return text


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _slug(name: str) -> str:
    return name.replace(" ", "-")


@cache
def _asset(name: str) -> str:
    text = files("tightfit.report").joinpath(*name.split("/")).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


@cache
def _charts_script() -> str:
    parts = (_asset(f"templates/charts/{name}.js") for name in ("common", "lines", "stack", "start"))
    return '(() => {\n"use strict";\n' + "".join(parts) + "})();\n"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("tightfit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
