"""Files are whole or absent, and their names, folders and locks have one home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tightfit import storage


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    storage.write_aside(path, "é", durable=True)
    assert path.read_bytes() == "é".encode()
    storage.write_aside(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shared", [False, True])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with storage.writing(path, shared=shared) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_file_has_the_mode_that_open_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    storage.write_aside(tmp_path / "aside", "")
    assert (tmp_path / "aside").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_the_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / "tightfit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / ".cache" / "tightfit"


def test_a_lock_excludes_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    code = (
        "import pathlib, sys\nfrom tightfit import storage\n"
        "with storage.locked(pathlib.Path(sys.argv[1]), wait=False): print('held')"
    )
    command = [sys.executable, "-c", code, str(path)]
    with storage.locked(path):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "BlockingIOError" in refused.stderr
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "held\n"


def test_storage_imports_no_torch() -> None:
    code = "import sys, tightfit.storage; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
