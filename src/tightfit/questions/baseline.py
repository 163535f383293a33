"""Memory of tests and scripts in `memory.lock.toml`: written once, compared from then on.

A tensor is known by its category, its shape and the text of its line, so lines that only moved are no difference.
"""

import json
import linecache
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from tightfit.errors import DataError
from tightfit.simulation.details import Detail, Held
from tightfit.storage import write_aside
from tightfit.units import format_bytes
from tightfit.vgpu.records import CATEGORIES
from tightfit.wording import chosen_language, say
from tightfit.wording.report import words

LOCK = "memory.lock.toml"
_MOST_TENSORS = 20
_LEAST_SHARE = 1000
"""Tensors below this part of all are not kept."""
_HEAD = """\
# Memory on a virtual GPU, in bytes. `pytest --memory-update` and `tightfit check --update` write this file.
"""


class KeptTensor(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors of one kind that a line holds at the peak."""

    bytes: int
    count: int
    category: str
    shape: str
    place: str
    """File and line."""
    source: str
    """Text of the line."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.category, self.shape, self.place.rpartition(":")[0], self.source


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one test or script."""

    gpu: str
    torch: str
    peak: str
    """The same as `peak_bytes`, for a reader."""
    peak_bytes: int
    """Peak of the process on the card."""
    allocated_bytes: int
    """Peak of the tensors alone. It shows growth that the cache's large blocks hide."""
    phase: str
    categories: dict[str, int]
    tensors: list[KeptTensor]
    """The largest at the peak."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that one category, or the tensors of one line, had and have."""

    category: str
    tensor: str
    """Shape and dtype, and how many there are; empty for a category."""
    place: str
    """File and line; empty for a category."""
    source: str
    before_bytes: int
    after_bytes: int


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Difference of a run from its baseline."""

    before_bytes: int
    after_bytes: int
    allocated_before: int
    allocated_after: int
    torch_before: str
    torch_after: str
    categories: list[Change]
    tensors: list[Change]

    @property
    def has_grown(self) -> bool:
        return self.after_bytes > self.before_bytes or self.allocated_after > self.allocated_before


def entry_of(detail: Detail, root: Path) -> Entry:
    """Return the memory of a play, with files as seen from `root`."""
    found = detail.findings
    return Entry(
        gpu=found.gpu.name,
        torch=found.torch,
        peak=format_bytes(found.peak.device_bytes),
        peak_bytes=found.peak.device_bytes,
        allocated_bytes=found.peak.allocated_bytes,
        phase=found.peak.phase,
        categories={name: found.categories[name] for name in CATEGORIES if found.categories.get(name)},
        tensors=_tensors(detail.held, root),
    )


def _tensors(held: Iterable[Held], root: Path) -> list[KeptTensor]:
    sums, counts = Counter[tuple[str, str, str, str]](), Counter[tuple[str, str, str, str]]()
    for each in held:
        kind = each.category, _shape(each), _place(each, root), _source(each, root)
        sums[kind] += each.bytes
        counts[kind] += each.count
    least = sum(sums.values()) / _LEAST_SHARE
    large = ((kind, nbytes) for kind, nbytes in sums.items() if nbytes >= least)
    largest = sorted(large, key=lambda item: (-item[1], item[0]))[:_MOST_TENSORS]
    return [
        KeptTensor(bytes=nbytes, count=counts[kind], category=kind[0], shape=kind[1], place=kind[2], source=kind[3])
        for kind, nbytes in largest
    ]


def _shape(each: Held) -> str:
    return f"{' × '.join(map(str, each.shape))} {each.dtype}" if each.shape else each.operator


def _place(each: Held, root: Path) -> str:
    if not each.file:
        return ""
    path = os.path.abspath(each.file)
    inside = path.startswith(f"{root}{os.sep}")
    return f"{os.path.relpath(path, root) if inside else Path(*Path(path).parts[-3:])}:{each.line}"


def _source(each: Held, root: Path) -> str:
    return linecache.getline(os.path.join(root, each.file), each.line).strip()[:100] if each.file else ""


def difference(before: Entry, after: Entry) -> Difference:
    """Compare a run with its baseline: categories and tensors that changed, the largest growth first."""
    names = [name for name in CATEGORIES if before.categories.get(name) != after.categories.get(name)]
    categories = [
        Change(
            category=name,
            tensor="",
            place="",
            source="",
            before_bytes=before.categories.get(name, 0),
            after_bytes=after.categories.get(name, 0),
        )
        for name in names
    ]
    return Difference(
        before_bytes=before.peak_bytes,
        after_bytes=after.peak_bytes,
        allocated_before=before.allocated_bytes,
        allocated_after=after.allocated_bytes,
        torch_before=before.torch,
        torch_after=after.torch,
        categories=sorted(categories, key=_growth),
        tensors=sorted(_changed_tensors(before, after), key=_growth),
    )


def _changed_tensors(before: Entry, after: Entry) -> list[Change]:
    old, new = ({each.key: each for each in entry.tensors} for entry in (before, after))
    changes = []
    for key in dict.fromkeys([*new, *old]):
        was, now = old.get(key), new.get(key)
        named = now or was
        assert named is not None
        if (was.bytes if was else 0) != (now.bytes if now else 0):
            counted = f"{named.count} × ({named.shape})" if named.count > 1 else named.shape
            changes.append(
                Change(
                    category=named.category,
                    tensor=counted,
                    place=named.place,
                    source=named.source,
                    before_bytes=was.bytes if was else 0,
                    after_bytes=now.bytes if now else 0,
                )
            )
    return changes


def _growth(change: Change) -> int:
    return change.before_bytes - change.after_bytes


def in_words(found: Difference, *, most: int = 6) -> list[str]:
    """Return what changed, line by line: the peak, each category, the tensors with their lines."""
    sizes = {"before": found.before_bytes, "after": found.after_bytes}
    tensors = {"allocated_before": found.allocated_before, "allocated_after": found.allocated_after}
    grew = found.has_grown
    lines = [say("questions.baseline.grew" if grew else "questions.baseline.shrank", **sizes, **tensors)]
    if found.torch_before != found.torch_after:
        lines.append(say("questions.baseline.torch", before=found.torch_before, after=found.torch_after))
    lines += [_change_in_words(each) for each in (*found.categories[:most], *found.tensors[:most])]
    return lines


def _change_in_words(each: Change) -> str:
    fields = {"before": each.before_bytes, "after": each.after_bytes, "what": category_name(each.category)}
    if each.place:
        place = {"place": each.place, "source": each.source}
        return say("questions.baseline.tensor", **fields, tensor=each.tensor, **place)
    if each.tensor:
        return say("questions.baseline.kernel", **fields, tensor=each.tensor)
    return say("questions.baseline.category", **fields)


def category_name(category: str) -> str:
    """Return the name of a category in this process's language."""
    return words(chosen_language(None)).name("category", category)


def read_lock(path: Path) -> dict[str, Entry]:
    """Read a file of baselines; none if it is not there. DataError for any other."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), dict[str, Entry])
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise DataError(say("questions.baseline.unreadable", path=path, reason=error)) from None


def write_lock(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write baselines, sorted by name. DataError if the disk refuses."""
    text = _HEAD + "".join(f"\n[{_key(name)}]\n{_toml(entries[name])}" for name in sorted(entries))
    try:
        write_aside(path, text.encode())
    except OSError as error:
        raise DataError(say("questions.baseline.not_written", path=path, reason=error.strerror)) from None


def _toml(entry: Entry) -> str:
    lines = [f"{name} = {_text(getattr(entry, name))}" for name in ("gpu", "torch", "peak")]
    lines += [f"peak_bytes = {entry.peak_bytes}", f"allocated_bytes = {entry.allocated_bytes}"]
    lines += [f"phase = {_text(entry.phase)}"]
    inside = ", ".join(f"{_key(name)} = {nbytes}" for name, nbytes in entry.categories.items())
    lines.append(f"categories = {{ {inside} }}")
    tensors = "".join(f"    {_inline(each)},\n" for each in entry.tensors)
    return "\n".join([*lines, f"tensors = [\n{tensors}]\n"])


def _inline(each: KeptTensor) -> str:
    fields = {name: getattr(each, name) for name in KeptTensor.__struct_fields__}
    inside = ", ".join(
        f"{name} = {value if isinstance(value, int) else _text(value)}" for name, value in fields.items()
    )
    return f"{{ {inside} }}"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _text(value: str) -> str:
    """Return a basic string of TOML, with the escapes of JSON."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
