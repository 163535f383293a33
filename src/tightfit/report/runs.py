"""Read a training run's folder: the metrics, the plan's prediction and the configuration."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

import msgspec

from tightfit.errors import CheckpointError, DataError
from tightfit.storage import CONFIG, EXPLANATION, METRICS, PLAN
from tightfit.wording import say

_CURVES = ("loss", "train_loss", "val_loss", "tokens_per_s", "memory_bytes", "memory_peak_bytes")
_PREDICTED = ("predicted_peak_bytes", "predicted_bytes", "peak_bytes")
_ROWS = ("alternatives", "offered", "candidates", "plans")

Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of a run."""

    host: str
    own_ms: float
    """Median milliseconds of a step that it did not wait for the others."""
    peak_bytes: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """Facts of a run."""

    folder: Path
    curves: Mapping[str, Points]
    """(step, value) in order of steps, by the name in metrics.jsonl."""
    events: Sequence[Mapping[str, Any]]
    """In the order of the file."""
    ranks: Sequence["Rank"]
    """Processes of the last start, by rank; empty for a single one."""
    predicted: Points
    """Peak bytes that a plan promised, from the step on at which it came into force."""
    alternatives: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    explanation: str = ""
    """Reason of the out-of-memory error that ended the run; empty for any other end, or if the run went on."""
    unreadable: Sequence[int] = ()
    """Numbers of the lines that hold no step of a run, as the cut last line of a killed one."""

    @property
    def last_step(self) -> int:
        return int(max((points[-1][0] for points in self.curves.values() if points), default=0))


def read_run(folder: Path, plan: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None) -> Run:
    """Read the run in `folder`; `plan` instead of the one that lies there, `config` where the folder has none.

    DataError if there are no metrics in it, unless it ran out of memory before it had any.
    """
    if not folder.is_dir():
        raise DataError(say("cli.report.not_a_folder", folder=folder))
    curves: dict[str, dict[float, float]] = {name: {} for name in _CURVES}
    events: list[Mapping[str, Any]] = []
    unreadable = []
    explanation = _explanation(folder)
    has_metrics = not explanation or (folder / METRICS).exists()
    for number, row in enumerate(_rows(folder / METRICS) if has_metrics else (), 1):
        if row is None:
            unreadable.append(number)
        elif "event" in row:
            events.append(row)
        else:
            for name in curves.keys() & row.keys():
                if _is_number(row[name]):
                    curves[name][row["step"]] = float(row[name])
    if not any(curves.values()) and not events and not explanation:
        raise DataError(say("cli.report.no_steps", path=folder / METRICS))
    plan = plan if plan is not None else _object(folder / PLAN)
    promised = {0: plan, **{event["step"]: event for event in events if event["event"] == "plan"}}
    return Run(
        folder=folder,
        curves={name: sorted(points.items()) for name, points in curves.items()},
        events=[event for event in events if event["event"] not in ("plan", "config", "ranks")],
        ranks=_ranks(events),
        predicted=[(step, peak) for step, each in sorted(promised.items()) if (peak := predicted_bytes(each))],
        alternatives=alternatives(plan) or [row for each in promised.values() for row in alternatives(each)],
        config=_config(folder, events) or config or {},
        explanation=explanation,
        unreadable=unreadable,
    )


def _ranks(events: Sequence[Mapping[str, Any]]) -> list[Rank]:
    """Return the processes of a run by its last lines of them, without those of another number of processes."""
    found = [each for each in events if each["event"] == "ranks" and _is_of_ranks(each)]
    found = [each for each in found if each["hosts"] == found[-1]["hosts"]]
    if not found:
        return []
    return [
        Rank(
            host=host,
            own_ms=median(each["own_ms"][rank] for each in found),
            peak_bytes=max(each["peak_bytes"][rank] for each in found),
        )
        for rank, host in enumerate(found[-1]["hosts"])
    ]


def _is_of_ranks(event: Mapping[str, Any]) -> bool:
    """Return True for a line that has a name, a time and a peak of each process."""
    hosts, *columns = (event.get(key) for key in ("hosts", "own_ms", "peak_bytes"))
    if not isinstance(hosts, list) or not all(isinstance(each, str) for each in hosts):
        return False
    return all(isinstance(each, list) and len(each) == len(hosts) and all(map(is_finite, each)) for each in columns)


def read_object(path: Path) -> dict[str, Any]:
    """Read a file of one JSON object, as `--json` prints it. DataError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(say("cli.report.unreadable_json", path=path, reason=error.strerror)) from None
    except (ValueError, RecursionError):
        raise DataError(say("cli.report.not_json", path=path)) from None
    if not isinstance(value, dict):
        raise DataError(say("cli.report.no_object", path=path))
    return value


def predicted_bytes(plan: Mapping[str, Any]) -> float | None:
    """Return the peak that a plan promises, or that of the plan in its `best` or `plan`."""
    for each in (plan, plan.get("best"), plan.get("plan")):
        if isinstance(each, Mapping):
            for value in map(each.get, _PREDICTED):
                if is_finite(value) and value > 0:
                    return float(value)
    return None


def alternatives(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of a plan's table: name, keys, peak_bytes, step_s, fits, exact, as far as each has them."""
    rows: list[Any] = next((plan[key] for key in _ROWS if isinstance(plan.get(key), list)), [])
    return [row for row in rows if isinstance(row, Mapping)]


def is_finite(value: object) -> TypeGuard[int | float]:
    """Return True for a number that can be shown; NaN and infinity cannot."""
    return _is_number(value) and math.isfinite(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield each line, None for one that is no step of a run."""
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    yield _row(line)
    except FileNotFoundError:
        raise DataError(say("cli.report.no_metrics", name=METRICS, folder=path.parent)) from None
    except OSError as error:
        raise DataError(say("cli.report.unreadable", path=path, reason=error.strerror)) from None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = msgspec.json.decode(line)
    except (ValueError, RecursionError):
        row = _row_with_nan(line)
    if not isinstance(row, dict) or not isinstance(row.get("event", ""), str):
        return None
    step = row.get("step")
    return row if type(step) is int and 0 <= step < 2**53 else None


def _row_with_nan(line: bytes) -> Any:
    """Read a line as the json module does: with NaN and Infinity, which a run that diverges writes. None if cut."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _explanation(folder: Path) -> str:
    path, metrics = folder / EXPLANATION, folder / METRICS
    try:
        if metrics.exists() and path.stat().st_mtime_ns < metrics.stat().st_mtime_ns:
            return ""
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _config(folder: Path, events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Read an event "config", a file beside the metrics, or else the newest checkpoint."""
    for event in reversed(events):
        if event["event"] == "config":
            found = event.get("config", {key: value for key, value in event.items() if key not in ("event", "step")})
            return found if isinstance(found, Mapping) else {}
    if (folder / CONFIG).is_file():
        return read_object(folder / CONFIG)
    if not any(folder.glob("*.pt")):
        return {}
    from tightfit.trainer.stored import load_newest  # torch is imported only where a checkpoint is to be read

    try:
        return load_newest(folder, log=lambda line: None).config
    except CheckpointError:
        return {}
