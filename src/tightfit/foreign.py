"""The border for files that others may have written: bounds of time and memory, and one list of what damage raises."""

import pickle
import struct
import subprocess
import sys
import zipfile
import zlib

DAMAGE = (
    OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    RuntimeError, MemoryError, ImportError, SyntaxError, Warning,
    pickle.PickleError, struct.error, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error,
)  # fmt: skip
"""What the readers of zip archives, pickles, JSON and tensors raise for a file that is cut, altered or hostile."""
PICKLE_S, PICKLE_BYTES = 20, 1 << 30
"""Seconds and memory that a pickle of plain values may take to be read. GPT-2 XL's takes 0.02 s and 20 MiB."""
BYTES_PER_BYTE, BYTES_PER_SECOND = 40, 2_000_000
"""A larger pickle may take more: 40 bytes of memory for each byte of the file, and a second for every 2 MB.

A memory snapshot of 109 MB takes 13 bytes for each byte, and is read at 22 MB/s.
"""

_TRIAL = f"""
import io, pickle, resource, sys
most = {PICKLE_BYTES} + {BYTES_PER_BYTE} * int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
class Anything:
    def __new__(cls, *given, **named): return object.__new__(cls)
    def __call__(self, *given, **named): return Anything()
    def __setstate__(self, state): pass
    def __setitem__(self, key, value): pass
    def append(self, value): pass
class Reader(pickle.Unpickler):
    def find_class(self, module, name): return Anything
    def persistent_load(self, key): return Anything()
data = io.BytesIO(sys.stdin.buffer.read(int(sys.argv[1])))
try:
    for _ in range(int(sys.argv[2])):
        Reader(data).load()
except MemoryError:
    sys.exit(9)
"""


def reads_in_bounds(pickled: bytes, *, streams: int = 1) -> bool:
    """Return False if reading these pickles takes too long or too much memory; nothing that they name is called.

    A child reads them, because a few bytes can ask for gigabytes, or for hours: keys with one hash, nested tuples.
    """
    if sys.platform != "linux":
        return True
    words = [sys.executable, "-I", "-S", "-c", _TRIAL, str(len(pickled)), str(streams)]
    try:
        seconds = PICKLE_S + len(pickled) / BYTES_PER_SECOND
        ended = subprocess.run(words, input=pickled, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False
    return ended.returncode in (0, 1)  # 1: an error of the reader, which the real one will raise, too
