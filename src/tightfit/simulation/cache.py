"""What was traced, timed or measured before, on disk: valid for this torch and these lines of this package."""

import contextlib
import hashlib
import json
import os
import threading
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Memory:
    """The answer to one request, in a file of its own."""

    def __init__(self, request: dict[str, Any], folder: str = "traces", *, also: tuple[Path, ...] = ()) -> None:
        """`also` are files besides this package's rooms that decide the answer."""
        text = json.dumps([request, version("torch"), _sources(also)], sort_keys=True)
        self._file = cache_folder() / folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def read(self) -> dict[str, Any] | None:
        """What was written, if it was."""
        try:
            found: dict[str, Any] = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return None
        return found

    def write(self, found: dict[str, Any]) -> None:
        """Kept for the next time, unless the disk is full or cannot be written."""
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
            part.write_text(json.dumps(found))
            part.replace(self._file)


def cache_folder() -> Path:
    """Where plans and measurements are remembered: XDG_CACHE_HOME/tightfit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tightfit"


@cache
def _sources(also: tuple[Path, ...]) -> str:
    """Hash of every line and table of this package: the server process imports nearly all of it."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in (*sorted(package.rglob("*.py")), *sorted(package.glob("*.csv")), *also):
        digest.update(file.read_bytes())
    return digest.hexdigest()
