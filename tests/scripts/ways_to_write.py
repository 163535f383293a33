"""Tries 80 ways to change old files, each in a folder of its own, and checks that each way worked."""

import bz2
import configparser
import csv
import dbm.dumb
import fileinput
import gzip
import io
import json
import logging
import lzma
import mmap
import os
import pathlib
import pickle
import posix
import shelve
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import traceback
import wave
import zipfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

OLD = Path("old.bin")


def write_by(flags):
    handle = os.open("old.bin", flags)
    os.write(handle, b"new")
    os.close(handle)


def edit_in_place():
    with fileinput.input("old.txt", inplace=True) as lines:
        for line in lines:
            print(line.upper(), end="")
    assert Path("old.txt").read_text() == "OLD\n"


def map_memory():
    with open("old.bin", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[:3] = b"new"


def numpy_map(mode):
    array = np.memmap("old.bin", dtype=np.uint8, mode=mode, shape=(4096,))
    array[:3] = 7
    array.flush()
    assert np.memmap("old.bin", dtype=np.uint8, mode="r")[2] == 7


def database():
    connection = sqlite3.connect("old.db")
    connection.execute("insert into t values (2)")
    connection.commit()
    assert connection.execute("select count(*) from t").fetchone() == (2,)
    connection.close()


def archive(mode):
    with tarfile.open("old.tar", mode) as file:
        file.add("old.txt")


def extract():
    with tarfile.open("old.tar") as file:
        file.extractall(filter="data")


def zipped(mode):
    with zipfile.ZipFile("old.zip", mode) as file:
        file.writestr("b", "b")


def unzipped():
    with zipfile.ZipFile("old.zip") as file:
        file.extractall()


def shelf():
    with shelve.Shelf(dbm.dumb.open("old.shelf", "c")) as file:
        file["a"] = 2


def sound():
    with wave.open("old.bin", "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(b"new")


def settings():
    parser = configparser.ConfigParser()
    parser["a"] = {"b": "c"}
    with open("old.txt", "w") as file:
        parser.write(file)


def log():
    handler = logging.FileHandler("old.txt")
    handler.emit(logging.LogRecord("a", 1, "b", 1, "new", (), None))
    handler.close()


def rotated():
    import logging.handlers

    handler = logging.handlers.RotatingFileHandler("old.txt", maxBytes=1, backupCount=1)
    handler.emit(logging.LogRecord("a", 1, "b", 1, "new", (), None))
    handler.close()


def saved_again():
    """Write as a training script does: to a temporary file, then over the latest checkpoint, by its link."""
    with open("latest.pt", "wb") as file:
        torch.save({"a": torch.ones(3)}, file)
    assert torch.load("latest.pt")["a"].shape == (3,)


def by_temporary():
    handle, name = tempfile.mkstemp(dir=".")
    os.write(handle, b"new")
    os.close(handle)
    os.replace(name, "old.bin")
    assert OLD.read_bytes() == b"new"


def gone_and_back():
    shutil.rmtree("folder")
    os.mkdir("folder")
    Path("folder/old.txt").write_text("new")
    assert os.listdir("folder") == ["old.txt"]


WAYS = {
    "open w": lambda: open("old.bin", "w").write("new"),
    "open wb": lambda: open("old.bin", "wb").write(b"new"),
    "open a": lambda: open("old.bin", "a").write("new"),
    "open r+": lambda: open("old.bin", "r+b").write(b"new"),
    "open w+": lambda: open("old.bin", "w+").write("new"),
    "io.open": lambda: io.open("old.bin", "w").write("new"),
    "io.FileIO": lambda: io.FileIO("old.bin", "w").write(b"new"),
    "io.OpenWrapper": lambda: io.TextIOWrapper(io.FileIO("old.bin", "a")).write("new"),
    "opener": lambda: open("old.bin", "w", opener=posix.open).write("new"),
    "os.open": lambda: write_by(os.O_WRONLY),
    "os.open truncate": lambda: write_by(os.O_WRONLY | os.O_TRUNC),
    "os.open append": lambda: write_by(os.O_RDWR | os.O_APPEND),
    "posix.open": lambda: os.close(posix.open("old.bin", os.O_WRONLY | os.O_TRUNC)),
    "os.pwrite": lambda: os.pwrite(os.open("old.bin", os.O_WRONLY), b"new", 1),
    "os.truncate": lambda: os.truncate("old.bin", 0),
    "posix.truncate": lambda: posix.truncate("old.bin", 1),
    "os.ftruncate": lambda: os.ftruncate(os.open("old.bin", os.O_RDWR), 0),
    "os.posix_fallocate": lambda: os.posix_fallocate(os.open("old.bin", os.O_RDWR), 0, 9000),
    "os.sendfile": lambda: os.sendfile(os.open("old.bin", os.O_RDWR), os.open("old.txt", os.O_RDONLY), 0, 3),
    "mmap": map_memory,
    "Path.write_text": lambda: OLD.write_text("new"),
    "Path.write_bytes": lambda: OLD.write_bytes(b"new"),
    "Path.open": lambda: OLD.open("w").write("new"),
    "Path.unlink": lambda: OLD.unlink(),
    "Path.touch": lambda: OLD.touch(),
    "Path.rename": lambda: Path("old.txt").rename("old.bin"),
    "Path.replace": lambda: Path("old.txt").replace("old.bin"),
    "Path.chmod": lambda: OLD.chmod(0o600),
    "chmod, then open": lambda: (os.chmod("old.bin", 0o644), open("old.bin", "w").write("new")),
    "os.remove": lambda: os.remove("old.bin"),
    "os.unlink": lambda: os.unlink("old.bin"),
    "os.rename": lambda: os.rename("old.txt", "old.bin"),
    "os.rename away": lambda: os.rename("old.bin", "away"),
    "os.replace": lambda: os.replace("old.txt", "old.bin"),
    "posix.replace": lambda: posix.replace("old.txt", "old.bin"),
    "os.renames": lambda: os.renames("old.bin", "new/old.bin"),
    "os.utime": lambda: os.utime("old.bin", (1, 1)),
    "os.chmod": lambda: os.chmod("old.bin", 0o777),
    "os.link": lambda: (os.link("old.bin", "hard2"), open("hard2", "w").write("new")),
    "a hard link": lambda: open("hard", "w").write("new"),
    "a symbolic link": lambda: open("latest.pt", "w").write("new"),
    "a new symbolic link": lambda: (os.symlink("old.bin", "soft2"), open("soft2", "w").write("new")),
    "another target": lambda: (os.remove("latest.pt"), os.symlink("old.txt", "latest.pt")),
    "removexattr and back": lambda: os.setxattr("old.bin", "user.a", b"b"),
    "os.open by folder": lambda: os.close(os.open("old.bin", os.O_TRUNC | os.O_RDWR, dir_fd=os.open(".", os.O_RDONLY))),
    "shutil.copy": lambda: shutil.copy("old.txt", "old.bin"),
    "shutil.copy twice": lambda: (shutil.copy("old.txt", "old.bin"), shutil.copy("old.txt", "old.bin")),
    "shutil.copy2": lambda: shutil.copy2("old.txt", "latest.pt"),
    "shutil.copyfile": lambda: shutil.copyfile("old.txt", "old.bin"),
    "shutil.copytree": lambda: shutil.copytree("folder", ".", dirs_exist_ok=True),
    "shutil.move": lambda: shutil.move("old.txt", "old.bin"),
    "shutil.rmtree": lambda: shutil.rmtree("folder"),
    "shutil.rmtree and again": gone_and_back,
    "os.system": lambda: os.system("echo new > old.bin"),
    "subprocess rm": lambda: subprocess.run(["rm", "old.bin"], check=True),
    "subprocess sed": lambda: subprocess.run(["sed", "-i", "s/old/new/", "old.txt"], check=True),
    "subprocess python": lambda: subprocess.run([sys.executable, "-c", "open('old.bin', 'w')"], check=True),
    "os.posix_spawn": lambda: os.waitpid(os.posix_spawn("/bin/rm", ["rm", "old.bin"], os.environ), 0),
    "fork": lambda: os.waitpid(pid, 0) if (pid := os.fork()) else (os.truncate("old.bin", 0), os._exit(0)),
    "fileinput": edit_in_place,
    "tempfile": by_temporary,
    "sqlite3": database,
    "tarfile w": lambda: archive("w"),
    "tarfile a": lambda: archive("a"),
    "tarfile extract": extract,
    "zipfile w": lambda: zipped("w"),
    "zipfile a": lambda: zipped("a"),
    "zipfile extract": unzipped,
    "shelve": shelf,
    "gzip": lambda: gzip.open("old.bin", "wb").write(b"new"),
    "bz2": lambda: bz2.open("old.bin", "wb").write(b"new"),
    "lzma": lambda: lzma.open("old.bin", "wb").write(b"new"),
    "json": lambda: json.dump([1], open("old.txt", "w")),
    "pickle": lambda: pickle.dump([1], open("old.bin", "wb")),
    "csv": lambda: csv.writer(open("old.txt", "w")).writerow([1]),
    "wave": sound,
    "configparser": settings,
    "logging": log,
    "logging, rotated": rotated,
    "np.save": lambda: np.save(open("old.bin", "wb"), np.ones(3)),
    "np.savez": lambda: (np.savez("old.npz", a=np.ones(3)), np.load("old.npz")["a"]),
    "np.savetxt": lambda: np.savetxt("old.txt", np.ones(3)),
    "np.tofile": lambda: np.ones(3).tofile("old.bin"),
    "np.memmap r+": lambda: numpy_map("r+"),
    "np.memmap w+": lambda: numpy_map("w+"),
    "np.open_memmap": lambda: np.lib.format.open_memmap("old.npy", mode="r+")[:].fill(3),
    "torch.save": lambda: torch.save({"a": torch.ones(3)}, "old.bin"),
    "torch.save to a link": saved_again,
    "torch.from_file": lambda: torch.from_file("old.bin", shared=True, size=4096, dtype=torch.uint8).fill_(1),
    "safetensors.torch": lambda: safetensors.torch.save_file({"a": torch.ones(3)}, "old.bin"),
    "safetensors.numpy": lambda: safetensors.numpy.save_file({"a": np.ones(3)}, "old.bin"),
    "a file with no rights": lambda: (os.chmod("folder/old.txt", 0), os.remove("folder/old.txt")),
    "pathlib of a folder": lambda: [each.unlink() for each in pathlib.Path("folder").iterdir()],
}

on_card = torch.ones(1000, device="cuda")
failed = []
for number, (name, way) in enumerate(WAYS.items()):
    os.chdir(f"{sys.argv[1]}/{number}")
    try:
        way()
    except Exception:
        failed.append(f"{name}: {traceback.format_exc(limit=-1)}")
assert not failed, "\n".join(failed)
print(f"{len(WAYS)} ways")
