"""How much memory there is: of the machine, of each GPU, and what limits this process to less.

Host memory is what the kernel says in /proc, bounded by the control groups (a container, a Slurm job, systemd) and by
the limits of this process; the tightest of them is the budget. What cannot be seen is None, never a guess.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tightfit.system.nvml import Cards, Failure, GpuMemory, GpuProcess, gpu_memory, read_cards

__all__ = [
    "Cards", "Failure", "GpuMemory", "GpuProcess", "HostMemory", "Limit", "gpu_memory", "host_memory", "own_bytes",
    "read_cards",
]  # fmt: skip

_COUNTED = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}
"""What of a process each of its limits counts, as /proc/self/status names it."""
_UNLIMITED = 2**62
"""Control groups of version 1 write "no limit" as 2**63 rounded down to a page."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One limit below the machine's own memory."""

    source: str
    """Where it is set: "/sys/fs/cgroup/.../memory.max" or "RLIMIT_AS"."""
    limit_bytes: int
    used_bytes: int
    """What counts against it, without file cache that the kernel gives back when asked."""

    @property
    def left_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """The machine's memory as this process may use it."""

    total_bytes: int | None
    """Physical memory; None where this system does not say."""
    available_bytes: int | None
    """What new allocations can have without swapping, in the kernel's estimate."""
    used_by_this_process_bytes: int | None
    """Resident now."""
    peak_bytes: int | None
    """The most that was ever resident in this process."""
    swap_free_bytes: int | None = None
    limits: tuple[Limit, ...] = field(default=())
    """Every limit that was found, of this process and of every control group above it."""

    @property
    def used_bytes(self) -> int | None:
        """By everybody: the total without what is available."""
        if self.total_bytes is None or self.available_bytes is None:
            return None
        return self.total_bytes - self.available_bytes

    @property
    def tightest(self) -> Limit | None:
        """The limit of which the least is left."""
        return min(self.limits, key=lambda limit: limit.left_bytes, default=None)

    @property
    def limit_bytes(self) -> int | None:
        return self.tightest.limit_bytes if self.tightest else None

    @property
    def limit_source(self) -> str:
        return self.tightest.source if self.tightest else ""

    @property
    def budget_bytes(self) -> int | None:
        """What this process may still allocate: the least that is left anywhere; None if nothing is known.

        >>> HostMemory(total_bytes=100, available_bytes=60, used_by_this_process_bytes=5, peak_bytes=5,
        ...            limits=(Limit(source="RLIMIT_AS", limit_bytes=50, used_bytes=20),)).budget_bytes
        30
        """
        left = [limit.left_bytes for limit in self.limits]
        return min(left if self.available_bytes is None else [self.available_bytes, *left], default=None)

    @property
    def budget_source(self) -> str:
        """What decides the budget: a limit's source, or "" for the machine's own free memory."""
        tightest = self.tightest
        return tightest.source if tightest and tightest.left_bytes == self.budget_bytes else ""


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The machine's memory now, from the files below `root` and this process's own limits."""
    machine = _fields(root / "proc/meminfo")
    process = _fields(root / "proc/self/status")
    return HostMemory(
        total_bytes=machine.get("MemTotal", _physical_bytes()),
        available_bytes=machine.get("MemAvailable"),
        used_by_this_process_bytes=process.get("VmRSS"),
        peak_bytes=process.get("VmHWM", _peak_bytes()),
        swap_free_bytes=machine.get("SwapFree"),
        limits=(*_cgroup_limits(root), *_process_limits(process)),
    )


def own_bytes(root: Path = Path("/")) -> dict[str, int]:
    """What this process holds now: what is `resident`, and what each of its own limits counts (by `Limit.source`)."""
    status = _fields(root / "proc/self/status")
    resident = status.get("VmRSS", _peak_bytes() or 0)
    return {"resident": resident, **{name: status[key] for name, key in _COUNTED.items() if key in status}}


def _fields(path: Path) -> dict[str, int]:
    """Lines like `MemTotal:  24684084 kB`, in bytes."""
    found = {}
    for line in _text(path).splitlines():
        key, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            found[key] = int(words[0]) * 1024
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # another system, or a file that this kernel or container does not have


def _physical_bytes() -> int | None:
    """Where there is no /proc: macOS says the total, Windows nothing."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _process_limits(status: dict[str, int]) -> Iterator[Limit]:
    """What `ulimit -v` and `ulimit -d` set. Since Linux 4.7 the latter counts private anonymous memory too."""
    if sys.platform == "win32":
        return
    import resource

    for name, key in _COUNTED.items():
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY and key in status:
            yield Limit(source=name, limit_bytes=soft, used_bytes=status[key])


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
    """For each version of control groups: where it is mounted, and which group is at that place.

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

    A container may name its group by a path that it cannot see; then only the mount itself is looked at.

    >>> _from_here_up("/a/b/c", "/a"), _from_here_up("/../x", "/"), _from_here_up("/docker/1", "/docker/1")
    (['b/c', 'b', ''], [''], [''])
    """
    inside = path.startswith(mounted_path.rstrip("/") + "/") and ".." not in path.split("/")
    parts = [part for part in path[len(mounted_path.rstrip("/")) :].split("/") if part] if inside else []
    return ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _limits_of(root: Path, folder: Path, version: int) -> Iterator[Limit]:
    """Above memory.high a group is not killed but slowed until it stands still, so that it counts as a limit."""
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
    """What the group holds of files and gives back before it is short; files in /dev/shm are not among these."""
    prefix = "total_" if version == 1 else ""
    rows = (line.split() for line in _text(path).splitlines())
    wanted = {f"{prefix}active_file", f"{prefix}inactive_file"}
    return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in wanted and row[1].isdigit())
