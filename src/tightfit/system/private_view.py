"""A private, copy-on-write view of the file system for one process and its children, by Linux's namespaces.

All paths stay the same. Written data goes to a file system in memory, which the kernel drops with the last process
of the view, also after SIGKILL. An ordinary user gets it where the kernel allows user namespaces.
"""

import ctypes
import errno
import fcntl
import os
import platform
import shutil
import socket
import stat
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tightfit.system.memory_limits import host_memory

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_KEPT_FLAGS = 2 | 4 | 8 | 1024 | 2048
"""nosuid, nodev, noexec, noatime and nodiratime: a namespace may not take them off."""
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203}
_CAPABILITIES_V3 = 0x20080522
_SET_FLAGS, _UP = 0x8914, 0x1 | 0x40
"""The request SIOCSIFFLAGS, and the flags IFF_UP and IFF_RUNNING."""

_BASE = "/tmp"
"""A folder that every system has: the file system in memory is mounted here first, and moves to the root at once."""
_KINDS_AS_THEY_ARE = (
    "proc sysfs devtmpfs devpts cgroup cgroup2 mqueue debugfs tracefs securityfs bpf pstore configfs fusectl "
    "binfmt_misc hugetlbfs autofs nsfs efivarfs rpc_pipefs"
)
_AS_THEY_ARE = frozenset(_KINDS_AS_THEY_ARE.split())
"""Kinds of file systems that hold no user's files."""
_DEVICES = ("/proc", "/sys", "/dev")
_MOST_ENTRIES = 4000
"""Entries of folders with other file systems below: each is mounted by itself."""
_LARGEST_COPY = 1 << 20
"""Bytes of a file beside a mounted folder up to which it is copied; a larger one can only be read."""
_MOST_SOCKETS = 256
_LEAST_ROOM = 64 << 20


class NoView(Exception):
    """The kernel refuses a private view here; the text is its reason."""


@dataclass(frozen=True)
class View:
    """A view that this process is in."""

    layers: int
    """Descriptor of the folder with the written files, one folder for each mount."""
    places: dict[str, tuple[str, int]]
    """Path of each mount, and the descriptor of the old folder under it, by the name of its folder of written files."""
    read_only: tuple[str, ...]
    """Paths that no copy-on-write mount could be made for: writes are refused."""
    room_bytes: int
    """Bytes that can be written."""
    has_network: bool

    def stat_before(self, path: str) -> os.stat_result:
        """Return the status of a file as it is outside of the view. OSError for one that is not there."""
        real = os.path.realpath(path)
        over = [each for each in self.places.values() if f"{real}/".startswith(each[0].rstrip("/") + "/")]
        place, below = max(over, default=("", -1), key=lambda each: len(each[0]))
        return os.stat(os.path.relpath(real, place), dir_fd=below) if place else os.stat(real)

    def changed(self) -> Iterator[str]:
        """Yield the paths of files from before the view that were written, replaced or removed."""
        for name, (place, below) in self.places.items():
            top = f"/proc/self/fd/{self.layers}/{name}"
            for folder, folders, files in os.walk(top):
                links = [each for each in folders if os.path.islink(os.path.join(folder, each))]
                for each in (*files, *links):
                    path = os.path.normpath(os.path.join(os.path.relpath(folder, top), each))
                    if _is_there(path, below):
                        yield os.path.join(place, path)


def enter_view(places: Iterable[str] = (), *, network: bool) -> View:
    """Put this process, which must have one thread, into a view of its own. NoView where the kernel refuses.

    `places` are the folders that it will most likely write to: in a user namespace, those below another user's folder
    need a mount of their own. The working folder must be entered anew.
    """
    if sys.platform != "linux" or platform.machine() not in _PIVOT_ROOT:
        raise NoView("not Linux")
    _try_in_a_child(network)
    owner = os.geteuid() == 0 and _can_mount()
    sockets = list(_bound_sockets())
    _unshare(network, owner)
    view = _Builder(owner, {os.path.realpath(each) for each in places}).build(sockets, network)
    if not network:
        _start_loopback()
    if os.geteuid() != 0:
        _drop_capabilities()
    return view


def why_there_is_no_view() -> str:
    """Return the kernel's reason against a private view, or nothing where there can be one."""
    if sys.platform != "linux" or platform.machine() not in _PIVOT_ROOT:
        return "not Linux"
    try:
        _try_in_a_child(network=False)
    except NoView as error:
        return str(error)
    return ""


