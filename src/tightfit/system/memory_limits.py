"""Host memory as this process may use it: the machine's, within control groups and the limits of this process.

A container, a Slurm job and systemd set control groups. Whatever leaves the least is the budget.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_COUNTED = {"RLIMIT_AS": "vms", "RLIMIT_DATA": "data"}
"""The field of psutil's `memory_info` that each limit of a process counts. Since Linux 4.7 `ulimit -d` counts private
anonymous memory too."""
_UNLIMITED = 2**62
"""Control groups of version 1 write "no limit" as 2**63 rounded down to a page."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One limit below the machine's own memory."""

    source: str
    """Its file, like "/sys/fs/cgroup/.../memory.max", or "RLIMIT_AS"."""
    limit_bytes: int
    used_bytes: int
    """Bytes that count against it, without file cache that the kernel gives back when asked."""

    @property
    def left_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """The machine's memory as this process may use it."""

    total_bytes: int
    """Physical memory."""
    available_bytes: int
    """Bytes that new allocations can have without swapping, in the kernel's estimate."""
    used_by_this_process_bytes: int
    """Resident now."""
    limits: tuple[Limit, ...] = field(default=())
    """Every limit of this process and of the control groups above it."""

    @property
    def used_bytes(self) -> int:
        """Bytes that are not available, whoever has them."""
        return self.total_bytes - self.available_bytes

    @property
    def tightest(self) -> Limit | None:
        """The limit of which the least is left."""
        return min(self.limits, key=lambda limit: limit.left_bytes, default=None)

    @property
    def budget_bytes(self) -> int:
        """Bytes that this process may still allocate: the least that is left anywhere.

        >>> HostMemory(total_bytes=100, available_bytes=60, used_by_this_process_bytes=5,
        ...            limits=(Limit(source="RLIMIT_AS", limit_bytes=50, used_bytes=20),)).budget_bytes
        30
        """
        return min([self.available_bytes, *(limit.left_bytes for limit in self.limits)])


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The machine's memory now; `root` is the folder that holds the control groups' files."""
    machine, own = psutil.virtual_memory(), own_bytes()
    return HostMemory(
        total_bytes=machine.total,
        available_bytes=machine.available,
        used_by_this_process_bytes=own["resident"],
        limits=(*_cgroup_limits(root), *_process_limits(own)),
    )


def own_bytes() -> dict[str, int]:
    """Bytes of this process now: `resident`, and under each `Limit.source` the bytes that this limit counts."""
    memory = psutil.Process().memory_info()
    counted = {name: getattr(memory, key) for name, key in _COUNTED.items() if sys.platform == "linux"}
    return {"resident": memory.rss, **counted}


def _process_limits(own: dict[str, int]) -> Iterator[Limit]:
    """Limits that `ulimit -v` and `ulimit -d` set."""
    if sys.platform != "linux":
        return
    for name in _COUNTED:
        soft, _ = psutil.Process().rlimit(getattr(psutil, name))
        if soft != psutil.RLIM_INFINITY:
            yield Limit(source=name, limit_bytes=soft, used_bytes=own[name])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # another system, or a file that this kernel or container does not have


def _cgroup_limits(root: Path) -> Iterator[Limit]:
    """The limits of this process's control groups, from its own up to the topmost that is visible."""
    mounts = _cgroup_mounts(root)
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1 if "memory" in controllers.split(",") else 0
        if version not in mounts:
            continue
        top, mounted_path = mounts[version]
        for folder in _from_here_up(path, mounted_path):
            yield from _limits_of(root, top / folder, version)


def _cgroup_mounts(root: Path) -> dict[int, tuple[Path, str]]:
    """The folder at which each version of control groups is mounted, and the group at that place.

    A line of mountinfo: `35 31 0:32 /group /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory`.
    """
    found: dict[int, tuple[Path, str]] = {}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split()
        if len(words) < 5 or len(kind) < 3:
            continue
        version = 2 if kind[0] == "cgroup2" else 1 if kind[0] == "cgroup" and "memory" in kind[2].split(",") else 0
        if version and version not in found:
            found[version] = Path(words[4]), words[3]
    return found


def _from_here_up(path: str, mounted_path: str) -> list[str]:
    """Folders below the mount, this group's first: `/a/b` mounted from `/a` gives `b` and ``.

    A container may name its group by a path that it cannot see; then only the mount itself counts.

    >>> _from_here_up("/a/b/c", "/a"), _from_here_up("/../x", "/"), _from_here_up("/docker/1", "/docker/1")
    (['b/c', 'b', ''], [''], [''])
    """
    inside = path.startswith(mounted_path.rstrip("/") + "/") and ".." not in path.split("/")
    parts = [part for part in path[len(mounted_path.rstrip("/")) :].split("/") if part] if inside else []
    return ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _limits_of(root: Path, folder: Path, version: int) -> Iterator[Limit]:
    """Limits in one group's folder. Above memory.high the kernel slows a group to a standstill, so that counts too."""
    names, used_name = (
        (("memory.max", "memory.high"), "memory.current")
        if version == 2
        else (("memory.limit_in_bytes",), "memory.usage_in_bytes")
    )
    here = root / folder.relative_to(folder.anchor)
    for name in names:
        limit = _number(here / name)
        used = _number(here / used_name)
        if limit is not None and used is not None and limit < _UNLIMITED:
            cache = min(used, _file_cache_bytes(here / "memory.stat", version))
            yield Limit(source=str(folder / name), limit_bytes=limit, used_bytes=used - cache)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None  # "max" means no limit


def _file_cache_bytes(path: Path, version: int) -> int:
    """File cache that the group gives back before it runs short; files in /dev/shm do not count."""
    prefix = "total_" if version == 1 else ""
    rows = (line.split() for line in _text(path).splitlines())
    wanted = {f"{prefix}active_file", f"{prefix}inactive_file"}
    return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in wanted and row[1].isdigit())
