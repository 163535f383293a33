"""A dry run sees a private view of the files: whatever a script writes, nothing that was there changes."""

import ast
import hashlib
import os
import shelve
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import threading
import zipfile
from dbm import dumb
from pathlib import Path

import numpy as np
import pytest
from plays import findings, played

from tightfit.system.landlock import NoLandlock, restrict_writes
from tightfit.system.private_view import why_there_is_no_view

SCRIPT = Path(__file__).parent / "scripts" / "ways_to_write.py"
REASON = why_there_is_no_view()
needs_view = pytest.mark.skipif(bool(REASON), reason=f"no private view here: {REASON}")


def number_of_ways() -> int:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    (ways,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
    return len(ways.keys)


def make_old_files(folder: Path) -> None:
    (folder / "folder").mkdir(parents=True)
    for name in ("old.txt", "folder/old.txt"):
        (folder / name).write_text("old\n")
    (folder / "old.bin").write_bytes(b"old!" * 1024)
    (folder / "hard").hardlink_to(folder / "old.bin")
    (folder / "latest.pt").symlink_to("old.bin")
    np.save(folder / "old.npy", np.zeros(8))
    np.savez(folder / "old.npz", a=np.zeros(8))
    connection = sqlite3.connect(folder / "old.db")
    connection.execute("create table t (a)")
    connection.execute("insert into t values (1)")
    connection.commit()
    connection.close()
    with tarfile.open(folder / "old.tar", "w") as archive, zipfile.ZipFile(folder / "old.zip", "w") as zipped:
        archive.add(folder / "old.txt", "old.txt")
        zipped.write(folder / "old.txt", "old.txt")
    with shelve.Shelf(dumb.open(str(folder / "old.shelf"), "c")) as shelf:
        shelf["a"] = 1


def state(folder: Path) -> dict[str, tuple[object, ...]]:
    """Every file and folder below: its place on the disk, its rights, its time, its content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        at = path.lstat()
        content = os.readlink(path) if path.is_symlink() else ""
        if path.is_file() and not path.is_symlink():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (at.st_ino, at.st_mode, at.st_mtime_ns, at.st_nlink, content)
    return found


@needs_view
def test_eighty_ways_to_write_change_nothing_and_all_work(tmp_path: Path) -> None:
    ways = number_of_ways()
    assert ways >= 80
    for number in range(ways):
        make_old_files(tmp_path / str(number))
    before = state(tmp_path)
    found = findings(["--gpu", "T4", SCRIPT, tmp_path], folder=tmp_path)
    assert found["outcome"] == "fits", found["stopped_because"]
    assert found["protection"] == "view"
    assert state(tmp_path) == before
    assert str(tmp_path / "0" / "old.bin") in found["not_written"]


@needs_view
class TestView:
    def played(self, folder: Path, code: str, *options: str) -> list[str]:
        """Play a script with this code after a line that uses the card; return the remarks."""
        script = folder / "script.py"
        script.write_text(
            f"import os, socket, sys, torch\nfrom pathlib import Path\ntorch.ones(1, device='cuda')\n{code}"
        )
        found = played(["--gpu", "T4", *options, script], folder=folder)
        assert found.outcome == "fits", found.stopped_because
        return found.notes

    def test_paths_stay_the_same(self, tmp_path: Path) -> None:
        home = os.path.expanduser("~")
        self.played(tmp_path, f"assert os.getcwd() == {str(tmp_path)!r}; assert os.path.expanduser('~') == {home!r}")

    def test_new_files_are_found_and_gone_afterwards(self, tmp_path: Path) -> None:
        code = "os.makedirs('out/a'); Path('out/a/b').write_text('new'); assert Path('out/a/b').stat().st_size == 3"
        self.played(tmp_path, code)
        assert [each.name for each in tmp_path.iterdir()] == ["script.py"]

    def test_devices_and_processes_are_there(self, tmp_path: Path) -> None:
        self.played(
            tmp_path,
            "open('/dev/null', 'w').write('a'); assert os.urandom(3); assert Path('/proc/self/status').read_text()\n"
            "from multiprocessing import shared_memory\nshared_memory.SharedMemory('tf', True, 8).unlink()",
        )

    def test_a_socket_in_a_file_answers(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "s"))
            server.listen()

            def answer() -> None:
                with server.accept()[0] as connection:
                    connection.send(b"hi")

            thread = threading.Thread(target=answer)
            thread.start()
            self.played(tmp_path, "c = socket.socket(socket.AF_UNIX); c.connect('s'); assert c.recv(2) == b'hi'")
            thread.join()

    def test_there_is_no_network_but_this_machine_itself(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            refused = f"c = socket.socket(); assert c.connect_ex(('127.0.0.1', {port})) != 0\n"
            loopback = "s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())\n"
            notes = self.played(tmp_path, refused + loopback)
            assert "without a network" in notes[0]
            self.played(tmp_path, f"socket.create_connection(('127.0.0.1', {port}))", "--network")

    @pytest.mark.parametrize(
        "code",
        [
            "import urllib.request\nurllib.request.urlopen('http://example.org/data')",
            "raise FileNotFoundError(\"Module 'f1' doesn't exist on the Hugging Face Hub either.\")",
        ],
        ids=["downloaded", "hidden"],
    )
    def test_a_download_without_a_network_names_the_option(self, tmp_path: Path, code: str) -> None:
        script = tmp_path / "load.py"
        script.write_text(code)
        found = played(["--gpu", "T4", script], folder=tmp_path)
        assert found.outcome == "error"
        assert "--network" in found.stopped_because

    def test_a_snapshot_lands_outside(self, tmp_path: Path) -> None:
        self.played(tmp_path, "", "--snapshot", "memory.pickle")
        assert (tmp_path / "memory.pickle").stat().st_size > 100

    def test_a_killed_play_leaves_nothing(self, tmp_path: Path) -> None:
        script = tmp_path / "long.py"
        script.write_text(
            "import sys, time\nopen('new', 'w')\nprint('here', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
        )
        words = [sys.executable, "-m", "tightfit", "dryrun", "--gpu", "T4", str(script)]
        mounts = mounted(tmp_path)
        process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert "here\n" in process.stderr  # after lines about progress
        process.send_signal(signal.SIGKILL)
        process.wait()
        with process.stderr:
            process.stderr.read()  # ends with the last process of the play
        assert [each.name for each in tmp_path.iterdir()] == ["long.py"]
        assert mounted(tmp_path) == mounts


def mounted(folder: Path) -> list[str]:
    """Return what is mounted, without what tests in other folders mount meanwhile."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "/pytest-of-" not in line or f"{folder}/" in line]


class TestWithoutView:
    def test_patches_say_what_they_do_not_protect(self, tmp_path: Path) -> None:
        (tmp_path / "old.txt").write_text("old")
        script = tmp_path / "script.py"
        script.write_text("import torch\nopen('old.txt', 'w').write('new')\nopen('new.txt', 'w').write('new')\n")
        environ = {**os.environ, "TIGHTFIT_DRYRUN_FILES": "patches"}
        found = played(["--gpu", "T4", script], folder=tmp_path, environ=environ)
        assert (found.outcome, found.protection, found.not_written) == ("fits", "patches", ["old.txt"])
        assert "other libraries and programs that the script starts can change files" in found.notes[0]
        assert ((tmp_path / "old.txt").read_text(), (tmp_path / "new.txt").read_text()) == ("old", "new")

    def test_landlock_refuses_what_is_elsewhere(self, tmp_path: Path) -> None:
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
        reading, writing = os.pipe()
        if not (child := os.fork()):
            answer = b""
            try:
                restrict_writes([str(tmp_path / "here"), "/dev"])
                (tmp_path / "here" / "new").write_text("new")
                subprocess.run(["touch", tmp_path / "there" / "new"], stderr=subprocess.DEVNULL, check=False)
                answer = b"restricted"
            except NoLandlock as error:
                answer = str(error).encode()
            finally:
                os.write(writing, answer)
                os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        if (answer := os.read(reading, 100)) != b"restricted":
            pytest.skip(f"no Landlock here: {answer.decode()}")
        assert [each.name for each in tmp_path.rglob("new")] == ["new"]
        assert (tmp_path / "here" / "new").exists()