def _try_in_a_child(network: bool) -> None:
    """Raise NoView if the first steps fail in a child: a process cannot go back from half of a view."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        reason = b""
        while part := os.read(reading, 4096):
            reason += part
        os.close(reading)
        os.waitpid(child, 0)
        if reason != b"ok":
            raise NoView(reason.decode(errors="replace") or "no answer")
        return
    try:
        os.close(reading)
        owner = os.geteuid() == 0 and _can_mount()
        _unshare(network, owner)
        _mount("tmpfs", _BASE, "tmpfs", 0, "mode=755")
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"{_BASE}/{name}")
        below = os.open(f"{_BASE}/lower", os.O_PATH | os.O_DIRECTORY)
        _mount_overlay(below, f"{_BASE}/upper", f"{_BASE}/work", f"{_BASE}/merged", owner)
        os.write(writing, b"ok")
    except OSError as error:
        os.write(writing, (error.strerror or str(error)).encode())
    finally:
        os._exit(0)


def _unshare(network: bool, owner: bool) -> None:
    user, group = os.geteuid(), os.getegid()
    flags = _CLONE_NEWNS | (0 if owner else _CLONE_NEWUSER) | (0 if network else _CLONE_NEWNET)
    _checked(_libc().unshare(flags), "unshare")
    if not owner:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, None)


class _Builder:
    """Builds the new root beside the old one, and moves into it."""

    def __init__(self, owner: bool, wanted: set[str]) -> None:
        self._owner, self._wanted = owner, wanted
        self._mounts = dict(_mount_points())
        self._entries = 0
        self._places: dict[str, tuple[str, int]] = {}
        self._read_only: list[str] = []

    def build(self, sockets: list[str], network: bool) -> View:
        room = max(_LEAST_ROOM, host_memory().budget_bytes // 2)
        _mount("tmpfs", _BASE, "tmpfs", 0, f"mode=755,size={room}")
        os.chdir(_BASE)
        for name in ("old", "new", "upper", "scratch"):
            os.mkdir(name)
        _pivot_root(".", "old")
        os.chdir("/")
        _mount("/new", "/new", None, _MS_BIND, None)  # a root must be a mount
        self._compose("/")
        if os.path.isdir("/old/dev/shm"):
            self._cover("/dev/shm")
        for each in sorted(self._wanted):
            self._cover_own(each)
        for each in sockets:
            if os.path.exists(f"/new{each}"):
                self._bind(each)
        layers = os.open("/upper", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.chdir("/new")
        _pivot_root(".", ".")
        _checked(_libc().umount2(b".", _MNT_DETACH), "umount")
        os.chdir("/")
        return View(layers, self._places, tuple(self._read_only), room, network)

    def _compose(self, place: str) -> None:
        """Make `place` of the new root: one mount, or a folder with a mount for each entry."""
        os.makedirs(f"/new{place}", exist_ok=True)
        if self._mounts.get(place) in _AS_THEY_ARE or place in _DEVICES:
            self._bind(place, recursive=True)
            return
        if not _is_above(place, self._mounts):
            self._cover(place)
            return
        try:
            entries = list(os.scandir(f"/old{place}"))
        except OSError:
            return
        self._entries += len(entries)
        if self._entries <= _MOST_ENTRIES:
            self._compose_entries(place, entries)
        else:
            self._bind(place, recursive=True, read_only=True)

    def _cover_own(self, wanted: str) -> None:
        """Give the folders of this user on the way to `wanted` layers of their own below another user's folder.

        A layer copies the folders above a new file, except those of a user without a number in the namespace.
        """
        covered = {place for place, _ in self._places.values()}
        above = [str(each) for each in (*reversed(Path(wanted).parents), Path(wanted))]
        start = max((index for index, each in enumerate(above) if each in covered), default=len(above))
        is_ready = True
        for place in above[start + 1 :]:
            if not os.path.isdir(f"/old{place}"):
                return
            is_own = not self._is_anothers(place)
            needs_layer = not is_ready if is_own else place == wanted
            if needs_layer:
                self._cover(place)
            is_ready = is_own or needs_layer

    def _is_anothers(self, place: str) -> bool:
        """Return True for a folder that cannot be copied into the layer, as its owner has no number there."""
        found = os.stat(f"/old{place}")
        return not self._owner and (found.st_uid != os.geteuid() or found.st_gid != os.getegid())

    def _compose_entries(self, place: str, entries: list[os.DirEntry[str]]) -> None:
        for entry in entries:
            path = os.path.join(place, entry.name)
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), f"/new{path}")
            elif entry.is_dir():
                self._compose(path)
            else:
                self._place_file(path)
        _take_rights(f"/old{place}", f"/new{place}")

    def _place_file(self, path: str) -> None:
        """A file beside mounted folders: a copy, if small, or the file itself to be read."""
        try:
            found = os.stat(f"/old{path}")
            if stat.S_ISREG(found.st_mode) and found.st_size <= _LARGEST_COPY:
                shutil.copy2(f"/old{path}", f"/new{path}")
                return
        except OSError:
            pass
        with open(f"/new{path}", "w"):
            self._bind(path, read_only=True)

    def _cover(self, place: str) -> None:
        """Mount a copy-on-write layer over `place`; where the file system does not allow it, the folder read-only."""
        name = str(len(self._places))
        os.mkdir(f"/upper/{name}")
        os.mkdir(f"/scratch/{name}")
        try:
            _take_rights(f"/old{place}", f"/upper/{name}")
            below = os.open(f"/old{place}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            _mount_overlay(below, f"/upper/{name}", f"/scratch/{name}", f"/new{place}", self._owner)
            self._places[name] = place, below
        except OSError:
            os.rmdir(f"/upper/{name}")
            shutil.rmtree(f"/scratch/{name}")
            self._bind(place, recursive=True, read_only=True)

    def _bind(self, place: str, *, recursive: bool = False, read_only: bool = False) -> None:
        """Show `place` itself; one that cannot be reached is left empty."""
        try:
            _mount(f"/old{place}", f"/new{place}", None, _MS_BIND | (_MS_REC if recursive else 0), None)
            if read_only:
                self._read_only.append(place)
                flags = os.statvfs(f"/new{place}").f_flag & _KEPT_FLAGS
                _mount("none", f"/new{place}", None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | flags, None)
        except OSError:
            return


def _is_there(path: str, folder: int) -> bool:
    try:
        os.stat(path, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return True


def _is_above(place: str, paths: Iterable[str]) -> bool:
    prefix = place.rstrip("/") + "/"
    return any(path.startswith(prefix) and path != "/" for path in paths)


def _take_rights(old: str, new: str) -> None:
    """Give a folder the rights that this user has on the old one, and its times."""
    found = os.stat(old)
    mode = stat.S_IMODE(found.st_mode)
    try:
        os.chown(new, found.st_uid, found.st_gid)
    except OSError:  # another user's: this one becomes the owner, with no more rights than before
        granted = sum(bit for bit, test in ((4, os.R_OK), (2, os.W_OK), (1, os.X_OK)) if os.access(old, test))
        mode = (mode & ~0o700) | granted << 6
    os.chmod(new, mode)
    os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))


def _mount_overlay(below: int, upper: str, work: str, target: str, owner: bool) -> None:
    # By its number: mount's options have no room for long paths, commas and colons.
    proc = "/proc" if os.path.exists("/proc/self/fd") else "/old/proc"
    layers = f"lowerdir={proc}/self/fd/{below},upperdir={upper},workdir={work}"
    _mount("overlay", target, "overlay", 0, layers + (",redirect_dir=on" if owner else ",userxattr"))


def _mount_points() -> Iterator[tuple[str, str]]:
    """Yield the mount points of this process, and the kinds of their file systems."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        left, _, right = line.partition(b" - ")
        point = left.split()[4].decode("unicode_escape").encode("latin-1")
        yield os.fsdecode(point), right.split()[0].decode()


