"""Linux's Landlock: this process and its children can write in named folders only. It needs no privilege."""

import ctypes
import os
import struct
import sys
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""System calls, with the same numbers on all architectures."""
_VERSION = 1
"""Flag that asks for the version."""
_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38
_WRITE_FILE, _TRUNCATE, _REFER = 1 << 1, 1 << 14, 1 << 13
_CHANGES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))
"""Writing, removing and making of files, folders and links, as of version 1."""


class NoLandlock(Exception):
    """The kernel does not offer it; the text is its reason."""


def restrict_writes(folders: Iterable[str]) -> None:
    """Let this process and its children write below `folders` alone, for good. NoLandlock where that cannot be."""
    if sys.platform != "linux":
        raise NoLandlock("not Linux")
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    if version < 3:  # before, a file could still be cut
        raise NoLandlock(os.strerror(ctypes.get_errno()) if version < 0 else f"version {version}")
    changes = _CHANGES | _TRUNCATE | _REFER
    attributes = struct.pack("Q", changes)
    rules = _checked(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    try:
        for folder in folders:
            _allow(libc, rules, folder, changes)
        _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(libc.syscall(_RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)


def _allow(libc: ctypes.CDLL, rules: int, folder: str, changes: int) -> None:
    try:
        opened = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    except OSError:  # it is not there
        return
    try:
        # The kernel's record is packed: 8 bytes of rights, 4 of the descriptor.
        _checked(libc.syscall(_ADD_RULE, rules, _BENEATH, struct.pack("=Qi", changes, opened), 0))
    finally:
        os.close(opened)


def _checked(result: int) -> int:
    if result < 0:
        raise NoLandlock(os.strerror(ctypes.get_errno()))
    return result
