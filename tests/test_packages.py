"""Files of installed packages: `tightfit.packages`."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from tightfit import packages


@pytest.mark.parametrize(
    ("file", "is_package"),
    [
        ("/home/me/.venv/lib/python3.12/site-packages/timm/layers.py", True),
        ("/usr/lib/python3/dist-packages/numpy/core.py", True),
        ("/home/me/project/train.py", False),
    ],
)
def test_folders_of_packages_are_known_by_name(file: str, is_package: bool) -> None:
    assert packages.is_packages_file(file) == is_package


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_folder_into_which_pip_put_torch_holds_packages(
    is_installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install --target` leaves metadata beside the package; a checkout of torch has none there."""
    module = ModuleSpec("torch", None, origin=str(tmp_path / "torch" / "__init__.py"))
    if is_installed:
        (tmp_path / "torch-2.13.0.dist-info").mkdir()
    monkeypatch.setattr(packages, "find_spec", lambda name: module)
    found = packages.package_folders.__wrapped__()
    assert any(folder.startswith(str(tmp_path)) for folder in found) == is_installed
