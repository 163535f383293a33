"""Scripts of a TOML file, each held against its baseline and its limit: `tightfit check`."""

import contextlib
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import msgspec
from msgspec.structs import replace

from tightfit.config.sizes import parse_bytes
from tightfit.errors import ConfigError, DataError
from tightfit.questions.asking import detail_request, details_of
from tightfit.questions.baseline import LOCK, Entry, entry_of, read_lock, write_lock
from tightfit.questions.verdict import problems_of
from tightfit.simulation.client import Simulator
from tightfit.simulation.details import Detail
from tightfit.simulation.requests import DetailRequest
from tightfit.storage import write_aside
from tightfit.units import format_bytes
from tightfit.vgpu.records import Settings
from tightfit.wording import say


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the TOML file."""

    command: str
    gpu: str
    peak: str | None = None
    """Most that the process may take."""
    memory: str | None = None
    used: str | None = None
    context: str | None = None
    steps: int | None = None

    def settings(self) -> Settings:
        """Return the card. ConfigError for a size that cannot be read."""
        sizes = {"memory_bytes": self.memory, "context_bytes": self.context, "used_bytes": self.used or "0"}
        read = {name: parse_bytes(text) for name, text in sizes.items() if text is not None}
        return replace(Settings(gpu=self.gpu, steps=self.steps), **read)


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """One script."""

    name: str
    command: str
    gpu: str
    before_bytes: int | None
    """Peak of the baseline; None without one."""
    after_bytes: int
    limit_bytes: int | None
    problems: list[str]
    """Sentences with the reasons of a failure; empty if it passes."""
    seconds: float


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """All scripts, as `tightfit check --json` prints them."""

    scripts: list[Checked]
    written: str | None
    """File of baselines that was written."""

    @property
    def failed(self) -> int:
        return sum(bool(each.problems) for each in self.scripts)


def read_scripts(path: Path) -> dict[str, Script]:
    """Read the tables of a TOML file. DataError for one that cannot be read, ConfigError for one without scripts."""
    try:
        found = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), dict[str, Script])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(say("questions.check.unreadable", path=path, reason=reason)) from None
    if not found:
        raise ConfigError(say("questions.check.empty", path=path))
    return found


def check(path: Path, simulator: Simulator, *, update: bool) -> CheckReport:
    """Play the scripts of a file, in its folder, and compare them with the baselines in the same folder."""
    scripts = read_scripts(path)
    root, lock = path.absolute().parent, path.absolute().parent / LOCK
    baseline = read_lock(lock)
    with contextlib.chdir(root):
        requests = [_request(each) for each in scripts.values()]
    details = details_of(simulator, requests)
    entries: dict[str, Entry] = {}
    rows = []
    for (name, script), detail in zip(scripts.items(), details, strict=True):
        before = baseline.get(name)
        rows.append(_checked(name, script, detail, None if update else before, root))
        if detail.findings.outcome == "fits":
            entries[name] = entry_of(detail, root)
    if update:
        write_lock(lock, {**baseline, **entries})
    return CheckReport(scripts=rows, written=str(lock) if update else None)


def _request(script: Script) -> DetailRequest:
    try:
        return detail_request(shlex.split(script.command), script.settings())
    except ValueError as error:
        raise ConfigError(say("questions.compare.unreadable", change=script.command, reason=error)) from None


def _checked(name: str, script: Script, detail: Detail, before: Entry | None, root: Path) -> Checked:
    limit = parse_bytes(script.peak) if script.peak is not None else None
    return Checked(
        name=name,
        command=script.command,
        gpu=detail.findings.gpu.name,
        before_bytes=before.peak_bytes if before else None,
        after_bytes=detail.findings.needed_bytes,
        limit_bytes=limit,
        problems=problems_of(detail, limit_bytes=limit, before=before, root=root),
        seconds=detail.findings.seconds,
    )


def write_junit(report: CheckReport, path: Path) -> None:
    """Write the report as JUnit XML. DataError if the disk refuses."""
    suite = ElementTree.Element(
        "testsuite", name="tightfit", tests=str(len(report.scripts)), failures=str(report.failed), errors="0"
    )
    for each in report.scripts:
        case = ElementTree.SubElement(
            suite, "testcase", classname="tightfit", name=each.name, time=f"{each.seconds:.3f}"
        )
        if each.problems:
            failure = ElementTree.SubElement(case, "failure", message=each.problems[0])
            failure.text = "\n".join(each.problems)
    _write(path, ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))


def write_summary(report: CheckReport, path: Path) -> None:
    """Append the report as Markdown, as a pull request shows it. DataError if the disk refuses."""
    try:
        before = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise DataError(say("questions.check.not_written", path=path, reason=error.strerror)) from None
    _write(path, before + summary(report).encode())


def summary(report: CheckReport) -> str:
    """Return a table in Markdown, and below it what each failing script fails for."""
    lines = [f"### {say('questions.check.title', failed=report.failed, count=len(report.scripts))}", ""]
    lines += [say("questions.check.columns"), "|---|---|---:|---:|---:|---|"]
    for each in report.scripts:
        cells = [each.name, each.gpu, *_figures(each), say_outcome(each)]
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    for each in report.scripts:
        if each.problems:
            lines += ["", f"**{each.name}**", "", "```", *each.problems, "```"]
    return "\n".join([*lines, ""])


def _figures(each: Checked) -> Sequence[str]:
    before, after = each.before_bytes, each.after_bytes
    if before is None:
        return "", format_bytes(after), ""
    change = after - before
    sign = "+" if change > 0 else "−" if change < 0 else "±"
    return format_bytes(before), format_bytes(after), f"{sign}{format_bytes(abs(change))}"


def say_outcome(each: Checked) -> str:
    """Return the outcome of a script in a word or two."""
    if each.problems:
        return say("questions.check.fails")
    if each.before_bytes is None:
        return say("questions.check.fits")
    return say("questions.check.passes")


def _write(path: Path, data: bytes) -> None:
    try:
        write_aside(path, data)
    except OSError as error:
        raise DataError(say("questions.check.not_written", path=path, reason=error.strerror)) from None


def table_rows(scripts: Sequence[Checked]) -> Mapping[str, Sequence[str]]:
    """Return the cells of each script's row for a terminal."""
    return {each.name: [each.name, each.gpu, *_figures(each), say_outcome(each)] for each in scripts}