def _bound_sockets() -> Iterator[str]:
    """Yield the paths of sockets in files: a copy-on-write layer would hide who listens there."""
    try:
        lines = Path("/proc/net/unix").read_bytes().splitlines()[1:]
    except OSError:
        return
    paths = {os.fsdecode(line.split(maxsplit=7)[7]) for line in lines if line.count(b" /")}
    for path in sorted(paths)[:_MOST_SOCKETS]:
        if path.startswith("/") and not path.startswith(_DEVICES) and os.path.exists(path):
            yield os.path.realpath(path)


def _start_loopback() -> None:
    """Start the network's loopback device: torch.distributed talks to itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        fcntl.ioctl(device, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))


def _can_mount() -> bool:
    """Return True if root has its usual rights: in most containers it has not."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 21 & 1)
    return False


def _drop_capabilities() -> None:
    """Give up the rights that a user namespace gives its maker, so that protected files stay protected."""
    header = struct.pack("Ii", _CAPABILITIES_V3, 0)
    _checked(_libc().capset(header, bytes(24)), "capset")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    source_, target_ = os.fsencode(source), os.fsencode(target)
    given = ctypes.c_ulong(flags), data.encode() if data else None
    _checked(_libc().mount(source_, target_, kind.encode() if kind else None, *given), "mount")


def _pivot_root(new: str, old: str) -> None:
    number = _PIVOT_ROOT[platform.machine()]
    _checked(_libc().syscall(ctypes.c_long(number), new.encode(), old.encode()), "pivot_root")


def _checked(result: int, name: str) -> None:
    if result:
        code = ctypes.get_errno() or errno.EPERM
        raise OSError(code, f"{name}: {os.strerror(code)}")
