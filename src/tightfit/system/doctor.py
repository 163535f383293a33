"""Every check of this machine and, if one is given, of a run on it; as a table or as JSON."""

from collections import Counter
from collections.abc import Collection, Sequence

import msgspec
from msgspec import UNSET, UnsetType
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tightfit.config import TrainConfig
from tightfit.system.checks import Check, Status
from tightfit.system.checks_gpu import gpu_checks, torch_checks
from tightfit.system.checks_host import host_checks
from tightfit.system.checks_run import run_checks
from tightfit.system.machine import Machine
from tightfit.system.nvml import Failure
from tightfit.system.wrapping import wrap
from tightfit.wording.system import Words

_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "bold red", "unknown": "cyan"}
_GAP = 2
_LEAST_WIDTH = 20
_STATUSES: tuple[Status, ...] = ("problem", "warning", "unknown", "ok")


def diagnose(
    machine: Machine, config: TrainConfig | None = None, *, prepares_itself: Collection[str] = ()
) -> list[Check]:
    """Every check, in the order in which a person would look: cards, torch, host, run.

    `prepares_itself` names the datasets that training prepares when they are missing.
    """
    return [
        *gpu_checks(machine, config),
        *torch_checks(machine),
        *host_checks(machine, config),
        *run_checks(machine, config, prepares_itself),
    ]


def has_problem(checks: Sequence[Check]) -> bool:
    return any(check.status == "problem" for check in checks)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A program or a MIG part in the facts of a check, with the fields of the one that it is."""

    name: str
    pid: int | UnsetType = UNSET
    used_bytes: int | UnsetType | None = UNSET
    free_bytes: int | UnsetType = UNSET
    total_bytes: int | UnsetType = UNSET


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A check as `--json` prints it; sizes are bytes."""

    check: str
    card: int | None
    status: Status
    outcome: str
    sentence: str
    next_step: str
    facts: dict[str, bool | int | float | str | list[str | Entry] | Failure | None]


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """Doctor's `--json`."""

    problem: bool
    counts: dict[Status, int]
    checks: list[Row]


def diagnosis(checks: Sequence[Check], words: Words) -> Diagnosis:
    """Return every check with its sentences in one language."""
    rows = [_row(check, words) for check in checks]
    return Diagnosis(problem=has_problem(checks), counts=_counts(checks), checks=rows)


def _row(check: Check, words: Words) -> Row:
    written = {
        "check": check.name,
        "card": check.card,
        "status": check.status,
        "outcome": check.outcome,
        "sentence": check.sentence(words),
        "next_step": check.next_step(words),
        "facts": check.facts,
    }
    return msgspec.convert(msgspec.to_builtins(written), Row)


def print_table(checks: Sequence[Check], words: Words, console: Console) -> None:
    """Print one row a check: status, title, the sentence with the next step below it; then the counts.

    In a narrow terminal the sentence begins below the title.
    """
    statuses = [words("words", status) for status in _STATUSES]
    titles = [check.title(words) for check in checks]
    used = max(map(cell_len, statuses)) + max(map(cell_len, titles)) + 2 * _GAP
    is_narrow = console.width - used < _LEAST_WIDTH
    width = console.width - (_GAP if is_narrow else used)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_header=False)
    for _ in range(3):
        table.add_column(no_wrap=True, overflow="fold")
    for check, title in zip(checks, titles, strict=True):
        status = Text(words("words", check.status), style=_STYLES[check.status])
        row = (status, Text(title), _finding(check, words, width=width))
        if is_narrow:
            console.print(*row[:2])
            console.print(Padding(row[2], (0, 0, 0, _GAP)))
        else:
            table.add_row(*row)
    console.print(table, end="")
    console.print()
    console.print(_summary(checks, words))


def _finding(check: Check, words: Words, *, width: int) -> Text:
    text = Text("\n".join(wrap(check.sentence(words), width)))
    if step := check.next_step(words):
        style = _STYLES[check.status] if check.status in ("warning", "problem") else "dim"
        text.append("\n→ " + "\n  ".join(wrap(step, width - 2)), style=style)
    return text


def _summary(checks: Sequence[Check], words: Words) -> Text:
    counts = _counts(checks)
    parts = [
        Text(words("words", f"{status}_count", count=counts[status]), style=_STYLES[status])
        for status in _STATUSES
        if counts[status]
    ]
    return Text(words("words", "separator")).join(parts)


def _counts(checks: Sequence[Check]) -> dict[Status, int]:
    found = Counter(check.status for check in checks)
    return {status: found[status] for status in _STATUSES}
