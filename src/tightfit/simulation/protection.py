"""Protection of the user's files from a played script, in the strongest way that this kernel allows."""

import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from tightfit.errors import DataError
from tightfit.system.landlock import NoLandlock, restrict_writes
from tightfit.system.private_view import NoView, View, enter_view
from tightfit.wording import say

VARIABLE = "TIGHTFIT_DRYRUN_FILES"
"""Variable with the ways to try, such as `landlock` or `patches`: for a script that a private view disturbs."""
_MOST_PLACES = 32
_MOST_LISTED = 50
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}
"""Variables by which libraries do without a network at once, and do not try for minutes."""


@dataclass(frozen=True)
class Protection:
    """The way in which this process keeps the files that were there before."""

    kind: Literal["view", "landlock", "patches"]
    note: str
    """A sentence for the user: which files are protected, and which are not."""
    view: View | None = None
    outside: Mapping[str, int] = field(default_factory=dict)
    """Descriptor of the folder of each file that the dry run itself is to write."""

    @property
    def has_network(self) -> bool:
        return self.view is None or self.view.has_network

    @property
    def environ(self) -> Mapping[str, str]:
        """Variables that the script finds unless it was given others."""
        return {} if self.has_network else _OFFLINE

    def changed(self, besides: Collection[str]) -> list[str]:
        """Return old files that the script wrote, replaced or removed in the view, without those of `besides`."""
        if self.view is None:
            return []
        known = {os.path.realpath(each) for each in besides} | {os.path.abspath(each) for each in self.outside}
        found = (each for each in self.view.changed() if each not in known and "/__pycache__/" not in each)
        return sorted(found)[:_MOST_LISTED]

    def carry_out(self) -> None:
        """Move the dry run's own files out of the view. DataError for one that cannot be written there."""
        for path, folder in self.outside.items():
            name = os.path.basename(path)
            part = f".{name}.{os.getpid()}.writing"
            try:
                with (
                    open(path, "rb") as source,
                    open(part, "xb", opener=partial(os.open, mode=0o666, dir_fd=folder)) as target,
                ):
                    shutil.copyfileobj(source, target)
                os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError as error:
                raise DataError(say("vgpu.snapshot.not_written", path=path, reason=error.strerror)) from None


def protect(
    words: Sequence[str], environ: Mapping[str, str], folder: str, *, network: bool, outside: Sequence[str] = ()
) -> Protection:
    """Protect the user's files from this process, which must have one thread yet, and from its children.

    `outside` are files that the dry run itself is to write, in folders that exist.
    """
    folders = {each: os.path.dirname(os.path.join(folder, each)) for each in outside}
    doors = {each: os.open(at, os.O_PATH | os.O_DIRECTORY) for each, at in folders.items() if os.path.isdir(at)}
    places = [folder, *_folders_named(words, environ, folder)]
    ways = environ.get(VARIABLE, "view,landlock").split(",")
    try:
        if "view" not in ways:
            raise NoView(f"{VARIABLE}={environ[VARIABLE]}")
        view = enter_view(places[:_MOST_PLACES], network=network)
    except (NoView, OSError) as error:
        return _without_view(places, ways, str(error))
    note = say("simulation.protection.view") if network else say("simulation.protection.view_without_network")
    if view.read_only:
        note += say("simulation.protection.read_only", paths=", ".join(view.read_only[:5]))
    return Protection("view", note, view, doors)


def _without_view(places: Sequence[str], ways: Collection[str], reason: str) -> Protection:
    """Refuse writes outside the folders that a script is likely to write to, where Landlock allows that."""
    own = [os.path.expanduser("~/.cache"), tempfile.gettempdir(), "/dev", "/proc"]
    try:
        if "landlock" not in ways:
            raise NoLandlock(f"{VARIABLE}={','.join(ways)}")
        home = os.path.expanduser("~")
        near = [places[0], *(each for each in places[1:] if not f"{home}/".startswith(f"{each}/"))]
        restrict_writes([*near, *own])
    except NoLandlock as error:
        return Protection("patches", say("simulation.protection.patches", reason=f"{reason}; {error}"))
    folders = ", ".join(dict.fromkeys([*near, *own]))
    return Protection("landlock", say("simulation.protection.landlock", reason=reason, folders=folders))


def _folders_named(words: Sequence[str], environ: Mapping[str, str], folder: str) -> list[str]:
    """Return the folders that a command line or the environment names: a script writes there."""
    texts = [word.rpartition("=")[2] for word in words]
    texts += [environ[name] for name in sorted(environ) if os.path.isabs(environ[name]) and ":" not in environ[name]]
    found = []
    for text in texts:
        if "/" in text and "\0" not in text:
            path = os.path.join(folder, os.path.expanduser(text))
            while not os.path.isdir(path):
                path = os.path.dirname(path)
            found.append(os.path.realpath(path))
    return list(dict.fromkeys(each for each in found if each != "/"))
