"""Tells files of installed packages from the user's own, without importing torch."""

import os
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_NAMES = ("site-packages", "dist-packages")
"""Folders of packages; Debian's Python has the second kind."""


@cache
def package_folders() -> tuple[str, ...]:
    """Return this Python's folders of packages, and the one that `pip install --target` put torch into."""
    found = {os.path.realpath(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")}
    spec = find_spec("torch")
    if spec is not None and spec.origin is not None:
        with_torch = Path(spec.origin).resolve().parents[1]
        if with_torch != Path.cwd() and any(with_torch.glob("torch-*.dist-info")):
            found.add(str(with_torch))
    return tuple(folder + os.sep for folder in sorted(found))


@cache
def is_packages_file(file: str) -> bool:
    """Return True for a file of this Python's packages, or of others that a `.pth` file or PYTHONPATH adds."""
    name = os.path.realpath(file)
    return name.startswith(package_folders()) or any(f"{os.sep}{folder}{os.sep}" in name for folder in _NAMES)
